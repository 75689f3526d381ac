"""Fits the loss surface L = E + A/N^alpha + B/T^beta to a table of runs, with draws for every interval.

Two methods. "vp": weighted least squares of the loss by variable projection, the default. "huber": the sum of
Huber(log L_model - log L, delta), for comparison with papers and against outliers.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from kling_jax.errors import DataError, UsageError, nearest
from kling_jax.models.flop_rules import FlopRule
from kling_jax.scaling import huber, intervals, projection
from kling_jax.scaling.laws import SIX_NT, Optimum, Surface
from kling_jax.scaling.table import RunTable

METHODS = ("vp", "huber")
BOOTSTRAPS = ("noise", "runs")
PARAMETERS = ("E", "A", "B", "alpha", "beta")
LEVEL = 0.9


@dataclasses.dataclass(frozen=True)
class Options:
  """How a surface is fitted.

  Attributes:
    method: "vp" or "huber". delta: of Huber's loss, in log loss.
    draws: of the bootstrap. seed: of the draws.
    bootstrap: "noise": Gaussian noise on all rows, the default for independent rows under vp. "runs": whole runs drawn
      with replacement, where runs have several rows, and under huber. None: that choice.
  """

  method: str = "vp"
  delta: float = 1e-3
  draws: int = 1000
  seed: int = 0
  bootstrap: str | None = None

  def __post_init__(self):
    if self.method not in METHODS:
      raise UsageError(f"method {self.method!r} is unknown{nearest(self.method, METHODS)}")
    if self.bootstrap not in (None, *BOOTSTRAPS):
      raise UsageError(f"bootstrap {self.bootstrap!r} is unknown{nearest(str(self.bootstrap), BOOTSTRAPS)}")
    if not self.delta > 0:
      raise UsageError(f"delta = {self.delta} must be positive; 1e-3 is what papers use")
    if self.draws < 20:
      raise UsageError(f"draws = {self.draws}: intervals need at least 20, 1000 for figures that are quoted")


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted surface and its uncertainty.

  Attributes:
    options: how it was fitted. table: the rows it was fitted to.
    surface: the estimate, raw counts. objective: the minimum: weighted sum of squares, or of Huber's loss.
    sigma: standard deviation of the noise of a row of mean weight, in loss.
    dof: degrees of freedom that percentiles of the draws are expanded by.
    bootstrap: "noise" or "runs". draws: surfaces of the draws, each field (k,).
    warnings: what weakens the fit.
  """

  options: Options
  table: RunTable
  surface: Surface
  objective: float
  sigma: float
  dof: float
  bootstrap: str
  draws: Surface
  warnings: tuple[str, ...] = ()

  @functools.cached_property
  def residuals(self) -> np.ndarray:
    """Measured minus fitted loss of each row (n,)."""
    return self.table.loss - self.surface(self.table.params, self.table.tokens)

  def refit(self, weights: np.ndarray) -> Surface:
    """The same fit with other weights (k, n) of its rows, zeros to leave some out; each field (k,)."""
    rows = projection.Rows.of(self.table.params, self.table.tokens)
    return rows.surface(_refit(rows, self.options, rows.theta(self.surface))(self.table.loss, weights))

  def interval(self, draws: np.ndarray, centre: Any = None, level: float = LEVEL) -> tuple[Any, Any]:
    """(low, high) of something computed from `draws`, its last axis."""
    return intervals.interval(draws, level, self.dof, centre)

  def intervals(
    self, flops: float | None = None, rule: FlopRule = SIX_NT, level: float = LEVEL
  ) -> dict[str, tuple[float, float]]:
    """{name: (low, high)} of the five parameters and of the exponent of N_opt; with `flops` also of the optimum.

    Names: E, A, B, alpha, beta, params_exponent; params_opt, tokens_opt, loss_opt.
    """
    pairs = {name: (getattr(self.draws, name), getattr(self.surface, name)) for name in PARAMETERS}
    pairs["params_exponent"] = self.draws.params_exponent, self.surface.params_exponent
    if flops is not None:
      for name, draws, value in zip(Optimum._fields, self.optimum_draws(flops, rule),
                                    self.surface.optimum(flops, rule), strict=True):  # fmt: skip
        pairs[f"{name}_opt"] = draws, value
    found = {name: self.interval(draws, value, level) for name, (draws, value) in pairs.items()}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}

  def optimum_draws(self, flops: Any, rule: FlopRule = SIX_NT) -> Optimum:
    """The optimum of every draw; fields (..., k) for flops (...)."""
    return self.draws.optimum(np.asarray(flops, float)[..., None], rule)

  def loss_interval(
    self, params: Any, tokens: Any, level: float = LEVEL, of_run: bool = False
  ) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of the law's loss at N, T; with `of_run` of the loss that one more run will measure."""
    params, tokens = np.asarray(params, float), np.asarray(tokens, float)
    draws = self.draws(params[..., None], tokens[..., None])
    if of_run:
      draws = draws + self.sigma * np.random.default_rng(self.options.seed).standard_normal(draws.shape)
    return self.interval(draws, self.surface(params, tokens), level)


def fit(table: RunTable, options: Options | None = None) -> Fit:
  """Fits the rows that are not held out.

  Raises:
    DataError: rows that cannot carry the surface: too few, too few sizes or token counts, a loss that does not change.
  """
  options = options or Options()
  table = table.fitted
  check(table)
  estimate, objective = point(table, options)
  rows = projection.Rows.of(table.params, table.tokens)
  theta = rows.theta(estimate)
  dof = len(table) - len(PARAMETERS)
  residuals = table.loss - rows.predict(theta[None])[0]
  sigma = math.sqrt(float((table.weight * residuals**2).sum()) / dof)  # of a row of weight 1
  if table.measured:
    sigma = max(sigma, 1.0)  # never below the noise that was measured
  bootstrap, warnings = _choose_bootstrap(table, options)
  rng = np.random.default_rng(options.seed)
  refit = _refit(rows, options, theta)
  if bootstrap == "noise":
    noise_dof = math.inf if table.measured and sigma == 1.0 else dof
    draws = intervals.noise_draws(rows, theta, table.weight, sigma, noise_dof, refit, options.draws, rng)
  else:
    draws = intervals.run_draws(table.loss, table.weight, table.run, refit, options.draws, rng)
  return Fit(
    options, table, estimate, objective, sigma / math.sqrt(float(table.weight.mean())), float(table.runs - 1),
    bootstrap, rows.surface(draws), warnings,
  )  # fmt: skip


def point(table: RunTable, options: Options) -> tuple[Surface, float]:
  """The surface alone, without draws, and its objective; for rows that have been checked."""
  rows = projection.Rows.of(table.params, table.tokens)
  if options.method == "vp":
    found, values = projection.solve(rows, table.loss, table.weight)
  else:
    found, values = huber.minima(rows, table.loss, table.weight, options.delta)
  return Surface(*map(float, dataclasses.astuple(rows.surface(found[0])))), float(values[0])


def _choose_bootstrap(table: RunTable, options: Options) -> tuple[str, tuple[str, ...]]:
  clustered = table.runs < len(table)
  chosen = options.bootstrap or ("runs" if clustered or options.method == "huber" else "noise")
  if chosen == "runs" and table.runs <= len(PARAMETERS):
    return "noise", (
      f"{table.runs} runs are too few to be drawn with replacement: the {len(table)} rows count as independent, and "
      "intervals are too narrow",
    )
  return chosen, ()


def _refit(rows: projection.Rows, options: Options, theta: np.ndarray) -> intervals.Refit:
  """The fit as a function of losses and weights (k, n), from a neighbouring solution (5,)."""
  if options.method == "vp":
    return lambda loss, weights: projection.solve(rows, loss, weights, start=theta[3:])[0]
  return lambda loss, weights: huber.solve(rows, loss, weights, options.delta, start=theta[None])[0]


def check(table: RunTable) -> None:
  """DataError where the rows cannot carry the surface, with what is missing."""
  need = len(PARAMETERS) + 1
  if len(table) < need:
    raise DataError(
      f"{len(table)} rows cannot carry a surface of {len(PARAMETERS)} parameters ({', '.join(PARAMETERS)}); at least "
      f"{need} are needed, and 20 or more for intervals worth quoting"
    )
  for name, values in (("params", table.params), ("tokens", table.tokens)):
    distinct = np.unique(np.log(values).round(3))
    if len(distinct) < 3:
      sizes = ", ".join(f"{value:.4g}" for value in np.exp(distinct))
      raise DataError(
        f"{name} takes {len(distinct)} different value{'s' if len(distinct) > 1 else ''} ({sizes}); the exponent of "
        f"{name} cannot be told from the floor E with fewer than three, best five that span a factor of ten"
      )
  if np.ptp(table.loss) <= 1e-9 * np.abs(table.loss).max():
    raise DataError(f"the loss is {table.loss[0]:g} in all {len(table)} rows; a law needs losses that differ")
  if abs(np.corrcoef(np.log(table.params), np.log(table.tokens))[0, 1]) > 0.9999:
    raise DataError(
      "tokens are a power of params in all rows; the terms of N and T cannot be told apart: vary one alone"
    )
