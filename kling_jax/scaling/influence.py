"""What a fit rests on: single runs, single sizes, outliers; and what its data cannot tell."""

import dataclasses
from typing import Any

import numpy as np

from kling_jax.models.flop_rules import FlopRule
from kling_jax.scaling import projection
from kling_jax.scaling.fit import PARAMETERS, Fit
from kling_jax.scaling.laws import SIX_NT, Surface

OUTLIER = 4.5  # robust standard deviations
MOST_RUNS = 200  # runs left out one by one; beyond, those of the largest residuals


@dataclasses.dataclass(frozen=True)
class Shift:
  """What leaving something out does to the law.

  Attributes:
    left_out: what, in words. rows: how many.
    surface: the law without it.
    params_opt, loss_opt: relative change of N_opt and of its loss at the target budget.
    share: the change of log N_opt over half the width of its 90 % interval; above 1, the law rests on it.
  """

  left_out: str
  rows: int
  surface: Surface
  params_opt: float
  loss_opt: float
  share: float

  def to_json(self) -> dict[str, Any]:
    """JSON-ready."""
    law = {name: float(getattr(self.surface, name)) for name in PARAMETERS}
    return {"left_out": self.left_out, "rows": self.rows, "params_opt": self.params_opt, "loss_opt": self.loss_opt,
            "share_of_interval": self.share} | law  # fmt: skip


def runs(fitted: Fit, flops: float, rule: FlopRule = SIX_NT, most: int = 8) -> list[Shift]:
  """The runs that move N_opt(flops) furthest when they are left out, strongest first."""
  table = fitted.table
  names, index = np.unique(table.run, return_inverse=True)
  if len(names) > MOST_RUNS:
    size = np.bincount(index, np.abs(fitted.residuals)) / np.bincount(index)
    chosen = np.argsort(-size)[:MOST_RUNS]
  else:
    chosen = np.arange(len(names))
  words = []
  for run in chosen:
    rows = np.flatnonzero(index == run)
    count = f"{len(rows)} rows of " if len(rows) > 1 else ""
    words.append(f"{count}{table.params[rows[0]]:.4g} parameters, {table.tokens[rows].max():.4g} tokens")
  shifts = _without(fitted, [index == run for run in chosen], words, flops, rule)
  return sorted(shifts, key=lambda shift: -abs(shift.share))[:most]


def sizes(fitted: Fit, flops: float, rule: FlopRule = SIX_NT) -> list[Shift]:
  """Each size left out in turn, smallest first: does the law hang on one of them?"""
  table = fitted.table
  keys = np.log(table.params).round(2)
  distinct = np.unique(keys)
  if not 4 <= len(distinct) <= 30:
    return []
  words = [f"size {np.exp(key):.3g}" for key in distinct]
  return _without(fitted, [keys == key for key in distinct], words, flops, rule)


def _without(fitted: Fit, masks: list[np.ndarray], words: list[str], flops: float, rule: FlopRule) -> list[Shift]:
  weights = np.where(np.stack(masks), 0.0, fitted.table.weight)
  found = fitted.refit(weights)
  low, high = fitted.intervals(flops, rule)["params_opt"]
  reach = max(np.log(high / low) / 2, 1e-12)
  whole = fitted.surface.optimum(flops, rule)
  shifts = []
  for k, (mask, name) in enumerate(zip(masks, words, strict=True)):
    law = Surface(*(float(field[k]) for field in dataclasses.astuple(found)))
    best = law.optimum(flops, rule)
    ratio = float(best.params / whole.params)
    shifts.append(
      Shift(name, int(mask.sum()), law, ratio - 1, float(best.loss / whole.loss) - 1, float(np.log(ratio) / reach))
    )
  return shifts


def outliers(fitted: Fit) -> np.ndarray:
  """Indices of rows whose residual lies beyond OUTLIER robust standard deviations, largest first."""
  scaled = fitted.residuals * np.sqrt(fitted.table.weight)
  # The median deviation of few rows is noisy itself: it counts for no less than 3/4 of the plain one.
  spread = max(1.4826 * float(np.median(np.abs(scaled - np.median(scaled)))), 0.75 * float(scaled.std()))
  far = np.flatnonzero(np.abs(scaled) > OUTLIER * max(spread, 1e-9 * float(np.abs(fitted.table.loss).max())))
  return far[np.argsort(-np.abs(scaled[far]))]


@dataclasses.dataclass(frozen=True)
class Identifiability:
  """What the data can and cannot tell.

  Attributes:
    spans: largest over smallest N, T, and N T.
    condition: of the information about the five parameters, each in units of its own error; 1 is independent.
    correlations: (5, 5) of the parameters (E, log A, log B, alpha, beta).
    factors: {"A": high / low of its interval, "B": ...}.
    warnings: what is not identified, in words.
  """

  spans: dict[str, float]
  condition: float
  correlations: np.ndarray
  factors: dict[str, float]
  warnings: tuple[str, ...]

  def to_json(self) -> dict[str, Any]:
    """JSON-ready."""
    return {"spans": self.spans, "condition": self.condition, "correlations": self.correlations.tolist(),
            "interval_factors": self.factors, "warnings": list(self.warnings)}  # fmt: skip


def identifiability(fitted: Fit) -> Identifiability:
  """Judges the fit by its draws: terms that vanish, exponents at their bounds, intervals too wide to use."""
  table, draws, law = fitted.table, fitted.draws, fitted.surface
  spans = {
    "params": float(table.params.max() / table.params.min()),
    "tokens": float(table.tokens.max() / table.tokens.min()),
    "flops": float((table.params * table.tokens).max() / (table.params * table.tokens).min()),
  }
  low, high = projection.EXPONENTS
  said = []
  for name in ("alpha", "beta"):
    value = getattr(law, name)
    if not 1.01 * low < value < 0.99 * high:
      said.append(f"{name} = {value:.3g} lies at the end of its range: the data do not show its exponent")
  for name in ("E", "A", "B"):
    share = float((getattr(draws, name) <= 0).mean())
    if getattr(law, name) <= 0:
      said.append(f"{name} = 0 fits best: the data do not show this term")
    elif share > 0.05:
      said.append(f"{name} is zero in {share:.0%} of the draws: the data hardly show this term")
  found = fitted.intervals()
  factors = {name: float(found[name][1] / max(found[name][0], 1e-300)) for name in ("A", "B")}
  wide = [f"{name} {found[name][0]:.3g} to {found[name][1]:.3g}" for name, factor in factors.items() if factor > 10]
  if wide:
    said.append(f"prefactors are hardly known ({', '.join(wide)}): quote exponents and predictions, never A or B alone")
  for name, words in (("alpha", "params"), ("beta", "tokens")):
    bottom, top = found[name]
    if top - bottom > 0.5 * getattr(law, name):
      said.append(f"{name} is {bottom:.3g} to {top:.3g}: more noise than the range of {words} (a factor of "
                  f"{spans[words]:.3g}) can carry")  # fmt: skip
  logs = np.stack(
    [draws.E, *(np.log(np.maximum(term, 1e-300)) for term in (draws.A, draws.B)), draws.alpha, draws.beta]
  )
  keep = (draws.A > 0) & (draws.B > 0)
  spread = logs[:, keep].std(axis=1) if keep.sum() > 5 else np.zeros(5)
  usable = bool((spread > 0).all())
  correlations = np.corrcoef(logs[:, keep]) if usable else np.full((5, 5), np.nan)
  condition = float(np.linalg.cond(correlations)) if usable else float("inf")
  return Identifiability(spans, condition, correlations, factors, tuple(said))
