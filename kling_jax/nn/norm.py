"""Normalisation over the last axis, computed in float32 and returned in the dtype of its input."""

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.nn.weights import used


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale, with a learned scale of ones at the start.

  Over the full width of queries and keys (all heads at once) this is Wan 2.1's QK norm; over one head, that of most
  language models.
  """

  def __init__(self, width: int, *, axis: str | None = "embed", epsilon: float = 1e-6):
    self.epsilon, self.axes = epsilon, (axis,)
    self.scale = nnx.Param(jnp.ones(width, jnp.float32), axes=self.axes)

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
    return (x32 * inverse * used(self.scale[...], self.axes, jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
  """(x - mean) / sqrt(variance + epsilon) over the last axis, in float32 (what modulation wants next)."""
  x32 = x.astype(jnp.float32)
  centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
  return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)


class LayerNorm(nnx.Module):
  """`layer_norm` with a learned scale and bias; where neither is wanted, call the function."""

  def __init__(self, width: int, *, axis: str | None = "embed", epsilon: float = 1e-6):
    self.epsilon, self.axes = epsilon, (axis,)
    self.scale = nnx.Param(jnp.ones(width, jnp.float32), axes=self.axes)
    self.bias = nnx.Param(jnp.zeros(width, jnp.float32), axes=self.axes)

  def __call__(self, x: jax.Array) -> jax.Array:
    scale, bias = (used(value[...], self.axes, jnp.float32) for value in (self.scale, self.bias))
    return (layer_norm(x, self.epsilon) * scale + bias).astype(x.dtype)


class HeadLayerNorm(nnx.Module):
  """`layer_norm` of each head, with a scale and a bias (K, E) of its own for every head: Chameleon's QK norm."""

  def __init__(self, heads: int, size: int, *, axis: str | None = "heads", epsilon: float = 1e-5):
    self.epsilon, self.axes = epsilon, (axis, "head")
    self.scale = nnx.Param(jnp.ones((heads, size), jnp.float32), axes=self.axes)
    self.bias = nnx.Param(jnp.zeros((heads, size), jnp.float32), axes=self.axes)

  def __call__(self, x_BNKE: jax.Array) -> jax.Array:
    scale_KE, bias_KE = (used(value[...], self.axes, jnp.float32) for value in (self.scale, self.bias))
    return (layer_norm(x_BNKE, self.epsilon) * scale_KE + bias_KE).astype(x_BNKE.dtype)
