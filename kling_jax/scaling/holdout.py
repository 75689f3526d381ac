"""Does the form hold beyond the runs it was fitted to? The largest ones are left out, predicted, and compared."""

import dataclasses
import math
from typing import Any

import numpy as np
from scipy import special

from kling_jax.errors import DataError
from kling_jax.scaling.fit import Fit, Options, fit
from kling_jax.scaling.intervals import student
from kling_jax.scaling.table import RunTable

PASS = "pass"
FAILS = "the form fails: one-signed error"
UNDECIDED = "undecided: the law is too uncertain where it was tested"
UNKNOWN = "not checked: too few rows to leave the largest out"
SIGMAS = 3.0
ONE_SIGNED = 0.8  # share of the held-out runs whose error has the same sign
VAGUE = 0.02  # relative uncertainty of the law at the held-out runs above which agreement means nothing
NEGLIGIBLE = 1e-4  # mean relative error below which no law is refused; a good evaluation's own error
SHARE = 0.1  # of the rows that is left out at least
MOST = 1 / 3  # of the rows that is left out at most


@dataclasses.dataclass(frozen=True)
class Holdout:
  """Predictions of the runs that the fit did not see.

  Attributes:
    rows: those runs. fit: the fit without them.
    source: "split column" or "largest left out".
    predicted: their losses by the law (m,). error: predicted / measured - 1 (m,).
    sigmas: mean error over its own standard error: noise of the runs, and the law's uncertainty there.
    law_error: that uncertainty, relative: standard error of the law's mean prediction.
    one_signed: whether nearly all errors have the same sign.
    inside: share of the measured losses that lie in the 90 % interval of a run.
    verdict: PASS; FAILS where errors are one-signed and beyond 3 sigma; UNDECIDED where the law is too uncertain.
  """

  rows: RunTable
  fit: Fit
  source: str
  predicted: np.ndarray
  error: np.ndarray
  sigmas: float
  law_error: float
  one_signed: bool
  inside: float
  verdict: str

  def to_json(self) -> dict[str, Any]:
    """JSON-ready; errors are relative (0.01 is one percent), positive where the law predicts too high a loss."""
    points = zip(self.rows.params, self.rows.tokens, self.rows.loss, self.predicted, self.error, strict=True)
    names = ("params", "tokens", "loss", "predicted", "error")
    return {
      "source": self.source,
      "fitted_rows": len(self.fit.table),
      "held_out_rows": len(self.rows),
      "mean_error": float(self.error.mean()),
      "mean_absolute_error": float(np.abs(self.error).mean()),
      "largest_error": float(self.error[np.abs(self.error).argmax()]),
      "sigmas": self.sigmas,
      "law_error": self.law_error,
      "one_signed": self.one_signed,
      "inside_interval": self.inside,
      "points": [dict(zip(names, map(float, point), strict=True)) for point in points],
    }


def check(table: RunTable, options: Options | None = None, fitted: Fit | None = None) -> Holdout | None:
  """Fits the smaller runs and judges the law by the larger ones.

  The table's own split is used where it has one (`fitted` is then the fit of its other rows, where that exists
  already); else `largest` are left out. None where too few rows would be left.
  """
  options = options or Options()
  if table.has_split:
    return judge(fitted or fit(table, options), table.held_out, "split column")
  held = largest(table)
  try:
    smaller = fit(table.take(~held), options)
  except DataError:
    return None
  return judge(smaller, table.take(held), "largest left out")


def verdict(found: Holdout | None) -> str:
  """PASS, FAILS, UNDECIDED or UNKNOWN."""
  return UNKNOWN if found is None else found.verdict


def largest(table: RunTable) -> np.ndarray:
  """Which rows (n,) are the largest: those of the largest N, of the largest N T, and more by N T up to a tenth.

  Where these are more than a third of the rows, the largest in N T alone.
  """
  size, cost = np.log(table.params), np.log(table.params * table.tokens)
  held = (size > size.max() - 0.01) | (cost > cost.max() - 0.05)
  by_cost = np.argsort(-cost, kind="stable")
  if held.mean() > MOST:
    held = cost > cost.max() - 0.05
  if held.mean() > MOST:
    held = np.zeros(len(table), bool)
  held[by_cost[: math.ceil(SHARE * len(table))]] = True
  return held


def judge(fitted: Fit, rows: RunTable, source: str) -> Holdout:
  """Compares the law with runs that it has not seen.

  The standard error of the mean error has two parts: the spread of the law's own mean prediction over the draws, and
  the noise of the runs. Rows of one run share part of their noise, so it is measured on means of runs.
  """
  predicted = fitted.surface(rows.params, rows.tokens)
  error = predicted / rows.loss - 1
  difference = predicted - rows.loss
  of_draws = fitted.draws(rows.params[:, None], rows.tokens[:, None]).mean(axis=0)
  law = float(np.subtract(*np.quantile(of_draws, [0.8413, 0.1587]))) / 2  # robust against draws that ran away
  noise, runs = _noise(fitted, rows)
  z = float(difference.mean()) / max(math.hypot(law, noise), 1e-300)
  share = max(float((error > 0).mean()), float((error < 0).mean()))
  low, high = fitted.loss_interval(rows.params, rows.tokens, of_run=True)
  # The threshold of 3 sigma holds for a known noise; where it was estimated from few runs, Student's t asks for more.
  threshold = student(float(special.ndtr(SIGMAS)), max(runs, 1))
  fails = share >= ONE_SIGNED and abs(z) > threshold and abs(float(error.mean())) > NEGLIGIBLE
  law_error = law / float(rows.loss.mean())
  inside = float(((rows.loss >= low) & (rows.loss <= high)).mean())
  said = FAILS if fails else UNDECIDED if law_error > VAGUE else PASS
  return Holdout(rows, fitted, source, predicted, error, z, law_error, share >= ONE_SIGNED, inside, said)


def _noise(fitted: Fit, rows: RunTable) -> tuple[float, float]:
  """(standard error of the mean over the held-out rows, degrees of freedom of that estimate)."""
  table = fitted.table
  _, index, counts = np.unique(table.run, return_inverse=True, return_counts=True)
  held = rows.runs
  if len(counts) == len(table):
    return fitted.sigma / math.sqrt(held), len(table) - 5
  means = np.bincount(index, fitted.residuals) / counts
  dof = max(len(counts) - 5, 1)
  return math.sqrt(float((means**2).sum()) / dof / held), dof
