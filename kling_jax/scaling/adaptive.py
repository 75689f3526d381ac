"""The next best runs: those that shrink the uncertainty of the laws most for what they cost.

All laws together are one response, L(N, T, lr, B) = (E + A / N^alpha + B / T^beta) (1 + d' H d / 2), with d the
distance of (log lr, log B) from two power laws of (N, T). A run adds the information J' J / sigma^2 of its points, J
the derivative of L by the coefficients; runs are taken one after the other by the gain of a goal over cost^power. (The
idea of optimal design, as PLES uses it on a Gaussian process; Bayesian linear algebra in closed form here.)
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from kling_jax.errors import DataError

NAMES = (
  "log_E", "log_A", "log_alpha", "log_B", "log_beta",
  "lr", "lr_params", "lr_tokens", "batch", "batch_params", "batch_tokens",
  "curve_lr", "curve_batch", "curve_cross",
)  # fmt: skip
# Standard deviations of what is believed before any run: half a decade of a prefactor, 0.3 of an exponent.
PRIOR = np.array([0.3, 1.2, 0.3, 1.2, 0.3, 1.2, 0.3, 0.3, 1.2, 0.3, 0.3, 0.05, 0.05, 0.05])


@dataclasses.dataclass(frozen=True)
class Response:
  """The coefficients of the whole response, in the order of `NAMES`, about the reference point (N0, T0).

  E, A / N0^alpha and B / T0^beta are given by their logs, lr and batch by the logs of the optimum at (N0, T0), the
  curvature by the elements of H.
  """

  theta: np.ndarray
  params0: float
  tokens0: float

  def loss(self, theta: np.ndarray, n: np.ndarray, t: np.ndarray, lr: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """L at points (k,), all raw counts."""
    x, y = np.log(n / self.params0), np.log(t / self.tokens0)
    surface = np.exp(theta[0]) + np.exp(theta[1] - np.exp(theta[2]) * x) + np.exp(theta[3] - np.exp(theta[4]) * y)
    u = np.log(lr) - (theta[5] + theta[6] * x + theta[7] * y)
    v = np.log(batch) - (theta[8] + theta[9] * x + theta[10] * y)
    return surface * (1 + (theta[11] * u * u + theta[12] * v * v) / 2 + theta[13] * u * v)

  def jacobian(self, n: np.ndarray, t: np.ndarray, lr: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """d L / d theta at points, (k, 14); central differences (the response is smooth, its coefficients of order 1)."""
    step = 1e-5
    columns = [
      (self.loss(self.theta + step * unit, n, t, lr, batch) - self.loss(self.theta - step * unit, n, t, lr, batch))
      / (2 * step)
      for unit in np.eye(len(NAMES))
    ]
    return np.stack(columns, axis=-1)

  def best(self, n: float, t: float) -> tuple[float, float]:
    """(lr, B) where the loss of (N, T) is lowest."""
    x, y = np.log(n / self.params0), np.log(t / self.tokens0)
    return (
      float(np.exp(self.theta[5] + self.theta[6] * x + self.theta[7] * y)),
      float(np.exp(self.theta[8] + self.theta[9] * x + self.theta[10] * y)),
    )


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A run that could be done: its size, rate and batch, the horizons it would be read at, and what it costs."""

  params: float
  lr: float
  batch_tokens: float
  tokens: tuple[float, ...]
  cost: float


@dataclasses.dataclass(frozen=True)
class Choice:
  """A candidate that was chosen: by how much it shrinks the goal, and that for each unit of cost."""

  candidate: Candidate
  gain: float
  gain_per_cost: float


def fit(n: np.ndarray, t: np.ndarray, lr: np.ndarray, batch: np.ndarray, loss: np.ndarray, sigma: float) -> Response:
  """The response that fits measured points best, least squares with the prior about a plain first guess.

  Raises:
    DataError: fewer points than a surface has coefficients.
  """
  from scipy import optimize

  if len(loss) < 6:
    raise DataError(f"{len(loss)} points are too few to say which runs come next; do a first grid")
  response = Response(np.zeros(len(NAMES)), float(np.exp(np.log(n).mean())), float(np.exp(np.log(t).mean())))
  lowest, best = float(loss.min()), int(loss.argmin())
  spread = max(float(np.ptp(loss)), 1e-3 * lowest)
  start = np.array([
    np.log(0.9 * lowest), np.log(spread / 2), np.log(0.3), np.log(spread / 2), np.log(0.3),
    np.log(lr[best]), 0.0, 0.0, np.log(batch[best]), 0.0, 0.0, 0.03, 0.03, 0.0,
  ])  # fmt: skip
  residuals = lambda theta: np.concatenate(
    [(response.loss(theta, n, t, lr, batch) - loss) / sigma, (theta - start) / PRIOR]
  )
  found = optimize.least_squares(residuals, start, method="trf", x_scale=PRIOR)
  return dataclasses.replace(response, theta=found.x)


def covariance(response: Response, jacobians: Sequence[np.ndarray], sigma: float) -> np.ndarray:
  """Of the coefficients, (14, 14): the prior's information and that of the points."""
  information = np.diag(PRIOR**-2.0)
  for J in jacobians:
    information = information + J.T @ J / sigma**2
  return np.linalg.inv(information)


def choose(
  response: Response,
  prior: np.ndarray,
  candidates: Sequence[Candidate],
  count: int,
  sigma: float,
  *,
  aim: Callable[[Response], np.ndarray] | None = None,
  power: float = 1.0,
) -> list[Choice]:
  """The `count` best runs in the order in which they pay, each chosen with those before it taken as done.

  Args:
    prior: covariance of the coefficients now.
    sigma: noise of a run's loss; points of one run share half of their variance.
    aim: directions (m, 14) whose variance is to fall, for example `predicted_loss`; None for all coefficients alike
      (the gain is then half the fall of the log determinant; with an aim, that of the log of the summed variance).
    power: of the cost that the gain is divided by; below 1 favours few dear runs.
  """
  covariance_now, chosen = prior, list[Choice]()
  rows = [
    response.jacobian(np.full(len(c.tokens), c.params), np.array(c.tokens),
                      np.full(len(c.tokens), c.lr), np.full(len(c.tokens), c.batch_tokens))
    for c in candidates
  ]  # fmt: skip
  left = set(range(len(candidates)))
  directions = None if aim is None else np.atleast_2d(aim(response))
  while left and len(chosen) < count:
    gains = {k: _gain(covariance_now, rows[k], sigma, directions)[0] for k in left}
    k = max(left, key=lambda k: (gains[k] / candidates[k].cost ** power, -k))
    covariance_now = _gain(covariance_now, rows[k], sigma, directions)[1]
    chosen.append(Choice(candidates[k], gains[k], gains[k] / candidates[k].cost ** power))
    left.discard(k)
  return chosen


def predicted_loss(params: float, tokens: float) -> Callable[[Response], np.ndarray]:
  """The aim of knowing the lowest loss of (N, T), and where its learning rate and batch lie."""

  def aim(response: Response) -> np.ndarray:
    lr, batch = response.best(params, tokens)
    at = (np.array([value]) for value in (params, tokens, lr, batch))
    return response.jacobian(*at)

  return aim


def _gain(
  covariance_now: np.ndarray, J: np.ndarray, sigma: float, directions: np.ndarray | None
) -> tuple[float, np.ndarray]:
  """(what a run with the points J gains, the covariance after it)."""
  noise = sigma**2 * (0.5 * np.eye(len(J)) + 0.5)
  K = covariance_now @ J.T @ np.linalg.inv(noise + J @ covariance_now @ J.T)
  after = covariance_now - K @ J @ covariance_now
  if directions is None:
    sign, now = np.linalg.slogdet(noise + J @ covariance_now @ J.T)
    assert sign > 0
    return float(0.5 * (now - np.linalg.slogdet(noise)[1])), after
  variance = lambda C: float(np.einsum("mi,ij,mj->", directions, C, directions))
  return 0.5 * float(np.log(variance(covariance_now) / variance(after))), after
