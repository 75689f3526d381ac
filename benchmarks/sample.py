"""Sampling, this project beside plain PyTorch in one run: the same network, noise, steps and guidance.

  python benchmarks/sample.py [--size S] [--rows 1] [--steps 10] [--frames 5 --side 16] [--bfloat16] [--json OUT]
  python benchmarks/sample.py --workdir RUN [--videos 16] [--errors 0.02,0.05,0.1] [--json OUT]

Without a work directory: Euler steps of a random Video DiT, two guidance branches in one call; ours as one program of
all steps, PyTorch eager under inference_mode. The two final latents must agree.

With a work directory of `kling train`: its own sampler dense, with the step cache at several errors, and with fewer
steps at the same number of network calls, which is what a cache must beat. Equal seeds; PSNR and SSIM are against the
dense videos, the unbiased low-frequency kernel distance (evals/frechet.py) against held-out clips. Calibrated on other
prompts.
"""

import argparse
import itertools
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import train_step

from kling_jax.data import buckets
from kling_jax.diffusion import process, sampler, step_cache
from kling_jax.evals import fidelity, frechet
from kling_jax.generate import sample
from kling_jax.generate import step_cache as step_cache_file
from kling_jax.models import flops, video_dit
from kling_jax.nn import params as params_lib

GUIDANCE = 4.0
FLOW = process.make("flow")


# ---- beside PyTorch --------------------------------------------------------------------------------------------------


def ours(side: train_step.Ours, steps: int) -> Callable[[], np.ndarray]:
  """One program: all steps, both branches of a step as rows of one call; the second branch has no text."""
  batch, dtype = side.batch, side.dtype

  def run(params: Any, noise: jax.Array, text: jax.Array) -> jax.Array:
    model = params_lib.merge(side.graph, params)

    def predict(x: jax.Array, time: jax.Array) -> jax.Array:
      both = jnp.concatenate([x, x]).astype(dtype)
      given, dropped = jnp.split(model(both, jnp.full(both.shape[0], time), text), 2)
      return dropped + GUIDANCE * (given - dropped)

    return sampler.sample(predict, noise, sampler.times(steps), FLOW)

  program, text = jax.jit(run), jnp.concatenate([batch["text"], 0 * batch["text"]])
  return lambda: np.asarray(program(side.params, batch["x"], text))


def theirs(side: train_step.Torch, steps: int) -> Callable[[], np.ndarray]:
  torch, batch = side.torch, side.batch
  text, times = torch.cat([batch["text"], 0 * batch["text"]]), np.asarray(sampler.times(steps)).tolist()

  def run() -> np.ndarray:
    x = batch["x"]
    with torch.inference_mode():
      for time, after in itertools.pairwise(times):
        both = torch.cat([x, x])
        given, dropped = side.prediction(both, torch.full((len(both),), time, device=side.device), text).chunk(2)
        x = x + (after - time) * (dropped + GUIDANCE * (given - dropped)).float()
    return x.cpu().numpy()

  return run


def beside_pytorch(args: argparse.Namespace) -> dict[str, Any]:
  import torch

  dtype = "bfloat16" if args.bfloat16 else "float32"
  config = video_dit.preset(args.size, text_width=train_step.TEXT_WIDTH)
  batch = train_step.inputs(config, args.rows, args.frames, args.side, args.text)
  mine = train_step.Ours(config, batch, dtype)
  sides = {"kling_jax": ours(mine, args.steps),
           "pytorch": theirs(train_step.Torch(config, batch, mine.start, dtype), args.steps)}  # fmt: skip
  a, b = (side() for side in sides.values())
  error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
  if error > (1e-3 if dtype == "float32" else 0.1):
    raise SystemExit(f"the two sides do not make the same latents: relative difference {error:.2e}")
  best, cpu = train_step.race(sides, args.rounds)
  cost = 2 * args.rows * args.steps * flops.video_dit_forward(config, args.frames, args.side, args.side, args.text)
  print(f"Video DiT {args.size}, {args.rows} x {args.frames}x{args.side}x{args.side} latents, {args.steps} steps, "
        f"guidance, {dtype}, {jax.devices()[0].device_kind}; jax {jax.__version__}, "
        f"torch {torch.__version__}")  # fmt: skip
  for name, seconds in best.items():
    print(f"{name:10} {seconds:8.3f} s, {cpu[name]:8.3f} CPU s, {cost / seconds / 1e9:8.1f} GFLOP/s")
  ratio = best["kling_jax"] / best["pytorch"]
  print(f"kling_jax takes {ratio:.2f} x the time of PyTorch; latents differ by {error:.1e}")
  return {"size": args.size, "dtype": dtype, "seconds": best, "cpu_s": cpu, "ratio": ratio, "error": error}


# ---- the step cache --------------------------------------------------------------------------------------------------


def held_out(model: sample.Model, count: int) -> tuple[list[str], np.ndarray]:
  """Captions and clips (B, T, H, W, 3) that the model was not trained on."""
  frames, height, width = model.size(sample.Settings())
  batches = model.task.batches("validation", 0, 1, 1)
  bucket = buckets.Bucket(frames, height, width, model.config.data.fps)
  fits = lambda clip: buckets.refusal(batches.sources.info(clip), bucket, buckets.Limits()) is None
  chosen = [clip for part in batches.clips for clip in part.tolist() if fits(clip)][:count]
  times_s = np.arange(frames) / model.config.data.fps
  clips = [batches.sources.frames(clip, times_s, height, width) for clip in chosen]
  return [batches.sources.info(clip).caption for clip in chosen], np.stack(clips)


def cached(args: argparse.Namespace) -> dict[str, Any]:
  """Dense, cached and shortened sampling of a trained model."""
  model = sample.Model(args.workdir)
  captions, clips = held_out(model, args.videos + 2)
  requests = [sample.Request(caption, seed=number) for number, caption in enumerate(captions)]
  usual = sample.Settings(steps=args.steps, text=args.guidance)
  recipe = model.recipe(usual)
  with tempfile.TemporaryDirectory(prefix="kling-bench-") as folder:
    path = pathlib.Path(folder) / "cache.json"
    model.calibrate(requests[:2], usual, path)
    owner = step_cache_file.owner(model.params, recipe)
    ratio_C = step_cache_file.read(path, owner, model.task.calls(recipe))
    requests, clips = requests[2:], clips[2:]
    dense = np.stack(model(requests, usual))
    runs: dict[str, sample.Settings] = {"dense": usual}
    calls = {"dense": len(ratio_C)}
    for error in map(float, args.errors.split(",")):
      name = f"cache, error {error:g}"
      runs[name] = sample.Settings(steps=args.steps, text=args.guidance, cache=str(path), cache_error=error)
      calls[name] = int(step_cache.schedule(ratio_C, error).sum())
      fewer = f"{calls[name]} steps"
      runs[fewer], calls[fewer] = sample.Settings(steps=calls[name], text=args.guidance), calls[name]
    videos = {name: np.stack(model(requests, settings)) for name, settings in runs.items()}
    best, cpu = train_step.race(
      {name: lambda settings=settings: model(requests, settings) for name, settings in runs.items()}, args.rounds
    )
  real = frechet.low_frequency(clips)
  rows = []
  print(f"{args.workdir}, checkpoint {model.step}: {len(requests)} videos {dense.shape[1:]}, {recipe.method}")
  print(f"{'':18} {'calls':>5} {'s':>7} {'CPU s':>7} {'x':>5} {'x CPU':>6} {'PSNR dB':>8} {'SSIM':>6} {'kernel':>8}")
  for name, made in videos.items():
    row = {
      "name": name, "calls": calls[name], "seconds": best[name], "cpu_s": cpu[name],
      "speed": best["dense"] / best[name], "cpu_speed": cpu["dense"] / cpu[name],
      "psnr": float(np.mean(fidelity.psnr(made, dense))), "ssim": float(np.mean(fidelity.ssim(made, dense))),
      "kernel": frechet.kernel(frechet.low_frequency(made), real),
    }  # fmt: skip
    rows.append(row)
    print(f"{name:18} {row['calls']:5} {row['seconds']:7.2f} {row['cpu_s']:7.2f} {row['speed']:5.2f} "
          f"{row['cpu_speed']:6.2f} {row['psnr']:8.2f} {row['ssim']:6.3f} {row['kernel']:8.4f}")  # fmt: skip
  return {"workdir": str(args.workdir), "step": model.step, "ratio": ratio_C.tolist(), "rows": rows}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="S")
  parser.add_argument("--rows", type=int, default=1)
  parser.add_argument("--frames", type=int, default=train_step.FRAMES, help="latent frames")
  parser.add_argument("--side", type=int, default=train_step.SIDE, help="latent rows and columns")
  parser.add_argument("--text", type=int, default=train_step.TEXT, help="text tokens")
  parser.add_argument("--bfloat16", action="store_true")
  parser.add_argument("--steps", type=int, help="of the sampler (default: 10, with a work directory 30)")
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--workdir", type=pathlib.Path, help="measure the step cache of this model instead")
  parser.add_argument("--videos", type=int, default=16)
  parser.add_argument("--errors", default="0.02,0.05,0.1")
  parser.add_argument("--guidance", type=float, default=2.0, help="text scale of the work directory's model")
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  args.steps = args.steps or (30 if args.workdir else 10)
  result = cached(args) if args.workdir else beside_pytorch(args)
  if args.json:
    args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
  main()
