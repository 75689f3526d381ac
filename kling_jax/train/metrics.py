"""Where numbers of a run go: metrics.jsonl always, the console, TensorBoard and W&B on request."""

import io
import json
import os
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import av
import numpy as np

from kling_jax import files
from kling_jax.data import decode
from kling_jax.errors import UsageError

Row = Mapping[str, float | int | str]
Histograms = Mapping[str, tuple[np.ndarray, np.ndarray]]  # {name: (counts (N,), edges (N + 1,))}


class Writer(Protocol):
  """Takes one row of named values a step; trackers also take histograms and videos."""

  def write(self, step: int, row: Row) -> None: ...

  def histograms(self, step: int, values: Histograms) -> None: ...

  def video(self, step: int, name: str, path: pathlib.Path) -> None: ...

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

  def histograms(self, step: int, values: Histograms) -> None:
    """Left to trackers: a line of metrics.jsonl holds figures."""

  def video(self, step: int, name: str, path: pathlib.Path) -> None:
    """Left to trackers: the file stands in the work directory."""

  def close(self) -> None:
    os.fsync(self._file.fileno())
    self._file.close()


class TensorBoard:
  """Figures, histograms and videos (as moving GIFs) as TensorBoard events, through tensorboardX (no TensorFlow)."""

  def __init__(self, folder: pathlib.Path, resume_step: int):
    try:
      import tensorboardX
    except ImportError as error:
      raise UsageError("config key 'log.tensorboard' needs the extra track: pip install 'kling_jax[track]'") from error
    # TensorBoard hides what an earlier start wrote at this step and later.
    self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

  def write(self, step: int, row: Row) -> None:
    for name, value in row.items():
      if not isinstance(value, str):
        self._writer.add_scalar(name, value, step)

  def histograms(self, step: int, values: Histograms) -> None:
    for name, (counts, edges) in values.items():
      middles = (edges[1:] + edges[:-1]) / 2
      self._writer.add_histogram_raw(
        name, min=float(edges[0]), max=float(edges[-1]), num=float(counts.sum()), sum=float(counts @ middles),
        sum_squares=float(counts @ middles**2), bucket_limits=edges[1:].tolist(), bucket_counts=counts.tolist(),
        global_step=step,
      )  # fmt: skip

  def video(self, step: int, name: str, path: pathlib.Path) -> None:
    from tensorboardX.proto import summary_pb2

    frames = [frame for _, _, frame in decode.iterate(path)]
    height, width = frames[0].shape[:2]
    moving = gif(frames, decode.probe(path).fps)
    image = summary_pb2.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=moving)
    value = summary_pb2.Summary.Value(tag=name, image=image)
    self._writer.file_writer.add_summary(summary_pb2.Summary(value=[value]), step)

  def close(self) -> None:
    self._writer.close()


class WandB:
  """Figures, histograms and videos to Weights & Biases; with WANDB_MODE=offline into the work directory alone.

  The run's id is drawn at the first start and kept in `wandb.json`, so that a resumed run goes on in the same place,
  and that two work directories of one name are two runs.
  """

  def __init__(self, project: str, folder: pathlib.Path, config: Mapping[str, object]):
    try:
      import wandb
    except ImportError as error:
      raise UsageError("config key 'log.wandb' needs the extra track: pip install 'kling_jax[track]'") from error
    kept = folder / "wandb.json"
    if not kept.exists():
      files.write_json(kept, {"id": uuid.uuid4().hex[:12], "project": project})
    self._wandb: Any = wandb
    # Rows come one step late and videos do not: with a step of its own W&B would drop what comes behind.
    self._run: Any = wandb.init(
      project=project, dir=str(folder), config=dict(config), resume="allow", name=folder.name,
      id=json.loads(kept.read_text(encoding="utf-8"))["id"],
    )  # fmt: skip
    self._run.define_metric("*", step_metric="step")

  def write(self, step: int, row: Row) -> None:
    self._run.log({"step": step, **row})

  def histograms(self, step: int, values: Histograms) -> None:
    shown = {name: self._wandb.Histogram(np_histogram=histogram) for name, histogram in values.items()}
    self._run.log({"step": step, **shown})

  def video(self, step: int, name: str, path: pathlib.Path) -> None:
    self._run.log({"step": step, name: self._wandb.Video(str(path), format="mp4")})

  def close(self) -> None:
    self._run.finish()


class Fan:
  """Writes each row to several writers."""

  def __init__(self, writers: Sequence[Writer]):
    self._writers = list(writers)

  def write(self, step: int, row: Row) -> None:
    for writer in self._writers:
      writer.write(step, row)

  def histograms(self, step: int, values: Histograms) -> None:
    for writer in self._writers:
      writer.histograms(step, values)

  def video(self, step: int, name: str, path: pathlib.Path) -> None:
    for writer in self._writers:
      writer.video(step, name, path)

  def close(self) -> None:
    for writer in self._writers:
      writer.close()


def gif(frames: Sequence[np.ndarray], fps: float) -> bytes:
  """Frames uint8 (H, W, 3) as a moving GIF of 256 colours, which TensorBoard plays."""
  file = io.BytesIO()
  with av.open(file, "w", format="gif") as container:
    stream = container.add_stream("gif", rate=max(1, round(fps)))
    stream.height, stream.width = frames[0].shape[:2]
    stream.pix_fmt = "rgb8"
    for frame in frames:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="rgb8")))
    container.mux(stream.encode(None))
  return file.getvalue()


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
