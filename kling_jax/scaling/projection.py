"""Variable projection: least squares of L = E + A/N^alpha + B/T^beta as a search over the two exponents alone.

For given (alpha, beta) the model is linear in (E, A, B), and the best of them that are not negative have a closed form.
What is left is a smooth function of two variables whose Hessian is well conditioned (about 11, where that of all five
parameters has 3e11; arXiv 2603.22339). It is searched on a grid and then by Newton's method with exact derivatives.

Many problems that differ only in the weights of the rows (bootstrap draws, rows left out) are solved at once: the
arrays below carry a leading axis k of problems beside the axis n of rows. float64 NumPy: the work is a few passes over
(k, n), and no compile time is worth it.
"""

import dataclasses

import numpy as np

from kling_jax.scaling.laws import Surface

EXPONENTS = (0.01, 4.0)  # range of alpha and beta; an end is reported, never silently returned
GRID = np.geomspace(0.03, 2.5, 20)
CHUNK = 128 * 1024  # numbers in a (k, n) work array, so that those of (k, n, 5) stay in cache


def chunks(problems: int, rows: int) -> list[slice]:
  """Which problems are solved at once."""
  size = max(1, min(128, CHUNK // rows))
  return [slice(k, k + size) for k in range(0, problems, size)]


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows of one table, with N and T in units of their geometric means: A and B are then of the loss's own size.

  Attributes:
    x, z: log N and log T, centred. (n,)
    x0, z0: what was subtracted.
  """

  x: np.ndarray
  z: np.ndarray
  x0: float
  z0: float

  @classmethod
  def of(cls, params: np.ndarray, tokens: np.ndarray) -> "Rows":
    x, z = np.log(params), np.log(tokens)
    return cls(x - x.mean(), z - z.mean(), float(x.mean()), float(z.mean()))

  def surface(self, theta: np.ndarray) -> Surface:
    """Parameters (..., 5) = (E, A, B, alpha, beta) in these units, as a surface in raw counts."""
    E, A, B, alpha, beta = np.moveaxis(theta, -1, 0)
    return Surface(E, A * np.exp(alpha * self.x0), B * np.exp(beta * self.z0), alpha, beta)

  def theta(self, surface: Surface) -> np.ndarray:
    """The inverse of `surface`."""
    A, B = surface.A * np.exp(-surface.alpha * self.x0), surface.B * np.exp(-surface.beta * self.z0)
    return np.stack(np.broadcast_arrays(surface.E, A, B, surface.alpha, surface.beta), axis=-1)

  def predict(self, theta: np.ndarray) -> np.ndarray:
    """Loss (k, n) of parameters (k, 5)."""
    E, A, B, alpha, beta = np.moveaxis(theta[..., None], -2, 0)
    return E + A * np.exp(-alpha * self.x) + B * np.exp(-beta * self.z)


def solve(
  rows: Rows, loss: np.ndarray, weights: np.ndarray, start: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Minimises sum of weight * (loss - model)^2 for k problems.

  Args:
    rows: N and T of the table.
    loss: L, (n,) or (k, n).
    weights: (n,) or (k, n), not negative.
    start: (alpha, beta) of a neighbouring problem; tried first, and kept where no point of the grid is better.

  Returns:
    Parameters (k, 5) = (E, A, B, alpha, beta) in the units of `rows`, and the minima (k,).
  """
  shape = np.broadcast_shapes(loss.shape, weights.shape, (1, len(rows.x)))
  y, w = np.broadcast_to(loss, shape), np.broadcast_to(weights, shape)
  parts = [_solve(rows, y[part], w[part], start) for part in chunks(*shape)]
  return np.concatenate([theta for theta, _ in parts]), np.concatenate([value for _, value in parts])


def at(rows: Rows, loss: np.ndarray, weights: np.ndarray, exponents: np.ndarray) -> np.ndarray:
  """The best parameters (k, 5) for given exponents (k, 2)."""
  shape = (len(exponents), len(rows.x))
  return _evaluate(rows, np.broadcast_to(loss, shape), np.broadcast_to(weights, shape), np.log(exponents))[0]


def _solve(rows: Rows, y: np.ndarray, weights: np.ndarray, start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
  values, exponents = grid(rows, y, weights)
  best = values.argmin(axis=1)
  if start is None:
    candidates = _valleys(values)
    theta, value = _newton(rows, y, weights, exponents[candidates[:, 0]])
    for column in candidates.T[1:]:
      other, lower = _newton(rows, y, weights, exponents[column])
      theta, value = np.where((lower < value)[:, None], other, theta), np.minimum(lower, value)
    return theta, value
  theta, value = _newton(rows, y, weights, np.broadcast_to(np.asarray(start, float), (len(weights), 2)))
  worse = np.flatnonzero(values.min(axis=1) < value)
  if len(worse):
    other, lower = _newton(rows, y[worse], weights[worse], exponents[best[worse]])
    better = worse[lower < value[worse]]
    theta[better], value[better] = other[lower < value[worse]], lower[lower < value[worse]]
  return theta, value


def grid(rows: Rows, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The projected objective (k, g * g) on the grid of exponents, and those exponents (g * g, 2)."""
  size = len(GRID)
  u, v = np.exp(-GRID[:, None] * rows.x), np.exp(-GRID[:, None] * rows.z)  # (g, n)
  u0, v0, y0 = u.mean(axis=1), v.mean(axis=1), y.mean()
  u, v, y = u - u0[:, None], v - v0[:, None], y - y0  # centred, so that the moments below lose no digits
  total = weights.sum(axis=1)
  weights = weights / total[:, None]
  wy = weights * y
  mean = lambda a: weights @ a.T  # (k, columns)
  mu, mv, my = mean(u), mean(v), wy.sum(axis=1)
  cuu = mean(u * u) - mu**2
  cvv = mean(v * v) - mv**2
  cuy, cvy = wy @ u.T - mu * my[:, None], wy @ v.T - mv * my[:, None]
  cyy = (wy * y).sum(axis=1) - my**2
  cuv = np.concatenate([mean(row * v) for row in u], axis=1) - (mu[:, :, None] * mv[:, None]).reshape(-1, size * size)
  over = lambda a: np.repeat(a, size, axis=1)  # alpha varies slowly
  under = lambda a: np.tile(a, (1, size))
  moments = (over(mu + u0), under(mv + v0), my[:, None] + y0, over(cuu), under(cvv), cuv, over(cuy), under(cvy),
             cyy[:, None])  # fmt: skip
  _, value = _linear(*moments)
  pairs = np.stack(np.meshgrid(GRID, GRID, indexing="ij"), axis=-1).reshape(-1, 2)
  return value * total[:, None], pairs


def _valleys(values: np.ndarray, most: int = 6) -> np.ndarray:
  """Indices (k, most) of the lowest local minima of each grid; the lowest is repeated where there are fewer."""
  size = len(GRID)
  square = values.reshape(-1, size, size)
  padded = np.pad(square, ((0, 0), (1, 1), (1, 1)), constant_values=np.inf)
  around = [padded[:, i : i + size, j : j + size] for i in range(3) for j in range(3) if (i, j) != (1, 1)]
  valley = (square <= np.min(around, axis=0)).reshape(len(values), -1)
  order = np.where(valley, values, np.inf).argsort(axis=1)[:, :most]
  found = np.take_along_axis(valley, order, axis=1)
  return np.where(found, order, order[:, :1])


def _linear(mu, mv, my, cuu, cvv, cuv, cuy, cvy, cyy) -> tuple[np.ndarray, np.ndarray]:
  """Least squares of y on (1, u, v) with no coefficient below zero, from means and covariances (broadcast together).

  With three columns the best of the active sets is found by trying them all.

  Returns:
    Coefficients (..., 3) and the mean squared residual (...).
  """
  tiny = np.finfo(float).tiny
  zero = np.zeros(np.broadcast_shapes(mu.shape, mv.shape, cuv.shape))
  determinant = np.maximum(cuu * cvv - cuv**2, 1e-14 * cuu * cvv + tiny)
  muu, mvv, muv, muy, mvy = cuu + mu**2, cvv + mv**2, cuv + mu * mv, cuy + mu * my, cvy + mv * my
  raw = np.maximum(muu * mvv - muv**2, 1e-14 * muu * mvv + tiny)
  choices = []
  for a, b in (
    ((cuy * cvv - cvy * cuv) / determinant, (cvy * cuu - cuy * cuv) / determinant),
    (cuy / np.maximum(cuu, tiny), zero),
    (zero, cvy / np.maximum(cvv, tiny)),
    (zero, zero),
  ):
    choices.append((my - a * mu - b * mv, a, b))
  for a, b in (
    ((muy * mvv - mvy * muv) / raw, (mvy * muu - muy * muv) / raw),
    (muy / muu, zero),
    (zero, mvy / mvv),
  ):
    choices.append((zero, a, b))
  best, coefficients = np.full(zero.shape, np.inf), np.zeros((*zero.shape, 3))
  for e, a, b in choices:
    # Mean squared residual about the mean, plus that of the mean; exact for any (e, a, b).
    with np.errstate(over="ignore", invalid="ignore"):  # coefficients beyond all bounds, where columns nearly agree
      about = cyy - 2 * a * cuy - 2 * b * cvy + a * a * cuu + b * b * cvv + 2 * a * b * cuv
      value = about + (my - e - a * mu - b * mv) ** 2
    take = (e >= 0) & (a >= 0) & (b >= 0) & (value < best)
    best = np.where(take, value, best)
    coefficients = np.where(take[..., None], np.stack(np.broadcast_arrays(e, a, b), axis=-1), coefficients)
  return coefficients, best


def _newton(rows: Rows, y: np.ndarray, weights: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Newton's method in the logs of the exponents, for each problem from its own start (k, 2)."""
  p = np.log(exponents)
  theta, value, slope, curve = _evaluate(rows, y, weights, p)
  damping, running = np.zeros(len(p)), np.arange(len(p))
  low, high = np.log(EXPONENTS[0]), np.log(EXPONENTS[1])
  for _ in range(100):
    if not len(running):
      break
    size, axes = np.linalg.eigh(curve[running])
    size = np.abs(size)
    floor = 1e-9 * size.max(axis=1, keepdims=True) + np.finfo(float).tiny
    along = (axes.swapaxes(1, 2) @ slope[running, :, None])[..., 0]
    step = -(axes @ (along / (np.maximum(size, floor) + damping[running, None]))[..., None])[..., 0]
    step *= np.minimum(1, 0.7 / np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-300))
    to = np.clip(p[running] + step, low, high)
    step = to - p[running]
    new = _evaluate(rows, y[running], weights[running], to)
    lower = new[1] <= value[running]
    expected = np.abs((slope[running] * step).sum(axis=1))
    done = (expected <= 1e-15 * value[running]) | (np.abs(step).max(axis=1) < 1e-12) | (damping[running] > 1e30)
    taken = running[lower]
    p[taken] = to[lower]
    for old, fresh in zip((theta, value, slope, curve), new, strict=True):
      old[taken] = fresh[lower]
    scale = size.max(axis=1)
    damping[running] = np.where(lower, damping[running] / 10, np.maximum(10 * damping[running], 1e-3 * scale))
    damping[running[lower & (damping[running] < 1e-6 * scale)]] = 0.0
    running = running[~done]
  return theta, value


def _evaluate(rows: Rows, y: np.ndarray, weights: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, ...]:
  """At log exponents p (k, 2): parameters (k, 5), objective (k,), its gradient (k, 2) and Hessian (k, 2, 2) in p."""
  alpha, beta = np.exp(p[:, :1]), np.exp(p[:, 1:])
  u, v = np.exp(-alpha * rows.x), np.exp(-beta * rows.z)  # (k, n)
  total = weights.sum(axis=1, keepdims=True)
  mean = lambda a: (weights * a).sum(axis=1) / total[:, 0]
  mu, mv, my = mean(u), mean(v), mean(y)
  du, dv, dy = u - mu[:, None], v - mv[:, None], y - my[:, None]
  moments = (mu, mv, my, mean(du * du), mean(dv * dv), mean(du * dv), mean(du * dy), mean(dv * dy), mean(dy * dy))
  c, _ = _linear(*moments)
  theta = np.concatenate([c, alpha, beta], axis=1)
  r = y - (c[:, :1] + c[:, 1:2] * u + c[:, 2:] * v)
  value = (weights * r * r).sum(axis=1)
  J = np.stack([np.ones_like(u), u, v, -c[:, 1:2] * rows.x * u, -c[:, 2:] * rows.z * v], axis=2)
  H = hessian(rows, weights, u, v, r, c, J)
  g = -2 * np.matmul((weights * r)[:, None], J[:, :, 3:])[:, 0]
  free = c > 0
  inner = np.where(free[:, :, None] & free[:, None], H[:, :3, :3], np.eye(3))
  cross = np.where(free[:, :, None], H[:, :3, 3:], 0.0)
  H2 = H[:, 3:, 3:] - cross.swapaxes(1, 2) @ np.linalg.solve(inner, cross)
  e = theta[:, 3:]  # chain rule: d / d log a = a d / d a
  H2 = H2 * e[:, :, None] * e[:, None] + np.eye(2) * (g * e)[:, :, None]
  return theta, value, g * e, H2


def hessian(rows: Rows, weights, u, v, r, c, J) -> np.ndarray:
  """Exact Hessian (k, 5, 5) of the sum of weighted squares in (E, A, B, alpha, beta)."""
  H = 2 * np.matmul((J * weights[:, :, None]).swapaxes(1, 2), J)
  wr = weights * r
  xu, zv = (wr * u) @ rows.x, (wr * v) @ rows.z
  xxu, zzv = (wr * u) @ rows.x**2, (wr * v) @ rows.z**2
  for i, j, term in ((1, 3, xu), (3, 1, xu), (2, 4, zv), (4, 2, zv)):
    H[:, i, j] += 2 * term
  H[:, 3, 3] -= 2 * c[:, 1] * xxu
  H[:, 4, 4] -= 2 * c[:, 2] * zzv
  return H
