"""Task `shot_net`: the splitter's network learns where edited films have transitions."""

import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kling_jax.data import edited
from kling_jax.interop import safetensors
from kling_jax.models import shot_net
from kling_jax.models.shot_module import ShotNet
from kling_jax.nn import params as params_lib
from kling_jax.nn.params import Params
from kling_jax.train import warm_start
from kling_jax.train.task import Batch, Task

MIDDLE_FACTOR = 4.0  # a middle weighs five times a step that is none: there is one in forty


class ShotNetTask(Task):
  """See configs/shot_net.py for the keys.

  Loss of one film, means over its steps: BCE(inside) + middle * weighted BCE(middle) + kind * CE(kind), the last one
  over the steps within transitions.
  """

  reference = "shot_net"

  def init(self, rngs: nnx.Rngs) -> ShotNet:
    return ShotNet(rngs=rngs)

  @functools.cached_property
  def films(self) -> edited.Films:
    c = self.config.data
    return edited.Films(c.footage, c.films, c.frames, self.config.seed, c.scenes)

  def batches(self, split: str, process_index: int, process_count: int, multiple_of: int) -> "_Looked":
    place = {"process_index": process_index, "process_count": process_count, "multiple_of": multiple_of}
    return _Looked(edited.Batches(self.films, self.config.data.batch, self.config.seed, **place))

  def step_cost(self, batch: Batch) -> tuple[int, float]:
    rows, frames, _ = batch["thumbnails"].shape
    grid = shot_net.ROWS * shot_net.COLUMNS
    products = {
      name: inputs * outputs * (grid if name.startswith("cells") or name == "describe.in" else 1)
      for name, (inputs, outputs) in shot_net.layers().items()
    }
    return rows * frames, 6.0 * rows * frames * sum(products.values())

  def losses(self, params: Params, batch: Batch, keys_B: jax.Array, train: bool) -> tuple[jax.Array, dict[str, Any]]:
    del keys_B, train  # nothing is random in the network
    model: ShotNet = params_lib.merge(self.graph, params)
    logits_BTC = model(batch["thumbnails"], batch["histograms"])
    c = self.config.loss
    inside = optax.sigmoid_binary_cross_entropy(logits_BTC[..., 0], batch["inside"])
    middle = optax.sigmoid_binary_cross_entropy(logits_BTC[..., 1], batch["middle"])
    middle = middle * (1 + MIDDLE_FACTOR * batch["middle"])
    known = batch["kind"] >= 0
    kind = optax.softmax_cross_entropy_with_integer_labels(logits_BTC[..., 2:], jnp.maximum(batch["kind"], 0))
    kind_B = jnp.sum(jnp.where(known, kind, 0), 1) / jnp.maximum(jnp.sum(known, 1), 1)
    loss_B = jnp.mean(inside, 1) + c.middle * jnp.mean(middle, 1) + c.kind * kind_B
    right = jnp.sum((jnp.argmax(logits_BTC[..., 2:], -1) == batch["kind"]) & known) / jnp.maximum(jnp.sum(known), 1)
    return loss_B, {"inside": jnp.mean(inside), "middle": jnp.mean(middle), "kind_accuracy": right}


class _Looked:
  """Batches with the histograms that the network wants beside the thumbnails."""

  def __init__(self, batches: edited.Batches):
    self._batches = batches

  def __getitem__(self, step: int) -> Batch:
    return _looked(self._batches[step])

  def iterate(self, start_step: int, *, threads: int = 4, workers: int = 0, stop: int | None = None):
    for step, batch in self._batches.iterate(start_step, threads=threads, workers=workers, stop=stop):
      yield step, _looked(batch)


def _looked(batch: Batch) -> Batch:
  return batch | {"histograms": np.stack([shot_net.histograms(shown) for shown in batch["thumbnails"]])}


def export(run: str, folder: str) -> None:
  """Writes the weights of a work directory's newest checkpoint as kling_jax/assets/shot_net holds them.

  Raises:
    WeightsError: there is no checkpoint, or it is of another model.
  """
  _, shapes, _ = params_lib.abstract(lambda: ShotNet(rngs=nnx.Rngs(params=jax.random.key(0))))
  params, report = warm_start.load(pathlib.Path(run), shapes, ())
  safetensors.write(folder, params, metadata={"step": str(report["step"])})


TASK = ShotNetTask

if __name__ == "__main__":  # python -m kling_jax.train.tasks.shot_net RUN FOLDER
  export(*sys.argv[1:])
