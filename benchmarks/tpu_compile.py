"""Compiles attention, forward and backward, for TPUs on a machine without one, and reads what the compiler made of it.

  make tpu                                                     # installs the compiler beside the environment
  PYTHONPATH=.venv/3.11/libtpu python benchmarks/tpu_compile.py --generations v5p,v6e --programs full,ring

Programs, all bfloat16, 2 rows, 4 heads, `--tokens` a device: `full`, `blocks` (block-causal), `packed` (packed clips
with padded keys and grouped heads) and `text` (queries against 512 padded text tokens) on one device; `ring` and
`ulysses` (block-causal) on four. `--blocks` sets the splash blocks instead of the table of `nn/splash.py`.
Columns: seconds to compile; temporary memory of a device; splash kernels; kernels during which a transfer between
devices is under way, as the compiler scheduled them.
"""

import argparse
import functools
import json
import os
import re
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kling_jax.errors import UsageError
from kling_jax.nn import lowering, partition
from kling_jax.nn.attention import attention
from kling_jax.nn.mask import Mask
from kling_jax.train.attention import Choice, attend

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
RULES = {"batch": ("replica", "fsdp"), "tokens": ("context",), "heads": ("tensor",)}
ROWS, HEADS, TEXT, WAYS = 2, 4, 512, 4
PROGRAMS = ("full", "blocks", "packed", "text", "ring", "ulysses")


def build(program: str, tokens: int):
  """Returns (number of devices, key heads, key tokens, mask of (key validity, clip numbers))."""
  causal = lambda keys_BL, ids_BN: Mask(block=tokens // 8)
  padded = lambda keys_BL, ids_BN: Mask(keys_BL=keys_BL)
  packed = lambda keys_BL, ids_BN: Mask(keys_BL=keys_BL, block=tokens // 8, segments=(ids_BN, ids_BN))
  full = lambda keys_BL, ids_BN: Mask()
  return {
    "full": (1, HEADS, tokens, full),
    "blocks": (1, HEADS, tokens, causal),
    "packed": (1, HEADS // 2, tokens, packed),
    "text": (1, HEADS, TEXT, padded),
    "ring": (WAYS, HEADS, tokens, causal),
    "ulysses": (WAYS, HEADS, tokens, causal),
  }[program]


def compiled(generation: str, program: str, tokens: int, size: int, blocks: tuple[int, ...]) -> dict:
  """Compiles one program and measures it."""
  tokens *= WAYS if program in ("ring", "ulysses") else 1
  ways, groups, keys, mask = build(program, tokens)
  choice = Choice("splash", program if ways > 1 else "auto", blocks)
  devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation]).devices[:ways]
  axes = ("replica", "fsdp", "context", "tensor")
  mesh = Mesh(np.array(devices).reshape(1, 1, ways, 1), axes, axis_types=(AxisType.Auto,) * 4)
  names = ("tokens", "tokens" if keys == tokens else "text")
  place = functools.partial(partition.placing, lambda x, axes: x, attend(mesh, RULES, choice))

  def loss(q, k, v, keys_BL, ids_BN):
    with place():
      o = attention(q, k, v, mask=mask(keys_BL, ids_BN), road="splash", tokens=names)
      return o.astype(jnp.float32).sum(), o

  cut, whole = NamedSharding(mesh, P(None, "context")), NamedSharding(mesh, P())
  array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=cut)
  arguments = [array((ROWS, tokens, HEADS, size)), *[array((ROWS, keys, groups, size))] * 2]
  arguments.append(jax.ShapeDtypeStruct((ROWS, keys), jnp.bool, sharding=whole))
  arguments.append(jax.ShapeDtypeStruct((ROWS, tokens), jnp.int32, sharding=whole))
  start = time.perf_counter()
  with lowering.target("tpu", generation):
    lowered = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), out_shardings=cut).lower(*arguments)
  traced = lowered.as_text()
  program_text = lowered.compile()
  seconds, memory = time.perf_counter() - start, program_text.memory_analysis()
  kernels, hidden = overlaps(program_text.as_text())
  return {
    "generation": generation, "program": program, "tokens": tokens, "head": size, "blocks": blocks,
    "compile_s": seconds, "temp_bytes": memory.temp_size_in_bytes, "kernels": kernels, "hidden": hidden,
    **{name: traced.count(f"stablehlo.{name}") for name in ("collective_permute", "all_to_all")},
  }  # fmt: skip


def overlaps(text: str) -> tuple[list[str], list[str]]:
  """Names of the splash kernels of a scheduled program, and of those that run while a transfer is under way."""
  kernels, hidden, under_way = [], [], 0
  for line in text.splitlines():
    if not line.startswith(" "):
      under_way = 0  # another computation
    under_way += line.count(" collective-permute-start(") - line.count(" collective-permute-done(")
    kernel = re.match(r"\s+(?:ROOT )?%splash_mha_([a-z]+)_.* custom-call\(", line)
    if kernel:
      kernels.append(kernel[1])
      if under_way:
        hidden.append(kernel[1])
  return kernels, hidden


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--generations", default=",".join(TOPOLOGIES))
  parser.add_argument("--programs", default=",".join(PROGRAMS))
  parser.add_argument("--tokens", type=int, default=4096)
  parser.add_argument("--heads", default="128", help="head sizes")
  parser.add_argument("--blocks", default="", help="six sizes, in the order of nn.splash.Blocks")
  parser.add_argument("--json", help="file to write; - for standard output, and nothing else there")
  args = parser.parse_args()
  blocks = tuple(map(int, args.blocks.split(","))) if args.blocks else ()
  out = sys.stderr if args.json == "-" else sys.stdout
  try:
    topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES["v5p"])
  except Exception as error:
    raise UsageError(f"no TPU compiler ({error}): run `make tpu` and put its folder on PYTHONPATH") from error

  rows = []
  print(f"{'':6} {'program':8} {'head':>5} {'compile s':>9} {'temp MiB':>9} {'kernels':>8} {'hidden':>7}", file=out)
  for generation in args.generations.split(","):
    for program in args.programs.split(","):
      for size in map(int, args.heads.split(",")):
        row = compiled(generation, program, args.tokens, size, blocks)
        rows.append(row)
        print(f"{generation:6} {program:8} {size:5} {row['compile_s']:9.1f} {row['temp_bytes'] / 2**20:9.1f} "
              f"{len(row['kernels']):8} {len(row['hidden']):7}", file=out, flush=True)  # fmt: skip
  text = json.dumps(rows, indent=1)
  if args.json == "-":
    print(text)
  elif args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      file.write(text)


if __name__ == "__main__":
  main()
