"""Byte tokens: what goes in comes out, cut only between characters, padded and masked alike."""

import pickle

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from kling_jax import errors
from kling_jax.data import tokens

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@hypothesis.given(st.lists(texts, max_size=4), st.integers(3, 60))
def test_rows_decode_to_the_longest_prefix_that_fits(batch, length):
  tokens_BL, mask_BL = tokens.ByteTokenizer(length)(batch)
  assert tokens_BL.shape == mask_BL.shape == (len(batch), length)
  assert (tokens_BL.dtype, mask_BL.dtype) == (np.int32, np.bool_)
  for text, row_L, mask_L in zip(batch, tokens_BL, mask_BL, strict=True):
    decoded = tokens.ByteTokenizer(length).decode(row_L)
    assert text.startswith(decoded)
    if decoded != text:  # one more character would not have fitted
      assert len(text[: len(decoded) + 1].encode()) > length - 2
    used = len(decoded.encode()) + 2
    assert mask_L.sum() == used and mask_L[:used].all()
    assert row_L[0] == tokens.BOS and row_L[used - 1] == tokens.EOS and (row_L[used:] == tokens.PAD).all()


@hypothesis.given(st.binary(max_size=30), st.integers(0, 30))
def test_cut_never_exceeds_the_length_even_on_broken_bytes(payload, length):
  kept = tokens.cut(payload, length)
  assert len(kept) <= length and payload.startswith(kept)


@hypothesis.given(st.lists(st.integers(0, tokens.VOCABULARY - 1), max_size=30))
def test_decode_takes_anything_that_a_model_may_write(row):
  assert isinstance(tokens.ByteTokenizer(8).decode(row), str)


def test_characters_are_not_split():
  tokenizer = tokens.ByteTokenizer(2 + 5)
  assert tokenizer.decode(tokenizer(["aé漢字"])[0][0]) == "aé"  # 1 + 2 bytes fit, the next three do not


def test_lone_surrogates_become_question_marks():
  tokenizer = tokens.ByteTokenizer(16)
  assert tokenizer.decode(tokenizer(["a\udc80b"])[0][0]) == "a?b"


def test_it_travels_pickled_and_is_a_value():
  tokenizer = tokens.ByteTokenizer(12)
  assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer


WORDS = (",", "a", "ball", "is", "red", "there")
phrases = st.lists(st.sampled_from(WORDS[1:]), max_size=12)


@hypothesis.given(st.lists(phrases, max_size=4), st.integers(3, 20))
def test_words_decode_to_the_first_that_fit(batch, length):
  tokenizer = tokens.WordTokenizer(length, WORDS)
  tokens_BL, mask_BL = tokenizer([" ".join(words) for words in batch])
  assert tokens_BL.shape == mask_BL.shape == (len(batch), length)
  assert (tokens_BL.dtype, mask_BL.dtype) == (np.int32, np.bool_)
  for words, row_L, mask_L in zip(batch, tokens_BL, mask_BL, strict=True):
    kept = words[: length - 2]
    assert tokenizer.decode(row_L) == " ".join(kept) and tokenizer.count(" ".join(words)) == len(words)
    assert row_L[0] == tokens.BOS and row_L[len(kept) + 1] == tokens.EOS and (row_L[len(kept) + 2 :] == 0).all()
    assert mask_L.sum() == len(kept) + 2 and (row_L[: len(kept) + 2] < tokenizer.vocabulary).all()


def test_capitals_and_full_stops_are_overlooked_and_other_marks_are_words():
  tokenizer = tokens.WordTokenizer(9, WORDS)
  rows = tokenizer(["There is a ball, red", " THERE is a  ball , red. "])[0]
  np.testing.assert_array_equal(*rows)
  assert tokenizer.decode(rows[0]) == "there is a ball, red"
  assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer
  for text, message in (("a bal", "'bal' of 'a bal' is not known; did you mean 'ball'"), ("a; ball", "';'")):
    with pytest.raises(errors.DataError, match=message):
      tokenizer([text])
  with pytest.raises(errors.DataError, match="token 9"):
    tokenizer.decode([9])
  with pytest.raises(errors.ConfigError, match="3 or more"):
    tokens.WordTokenizer(2, WORDS)
  with pytest.raises(TypeError, match=r"\[text\]"):
    tokenizer("a ball")


def test_wrong_use_is_said():
  with pytest.raises(errors.ConfigError, match="3 or more"):
    tokens.ByteTokenizer(2)
  with pytest.raises(TypeError, match=r"\[text\]"):
    tokens.ByteTokenizer(8)("abc")
  with pytest.raises(errors.DataError, match=r"0\.\.258"):
    tokens.ByteTokenizer(8).decode([259])
