"""The least time that a program can take on a topology: products, memory, links; what of it nothing can hide.

  seconds = max(products, memory, hidden transfers) + transfers that the schedule leaves exposed

Every part is a bound from below with the figures of `topology.CHIPS`, so the MFU that follows is one from above.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kling_jax.plan.collectives import Collective
from kling_jax.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Transfer:
  """All collectives of a program of one kind along the same mesh axes, of one device.

  Attributes:
    kind, axes: of `collectives.Collective`.
    hidden: whether something is computed meanwhile, as the compiler scheduled it.
    count: operations in the program's text that stand in a loop over blocks (`loops` > 0) or outside.
    in_blocks: whether they do.
    bytes: that a device sends, in all runs.
    seconds: that takes at least.
  """

  kind: str
  axes: tuple[str, ...]
  hidden: bool
  in_blocks: bool
  count: int
  bytes: float
  seconds: float


@dataclasses.dataclass(frozen=True)
class Work:
  """What one device has to do, from the config alone.

  Attributes:
    flops: model FLOPs: the forward, and in training two more forwards.
    again: FLOPs that the backward pass computes again.
    attention: the part of `flops` + `again` in attention's products.
    head: size of an attention head.
    traffic: bytes that cross the memory's bus at least.
  """

  flops: float
  again: float = 0.0
  attention: float = 0.0
  head: int = 128
  traffic: float = 0.0


@dataclasses.dataclass(frozen=True)
class Bound:
  """The bound of a step: seconds, the model FLOPs' share of the peak, and the seconds of each part."""

  seconds: float
  mfu: float
  parts: dict[str, float]


def bound(topology: Topology, work: Work, moved: Sequence[Transfer]) -> Bound:
  """The roofline of a program that does `work` and moves `moved`."""
  chip = topology.chip
  idle = max(1.0, chip.matrix / work.head)  # one side of both products of attention is a head
  products = (work.flops + work.again + (idle - 1) * work.attention) / topology.device_flops
  parts = {
    "products": products,
    "memory": work.traffic / (chip.hbm_bandwidth / chip.devices),
    "hidden transfers": sum(one.seconds for one in moved if one.hidden),
    "exposed transfers": sum(one.seconds for one in moved if not one.hidden),
  }
  exposed = parts["exposed transfers"]
  seconds = max(value for name, value in parts.items() if name != "exposed transfers") + exposed
  mfu = work.flops / topology.device_flops / seconds if seconds else math.nan
  return Bound(seconds, mfu, parts)


def transfers(found: Sequence[Collective], topology: Topology, mesh: Any) -> tuple[Transfer, ...]:
  """Sums collectives by kind, axes, overlap and place, and times them."""
  groups: dict[tuple[str, tuple[str, ...], bool, bool], list[Collective]] = {}
  for one in found:
    groups.setdefault((one.kind, one.axes, one.hidden, one.loops > 0), []).append(one)
  moved = []
  for (kind, axes, hidden, in_blocks), members in groups.items():
    ways = math.prod(mesh.shape[axis] for axis in axes)
    sent = sum(one.trips * one.bytes * _sent(kind, ways) for one in members)
    speed = _speed(kind, axes, topology, mesh)
    moved.append(Transfer(kind, axes, hidden, in_blocks, len(members), sent, sent / speed))
  return tuple(sorted(moved, key=lambda one: -one.seconds))


def _sent(kind: str, ways: int) -> float:
  """Bytes that a device sends for each byte of its result, by the best algorithm on a ring."""
  if ways == 1:
    return 0.0
  rest = (ways - 1) / ways
  # An all-to-all on a ring of both directions sends each block a quarter of the way round on average.
  factors = {"all-gather": rest, "all-reduce": 2 * rest, "reduce-scatter": ways - 1.0, "all-to-all": ways / 4,
             "ragged-all-to-all": ways / 4}  # fmt: skip
  return factors.get(kind, 1.0)


def _speed(kind: str, axes: tuple[str, ...], topology: Topology, mesh: Any) -> float:
  """Bytes a second out of one device: the links of all torus dimensions that the group spans, both ways."""
  chip = topology.chip
  if topology.slices > 1 and axes[:1] == ("replica",):
    return chip.dcn / chip.devices
  places = np.array([[*device.coords] for device in mesh.devices.flat]).reshape(*mesh.devices.shape, -1)
  cut = tuple(slice(None) if axis in axes else 0 for axis in mesh.shape)
  group = places[cut].reshape(-1, places.shape[-1])
  spanned = int((group != group[0]).any(axis=0).sum())
  if not spanned:  # the cores of one chip: its memory is between them
    return chip.hbm_bandwidth / chip.devices
  ways = 1 if kind == "collective-permute" else 2 * spanned
  return ways * chip.link / chip.devices
