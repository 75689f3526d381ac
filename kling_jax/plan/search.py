"""The best mesh for so many devices: all that divide the model, those that fit, ranked by an estimate of the step."""

import dataclasses
import math
from collections.abc import Mapping

from kling_jax.plan import memory, work
from kling_jax.plan.topology import Topology
from kling_jax.train.task import PRECISIONS, Task

ALIKE = 0.03  # estimates of a step that differ by less say nothing about which is faster


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A mesh with what is estimated of it: seconds of a step, and its memory."""

  mesh: dict[str, int]
  seconds: float
  memory: memory.Prediction


def candidates(job: Task, topology: Topology) -> list[Candidate]:
  """The meshes on which `job` fits, the fastest first; of those that are `ALIKE`, the one that needs least memory."""
  found = []
  for mesh in memory.meshes(job, topology.size):
    predicted = memory.predict(job, mesh)
    if predicted.fits(topology) and mesh["replica"] % topology.slices == 0:
      found.append(Candidate(mesh, seconds(job, mesh, topology), predicted))
  best = min((one.seconds for one in found), default=1.0)
  return sorted(found, key=lambda one: (int(one.seconds / best / ALIKE), one.memory.total, one.seconds))


def seconds(job: Task, mesh: Mapping[str, int], topology: Topology) -> float:
  """An estimate of a training step, for ranking: products, and transfers that the compiler's schedule leaves exposed.

  Per device and block, with n the tokens of a device, D the width, P its kernels' numbers and bfloat16 activations:
    fsdp     kernels gathered forward and again backward: (2 + 2) P (fsdp - 1) / fsdp bytes; gradients scattered, 4 P,
             or, where context or replica share the kernels too, summed whole on all of them: 8 P
    tensor   two sums of activations forward, two again and two backward (and the text's): 6 * 2 * 2 n D bytes
    context  the cheaper of ring (nothing exposed but its first hop) and Ulysses (twelve exchanges of n D)
  Every axis is taken to have the links of one torus dimension, both ways.
  """
  chip, item = topology.chip, PRECISIONS[job.config.precision].dtype.itemsize
  done = work.of("train", job, mesh, 0, 0)
  idle = max(1.0, chip.matrix / done.head)
  total = (done.flops + done.again + (idle - 1) * done.attention) / topology.device_flops
  link = 2 * chip.link / chip.devices
  batch = next(iter(job.batch_spec().values())).shape[0]
  rows = batch // (mesh["replica"] * mesh["fsdp"])
  accumulate = job.config.optimizer.accumulate
  rest = lambda ways: (ways - 1) / ways
  for stack in work.stacks(job):
    kernels = [n for n in job.shapes if n.startswith(stack.prefix) and len(job.shapes[n].shape) > 2]
    block = sum(math.prod(job.shapes[n].shape) for n in kernels) / stack.depth / mesh["tensor"]
    sharing = mesh["replica"] * mesh["context"] * mesh["fsdp"]
    gradients = 8 * rest(sharing) if sharing > mesh["fsdp"] else 4 * rest(sharing)
    gathers = (2 * item * rest(mesh["fsdp"]) + gradients) * block * accumulate
    tokens = rows * stack.tokens / mesh["context"]
    sums = 12 * item * tokens * stack.width * rest(mesh["tensor"])
    exchanges = 12 * item * tokens * stack.width * rest(mesh["context"]) / 4
    ring = 2 * item * tokens * stack.width if mesh["context"] > 1 else 0.0
    divides = stack.heads // mesh["tensor"] % mesh["context"] == 0
    total += stack.depth * (gathers + sums + (min(exchanges, ring) if divides else ring)) / link
  return total
