"""Robust fit: sum of Huber(log L_model - log L, delta) over (log E, log A, log B, alpha, beta), as papers do it.

Hoffmann et al. 2022 (arXiv 2203.15556) minimise this with L-BFGS from a grid of starts. The sum is what is minimised,
not the mean, and tolerances are tight: with SciPy's own the search ends early (arXiv 2404.10102). At delta = 1e-4 the
objective is close to a sum of absolute values and has many shallow minima, so the search has three stages: starts from
the projection (scaling/projection.py), damped Newton steps on all of them at once while delta shrinks to its value, and
L-BFGS on the best ones.
"""

import numpy as np
import threadpoolctl
from scipy import optimize

from kling_jax.scaling import projection
from kling_jax.scaling.projection import Rows

STARTS = np.geomspace(0.05, 2.0, 10)  # of alpha and of beta
POLISHED = 4  # of the starts, the best ones that L-BFGS goes on from
EMPTY = 1e-4  # a term that the projection leaves out starts at this share of the loss


def huber(r: np.ndarray, delta: float) -> np.ndarray:
  """r^2 / 2 within delta of zero, delta (|r| - delta / 2) beyond."""
  size = np.abs(r)
  inside = np.minimum(size, delta)
  return inside * (size - inside / 2)


def objective(theta: np.ndarray, rows: Rows, loss: np.ndarray, weights: np.ndarray, delta: float) -> np.ndarray:
  """The weighted sum for parameters (k, 5) = (E, A, B, alpha, beta) in the units of `rows`; (k,)."""
  return (weights * huber(np.log(rows.predict(theta)) - np.log(loss), delta)).sum(axis=-1)


def solve(
  rows: Rows, loss: np.ndarray, weights: np.ndarray, delta: float, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Minimises the weighted sum for k problems.

  Args:
    rows: N and T of the table.
    loss: L, positive; (n,) or (k, n).
    weights: (n,) or (k, n), not negative.
    delta: in log loss.
    start: parameters (s, 5) of a neighbouring problem, its minimum and some others. Each problem then goes on from
      each of these, by Newton steps alone; without it from the grid, and to the end by L-BFGS.

  Returns:
    Parameters (k, 5) = (E, A, B, alpha, beta) in the units of `rows`, and the minima (k,).
  """
  shape = np.broadcast_shapes(loss.shape, weights.shape, (1, len(rows.x)))
  y, w = np.broadcast_to(np.log(loss), shape), np.broadcast_to(weights, shape)
  if start is None:
    found = [minima(rows, np.exp(y[k]), w[k], delta) for k in range(shape[0])]
    return np.stack([theta[0] for theta, _ in found]), np.stack([value[0] for _, value in found])
  parts = [_continue(rows, y[part], w[part], delta, start) for part in projection.chunks(*shape)]
  return np.concatenate([theta for theta, _ in parts]), np.concatenate([value for _, value in parts])


def minima(rows: Rows, loss: np.ndarray, weights: np.ndarray, delta: float) -> tuple[np.ndarray, np.ndarray]:
  """The lowest local minima that the search finds for one problem, best first: parameters (s, 5), values (s,)."""
  exponents = np.stack(np.meshgrid(STARTS, STARTS, indexing="ij"), axis=-1).reshape(-1, 2)
  relative = weights / loss**2  # squared errors of L / L are those of log L, to first order
  theta = projection.at(rows, loss, relative, exponents)
  best, _ = projection.solve(rows, loss, relative)
  q = _logs(np.concatenate([best, theta]), loss)
  y, w = np.log(loss), weights
  for step in (100.0, 10.0, 3.0, 1.0):
    q, value = _newton(rows, y[None], w[None], delta * step, q, 60 if step == 1 else 15)
  order = value.argsort()
  q, value = q[order], value[order]
  new = np.concatenate([[True], np.abs(np.diff(value)) > 1e-9 * value[1:]])
  # SciPy's L-BFGS factors matrices of 10 x 10; threads that wait for one another there cost a hundredfold.
  with threadpoolctl.threadpool_limits(1, "blas"):
    polished = [_lbfgs(rows, y, w, delta, start) for start in q[new][:POLISHED]]
  order = np.argsort([value for _, value in polished])
  return _plain(np.stack([polished[k][0] for k in order])), np.array([polished[k][1] for k in order])


def _continue(rows: Rows, y: np.ndarray, w: np.ndarray, delta: float, start: np.ndarray):
  loss = np.exp(y)
  theta, value = np.zeros((len(y), 5)), np.full(len(y), np.inf)
  for first in start:
    q = _logs(np.broadcast_to(first, (len(y), 5)), loss)
    for step in (10.0, 1.0):
      q, lower = _newton(rows, y, w, delta * step, q, 60 if step == 1 else 10)
    theta, value = np.where((lower < value)[:, None], _plain(q), theta), np.minimum(value, lower)
  return theta, value


def _logs(theta: np.ndarray, loss: np.ndarray) -> np.ndarray:
  """(E, A, B, alpha, beta) -> (log E, log A, log B, alpha, beta); a term of zero starts small."""
  return np.concatenate([np.log(np.maximum(theta[:, :3], EMPTY * loss.mean())), theta[:, 3:]], axis=1)


def _plain(q: np.ndarray) -> np.ndarray:
  return np.concatenate([np.exp(q[:, :3]), q[:, 3:]], axis=1)


def _terms(rows: Rows, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """log L (k, n) of log parameters (k, 5), and the share of each of the three terms (k, n, 3) in L."""
  e, a, b, alpha, beta = np.moveaxis(q[..., None], -2, 0)
  logs = np.stack(np.broadcast_arrays(e, a - alpha * rows.x, b - beta * rows.z), axis=-1)
  top = logs.max(axis=-1, keepdims=True)
  shares = np.exp(logs - top)
  total = shares.sum(axis=-1, keepdims=True)
  return (top + np.log(total))[..., 0], shares / total


def _evaluate(rows: Rows, y: np.ndarray, w: np.ndarray, delta: float, q: np.ndarray) -> tuple[np.ndarray, ...]:
  """Objective (k,), gradient (k, 5), Hessian and its majorant, J' diag(w min(1, delta / |r|)) J (k, 5, 5)."""
  model, shares = _terms(rows, q)
  r = model - y
  size = np.abs(r)
  psi = np.clip(r, -delta, delta)
  x, z = rows.x, rows.z
  s0, s1, s2 = np.moveaxis(shares, -1, 0)
  J = np.stack([s0, s1, s2, -x * s1, -z * s2], axis=2)
  value = (w * huber(r, delta)).sum(axis=1)
  wpsi = w * psi
  gradient = np.matmul(wpsi[:, None], J)[:, 0]
  product = lambda weight: np.matmul((J * weight[:, :, None]).swapaxes(1, 2), J)
  H = product(w * (size <= delta) - wpsi)
  p1, p2 = wpsi * s1, wpsi * s2
  H[:, 0, 0] += (wpsi * s0).sum(axis=1)
  for i, j, weight, log in ((1, 3, p1, x), (2, 4, p2, z)):
    H[:, i, i] += weight.sum(axis=1)
    H[:, i, j] -= weight @ log
    H[:, j, i] -= weight @ log
    H[:, j, j] += weight @ log**2
  return value, gradient, H, product(w * np.minimum(1, delta / np.maximum(size, 1e-300)))


def _newton(
  rows: Rows, y: np.ndarray, w: np.ndarray, delta: float, q: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
  """Damped Newton steps for each start (k, 5), measured in the metric of the majorant; y and w (k or 1, n)."""
  y, w = (np.broadcast_to(a, (len(q), a.shape[-1])) for a in (y, w))
  q = q.copy()
  value, slope, curve, metric = _evaluate(rows, y, w, delta, q)
  damping, running = np.full(len(q), 1e-2), np.arange(len(q))
  for _ in range(steps):
    if not len(running):
      break
    trace = np.trace(metric[running], axis1=1, axis2=2)[:, None, None]
    root = np.linalg.cholesky(metric[running] + (1e-11 * trace + 1e-300) * np.eye(5))
    inverse = np.linalg.inv(root)
    size, axes = np.linalg.eigh(inverse @ curve[running] @ inverse.swapaxes(1, 2))
    along = (axes.swapaxes(1, 2) @ inverse @ slope[running, :, None])[..., 0]
    step = -along / (np.abs(size) + damping[running, None] + 1e-12)
    step = (inverse.swapaxes(1, 2) @ axes @ step[..., None])[..., 0]
    step *= np.minimum(1, 2.0 / np.maximum(np.abs(step).max(axis=1, keepdims=True), 1e-300))
    to = q[running] + step
    to[:, 3:] = np.clip(to[:, 3:], *projection.EXPONENTS)
    new = _evaluate(rows, y[running], w[running], delta, to)
    lower = new[0] < value[running]
    done = (np.abs((slope[running] * step).sum(axis=1)) <= 1e-13 * value[running]) | (damping[running] > 1e12)
    taken = running[lower]
    q[taken] = to[lower]
    for old, fresh in zip((value, slope, curve, metric), new, strict=True):
      old[taken] = fresh[lower]
    damping[running] = np.where(lower, damping[running] / 5, damping[running] * 6)
    running = running[~done]
  return q, value


def _lbfgs(rows: Rows, y: np.ndarray, w: np.ndarray, delta: float, start: np.ndarray) -> tuple[np.ndarray, float]:
  """L-BFGS-B from one start; the objective is scaled by 1 / delta, or its gradient would pass for zero."""

  def scaled(q: np.ndarray) -> tuple[float, np.ndarray]:
    model, shares = _terms(rows, q[None])
    r, (s0, s1, s2) = model[0] - y, np.moveaxis(shares[0], -1, 0)
    slope = w * np.clip(r, -delta, delta) / delta
    gradient = [slope @ s0, slope @ s1, slope @ s2, -(slope * rows.x) @ s1, -(slope * rows.z) @ s2]
    return float((w * huber(r, delta)).sum() / delta), np.array(gradient)

  bounds = [(None, None)] * 3 + [projection.EXPONENTS] * 2
  options = {"ftol": 1e-15, "gtol": 1e-12, "maxiter": 5000, "maxfun": 20000, "maxcor": 10}
  done = optimize.minimize(scaled, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
  return done.x, float(done.fun * delta)
