"""Resampling of pictures and position tables: matrices over one axis, weight for weight those of PyTorch and Pillow."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

KERNELS = ("cubic", "cubic-antialias", "linear-antialias", "linear-corners")


def matrix(size: int, wanted: int, kernel: str) -> np.ndarray:
  """(wanted, size) float32: the rows are the weights of `size` samples in each of `wanted` new ones.

  Args:
    size, wanted: samples before and after; both cover the same span.
    kernel: "cubic" is `interpolate(mode="bicubic")` of PyTorch (Keys' kernel with a = -0.75, edges repeated, no
      antialiasing); "cubic-antialias" and "linear-antialias" are the same with antialias=True, and Pillow's (a = -0.5,
      widened where it shrinks, weights that fall outside left out); "linear-corners" is mode="bilinear" with
      align_corners=True (the first and last samples stay).
  """
  if kernel not in KERNELS:
    raise ValueError(f"kernel {kernel!r}; known: {', '.join(KERNELS)}")
  scale = size / wanted
  place = (np.arange(wanted) + 0.5) * scale - 0.5
  if kernel == "cubic":
    return _repeated(place, size, _keys(-0.75))
  if kernel == "linear-corners":
    place = np.arange(wanted) * ((size - 1) / max(wanted - 1, 1))
    return _repeated(place, size, _triangle)
  shape = _keys(-0.5) if kernel == "cubic-antialias" else _triangle
  weights = shape((np.arange(size) - place[:, None]) / max(scale, 1.0))
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def grid(table_HWC: jax.Array, size: tuple[int, int], kernel: str) -> jax.Array:
  """A picture or table (H, W, C) brought to `size` (rows, columns); itself where that is its size."""
  if table_HWC.shape[:2] == size:
    return table_HWC
  rows, columns = (matrix(old, new, kernel) for old, new in zip(table_HWC.shape[:2], size, strict=True))
  return jnp.einsum("ih,jw,hwc->ijc", rows, columns, table_HWC, precision="highest")


def _repeated(place: np.ndarray, size: int, shape: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
  """Four taps around each place; those beyond an edge count for the sample at the edge."""
  found = np.zeros((len(place), size))
  first = np.floor(place).astype(int) - 1
  for tap in range(4):
    np.add.at(found, (np.arange(len(place)), np.clip(first + tap, 0, size - 1)), shape(first + tap - place))
  return found.astype(np.float32)


def _triangle(x: np.ndarray) -> np.ndarray:
  return np.maximum(1 - np.abs(x), 0)


def _keys(a: float) -> Callable[[np.ndarray], np.ndarray]:
  """Keys' cubic convolution kernel (IEEE ASSP 29(6), 1981)."""

  def shape(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))

  return shape
