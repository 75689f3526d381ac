"""Every mesh gives the numbers of one device, moves only what it must, and is refused where it does not divide."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import whole_model
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_jax.errors import MeshError
from kling_jax.plan import collectives
from kling_jax.train import sharding
from kling_jax.train.attention import Choice
from kling_jax.train.sharding import AXES, Extent

# ---- equality ------------------------------------------------------------------------------------------------------

SHAPES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) == 8]
ways_of = lambda sizes: ("ring", "ulysses") if sizes[AXES.index("context")] > 1 else ("",)
CASES = [(sizes, way) for sizes in SHAPES for way in ways_of(sizes)]
FEW = [((2, 2, 1, 2), ""), ((1, 4, 2, 1), "ring"), ((1, 1, 2, 4), "ring")]


@functools.cache
def program(sizes: tuple[int, ...] = (1, 1, 1, 1), way: str = "") -> jax.stages.Compiled:
  """Loss and gradients of the whole model on a mesh, with one way of sharing attention over its context axis."""
  return whole_model.lowered(whole_model.make_mesh(*sizes), choice=Choice(context=way or "auto")).compile()


@functools.cache
def alone():
  return whole_model.loss_and_gradients(program())


def test_there_are_twenty_shapes() -> None:
  assert len(SHAPES) == 20 and len(CASES) == 30 and set(FEW) < set(CASES)


@pytest.mark.parametrize(
  ("sizes", "way"), [pytest.param(*case, marks=() if case in FEW else pytest.mark.drill) for case in CASES]
)
def test_loss_and_gradients_are_those_of_one_device(sizes: tuple[int, ...], way: str) -> None:
  expected, plain = alone()
  loss, gradients = whole_model.loss_and_gradients(program(sizes, way))
  assert loss == pytest.approx(expected, rel=1e-5)
  assert gradients.keys() == plain.keys()
  for name, value in plain.items():
    largest = np.abs(value).max()
    assert largest > 0, f"{name} gets no gradient: the comparison would be empty"
    np.testing.assert_allclose(gradients[name] / largest, value / largest, atol=1e-5, err_msg=name)


# ---- what moves ----------------------------------------------------------------------------------------------------


@functools.cache
def moved(*sizes: int, way: str = "") -> list[collectives.Collective]:
  return collectives.read(program(sizes, way).as_text(), dict(zip(AXES, sizes, strict=True)))


def used_shapes(sizes: tuple[int, ...]) -> set[tuple[int, ...]]:
  """The shapes that parameters have where they are used: whole over fsdp, cut over tensor, one layer of a stack."""
  _, shapes, axes = whole_model.SMALL.described
  found = set()
  for name, logical in axes.items():
    cut = [
      size // (sizes[AXES.index(axis)] if axis == "tensor" else 1)
      for size, axis in zip(shapes[name].shape, sharding.parameter_spec(logical), strict=True)
    ]
    found.add(tuple(cut[1:] if logical[0] == "layers" else cut))
  return found


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(size for size in shape if size != 1)


def test_fsdp_gathers_parameters_and_nothing_else() -> None:
  found = [one for one in moved(2, 2, 1, 2) if "fsdp" in one.axes]
  gathers = [one for one in found if one.kind == "all-gather"]
  allowed = {squeezed(shape) for shape in used_shapes((2, 2, 1, 2))}
  assert len([one for one in gathers if one.loops]) >= 2 * 14  # the kernels of a block, forward and backward
  assert all(squeezed(shape) in allowed for one in gathers for _, shape in one.arrays)
  assert {one.axes for one in gathers} == {("fsdp",)}
  assert {one.kind for one in found} <= {"all-gather", "all-reduce", "reduce-scatter"}


def test_replica_only_sums_gradients() -> None:
  kinds = {(one.kind, one.loops > 0) for one in moved(2, 2, 1, 2) if "replica" in one.axes}
  assert {kind for kind, _ in kinds} <= {"all-reduce", "reduce-scatter"}
  forward = [one for one in moved(2, 2, 1, 2) if "replica" in one.axes and one.loops and "transpose" not in one.source]
  assert not forward


def test_tensor_never_gathers_and_its_sums_are_activations_or_norm_statistics() -> None:
  found = [one for one in moved(2, 2, 1, 2) if "tensor" in one.axes and one.loops]
  assert found and {one.kind for one in found} == {"all-reduce"}
  rows = whole_model.ROWS // 4
  assert all(not shape or shape[0] == rows or len(shape) < 3 for one in found for _, shape in one.arrays)


@pytest.mark.drill
@pytest.mark.parametrize(("way", "kind"), [("ring", "collective-permute"), ("ulysses", "all-to-all")])
def test_context_moves_the_part_of_one_device_a_hop(way: str, kind: str) -> None:
  """In a block no video token is gathered, and no message holds more than keys and values of a device's own tokens."""
  model = whole_model.CONFIG
  allowed = {squeezed(shape) for shape in used_shapes((1, 1, 1, 1))}
  allowed |= {(whole_model.ROWS, n, model.heads, model.head_size) for n in (whole_model.TEXT, whole_model.STATES)}
  for ways in (2, 4, 8):
    found = [one for one in moved(1, 1, ways, 1, way=way) if one.loops and "context" in one.axes]
    sent = [one for one in found if one.kind in ("collective-permute", "all-to-all")]
    part = whole_model.ROWS * whole_model.TOKENS // ways * whole_model.CONFIG.width * 4
    assert {one.kind for one in sent} == {kind} and max(one.bytes for one in sent) <= 2 * part
    sums = {squeezed(shape) for one in found if one.kind == "all-reduce" for _, shape in one.arrays}
    assert {one.kind for one in found} <= {kind, "all-reduce"}
    assert sums <= allowed, sums - allowed  # gradients of parameters, and of what every token asks


@pytest.mark.drill
def test_memory_of_activations_falls_with_the_context_axis() -> None:
  size = dataclasses.replace(whole_model.SMALL, rows=1, side=32)  # 768 tokens: activations outweigh the kernels
  room = lambda ways: (
    whole_model.lowered(whole_model.make_mesh(context=ways), size, choice=Choice(context="ring"))
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
  )
  two, eight = room(2), room(8)
  print(f"temporaries of a device, 768 tokens: context=2 {two / 2**20:.1f} MiB, context=8 {eight / 2**20:.1f} MiB")
  assert eight < two / 3


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_a_refusal_names_every_axis_with_what_it_does_not_divide() -> None:
  sizes = {"replica": 1, "fsdp": 4, "context": 3, "tensor": 4}
  shapes = {"up.kernel": jax.ShapeDtypeStruct((18, 24), jnp.float32)}
  extents = [Extent("heads", "heads of the Video DiT", 6), Extent("tokens", "tokens of bucket 5x8x8", 20)]
  with pytest.raises(MeshError) as caught:
    sharding.check(sizes, shapes, {"up.kernel": ("embed", "mlp")}, [*extents, Extent("batch", "rows", 8)])
  assert str(caught.value).split("; mesh") == [
    "mesh axis fsdp=4 does not divide up.kernel (axis 'embed' of size 18); legal sizes of fsdp: 1, 2",
    " axis context=3 does not divide tokens of bucket 5x8x8 (20); legal sizes of context: 1, 2, 4, 5, 10, 20",
    " axis tensor=4 does not divide heads of the Video DiT (6); legal sizes of tensor: 1, 2, 3, 6",
  ]


SIZE = st.sampled_from([1, 2, 3, 4, 5, 6, 8])


@settings(max_examples=300)
@given(
  mesh=st.fixed_dictionaries(dict.fromkeys(AXES, SIZE)), width=st.integers(1, 60), mlp=st.integers(1, 60),
  heads=st.integers(1, 24), tokens=st.lists(st.integers(1, 400), min_size=1, max_size=3), rows=st.integers(1, 48),
)  # fmt: skip
def test_a_mesh_divides_everything_or_its_legal_sizes_are_accepted(mesh, width, mlp, heads, tokens, rows) -> None:
  shapes = {"kernel": jax.ShapeDtypeStruct((width, mlp), jnp.float32), "bias": jax.ShapeDtypeStruct((mlp,), "float32")}
  axes: dict[str, tuple[str | None, ...]] = {"kernel": ("embed", "mlp"), "bias": ("mlp",)}
  extents = [Extent("heads", "heads", heads), Extent("batch", "rows", rows)]
  extents += [Extent("tokens", f"tokens of bucket {n}", count) for n, count in enumerate(tokens)]
  divides = (
    width % mesh["fsdp"] == 0 and rows % (mesh["replica"] * mesh["fsdp"]) == 0
    and all(size % mesh["tensor"] == 0 for size in (mlp, heads))
    and all(count % mesh["context"] == 0 for count in tokens)
  )  # fmt: skip
  if divides:
    sharding.check(mesh, shapes, axes, extents)
    return
  with pytest.raises(MeshError) as caught:
    sharding.check(mesh, shapes, axes, extents)
  named = re.findall(r"mesh axis (\w+)=(\d+) does not divide .*?; legal sizes of \1: ([\d, ]+)", str(caught.value))
  assert named
  legal = {axis: [int(size) for size in sizes.split(", ")] for axis, _, sizes in named}
  for axis, size, _ in named:
    assert mesh[axis] == int(size) and mesh[axis] not in legal[axis]
  for pick in range(max(map(len, legal.values()))):
    sharding.check(mesh | {axis: sizes[pick % len(sizes)] for axis, sizes in legal.items()}, shapes, axes, extents)
