"""Saving and restoring a training state, this project's checkpoints (Orbax) beside torch.save and torch.load.

  python benchmarks/checkpoint.py [--size S] [--rounds 3] [--folder DIR] [--json OUT]

The state is that of training: parameters, their average and two moments, float32. `save` is until all is on disk as
far as the operating system says (files lie in its page cache unless --folder is on another disk); `held` is how long
the train loop waits before it goes on, which for torch.save is all of it. `restore` ends with arrays that hold the
saved bits, which are compared. Rounds alternate between the two; the best counts.
"""

import argparse
import json
import math
import pathlib
import shutil
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from kling_jax.models import video_dit
from kling_jax.nn import params as params_lib
from kling_jax.train import sharding
from kling_jax.train.checkpoint import Checkpoints


def state(size: str) -> dict[str, Any]:
  """Parameters, EMA and two moments of a Video DiT, each of other numbers."""
  params = params_lib.create(lambda: video_dit.VideoDiT(video_dit.preset(size), rngs=nnx.Rngs(0)))
  copy = lambda k: {name: value + k for name, value in params.items()}
  return {"params": params, "ema": copy(1), "opt": {"mu": copy(2), "nu": copy(3)}, "step": jnp.int32(7)}


def orbax(held: dict[str, Any], folder: pathlib.Path) -> tuple[dict[str, float], Any]:
  """(seconds of held, save and restore, what was restored)."""
  settings = ml_collections.ConfigDict({"keep": 1, "keep_every": 0})
  checkpoints = Checkpoints(folder, settings)
  start = time.perf_counter()
  checkpoints.save(1, held, {"trained": list(held["params"])})
  free = time.perf_counter()
  checkpoints.wait()
  saved = time.perf_counter()
  place = jax.tree.map(lambda leaf: leaf.sharding, held)
  back = checkpoints.restore(1, jax.eval_shape(lambda: held), place)
  jax.block_until_ready(back)
  seconds = {"held": free - start, "save": saved - start, "restore": time.perf_counter() - saved}
  checkpoints.close()
  return seconds, back


def torch_side(held: dict[str, Any], folder: pathlib.Path) -> tuple[dict[str, float], Any]:
  import torch

  tensors = jax.tree.map(lambda leaf: torch.from_numpy(np.array(leaf)), held)
  folder.mkdir(parents=True)
  start = time.perf_counter()
  torch.save(tensors, folder / "state.pt")
  saved = time.perf_counter()
  back = torch.load(folder / "state.pt", weights_only=True)
  end = time.perf_counter()
  return {"held": saved - start, "save": saved - start, "restore": end - saved}, back


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="S", help="preset of the Video DiT")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--folder", type=pathlib.Path, help="where to write; a temporary folder where absent")
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  sharding.make_mesh({"replica": 1, "fsdp": -1, "context": 1, "tensor": 1})  # starts the back-end before any clock
  held = jax.block_until_ready(state(args.size))
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
  sides = {"kling_jax": orbax}
  try:
    import torch

    sides["torch"] = torch_side
    versions = f"torch {torch.__version__}"
  except ImportError:
    versions = "PyTorch is not installed (pip install 'kling_jax[bench]'): left out"
  best = {name: dict.fromkeys(("held", "save", "restore"), math.inf) for name in sides}
  for _ in range(args.rounds):
    for name, side in sides.items():
      folder = pathlib.Path(tempfile.mkdtemp(prefix="kling-bench-", dir=args.folder))
      seconds, back = side(held, folder / "work")
      jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), held, back)
      best[name] = {what: min(best[name][what], seconds[what]) for what in seconds}
      shutil.rmtree(folder)
  print(f"state of a Video DiT {args.size}: {size / 1e6:.0f} MB; jax {jax.__version__}, {versions}")
  print(f"{'':10} {'held s':>8} {'save s':>8} {'GB/s':>6} {'restore s':>10} {'GB/s':>6}")
  for name, s in best.items():
    print(f"{name:10} {s['held']:8.3f} {s['save']:8.3f} {size / s['save'] / 1e9:6.2f} {s['restore']:10.3f} "
          f"{size / s['restore'] / 1e9:6.2f}")  # fmt: skip
  if args.json:
    args.json.write_text(json.dumps({"size": args.size, "bytes": size, "seconds": best}, indent=1), encoding="utf-8")


if __name__ == "__main__":
  main()
