"""AdaLN-zero in Wan 2.1's form: one MLP for all blocks makes shift, scale and gate; each block adds a learned table.

Rows are (B, T, R, D): T is 1 where a sample has one time, or the number of latent frames where each frame has its own.
Tokens are laid out frame by frame, so a row meets its frame's tokens by broadcasting over (B, T, N/T, D); nothing of
size (B, N, R, D) is ever made. All of it is float32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kling_jax.nn import partition
from kling_jax.nn.linear import Linear, zeros
from kling_jax.nn.norm import layer_norm
from kling_jax.nn.weights import used


class ModulationMLP(nnx.Module):
  """rows = Linear(silu(e)), zero at the start so that every gate is closed (DiT's AdaLN-zero)."""

  def __init__(self, width: int, rows: int, *, rngs: nnx.Rngs):
    self.rows = rows
    self.out = Linear(width, rows * width, axes=("embed", "modulation"), init=zeros, rngs=rngs)

  def __call__(self, e_BTD: jax.Array) -> jax.Array:
    """Maps embeddings (B, T, D) to rows (B, T, R, D)."""
    return self.out(jax.nn.silu(e_BTD)).reshape(*e_BTD.shape[:-1], self.rows, -1)


class ModulationTable(nnx.Module):
  """A learned table (R, D) added to rows that all blocks share, or to the embedding itself (Wan's head)."""

  def __init__(self, width: int, rows: int):
    self.axes = (None, "modulation")  # small: whole on every device, like the rows that it is added to
    self.table = nnx.Param(jnp.zeros((rows, width), jnp.float32), axes=self.axes)

  def __call__(self, rows_BTRD: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the R rows, each (B, T, D)."""
    rows = rows_BTRD + used(self.table[...], self.axes, jnp.float32)
    return tuple(rows[..., r, :] for r in range(self.table.shape[0]))


def spread(rows: jax.Array, tokens: int) -> jax.Array:
  """Rows of frames (B, T, ...) as rows of cells (B, cells, ...): runs of tokens within one frame and one device.

  Where a trainer cuts the tokens into parts that are no whole frames, a layout by frame would have to be gathered;
  cells of gcd(tokens of a frame, tokens of a part) tokens never are. Everywhere else a cell is a frame.
  """
  frames, parts = rows.shape[1], partition.parts("tokens")
  if frames == 1 or parts == 1:
    return rows
  frame = tokens // frames
  cell = math.gcd(frame, tokens // parts)
  of_cell = np.arange(tokens // cell) * cell // frame
  axes = ("batch", "tokens", *[None] * (rows.ndim - 2))
  return partition.constrain(partition.constrain(rows, ("batch", *[None] * (rows.ndim - 1)))[:, of_cell], axes)


def _by_frame(x_BND: jax.Array, frames: int) -> jax.Array:
  batch, tokens, width = x_BND.shape
  return x_BND.reshape(batch, frames, tokens // frames, width)


def modulate(x_BND: jax.Array, shift_BTD: jax.Array, scale_BTD: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """layer_norm(x) * (1 + scale) + shift, in the dtype of `x`."""
  normal = _by_frame(layer_norm(x_BND, epsilon), shift_BTD.shape[1])
  y = normal * (1 + scale_BTD[:, :, None]) + shift_BTD[:, :, None]
  return y.reshape(x_BND.shape).astype(x_BND.dtype)


def add_gated(x_BND: jax.Array, y_BND: jax.Array, gate_BTD: jax.Array) -> jax.Array:
  """x + y * gate, in the dtype of `x`."""
  gated = _by_frame(y_BND.astype(jnp.float32), gate_BTD.shape[1]) * gate_BTD[:, :, None]
  return (x_BND + gated.reshape(x_BND.shape)).astype(x_BND.dtype)
