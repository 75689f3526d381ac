"""The best learning rate and batch: a quadratic in their logs for each (N, T), and power laws through its minima.

Where grids are too coarse or too noisy for a quadratic each, all (N, T) share one curvature (`joint`).
"""

import dataclasses

import numpy as np
from scipy import optimize

from kling_jax.errors import DataError
from kling_jax.scaling import loglinear
from kling_jax.scaling.table import RunTable

WITHIN = 0.01  # runs whose loss lies within this share of their cell's lowest one enter its quadratic
ENOUGH = 12  # runs of a quadratic, two for each of its six coefficients; cells with fewer tell little
LEAST = 7  # runs of a quadratic at all
JOINT_WITHIN = 0.06  # as WITHIN, for the curvature that all cells share: more runs, less local
FAR = np.log(64)  # further than this from all batches a minimum is that of noise on a slope
TILTS = np.linspace(-1, 2, 13)  # where the search for the slope of a valley, d log lr / d log B, begins
REACH = np.log(2)  # how far, in logs, a minimum may lie outside the rates and batches that were run


@dataclasses.dataclass(frozen=True)
class Cell:
  """One (N, T) with its runs over learning rate and batch.

  Attributes:
    params, tokens: N, T. rows: indices of its runs in the table.
    lr, batch_tokens, loss: at the minimum of the quadratic; of the best run where there is none.
    hessian: (2, 2) of the loss over its minimum in (log lr, log B); None where there is none.
    covariance: (2, 2) of the minimum's (log lr, log B); None likewise.
    noise: standard deviation of a run's loss about the quadratic; NaN without one.
    near: how many runs entered the quadratic.
    reason: why there is no minimum; "" where there is one.
  """

  params: float
  tokens: float
  rows: np.ndarray
  lr: float
  batch_tokens: float
  loss: float
  hessian: np.ndarray | None = None
  covariance: np.ndarray | None = None
  noise: float = float("nan")
  near: int = 0
  reason: str = ""

  def penalty(self, lr: float, batch_tokens: float) -> float:
    """Relative loss above the minimum, by the quadratic."""
    assert self.hessian is not None
    away = np.log([lr / self.lr, batch_tokens / self.batch_tokens])
    return float(away @ self.hessian @ away / 2)


@dataclasses.dataclass(frozen=True)
class Laws:
  """lr(N, T), B(N, T), and what surrounds the optimum.

  Attributes:
    lr, batch_tokens: power laws.
    curvature: mean Hessian of the relative loss in (log lr, log B), for the regret of leaving the optimum.
    tilt: d log lr / d log B along the valley: the best rate where hardware forces another batch.
    cells: those that the laws were fitted to; left_out: the others, each with its reason.
    warnings: what weakens the laws.
  """

  lr: loglinear.PowerFit
  batch_tokens: loglinear.PowerFit
  curvature: np.ndarray
  tilt: float
  cells: tuple[Cell, ...]
  left_out: tuple[Cell, ...]
  warnings: tuple[str, ...] = ()

  def lr_given_batch(self, batch_tokens: float, params: float, tokens: float) -> float:
    """eta(B | N, T): the best learning rate for a batch that is not the best one."""
    best = float(self.batch_tokens.law(params=params, tokens=tokens))
    return float(self.lr.law(params=params, tokens=tokens) * (batch_tokens / best) ** self.tilt)

  def penalty(self, lr: float, batch_tokens: float, params: float, tokens: float) -> float:
    """Expected relative loss above the optimum of (N, T)."""
    best = self.lr.law(params=params, tokens=tokens), self.batch_tokens.law(params=params, tokens=tokens)
    away = np.log([float(lr / best[0]), float(batch_tokens / best[1])])
    return float(away @ self.curvature @ away / 2)


def has_grids(table: RunTable) -> bool:
  """Whether the table holds several learning rates or batches for some (N, T); repeated seeds are none."""
  if table.lr is None or table.batch_tokens is None:
    return False
  pairs = np.round(np.log(np.stack([table.lr, table.batch_tokens], axis=1)), 4)
  return any(len(np.unique(pairs[rows], axis=0)) > 1 for rows in groups(table))


def groups(table: RunTable) -> list[np.ndarray]:
  """Row indices of each (N, T), in order of N, then T."""
  pairs = np.round(np.log(np.stack([table.params, table.tokens], axis=1)), 4)
  _, inverse = np.unique(pairs, axis=0, return_inverse=True)
  return [np.flatnonzero(inverse == group) for group in range(inverse.max() + 1)]


def cells(table: RunTable, within: float = WITHIN) -> list[Cell]:
  """Fits the quadratic of every (N, T).

  Args:
    table: with lr and batch_tokens.
    within: runs further above their cell's lowest loss, as a share of it, are left out: a quadratic is local.
  """
  if table.lr is None or table.batch_tokens is None:
    raise DataError("laws of learning rate and batch need the columns lr and batch_tokens")
  return [_cell(table, rows, within) for rows in groups(table)]


def _cell(table: RunTable, rows: np.ndarray, within: float) -> Cell:
  assert table.lr is not None and table.batch_tokens is not None
  lowest = rows[table.loss[rows].argmin()]
  params, tokens = float(table.params[lowest]), float(table.tokens[lowest])
  best = Cell(
    params, tokens, rows, float(table.lr[lowest]), float(table.batch_tokens[lowest]), float(table.loss[lowest])
  )
  near = rows[table.loss[rows] <= table.loss[lowest] * (1 + within)]
  x, y = np.log(table.lr[near]), np.log(table.batch_tokens[near])
  if min(len(np.unique(x.round(6))), len(np.unique(y.round(6)))) < 3 or len(near) < LEAST:
    reason = f"{len(near)} runs within {within:.1%} of the best; a quadratic needs {LEAST}, of 3 rates and 3 batches"
    return dataclasses.replace(best, reason=reason)
  x0, y0 = x.mean(), y.mean()
  x, y = x - x0, y - y0
  X = np.stack([np.ones_like(x), x, y, x * x / 2, y * y / 2, x * y], axis=1)
  if np.linalg.matrix_rank(X) < 6:
    return dataclasses.replace(best, reason="its runs do not span a quadratic")
  c, _, _, _ = np.linalg.lstsq(X, table.loss[near], rcond=None)
  H = np.array([[c[3], c[5]], [c[5], c[4]]])
  if np.linalg.eigvalsh(H)[0] <= 0:
    return dataclasses.replace(best, reason="its quadratic has no minimum (Hessian not positive definite)")
  vertex = np.linalg.solve(H, -c[1:3])
  loss = float(c[0] + c[1:3] @ vertex / 2)
  dof = max(len(near) - 6, 1)
  noise = float(np.sqrt(((table.loss[near] - X @ c) ** 2).sum() / dof))
  # d vertex / d c: H dv = -(dg + dH v)
  dX = np.zeros((2, 6))
  dX[0, 1] = dX[1, 2] = 1
  dX[0, 3], dX[1, 4] = vertex
  dX[0, 5], dX[1, 5] = vertex[1], vertex[0]
  slope = -np.linalg.solve(H, dX)
  covariance = noise**2 * slope @ np.linalg.inv(X.T @ X) @ slope.T
  logs = x0 + vertex[0], y0 + vertex[1]
  lr, batch = (float(np.exp(np.clip(value, -700, 700))) for value in logs)
  found = dataclasses.replace(
    best, lr=lr, batch_tokens=batch, loss=loss, hessian=H / loss, covariance=covariance, noise=noise, near=len(near)
  )
  every = np.log(table.lr[rows]), np.log(table.batch_tokens[rows])
  outside = any(not a.min() - REACH <= v <= a.max() + REACH for a, v in zip(every, logs, strict=True))
  if outside:
    return dataclasses.replace(best, reason=f"its minimum (lr {lr:.3g}, batch {batch:.3g}) lies outside its grid")
  return found


def fit(table: RunTable, within: float = WITHIN) -> Laws:
  """The laws lr(N, T) and B(N, T), by least squares in logs over the cells that have a minimum.

  Cells whose quadratic stands on fewer than ENOUGH runs are used, with a warning, where there are not four others.
  Where fewer than four cells, or less than half of them, have a minimum at all, the laws are those of `joint`, with a
  warning.

  Raises:
    DataError: no lr or batch_tokens, or neither way gives laws.
  """
  every = cells(table, within)
  warnings = []
  if sum(not cell.reason and cell.near >= ENOUGH for cell in every) >= 4:
    few = lambda cell: f"{cell.near} runs within {within:.1%} of the best; {ENOUGH} make a good quadratic"
    every = [
      cell if cell.reason or cell.near >= ENOUGH else dataclasses.replace(cell, reason=few(cell)) for cell in every
    ]
  else:
    warnings.append(f"fewer than four (N, T) have {ENOUGH} runs near their best; quadratics stand on as few as {LEAST}")
  good = [cell for cell in every if not cell.reason]
  bad = tuple(cell for cell in every if cell.reason)
  if not _enough(every) and len(every) >= 4:
    return joint(table, max(within, JOINT_WITHIN))
  if len(good) < 4:
    why = f"; {bad[0].params:.3g} parameters, {bad[0].tokens:.3g} tokens: {bad[0].reason}" if bad else ""
    raise DataError(f"{len(good)} of {len(every)} cells have a best (lr, batch); laws of N and T need four{why}")
  arguments = {"params": np.array([cell.params for cell in good]), "tokens": np.array([cell.tokens for cell in good])}
  curvature = np.mean([cell.hessian for cell in good if cell.hessian is not None], axis=0)
  return Laws(
    lr=loglinear.fit(np.array([cell.lr for cell in good]), arguments),
    batch_tokens=loglinear.fit(np.array([cell.batch_tokens for cell in good]), arguments),
    curvature=curvature,
    tilt=float(-curvature[0, 1] / curvature[0, 0]),
    cells=tuple(good),
    left_out=bad,
    warnings=tuple(warnings),
  )


def joint(table: RunTable, within: float = JOINT_WITHIN) -> Laws:
  """The laws lr(N, T) and B(N, T) from one least-squares fit to the runs of all cells near their best.

  With z = (log lr, log B) and a = (1, log N, log T) the loss of a run is

    log L = c(N, T) + z' H z / 2 + z' G a

  with one H (2, 2) and one G (2, 3) for all cells and a level c for each: linear in all of them, and its minimum
  z* = -H^-1 G a is a power law of N and T. Errors are clustered by run, because one run is read at many T. A cell's
  own lr, batch and loss are those of the minimum, at the border of the batches that were run where it lies beyond.

  Where H is not positive definite, or the minimum lies `FAR` from all batches, because smaller batches are better down
  to the smallest, the form is without the square of log B: the law of the batch is the smallest that was run, and the
  law of the rate holds for it.

  Raises:
    DataError: no lr or batch_tokens; the runs do not span the form; it has no minimum.
  """
  if table.lr is None or table.batch_tokens is None:
    raise DataError("laws of learning rate and batch need the columns lr and batch_tokens")
  every = groups(table)
  near = [rows[table.loss[rows] <= table.loss[rows].min() * (1 + within)] for rows in every]
  bowl: _Bowl | _Valley
  try:
    bowl = _Bowl.fit(table, near)
  except _NoMinimum:
    bowl = _Valley.fit(table, near)
  found = tuple(bowl.cell(table, k, group, len(near[k])) for k, group in enumerate(every))
  lr, batch = bowl.law(0, len(every)), bowl.law(1, len(every))
  runs = sum(len(rows) for rows in near)
  warnings = [f"too few (N, T) have a quadratic of their own; all share one curvature, from {runs} readings of runs"]
  below = [float(batch.law(params=c.params, tokens=c.tokens)) < table.batch_tokens[c.rows].min() for c in found]
  if isinstance(bowl, _Valley):
    smallest = float(batch.law(params=1.0, tokens=1.0))
    warnings.append(f"no batch is best: the smaller the better, down to the smallest that was run ({smallest:.4g} "
                    "tokens); the law of the batch is that one, and the law of the rate holds for it")  # fmt: skip
  elif any(below):
    warnings.append(f"the best batch of {sum(below)} of {len(found)} (N, T) lies below all that were run")
  return Laws(lr, batch, bowl.H, float(-bowl.H[0, 1] / bowl.H[0, 0]), found, (), tuple(warnings))


class _NoMinimum(DataError):
  """The quadratic of rate and batch is no bowl."""


@dataclasses.dataclass(frozen=True)
class _Near:
  """The runs that enter a common fit: logs of rate and batch, and of N and T, both centred; a run's level by its cell.

  Attributes:
    z0, a0: the centres. x, y: of rate and batch. a: (runs, 3) one, N, T. levels: (runs, cells). loss: its log.
    names: of the training runs.
  """

  z0: np.ndarray
  a0: np.ndarray
  x: np.ndarray
  y: np.ndarray
  a: np.ndarray
  levels: np.ndarray
  loss: np.ndarray
  names: np.ndarray

  @classmethod
  def of(cls, table: RunTable, near: list[np.ndarray]) -> "_Near":
    assert table.lr is not None and table.batch_tokens is not None
    rows, cell = np.concatenate(near), np.repeat(np.arange(len(near)), [len(part) for part in near])
    z = np.log(np.stack([table.lr[rows], table.batch_tokens[rows]], axis=1))
    a = np.log(np.stack([table.params[rows], table.tokens[rows]], axis=1))
    z0, a0 = z.mean(axis=0), a.mean(axis=0)
    ones = np.ones((len(rows), 1))
    x, y = (z - z0).T
    return cls(z0, a0, x, y, np.concatenate([ones, a - a0], axis=1), np.eye(len(near))[cell], np.log(table.loss[rows]),
               table.run[rows])  # fmt: skip

  def solve(self, terms: np.ndarray) -> "_Solved":
    """Least squares of `terms` (runs, k) and a level for each cell; errors clustered by run.

    Raises:
      DataError: the runs do not span them.
    """
    X = np.concatenate([terms, self.levels], axis=1)
    if np.linalg.matrix_rank(X) < X.shape[1] or len(X) <= X.shape[1]:
      raise DataError(f"{len(X)} runs near the best of their (N, T) do not span a common quadratic in lr and batch")
    c, _, _, _ = np.linalg.lstsq(X, self.loss, rcond=None)
    error, count = self.loss - X @ c, terms.shape[1]
    runs, of = np.unique(self.names, return_inverse=True)
    scores = np.zeros((len(runs), X.shape[1]))
    np.add.at(scores, of, X * error[:, None])
    bread = np.linalg.inv(X.T @ X)
    covariance = bread @ (scores.T @ scores) @ bread * len(runs) / max(len(runs) - count, 1)
    noise = float(np.sqrt((error**2).sum() / (len(X) - X.shape[1])))
    return _Solved(c[:count], c[count:], covariance[:count, :count], noise, len(runs))


@dataclasses.dataclass(frozen=True)
class _Solved:
  """Coefficients, levels of cells, covariance of the coefficients, deviation of a run's log loss, number of runs."""

  c: np.ndarray
  levels: np.ndarray
  covariance: np.ndarray
  noise: float
  runs: int


@dataclasses.dataclass(frozen=True)
class _Bowl:
  """The form of `joint`, fitted; logs are centred: z - z0 = (log lr, log B), a = (1, (log N, log T) - a0).

  Attributes:
    z0, a0: the centres. H, G, levels: the coefficients. noise: standard deviation of a run's log loss.
    covariance: (9, 9) of those of H (rates, batches, mixed) and G. runs: how many.
  """

  z0: np.ndarray
  a0: np.ndarray
  H: np.ndarray
  G: np.ndarray
  levels: np.ndarray
  noise: float
  covariance: np.ndarray
  runs: int

  @classmethod
  def fit(cls, table: RunTable, near: list[np.ndarray]) -> "_Bowl":
    """To the rows of each cell."""
    at = _Near.of(table, near)
    squares = np.stack([at.x**2 / 2, at.y**2 / 2, at.x * at.y], axis=1)
    found = at.solve(np.concatenate([squares, at.x[:, None] * at.a, at.y[:, None] * at.a], axis=1))
    c = found.c
    H = np.array([[c[0], c[2]], [c[2], c[1]]])
    if np.linalg.eigvalsh(H)[0] <= 0:
      raise _NoMinimum("the quadratic that all (N, T) share has no minimum (Hessian not positive definite)")
    bowl = cls(at.z0, at.a0, H, c[3:].reshape(2, 3), found.levels, found.noise, found.covariance, found.runs)
    best = at.a @ bowl.line[1]
    if best.min() < at.y.min() - FAR or best.max() > at.y.max() + FAR:
      raise _NoMinimum("the quadratic that all (N, T) share has its minimum far from all batches that were run")
    return bowl

  @property
  def line(self) -> np.ndarray:
    """(2, 3): z* - z0 over a."""
    return -np.linalg.solve(self.H, self.G)

  def law(self, k: int, points: int) -> loglinear.PowerFit:
    """The law of the rate (0) or the batch (1), in raw counts; d line = -H^-1 (dH line + dG)."""
    changes = [np.array(dH) @ self.line for dH in ([[1, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 1], [1, 0]])]
    changes += [part.reshape(2, 3) for part in np.eye(6)]
    slope = np.stack([-np.linalg.solve(self.H, change)[k] for change in changes], axis=1)
    back = np.array([[1.0, -self.a0[0], -self.a0[1]], [0, 1, 0], [0, 0, 1]])
    estimate = back @ self.line[k] + np.array([self.z0[k], 0, 0])
    spread = back @ slope @ self.covariance @ slope.T @ back.T
    return loglinear.PowerFit(("params", "tokens"), estimate, spread, float(max(self.runs - 9, 1)), self.noise, points)

  def cell(self, table: RunTable, k: int, rows: np.ndarray, near: int) -> Cell:
    """The k-th (N, T) at its minimum, or at the border of its batches."""
    assert table.batch_tokens is not None
    params, tokens = float(table.params[rows[0]]), float(table.tokens[rows[0]])
    a = np.array([1.0, *(np.log([params, tokens]) - self.a0)])
    vertex, batches = self.line @ a, np.log(table.batch_tokens[rows]) - self.z0[1]
    batch = float(np.clip(vertex[1], batches.min(), batches.max()))
    z = np.array([vertex[0] - self.H[0, 1] / self.H[0, 0] * (batch - vertex[1]), batch])
    loss = float(np.exp(self.levels[k] + z @ self.H @ z / 2 + z @ self.G @ a))
    lr, batch_tokens = map(float, np.exp(z + self.z0))
    return Cell(params, tokens, rows, lr, batch_tokens, loss, self.H, noise=self.noise, near=near)


@dataclasses.dataclass(frozen=True)
class _Valley:
  """log L = c(N, T) + h u^2 / 2 + u g' a + m y with u = x - tilt y: a bottom along the rate x, none along the batch y.

  Attributes:
    z0, a0: the centres, as in `_Bowl`. h, m, tilt, g, levels: the coefficients. smallest: of the batches, y.
    covariance: (6, 6) of h, m, g and the tilt. noise, runs: as in `_Bowl`.
  """

  z0: np.ndarray
  a0: np.ndarray
  h: float
  m: float
  tilt: float
  g: np.ndarray
  levels: np.ndarray
  smallest: float
  covariance: np.ndarray
  noise: float
  runs: int

  @classmethod
  def fit(cls, table: RunTable, near: list[np.ndarray]) -> "_Valley":
    """To the rows of each cell: linear but for the tilt.

    Raises:
      DataError: no minimum along the rate, or smaller batches are not better.
    """
    assert table.batch_tokens is not None
    at = _Near.of(table, near)

    def terms(tilt: float) -> np.ndarray:
      u = at.x - tilt * at.y
      return np.concatenate([np.stack([u**2 / 2, at.y], axis=1), u[:, None] * at.a], axis=1)

    def misfit(tilt: float) -> float:
      X = np.concatenate([terms(tilt), at.levels], axis=1)
      return float(((at.loss - X @ np.linalg.lstsq(X, at.loss, rcond=None)[0]) ** 2).sum())

    start = min(TILTS, key=misfit)
    step = TILTS[1] - TILTS[0]
    tilt = optimize.minimize_scalar(misfit, bounds=(start - step, start + step), options={"xatol": 1e-9}).x
    h, m, *g = at.solve(terms(tilt)).c
    if h <= 0 or m <= 0:
      raise DataError("the quadratic that all (N, T) share has no minimum (its Hessian is not positive definite), and "
                      "smaller batches are not always better")  # fmt: skip
    by_tilt = -at.y * (h * (at.x - tilt * at.y) + at.a @ np.array(g))
    found = at.solve(np.concatenate([terms(tilt), by_tilt[:, None]], axis=1))  # errors: linear about the solution
    smallest = float(np.log(table.batch_tokens.min()) - at.z0[1])
    return cls(at.z0, at.a0, float(h), float(m), float(tilt), np.array(g), found.levels, smallest, found.covariance,
               found.noise, found.runs)  # fmt: skip

  @property
  def H(self) -> np.ndarray:
    """Curvature across the valley; along it there is none."""
    return self.h * np.array([[1, -self.tilt], [-self.tilt, self.tilt**2]])

  def law(self, k: int, points: int) -> loglinear.PowerFit:
    """The law of the rate (0) at the smallest batch, in raw counts, or that batch (1), which is none of N and T."""
    names, dof, first = ("params", "tokens"), float(max(self.runs - 6, 1)), np.array([1.0, 0, 0])
    if k:
      same = first * (self.smallest + self.z0[1])
      return loglinear.PowerFit(names, same, np.zeros((3, 3)), dof, 0.0, points)
    line = -self.g / self.h
    slope = np.concatenate([-line[:, None], 0 * line[:, None], -np.eye(3), self.h * self.smallest * first[:, None]], 1)
    back = np.array([[1.0, -self.a0[0], -self.a0[1]], [0, 1, 0], [0, 0, 1]])
    spread = back @ slope @ self.covariance @ slope.T @ back.T / self.h**2
    estimate = back @ line + first * (self.z0[0] + self.tilt * self.smallest)
    return loglinear.PowerFit(names, estimate, spread, dof, self.noise, points)

  def cell(self, table: RunTable, k: int, rows: np.ndarray, near: int) -> Cell:
    """The k-th (N, T) at the best rate of its own smallest batch."""
    assert table.batch_tokens is not None
    params, tokens = float(table.params[rows[0]]), float(table.tokens[rows[0]])
    a = np.array([1.0, *(np.log([params, tokens]) - self.a0)])
    batch = float(table.batch_tokens[rows].min())
    y = float(np.log(batch) - self.z0[1])
    u = float(-self.g @ a / self.h)
    loss = float(np.exp(self.levels[k] + u * (self.g @ a) / 2 + self.m * y))
    return Cell(params, tokens, rows, float(np.exp(u + self.tilt * y + self.z0[0])), batch, loss, self.H,
                noise=self.noise, near=near)  # fmt: skip


def tuned(table: RunTable) -> RunTable:
  """One row for each (N, T): the loss at its best learning rate and batch.

  That is the minimum of the quadratic where there is one, and the lowest loss of its runs where there is none; where
  too few have one, the minima of quadratics with one curvature (`joint`). Rows are weighted alike: how well a cell is
  tuned, not the noise of one run, is what its loss leaves open. A row belongs to the run of its best loss, so that
  token counts read off one run are drawn together. Rows that are held out make cells of their own; runs that differ
  in nothing but the seed count there as one, with their mean loss.
  """
  found = [(cell, part, held) for held in (False, True) for part in [table.take(table.holdout == held)] if len(part)
           for part in [_mean_of_seeds(part) if held else part]
           for cell in (_best(part) if not held else cells(part))]  # fmt: skip
  parts = [part.take(cell.rows[:1]) for cell, part, _ in found]
  column = lambda values: np.array(list(values))
  params, tokens = (column(getattr(part, name)[0] for part in parts) for name in ("params", "tokens"))
  return dataclasses.replace(
    table,
    params=params,
    tokens=tokens,
    loss=column(cell.loss for cell, _, _ in found),
    lr=column(cell.lr for cell, _, _ in found),
    batch_tokens=column(cell.batch_tokens for cell, _, _ in found),
    flops=None if table.flops is None else column(part.flops[0] for part in parts if part.flops is not None),
    weight=np.ones(len(found)),
    run=column(part.run[cell.rows[part.loss[cell.rows].argmin()]] for cell, part, _ in found),
    holdout=column(held for _, _, held in found),
    measured=False,
  )


def _mean_of_seeds(table: RunTable) -> RunTable:
  """One row for each (N, T, lr, B), with the mean loss of its rows."""
  assert table.lr is not None and table.batch_tokens is not None
  logs = np.log(np.stack([table.params, table.tokens, table.lr, table.batch_tokens], axis=1)).round(4)
  _, first, of = np.unique(logs, axis=0, return_index=True, return_inverse=True)
  return table.take(first, loss=np.bincount(of.ravel(), table.loss) / np.bincount(of.ravel()))


def _enough(every: list[Cell]) -> bool:
  """Whether so many cells have a minimum of their own that laws of N and T can stand on them."""
  return sum(not cell.reason for cell in every) >= max(4, len(every) / 2)


def _best(table: RunTable) -> list[Cell]:
  own = cells(table)
  if _enough(own) or len(own) < 4:
    return own
  try:
    return list(joint(table).cells)
  except DataError:  # no common minimum either: the lowest losses stand
    return own


def fixed(table: RunTable, lr: float, batch_tokens: float) -> RunTable:
  """One row for each (N, T): its measured run nearest, in logs, to one learning rate and batch for all."""
  assert table.lr is not None and table.batch_tokens is not None
  away = np.hypot(np.log(table.lr / lr), np.log(table.batch_tokens / batch_tokens))
  rows = [int(group[away[group].argmin()]) for group in groups(table)]
  return table.take(rows, run=np.arange(len(rows)))
