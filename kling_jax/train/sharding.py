"""Where arrays live: one mesh, one table from logical axis names to mesh axes, and what the mesh must divide."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from kling_jax.errors import MeshError
from kling_jax.nn import partition, weights
from kling_jax.train import attention

HOST_MEMORY = "pinned_host"
AXES = ("replica", "fsdp", "context", "tensor")  # from the slowest network to the fastest


class Rule(NamedTuple):
  """Which mesh axes cut a dimension of one logical name: of a parameter where it is stored, and of an activation."""

  parameter: str | None
  activation: tuple[str, ...]


# The one table. Samples spread over replica and fsdp, tokens over context, heads and MLP columns over tensor. Kernels
# are cut along the model's width over fsdp, and gathered where they are used. Names that are absent are whole on every
# device: text tokens (every part of a video asks all of its text) with the heads and columns of their small encoder,
# modulation, convolution channels.
RULES: Mapping[str, Rule] = {
  "batch": Rule(None, ("replica", "fsdp")),
  "tokens": Rule(None, ("context",)),
  "embed": Rule("fsdp", ()),
  "heads": Rule("tensor", ("tensor",)),
  "mlp": Rule("tensor", ("tensor",)),
}
_WHOLE = Rule(None, ())


class Extent(NamedTuple):
  """A size that the mesh must divide: the logical axis, what it is (for a message), and the size."""

  axis: str
  what: str
  size: int


def rows(batch: int, accumulate: int) -> list[Extent]:
  """The rows of a micro-batch; [] where accumulation itself does not divide the batch, which the data refuses."""
  return [] if batch % accumulate else [Extent("batch", "the rows of a micro-batch", batch // accumulate)]


# ---- the mesh ------------------------------------------------------------------------------------------------------


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Builds the (replica, fsdp, context, tensor) mesh; one size may be -1 and takes the devices that are left.

  Devices are ordered by the topology: neighbours on the last axes are neighbours on the chips' network. Where the
  devices are TPU slices joined by the data-centre network, only `replica` crosses it.

  Raises:
    MeshError: the sizes do not multiply to the number of devices, or `replica` is no multiple of the slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = [int(sizes[name]) for name in AXES]
  asked = f"mesh {dict(zip(AXES, shape, strict=True))}"
  if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
    raise MeshError(f"{asked}: sizes are positive, at most one is -1")
  fixed = math.prod(size for size in shape if size > 0)
  if -1 in shape:
    if len(devices) % fixed:
      raise MeshError(f"{asked}: {fixed} does not divide {len(devices)} devices")
    shape[shape.index(-1)] = len(devices) // fixed
  if math.prod(shape) != len(devices):
    raise MeshError(
      f"{asked} needs {math.prod(shape)} devices, there are {len(devices)}; set one axis to -1 to take what is left"
    )
  slices = slice_count(devices)
  if shape[0] % slices:
    legal = [n for n in _divisors(len(devices)) if n % slices == 0]
    raise MeshError(
      f"{asked}: the devices are {slices} slices, and only replica crosses the network between them; "
      f"legal sizes of replica: {', '.join(map(str, legal))}"
    )
  # Auto axes: Explicit ones, JAX's default, refuse ordinary einsums of sharded parameters.
  return Mesh(_ordered(devices, shape, slices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_count(devices: Sequence[jax.Device]) -> int:
  """The number of TPU slices among the devices; 1 on other platforms, whose hosts are one network to us."""
  if devices[0].platform != "tpu":
    return 1
  return len({getattr(device, "slice_index", 0) for device in devices})


def _ordered(devices: Sequence[jax.Device], shape: Sequence[int], slices: int) -> np.ndarray:
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  inner = [shape[0] // slices, *shape[1:]]
  return mesh_utils.create_hybrid_device_mesh(inner, [slices, 1, 1, 1], devices, allow_split_physical_axes=True)


# ---- what the mesh must divide -------------------------------------------------------------------------------------


def check(
  sizes: Mapping[str, int],
  shapes: Mapping[str, Any],
  axes: Mapping[str, tuple[str | None, ...]],
  extents: Sequence[Extent] = (),
) -> None:
  """Refuses a mesh that does not divide parameters or activations; nothing needs to be allocated for it.

  Args:
    sizes: of the mesh axes (`mesh.shape`).
    shapes, axes: {path: ShapeDtypeStruct} and {path: logical names} of the parameters.
    extents: sizes of activations (`Task.extents`).

  Raises:
    MeshError: for every axis that does not fit, what it does not divide and the axis's legal sizes. With each axis
      that is named set to one of its legal sizes, the mesh is accepted.
  """
  demands: dict[str, list[tuple[str, int]]] = {axis: [] for axis in AXES}
  for name, logical in axes.items():
    for size, axis, target in zip(shapes[name].shape, logical, parameter_spec(logical), strict=True):
      if target is not None:
        demands[target].append((f"{name} (axis {axis!r} of size {size})", size))
  rows = []
  for extent in extents:
    targets = RULES.get(extent.axis, _WHOLE).activation
    if extent.axis == "batch":
      rows.append(extent.size)
    for target in targets if extent.axis != "batch" else ("fsdp",):
      demands[target].append((f"{extent.what} ({extent.size})", extent.size))
  refusals = []
  for axis, needed in demands.items():
    obstacle = next((what for what, size in needed if size % sizes[axis]), None)
    if obstacle is not None:
      legal = _divisors(math.gcd(*(size for _, size in needed)))
      if axis == "fsdp" and rows and math.gcd(*rows) % sizes["replica"] == 0:
        legal = [n for n in legal if math.gcd(*rows) % (n * sizes["replica"]) == 0]
      refusals.append(_refusal(axis, sizes, obstacle, legal))
  refusals += _refused_replica(sizes, rows, demands["fsdp"])
  if refusals:
    raise MeshError("; ".join(refusals))


def _refused_replica(sizes: Mapping[str, int], rows: Sequence[int], width: Sequence[tuple[str, int]]) -> list[str]:
  """Rows are cut by replica and fsdp together. Where fsdp is refused too, whatever it is set to must fit."""
  whole = math.gcd(*rows)
  fits = not any(size % sizes["fsdp"] for _, size in width)
  if not rows or whole % (sizes["replica"] * (sizes["fsdp"] if fits else 1)) == 0:
    return []
  rest = whole // (sizes["fsdp"] if fits else math.gcd(*(size for _, size in width)))
  what = f"the rows of a micro-batch ({whole}" + (f" over fsdp={sizes['fsdp']})" if fits else ")")
  return [_refusal("replica", sizes, what, _divisors(rest))]


def _refusal(axis: str, sizes: Mapping[str, int], what: str, legal: Sequence[int]) -> str:
  built = [n for n in legal if n <= math.prod(sizes.values())]
  return f"mesh axis {axis}={sizes[axis]} does not divide {what}; legal sizes of {axis}: {', '.join(map(str, built))}"


def _divisors(size: int) -> list[int]:
  return [n for n in range(1, size + 1) if size % n == 0]


# ---- parameters, and what is laid out like them --------------------------------------------------------------------


def parameter_spec(logical: tuple[str | None, ...]) -> list[str | None]:
  """The mesh axis of each dimension of a stored parameter; each mesh axis is used once, by the first that asks.

  Vectors (biases, norm scales) are not cut over fsdp: gathering each would cost more than the bytes that it saves.
  """
  vector = sum(axis != "layers" for axis in logical) < 2
  spec: list[str | None] = []
  for axis in logical:
    target = RULES.get(axis, _WHOLE).parameter if axis else None
    spec.append(None if target in spec or (vector and target == "fsdp") else target)
  return spec


def parameter_shardings(
  mesh: Mesh, shapes: Mapping[str, Any], axes: Mapping[str, tuple[str | None, ...]]
) -> dict[str, NamedSharding]:
  """The sharding of each parameter by its logical axis names.

  Raises:
    MeshError: a dimension is not divisible by its mesh axis (`check`).
  """
  check(mesh.shape, shapes, axes)
  return {name: NamedSharding(mesh, P(*parameter_spec(logical))) for name, logical in axes.items()}


def like_parameters(mesh: Mesh, tree: Any, shardings: Mapping[str, NamedSharding]) -> Any:
  """Shardings of a tree of flat parameter dicts (optimiser state, EMA): by parameter name, else replicated."""

  def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    name = next((str(key.key) for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), "")
    return shardings[name] if name in shardings and leaf.ndim else NamedSharding(mesh, P())

  return jax.tree_util.tree_map_with_path(place, tree)


def on_host(mesh: Mesh, tree: Any, shardings: Any) -> Any:
  """The same shardings with arrays (not scalars) in the hosts' pinned memory.

  Raises:
    MeshError: the devices cannot address such memory.
  """
  device = mesh.devices.flat[0]
  if device.platform == jax.default_backend():  # else the mesh is one to compile for, not to run on
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
      raise MeshError(
        f"config key 'optimizer.offload' needs {HOST_MEMORY} memory, {device.device_kind} has {', '.join(kinds)}; "
        "set it to False"
      )
  move = lambda leaf, where: where.with_memory_kind(HOST_MEMORY) if leaf.ndim else where
  return jax.tree.map(move, tree, shardings)


# ---- batches and activations ---------------------------------------------------------------------------------------


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch over replica and fsdp."""
  return NamedSharding(mesh, P(RULES["batch"].activation))


def batch_ways(mesh: Mesh) -> int:
  """Into how many parts the rows of a batch are cut; every micro-batch must be a multiple of it."""
  return math.prod(mesh.shape[axis] for axis in RULES["batch"].activation)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Moves the rows of this process onto its devices as one global array per key."""
  sharding, (_, parts) = batch_sharding(mesh), data_part(mesh)
  whole = lambda value: (value.shape[0] * parts, *value.shape[1:])
  return {name: jax.make_array_from_process_local_data(sharding, v, whole(v)) for name, v in batch.items()}


def put_whole(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Moves rows that do not divide onto every device."""
  return {name: jax.device_put(value, NamedSharding(mesh, P())) for name, value in batch.items()}


def data_part(mesh: Mesh) -> tuple[int, int]:
  """(index, count): of how many equal parts of each global batch this process feeds which.

  Processes whose devices hold the same rows (a sample cut over context or tensor across hosts) feed the same part.

  Raises:
    MeshError: the rows of two processes overlap without being the same.
  """
  ways = batch_ways(mesh)
  held: dict[int, set[int]] = {}
  device: Any
  for device, (rows,) in batch_sharding(mesh).devices_indices_map((ways,)).items():
    held.setdefault(device.process_index, set()).add(rows.start or 0)
  parts = sorted({tuple(sorted(rows)) for rows in held.values()})
  if sum(map(len, parts)) != ways or len(set(map(len, parts))) > 1:
    raise MeshError(
      f"mesh {dict(mesh.shape)}: rows of a batch cannot be shared out among {len(held)} processes; make replica x fsdp "
      f"a multiple or a divisor of {len(held)}"
    )
  return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


@contextlib.contextmanager
def activations(
  mesh: Mesh, gradient: DTypeLike = jnp.float32, choice: attention.Choice = attention.Choice()
) -> Iterator[None]:
  """While tracing: the models' named activations and their parameters in use are laid out by `RULES`.

  Args:
    mesh: where the program will run.
    gradient: dtype in which gradients of kernels are summed over devices, under bfloat16 computation.
    choice: how the devices share attention.
  """

  def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    return _place(x, [RULES.get(name, _WHOLE).activation if name else () for name in names])

  def gather(value: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return _place(value, [() if axis in (None, "fsdp") else (axis,) for axis in parameter_spec(axes)])

  def scatter(value: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    # First the sum, then each device's part of it: asked for the part at once, XLA cuts the product over idle axes too,
    # and then has to permute the pieces.
    return _place(gather(value, axes), [(axis,) if axis else () for axis in parameter_spec(axes)])

  def _place(x: jax.Array, spec: Sequence[tuple[str, ...]]) -> jax.Array:
    for size, targets in zip(x.shape, spec, strict=True):
      if size % math.prod(mesh.shape[axis] for axis in targets):
        raise MeshError(f"an array {x.shape} does not divide by {targets} of {dict(mesh.shape)}")
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*(targets or None for targets in spec))))

  cuts = {name: math.prod(mesh.shape[axis] for axis in rule.activation) for name, rule in RULES.items()}
  attend = attention.attend(mesh, {name: rule.activation for name, rule in RULES.items()}, choice)
  with partition.placing(constrain, attend, cuts), weights.placing(weights.Placement(gather, scatter, gradient)):
    yield
