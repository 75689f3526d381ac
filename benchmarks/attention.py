"""The attention roads of this machine side by side, and PyTorch's where it is installed: same arrays, in one run.

  python benchmarks/attention.py [--tokens 1024,2048,4096] [--rounds 4] [--json OUT]

Self-attention of 1 row, 8 heads of 64, float32. All answers and gradients must agree. Rounds alternate between the
roads, so that a slow spell of the machine meets all of them; the best round counts. `of peak` is the arithmetic of the
definition (4 N^2 E flops a head forward, 14 N^2 E with gradients, whatever a road repeats) against the best matrix
product of the same library in this run; `memory` is the compiled program's temporary memory with gradients.
"""

import argparse
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from kling_jax.nn import lowering
from kling_jax.nn.attention import attention
from kling_jax.train import peak

HEADS, SIZE = 8, 64
OWN = {"cpu": ("reference", "blockwise"), "gpu": ("reference", "blockwise")}  # cuDNN does not take float32
OWN["tpu"] = (*OWN["cpu"], "splash")


class Jax:
  """A road of `nn.attention`, or JAX's own function ("jax.nn")."""

  def __init__(self, road: str, arrays: list[np.ndarray]):
    self.arrays = [jnp.asarray(x) for x in arrays]
    attend = jax.nn.dot_product_attention if road == "jax.nn" else lambda q, k, v: attention(q, k, v, road=road)
    self.forward = jax.jit(lambda q, k, v, g: attend(q, k, v))
    self.both = jax.jit(lambda q, k, v, g: jax.grad(lambda *x: jnp.sum(g * attend(*x)), (0, 1, 2))(q, k, v))
    self.memory = self.both.lower(*self.arrays).compile().memory_analysis().temp_size_in_bytes
    self.gemm = peak.measured_gemm

  def run(self, gradients: bool) -> list[np.ndarray]:
    return jax.tree.map(np.asarray, jax.tree.leaves((self.both if gradients else self.forward)(*self.arrays)))


class Torch:
  """F.scaled_dot_product_attention, eager."""

  memory = None

  def __init__(self, arrays: list[np.ndarray]):
    import torch

    self.torch = torch
    *self.qkv, self.g = (torch.tensor(x).transpose(1, 2).contiguous() for x in arrays)

  def run(self, gradients: bool) -> list[np.ndarray]:
    torch = self.torch
    qkv = [x.detach().requires_grad_(gradients) for x in self.qkv]
    with torch.set_grad_enabled(gradients):
      o = torch.nn.functional.scaled_dot_product_attention(*qkv)
    results = torch.autograd.grad(o, qkv, self.g) if gradients else (o,)
    return [x.transpose(1, 2).numpy() for x in results]

  def gemm(self, size: int = 1024, repeats: int = 8) -> float:
    x, best = self.torch.ones(size, size), math.inf
    for _ in range(repeats + 1):
      start = time.perf_counter()
      x @ x
      best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def measure(tokens: int, rounds: int) -> list[dict]:
  """One row a road and pass."""
  draw = np.random.default_rng(0)
  arrays = [draw.standard_normal((1, tokens, HEADS, SIZE)).astype(np.float32) for _ in range(4)]
  sides = {road: Jax(road, arrays) for road in (*OWN[lowering.platform()], "jax.nn")}
  try:
    sides["pytorch"] = Torch(arrays)
  except ImportError:
    print("PyTorch is not installed (pip install 'kling_jax[bench]'): left out")
  rows = []
  for gradients in (False, True):
    answers = {name: side.run(gradients) for name, side in sides.items()}
    for name, answer in answers.items():
      for a, b in zip(answer, answers["reference"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)
    best, gemm = dict.fromkeys(sides, math.inf), dict.fromkeys(sides, 0.0)
    for _ in range(rounds):
      for name, side in sides.items():
        gemm[name] = max(gemm[name], side.gemm())
        start = time.perf_counter()
        side.run(gradients)
        best[name] = min(best[name], time.perf_counter() - start)
    flops = (14 if gradients else 4) * tokens**2 * SIZE * HEADS
    fastest = min(best["reference"], best["blockwise"])
    for name, seconds in best.items():
      rows.append({
        "tokens": tokens, "pass": "forward + backward" if gradients else "forward", "road": name, "seconds": seconds,
        "ratio": seconds / fastest, "of_peak": flops / seconds / gemm[name], "gemm_flops": gemm[name],
        "memory_bytes": sides[name].memory,
      })  # fmt: skip
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tokens", default="1024,2048,4096")
  parser.add_argument("--rounds", type=int, default=4)
  parser.add_argument("--json", help="file to write")
  args = parser.parse_args()
  rows = []
  print(f"{'N':>6} {'pass':19} {'road':10} {'ms':>8} {'ratio':>6} {'of peak':>8} {'memory':>10}")
  for tokens in map(int, args.tokens.split(",")):
    for row in measure(tokens, args.rounds):
      rows.append(row)
      memory = "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:.1f} MiB"
      print(f"{tokens:6} {row['pass']:19} {row['road']:10} {1e3 * row['seconds']:8.1f} {row['ratio']:6.2f} "
            f"{row['of_peak']:8.1%} {memory:>10}", flush=True)  # fmt: skip
  print(f"ratio: to the faster of this project's roads; jax {jax.__version__} on {jax.devices()[0].device_kind}")
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(rows, file, indent=1)


if __name__ == "__main__":
  main()
