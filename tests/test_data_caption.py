"""Captions in six parts: merging, cleaning, token counts, and how they stand in records, tables and sidecar files."""

import dataclasses
import json
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from kling_jax import errors
from kling_jax.data import cache, caption, clip_table, encode, folder, record, records, tokens, verify

KOALA = ("a red kite", "climbs over the sea.", "The beach is empty", "Soft light", "The camera pans left.", "")


def test_parts_become_one_paragraph() -> None:
  said = caption.merge(KOALA)
  assert said == "a red kite climbs over the sea. The beach is empty. Soft light. The camera pans left."
  assert caption.merge(["One.", "", "One.", "two"]) == "One. two."
  assert caption.merge(['He says "no."', "Stop"]) == 'He says "no." Stop.'
  assert caption.merge([]) == ""


@given(st.lists(st.text(max_size=12), max_size=6))
def test_merging_keeps_every_part_in_order(parts: list[str]) -> None:
  merged = caption.merge(parts)
  place = 0
  for part in dict.fromkeys(" ".join(part.split()) for part in parts):
    place = merged.index(part, place) + len(part)


@given(st.text(max_size=80), st.integers(1, 30))
def test_cleaned_text_is_one_bounded_legal_line(text: str, letters: int) -> None:
  cleaned = caption.clean(text, letters)
  assert len(cleaned) <= letters and cleaned == " ".join(cleaned.split())
  assert all(c.isprintable() or c in "\u200c\u200d" or not c.isascii() for c in cleaned)
  cleaned.encode("utf-8")
  assert caption.clean(cleaned, letters) == cleaned


def test_hostile_text_is_plain_text_afterwards() -> None:
  assert caption.clean("a\x00b\x1b[31m\u202ec\r\nd\ud800\u2028e", 99) == "ab[31mc d\ufffd e"
  assert caption.clean("<script>alert(1)</script>", 99) == "<script>alert(1)</script>"  # text; the page escapes it
  assert caption.clean("One two. Three four. Five six", 22) == "One two. Three four."
  assert caption.clean("x" * 99, 10) == "x" * 10
  assert len(caption.Caption(subject="word " * 10**6).subject) <= caption.PART_LETTERS


def test_tokens_are_those_of_the_text_encoder(tmp_path: pathlib.Path) -> None:
  for text in ("kite", "süß", "日本"):
    _, mask_BL = tokens.ByteTokenizer(64)([text])
    assert caption.BYTES.of(text) == mask_BL.sum()
  model = tokenizers.models.WordLevel({"a": 0, "kite": 1, "[UNK]": 2}, "[UNK]")
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.enable_truncation(2)
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  counter = caption.token_count(tmp_path / "tokenizer.json")
  assert counter.of("a kite , a kite") == 5 and counter.name.startswith("tokenizer-")
  (tmp_path / "no.json").write_text("{}")
  with pytest.raises(errors.DataError, match=r"no\.json: no tokenizer"):
    caption.token_count(tmp_path / "no.json")


@pytest.fixture(scope="module")
def media() -> bytes:
  return encode.encode([np.full((24, 32, 3), 60, np.uint8)] * 5, fps=10)


def write(top: pathlib.Path, media: bytes) -> pathlib.Path:
  info = record.ClipRecord("ab" * 16, "v.mp4", "/v.mp4", 0, 5, "1/10", 10.0, 32, 24, 5)
  with records.RecordWriter(top, "r") as writer:
    writer.write(info, media)
  return top


def test_captions_stand_in_records_and_table(tmp_path: pathlib.Path, media: bytes) -> None:
  top = write(tmp_path, media)
  said = caption.of_parts(dict(zip(record.CAPTION_FIELDS, KOALA, strict=True)), captioner="server", model="m")
  records.rewrite(top, lambda clip: caption.put(clip, said))
  [(clip, _)] = records.read_all(top)
  assert caption.of_record(clip) == said and clip.caption == said.text
  assert clip.caption_tokens == len(said.text) + 2 and clip.caption_part_tokens == (12, 22, 20, 12, 23, 0)
  [row] = pq.read_table(top / "clips.parquet").to_pylist()
  assert (row["camera"], row["captioner"], row["caption_part_tokens"][5]) == ("The camera pans left.", "server", 0)
  assert verify.verify(top).ok


def test_a_changed_caption_is_not_found_in_the_text_cache(tmp_path: pathlib.Path, media: bytes) -> None:
  top = write(tmp_path, media)
  records.rewrite(top, lambda clip: caption.put(clip, caption.Caption(text="old")))
  card = cache.Card("text", "bytes", "0")
  with cache.Writer(card.folder(top), card) as writer:
    writer.add("ab" * 16, cache.text_variant("old"), np.zeros((2, 4), np.float32))
  held = cache.TextCache(card.folder(top), card)
  assert held.get("ab" * 16, records.RecordSource(top).info(0).caption).shape == (2, 4)
  records.rewrite(top, lambda clip: caption.put(clip, caption.Caption(text="new")))
  with pytest.raises(errors.DataError, match="it holds that clip for"):
    held.get("ab" * 16, records.RecordSource(top).info(0).caption)


def test_a_set_that_is_older_than_a_field_opens(tmp_path: pathlib.Path, media: bytes) -> None:
  top = write(tmp_path, media)
  table = pq.read_table(top / "clips.parquet")
  pq.write_table(table.drop_columns(["captioner", "caption_part_tokens"]), top / "clips.parquet")
  assert clip_table.Index.load(top).clip(0) == next(records.read_all(top))[0]
  assert verify.verify(top).ok
  pq.write_table(table.drop_columns(["caption"]), top / "clips.parquet")
  with pytest.raises(errors.DataError, match="differ from this release's in caption"):
    clip_table.Index.load(top)


def test_sidecar_files_bring_their_parts(tmp_path: pathlib.Path) -> None:
  (tmp_path / "a.json").write_text(json.dumps({"subject": "a cat", "action": "sleeps", "camera": "Static."}))
  (tmp_path / "captions.csv").write_text("file,start_s,end_s,caption,world\nb.mp4,0,2,,A park\nb.mp4,2,4,Rain,\n")
  captions = folder.Captions(tmp_path)
  cat = captions.of(str(tmp_path / "a.mp4"), "a.mp4")
  assert cat.parts["camera"] == "Static." and cat.text == "a cat sleeps. Static."
  assert (cat.captioner, cat.model) == ("sidecar", "json")
  assert captions.of(str(tmp_path / "b.mp4"), "b.mp4", (0.5, 2.0)).world == "A park"
  assert captions.of(str(tmp_path / "b.mp4"), "b.mp4").text == "A park. Rain"
  assert not captions.of(str(tmp_path / "c.mp4"), "c.mp4")
  assert dataclasses.asdict(captions.of(str(tmp_path / "c.mp4"), "c.mp4"))["captioner"] == ""
