"""Compiles training steps for TPU topologies and prints what they hold as JSON; a process of its own, see conftest.

python tests/tpu_step.py fsdp ring ...
"""

import collections
import dataclasses
import json
import os
import pathlib
import re
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies

from kling_jax import config as config_lib
from kling_jax.nn import lowering
from kling_jax.plan import collectives
from kling_jax.train import sharding, task
from kling_jax.train.state import Update

ROOT = pathlib.Path(__file__).parents[1]
FRAMES, SIDE, TEXT, ROWS = 9, 128, 128, 8
TOKENS = 3 * (SIDE // 8) ** 2
# Shapes that the TPU compiler tells apart: width 256, 4 heads of 64, MLP 1024, and a codec and a text of other sizes.
SMALL = {
  "model.size": "d256", "model.remat": "full", "model.conditions": ("motion",), "precision": "bfloat16",
  "data.batch": ROWS, "data.buckets": ((FRAMES, SIDE, SIDE),), "text.width": 128, "text.tokens": TEXT, "text.depth": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
  """A mesh on a topology, with changes to the config; 2 slices are joined by the data-centre network."""

  mesh: tuple[int, int, int, int]
  topology: str = "v5p:2x2x2"
  slices: int = 1
  changes: tuple[tuple[str, Any], ...] = ()


CASES = {
  "fsdp": Case((1, 4, 1, 2)),
  "ring": Case((1, 2, 4, 1), changes=(("attention.context", "ring"),)),
  "ulysses": Case((1, 2, 4, 1), changes=(("attention.context", "ulysses"),)),
  "slices": Case((2, 4, 1, 1), "v5p:2x2x1", slices=2, changes=(("optimizer.offload", True),)),
}


def job(case: Case) -> task.Task:
  c = config_lib.load(f"{ROOT}/configs/video_dit.py")
  c.update_from_flattened_dict(SMALL | dict(case.changes))
  return task.make(c)


def compiled(case: Case) -> tuple[jax.stages.Compiled, dict[str, int]]:
  several = {"num_slices": case.slices} if case.slices > 1 else {}
  devices = topologies.get_topology_desc(platform="tpu", topology_name=case.topology, **several).devices
  mesh = sharding.make_mesh(dict(zip(sharding.AXES, case.mesh, strict=True)), devices)
  array = lambda *shape, dtype: jax.ShapeDtypeStruct((ROWS, *shape), dtype)
  batch = {
    "frames": array(FRAMES, SIDE, SIDE, 3, dtype=jnp.uint8),
    "tokens": array(TEXT, dtype=jnp.int32),
    "tokens_mask": array(TEXT, dtype=jnp.bool),
    "scores": array(1, dtype=jnp.float32),
    "scores_known": array(1, dtype=jnp.bool),
    "fps": array(dtype=jnp.float32),
    "index": array(dtype=jnp.uint32),
  }
  with lowering.target("tpu", case.topology.partition(":")[0]):
    update = Update(job(case), mesh)
    lowered = update.program.lower(update.abstract, batch, jax.ShapeDtypeStruct((), jnp.float32))
  return lowered.compile(), dict(mesh.shape)


def products(text: str) -> list[tuple[int, tuple[str, ...], tuple[int, ...]]]:
  """(loops around it, dtypes of the operands, shape of the result) of every matrix product of a compiled program."""
  computations, entry = collectives._parse(text)
  types = {one.name: one.result for body in computations.values() for one in body}
  found = []
  for one, loops, _ in collectives._reached(computations, entry, 0, 1):
    if one.opcode in ("convolution", "dot"):
      operands = re.findall(r"%([\w.\-]+)", one.rest.partition(")")[0])
      shape = re.search(r"\[([\d,]*)\]", one.result)
      assert shape is not None and len(operands) == 2, one
      sizes = tuple(int(size) for size in shape[1].split(",") if size)
      found.append((loops, tuple(types[name].partition("[")[0] for name in operands), sizes))
  return found


def main() -> None:
  flags.FLAGS.mark_as_parsed()
  answers = {}
  for name in sys.argv[1:]:
    began = time.perf_counter()
    program, mesh = compiled(CASES[name])
    text, memory = program.as_text(), program.memory_analysis()
    if os.environ.get("KEEP_HLO"):
      pathlib.Path(os.environ["KEEP_HLO"], f"{name}.hlo").write_text(text)
    kinds = [dataclasses.asdict(one) | {"bytes": one.bytes, "groups": []} for one in collectives.read(text, mesh)]
    memories = {field: getattr(memory, f"{field}_size_in_bytes") for field in ("argument", "temp", "host_argument")}
    answers[name] = {
      "collectives": kinds,
      "products": collections.Counter(map(repr, products(text))),
      "memory": memories,
      "seconds": time.perf_counter() - began,
    }
    print(f"{name}: compiled in {answers[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
  print(json.dumps(answers))


if __name__ == "__main__":
  main()
