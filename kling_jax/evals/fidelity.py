"""Likeness to a known future, frame by frame: MSE, PSNR and SSIM in JAX.

SSIM is that of Wang et al. (2004): Gaussian window of deviation 1.5 cut at 11 pixels, K = (0.01, 0.03), over the pixels
whose window lies within the frame; the mean over the channels.
"""

import jax
import numpy as np

from kling_jax.errors import DataError

RADIUS, SIGMA = 5, 1.5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def mse(made_THWC: np.ndarray, true_THWC: np.ndarray) -> np.ndarray:
  """Mean squared error of each frame, levels squared; float64 of the leading shape."""
  _alike(made_THWC, true_THWC)
  return np.square(made_THWC.astype(np.float64) - true_THWC).mean((-1, -2, -3))


def psnr(made_THWC: np.ndarray, true_THWC: np.ndarray) -> np.ndarray:
  """10 log10(255^2 / mse) of each frame in dB; inf where they are equal."""
  with np.errstate(divide="ignore"):
    return 10 * np.log10(255**2 / mse(made_THWC, true_THWC))


def ssim(made_THWC: np.ndarray, true_THWC: np.ndarray) -> np.ndarray:
  """Structural similarity of each frame, -1 to 1; float32 of the leading shape.

  Raises:
    DataError: shapes that differ, or sides below 11.
  """
  _alike(made_THWC, true_THWC)
  *leading, height, width, channels = made_THWC.shape
  if min(height, width) < 2 * RADIUS + 1:
    raise DataError(f"SSIM needs sides of at least {2 * RADIUS + 1}, not {height} x {width}")
  flat = (np.moveaxis(x, -1, -3).reshape(-1, height, width).astype(np.float32) for x in (made_THWC, true_THWC))
  return np.asarray(_ssim(*flat)).reshape(*leading, channels).mean(-1)


@jax.jit
def _ssim(x_BHW: jax.Array, y_BHW: jax.Array) -> jax.Array:
  # The window sums of squares cancel in float32 unless the pictures are centred; a common offset changes no covariance.
  offset = (x_BHW.mean((1, 2), keepdims=True) + y_BHW.mean((1, 2), keepdims=True)) / 2
  x, y = x_BHW - offset, y_BHW - offset
  mx, my = _window(x), _window(y)
  vx, vy, cov = _window(x * x) - mx * mx, _window(y * y) - my * my, _window(x * y) - mx * my
  mx, my = mx + offset, my + offset
  found = (2 * mx * my + C1) * (2 * cov + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))
  return found.mean((1, 2))


def _window(x_BHW: jax.Array) -> jax.Array:
  """Gaussian means over whole windows."""
  kernel = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
  kernel = (kernel / kernel.sum()).astype(np.float32)
  for axis in (1, 2):
    size = x_BHW.shape[axis] - 2 * RADIUS
    x_BHW = sum(kernel[k] * jax.lax.slice_in_dim(x_BHW, k, k + size, axis=axis) for k in range(2 * RADIUS + 1))
  return x_BHW


def _alike(made: np.ndarray, true: np.ndarray) -> None:
  if made.shape != true.shape:
    raise DataError(f"frames of shape {made.shape} are compared with {true.shape}; they must be alike")
