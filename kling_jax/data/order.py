"""What comes when, without history: draws, reshuffled epochs and weighted rounds, each a pure function of its place.

Nothing here keeps state or memory of the size of a set, so all processes agree on every place and a run resumes
anywhere. Streams are named by texts that hold the seed. Only NumPy's Philox words are used, which its policy keeps the
same for ever; orders do not depend on the release of any library.
"""

import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from kling_jax.errors import ConfigError

SHORTEST_PERIOD, LONGEST_PERIOD = 64, 8192  # places of one round
ROUNDS = 8  # of the Feistel network: half of the bits change in each
WORD = 2**64 - 1


def draws(stream: str, place: int, count: int) -> np.ndarray:
  """`count` uniform 64-bit words of `place` in `stream`."""
  return np.random.Philox(key=_key(stream), counter=[0, place, 0, 0]).random_raw(count)


@functools.lru_cache(maxsize=256)
def _key(stream: str) -> np.ndarray:
  return np.frombuffer(hashlib.blake2b(stream.encode(), digest_size=16).digest(), "<u8")


def shuffled(stream: str, place: int, size: int) -> int:
  """The item at `place` of an endless stream over items 0 .. size - 1: epochs, each in an order of its own.

  A Feistel network permutes the numbers of as many bits as `size` has; what falls beyond `size` goes round again. (The
  shuffle of Grain 0.2.18 does the same on at least 16 bits, which takes 1.7 ms a clip in a set of 20; here it is 9 us
  for every size.)
  """
  epoch, item = divmod(place, size)
  bits = max((size - 1).bit_length(), 2)
  low = bits // 2
  high = bits - low
  keys = _round_keys(stream, epoch)
  while True:
    left, right = item >> low, item & ((1 << low) - 1)
    for number, key in enumerate(keys):
      if number % 2:
        right ^= _mix(left, key) >> (64 - low)
      else:
        left ^= _mix(right, key) >> (64 - high)
    item = left << low | right
    if item < size:
      return item


@functools.lru_cache(maxsize=256)
def _round_keys(stream: str, epoch: int) -> tuple[int, ...]:
  return tuple(draws(f"{stream}/epoch", epoch, ROUNDS).tolist())


def _mix(value: int, key: int) -> int:
  """A 64-bit hash of (value, key): the finaliser of splitmix64."""
  word = (value * 0x9E3779B97F4A7C15 + key) & WORD
  word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
  word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
  return word ^ (word >> 31)


class Schedule:
  """Which of several parts each place belongs to: buckets over steps, or sources over the rows of a bucket.

  Places are dealt in rounds of a fixed length, in each of which every part has its share; the order within a round is a
  permutation seeded by (stream, round).
  """

  def __init__(self, weights: Sequence[float], stream: str):
    """Plans the rounds.

    Args:
      weights: one a part, not negative, any sum; a part of weight 0 never comes. Shares are rounded to whole places of
        a round (largest remainder, at least one place each); a round is long enough to give the rarest part four
        places, up to 8,192 places.
      stream: names the orders; it holds the seed.

    Raises:
      ConfigError: weights that give no shares.
    """
    total = math.fsum(weights)
    if not total > 0 or min(weights) < 0 or not math.isfinite(total):
      raise ConfigError(f"weights are {list(weights)}; they must be finite, not negative, and not all 0")
    share = [weight / total for weight in weights]
    rarest = min(part for part in share if part > 0)
    self.period = min(max(math.ceil(4 / rarest), SHORTEST_PERIOD), LONGEST_PERIOD)
    self.counts = _apportion(share, self.period)
    self.stream = stream

  def at(self, place: int) -> tuple[int, int]:
    """(part, k): the part that `place` belongs to, and how often it came in the places before."""
    if place < 0:
      raise IndexError(f"place {place} is negative")
    round_, within = divmod(place, self.period)
    order, earlier = _round(self.counts, self.stream, round_)
    part = int(order[within])
    return part, round_ * self.counts[part] + int(earlier[within])


def _apportion(share: Sequence[float], total: int) -> tuple[int, ...]:
  """Whole numbers that sum to `total`, nearest to share * total, at least 1 where the share is above 0."""
  exact = [part * total for part in share]
  counts = [max(int(value), int(value > 0)) for value in exact]
  while sum(counts) != total:
    sign = 1 if sum(counts) < total else -1
    movable = [b for b, count in enumerate(counts) if exact[b] > 0 and (sign > 0 or count > 1)]
    counts[max(movable, key=lambda b: sign * (exact[b] - counts[b]))] += sign
  return tuple(counts)


@functools.lru_cache(maxsize=64)
def _round(counts: tuple[int, ...], stream: str, round_: int) -> tuple[np.ndarray, np.ndarray]:
  """The parts of one round in order, and for each place how often its part came before within the round."""
  order = np.repeat(np.arange(len(counts)), counts)
  order = order[np.argsort(draws(stream, round_, len(order)), kind="stable")]
  earlier = np.zeros(len(order), np.int64)
  for part in range(len(counts)):
    earlier[order == part] = np.arange(counts[part])
  return order, earlier
