"""Pairs of unit vectors that point nearly the same way: all pairs in blocks, or, for many vectors, cell by cell.

Cells are those of spherical k-means with sqrt(n) centres; a vector is compared with the members of the cells of its
nearest centres, so that the work grows as n^1.5 instead of n^2. What lies in other cells is missed;
`benchmarks/dedup.py` measures how much.
"""

from collections.abc import Iterator

import numpy as np

from kling_jax import progress

EXACT = 60_000  # vectors up to which all pairs are compared
PROBES = 8  # cells that a vector is compared with
_BLOCK, _WIDE = 2048, 8192  # rows and columns of a product
_ROUNDS, _PER_CELL = 6, 64  # of k-means, and its vectors a centre
MOST = 24  # neighbours of a vector that are kept of a block or cell, the nearest ones


def pairs(
  queries: np.ndarray, query_owner: np.ndarray, base: np.ndarray, base_owner: np.ndarray, least: float, seed: int = 0
) -> np.ndarray:
  """Owners that share a near pair of vectors.

  Args:
    queries, base: (N, D), (M, D) int8 or float, of any length; only their directions count.
    query_owner, base_owner: (N,), (M,) int64, ascending numbers of the clips that the vectors belong to.
    least: cosine from which two vectors are near.
    seed: of the cells.

  Returns:
    (P, 2) int64: (query owner, base owner), each once, never equal.
  """
  found = [np.zeros((0, 2), np.int64)]
  exact = len(base) <= EXACT
  blocks = _all(len(queries), len(base)) if exact else _cells(queries, base, seed)
  count = -(-len(queries) // _BLOCK) * -(-len(base) // _WIDE) if exact else _centre_count(len(base))
  for rows, columns in progress.track(blocks, "compare", count):
    right = units(base[columns]).T
    for start in range(0, len(rows), _BLOCK):
      part = rows[start : start + _BLOCK]
      mine, other = np.nonzero((cosines := units(queries[part]) @ right) >= least)
      apart = query_owner[part][mine] != base_owner[columns][other]
      mine, other = mine[apart], other[apart]
      if len(mine):
        mine, other = _nearest_few(mine, other, cosines[mine, other])
        found.append(np.unique(np.stack([query_owner[part][mine], base_owner[columns][other]], 1), axis=0))
  return np.unique(np.concatenate(found), axis=0)


def _nearest_few(mine: np.ndarray, other: np.ndarray, cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The MOST nearest of each query of a block."""
  order = np.lexsort((-cosines, mine))
  mine, other = mine[order], other[order]
  rank = np.arange(len(mine)) - np.searchsorted(mine, mine)
  return mine[rank < MOST], other[rank < MOST]


def units(vectors: np.ndarray) -> np.ndarray:
  """float32 vectors of length 1."""
  single = vectors.astype(np.float32)
  return single / np.maximum(np.linalg.norm(single, axis=1, keepdims=True), 1e-6)


def _all(queries: int, base: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  for start in range(0, queries, _BLOCK):
    for first in range(0, base, _WIDE):
      yield np.arange(start, min(start + _BLOCK, queries)), np.arange(first, min(first + _WIDE, base))


def _cells(queries: np.ndarray, base: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  centres = _centres(base, seed)
  home = _nearest(base, centres, 1)[:, 0]
  probes = _nearest(queries, centres, PROBES)
  members = _grouped(home, len(centres))
  visitors = _grouped(probes.reshape(-1), len(centres))
  for cell in range(len(centres)):
    yield np.sort(visitors[cell] // PROBES), members[cell]


def _grouped(codes: np.ndarray, count: int) -> list[np.ndarray]:
  order = np.argsort(codes, kind="stable")
  return np.split(order, np.searchsorted(codes[order], np.arange(1, count)))


def _centre_count(vectors: int) -> int:
  return max(2, round(vectors**0.5))


def _centres(base: np.ndarray, seed: int) -> np.ndarray:
  """Spherical k-means on a sample; an empty cell gets a random vector."""
  rng = np.random.Generator(np.random.PCG64(seed))
  count = _centre_count(len(base))
  sample = units(base[rng.choice(len(base), min(len(base), count * _PER_CELL), replace=False)])
  centres = sample[rng.choice(len(sample), count, replace=False)]
  for _ in range(_ROUNDS):
    home = _nearest(sample, centres, 1)[:, 0]
    sums = np.zeros_like(centres)
    np.add.at(sums, home, sample)
    lost = np.bincount(home, minlength=count) == 0
    sums[lost] = sample[rng.choice(len(sample), int(lost.sum()))]
    centres = units(sums)
  return centres


def _nearest(vectors: np.ndarray, centres: np.ndarray, count: int) -> np.ndarray:
  """(N, count) indices of the nearest centres."""
  found = np.empty((len(vectors), count), np.int32)
  for start in range(0, len(vectors), _BLOCK):
    cosines = units(vectors[start : start + _BLOCK]) @ centres.T
    if count == 1:
      found[start : start + _BLOCK, 0] = cosines.argmax(1)
    else:
      found[start : start + _BLOCK] = np.argpartition(cosines, -count, axis=1)[:, -count:]
  return found
