"""How well a score keeps the order of weak labels: originals above their degradations, and strength by strength."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from kling_jax.measure.vtss_labels import ORIGINAL, Rated


@dataclasses.dataclass(frozen=True)
class Order:
  """Of one degradation, or of all.

  Attributes:
    pairs: share of (original, degraded) pairs of a shot with the original strictly above.
    srcc: mean over ladders (an original and its strengths) of Spearman's correlation of less score with strength;
      a ladder of equal scores counts as 0.
    count: of pairs.
  """

  pairs: float
  srcc: float
  count: int


def order(rows: Sequence[Rated], score_R: np.ndarray) -> dict[str, Order]:
  """{"all": .., degradation: ..} of clips with weak labels and their scores."""
  from scipy import stats

  originals = {row.reference: score for row, score in zip(rows, score_R, strict=True) if row.degradation == ORIGINAL}
  ladders: dict[tuple[str, str], list[tuple[int, float]]] = {}
  for row, score in zip(rows, score_R, strict=True):
    if row.degradation != ORIGINAL and row.reference in originals:
      ladders.setdefault((row.degradation, row.reference), []).append((row.strength, float(score)))
  above: dict[str, list[bool]] = {}
  srcc: dict[str, list[float]] = {}
  for (kind, reference), ladder in ladders.items():
    best = float(originals[reference])
    hits = [best > score for _, score in ladder]
    scores = np.array([best, *(score for _, score in ladder)])
    strengths = np.array([0, *(strength for strength, _ in ladder)])
    rank = 0.0 if np.ptp(scores) == 0 else float(stats.spearmanr(-scores, strengths).statistic)
    for name in ("all", kind):
      above.setdefault(name, []).extend(hits)
      srcc.setdefault(name, []).append(rank)
  return {name: Order(float(np.mean(above[name])), float(np.mean(srcc[name])), len(above[name])) for name in above}
