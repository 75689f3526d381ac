"""A perceptual distance without a learned network: gradient magnitude similarity deviation (GMSD).

Xue, Zhang, Mou and Bovik 2014 (arXiv 1308.3052), as in the authors' code: luma is halved by means of 2 x 2 pixels,
m is the length of its Prewitt gradient (zeros beyond the border), and of the similarities

  s = (2 m1 m2 + c) / (m1^2 + m2^2 + c),  c = 170 for levels of 255,

the standard deviation over the picture is taken: 0 for equal pictures, larger the more unevenly edges are lost or made
up. It is no LPIPS, and its values are not comparable with LPIPS's. Colour is not seen.
"""

import numpy as np

from kling_jax.errors import DataError

LUMA = np.array([0.299, 0.587, 0.114])
C = 170.0


def gmsd(made_THWC: np.ndarray, true_THWC: np.ndarray) -> np.ndarray:
  """The distance of each frame, 0 to 0.5; float64 of the leading shape.

  Args:
    made_THWC, true_THWC: uint8 RGB of one shape.

  Raises:
    DataError: shapes that differ, or sides below 6.
  """
  if made_THWC.shape != true_THWC.shape:
    raise DataError(f"frames of shape {made_THWC.shape} are compared with {true_THWC.shape}; they must be alike")
  if min(made_THWC.shape[-3:-1]) < 6:
    raise DataError(f"GMSD needs sides of at least 6, not {made_THWC.shape[-3]} x {made_THWC.shape[-2]}")
  first, second = (_gradient(_halved(frames @ LUMA)) for frames in (made_THWC, true_THWC))
  similar = (2 * first * second + C) / (first**2 + second**2 + C)
  return similar.std((-2, -1))


def _halved(luma_THW: np.ndarray) -> np.ndarray:
  """Means of 2 x 2 pixels; an odd last row or column is left out."""
  height, width = (side // 2 * 2 for side in luma_THW.shape[-2:])
  even = luma_THW[..., :height, :width]
  return (even[..., ::2, ::2] + even[..., 1::2, ::2] + even[..., ::2, 1::2] + even[..., 1::2, 1::2]) / 4


def _gradient(luma_THW: np.ndarray) -> np.ndarray:
  """Length of Prewitt's gradient, levels a pixel times 2 (a difference over two pixels, mean of three rows)."""
  edge = [(0, 0)] * (luma_THW.ndim - 2) + [(1, 1), (1, 1)]
  x = np.pad(luma_THW, edge)
  rows = (x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]) / 3
  columns = (x[..., :-2] + x[..., 1:-1] + x[..., 2:]) / 3
  return np.hypot(rows[..., 2:] - rows[..., :-2], columns[..., 2:, :] - columns[..., :-2, :])
