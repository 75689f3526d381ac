"""Bootstrap draws of a fitted surface, and intervals of anything that is computed from them."""

from collections.abc import Callable

import numpy as np
from scipy import special

from kling_jax.scaling.projection import Rows

PARAMETERS = 5
# (loss (k, n), weights (k, n)) -> parameters (k, 5): the fit, repeated
Refit = Callable[[np.ndarray, np.ndarray], np.ndarray]


def noise_draws(
  rows: Rows,
  theta: np.ndarray,
  weights: np.ndarray,
  sigma: float,
  dof: float,
  refit: Refit,
  count: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Parametric bootstrap: new Gaussian noise on the fitted losses of all rows.

  The size of the noise is itself uncertain where it was estimated from `dof` degrees of freedom, so each draw has its
  own, sigma * sqrt(dof / chi2); without that, intervals of small designs are too narrow.

  Args:
    theta: (5,) in the units of rows. weights: (n,). sigma: of a row of weight 1. dof: infinite where it was measured.

  Returns:
    Parameters (count, 5).
  """
  size = np.full((count, 1), sigma)
  if np.isfinite(dof):
    size *= np.sqrt(dof / rng.chisquare(dof, size=(count, 1)))
  noise = size * rng.standard_normal((count, len(rows.x))) / np.sqrt(weights)
  fitted = rows.predict(theta[None])
  return refit(np.maximum(fitted + noise, 0.01 * fitted), np.broadcast_to(weights, noise.shape))  # losses are positive


def run_draws(
  loss: np.ndarray, weights: np.ndarray, run: np.ndarray, refit: Refit, count: int, rng: np.random.Generator
) -> np.ndarray:
  """Case bootstrap: whole runs drawn with replacement, their rows together; parameters (count, 5)."""
  _, index = np.unique(run, return_inverse=True)
  runs = index.max() + 1
  times = rng.multinomial(runs, np.full(runs, 1 / runs), size=count)
  drawn = weights * times[:, index]
  return refit(np.broadcast_to(loss, drawn.shape), drawn)


def student(probability: float, dof: float = np.inf) -> float:
  """The quantile of Student's t, or of the normal where dof is infinite."""
  return float(special.stdtrit(dof, probability) if np.isfinite(dof) else special.ndtri(probability))


def interval(draws: np.ndarray, level: float, dof: float = np.inf, centre: np.ndarray | float | None = None):
  """(low, high) of draws along their last axis: percentiles, expanded as Student's t expands the normal's.

  Args:
    draws: (..., k). level: e.g. 0.9. dof: degrees of freedom for the expansion. centre: the estimate, which the
      interval is made to hold.
  """
  tail = (1 - level) / 2
  if np.isfinite(dof):
    tail = float(special.ndtr(student(tail, max(dof, 1))))
  low, high = np.quantile(draws, [tail, 1 - tail], axis=-1)
  if centre is not None:
    low, high = np.minimum(low, centre), np.maximum(high, centre)
  return low, high
