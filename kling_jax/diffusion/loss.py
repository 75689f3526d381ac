"""Losses: one number a sample, then a plain mean, so that splitting a batch in equal parts changes nothing.

A mask normalises within its own sample. Dividing by the number of unmasked elements of the whole batch would make a
sample's weight depend on its neighbours, and gradient accumulation would no longer equal one large batch.
"""

import jax
import jax.numpy as jnp

from kling_jax.diffusion.process import expand


def mse_per_sample(
  prediction: jax.Array,
  target: jax.Array,
  weight: jax.Array | float = 1.0,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Mean over the elements that count of weight * (prediction - target)^2, float32 (B,).

  Args:
    prediction, target: (B, T, H, W, C), any float dtype; the error is taken in float32.
    weight: (), (B,) or (B, T), usually `Process.weight(time)`. It scales the error and is not normalised.
    mask: (B,) or (B, T), 1 or True where the error counts; known (clean) frames have 0. None counts all.
      A sample in which nothing counts has loss 0.
  """
  error = jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32))
  error = error * expand(jnp.asarray(weight, jnp.float32), error)
  axes = tuple(range(1, error.ndim))
  if mask is None:
    return error.mean(axes)
  counts = jnp.broadcast_to(expand(jnp.asarray(mask, jnp.float32), error), error.shape)
  # Where it does not count, an infinite error must not become 0 * inf.
  total = jnp.where(counts > 0, counts * error, 0.0).sum(axes)
  return total / jnp.maximum(counts.sum(axes), 1.0)
