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


def angles_3d(
  frames: int,
  rows: int,
  columns: int,
  head_size: int,
  *,
  first_frame: int | jax.Array = 0,
  places_BT: jax.Array | None = None,
) -> jax.Array:
  """Angles (frames*rows*columns, head_size/2) of a token grid in row-major order (frame, row, column).

  Args:
    first_frame: position of the grid's first frame: what a cache already holds, or 0.
    places_BT: positions of the frames of each row instead; the angles are then (B, frames*rows*columns, head_size/2).
  """
  grid = (frames, rows, columns)
  leading = () if places_BT is None else places_BT.shape[:1]
  places = (first_frame + jnp.arange(frames) if places_BT is None else places_BT, jnp.arange(rows), jnp.arange(columns))
  parts = []
  for axis, (place, size) in enumerate(zip(places, axis_sizes(head_size), strict=True)):
    part = angles_1d(place, size)
    shape = [*part.shape[:-2], 1, 1, 1, size // 2]
    shape[axis - 4] = grid[axis]
    parts.append(jnp.broadcast_to(part.reshape(shape), (*leading, *grid, size // 2)))
  return jnp.concatenate(parts, axis=-1).reshape(*leading, frames * rows * columns, head_size // 2)


def rotate(x_BNKE: jax.Array, angles: jax.Array) -> jax.Array:
  """Turns each interleaved pair (x[2i], x[2i+1]) of a head by angles[n, i]; float32 inside, dtype of `x` outside.

  `angles` are (N, E/2), or (B, N, E/2) where rows have positions of their own.
  """
  cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
  pairs = x_BNKE.astype(jnp.float32).reshape(*x_BNKE.shape[:-1], -1, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
  return turned.reshape(x_BNKE.shape).astype(x_BNKE.dtype)
