"""Text as tokens: bytes, words of a made-up world, and the tokenizers that come in files with pretrained encoders."""

import dataclasses
import functools
import html
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from kling_jax import errors

PAD, BOS, EOS = 0, 1, 2
SPECIAL = 3  # byte b has the token b + SPECIAL
VOCABULARY = SPECIAL + 256


class TextTokenizer(Protocol):
  """Rows [begin, tokens, end], padded at the right, and back; what a model that writes needs of its tokenizer.

  Attributes:
    unit: what one token is, in the plural, for messages.
    vocabulary: how many tokens there are.
  """

  unit: str

  @property
  def vocabulary(self) -> int: ...

  def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...

  def count(self, text: str) -> int: ...

  def decode(self, tokens_L: Iterable[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """UTF-8 bytes between a begin and an end token, padded at the right to one length.

  Text that does not fit is cut after the last whole character that does, so that every row decodes. Lone surrogates
  (undecodable file names) become "?". Frozen and without open files: Grain's workers receive it pickled.

  Attributes:
    max_length: tokens a row, the two special ones included; at least 3.
  """

  max_length: int
  unit = "bytes"

  def __post_init__(self) -> None:
    _check_length(self.max_length)

  @property
  def vocabulary(self) -> int:
    """The number of distinct tokens."""
    return VOCABULARY

  def count(self, text: str) -> int:
    """Tokens of a text, the special ones left out."""
    return len(text.encode("utf-8", errors="replace"))

  def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes a batch.

    Returns:
      tokens_BL int32 and mask_BL bool (true where a token stands), both (len(texts), max_length). Empty text is
      [begin, end], so that no row is fully masked.
    """
    if isinstance(texts, str):
      raise TypeError("ByteTokenizer takes a list of texts; give [text] for one")
    tokens_BL = np.full((len(texts), self.max_length), PAD, np.int32)
    lengths_B = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
      payload = cut(text.encode("utf-8", errors="replace"), self.max_length - 2)
      tokens_BL[row, 0] = BOS
      tokens_BL[row, 1 : 1 + len(payload)] = np.frombuffer(payload, np.uint8).astype(np.int32) + SPECIAL
      tokens_BL[row, 1 + len(payload)] = EOS
      lengths_B[row] = len(payload) + 2
    return tokens_BL, np.arange(self.max_length) < lengths_B[:, None]

  def decode(self, tokens_L: Iterable[int]) -> str:
    """The text of one row; special tokens are dropped, broken UTF-8 (a model's output) becomes U+FFFD.

    Raises:
      DataError: a token outside the vocabulary.
    """
    values = [int(token) for token in tokens_L]
    wrong = [value for value in values if not 0 <= value < VOCABULARY]
    if wrong:
      raise errors.DataError(f"token {wrong[0]} is not one of a byte tokenizer's 0..{VOCABULARY - 1}")
    return bytes(value - SPECIAL for value in values if value >= SPECIAL).decode("utf-8", errors="replace")


def _check_length(max_length: int) -> None:
  if max_length < 3:
    raise errors.ConfigError(
      f"tokenizer max_length is {max_length}; it holds begin, end and at least one token: give 3 or more"
    )


@dataclasses.dataclass(frozen=True)
class WordTokenizer:
  """Words of a closed vocabulary between a begin and an end token, padded at the right to one length.

  Capitals and a full stop at the end are overlooked; other punctuation is words of its own. Text that does not fit is
  cut after the last word that does. The special tokens are those of bytes; word k of the vocabulary is k + SPECIAL.

  Attributes:
    max_length: tokens a row, the two special ones included; at least 3.
    words: the vocabulary.
  """

  max_length: int
  words: tuple[str, ...]
  unit = "words"

  def __post_init__(self) -> None:
    _check_length(self.max_length)

  @property
  def vocabulary(self) -> int:
    """The number of distinct tokens."""
    return SPECIAL + len(self.words)

  def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """As of `ByteTokenizer`.

    Raises:
      DataError: a word outside the vocabulary.
    """
    if isinstance(texts, str):
      raise TypeError("WordTokenizer takes a list of texts; give [text] for one")
    places = _places(self.words)
    tokens_BL = np.full((len(texts), self.max_length), PAD, np.int32)
    lengths_B = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
      said = _said(text)
      unknown = next((word for word in said if word not in places), None)
      if unknown is not None:
        raise errors.DataError(f"the word {unknown!r} of {text!r} is not known{errors.nearest(unknown, self.words)}")
      ids = [BOS, *(places[word] for word in said[: self.max_length - 2]), EOS]
      tokens_BL[row, : len(ids)] = ids
      lengths_B[row] = len(ids)
    return tokens_BL, np.arange(self.max_length) < lengths_B[:, None]

  def count(self, text: str) -> int:
    """Tokens of a text, the special ones left out."""
    return len(_said(text))

  def decode(self, tokens_L: Iterable[int]) -> str:
    """The text of one row; special tokens are dropped. Raises DataError: a token outside the vocabulary."""
    values = [int(token) for token in tokens_L]
    wrong = [value for value in values if not 0 <= value < self.vocabulary]
    if wrong:
      raise errors.DataError(f"token {wrong[0]} is not one of these words' 0..{self.vocabulary - 1}")
    text = " ".join(self.words[value - SPECIAL] for value in values if value >= SPECIAL)
    return re.sub(r" (?=[^\w\s])", "", text)


def _said(text: str) -> list[str]:
  return re.findall(r"\w+|[^\w\s]", text.lower().strip().removesuffix("."))


@functools.lru_cache(maxsize=8)
def _places(words: tuple[str, ...]) -> dict[str, int]:
  return {word: number for number, word in enumerate(words, SPECIAL)}


def cut(payload: bytes, length: int) -> bytes:
  """The longest prefix of UTF-8 `payload` with at most `length` bytes that ends between two characters."""
  if len(payload) <= length:
    return payload
  while length and payload[length] & 0b1100_0000 == 0b1000_0000:  # byte `length` continues a character: step back
    length -= 1
  return payload[:length]


# ---- tokenizers of pretrained encoders -------------------------------------------------------------------------------

FAST = ("tokenizer.json",)  # Hugging Face tokenizers
PIECES = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")  # SentencePiece
FILE_BYTES = 64 * 2**20  # umT5's, of 256,000 pieces, has 17 MB
EXTRA = "pip install 'kling_jax[caption]'"


@dataclasses.dataclass(frozen=True)
class FileTokenizer:
  """The tokenizer in a file beside a text encoder, padded at the right to one length.

  HTML entities are resolved and runs of white space made one space before, as Wan 2.1 does. Every row ends with the end
  token that the file defines (T5, CLIP), also where the text was cut. Frozen and without open files; loaded once a
  process.

  Attributes:
    path: tokenizer.json, or a SentencePiece model.
    max_length: tokens a row, special ones included.
  """

  path: str
  max_length: int

  @classmethod
  def find(cls, folder: str | os.PathLike[str], max_length: int) -> "FileTokenizer":
    """The tokenizer in `folder`, in its subfolder `tokenizer`, or in the folder of that name beside it.

    Raises:
      DataError: there is none.
    """
    folder = pathlib.Path(folder)
    places = (folder, folder / "tokenizer", folder.parent / "tokenizer")
    for path in (place / name for place in places for name in (*FAST, *PIECES)):
      if path.is_file():
        return cls(str(path), max_length)
    raise errors.DataError(
      f"no tokenizer in {', '.join(map(str, places))}: wants one of {', '.join((*FAST, *PIECES))} beside the encoder"
    )

  def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """tokens_BL int32 (padding 0) and mask_BL bool, both (len(texts), max_length).

    Raises:
      DataError: the file is no tokenizer. UsageError: the package that reads it is missing.
    """
    if isinstance(texts, str):
      raise TypeError("FileTokenizer takes a list of texts; give [text] for one")
    encode = _reader(self.path)
    tokens_BL = np.zeros((len(texts), self.max_length), np.int32)
    lengths_B = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
      ids = encode(tidy(text))
      ids = ids if len(ids) <= self.max_length else [*ids[: self.max_length - 1], ids[-1]]
      tokens_BL[row, : len(ids)] = ids
      lengths_B[row] = len(ids)
    return tokens_BL, np.arange(self.max_length) < lengths_B[:, None]


def tidy(text: str) -> str:
  """Entities resolved (twice: some captions were escaped twice), white space as single spaces."""
  text = html.unescape(html.unescape(text)).encode("utf-8", errors="replace").decode("utf-8")
  return re.sub(r"\s+", " ", text).strip()


@functools.lru_cache(maxsize=4)
def _reader(path: str) -> Callable[[str], list[int]]:
  """Text to token numbers, special tokens included."""
  file = pathlib.Path(path)
  try:
    if file.stat().st_size > FILE_BYTES:
      raise ValueError(f"it has {file.stat().st_size} bytes")
    if file.name in FAST:
      import tokenizers

      fast = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
      fast.no_padding()
      fast.no_truncation()
      encode = lambda text: list(fast.encode(text).ids)
      _check_end(path, encode)
      return encode
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(file.read_bytes())
    end = [pieces.eos_id()] if pieces.eos_id() >= 0 else []
    return lambda text: [*pieces.EncodeAsIds(text), *end]
  except ImportError as error:
    raise errors.UsageError(f"reading {path} needs the package {error.name}: {EXTRA}") from error
  except errors.DataError:
    raise
  except Exception as error:  # the readers raise bare Exception and RuntimeError
    raise errors.DataError(f"{path} is no tokenizer ({str(error)[:200]}); copy it again") from error


def _check_end(path: str, encode: Callable[[str], list[int]]) -> None:
  """Raises DataError where an empty text has no tokens: nothing marks the end, and a row could be empty."""
  if not encode(""):
    raise errors.DataError(f"{path} adds no end token to a text, so that an empty one has none; take the encoder's own")
