"""Balancing of the long tail: caps and tempered sampling of groups of clips, and sampling weights.

  cap(100, source)                          at most 100 clips a source
  cap(50, bins(motion, 0.01, 0.1), source, best=vtss)    of each group the 50 with the highest vtss
  temper(0.5, source)                       a group of n clips keeps n (m / n)^0.5 of them, m: size of the smallest

Within a group the order is that of a hash of the seed and the clip's id (of `best`, where given, then of the hash): the
same clips are taken on every machine, in any order of the table, and a smaller cap takes a part of a larger one's.
Clips whose value is missing are a group of their own.
"""

import ast
import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from kling_jax.curation.rules import Evaluator, Rule, Value
from kling_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Balance:
  """What a balancing rule does with the clips that are left.

  Attributes:
    taken: (N,) bool; false for clips that were not left.
    rank: (N,) place of a clip in its group, from 0. size, share: (N,) clips of its group, and how many are taken.
  """

  taken: np.ndarray
  rank: np.ndarray
  size: np.ndarray
  share: np.ndarray


def balance(rule: Rule, evaluator: Evaluator, left: np.ndarray, ids: Sequence[str], seed: int) -> Balance:
  """Applies `cap` or `temper` to the clips in `left`.

  Args:
    left: (N,) bool, what earlier rules keep.
    ids: names of all clips.
    seed: of the order within groups.

  Raises:
    UsageError: the number does not fit, or a part is neither a number nor a text.
  """
  call = rule.tree
  assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
  amount = float(call.args[0].value)  # type: ignore[attr-defined]
  keys = [evaluator.value(part) for part in call.args[1:]]
  best = next((evaluator.value(key.value) for key in call.keywords), None)
  if best is not None and best.kind != "number":
    raise UsageError(f"rule {rule.keep!r}: best wants a number, for example best=vtss")
  places = np.flatnonzero(left)
  group = groups(keys, len(left))[places]
  _, group, counts = np.unique(group, return_inverse=True, return_counts=True)
  share = shares(rule.keep, call.func.id, amount, counts)
  sorting = [_hashes([ids[int(place)] for place in places], seed), group]
  if best is not None:
    values = np.where(np.broadcast_to(best.known, left.shape), best.values, -np.inf)[places]
    sorting.insert(1, -values)
  order = np.lexsort(sorting)
  starts = np.concatenate([[0], np.cumsum(counts)])[:-1] if len(counts) else np.zeros(0, int)
  rank = np.zeros(len(left), np.int64)
  rank[places[order]] = np.arange(len(places)) - np.repeat(starts, counts)
  size, most = np.zeros((2, len(left)), np.int64)
  size[places], most[places] = counts[group], share[group]
  return Balance(left & (rank < most), rank, size, most)


def shares(text: str, kind: str, amount: float, counts: np.ndarray) -> np.ndarray:
  """How many clips of groups of `counts` are taken.

  Raises:
    UsageError: a cap below 1 or not whole, or a power outside 0 to 1.
  """
  if kind == "cap":
    if amount < 1 or amount != int(amount):
      raise UsageError(f"rule {text!r}: cap wants a whole number of at least 1")
    return np.minimum(counts, int(amount))
  if not 0 <= amount <= 1:
    raise UsageError(
      f"rule {text!r}: temper wants a power from 0 (all stay) to 1 (all groups are as small as the least)"
    )
  smallest = counts.min() if len(counts) else 1
  return np.maximum(1, np.rint(counts * (smallest / counts) ** amount)).astype(np.int64)


def groups(keys: Sequence[Value], count: int) -> np.ndarray:
  """(N,) int64 code of the group of every clip: the same code for the same values of all keys."""
  codes = np.zeros(count, np.int64)
  for key in keys:
    known = np.broadcast_to(key.known, (count,))
    values = np.where(known, np.broadcast_to(key.values, (count,)), 0)
    _, mine = np.unique(values, return_inverse=True)
    mine = np.where(known, mine + 1, 0)
    _, codes = np.unique(codes * (mine.max(initial=0) + 1) + mine, return_inverse=True)
  return codes


def weights(rule: Rule, evaluator: Evaluator, kept: np.ndarray) -> np.ndarray:
  """(N,) sampling weights of the kept clips, mean 1, 0 elsewhere: a clip of a group of n weighs n^-power.

  Args:
    rule: `temper(power, column, ...)`.

  Raises:
    UsageError: it is none.
  """
  call = rule.tree
  if not rule.balances or not isinstance(call, ast.Call) or call.func.id != "temper":  # type: ignore[attr-defined]
    raise UsageError(f"weights want temper(power, column, ...), not {rule.keep!r}")
  power = float(call.args[0].value)  # type: ignore[attr-defined]
  shares(rule.keep, "temper", power, np.ones(1))
  codes = groups([evaluator.value(part) for part in call.args[1:]], len(kept))[kept]
  _, mine, counts = np.unique(codes, return_inverse=True, return_counts=True)
  result = np.zeros(len(kept))
  if len(codes):
    raw = counts[mine] ** -power
    result[kept] = raw / raw.mean()
  return result


def _hashes(ids: Sequence[str], seed: int) -> np.ndarray:
  prefix = hashlib.blake2b(str(seed).encode(), digest_size=8)
  found = np.empty(len(ids), np.uint64)
  for row, name in enumerate(ids):
    digest = prefix.copy()
    digest.update(name.encode("utf-8", "surrogateescape"))
    found[row] = int.from_bytes(digest.digest(), "little")
  return found
