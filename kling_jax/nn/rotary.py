"""Rotary positions: queries and keys turned by angles that grow with frame, row and column (RoFormer, Wan 2.1)."""

import jax
import jax.numpy as jnp

BASE = 10_000.0


def axis_sizes(head_size: int) -> tuple[int, int, int]:
  """How Wan 2.1 shares a head among frame, row and column: a third each, what is left over going to the frame."""
  spatial = 2 * (head_size // 6)
  return head_size - 2 * spatial, spatial, spatial


def angles_1d(positions: jax.Array, size: int, base: float = BASE) -> jax.Array:
  """Angles (..., size/2): position * base^(-2i/size), as in RoFormer section 3.2."""
  frequency = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
  return positions.astype(jnp.float32)[..., None] * frequency


def angles_3d(frames: int, rows: int, columns: int, head_size: int, *, first_frame: int | jax.Array = 0) -> jax.Array:
  """Angles (frames*rows*columns, head_size/2) of a token grid in row-major order (frame, row, column).

  `first_frame` is the position of the grid's first frame: what a cache already holds, or 0.
  """
  grid = (frames, rows, columns)
  starts = (first_frame, 0, 0)
  parts = []
  for axis, (length, start, size) in enumerate(zip(grid, starts, axis_sizes(head_size), strict=True)):
    part = angles_1d(start + jnp.arange(length), size)
    shape = [1, 1, 1, size // 2]
    shape[axis] = length
    parts.append(jnp.broadcast_to(part.reshape(shape), (*grid, size // 2)))
  return jnp.concatenate(parts, axis=-1).reshape(frames * rows * columns, head_size // 2)


def rotate(x_BNKE: jax.Array, angles: jax.Array) -> jax.Array:
  """Turns each interleaved pair (x[2i], x[2i+1]) of a head by angles[n, i]; float32 inside, dtype of `x` outside.

  `angles` are (N, E/2), or (B, N, E/2) where rows have positions of their own.
  """
  cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
  pairs = x_BNKE.astype(jnp.float32).reshape(*x_BNKE.shape[:-1], -1, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return turned.reshape(x_BNKE.shape).astype(x_BNKE.dtype)
