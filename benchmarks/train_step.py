"""One Video DiT training step, this project beside plain PyTorch: same shapes, weights, arithmetic, loss, in one run.

  python benchmarks/train_step.py [--size S] [--rows 1] [--frames 5 --side 16] [--bfloat16] [--compile] [--json OUT]

Both sides train the same network (weights copied from ours; the losses must agree) on the same batch with AdamW and
report the best step as a fraction of the matrix-product peak that the same library reaches in this run. Rounds
alternate between the sides, so that a slow spell of the machine meets all of them. PyTorch runs eagerly with its
scaled_dot_product_attention, and with --compile also through torch.compile; on a GPU where both libraries see one.
CPU seconds (of all threads) stand beside the time on the clock: on a machine that is shared they say more.
"""

import argparse
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kling_jax.errors import UsageError
from kling_jax.models import flops, video_dit
from kling_jax.nn import params as params_lib
from kling_jax.train import allocator, peak

FRAMES, SIDE, TEXT = 5, 16, 64  # latents of a 17-frame clip; text tokens
TEXT_WIDTH = 256


def inputs(
  config: video_dit.VideoDiTConfig, rows: int, frames: int = FRAMES, side: int = SIDE, text: int = TEXT
) -> dict[str, np.ndarray]:
  draw = np.random.default_rng(0)
  shape = (rows, frames, side, side, config.latent_channels)
  return {
    "x": draw.normal(size=shape).astype(np.float32),
    "target": draw.normal(size=shape).astype(np.float32),
    "time": draw.uniform(size=rows).astype(np.float32),
    "text": draw.normal(size=(rows, text, TEXT_WIDTH)).astype(np.float32),
  }


class Ours:
  """The module library, scanned layers, optax AdamW, one donated jit."""

  def __init__(self, config: video_dit.VideoDiTConfig, batch: dict[str, np.ndarray], dtype: str = "float32"):
    self.dtype = dtype
    init = lambda: video_dit.VideoDiT(config, rngs=nnx.Rngs(0))
    self.graph, _, _ = params_lib.abstract(init)
    params = params_lib.create(init)
    # Every gate open and the head non-zero: at the zero start of AdaLN most of the network would be idle.
    draw = np.random.default_rng(1)
    noisy = ("modulation", "head")
    self.params = {
      name: jnp.asarray(draw.normal(size=value.shape) * 0.02, jnp.float32) if name.startswith(noisy) else value
      for name, value in params.items()
    }
    self.start = {name: np.array(value) for name, value in self.params.items()}
    self.tx = optax.adamw(1e-4, weight_decay=0.0)
    self.opt = self.tx.init(self.params)
    self.batch = {name: jnp.asarray(value) for name, value in batch.items()}
    self._step = jax.jit(self._update, donate_argnums=(0, 1))

  def _loss(self, params, batch):
    model = params_lib.merge(self.graph, params)
    prediction = model(batch["x"].astype(self.dtype), batch["time"], batch["text"])
    return jnp.mean((prediction - batch["target"]) ** 2)

  def _update(self, params, opt, batch):
    loss, gradient = jax.value_and_grad(self._loss)(params, batch)
    updates, opt = self.tx.update(gradient, opt, params)
    return optax.apply_updates(params, updates), opt, loss

  def step(self) -> float:
    self.params, self.opt, loss = self._step(self.params, self.opt, self.batch)
    return float(loss)


class Torch:
  """The same network restated in plain PyTorch: F.linear, SDPA, fused AdamW; bfloat16 by autocast."""

  def __init__(
    self, config: video_dit.VideoDiTConfig, batch: dict[str, np.ndarray], start: dict[str, np.ndarray],
    dtype: str = "float32", compiled: bool = False,
  ):  # fmt: skip
    import torch

    self.torch, self.config, self.dtype = torch, config, getattr(torch, dtype)
    self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    self.p = {}
    for name, value in start.items():
      parts = enumerate(value) if name.startswith("blocks.") else [(None, value)]
      for layer, array in parts:
        key = name if layer is None else f"{layer}.{name.removeprefix('blocks.')}"
        turned = torch.tensor(array.T if name.endswith("kernel") else array, device=self.device)
        self.p[key] = turned.contiguous().requires_grad_()
    self.batch = {name: torch.tensor(value, device=self.device) for name, value in batch.items()}
    self.adamw = torch.optim.AdamW(list(self.p.values()), lr=1e-4, weight_decay=0.0, fused=True)
    self.run = torch.compile(self.predict) if compiled else self.predict

  def linear(self, x, name):
    return self.torch.nn.functional.linear(x, self.p[f"{name}.kernel"], self.p[f"{name}.bias"])

  def sinusoid(self, value):
    torch = self.torch
    angle = value[..., None] * 10_000.0 ** (-torch.arange(128, device=self.device) / 128)
    return torch.cat([angle.cos(), angle.sin()], -1)

  def rotate(self, x, grid):
    torch = self.torch
    size = x.shape[-1]
    spatial = 2 * (size // 6)
    parts = []
    for axis, (length, width) in enumerate(zip(grid, (size - 2 * spatial, spatial, spatial), strict=True)):
      place, pair = (torch.arange(*given, device=self.device) for given in ((length,), (0, width, 2)))
      angle = place[:, None] * 10_000.0 ** (-pair / width)
      shape = [1, 1, 1, width // 2]
      shape[axis] = length
      parts.append(angle.reshape(shape).expand(*grid, width // 2))
    angle = torch.cat(parts, -1).reshape(1, 1, -1, size // 2)
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)

  def attention(self, x, context, layer, name, grid=None):
    functional = self.torch.nn.functional
    prefix = f"{layer}.{name}"
    heads = lambda y: y.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
    scale = lambda which: self.p[f"{prefix}.{which}_norm.scale"]
    norm = lambda y, which: functional.rms_norm(y.float(), y.shape[-1:], scale(which), 1e-6).to(y.dtype)
    q = heads(norm(self.linear(x, f"{prefix}.q"), "q"))
    k = heads(norm(self.linear(context, f"{prefix}.k"), "k"))
    v = heads(self.linear(context, f"{prefix}.v"))
    if grid is not None:
      q, k = self.rotate(q, grid), self.rotate(k, grid)
    return self.linear(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2), f"{prefix}.out")

  def predict(self, x, time, text):
    """The network: latents, times and text to the prediction, float32."""
    functional = self.torch.nn.functional
    c, p, shape = self.config, self.p, x.shape
    frames, side = shape[1], shape[2] // 2
    grid = (frames, side, side)
    x = x.reshape(-1, frames, side, 2, side, 2, c.latent_channels).permute(0, 1, 2, 4, 3, 5, 6)
    x = self.linear(x.reshape(x.shape[0], frames * side * side, -1), "patch.project")
    with self.torch.autocast(self.device, enabled=False):
      e = self.linear(functional.silu(self.linear(self.sinusoid(1000 * time), "time.into")), "time.out")
      e = e + sum(p[f"conditions.{name}.null"] for name in c.conditions)
      rows = self.linear(functional.silu(e), "modulation.out").unflatten(-1, (6, c.width))
    text = self.linear(functional.gelu(self.linear(text, "text.into"), approximate="tanh"), "text.out")
    plain = lambda y: functional.layer_norm(y, y.shape[-1:], eps=1e-6)
    for layer in range(c.depth):
      m = (rows + p[f"{layer}.modulation.table"]).unsqueeze(2).unbind(1)
      h = plain(x) * (1 + m[1]) + m[0]
      x = x + self.attention(h, h, layer, "self_attn", grid) * m[2]
      norm = functional.layer_norm(x, x.shape[-1:], p[f"{layer}.cross_norm.scale"], p[f"{layer}.cross_norm.bias"], 1e-6)
      x = x + self.attention(norm, text, layer, "cross_attn")
      h = functional.gelu(self.linear(plain(x) * (1 + m[4]) + m[3], f"{layer}.mlp.up"), approximate="tanh")
      x = x + self.linear(h, f"{layer}.mlp.down") * m[5]
    shift, scale = (e[:, None] + p["head.modulation.table"]).unsqueeze(2).unbind(1)
    with self.torch.autocast(self.device, enabled=False):
      y = self.linear(plain(x.float()) * (1 + scale) + shift, "head.project")
    return y.reshape(-1, frames, side, side, 2, 2, c.latent_channels).permute(0, 1, 2, 4, 3, 5, 6).reshape(shape)

  def prediction(self, x, time, text):
    with self.torch.autocast(self.device, self.dtype, enabled=self.dtype != self.torch.float32):
      return self.run(x, time, text)

  def step(self) -> float:
    b = self.batch
    loss = self.torch.nn.functional.mse_loss(self.prediction(b["x"], b["time"], b["text"]), b["target"])
    loss.backward()
    self.adamw.step()
    self.adamw.zero_grad(set_to_none=True)
    return float(loss.detach())

  def gemm(self, size: int = 1024, repeats: int = 8) -> float:
    """FLOP/s of the best square product; of 8192 on a GPU, where small ones are all overhead."""
    size = size if self.device == "cpu" else 8192
    x = self.torch.ones(size, size, device=self.device, dtype=self.dtype)
    times = []
    for _ in range(repeats + 1):
      start = time.perf_counter()
      float((x @ x)[0, 0])
      times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def race(sides: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
  """(seconds on the clock, CPU seconds): the best of `rounds` calls of each side, taking turns."""
  best, cpu = dict.fromkeys(sides, math.inf), dict.fromkeys(sides, math.inf)
  for _ in range(rounds):
    for name, call in sides.items():
      start, cpu_start = time.perf_counter(), time.process_time()
      call()
      best[name] = min(best[name], time.perf_counter() - start)
      cpu[name] = min(cpu[name], time.process_time() - cpu_start)
  return best, cpu


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="S")
  parser.add_argument("--rows", type=int, default=1)
  parser.add_argument("--frames", type=int, default=FRAMES, help="latent frames")
  parser.add_argument("--side", type=int, default=SIDE, help="latent rows and columns")
  parser.add_argument("--text", type=int, default=TEXT, help="text tokens")
  parser.add_argument("--bfloat16", action="store_true")
  parser.add_argument("--compile", action="store_true", help="also torch.compile")
  parser.add_argument("--steps", type=int, default=5)
  parser.add_argument("--json")
  args = parser.parse_args()
  try:
    import torch
  except ImportError as error:
    raise UsageError("the PyTorch side is not installed: pip install 'kling_jax[bench]'") from error

  allocator.keep_freed_memory()
  dtype = "bfloat16" if args.bfloat16 else "float32"
  config = video_dit.preset(args.size, text_width=TEXT_WIDTH)
  batch = inputs(config, args.rows, args.frames, args.side, args.text)
  ours = Ours(config, batch, dtype)
  sides: dict[str, Any] = {"kling_jax": ours, "pytorch": Torch(config, batch, ours.start, dtype)}
  if args.compile:
    sides["torch.compile"] = Torch(config, batch, ours.start, dtype, compiled=True)
  losses, first_s = {}, {}
  for name, side in sides.items():
    start = time.perf_counter()
    losses[name] = [side.step()]
    first_s[name] = time.perf_counter() - start
    if not math.isclose(losses[name][0], losses["kling_jax"][0], rel_tol=1e-4 if dtype == "float32" else 2e-2):
      raise SystemExit(f"the sides do not compute the same loss: {losses}")

  def gemm(side: Any) -> float:
    size = 1024 if jax.default_backend() == "cpu" else 8192
    return peak.measured_gemm(size, dtype=dtype) if side is ours else side.gemm()

  peaks = {name: gemm(side) for name, side in sides.items()}
  best, cpu = race(
    {name: lambda name=name, side=side: losses[name].append(side.step()) for name, side in sides.items()}, args.steps
  )
  peaks = {name: max(peaks[name], gemm(side)) for name, side in sides.items()}
  step_flops = 3 * args.rows * flops.video_dit_forward(config, args.frames, args.side, args.side, args.text)
  tokens = args.rows * args.frames * (args.side // 2) ** 2
  print(f"Video DiT {args.size}, {args.rows} x {tokens // args.rows} tokens, {dtype}, AdamW, "
        f"{step_flops / 1e9:.1f} GFLOP a step, {jax.devices()[0].device_kind}; jax {jax.__version__}, "
        f"torch {torch.__version__}")  # fmt: skip
  print(f"{'':14} {'step s':>8} {'CPU s':>7} {'tokens/s':>9} {'GFLOP/s':>8} {'GEMM peak':>9} {'of peak':>8} "
        f"{'first s':>8} {'last loss':>10}")  # fmt: skip
  for name in best:
    rate = step_flops / best[name]
    print(f"{name:14} {best[name]:8.3f} {cpu[name]:7.3f} {tokens / best[name]:9.0f} {rate / 1e9:8.1f} "
          f"{peaks[name] / 1e9:9.1f} {rate / peaks[name]:8.1%} {first_s[name]:8.1f} "
          f"{losses[name][-1]:10.6f}")  # fmt: skip
  for name in list(best)[1:]:
    print(f"kling_jax takes {best['kling_jax'] / best[name]:.2f} x the time of {name}, "
          f"{cpu['kling_jax'] / cpu[name]:.2f} x its CPU seconds")  # fmt: skip
  result = {"size": args.size, "rows": args.rows, "tokens": tokens, "dtype": dtype, "step_flops": step_flops,
            "step_s": best, "cpu_s": cpu, "gemm_flops": peaks, "first_s": first_s, "losses": losses,
            "ratio": {name: best["kling_jax"] / best[name] for name in best}}  # fmt: skip
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
  main()
