"""Aesthetic stand-in: colourfulness and contrast of the frames, until a learned scorer's weights are imported."""

import cv2
import numpy as np

NAME, VERSION = "colourfulness+contrast", "1"
SHORTER_SIDE = 128
HALF_COLOURFULNESS = 45.0  # Hasler & Suesstrunk's "quite colourful"
HALF_CONTRAST = 45.0  # luma levels of 255
MOST_FRAMES = 8


def aesthetic(frames_THWC: np.ndarray, times_s: np.ndarray) -> float:
  """A score in [0, 10): 5 m / (m + 45) for colourfulness m plus 5 c / (c + 45) for contrast c, mean over frames.

  An honest classical proxy and no more: it likes vivid, contrasty pictures and knows nothing of subject or
  composition. Its scorer name says so; a learned aesthetic scorer fills the same condition under its own name.

  Args:
    frames_THWC: uint8 RGB; at most 8, evenly spread, are looked at.
    times_s: (T,), unused; all scorers are called alike.
  """
  del times_s
  picks = np.unique(np.linspace(0, len(frames_THWC) - 1, min(len(frames_THWC), MOST_FRAMES)).round().astype(int))
  values = []
  for i in picks:
    frame = _small(frames_THWC[i]).astype(np.float64)
    colour, spread = colourfulness(frame), contrast(frame)
    values.append(5 * colour / (colour + HALF_COLOURFULNESS) + 5 * spread / (spread + HALF_CONTRAST))
  return float(np.mean(values))


def colourfulness(frame_HWC: np.ndarray) -> float:
  """M of Hasler & Suesstrunk (Measuring colourfulness in natural images, 2003), for RGB in 0..255.

  With rg = R - G and yb = (R + G)/2 - B: M = sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2).
  """
  red, green, blue = np.moveaxis(np.asarray(frame_HWC, np.float64), -1, 0)
  rg, yb = red - green, (red + green) / 2 - blue
  return float(np.sqrt(rg.var() + yb.var()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def contrast(frame_HWC: np.ndarray) -> float:
  """Root-mean-square contrast: the standard deviation of luma (BT.601), in levels of 0..255."""
  return float((np.asarray(frame_HWC, np.float64) @ np.array([0.299, 0.587, 0.114])).std())


def _small(frame_HWC: np.ndarray) -> np.ndarray:
  height, width = frame_HWC.shape[:2]
  scale = SHORTER_SIDE / min(height, width)
  if scale >= 1:
    return frame_HWC
  size = round(width * scale), round(height * scale)
  return cv2.resize(np.ascontiguousarray(frame_HWC), size, interpolation=cv2.INTER_AREA)
