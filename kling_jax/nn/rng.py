"""Random streams independent of batch splitting, mesh and hosts: one typed key a sample, then named streams."""

import zlib

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def sample_keys(key: jax.Array, step: jax.Array | int, index_B: ArrayLike) -> jax.Array:
  """Returns typed keys (B,): fold_in(fold_in(key, step), row of the sample in the global batch)."""
  step_key = jax.random.fold_in(key, step)
  return jax.vmap(lambda index: jax.random.fold_in(step_key, index))(jnp.asarray(index_B))


def stream(keys_B: jax.Array, name: str) -> jax.Array:
  """Derives the keys of one named use (noise, time, drop, ...) from per-sample keys (B,)."""
  tag = zlib.crc32(name.encode())
  return jax.vmap(lambda key: jax.random.fold_in(key, tag))(keys_B)


def normal(keys_B: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
  """Standard normal draws (B, *shape), row b from keys_B[b] alone."""
  return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys_B)


def bernoulli(keys_B: jax.Array, probability: float) -> jax.Array:
  """Coin flips (B,), row b from keys_B[b] alone."""
  return jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys_B)
