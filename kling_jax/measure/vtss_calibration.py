"""From raw scores to VTSS, and how good both are: isotonic and affine fits, correlations with intervals, thresholds."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kling_jax.errors import DataError

LEAST, MOST = 1.0, 5.0  # of VTSS
LEAST_CLIPS = 20  # that a calibration is fitted on
DRAWS = 300  # of the bootstrap
KINDS = ("isotonic", "affine")


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Raw score to VTSS.

  Attributes:
    kind: which of the two is used. slope, offset: of the affine one.
    raw, rating: knots of the isotonic one, ascending; linear between them, so that it keeps the order where they rise.
    clips: that it was fitted on.
  """

  kind: str
  slope: float
  offset: float
  raw: Sequence[float]
  rating: Sequence[float]
  clips: int

  def vtss(self, raw: float) -> float:
    """1 to 5."""
    return float(self.values(np.array([raw]))[0])

  def values(self, raw_R: np.ndarray) -> np.ndarray:
    """VTSS of many raw scores."""
    if self.kind == "affine":
      return np.clip(self.slope * np.asarray(raw_R, np.float64) + self.offset, LEAST, MOST)
    return np.clip(np.interp(raw_R, self.raw, self.rating), LEAST, MOST)


def fit(raw_R: np.ndarray, rating_R: np.ndarray, kind: str = "isotonic") -> Calibration:
  """Both fits by least squares, on clips that the network was not trained on.

  The knots of the isotonic one are the middles of its steps; beyond the outermost ones the affine slope goes on, so
  that very bad and very good clips are still told apart.

  Raises:
    DataError: too few clips, numbers that are not finite, or ratings or raw scores that are all alike.
  """
  from scipy.optimize import isotonic_regression

  raw_R, rating_R = np.asarray(raw_R, np.float64), np.asarray(rating_R, np.float64)
  if len(raw_R) < LEAST_CLIPS or raw_R.shape != rating_R.shape:
    raise DataError(f"a calibration wants at least {LEAST_CLIPS} rated clips, not {len(raw_R)}")
  if not (np.isfinite(raw_R).all() and np.isfinite(rating_R).all()):
    raise DataError("a calibration wants finite scores and ratings")
  if np.ptp(raw_R) == 0 or np.ptp(rating_R) == 0:
    raise DataError("all scores or all ratings are alike: there is nothing to calibrate")
  slope, offset = np.polyfit(raw_R, rating_R, 1)
  order = np.argsort(raw_R, kind="stable")
  found = isotonic_regression(rating_R[order])
  raws = [float(raw_R[order][a:b].mean()) for a, b in zip(found.blocks[:-1], found.blocks[1:], strict=True)]
  ratings = [float(found.x[start]) for start in found.blocks[:-1]]
  reach, rise = np.ptp(raw_R), max(float(slope), 1e-6)
  raws = [raws[0] - reach, *raws, raws[-1] + reach]
  ratings = [ratings[0] - rise * reach, *ratings, ratings[-1] + rise * reach]
  return Calibration(kind, float(slope), float(offset), raws, ratings, len(raw_R))


def agreement(predicted_R: np.ndarray, rating_R: np.ndarray) -> dict[str, float]:
  """SRCC, PLCC, KRCC (Kendall's tau b) and RMSE."""
  from scipy import stats

  with np.errstate(invalid="ignore", divide="ignore"):
    return {
      "srcc": float(stats.spearmanr(predicted_R, rating_R).statistic),
      "plcc": float(stats.pearsonr(predicted_R, rating_R).statistic),
      "krcc": float(stats.kendalltau(predicted_R, rating_R).statistic),
      "rmse": float(np.sqrt(np.mean((np.asarray(predicted_R) - rating_R) ** 2))),
    }


def intervals(
  measure: Callable[[np.ndarray], dict[str, float]], groups_R: Sequence[str], draws: int | None = None, seed: int = 0
) -> dict[str, tuple[float, float]]:
  """95 % percentile intervals of what `measure(rows)` gives, over draws of whole groups (source videos).

  Args:
    measure: indices of rows, some more than once -> figures. groups_R: the group of each row.
  """
  names, inverse = np.unique(np.asarray(groups_R), return_inverse=True)
  members = [np.flatnonzero(inverse == k) for k in range(len(names))]
  rng = np.random.Generator(np.random.PCG64(seed))
  found: dict[str, list[float]] = {}
  for _ in range(draws or DRAWS):
    rows = np.concatenate([members[k] for k in rng.integers(len(names), size=len(names))])
    for name, value in measure(rows).items():
      found.setdefault(name, []).append(value)
  return {name: tuple(np.nanpercentile(values, [2.5, 97.5]).tolist()) for name, values in found.items()}


def trade_off(vtss_R: np.ndarray, rating_R: np.ndarray, wanted: float = 2.5) -> list[dict[str, float]]:
  """What a least VTSS would do, for 1.0, 1.1, .. 5.0, where clips rated at least `wanted` are to be kept.

  Returns:
    [{threshold, kept, mis_kept, mis_dropped}], shares of all clips.
  """
  good_R = rating_R >= wanted
  rows = []
  for threshold in np.round(np.arange(LEAST, MOST + 0.05, 0.1), 1):
    kept_R = vtss_R >= threshold
    shares = {"kept": kept_R, "mis_kept": kept_R & ~good_R, "mis_dropped": ~kept_R & good_R}
    rows.append({"threshold": float(threshold)} | {name: float(value.mean()) for name, value in shares.items()})
  return rows


def suggested(rows: Sequence[dict[str, float]]) -> float:
  """The threshold with the fewest mistakes; of several the middle one."""
  mistakes = np.array([row["mis_kept"] + row["mis_dropped"] for row in rows])
  best = np.flatnonzero(mistakes == mistakes.min())
  return rows[int(best[len(best) // 2])]["threshold"]


def reliability(vtss_R: np.ndarray, rating_R: np.ndarray, bins: int = 10) -> list[dict[str, Any]]:
  """Mean rating by VTSS, in bins of equally many clips: [{vtss, rating, deviation, clips}]."""
  parts = np.array_split(np.argsort(vtss_R, kind="stable"), min(bins, len(vtss_R)))
  return [
    {
      "vtss": float(vtss_R[part].mean()),
      "rating": float(rating_R[part].mean()),
      "deviation": float(rating_R[part].std()),
      "clips": len(part),
    }
    for part in parts
  ]
