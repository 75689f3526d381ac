"""Where arrays live: one mesh, one table from logical axis names to mesh axes."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kling_jax.errors import MeshError
from kling_jax.nn import partition

AXES = ("replica", "fsdp", "context", "tensor")

# Samples spread over replica and fsdp, tokens over context, heads and MLP columns over tensor, and the width of
# every parameter over fsdp (gathered layer by layer). Names that are absent here are replicated.
PARAMETERS: Mapping[str, str] = {
  "embed": "fsdp",
  "conv_out": "fsdp",
  "mlp": "tensor",
  "heads": "tensor",
  "vocab": "tensor",
}
ACTIVATIONS: Mapping[str, Any] = {
  "batch": ("replica", "fsdp"),
  "tokens": "context",
  "heads": "tensor",
  "mlp": "tensor",
}


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
  """Builds the (replica, fsdp, context, tensor) mesh; one size may be -1 and takes the devices that are left.

  Raises:
    MeshError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  shape = [int(sizes[name]) for name in AXES]
  if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
    raise MeshError(f"mesh {dict(zip(AXES, shape, strict=True))}: sizes are positive, at most one is -1")
  fixed = math.prod(size for size in shape if size > 0)
  if -1 in shape:
    if len(devices) % fixed:
      raise MeshError(f"mesh {dict(zip(AXES, shape, strict=True))}: {fixed} does not divide {len(devices)} devices")
    shape[shape.index(-1)] = len(devices) // fixed
  if math.prod(shape) != len(devices):
    raise MeshError(
      f"mesh {dict(zip(AXES, shape, strict=True))} needs {math.prod(shape)} devices, there are {len(devices)}; "
      "set one axis to -1 to take what is left"
    )
  # Auto axes: jax.make_mesh would make Explicit ones, under which sharded parameters refuse ordinary einsums.
  return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def parameter_shardings(
  mesh: Mesh, shapes: Mapping[str, Any], axes: Mapping[str, tuple[str | None, ...]]
) -> dict[str, NamedSharding]:
  """The sharding of each parameter by its logical axis names.

  A mesh axis is used once per parameter (the first logical name that asks for it wins).

  Raises:
    MeshError: a dimension is not divisible by its mesh axis; names the parameter and the legal sizes.
  """
  shardings = {}
  for name, logical in axes.items():
    spec: list[str | None] = []
    for size, axis in zip(shapes[name].shape, logical, strict=True):
      target = PARAMETERS.get(axis) if axis else None
      if target is None or target in spec or mesh.shape[target] == 1:
        spec.append(None)
        continue
      if size % mesh.shape[target]:
        legal = [n for n in range(1, size + 1) if size % n == 0 and n <= mesh.size]
        raise MeshError(
          f"mesh axis {target}={mesh.shape[target]} does not divide {name} (axis {axis!r} of size {size}); "
          f"legal sizes here: {', '.join(map(str, legal))}"
        )
      spec.append(target)
    shardings[name] = NamedSharding(mesh, P(*spec))
  return shardings


def like_parameters(mesh: Mesh, tree: Any, shardings: Mapping[str, NamedSharding]) -> Any:
  """Shardings of a tree of flat parameter dicts (optimiser state, EMA): by parameter name, else replicated."""

  def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    name = next((str(key.key) for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), "")
    return shardings[name] if name in shardings and leaf.ndim else NamedSharding(mesh, P())

  return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch over replica and fsdp."""
  return NamedSharding(mesh, P(ACTIVATIONS["batch"]))


def batch_ways(mesh: Mesh) -> int:
  """Into how many parts the rows of a batch are cut; every micro-batch must be a multiple of it."""
  return mesh.shape["replica"] * mesh.shape["fsdp"]


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Moves the rows of this process onto its devices as one global array per key."""
  sharding = batch_sharding(mesh)
  return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


@contextlib.contextmanager
def activations(mesh: Mesh) -> Iterator[None]:
  """While tracing: the models' named activations are laid out by `ACTIVATIONS`.

  A dimension that its mesh axis does not divide stays as XLA has it (a text of 77 tokens under context = 2).
  """

  def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    spec = []
    for size, name in zip(x.shape, names, strict=True):
      target = ACTIVATIONS.get(name) if name else None
      ways = math.prod(mesh.shape[axis] for axis in ((target,) if isinstance(target, str) else target or ()))
      spec.append(target if ways > 1 and size % ways == 0 else None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

  with partition.placing(constrain):
    yield
