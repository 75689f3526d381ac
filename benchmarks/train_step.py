"""One Video DiT training step, this project beside plain PyTorch: same shapes, weights, arithmetic, loss, in one run.

  python benchmarks/train_step.py [--size S] [--rows 1] [--steps 5] [--json OUT]

Both sides train the same network (weights copied from ours; the losses must agree) on the same batch with AdamW in
float32 and report the best step as a fraction of the matrix-product peak that the same library reaches in this run.
Rounds alternate between the two, so that a slow spell of the machine meets both.
"""

import argparse
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from kling_jax.errors import UsageError
from kling_jax.models import flops, video_dit
from kling_jax.nn import params as params_lib
from kling_jax.train import peak

FRAMES, SIDE, TEXT = 5, 16, 64  # latents of a 17-frame clip; text tokens
TEXT_WIDTH = 256


def inputs(config: video_dit.VideoDiTConfig, rows: int) -> dict[str, np.ndarray]:
  draw = np.random.default_rng(0)
  shape = (rows, FRAMES, SIDE, SIDE, config.latent_channels)
  return {
    "x": draw.normal(size=shape).astype(np.float32),
    "target": draw.normal(size=shape).astype(np.float32),
    "time": draw.uniform(size=rows).astype(np.float32),
    "text": draw.normal(size=(rows, TEXT, TEXT_WIDTH)).astype(np.float32),
  }


class Ours:
  """The module library, scanned layers, optax AdamW, one donated jit."""

  def __init__(self, config: video_dit.VideoDiTConfig, batch: dict[str, np.ndarray]):
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
    prediction = model(batch["x"], batch["time"], batch["text"])
    return jnp.mean((prediction - batch["target"]) ** 2)

  def _update(self, params, opt, batch):
    loss, gradient = jax.value_and_grad(self._loss)(params, batch)
    updates, opt = self.tx.update(gradient, opt, params)
    return optax.apply_updates(params, updates), opt, loss

  def step(self) -> float:
    self.params, self.opt, loss = self._step(self.params, self.opt, self.batch)
    return float(loss)


class Torch:
  """The same network restated in plain PyTorch: F.linear, SDPA, fused AdamW, eager."""

  def __init__(self, config: video_dit.VideoDiTConfig, batch: dict[str, np.ndarray], start: dict[str, np.ndarray]):
    import torch

    self.torch, self.config = torch, config
    self.p = {}
    for name, value in start.items():
      parts = enumerate(value) if name.startswith("blocks.") else [(None, value)]
      for layer, array in parts:
        key = name if layer is None else f"{layer}.{name.removeprefix('blocks.')}"
        self.p[key] = torch.tensor(array.T if name.endswith("kernel") else array).contiguous().requires_grad_()
    self.batch = {name: torch.tensor(value) for name, value in batch.items()}
    self.adamw = torch.optim.AdamW(list(self.p.values()), lr=1e-4, weight_decay=0.0, fused=True)

  def linear(self, x, name):
    return self.torch.nn.functional.linear(x, self.p[f"{name}.kernel"], self.p[f"{name}.bias"])

  def sinusoid(self, value):
    torch = self.torch
    angle = value[..., None] * 10_000.0 ** (-torch.arange(128) / 128)
    return torch.cat([angle.cos(), angle.sin()], -1)

  def rotate(self, x):
    torch = self.torch
    size = x.shape[-1]
    spatial = 2 * (size // 6)
    grid = (FRAMES, SIDE // 2, SIDE // 2)
    parts = []
    for axis, (length, width) in enumerate(zip(grid, (size - 2 * spatial, spatial, spatial), strict=True)):
      angle = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
      shape = [1, 1, 1, width // 2]
      shape[axis] = length
      parts.append(angle.reshape(shape).expand(*grid, width // 2))
    angle = torch.cat(parts, -1).reshape(1, 1, -1, size // 2)
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)

  def attention(self, x, context, layer, name, rotary):
    functional = self.torch.nn.functional
    prefix = f"{layer}.{name}"
    heads = lambda y: y.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)
    norm = lambda y, which: functional.rms_norm(y, y.shape[-1:], self.p[f"{prefix}.{which}_norm.scale"], 1e-6)
    q = heads(norm(self.linear(x, f"{prefix}.q"), "q"))
    k = heads(norm(self.linear(context, f"{prefix}.k"), "k"))
    v = heads(self.linear(context, f"{prefix}.v"))
    if rotary:
      q, k = self.rotate(q), self.rotate(k)
    return self.linear(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2), f"{prefix}.out")

  def forward(self):
    functional = self.torch.nn.functional
    c, b, p = self.config, self.batch, self.p
    side = SIDE // 2
    x = b["x"].reshape(-1, FRAMES, side, 2, side, 2, c.latent_channels).permute(0, 1, 2, 4, 3, 5, 6)
    x = self.linear(x.reshape(x.shape[0], FRAMES * side * side, -1), "patch.project")
    e = self.linear(functional.silu(self.linear(self.sinusoid(1000 * b["time"]), "time.into")), "time.out")
    e = e + sum(p[f"conditions.{name}.null"] for name in c.conditions)
    rows = self.linear(functional.silu(e), "modulation.out").unflatten(-1, (6, c.width))
    text = self.linear(functional.gelu(self.linear(b["text"], "text.into"), approximate="tanh"), "text.out")
    plain = lambda y: functional.layer_norm(y, y.shape[-1:], eps=1e-6)
    for layer in range(c.depth):
      m = (rows + p[f"{layer}.modulation.table"]).unsqueeze(2).unbind(1)
      h = plain(x) * (1 + m[1]) + m[0]
      x = x + self.attention(h, h, layer, "self_attn", True) * m[2]
      norm = functional.layer_norm(x, x.shape[-1:], p[f"{layer}.cross_norm.scale"], p[f"{layer}.cross_norm.bias"], 1e-6)
      x = x + self.attention(norm, text, layer, "cross_attn", False)
      h = functional.gelu(self.linear(plain(x) * (1 + m[4]) + m[3], f"{layer}.mlp.up"), approximate="tanh")
      x = x + self.linear(h, f"{layer}.mlp.down") * m[5]
    shift, scale = (e[:, None] + p["head.modulation.table"]).unsqueeze(2).unbind(1)
    y = self.linear(plain(x) * (1 + scale) + shift, "head.project")
    y = y.reshape(-1, FRAMES, side, side, 2, 2, c.latent_channels).permute(0, 1, 2, 4, 3, 5, 6)
    return functional.mse_loss(y.reshape(b["target"].shape), b["target"])

  def step(self) -> float:
    loss = self.forward()
    loss.backward()
    self.adamw.step()
    self.adamw.zero_grad(set_to_none=True)
    return float(loss.detach())

  def gemm(self, size: int = 1024, repeats: int = 8) -> float:
    x = self.torch.ones(size, size)
    times = []
    for _ in range(repeats + 1):
      start = time.perf_counter()
      x @ x
      times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="S")
  parser.add_argument("--rows", type=int, default=1)
  parser.add_argument("--steps", type=int, default=5)
  parser.add_argument("--json")
  args = parser.parse_args()
  try:
    import torch
  except ImportError as error:
    raise UsageError("the PyTorch side is not installed: pip install 'kling_jax[bench]'") from error

  config = video_dit.preset(args.size, text_width=TEXT_WIDTH)
  batch = inputs(config, args.rows)
  ours = Ours(config, batch)
  theirs = Torch(config, batch, ours.start)
  compile_start = time.perf_counter()
  losses = {"kling_jax": [ours.step()], "pytorch": []}
  compile_s = time.perf_counter() - compile_start
  losses["pytorch"].append(theirs.step())
  if not math.isclose(losses["kling_jax"][0], losses["pytorch"][0], rel_tol=1e-4):
    raise SystemExit(f"the two sides do not compute the same loss: {losses}")

  best = {"kling_jax": math.inf, "pytorch": math.inf}
  gemm = {"kling_jax": 0.0, "pytorch": 0.0}
  for _ in range(args.steps):
    for name, side in (("kling_jax", ours), ("pytorch", theirs)):
      gemm[name] = max(gemm[name], peak.measured_gemm() if side is ours else theirs.gemm())
      start = time.perf_counter()
      losses[name].append(side.step())
      best[name] = min(best[name], time.perf_counter() - start)
  step_flops = 3 * args.rows * flops.video_dit_forward(config, FRAMES, SIDE, SIDE, TEXT)
  tokens = args.rows * FRAMES * (SIDE // 2) ** 2

  print(f"Video DiT {args.size}, {args.rows} x {tokens // args.rows} tokens, float32, AdamW, "
        f"{step_flops / 1e9:.1f} GFLOP a step; jax {jax.__version__}, torch {torch.__version__}")  # fmt: skip
  print(f"{'':10} {'step s':>8} {'tokens/s':>9} {'GFLOP/s':>8} {'GEMM peak':>9} {'of peak':>8} {'last loss':>10}")
  for name in best:
    rate = step_flops / best[name]
    print(f"{name:10} {best[name]:8.3f} {tokens / best[name]:9.0f} {rate / 1e9:8.1f} {gemm[name] / 1e9:9.1f} "
          f"{rate / gemm[name]:8.1%} {losses[name][-1]:10.6f}")  # fmt: skip
  ratio = best["kling_jax"] / best["pytorch"]
  print(f"kling_jax takes {ratio:.2f} x the time of PyTorch (first call incl. compilation: {compile_s:.1f} s)")
  result = {"size": args.size, "rows": args.rows, "step_flops": step_flops, "step_s": best, "gemm_flops": gemm,
            "ratio": ratio, "compile_s": compile_s, "losses": losses}  # fmt: skip
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(result, file, indent=1)


if __name__ == "__main__":
  main()
