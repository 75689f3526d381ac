"""The smallest model that has every part (text, score, context latents, state), on any mesh."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kling_jax.models.text_encoder import ByteTextEncoder
from kling_jax.models.video_dit import VideoDiT, VideoDiTConfig
from kling_jax.nn import lowering
from kling_jax.nn import params as params_lib
from kling_jax.train import sharding
from kling_jax.train.attention import Choice

# 8 heads and 8 rows, so that each axis may take all of 8 devices; layers are scanned and recomputed.
CONFIG = VideoDiTConfig(
  width=64, depth=2, heads=8, mlp_width=128, latent_channels=4, text_width=32, conditions=("motion",),
  state_width=16, remat="full",
)  # fmt: skip
ROWS, TEXT, STATES, SIDE = 8, 12, 8, 8
TOKENS = 3 * (SIDE // 2) ** 2  # one context frame and two that are predicted

# Programs here run once: the CPU compiler's slow passes are left out (a third of the time).
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


class Whole(nnx.Module):
  def __init__(self, config: VideoDiTConfig, text: int, *, rngs: nnx.Rngs):
    self.dit = VideoDiT(config, rngs=rngs)
    self.text = ByteTextEncoder(config.text_width, 1, text, heads=8, rngs=rngs)

  def __call__(self, batch: Mapping[str, jax.Array], dtype: Any) -> jax.Array:
    text_BLD = self.text(batch["tokens"], batch["tokens_mask"], dtype=dtype)
    return self.dit(
      batch["x"].astype(dtype), batch["time"], text_BLD, text_mask_BL=batch["tokens_mask"],
      scores_BM=batch["scores"], scores_known_BM=batch["known"], context_BTHWC=batch["context"].astype(dtype),
      state_BQD=batch["state"].astype(dtype),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Size:
  """Of the model and its batch."""

  config: VideoDiTConfig = CONFIG
  rows: int = ROWS
  text: int = TEXT
  states: int = STATES
  side: int = SIDE

  @functools.cached_property
  def described(self) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    return params_lib.abstract(lambda: Whole(self.config, self.text, rngs=nnx.Rngs(0)))

  def batch(self) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    normal = lambda *shape: draw.standard_normal((self.rows, *shape)).astype(np.float32)
    frames = lambda count: normal(count, self.side, self.side, self.config.latent_channels)
    return {
      "x": frames(2),
      "context": frames(1),
      "target": frames(2),
      "time": draw.uniform(size=(self.rows, 2)).astype(np.float32),
      "tokens": draw.integers(0, 259, (self.rows, self.text)).astype(np.int32),
      "tokens_mask": np.arange(self.text) < draw.integers(3, self.text, (self.rows, 1)),
      "scores": 1000 * draw.uniform(size=(self.rows, 1)).astype(np.float32),
      "known": np.arange(self.rows)[:, None] % 2 == 0,
      "state": normal(self.states, self.config.state_width or 1),
    }

  def weights(self) -> dict[str, np.ndarray]:
    """Every parameter away from its initial value, so that no gate is closed and nothing is a no-op."""
    draw = np.random.default_rng(0)
    found = {}
    for name, leaf in self.described[1].items():
      noise = draw.standard_normal(leaf.shape).astype(np.float32)
      found[name] = noise / np.sqrt(leaf.shape[-2]) if name.endswith("kernel") else 0.3 * noise + name.endswith("scale")
    return found


SMALL = Size()


def make_mesh(replica: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> jax.sharding.Mesh:
  sizes = (replica, fsdp, context, tensor)
  return sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)])


def lowered(
  mesh: jax.sharding.Mesh, size: Size = SMALL, dtype: Any = jnp.float32, choice: Choice = Choice(),
  gradient: Any = jnp.float32,
) -> jax.stages.Lowered:  # fmt: skip
  """Loss and gradients of one step, lowered for `mesh`."""
  graph, shapes, axes = size.described
  stored = sharding.parameter_shardings(mesh, shapes, axes)

  def loss(weights: Any, batch: Any) -> jax.Array:
    with sharding.activations(mesh, gradient, choice):
      return jnp.mean((params_lib.merge(graph, weights)(batch, dtype) - batch["target"]) ** 2)

  step = jax.jit(
    jax.value_and_grad(loss),
    in_shardings=(stored, sharding.batch_sharding(mesh)),
    out_shardings=(None, stored),
    compiler_options=QUICK if lowering.platform() == "cpu" else None,
  )
  return step.lower(shapes, jax.eval_shape(size.batch))


def loss_and_gradients(compiled: jax.stages.Compiled) -> tuple[float, dict[str, np.ndarray]]:
  """Of `SMALL` in float32, worked out by the program that `lowered` and the compiler made."""
  weights_at, rows_at = compiled.input_shardings[0]
  given = jax.device_put((SMALL.weights(), SMALL.batch()), (weights_at, rows_at))
  loss, gradients = compiled(*given)
  return float(loss), jax.tree.map(np.asarray, gradients)
