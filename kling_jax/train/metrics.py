"""Where numbers of a run go: metrics.jsonl always, the console, TensorBoard and W&B on request."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

from kling_jax import files
from kling_jax.errors import UsageError

Row = Mapping[str, float | int | str]


class Writer(Protocol):
  """Takes one row of named values a step."""

  def write(self, step: int, row: Row) -> None: ...

  def close(self) -> None: ...


class JsonLines:
  """Appends rows to metrics.jsonl, one object a line, flushed at once."""

  def __init__(self, path: pathlib.Path, resume_step: int):
    """Opens `path`; lines beyond `resume_step`, and a line torn by a kill, are cut first."""
    rows = [row for row in read(path) if int(row["step"]) <= resume_step]
    files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    self._file = path.open("a", encoding="utf-8")

  def write(self, step: int, row: Row) -> None:
    self._file.write(json.dumps({"step": step, **row}) + "\n")
    self._file.flush()

  def close(self) -> None:
    os.fsync(self._file.fileno())
    self._file.close()


class TensorBoard:
  """Scalars as TensorBoard events, through tensorboardX (no TensorFlow)."""

  def __init__(self, folder: pathlib.Path):
    try:
      import tensorboardX
    except ImportError as error:
      raise UsageError("config key 'log.tensorboard' needs tensorboardX: pip install tensorboardX") from error
    self._writer = tensorboardX.SummaryWriter(str(folder))

  def write(self, step: int, row: Row) -> None:
    for name, value in row.items():
      if not isinstance(value, str):
        self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    self._writer.close()


class WandB:
  """Rows to Weights & Biases."""

  def __init__(self, project: str, folder: pathlib.Path, config: Mapping[str, object]):
    try:
      import wandb
    except ImportError as error:
      raise UsageError("config key 'log.wandb' needs wandb: pip install wandb") from error
    self._run = wandb.init(project=project, dir=str(folder), config=dict(config), resume="allow", id=folder.name)

  def write(self, step: int, row: Row) -> None:
    self._run.log(dict(row), step=step)

  def close(self) -> None:
    self._run.finish()


class Fan:
  """Writes each row to several writers."""

  def __init__(self, writers: Sequence[Writer]):
    self._writers = list(writers)

  def write(self, step: int, row: Row) -> None:
    for writer in self._writers:
      writer.write(step, row)

  def close(self) -> None:
    for writer in self._writers:
      writer.close()


def read(path: str | os.PathLike[str]) -> list[dict]:
  """The rows of a metrics.jsonl in order; a last line that a kill tore is left out, [] where there is no file."""
  path = pathlib.Path(path)
  if not path.exists():
    return []
  rows = []
  lines = path.read_text(encoding="utf-8").split("\n")
  for number, line in enumerate(lines):
    if not line:
      continue
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      if any(lines[number + 1 :]):
        raise
  return rows
