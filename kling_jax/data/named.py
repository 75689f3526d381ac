"""What procedural worlds choose by name: colours, draws that are hashes of their name, articles before words."""

import hashlib

import numpy as np

COLOURS = {
  "red": (0.86, 0.12, 0.14),
  "orange": (0.96, 0.54, 0.10),
  "yellow": (0.95, 0.87, 0.16),
  "green": (0.13, 0.64, 0.24),
  "cyan": (0.12, 0.76, 0.80),
  "blue": (0.14, 0.30, 0.85),
  "purple": (0.50, 0.18, 0.72),
  "pink": (0.94, 0.48, 0.68),
  "white": (0.95, 0.95, 0.95),
  "black": (0.06, 0.06, 0.06),
}
GREY = (0.45, 0.45, 0.45)  # of pillars and walls; no object and no background has it
LUMA = np.array([0.299, 0.587, 0.114])


def article(words: str) -> str:
  """The words with "a" or "an" before them."""
  return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


class Draws:
  """Named choices of one clip; each is a hash of its name, so that the order of asking does not matter."""

  def __init__(self, world: str, seed: int, index: int):
    self._stem = f"{world}/{seed}/{index}/"

  def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
    digest = hashlib.sha256((self._stem + name).encode()).digest()
    return low + (high - low) * (int.from_bytes(digest[:6], "big") / 2**48)

  def choice(self, name: str, options):
    return options[int(self.uniform(name) * len(options))]
