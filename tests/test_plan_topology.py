"""Topologies by name."""

import pytest

from kling_jax.errors import UsageError
from kling_jax.nn.context import FLOPS_PER_BYTE
from kling_jax.plan.topology import CHIPS, Topology


@pytest.mark.parametrize(
  ("text", "slices", "chips", "devices"),
  [("v5p:4x8x8", 1, 256, 256), ("v5e:4x4", 2, 32, 32), ("tpu7x:4x4x4", 1, 64, 128), ("v4:2x2x1", 1, 4, 8)],
)
def test_a_topology_counts_its_chips_and_devices(text: str, slices: int, chips: int, devices: int) -> None:
  topology = Topology.parse(text, slices)
  assert (str(topology), topology.chips, topology.size) == (text, chips, devices)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("v5q:4x4x4", "TPU generation 'v5q' .* did you mean 'v5"),
    ("v5p:4x4", "v5p has a network of 3 dimensions, e.g. v5p:4x4x4"),
    ("v6e:4x4x4", "v6e has a network of 2 dimensions, e.g. v6e:4x4"),
    ("v5p", "3 dimensions"),
    ("v5p:4x0x4", "3 dimensions"),
    ("v5p:4x4x-4", "3 dimensions"),
  ],
)
def test_what_is_no_topology_is_refused_with_one_that_is(text: str, message: str) -> None:
  with pytest.raises(UsageError, match=message):
    Topology.parse(text)
  with pytest.raises(UsageError, match="--slices 0"):
    Topology.parse("v6e:4x4", 0)


def test_chips_agree_with_the_table_that_chooses_between_ring_and_ulysses() -> None:
  for generation, chip in CHIPS.items():
    assert chip.flops / chip.link == pytest.approx(FLOPS_PER_BYTE[generation], rel=0.01)
