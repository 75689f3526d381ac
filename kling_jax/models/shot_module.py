"""The splitter's network as a module that trains; what it computes stands in `shot_net`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.models import shot_net
from kling_jax.nn.linear import Linear

# Of the initial kernels, in units of He's; residual branches start small.
_SCALES = (
  {"head": 0.1}
  | {f"time{d}": 0.3 for d in shot_net.DILATIONS}
  | {f"cells.time{d}": 0.4 for d in shot_net.CELL_DILATIONS}
)


class ShotNet(nnx.Module):
  """The dense layers of `shot_net.layers`, and `shot_net.forward` over them."""

  def __init__(self, *, rngs: nnx.Rngs):
    he = lambda scale: jax.nn.initializers.variance_scaling(2 * scale * scale, "fan_in", "normal")
    self.dense = nnx.Dict(
      {
        shot_net.key(name): Linear(
          *shape, axes=(None, None), init=he(_SCALES.get(name, 0.7)), use_bias=name != "cells.next", rngs=rngs
        )
        for name, shape in shot_net.layers().items()
      }
    )

  def __call__(self, thumbnails_BTC: jax.Array, histograms_BTC: jax.Array) -> jax.Array:
    """(B, T, 3072) uint8 and (B, T, 42) -> logits (B, T - 1, 6)."""
    dense: Any = lambda name, x: self.dense[shot_net.key(name)](x)
    return shot_net.forward(jnp, dense, thumbnails_BTC, histograms_BTC)
