"""Power laws by weighted least squares in logs, with exact intervals, and parabolas of the loss over log N."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from kling_jax.errors import DataError
from kling_jax.scaling.intervals import student
from kling_jax.scaling.laws import PowerLaw

SAME_BUDGET = 0.05  # relative difference in C below which runs count as one budget


@dataclasses.dataclass(frozen=True)
class PowerFit:
  """log y = log coefficient + sum of exponent * log x, fitted.

  Attributes:
    arguments: names of the x.
    estimate: (1 + m,) log coefficient, exponents; raw counts.
    covariance: (1 + m, 1 + m) of the estimate.
    dof: degrees of freedom of the noise estimate; infinite where the noise was measured.
    residual: standard deviation of log y about the law (weighted).
    points: how many points it was fitted to.
  """

  arguments: tuple[str, ...]
  estimate: np.ndarray
  covariance: np.ndarray
  dof: float
  residual: float
  points: int

  @property
  def law(self) -> PowerLaw:
    return PowerLaw(
      float(np.exp(self.estimate[0])), dict(zip(self.arguments, map(float, self.estimate[1:]), strict=True))
    )

  def intervals(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
    """{"coefficient" or an argument's name, for its exponent: (low, high)} of Student's t."""
    reach = student((1 + level) / 2, self.dof) * np.sqrt(np.diag(self.covariance))
    low, high = self.estimate - reach, self.estimate + reach
    low[0], high[0] = np.exp(low[0]), np.exp(high[0])
    return dict(zip(("coefficient", *self.arguments), zip(low.tolist(), high.tolist(), strict=True), strict=True))

  def interval(self, level: float = 0.9, **given: float) -> tuple[float, float]:
    """Of the law's value at raw counts."""
    x = np.array([1.0, *(np.log(given[name]) for name in self.arguments)])
    reach = float(student((1 + level) / 2, self.dof) * np.sqrt(x @ self.covariance @ x))
    centre = float(x @ self.estimate)
    return float(np.exp(centre - reach)), float(np.exp(centre + reach))


def fit(
  values: np.ndarray,
  arguments: Mapping[str, np.ndarray],
  weights: np.ndarray | None = None,
  *,
  measured: bool = False,
) -> PowerFit:
  """Least squares of log values on log arguments.

  Args:
    values: (n,) positive.
    arguments: {name: (n,)} positive, raw counts.
    weights: (n,) of the squared log residuals; equal by default.
    measured: the weights are 1 / variance of log values from measurements; the covariance then is not rescaled by the
      residuals where those are smaller than the measured noise.

  Raises:
    DataError: fewer points than coefficients, or an argument that does not vary on its own.
  """
  n, m = len(values), len(arguments)
  if n <= m + 1:
    raise DataError(f"a power law of {', '.join(arguments)} has {m + 1} coefficients; {n} points cannot show its error")
  w = np.ones(n) if weights is None else np.asarray(weights, float)
  logs = np.stack([np.log(np.asarray(x, float)) for x in arguments.values()], axis=1)
  y = np.log(np.asarray(values, float))
  centre, middle = np.average(logs, axis=0, weights=w), np.average(y, weights=w)
  X = np.concatenate([np.ones((n, 1)), logs - centre], axis=1)
  information = X.T @ (w[:, None] * X)
  scale = np.sqrt(np.diag(information))
  if not (scale > 0).all() or np.linalg.cond(information / scale / scale[:, None]) > 1e12:
    raise DataError(f"{', '.join(arguments)} do not vary independently over the {n} points; no exponents can be told")
  inverse = np.linalg.inv(information)
  estimate = inverse @ (X.T @ (w * (y - middle)))
  rss = float((w * (y - middle - X @ estimate) ** 2).sum())
  variance = rss / (n - m - 1)
  dof = float(n - m - 1)
  if measured and variance < 1:
    variance, dof = 1.0, np.inf
  back = np.eye(m + 1)  # from centred logs to raw counts
  back[0, 1:] = -centre
  estimate[0] += middle
  residual = float(np.sqrt(rss / w.sum() * n / (n - m - 1)))
  return PowerFit(tuple(arguments), back @ estimate, variance * back @ inverse @ back.T, dof, residual, n)


@dataclasses.dataclass(frozen=True)
class Valley:
  """The parabola of the loss over log N at one budget.

  Attributes:
    flops: C, the budget. params, tokens, loss: at its lowest point.
    stderr: of log params.
    rows: indices of its runs.
    coefficients: of (log N - log params)^2 and the loss: loss + curve * (log N - log params)^2.
    curve: see above; positive.
    inside: whether the lowest point lies within the sizes that were run.
    lean: centre of the sizes over the optimum, in logs; parabolas on grids that are not centred are biased.
  """

  flops: float
  params: float
  tokens: float
  loss: float
  stderr: float
  rows: np.ndarray
  curve: float
  inside: bool
  lean: float


def valleys(
  params: np.ndarray, tokens: np.ndarray, flops: np.ndarray, loss: np.ndarray, weights: np.ndarray | None = None
) -> list[Valley]:
  """Approach 2 of Hoffmann et al.: a parabola over log N at each budget that has at least four sizes; by budget.

  It is biased where the surface is asymmetric or the grid is not centred (6.5 % of a budget on published data, arXiv
  2603.22339): a picture and a cross-check of the surface, not a replacement. Budgets whose parabola opens downwards are
  left out.
  """
  w = np.ones(len(loss)) if weights is None else weights
  order = np.argsort(flops)
  groups = np.split(order, np.flatnonzero(np.diff(np.log(flops[order])) > SAME_BUDGET) + 1)
  found = []
  for rows in groups:
    # Runs at any budget chain into one wide group: no IsoFLOP design.
    if len(np.unique(params[rows])) < 4 or np.ptp(np.log(flops[rows])) > 2 * SAME_BUDGET:
      continue
    x = np.log(params[rows])
    centre = x.mean()
    X = np.stack([np.ones(len(rows)), x - centre, (x - centre) ** 2], axis=1)
    inverse = np.linalg.inv(X.T @ (w[rows, None] * X))
    c = inverse @ (X.T @ (w[rows] * loss[rows]))
    if c[2] <= 0:
      continue
    vertex = -c[1] / (2 * c[2])
    rss = (w[rows] * (loss[rows] - X @ c) ** 2).sum()
    slope = np.array([0, -1 / (2 * c[2]), c[1] / (2 * c[2] ** 2)])
    variance = rss / max(len(rows) - 3, 1) * slope @ inverse @ slope
    budget, best = float(np.exp(np.log(flops[rows]).mean())), float(np.exp(centre + vertex))
    per_token = np.exp(np.interp(centre + vertex, np.sort(x), np.log(flops[rows] / tokens[rows])[np.argsort(x)]))
    found.append(
      Valley(
        flops=budget, params=best, tokens=float(budget / per_token), loss=float(c[0] - c[1] ** 2 / (4 * c[2])),
        stderr=float(np.sqrt(variance)), rows=rows, curve=float(c[2]),
        inside=bool(x.min() <= centre + vertex <= x.max()), lean=float((x.min() + x.max()) / 2 - centre - vertex),
      )
    )  # fmt: skip
  return found


def valley_law(found: list[Valley]) -> PowerFit:
  """N_opt = k C^a through the lowest points that lie inside their grids, weighted by their own errors.

  Raises:
    DataError: fewer than three of them.
  """
  inside = [valley for valley in found if valley.inside]
  if len(inside) < 3:
    raise DataError(f"{len(inside)} budgets have their lowest loss inside their sizes; a law of C needs three")
  stderr = np.array([valley.stderr for valley in inside])
  weights = 1 / np.maximum(stderr, 0.2 * np.median(stderr)) ** 2  # one lucky parabola must not outweigh all others
  if not np.isfinite(weights).all():
    weights = np.ones(len(inside))  # exact parabolas
  return fit(
    np.array([valley.params for valley in inside]), {"flops": np.array([valley.flops for valley in inside])}, weights
  )
