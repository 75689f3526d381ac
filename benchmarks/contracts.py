"""What the TPU compiler makes of every flagship config on every topology: memory, collectives of a block, the bound.

  make tpu                                                     # installs the compiler beside the environment
  python benchmarks/contracts.py --list
  python benchmarks/contracts.py --cases 1.3b-480p,14b-720p --topologies v5p:4x8x8 --json contracts.json

A case is compiled on each of its topologies; done ones are kept in the JSON file and not compiled again. Nothing runs
on a TPU: what is printed is what the compiler says of its program, and a bound from data sheets (plan/topology.py).
`predicted` and `compiled` are GiB of temporaries on a device, by `plan/memory.py` and by the compiler. Collectives are
those of one block forward and backward: MiB sent by a device, of which so many while nothing is computed.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from absl import flags

from kling_jax import config as config_lib
from kling_jax.errors import KlingError
from kling_jax.plan import memory, work
from kling_jax.plan import plan as plan_lib
from kling_jax.plan import topology as topology_lib
from kling_jax.train import sharding, task

GIB, MIB = 2**30, 2**20
POD = ("v5p:4x8x8", "v6e:16x16", "tpu7x:4x4x4")
LARGE = (*POD, "v5p:8x8x8")
BF16 = ("precision=bfloat16",)
CACHED = (*BF16, "data.cached_latents=True")


@dataclasses.dataclass(frozen=True)
class Case:
  """A config with its overrides, and where it is to run; meshes are those that `kling plan --search` puts first."""

  config: str
  overrides: tuple[str, ...] = CACHED
  topologies: tuple[str, ...] = POD
  programs: tuple[str, ...] = ("train",)


def _family(width: int) -> Case:
  size = {256: "n0.017b", 384: "n0.057b", 512: "n0.13b", 640: "n0.26b", 896: "n0.72b", 1024: "n1.07b"}[width]
  return Case(f"configs/video_dit.py:size={size},res=256", BF16, ("v5p:2x2x2", "v6e:4x4"))


CASES = {
  **{f"{size}-{res}": Case(f"configs/video_dit.py:size={size},res={res}", CACHED, LARGE)
     for size in ("1.3b", "14b", "30b") for res in ("480p", "720p")},
  # What 32 GiB a chip do not hold otherwise.
  "14b-720p-offload": Case("configs/video_dit.py:size=14b,res=720p", (*CACHED, "model.remat=offload:block"),
                           ("v6e:16x16",)),
  "14b-720p-halves": Case("configs/video_dit.py:size=14b,res=720p", (*CACHED, "optimizer.accumulate=2"),
                          ("v6e:16x16",)),
  "owl1": Case("configs/owl.py:preset=owl1", BF16, ("v5p:4x4x4", "v6e:8x8")),
  "modern": Case("configs/owl.py:preset=modern", BF16, ("v5p:4x4x4", "v6e:8x8")),
  "tsa": Case("configs/tsa.py:size=tiny", BF16, ("v5p:2x2x1", "v6e:2x4")),
  **{f"family-{width}": _family(width) for width in (256, 384, 512, 640, 896, 1024)},
  "1.3b-480p-sample": Case("configs/video_dit.py:size=1.3b,res=480p", CACHED, ("v5p:4x8x8",), ("sample",)),
  "owl1-rollout": Case("configs/owl.py:preset=owl1", BF16, ("v5p:4x4x4",), ("rollout",)),
}  # fmt: skip


def load(case: Case) -> Any:
  return config_lib.load(case.config, [f"--config.{item}" for item in case.overrides])


def row(case: Case, topology: str) -> dict[str, Any]:
  """Compiles one case on one topology; where it is refused, the reason."""
  config = load(case)
  target = topology_lib.Topology.parse(topology)
  base: dict[str, Any] = {"topology": topology, "config": case.config, "program": case.programs[0]}
  try:
    found = plan_lib.search(config, target, case.programs)[0]
  except KlingError as error:
    return base | {"refused": str(error)}
  report = found.reports[0]
  depth = max((stack.depth for stack in work.stacks(task.make(config))), default=1)
  blocks = [one for one in report.moved if one.in_blocks]
  return base | {
    "mesh": list(found.mesh.values()),
    "fits": report.fits,
    "hbm_bytes": report.hbm_bytes,
    "hbm_available": report.hbm_available,
    "compiled_bytes": report.by_kind["activations"] + report.by_kind["temporaries"],
    "by_kind": report.by_kind,
    "collectives": [
      [one.kind, "x".join(one.axes), one.count, one.bytes / depth, one.seconds, one.hidden] for one in blocks
    ],
    "flops": report.flops,
    "bound_s": report.bound.seconds,
    "bound_mfu": report.bound.mfu,
    "parts": report.bound.parts,
    "compile_s": report.compile_s,
  }


def line(name: str, found: dict[str, Any]) -> str:
  """A row of the table in docs/results.md."""
  if "refused" in found:
    return f"| {name} | {found['topology']} | refused: {found['refused']} |"
  sent = {hidden: sum(one[3] for one in found["collectives"] if one[5] == hidden) for hidden in (True, False)}
  mfu = f"{found['bound_mfu']:.0%}"
  mesh = dict(zip(sharding.AXES, found["mesh"], strict=True))
  predicted = "-"
  if found["program"] == "train":
    predicted = f"{memory.predict(task.make(load(CASES[name])), mesh).temporaries / GIB:.2f}"
  return (
    f"| {name} | {found['topology']} | {' x '.join(map(str, found['mesh']))} "
    f"| {found['hbm_bytes'] / GIB:.1f} of {found['hbm_available'] / GIB:.1f} "
    f"| {predicted} / {found['compiled_bytes'] / GIB:.2f} "
    f"| {sum(sent.values()) / MIB:.0f} ({sent[False] / MIB:.0f}) | {found['bound_s']:.2f} | {mfu} "
    f"| {found['compile_s']:.0f} |"
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--cases", default=",".join(CASES))
  parser.add_argument("--topologies", help="only these of a case's")
  parser.add_argument("--json", type=pathlib.Path, help="file to go on with, and to keep rows in")
  parser.add_argument("--list", action="store_true", help="print the cases")
  args = parser.parse_args()
  if args.list:
    print("\n".join(f"{name:18} {case.config:44} {' '.join(case.topologies)}" for name, case in CASES.items()))
    return
  topology_lib.compiler()
  flags.FLAGS.mark_as_parsed()
  jax.config.update("jax_enable_compilation_cache", False)
  kept = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.exists() else {}
  print("| case | topology | mesh (replica, fsdp, context, tensor) | GiB a device | predicted / compiled temporaries "
        "| MiB a block (exposed) | bound s | MFU at most | compile s |")  # fmt: skip
  for name in args.cases.split(","):
    case = CASES[name]
    for topology in args.topologies.split(",") if args.topologies else case.topologies:
      key = f"{name} {topology}"
      if key not in kept:
        print(f"{key} ...", file=sys.stderr, flush=True)
        kept[key] = row(case, topology)
        if args.json:
          args.json.write_text(json.dumps(kept, indent=1), encoding="utf-8")
      print(line(name, kept[key]), flush=True)


if __name__ == "__main__":
  main()
