"""How much memory a training step takes on a device, before anything is compiled: arithmetic on shapes and layouts.

  given       parameters, EMA, moments, the batch: by their shapes and `train/sharding.RULES`, exactly
  gradients   float32, laid out as the trained parameters; twice where micro-batches are added up
  casts       kernels of the stacks in the compute dtype: the compiler casts a whole stack before its loop
  activations what each block leaves for the backward pass, by its remat policy
  workspace   what the fullest block holds at once while it is computed backward

The first four follow from the config. The last is a fit to programs that the compiler made (`WORKSPACE`; the programs
and how far off it is stand in docs/results.md). What is given and the gradients are all that is predicted of networks
that are no stacks of transformer blocks (TSA, VAE); a VAE that encodes inside the step is left out.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

from kling_jax.errors import MeshError
from kling_jax.plan import work
from kling_jax.plan.programs import largest_bucket
from kling_jax.plan.topology import GIB, SPARE, Topology
from kling_jax.train import sharding
from kling_jax.train.task import PRECISIONS, Task

Remake = Callable[[str], Task | None]
REMAT = ("names:attention", "full", "offload:block")  # policies to propose, from the fastest to the smallest


@dataclasses.dataclass(frozen=True)
class Workspace:
  """Coefficients of the fit.

  bytes = stack (what the stack saves on the device) + token item (tokens) width + kernels 4 (numbers in a block)

  Attributes:
    stack: room that the allocator takes again for what the stack of blocks saves, for each of its bytes.
    token: vectors of the width a token, in the compute dtype.
    kernels: copies in float32 of the kernels of one block: gathered, and their gradients before they are scattered.
  """

  stack: float
  token: float
  kernels: float


WORKSPACE = Workspace(stack=2.2, token=14.5, kernels=1.2)


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Bytes on one device by kind, and those in the hosts' memory."""

  by_kind: dict[str, int]
  host: int = 0

  @property
  def total(self) -> int:
    return sum(self.by_kind.values())

  @property
  def temporaries(self) -> int:
    """What the compiler allocates itself: gradients, casts, activations, workspace."""
    return sum(size for kind, size in self.by_kind.items() if kind in TEMPORARY)

  def fits(self, topology: Topology) -> bool:
    return self.total <= (1 - SPARE) * topology.chip.hbm


GIVEN = ("params", "ema", "optimiser", "batch")
TEMPORARY = ("gradients", "casts", "activations", "workspace")


def predict(job: Task, mesh: Mapping[str, int]) -> Prediction:
  """The memory of a training step of `job` on a mesh of these sizes; nothing is traced."""
  c = job.config
  item = PRECISIONS[c.precision].dtype.itemsize
  stored = {name: math.prod(_part(leaf.shape, job.axes[name], mesh)) for name, leaf in job.shapes.items()}
  trained = sum(size for name, size in stored.items() if job.trainable(name))
  found = dict.fromkeys(GIVEN + TEMPORARY, 0)
  found["params"], found["ema"] = 4 * sum(stored.values()), 4 * trained
  host = 8 * trained if c.optimizer.offload else 0
  found["optimiser"] = 8 * trained - host
  ways = mesh["replica"] * mesh["fsdp"]
  batch = job.batch_spec(largest_bucket(job))
  found["batch"] = sum(leaf.size * leaf.dtype.itemsize for leaf in batch.values()) // ways
  found["gradients"] = 4 * trained * (2 if c.optimizer.accumulate > 1 else 1) + host
  rows = next(iter(batch.values())).shape[0] // (ways * c.optimizer.accumulate)
  for stack in work.stacks(job):
    kernels = [name for name in job.shapes if name.startswith(stack.prefix) and len(job.shapes[name].shape) > 2]
    if item < 4:
      found["casts"] += item * sum(stored[name] for name in kernels)
    saved, moved = _saved(stack, rows, mesh, item)
    found["activations"] += saved
    host += moved
    found["workspace"] = max(found["workspace"], _workspace(stack, job, kernels, rows, mesh, item, saved))
  return Prediction(found, host)


def _part(shape: tuple[int, ...], logical: tuple[str | None, ...], mesh: Mapping[str, int]) -> list[int]:
  spec = sharding.parameter_spec(logical)
  return [-(-size // (mesh[axis] if axis else 1)) for size, axis in zip(shape, spec, strict=True)]


def _saved(stack: work.Stack, rows: int, mesh: Mapping[str, int], item: int) -> tuple[int, int]:
  """Bytes that the forward pass of a stack leaves (on the device, on the host)."""
  tokens = rows * stack.tokens // mesh["context"]
  parts = mesh["tensor"]
  size = {
    "block": item * tokens * stack.width,
    "qkv": item * (4 * tokens + 2 * rows * stack.text) * stack.width // parts,
    "attention": 2 * (item * tokens * stack.width + 4 * tokens * stack.heads) // parts,
    "mlp_hidden": item * (2 if stack.gated else 1) * tokens * stack.mlp_width // parts,
  }
  if not stack.text:  # no cross-attention
    size["qkv"], size["attention"] = item * 3 * tokens * stack.width // parts, size["attention"] // 2
  names, host = _named(stack.remat)
  if stack.remat == "none":
    kept = sum(size.values()) + NOTHING_AGAIN * size["block"]
    return int(stack.depth * kept), 0
  kept = sum(size[name] for name in names) + (0 if "block" in host else size["block"])
  return stack.depth * kept, stack.depth * sum(size[name] for name in host)


NOTHING_AGAIN = 14  # vectors a token that a block saves beside the named ones where nothing is computed again


def _named(remat: str) -> tuple[list[str], list[str]]:
  """Names that a policy (saves, offloads) beside the block's input."""
  kind, _, names = remat.partition(":")
  listed = names.split(",") if names else []
  return (listed, []) if kind == "names" else ([], listed if kind == "offload" else [])


def _workspace(
  stack: work.Stack, job: Task, kernels: list[str], rows: int, mesh: Mapping[str, int], item: int, saved: int
) -> int:
  tokens = rows * stack.tokens // mesh["context"]
  in_use = {"fsdp": 1, "replica": 1, "context": 1, "tensor": mesh["tensor"]}
  block = sum(math.prod(_part(job.shapes[name].shape, job.axes[name], in_use)) for name in kernels) / stack.depth
  fit = WORKSPACE
  return int(fit.stack * saved + fit.token * item * tokens * stack.width + 4 * fit.kernels * block)


# ---- what would fit --------------------------------------------------------------------------------------------------


def refuse(job: Task, mesh: Mapping[str, int], topology: Topology, remake: Remake) -> None:
  """Refuses a config that cannot fit, and says what would.

  Args:
    remake: remat policy -> the task under it, None where it has no such policy.

  Raises:
    MeshError: names the prediction by kind, and the first of: a remat policy on this mesh, the smallest slice of this
      generation on which the config fits.
  """
  predicted = predict(job, mesh)
  if predicted.fits(topology):
    return
  parts = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in predicted.by_kind.items() if size >= 0.05 * GIB)
  size = dict(mesh)
  raise MeshError(
    f"{job.config.task} on {topology} with mesh {size} needs about {predicted.total / GIB:.1f} GiB a device "
    f"({parts}) of {topology.chip.hbm / GIB:.2f}, of which {SPARE:.0%} stay free; {_mend(job, mesh, topology, remake)}"
  )


def _mend(job: Task, mesh: Mapping[str, int], topology: Topology, remake: Remake) -> str:
  for remat in REMAT:
    other = remake(remat)
    if other is not None and predict(other, mesh).fits(topology):
      return f"with {remat_key(job)} = {remat!r} it would fit"
  size = topology.size
  for _ in range(8):
    fitting = [one for one in meshes(job, size) if predict(job, one).fits(topology)]
    if fitting:
      best = min(fitting, key=lambda one: (one["tensor"], one["context"], one["replica"]))
      return f"the smallest mesh that would hold it has {size} devices: {best}"
    size *= 2
  return f"no mesh of up to {size // 2} devices holds it; choose a smaller batch or model"


def remat_key(job: Task) -> str:
  """The config key of a task's remat policy."""
  return "config.video.remat" if "video" in job.config else "config.model.remat"


def meshes(job: Task, devices: int) -> list[dict[str, int]]:
  """Every mesh of so many devices that divides the model, its activations and its batch."""
  found = []
  divisors = [n for n in range(1, devices + 1) if devices % n == 0]
  for fsdp in divisors:
    for context in (n for n in divisors if devices % (fsdp * n) == 0):
      for tensor in (n for n in divisors if devices % (fsdp * context * n) == 0):
        mesh = dict(zip(sharding.AXES, (devices // (fsdp * context * tensor), fsdp, context, tensor), strict=True))
        if tensor <= 16 and _divides(job, mesh):
          found.append(mesh)
  return found


def _divides(job: Task, mesh: Mapping[str, int]) -> bool:
  try:
    sharding.check(mesh, job.shapes, job.axes, job.extents())
  except MeshError:
    return False
  return True
