"""What int8 and float8 products cost in loss: the same small run in each mode, validated on the same fixed table.

  python benchmarks/quantize.py [--size d64] [--steps 300] [--seeds 1] [--json OUT]

`configs/video_dit.py:runlocal` on `shapes-v1` at another size and length; all modes and seeds see the same rows, noise
and times. The gap is the difference of validation losses with the standard error of the table's paired rows. Served:
the exactly trained weights, validated with rounded products. Times are not compared: CPUs have no such units.
"""

import argparse
import json
import pathlib
import tempfile
from typing import Any

import numpy as np

from kling_jax import config as config_lib
from kling_jax.diffusion import table
from kling_jax.diffusion import time as time_lib
from kling_jax.nn import quantized
from kling_jax.train import loop, sharding, task
from kling_jax.train.checkpoint import Checkpoints
from kling_jax.train.state import Update

ROWS = 64  # fewer than there are held-out clips, so that no clip has two


def settings(mode: str, seed: int, args: argparse.Namespace) -> Any:
  c = config_lib.load("video_dit:runlocal")
  c.update_from_flattened_dict({
    "model.size": args.size, "model.quantize": mode, "seed": seed, "steps": args.steps, "validation.every": 0,
    "validation.rows": ROWS, "checkpoint.every": 0, "data.memory_gib": 1.0, "data.threads": 1, "data.batch": 16,
    "data.sources": ("worlds:shapes-v1?count=512&seed=0",), "data.validation_fraction": 0.2,
  })  # fmt: skip
  return c


def losses(c: Any, params: Any) -> np.ndarray:
  """Loss of each row of the fixed table."""
  update = Update(task.make(c), sharding.make_mesh(c.mesh))
  batches = update.task.validation_rows(0, 1, sharding.batch_ways(update.mesh))
  return np.concatenate(
    [np.asarray(update.evaluate(params, sharding.put_batch(update.mesh, rows))) for rows in batches]
  )


def trained(c: Any) -> Any:
  """The averaged weights at the end of a run."""
  with tempfile.TemporaryDirectory(prefix="kling-bench-") as folder:
    loop.run(c, folder)
    job, checkpoints = task.make(c), Checkpoints(pathlib.Path(folder))
    return checkpoints.restore_params(checkpoints.latest(), job.shapes)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="d64")
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--seeds", type=int, default=1)
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  found: dict[str, list[np.ndarray]] = {}
  for seed in range(args.seeds):
    for mode in quantized.MODES:
      params = trained(settings(mode, seed, args))
      found.setdefault(f"trained {mode}", []).append(losses(settings(mode, seed, args), params))
      if mode == "none":
        for served in quantized.MODES[1:]:
          found.setdefault(f"served {served}", []).append(losses(settings(served, seed, args), params))
  place_R = np.asarray(time_lib.place(np.arange(ROWS)))[: len(found["trained none"][0])]
  rows = []
  print(f"Video DiT {args.size}, {args.steps} steps, {args.seeds} seeds, {len(place_R)} validation rows")
  for name, runs in found.items():
    loss_R = np.mean(runs, 0)
    gap, error = table.mean(loss_R - np.mean(found["trained none"], 0), place_R, np.arange(len(loss_R)))
    rows.append({"name": name, "loss": float(loss_R.mean()), "gap": gap, "error": error})
    print(f"{name:14} loss {loss_R.mean():.5f}, gap {gap:+.5f} ({gap / np.mean(found['trained none']):+.2%}), "
          f"standard error {error:.5f}")  # fmt: skip
  if args.json:
    args.json.write_text(json.dumps({"size": args.size, "steps": args.steps, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
  main()
