"""Wan 2.1's VAE and transformer here and in PyTorch (diffusers), in one process on CPU: seconds and their ratio.

  python benchmarks/interop_speed.py [--frames 5 --side 64 --blocks 2 --rounds 3] [--json OUT]

The VAE has its published size (base 96), the transformer the width of the 1.3B with fewer blocks. Both sides have the
same weights and inputs, and their outputs are compared first. They take turns, round by round; the figure is the
shortest round of each. Ratios above 1: PyTorch takes longer.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import parity_video
import reference
from agreement import relative_error


def race(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
  """(error, our seconds, their seconds); the first calls, which compile, are not timed."""
  error = relative_error(ours(), theirs())
  taken: tuple[list[float], list[float]] = ([], [])
  for _ in range(rounds):
    for times, call in zip(taken, (ours, theirs), strict=True):
      start = time.perf_counter()
      call()
      times.append(time.perf_counter() - start)
  return error, min(taken[0]), min(taken[1])


def vae(frames: int, side: int, rounds: int) -> dict[str, tuple[float, float, float]]:
  import jax
  import torch

  from kling_jax.nn import params as params_lib

  model = parity_video.wan_vae_model(96, [1, 2, 4, 4], 2, [False, True, True], 16, 0)
  graph, params = reference.loaded(model, model.config)
  params = jax.device_put(params)
  encode = jax.jit(lambda params, x: params_lib.merge(graph, params).encode(x))
  decode = jax.jit(lambda params, z: params_lib.merge(graph, params).decode(z))
  video = np.tanh(reference.noise(1, frames, side, side, 3))
  first = lambda x: torch.from_numpy(np.moveaxis(x, -1, 1).copy())
  last = lambda x: np.moveaxis(x.numpy(), 1, -1)
  mean, std = (np.asarray(value, np.float32) for value in (model.config.latents_mean, model.config.latents_std))
  latents = np.asarray(encode(params, video))

  @torch.no_grad()
  def their_encode() -> np.ndarray:
    return (last(model.encode(first(video)).latent_dist.mode()) - mean) / std

  @torch.no_grad()
  def their_decode() -> np.ndarray:
    return last(model.decode(first(latents * std + mean)).sample)

  clipped = lambda: np.clip(np.asarray(decode(params, latents)), -1, 1)  # as diffusers does
  return {
    "vae encode": race(lambda: np.asarray(encode(params, video)), their_encode, rounds),
    "vae decode": race(clipped, their_decode, rounds),
  }


def dit(blocks: int, rounds: int) -> dict[str, tuple[float, float, float]]:
  import jax

  from kling_jax.nn import params as params_lib

  model = parity_video.wan_model(12, 128, blocks, 8960, 4096, 16, 0)
  graph, params = reference.loaded(model, model.config)
  params = jax.device_put(params)
  run = jax.jit(lambda params, x, time, text: params_lib.merge(graph, params)(x, time, text))
  given = parity_video.wan_inputs(16, 4096, (3, 26, 26), 512)
  given = {name: array[:1] for name, array in given.items()}
  ours = lambda: np.asarray(run(params, given["x"], given["time"], given["text"]))
  return {f"dit, {blocks} blocks, 507 tokens": race(ours, lambda: parity_video.wan_reference(model, given), rounds)}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--frames", type=int, default=5)
  parser.add_argument("--side", type=int, default=64)
  parser.add_argument("--blocks", type=int, default=2)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--json")
  args = parser.parse_args()
  rows = []
  for name, (error, ours, theirs) in {
    **vae(args.frames, args.side, args.rounds),
    **dit(args.blocks, args.rounds),
  }.items():
    rows.append({"what": name, "error": error, "seconds": ours, "torch_seconds": theirs, "ratio": theirs / ours})
    print(
      f"{name:28} {ours:8.3f} s, PyTorch {theirs:8.3f} s, ratio {theirs / ours:5.2f}, error {error:.1e}", flush=True
    )
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
