"""Text as bytes: a tokenizer without a vocabulary file, for text encoders that are trained with the model."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from kling_jax import errors

PAD, BOS, EOS = 0, 1, 2
SPECIAL = 3  # byte b has the token b + SPECIAL
VOCABULARY = SPECIAL + 256


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """UTF-8 bytes between a begin and an end token, padded at the right to one length.

  Text that does not fit is cut after the last whole character that does, so that every row decodes. Lone surrogates
  (undecodable file names) become "?". Frozen and without open files: Grain's workers receive it pickled.

  Attributes:
    max_length: tokens a row, the two special ones included; at least 3.
  """

  max_length: int

  def __post_init__(self) -> None:
    if self.max_length < 3:
      raise errors.ConfigError(
        f"tokenizer max_length is {self.max_length}; it holds begin, end and at least one byte: give 3 or more"
      )

  @property
  def vocabulary(self) -> int:
    """The number of distinct tokens."""
    return VOCABULARY

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


def cut(payload: bytes, length: int) -> bytes:
  """The longest prefix of UTF-8 `payload` with at most `length` bytes that ends between two characters."""
  if len(payload) <= length:
    return payload
  while length and payload[length] & 0b1100_0000 == 0b1000_0000:  # byte `length` continues a character: step back
    length -= 1
  return payload[:length]
