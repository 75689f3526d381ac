"""The validation loss: EMA weights on a fixed table of (sample, time, noise), with its standard error.

Rows are the same in every run with the same data, whatever its seed, so that two runs are compared row by row (common
random numbers; `scaling/paired.py`): `validation/rows.npz` says what the rows are, `validation/<step>.npy` holds their
losses.
"""

import hashlib
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kling_jax import files
from kling_jax.data import encode, grid
from kling_jax.diffusion import table
from kling_jax.diffusion import time as time_lib
from kling_jax.errors import ConfigError
from kling_jax.train import sharding
from kling_jax.train.state import State, Update
from kling_jax.train.task import Batch, Task, digests

TIMES = 8  # parts of the diffusion times whose losses are told apart


class Table:
  """The rows, loaded once; each row's number fixes its time and noise, so that losses of one table_id compare."""

  def __init__(self, job: Task, mesh: Mesh, multiple_of: int):
    if job.config.validation.samples and jax.process_count() > 1:
      raise ConfigError(
        "config key 'validation.samples' needs a run of one process; set it to 0 and run `kling sample` on a checkpoint"
      )
    self.job = job
    self.mesh = mesh
    self.rows = job.validation_rows(*sharding.data_part(mesh), multiple_of)
    self.table_id = job.table_id(self._all([digests(batch) for batch in self.rows]))

    self._layout: dict[str, np.ndarray] | None = None

  def evaluate(self, update: Update, state: State, step: int, folder: pathlib.Path) -> dict[str, Any]:
    """Mean loss of the table, its standard error, and the table's id; writes the rows' losses below `folder`.

    Of diffusion tasks also `val_loss_at_Q`: the mean over rows whose time lies in an eighth of the training
    distribution, Q the middle of the eighth as a quantile (0: the earliest times, hardly any noise).
    """
    params = update.averaged(state)
    parts = [update.evaluate(params, sharding.put_batch(update.mesh, batch)) for batch in self.rows]
    loss_R = np.concatenate([np.asarray(part) for part in parts])
    layout = self.layout()
    if jax.process_index() == 0:
      if not (folder / "validation" / "rows.npz").exists():
        with files.whole(folder / "validation" / "rows.npz") as path:
          np.savez(path, place=layout["place"], sample=layout["sample"])
      with files.whole(folder / "validation" / f"{step:08d}.npy") as path:
        np.save(path, loss_R)
    mean, stderr = table.mean(loss_R, layout["place"], layout["sample"])
    at = by_time(loss_R, layout["place"]) if "diffusion" in self.job.config else {}
    return {"val_loss": mean, "val_stderr": stderr, "table_id": self.table_id} | at

  def layout(self) -> dict[str, np.ndarray]:
    """What the rows are: `place` of their times in (0, 1), and `sample`, a hash that rows of one clip share."""
    if self._layout is None:
      index_R = self._all([batch["index"] for batch in self.rows])
      sample_R = self._all([_samples(batch) for batch in self.rows])
      self._layout = {"place": np.asarray(time_lib.place(index_R)), "sample": sample_R}
    return self._layout

  def _all(self, parts: list[np.ndarray]) -> np.ndarray:
    """The values of all processes' rows, in the order in which their losses come."""
    if jax.process_count() > 1:
      everywhere = NamedSharding(self.mesh, P())
      whole = jax.jit(lambda x: x, out_shardings=everywhere)
      parts = [np.asarray(whole(sharding.put_batch(self.mesh, {"rows": part})["rows"])) for part in parts]
    return np.concatenate(parts) if parts else np.zeros((0, 16), np.uint8)

  def sample(self, update: Update, state: State, step: int, folder: pathlib.Path) -> pathlib.Path | None:
    """Writes `samples/<step>.mp4` and `.png` under the conditions of the first rows, where the config asks for it.

    Returns:
      The video, or None where nothing is sampled.
    """
    wanted = self.job.config.validation.samples
    if not wanted:
      return None
    batch = {name: value[:wanted] for name, value in self.rows[0].items()}
    frames = self.job.samples(update.averaged(state), batch, jax.random.key(self.job.config.seed))
    if frames is None:
      return None
    path = folder / "samples" / f"{step:08d}.mp4"
    encode.write(path, grid.grid(frames), fps=self.job.config.data.fps)
    grid.write_png(path.with_suffix(".png"), grid.contact_sheet(frames))
    return path


def by_time(loss_R: np.ndarray, place_R: np.ndarray, parts: int = TIMES) -> dict[str, float]:
  """{"val_loss_at_Q": mean loss of the rows whose place in (0, 1) lies in one of `parts` equal parts, middle Q}."""
  part_R = np.minimum((place_R * parts).astype(int), parts - 1)
  found = {}
  for part in np.unique(part_R):
    found[f"val_loss_at_{(part + 0.5) / parts:.4g}"] = float(loss_R[part_R == part].mean(dtype=np.float64))
  return found


def _samples(batch: Batch) -> np.ndarray:
  """A hash of each row's clip, uint32 (B,): of all that the batch says of it except the row's number."""
  columns = [np.ascontiguousarray(batch[name]) for name in sorted(batch) if name != "index"]
  hashes = [
    hashlib.blake2b(b"".join(cell.tobytes() for cell in row), digest_size=4) for row in zip(*columns, strict=True)
  ]
  return np.array([int.from_bytes(digest.digest(), "little") for digest in hashes], np.uint32)
