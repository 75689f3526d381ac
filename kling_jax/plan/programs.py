"""The programs of a run, traced for a topology without an array: train step, sampler, rollout step."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kling_jax.errors import UsageError, nearest
from kling_jax.models import owl as owl_lib
from kling_jax.nn import lowering, rng
from kling_jax.train import attention, sharding
from kling_jax.train.state import Update
from kling_jax.train.task import Task
from kling_jax.train.tasks.owl import OwlTask
from kling_jax.train.tasks.video_dit import VideoDiTTask
from kling_jax.world.rollout import Action


@dataclasses.dataclass(frozen=True)
class Traced:
  """One program, lowered and not yet compiled.

  Attributes:
    name: "train", "sample" or "rollout".
    lowered: `compile` of it is what takes time.
    arguments: {kind: bytes on a device} of what it is given.
    flops: exact FLOPs of the network over all devices, without what the backward pass computes again; None where the
      task does not count them for this program.
    lower_s: seconds that tracing took.
  """

  name: str
  lowered: Any
  arguments: dict[str, int]
  flops: float | None
  lower_s: float


def names(job: Task) -> tuple[str, ...]:
  """The programs that a task has."""
  if isinstance(job, VideoDiTTask):
    return "train", "sample"
  return ("train", "rollout") if isinstance(job, OwlTask) and job.config.stage != "align" else ("train",)


def trace(name: str, job: Task, mesh: Mesh, generation: str) -> Traced:
  """Lowers a program of `job` for the devices of `mesh`.

  Raises:
    ConfigError, MeshError: a config that no mesh runs, or not this one.
    UsageError: the task has no such program.
  """
  if name not in names(job):
    raise UsageError(f"task {job.config.task!r} has no program {name!r}{nearest(name, names(job))}")
  began = time.perf_counter()
  with lowering.target("tpu", generation):
    lowered, arguments, flops = _PROGRAMS[name](job, mesh)
  return Traced(name, lowered, arguments, flops, time.perf_counter() - began)


def largest_bucket(job: Task) -> int:
  """The bucket whose step costs most."""
  count = len(job.config.data.get("buckets", ())) or 1
  return max(range(count), key=lambda bucket: job.step_cost(job.batch_spec(bucket))[1])


def bytes_on_device(tree: Any, shardings: Any) -> int:
  """Bytes that a tree of shapes takes on one device; without what the chip's tiles add."""
  sizes = jax.tree.map(
    lambda leaf, where: _size(where.shard_shape(leaf.shape), leaf.dtype) if where.memory_kind != "pinned_host" else 0,
    tree,
    shardings,
  )
  return sum(jax.tree.leaves(sizes))


def _size(shape: tuple[int, ...], dtype: Any) -> int:
  itemsize = 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize
  return functools.reduce(lambda a, b: a * b, shape, itemsize)


# ---- one function a program ------------------------------------------------------------------------------------------


def _train(job: Task, mesh: Mesh) -> tuple[Any, dict[str, int], float]:
  update = Update(job, mesh)
  batch = job.batch_spec(largest_bucket(job))
  lowered = update.program.lower(update.abstract, batch, jax.ShapeDtypeStruct((), jnp.float32))
  rows = sharding.batch_sharding(mesh)
  kinds = {"params": "params", "ema": "ema", "opt": "optimiser"}
  arguments = {kinds[key]: bytes_on_device(update.abstract[key], update.shardings[key]) for key in kinds}
  arguments["batch"] = bytes_on_device(batch, dict.fromkeys(batch, rows))
  return lowered, arguments, job.step_cost(batch)[1]


def _sample(job: Task, mesh: Mesh) -> tuple[Any, dict[str, int], None]:
  """One row for each part that a batch is cut into, at the size of the largest bucket."""
  assert isinstance(job, VideoDiTTask)
  rows = sharding.batch_ways(mesh)
  batch = _rows(job.batch_spec(), rows, ("frames", "latents"))
  recipe = job.recipe(*job.config.data.buckets[largest_bucket(job)])
  return *_pure(job, mesh, job.sampler(recipe), job.shapes, batch, _keys(rows)), None


def _rollout(job: Task, mesh: Mesh) -> tuple[Any, dict[str, int], None]:
  """One world for each part that a batch is cut into; the step to its next clip."""
  assert isinstance(job, OwlTask)
  rows = sharding.batch_ways(mesh)
  world, length = job.world(job.camera()), job.layout.dynamics
  params = jax.eval_shape(owl_lib.adapted, job.shapes)
  spec = _rows(job.batch_spec(), rows, ())
  fps = jax.ShapeDtypeStruct((rows,), jnp.float32)
  state = jax.eval_shape(world.begin, params, spec["image"], spec["prompt"], spec["prompt_mask"], fps, _keys(rows))
  array: Any = lambda *shape, dtype: jax.ShapeDtypeStruct((rows, *shape), dtype)
  action = Action(array(length, dtype=jnp.int32), array(length, dtype=jnp.bool), array(dtype=jnp.bool),
                  array(dtype=jnp.bool))  # fmt: skip
  return *_pure(job, mesh, jax.jit(world.step), params, state, action), None


def _pure(job: Task, mesh: Mesh, run: Callable[..., Any], params: Any, *given: Any) -> tuple[Any, dict[str, int]]:
  """Lowers a function of parameters and of values whose rows are cut over the mesh."""
  stored = sharding.parameter_shardings(mesh, job.shapes, job.axes)
  whole = NamedSharding(mesh, P())
  rows = sharding.batch_sharding(mesh)

  def place(path: tuple[Any, ...], leaf: Any) -> Any:
    axis = _row_axis(path, leaf)
    spec = P() if axis is None else P(*[None] * axis, rows.spec[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

  placed = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=stored.get(name, whole))
    for name, leaf in params.items()
  }
  values = jax.tree_util.tree_map_with_path(place, given)

  def traced(params: Any, *values: Any) -> Any:
    with sharding.activations(mesh, choice=attention.Choice.of(job.config)):
      return run(params, *values)

  where = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)
  arguments = {"params": bytes_on_device(placed, where(placed)), "batch": bytes_on_device(values, where(values))}
  return jax.jit(traced).lower(placed, *values), arguments


def _row_axis(path: tuple[Any, ...], leaf: Any) -> int | None:
  """Which axis holds the rows: that of the B in an array's name (`k_SBLKE`), the first of an array without letters."""
  name = str(getattr(path[-1], "name", "")) if path else ""
  letters = name.rpartition("_")[2] if "_" in name else ""
  if "B" in letters:
    return letters.index("B")
  return 0 if leaf.ndim else None


def _rows(spec: dict[str, Any], rows: int, without: tuple[str, ...]) -> dict[str, Any]:
  """The batch with another number of rows."""
  return {
    name: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)
    for name, leaf in spec.items()
    if name not in without
  }


def _keys(rows: int) -> Any:
  return jax.eval_shape(lambda: rng.sample_keys(jax.random.key(0), 0, jnp.arange(rows)))


_PROGRAMS: dict[str, Callable[..., Any]] = {"train": _train, "sample": _sample, "rollout": _rollout}
