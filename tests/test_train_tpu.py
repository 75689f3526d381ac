"""Contracts of the training step, read from the programs that the real TPU compiler makes of it."""

import ast
import collections
import json
import math
import pathlib
import subprocess
import sys

import pytest
import tpu_step

from kling_jax.train import sharding

pytestmark = pytest.mark.drill
WIDTH, FRAMES, BLOCK = 256, 3, "dit.blocks."


@pytest.fixture(scope="module")
def steps(tpu_compiler: dict[str, str]) -> dict[str, dict]:
  """What `tpu_step` reads from each of its programs."""
  command = [sys.executable, str(pathlib.Path(tpu_step.__file__)), *tpu_step.CASES]
  done = subprocess.run(command, env=tpu_compiler, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-3000:]
  print("\n".join(line for line in done.stderr.splitlines() if "compiled in" in line))
  return json.loads(done.stdout.splitlines()[-1])


def squeezed(shape) -> tuple[int, ...]:
  return tuple(size for size in shape if size != 1)


def kernels(case: str, *, stored: bool) -> dict[str, tuple[int, ...]]:
  """The kernels of the Video DiT's blocks and of the rest, one layer of a stack, on a device: stored, or in use."""
  sizes = dict(zip(sharding.AXES, tpu_step.CASES[case].mesh, strict=True))
  found, job = {}, tpu_step.job(tpu_step.CASES[case])
  for name, logical in job.axes.items():
    spec = sharding.parameter_spec(logical)
    cut = [sizes[axis] if axis == "tensor" or (axis and stored) else 1 for axis in spec]
    shape = [size // ways for size, ways in zip(job.shapes[name].shape, cut, strict=True)]
    if "fsdp" in spec:
      found[name] = squeezed(shape[1:] if logical[0] == "layers" else shape)
  return found


def of(step: dict, kind: str, *axes: str, loops: bool | None = None) -> list[dict]:
  """The collectives of one kind along these axes, inside the loop over blocks, outside it, or both."""
  chosen = [one for one in step["collectives"] if one["kind"] == kind and tuple(one["axes"]) == axes]
  return [one for one in chosen if loops is None or bool(one["loops"]) == loops]


def arrays(found: list[dict]) -> collections.Counter:
  """(dtype, shape without ones) of all that they carry."""
  return collections.Counter((dtype, squeezed(shape)) for one in found for dtype, shape in one["arrays"])


def test_fsdp_gathers_kernels_in_bfloat16_and_nothing_else(steps: dict[str, dict]) -> None:
  used = kernels("fsdp", stored=False)
  assert {tuple(one["axes"]) for one in steps["fsdp"]["collectives"] if one["kind"] == "all-gather"} == {("fsdp",)}
  assert set(arrays(of(steps["fsdp"], "all-gather", "fsdp"))) <= {("bf16", shape) for shape in used.values()}
  block = collections.Counter(("bf16", shape) for name, shape in used.items() if name.startswith(BLOCK))
  assert block.total() == 10
  forward_and_again = collections.Counter({key: 2 * count for key, count in block.items()})
  assert arrays(of(steps["fsdp"], "all-gather", "fsdp", loops=True)) == forward_and_again


def test_gradients_are_scattered_in_float32(steps: dict[str, dict]) -> None:
  """Each kernel of a block once, straight into the part that a device stores; vectors are summed whole."""
  block = [shape for name, shape in kernels("fsdp", stored=True).items() if name.startswith(BLOCK)]
  found = arrays(of(steps["fsdp"], "reduce-scatter", "fsdp", loops=True))
  assert found == collections.Counter(("f32", shape) for shape in block)
  vectors = arrays(of(steps["fsdp"], "all-reduce", "fsdp", loops=True))
  assert vectors and all(dtype == "f32" and math.prod(shape) <= 6 * WIDTH for dtype, shape in vectors)


def test_a_block_holds_no_other_collective(steps: dict[str, dict]) -> None:
  """Over tensor: sums of activations in bfloat16, and of the statistics of the norms of queries and keys in float32."""
  inside = [one for one in steps["fsdp"]["collectives"] if one["loops"]]
  assert {(one["kind"], tuple(one["axes"])) for one in inside} == {
    ("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",)), ("all-reduce", ("fsdp",)), ("all-reduce", ("tensor",)),
  }  # fmt: skip
  rows = tpu_step.ROWS // 4
  allowed = {("bf16", (rows, n, WIDTH)) for n in (tpu_step.TOKENS, tpu_step.TEXT)}
  allowed |= {("f32", (rows, n)) for n in (tpu_step.TOKENS, tpu_step.TEXT)}
  assert set(arrays(of(steps["fsdp"], "all-reduce", "tensor", loops=True))) <= allowed


@pytest.mark.parametrize("case", tpu_step.CASES)
def test_no_float32_product_in_the_bfloat16_path(case: str, steps: dict[str, dict]) -> None:
  """The exceptions stand outside the blocks: times and scores and their modulation, the head, and the codec."""
  outputs, channels = 64, 16
  found = [ast.literal_eval(text) for text in steps[case]["products"]]
  assert sum(1 for loops, _, _ in found if loops) > 10
  for loops, dtypes, shape in found:
    if set(dtypes) != {"bf16"}:
      embedding = math.prod(squeezed(shape)[:-1]) <= tpu_step.ROWS * FRAMES
      kernel = squeezed(shape) in {(WIDTH, WIDTH), (WIDTH, 6 * WIDTH)}
      assert not loops and (embedding or kernel or outputs in shape or shape[-1] == channels), (loops, dtypes, shape)


def test_each_hop_of_the_ring_carries_the_tokens_of_one_device(steps: dict[str, dict]) -> None:
  """Keys and values in bfloat16, their gradients in float32, N / P tokens each; nothing in a block is gathered."""
  _, fsdp, ways, _ = tpu_step.CASES["ring"].mesh
  hops = arrays(of(steps["ring"], "collective-permute", "context", loops=True))
  part = (tpu_step.ROWS // fsdp, tpu_step.TOKENS // ways, WIDTH // 64, 64)
  assert set(hops) == {("bf16", part), ("f32", part)} and hops["f32", part] == 2
  inside = [one for one in steps["ring"]["collectives"] if one["loops"] and "context" in one["axes"]]
  assert {one["kind"] for one in inside} == {"collective-permute", "all-reduce"}
  sums = {shape for one in inside if one["kind"] == "all-reduce" for _, shape in arrays([one])}
  text = (tpu_step.ROWS // fsdp, tpu_step.TEXT, WIDTH // 64, 64)  # gradients of the text's keys and values
  weights = set(kernels("ring", stored=False).values())
  assert all(shape == text or shape in weights or math.prod(shape) <= 6 * WIDTH for shape in sums), sums
  # Outside the blocks the prediction alone is made whole, for the loss: N rows of 64 numbers.
  whole = arrays(of(steps["ring"], "all-gather", "context"))
  assert set(whole) <= {("f32", (tpu_step.ROWS // fsdp, tpu_step.TOKENS, 64))}


def test_ulysses_sends_what_one_device_holds_four_times_forward_and_four_times_back(steps: dict[str, dict]) -> None:
  """And four times more where the block is computed again."""
  _, fsdp, ways, _ = tpu_step.CASES["ulysses"].mesh
  found = of(steps["ulysses"], "all-to-all", "context", loops=True)
  assert [one["bytes"] for one in found] == 12 * [2 * tpu_step.ROWS // fsdp * tpu_step.TOKENS // ways * WIDTH]
  assert {dtype for dtype, _ in arrays(found)} == {"bf16"}
  inside = [one for one in steps["ulysses"]["collectives"] if one["loops"] and "context" in one["axes"]]
  assert {one["kind"] for one in inside} == {"all-to-all", "all-reduce"}


def test_between_slices_only_the_scattered_gradients_travel(steps: dict[str, dict]) -> None:
  crossing = [one for one in steps["slices"]["collectives"] if "replica" in one["axes"]]
  assert {(one["kind"], tuple(one["axes"])) for one in crossing} == {("all-reduce", ("replica",))}
  assert {dtype for dtype, _ in arrays(crossing)} == {"f32"}
  stored = kernels("slices", stored=True)
  block = 4 * sum(math.prod(shape) for name, shape in stored.items() if name.startswith(BLOCK))
  inside = sum(one["bytes"] for one in crossing if one["loops"])
  assert block <= inside < 1.03 * block, (block, inside)  # and the vectors, padded to the chip's tiles
  assert not of(steps["slices"], "all-reduce", "replica", "fsdp")


def test_offloaded_moments_are_arguments_in_the_memory_of_the_host(steps: dict[str, dict]) -> None:
  """Two moments of 4 bytes for each number that a device stores; the compiler pads arrays to the chip's tiles."""
  case = tpu_step.CASES["slices"]
  sizes, job = dict(zip(sharding.AXES, case.mesh, strict=True)), tpu_step.job(case)
  numbers = sum(
    leaf.size // math.prod(sizes[axis] for axis in sharding.parameter_spec(job.axes[name]) if axis)
    for name, leaf in job.shapes.items()
  )
  host = steps["slices"]["memory"]["host_argument"]
  assert 8 * numbers <= host < 1.02 * 8 * numbers
  assert steps["fsdp"]["memory"]["host_argument"] == 0
