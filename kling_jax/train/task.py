"""A task is all that differs between the models that the one trainer trains."""

import abc
import hashlib
import importlib
import json
import pkgutil
from collections.abc import Generator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from kling_jax import config as config_lib
from kling_jax.errors import ConfigError, nearest
from kling_jax.nn import params as params_lib
from kling_jax.nn.params import Params
from kling_jax.train.sharding import Extent
from kling_jax.train.warm_start import Pretrained

Batch = dict[str, Any]
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Batches(Protocol):
  """Random access to the batches of a run: `batches[step]` is a pure function of data set, seed and step."""

  def __getitem__(self, step: int) -> Batch: ...

  def iterate(
    self, start_step: int, *, threads: int = 4, workers: int = 0, stop: int | None = None
  ) -> Generator[tuple[int, Batch], None, None]:
    """Yields (step, batch) in order, prefetched; closing the generator ends its threads and workers."""
    ...


class Task(abc.ABC):
  """One kind of training, configured by a ConfigDict.

  Attributes:
    config: the checked config.
    graph, shapes, axes: the model's graph definition, {path: ShapeDtypeStruct} and {path: logical axis names}.
    dtype: compute dtype.
  """

  reference: str  # the packaged config whose keys and types are the schema of this task

  def __init__(self, config: ml_collections.ConfigDict):
    self.config = config
    if config.precision not in PRECISIONS:
      raise ConfigError(
        f"config key 'precision' = {config.precision!r} is unknown{nearest(config.precision, PRECISIONS)}"
      )
    self.dtype = PRECISIONS[config.precision]
    self.graph, self.shapes, self.axes = params_lib.abstract(lambda: self.init(nnx.Rngs(params=jax.random.key(0))))

  @abc.abstractmethod
  def init(self, rngs: nnx.Rngs) -> nnx.Module:
    """Builds the model; also called under `nnx.eval_shape`, so it must not read files."""

  @abc.abstractmethod
  def batches(self, split: str, process_index: int, process_count: int, multiple_of: int) -> Batches:
    """The rows of this process.

    Args:
      split: "train" or "validation".
      multiple_of: the global batch must be a multiple of this (mesh ways x accumulation).

    Raises:
      ConfigError: the batch does not divide; names the legal sizes.
    """

  def batch_spec(self, bucket: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a *global* training batch, without data; what `kling plan` compiles for.

    Args:
      bucket: which of `data.buckets`, for tasks that have several.

    Raises:
      ConfigError: this task has none.
    """
    raise ConfigError(f"task {self.config.task!r} has no batch_spec, so its step cannot be planned")

  @abc.abstractmethod
  def losses(self, params: Params, batch: Batch, keys_B: jax.Array, train: bool) -> tuple[jax.Array, dict[str, Any]]:
    """Per-sample losses (B,) and a dict of scalar metrics; random only through `keys_B` (one typed key a sample).

    With `train` off nothing is dropped: the value is the validation loss of each row.
    """

  def loss(self, params: Params, batch: Batch, keys_B: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """The training loss: mean of `losses` over the rows."""
    loss_B, metrics = self.losses(params, batch, keys_B, train=True)
    return jnp.mean(loss_B), metrics

  def trainable(self, path: str) -> bool:
    """Whether the parameter at `path` is trained; frozen ones get neither gradient nor optimiser state."""
    del path
    return True

  def lr_scale(self, path: str) -> float:
    """Learning-rate multiplier of the parameter at `path`."""
    del path
    return 1.0

  def pretrained(self) -> Mapping[str, str | Pretrained]:
    """{path prefix: work directory or safetensors folder} of parts whose weights are loaded before step 0."""
    return {}

  @abc.abstractmethod
  def step_cost(self, batch: Batch) -> tuple[int, float]:
    """(tokens, model FLOPs) of one update on the *global* batch of which `batch` has the shapes."""

  def validation_rows(self, process_index: int, process_count: int, multiple_of: int) -> list[Batch]:
    """The fixed validation table: this process's part of batches of equal size, `index` counting all rows.

    [] where the set has no validation part.
    """
    del process_index, process_count, multiple_of
    return []

  def table_id(self, digests_R: np.ndarray) -> str:
    """Hash of the validation table by its rows' `digests`, in any order: equal ids mean comparable losses."""
    rows = b"".join(sorted(bytes(row) for row in digests_R))
    return hashlib.sha256(json.dumps(self.config.task).encode() + rows).hexdigest()[:12]

  def extents(self) -> list[Extent]:
    """Sizes of activations that a mesh must divide, for every bucket of the data; rows are those of a micro-batch."""
    return []

  def samples(self, params: Params, batch: Batch, key: jax.Array) -> np.ndarray | None:
    """Videos (B, T, H, W, 3) uint8 drawn under the conditions of `batch`; None where the task generates nothing."""
    del params, batch, key
    return None

  def constants(self) -> dict[str, Any]:
    """JSON-ready values that belong to the weights and travel in every checkpoint (condition percentiles, ...)."""
    return {}


def digests(batch: Batch) -> np.ndarray:
  """A hash of each row of a batch, uint8 (B, 16), its number included."""
  columns = [np.ascontiguousarray(batch[name]) for name in sorted(batch)]
  rows = [b"".join(cell.tobytes() for cell in row) for row in zip(*columns, strict=True)]
  return np.stack([np.frombuffer(hashlib.blake2b(row, digest_size=16).digest(), np.uint8) for row in rows])


def names() -> list[str]:
  """The tasks that exist."""
  import kling_jax.train.tasks as package

  return [module.name for module in pkgutil.iter_modules(package.__path__)]


def make(config: ml_collections.ConfigDict) -> Task:
  """Builds the task that `config.task` names, after checking every key of the config.

  Raises:
    ConfigError: unknown task, key or type.
  """
  name = config.get("task", "")
  if name not in names():
    raise ConfigError(f"config key 'task' = {name!r} is unknown{nearest(name, names())}")
  module = importlib.import_module(f"kling_jax.train.tasks.{name}")
  config_lib.check(config, config_lib.reference(module.TASK.reference))
  return module.TASK(config)
