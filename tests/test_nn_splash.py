"""The TPU kernel: its blocks, and what the real TPU compiler makes of it, alone and inside ring and Ulysses."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from kling_jax.nn import splash
from kling_jax.nn.mask import Mask

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "tpu_compile.py"
SMALL = ("--blocks", ",".join(["512"] * 6), "--tokens", "1536")


@pytest.mark.parametrize("length", [1, 77, 512, 1000, 2100, 9450, 75_600])
@pytest.mark.parametrize("generation", [*splash.BLOCKS, "unknown"])
def test_blocks_divide_the_padded_lengths_and_stay_within_their_bounds(generation, length):
  largest = splash.BLOCKS.get(generation, splash.UNKNOWN)
  layout = splash._Layout(length, length, largest)
  sizes = layout.block_sizes
  assert length <= layout.n and length <= layout.m
  for size, padded, most in (
    (sizes.block_q, layout.n, largest.q),
    (sizes.block_kv, layout.m, largest.kv),
    (sizes.block_q_dq, layout.n, largest.q_back),
    (sizes.block_kv_dkv, layout.m, largest.kv_back),
    (sizes.block_kv_compute, sizes.block_kv, largest.kv_compute),
    (sizes.block_kv_dkv_compute, sizes.block_kv_dkv, largest.kv_compute_back),
  ):
    assert padded % size == 0 and size % 128 == 0 and size <= most
  if length > 4096:
    assert layout.n < 1.05 * length and min(sizes.block_kv_compute, sizes.block_kv_dkv_compute) >= 256


def test_blocks_that_are_visited_are_those_with_something_to_see():
  layout = splash._Layout(1280, 1280, splash.Blocks(*(128,) * 6))
  seen = Mask(block=192, start=64).seen(1280, 1280)
  info = splash._mask_info(seen, layout, 128, 256)
  visible = (np.arange(1280) < np.array(seen.limit_N)[:, None]).reshape(10, 128, 5, 256).any(axis=(1, 3))
  np.testing.assert_array_equal(np.array(info.block_mask[0]) > 0, visible)
  rows, columns = np.indices(visible.shape)
  np.testing.assert_array_equal(np.array(info.data_next[0])[visible], columns[visible])
  by_keys = splash._mask_info(seen, layout, 128, 256, of_keys=True)
  np.testing.assert_array_equal(np.array(by_keys.data_next[0])[visible], rows[visible])
  # A hidden block fetches nothing new: it names the last block of keys before it, or the first of queries after it.
  assert (np.diff(np.array(info.data_next[0]), axis=1)[~visible[:, 1:]] == 0).all()
  assert (np.diff(np.array(by_keys.data_next[0]), axis=0)[~visible[:-1]] == 0).all()


def _compile(environment: dict[str, str], *args: str) -> dict[str, dict]:
  """{program: row} of benchmarks/tpu_compile.py."""
  done = subprocess.run(
    [sys.executable, SCRIPT, "--json", "-", *args], env=environment, capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr[-3000:]
  print(done.stderr)
  return {row["program"]: row for row in json.loads(done.stdout)}


@pytest.mark.drill
@pytest.mark.parametrize("generation", ["v5p", "v6e", "tpu7x"])
def test_the_tpu_compiler_takes_the_kernel_and_the_ring_around_it(generation, tpu_compiler):
  programs = "full,blocks,ring" + (",packed,text,ulysses" if generation == "v5p" else "")
  rows = _compile(tpu_compiler, "--generations", generation, "--programs", programs, *SMALL)
  assert set(rows) == set(programs.split(","))
  for program, row in rows.items():
    passes = 2 if program == "ring" else 1  # in the loop, and once outside it
    assert sorted(row["kernels"]) == sorted(["fwd", "dq", "dkv"] * passes)
  assert rows["ring"]["collective_permute"] == 10 and rows["ring"]["all_to_all"] == 0
  if "ulysses" in rows:
    assert rows["ulysses"]["all_to_all"] == 8 and rows["ulysses"]["collective_permute"] == 0


@pytest.mark.drill
@pytest.mark.parametrize("generation", ["v5p", "v6e", "tpu7x"])
def test_the_blocks_of_the_table_fit_the_fast_memory(generation, tpu_compiler):
  rows = _compile(tpu_compiler, "--generations", generation, "--programs", "blocks", "--tokens", "4096")
  assert sorted(rows["blocks"]["kernels"]) == ["dkv", "dq", "fwd"]
