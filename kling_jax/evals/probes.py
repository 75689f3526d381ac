"""State probes: what a linear readout finds in a world model's state, on worlds that the readout has not seen.

Ridge regression for numbers, multinomial logistic regression for classes. Worlds are held out whole. The strength of
the penalty is chosen on a third part of the worlds, never on those that are reported. Scores of what is in the picture
and of what is not are kept apart: the second says whether the state remembers.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.special
import threadpoolctl

from kling_jax.data.memory_world import OTHER, THING_COLOURS
from kling_jax.data.memory_world_frames import Truth
from kling_jax.errors import DataError

PENALTIES = (0.1, 1.0, 10.0, 100.0)  # of standardised features, for the sum of squares
VISIBLE = 0.5  # share of a thing that must be in the picture
FIT, CHOOSE = 0.6, 0.2  # shares of the worlds; the rest is reported


@dataclasses.dataclass(frozen=True)
class Score:
  """A readout's score on unseen worlds: R^2 (ridge) or accuracy (logistic).

  Attributes:
    value: over all rows; visible, hidden: over rows whose target is, or is not, in the picture.
    chance: the score of the best constant.
    hidden_chance: the same over hidden rows.
    rows, hidden_rows: how many were scored. nan where there are none.
  """

  value: float
  visible: float
  hidden: float
  chance: float
  hidden_chance: float
  rows: int
  hidden_rows: int

  @property
  def visible_rows(self) -> int:
    return self.rows - self.hidden_rows


def parts(worlds_N: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Masks (N,) of rows to fit, to choose the penalty, and to report; no world is in two of them.

  Raises:
    DataError: fewer than 5 worlds.
  """
  names = np.unique(worlds_N)
  if len(names) < 5:
    raise DataError(f"probes need rows of at least 5 worlds to hold some out, not of {len(names)}")
  order = np.random.Generator(np.random.PCG64(seed)).permutation(names)
  fit = max(1, int(FIT * len(names)))
  choose = max(1, int(CHOOSE * len(names)))
  groups = order[:fit], order[fit : fit + choose], order[fit + choose :]
  found = tuple(np.isin(worlds_N, group) for group in groups)
  return found[0], found[1], found[2]


def ridge(
  states_ND: np.ndarray, target_NK: np.ndarray, worlds_N: np.ndarray, visible_N: np.ndarray, seed: int = 0
) -> Score:
  """R^2 of a linear readout of K numbers, the mean over them.

  Args:
    states_ND: states, flattened. target_NK: numbers. worlds_N: which world each row is of. visible_N: bool.
  """
  fit, choose, report = parts(worlds_N, seed)
  x, y = _standard(states_ND, fit), np.asarray(target_NK, np.float64)
  mean = y[fit].mean(0)
  u, s, vt = np.linalg.svd(x[fit], full_matrices=False)
  rotated = u.T @ (y[fit] - mean)
  found = []
  for penalty in PENALTIES:
    made = x @ (vt.T @ (rotated * (s / (s * s + penalty))[:, None])) + mean
    found.append((_r2(made, y, choose), made))
  made = max(found, key=lambda pair: pair[0])[1]
  return _scored(_r2, made, np.broadcast_to(mean, y.shape), y, report, visible_N)


def logistic(
  states_ND: np.ndarray, target_N: np.ndarray, worlds_N: np.ndarray, visible_N: np.ndarray, seed: int = 0
) -> Score:
  """Accuracy of a multinomial logistic readout of classes (whole numbers); arguments as of `ridge`."""
  fit, choose, report = parts(worlds_N, seed)
  x = np.concatenate([_standard(states_ND, fit), np.ones((len(states_ND), 1))], 1)
  names, y = np.unique(target_N, return_inverse=True)
  found = []
  for penalty in PENALTIES:
    made = (x @ _logistic_weights(x[fit], y[fit], len(names), penalty)).argmax(1)
    found.append((_accuracy(made, y, choose), made))
  made = max(found, key=lambda pair: pair[0])[1]
  constant = np.full(len(y), np.bincount(y[fit], minlength=len(names)).argmax())
  return _scored(_accuracy, made, constant, y, report, visible_N)


def _scored(measure, made: np.ndarray, constant: np.ndarray, true: np.ndarray, report: np.ndarray, visible) -> Score:
  """`measure` on the reported rows, apart by what is visible."""
  visible = np.asarray(visible, bool)
  hidden = report & ~visible
  return Score(
    value=measure(made, true, report),
    visible=measure(made, true, report & visible),
    hidden=measure(made, true, hidden),
    chance=measure(constant, true, report),
    hidden_chance=measure(constant, true, hidden),
    rows=int(report.sum()),
    hidden_rows=int(hidden.sum()),
  )


def _logistic_weights(x: np.ndarray, y: np.ndarray, classes: int, penalty: float) -> np.ndarray:
  """(D + 1, classes); the last row, of the constant, is not penalised."""
  hot = np.eye(classes)[y]

  def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
    w = flat.reshape(x.shape[1], classes)
    logits = x @ w
    log_sum = scipy.special.logsumexp(logits, axis=1)
    value = float((log_sum - (logits * hot).sum(1)).sum() + penalty / 2 * np.square(w[:-1]).sum())
    slope = x.T @ (np.exp(logits - log_sum[:, None]) - hot)
    slope[:-1] += penalty * w[:-1]
    return value, slope.ravel()

  start = np.zeros(x.shape[1] * classes)
  with threadpoolctl.threadpool_limits(1):  # the matrices are small: threads would wait for each other
    found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 100})
  return found.x.reshape(x.shape[1], classes)


def _standard(x_ND: np.ndarray, fit: np.ndarray) -> np.ndarray:
  x = np.asarray(x_ND, np.float64).reshape(len(x_ND), -1)
  deviation = x[fit].std(0)
  return (x - x[fit].mean(0)) / np.where(deviation > 1e-9, deviation, 1.0)


def _r2(made: np.ndarray, true: np.ndarray, rows: np.ndarray) -> float:
  if rows.sum() < 2:
    return float("nan")
  spread = np.square(true[rows] - true[rows].mean(0)).sum(0)
  left = np.square(true[rows] - made[rows]).sum(0)
  return float(np.mean(1 - left / np.where(spread > 0, spread, 1.0)))


def _accuracy(made: np.ndarray, true: np.ndarray, rows: np.ndarray) -> float:
  return float((made[rows] == true[rows]).mean()) if rows.any() else float("nan")


def memory_probe(
  states_ND: np.ndarray, truths: Sequence[Truth], worlds_N: np.ndarray, seed: int = 0
) -> dict[str, Score]:
  """Where the things of the first room of memory-v1 are, by their colour, from states at the ends of clips.

  One readout a colour (things have no other name that a picture shows), over the rows in which the room has a thing of
  it, the scores averaged with their rows as weights. Things that were never in the picture are left out: nobody can
  know them. A thing keeps its shape all through its world, so shapes need many worlds: some hundred.

  Args:
    truths: of the frames of the clip that each row is the state after; the rows of a world are in their order.

  Returns:
    {"place": ridge of (column, row), "column": logistic of the column, "shape": logistic of the shape}.
  """
  last = _known(truths, worlds_N)
  found: dict[str, list[Score]] = {"place": [], "column": [], "shape": []}
  for colour in range(len(THING_COLOURS)):
    rows = [(n, slot) for n, known in enumerate(last) if (slot := known.get(colour)) is not None]
    if len({worlds_N[n] for n, _ in rows}) < 5:
      continue
    at = np.array([n for n, _ in rows])
    x, worlds = np.asarray(states_ND).reshape(len(last), -1)[at], np.asarray(worlds_N)[at]
    cells = np.array([truths[n].cell_TNC[-1, slot] for n, slot in rows])
    shapes = np.array([truths[n].shape_TN[-1, slot] for n, slot in rows])
    visible = np.array([truths[n].visible_TN[-1, slot] > VISIBLE for n, slot in rows])
    found["place"].append(ridge(x, cells, worlds, visible, seed))
    found["column"].append(logistic(x, cells[:, 0], worlds, visible, seed))
    found["shape"].append(logistic(x, shapes, worlds, visible, seed))
  if not found["place"]:
    raise DataError("no colour stands in at least 5 worlds; give more walks")
  return {name: _pooled(scores) for name, scores in found.items()}


def _known(truths: Sequence[Truth], worlds_N: np.ndarray) -> list[dict[int, int]]:
  """For each row {colour: slot} of the things of the first room that were in the picture at some time so far."""
  seen: dict[int, np.ndarray] = {}
  found = []
  for truth, world in zip(truths, worlds_N, strict=True):
    now = seen.setdefault(int(world), np.zeros(OTHER, bool))
    now |= (truth.visible_TN[:, :OTHER] > VISIBLE).any(0)
    found.append({int(truth.colour_TN[-1, slot]): int(slot) for slot in np.flatnonzero(now)})
  return found


def _pooled(scores: Sequence[Score]) -> Score:
  """The mean of scores, by their rows."""

  def mean(name: str, weight: str) -> float:
    pairs = [(getattr(score, name), getattr(score, weight)) for score in scores]
    pairs = [(value, rows) for value, rows in pairs if rows and not np.isnan(value)]
    return sum(value * rows for value, rows in pairs) / sum(rows for _, rows in pairs) if pairs else float("nan")

  return Score(
    value=mean("value", "rows"),
    visible=mean("visible", "visible_rows"),
    hidden=mean("hidden", "hidden_rows"),
    chance=mean("chance", "rows"),
    hidden_chance=mean("hidden_chance", "hidden_rows"),
    rows=sum(score.rows for score in scores),
    hidden_rows=sum(score.hidden_rows for score in scores),
  )
