"""Two runs compared row by row of the validation table that they share: far finer than the losses themselves.

Every run meets the same clips, times and noises, so what a row has of those falls out of the difference. The standard
error of the mean difference is that of other clips and noises; it is not the spread between seeds, which a repeat with
another seed measures.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kling_jax.diffusion import table
from kling_jax.errors import DataError
from kling_jax.scaling.ledger import Ledger


@dataclasses.dataclass(frozen=True)
class Difference:
  """Loss of run `a` minus loss of run `b`.

  Attributes:
    a, b: the losses. stderr_a, stderr_b: of each on its own (the absolute error, of the level).
    difference, stderr: of the mean of the rows' differences (the paired error).
    rows: of the table.
  """

  a: float
  b: float
  stderr_a: float
  stderr_b: float
  difference: float
  stderr: float
  rows: int

  @property
  def relative(self) -> float:
    """The difference as a share of b's loss: the regret of a."""
    return self.difference / self.b

  @property
  def relative_stderr(self) -> float:
    return self.stderr / self.b

  def to_json(self) -> dict[str, Any]:
    """JSON-ready, with `relative` and `relative_stderr`."""
    return dataclasses.asdict(self) | {"relative": self.relative, "relative_stderr": self.relative_stderr}


def compare(a: pathlib.Path, step_a: int, b: pathlib.Path, step_b: int) -> Difference:
  """Compares two work directories, each at a step where it was validated.

  Raises:
    DataError: a table is missing, or they are not of the same rows.
  """
  rows_a, loss_a = read(a, step_a)
  rows_b, loss_b = read(b, step_b)
  for name in ("place", "sample"):
    if not np.array_equal(rows_a[name], rows_b[name]):
      raise DataError(f"{a} and {b} were validated on other rows; compare runs with one table_id")
  return difference(loss_a, loss_b, rows_a["place"], rows_a["sample"])


def difference(loss_a_R: np.ndarray, loss_b_R: np.ndarray, place_R: np.ndarray, sample_R: np.ndarray) -> Difference:
  """The same from the losses of each row; see `diffusion.table.mean` for the layout of the rows."""
  loss_a_R, loss_b_R = np.asarray(loss_a_R, np.float64), np.asarray(loss_b_R, np.float64)
  mean_a, stderr_a = table.mean(loss_a_R, place_R, sample_R)
  mean_b, stderr_b = table.mean(loss_b_R, place_R, sample_R)
  mean, stderr = table.mean(loss_a_R - loss_b_R, place_R, sample_R)
  return Difference(mean_a, mean_b, stderr_a, stderr_b, mean, stderr, loss_a_R.size)


def read(workdir: pathlib.Path, step: int) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
  """(what the rows are, loss of each row) of a validation; DataError where it is not there."""
  folder = workdir / "validation"
  try:
    with np.load(folder / "rows.npz") as rows:
      layout = {name: rows[name] for name in ("place", "sample")}
    return layout, np.load(folder / f"{step:08d}.npy")
  except (OSError, ValueError, KeyError) as error:
    raise DataError(f"{workdir} has no validation of step {step} ({error})") from error


def regrets(ledger: Ledger, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """How much worse than the tuned arm every other arm is, at each (N, T) that several arms ran.

  Args:
    records: finished runs. The runs of one size that differ in T by less than 2 % meet (batches round T).

  Returns:
    One dict a run: arm, params, tokens, lr, batch_tokens, loss, and the fields of `Difference` against the tuned run.
  """
  found = []
  for tuned in (record for record in records if "tuned" in record["arms"] and record["split"] == "holdout"):
    for other in records:
      near = other["params"] == tuned["params"] and abs(other["tokens"] / tuned["tokens"] - 1) < 0.02
      if not near or other["split"] != "holdout" or other["seed"] != tuned["seed"]:
        continue
      for arm in other["arms"]:
        if arm == "tuned" and other is not tuned:
          continue
        compared = compare(ledger.workdir(other["run"]), other["steps"], ledger.workdir(tuned["run"]), tuned["steps"])
        facts = {name: other[name] for name in ("params", "tokens", "lr", "batch_tokens", "steps", "loss")}
        found.append({"arm": arm, **facts, **compared.to_json()})
  return found
