"""What enters the network: times and scores as frequencies, latents as patches, text as projected tokens."""

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.nn.linear import Linear, normal, zeros
from kling_jax.nn.weights import used

FREQUENCIES = 256


def sinusoid(value: jax.Array, size: int = FREQUENCIES) -> jax.Array:
  """Frequency embedding (..., size) of a number, in Wan 2.1's order: all cosines, then all sines.

  Frequencies are 10000^(-2i/size), so numbers should spread over about [0, 1000].
  """
  half = size // 2
  angle = value.astype(jnp.float32)[..., None] * 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedding(nnx.Module):
  """Time in [0, 1] (0 clean, 1 pure noise) -> sinusoid of 1000 * time -> Linear, SiLU, Linear; float32."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.into = Linear(FREQUENCIES, width, axes=(None, "embed"), init=normal(0.02), rngs=rngs)
    self.out = Linear(width, width, axes=("embed", "modulation"), init=normal(0.02), rngs=rngs)

  def __call__(self, time_BT: jax.Array) -> jax.Array:
    """Maps (B, T) to (B, T, D)."""
    return self.out(jax.nn.silu(self.into(sinusoid(1000.0 * time_BT.astype(jnp.float32)))))


class ScoreEmbedding(nnx.Module):
  """One number told to the network (a Koala-36M score in [0, 1000], or frames per second), to be added to the time's.

  Its last layer and its null vector start at zero: at step 0 the network is the one without the score.
  """

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.into = Linear(FREQUENCIES, width, axes=(None, "embed"), init=normal(0.02), rngs=rngs)
    self.out = Linear(width, width, axes=("embed", "modulation"), init=zeros, rngs=rngs)
    self.null = nnx.Param(jnp.zeros(width, jnp.float32), axes=("modulation",))

  def __call__(self, value: jax.Array, known: jax.Array) -> jax.Array:
    """Maps values (B,) or (B, T) to (..., D); the learned null vector where `known` is False, whatever the value is."""
    value = jnp.where(known, value, 0.0)  # an unknown value may be NaN, which would poison the gradient
    embedded = self.out(jax.nn.silu(self.into(sinusoid(value))))
    return jnp.where(known[..., None], embedded, used(self.null[...], ("modulation",), jnp.float32))


class PatchEmbedding(nnx.Module):
  """Latents (B, T, H, W, C) to tokens (B, N, D): one Linear on each patch, its inputs in the order (t, h, w, c)."""

  def __init__(self, patch: tuple[int, int, int], channels: int, width: int, *, rngs: nnx.Rngs):
    self.patch = patch
    size = patch[0] * patch[1] * patch[2] * channels
    self.project = Linear(size, width, axes=("conv_in", "embed"), rngs=rngs)

  def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
    return self.project(patchify(x_BTHWC, self.patch))


def patchify(x_BTHWC: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
  """Cuts latents into patches (B, N, pt*ph*pw*C), in row-major order of (frame, row, column)."""
  batch, frames, height, width, channels = x_BTHWC.shape
  pt, ph, pw = patch
  x = x_BTHWC.reshape(batch, frames // pt, pt, height // ph, ph, width // pw, pw, channels)
  return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, -1, pt * ph * pw * channels)


def unpatchify(x: jax.Array, patch: tuple[int, int, int], grid: tuple[int, int, int]) -> jax.Array:
  """The inverse of `patchify` for a token grid of `grid` = (frames, rows, columns)."""
  batch = x.shape[0]
  pt, ph, pw = patch
  frames, rows, columns = grid
  x = x.reshape(batch, frames, rows, columns, pt, ph, pw, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
  return x.reshape(batch, frames * pt, rows * ph, columns * pw, -1)


class TokenProjection(nnx.Module):
  """Foreign tokens (text, states) to the model's width: Linear, GELU (tanh), Linear, as Wan 2.1 does with text."""

  def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
    self.into = Linear(inputs, width, axes=("text", "embed"), init=normal(0.02), rngs=rngs)
    self.out = Linear(width, width, axes=("embed", None), init=normal(0.02), rngs=rngs)

  def __call__(self, tokens_BLD: jax.Array) -> jax.Array:
    return self.out(jax.nn.gelu(self.into(tokens_BLD), approximate=True))
