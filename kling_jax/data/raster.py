"""Drawing of procedural worlds: outlines by signed distance, anti-aliased over one pixel, textures and blur.

`x`, `y` are places in the world that the pixels show, float32 and broadcastable to (T, H, W); `sharp` is pixels per
unit of the world, (T, 1, 1).
"""

import numpy as np


def paint(picture: np.ndarray, distance: np.ndarray, sharp: np.ndarray, rgb: np.ndarray | tuple[float, ...]) -> None:
  """Covers `picture` (T, H, W, 3), in place, with a colour where the signed distance to an outline is negative."""
  cover = np.clip(0.5 - distance * sharp, 0, 1)[..., None]
  picture += cover * (np.asarray(rgb, np.float32) - picture)


def to_uint8(picture: np.ndarray) -> np.ndarray:
  """Light in [0, 1] as bytes."""
  return np.clip(np.rint(picture * 255), 0, 255).astype(np.uint8)


def distance(shape: str, u: np.ndarray, v: np.ndarray, radius: np.float32) -> np.ndarray:
  """Signed distance to the outline (negative inside; for corners the larger of the edges' distances)."""
  if shape == "circle":
    return np.sqrt(u * u + v * v) - radius
  if shape == "square":
    return np.maximum(np.abs(u), np.abs(v)) - radius
  # Isosceles, apex up: height and base are 2 * radius; the slanted edges have the normal (2, -1) / sqrt(5).
  slant = (2 * np.abs(u) - (v + radius)) * np.float32(1 / np.sqrt(5))
  return np.maximum(slant, v - radius)


def texture(name: str, frequency: float, x: np.ndarray, y: np.ndarray, sharp: np.ndarray) -> np.ndarray:
  """The pattern `name` in [0, 1], (T, H, W), of `frequency` periods a unit; x, y: places in the world."""
  f = np.float32(frequency)
  if name == "checkered":
    return 0.5 + 0.5 * _square_wave(x, f, sharp) * _square_wave(y, f, sharp)
  if name == "dotted":
    u, v = (x * f) % 1 - np.float32(0.5), (y * f) % 1 - np.float32(0.5)
    return np.clip(0.5 - (np.sqrt(u * u + v * v) - np.float32(0.3)) / f * sharp, 0, 1)
  if name == "rippled":
    return _ripples(x, y, f, sharp)
  # The gradient carries faint ripples: a plain one would hide the motion of the camera.
  slope = 0.5 + 0.5 * np.sin(np.float32(2 * np.pi * 0.35) * (0.8 * x + 0.6 * y + np.float32(0.4)))
  return np.float32(0.75) * slope + np.float32(0.25) * _ripples(x, y, f, sharp)


def _ripples(x: np.ndarray, y: np.ndarray, f: np.float32, sharp: np.ndarray) -> np.ndarray:
  """Two crossed sine waves, weakened by the pixel's width (so that fine ripples fade instead of aliasing)."""
  fade = np.sinc(f / sharp)
  tau = np.float32(2 * np.pi)
  # sin(a)cos(b) forms of x and y apart: the waves cost one row and one column of sines a frame.
  sx, cx = np.sin(tau * f * x), np.cos(tau * f * x)
  sy, cy = np.sin(tau * 0.7 * f * y), np.cos(tau * 0.7 * f * y)
  wave = sx * cy + cx * sy  # sin(2 pi f (x + 0.7 y))
  cross = cx * cy + sx * sy  # cos(2 pi f (x - 0.7 y))
  return 0.5 + 0.25 * fade * (wave + cross)


def _square_wave(x: np.ndarray, f: np.float32, sharp: np.ndarray) -> np.ndarray:
  """+1 / -1 with edges blended over one pixel; f periods per unit."""
  distance = (np.abs((x * f) % 1 - np.float32(0.5)) - np.float32(0.25)) / f
  return np.clip(2 * distance * sharp, -1, 1)


def blur(picture_THWC: np.ndarray, sigma: float) -> np.ndarray:
  """Separable Gaussian of `sigma` pixels, cut at 3.5 deviations, mirrored at the border.

  Sums of shifted pictures instead of matrix products: the same on every processor, whatever BLAS and its threads do.
  """
  radius = max(1, round(3.5 * sigma))
  kernel = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
  kernel = (kernel / (2 * kernel.sum() - kernel[0])).astype(np.float32)
  for axis in (1, 2):
    size = picture_THWC.shape[axis]
    border = [(radius, radius) if k == axis else (0, 0) for k in range(4)]
    padded = np.moveaxis(np.pad(picture_THWC, border, mode="symmetric"), axis, 0)
    total = kernel[0] * padded[radius : radius + size]
    for k in range(1, radius + 1):
      total += kernel[k] * (padded[radius - k : radius - k + size] + padded[radius + k : radius + k + size])
    picture_THWC = np.moveaxis(total, 0, axis)
  return picture_THWC
