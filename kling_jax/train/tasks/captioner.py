"""Task `captioner`: a vision tower and a language model learn to write a teacher's captions (Koala-36M, section 2)."""

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

from kling_jax import files
from kling_jax.curation.caption_local import CARD
from kling_jax.data import caption_lines, mixture, order, pipeline
from kling_jax.data.source import ClipInfo
from kling_jax.data.tokens import ByteTokenizer
from kling_jax.errors import ConfigError
from kling_jax.interop import safetensors
from kling_jax.models import language_model
from kling_jax.models.captioner import PAD, Captioner, Shape, pixels
from kling_jax.nn import params as params_lib
from kling_jax.nn.params import Params
from kling_jax.train import sharding, warm_start, workdir
from kling_jax.train.sharding import Extent
from kling_jax.train.task import Batch, Task


class CaptionerTask(Task):
  """See configs/captioner.py for the keys.

  Loss of one row: mean cross-entropy of the bytes of its caption and of the end, in nats a byte. A share of the rows is
  shown as a picture (its middle frame alone), and is told what a picture shows.
  """

  reference = "captioner"

  def __init__(self, config: ml_collections.ConfigDict):
    self.shape = shape_of(config)
    if not 0 <= config.data.stills <= 1:
      raise ConfigError(f"config key 'data.stills' = {config.data.stills}; a share, 0 to 1")
    super().__init__(config)

  def init(self, rngs: nnx.Rngs) -> Captioner:
    return Captioner(self.shape, rngs=rngs)

  def extents(self) -> list[Extent]:
    return sharding.rows(self.config.data.batch, self.config.optimizer.accumulate)

  # ---- data --------------------------------------------------------------------------------------------------------

  @functools.cached_property
  def sources(self) -> mixture.Mixture:
    return mixture.Mixture.open(self.config.data.sources, self.config.data.weights, self.config.data.memory_gib)

  def batches(self, split: str, process_index: int, process_count: int, multiple_of: int) -> "_Mixed":
    c = self.config
    batches = pipeline.Batches(
      self.sources,
      buckets=((self.shape.frames, self.shape.size, self.shape.size),),
      fps=self.shape.fps,
      batch=c.data.batch,
      seed=c.seed,
      split=split,
      validation_fraction=c.data.validation_fraction,
      tokenizer=ByteTokenizer(self.shape.max_text),
      caption=_text,
      process_index=process_index,
      process_count=process_count,
      multiple_of=multiple_of,
    )
    return _Mixed(batches, c.data.stills, c.seed)

  def validation_rows(self, process_index: int, process_count: int, multiple_of: int) -> list[Batch]:
    split = self.batches("validation", process_index, process_count, multiple_of)
    return [_kept(batch) for batch in split.batches.fixed_rows(self.config.validation.rows)]

  def step_cost(self, batch: Batch) -> tuple[int, float]:
    rows, text = batch["tokens"].shape
    patches, width = int(np.prod(self.shape.grid)), self.shape.tower_width
    tower = self.shape.tower_depth * (24.0 * patches * width**2 + 4.0 * patches**2 * width)
    language = language_model.preset(self.shape.language)
    forward = tower + language_model.forward_flops(language, self.shape.seen + text, predicted=text)
    return rows * (self.shape.seen + text), 3.0 * rows * forward

  # ---- loss --------------------------------------------------------------------------------------------------------

  def losses(self, params: Params, batch: Batch, keys_B: jax.Array, train: bool) -> tuple[jax.Array, dict[str, Any]]:
    del keys_B, train  # nothing is random in the network
    model: Captioner = params_lib.merge(self.graph, params)
    tokens_BL = batch["tokens"]
    logits_BLV = model.logits(pixels(batch["frames"]).astype(self.dtype), tokens_BL[:, :-1])
    wanted_BL = tokens_BL[:, 1:]
    counted_BL = wanted_BL != PAD
    nats_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, wanted_BL)
    count_B = jnp.sum(counted_BL, axis=1)
    right = jnp.sum((jnp.argmax(logits_BLV, -1) == wanted_BL) & counted_BL) / jnp.sum(count_B)
    return jnp.sum(jnp.where(counted_BL, nats_BL, 0), axis=1) / count_B, {"byte_accuracy": right}


class _Mixed:
  """Batches, a share of whose rows are pictures: a function of the seed, the step and the row."""

  def __init__(self, batches: pipeline.Batches, stills: float, seed: int):
    self.batches, self._stills, self._seed = batches, stills, seed

  def __getitem__(self, step: int) -> Batch:
    return self._mix(step, self.batches[step])

  def iterate(self, start_step: int, *, threads: int = 4, workers: int = 0, stop: int | None = None):
    for step, batch in self.batches.iterate(start_step, threads=threads, workers=workers, stop=stop):
      yield step, self._mix(step, batch)

  def _mix(self, step: int, batch: Batch) -> Batch:
    batch = _kept(batch)
    for row, index in enumerate(batch["index"]):
      (draw,) = order.draws(f"{self._seed}/stills/{step}", int(index), 1)
      if int(draw) / 2**64 < self._stills:
        batch = as_still(batch, row)
    return batch


def as_still(batch: Batch, row: int) -> Batch:
  """The batch with one row shown as a picture: its middle frame alone, and the caption without what moves."""
  tokenizer = ByteTokenizer(batch["tokens"].shape[1])
  frames, tokens = batch["frames"].copy(), batch["tokens"].copy()
  frames[row] = frames[row, frames.shape[1] // 2]
  tokens[row] = tokenizer([caption_lines.still_text(tokenizer.decode(tokens[row]))])[0][0]
  return batch | {"frames": frames, "tokens": tokens}


def _kept(batch: Batch) -> Batch:
  return {name: batch[name] for name in ("frames", "tokens", "index")}


def _text(info: ClipInfo) -> str:
  return caption_lines.text_of(info.parts, info.caption)


def shape_of(config: ml_collections.ConfigDict) -> Shape:
  """The sizes that a config asks for."""
  return Shape(**config.model)


def export(run: str, folder: str) -> None:
  """Writes the averaged weights of a work directory's newest checkpoint, and their sizes, for `kling caption`.

  Raises:
    WeightsError: there is no checkpoint, or it is of another model.
  """
  shape = shape_of(ml_collections.ConfigDict(workdir.read_config(pathlib.Path(run))))
  _, shapes, _ = params_lib.abstract(lambda: Captioner(shape, rngs=nnx.Rngs(params=jax.random.key(0))))
  params, report = warm_start.load(pathlib.Path(run), shapes, ())
  safetensors.write(folder, params, metadata={"step": str(report["step"])})
  files.write_json(pathlib.Path(folder) / CARD, dataclasses.asdict(shape))


TASK = CaptionerTask

if __name__ == "__main__":  # python -m kling_jax.train.tasks.captioner RUN FOLDER
  export(*sys.argv[1:])
