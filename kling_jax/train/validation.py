"""The validation loss: EMA weights on a fixed table of (sample, time, noise), with its standard error."""

import math
import pathlib
from typing import Any

import jax
import numpy as np

from kling_jax.data import encode, grid
from kling_jax.errors import ConfigError
from kling_jax.train import sharding
from kling_jax.train.state import State, Update
from kling_jax.train.task import Task


class Table:
  """The rows, loaded once; each row's number fixes its time and noise, so that losses of one table_id compare."""

  def __init__(self, job: Task, multiple_of: int):
    if job.config.validation.samples and jax.process_count() > 1:
      raise ConfigError(
        "config key 'validation.samples' needs a run of one process; set it to 0 and run `kling sample` on a checkpoint"
      )
    self.job = job
    self.rows = job.validation_rows(jax.process_index(), jax.process_count(), multiple_of)
    self.table_id = job.table_id(self.rows)

  def evaluate(self, update: Update, state: State) -> dict[str, Any]:
    """Mean loss of the table, its standard error over rows, and the table's id."""
    params = update.averaged(state)
    parts = [update.evaluate(params, sharding.put_batch(update.mesh, batch)) for batch in self.rows]
    loss = np.concatenate([np.asarray(part) for part in parts])
    stderr = float(loss.std(ddof=1) / math.sqrt(loss.size)) if loss.size > 1 else math.nan
    return {"val_loss": float(loss.mean()), "val_stderr": stderr, "table_id": self.table_id}

  def sample(self, update: Update, state: State, step: int, folder: pathlib.Path) -> None:
    """Writes `samples/<step>.mp4` and `.png` under the conditions of the first rows, where the config asks for it."""
    wanted = self.job.config.validation.samples
    if not wanted:
      return
    batch = {name: value[:wanted] for name, value in self.rows[0].items()}
    frames = self.job.samples(update.averaged(state), batch, jax.random.key(self.job.config.seed))
    if frames is not None:
      path = folder / "samples" / f"{step:08d}.mp4"
      encode.write(path, grid.grid(frames), fps=self.job.config.data.fps)
      grid.write_png(path.with_suffix(".png"), grid.contact_sheet(frames))
