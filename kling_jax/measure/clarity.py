"""Clarity of a clip: how sharp its strongest structures are; 1 for an ideal edge, more for fine texture."""

import cv2
import numpy as np

NAME, VERSION = "laplacian", "1"
SHORTER_SIDE = 256  # pixels that every frame is resized to, up or down: a small video is a blurred one
SMOOTHING = 1.0  # standard deviation of the Gaussian before the derivatives; bounds the effect of noise
WINDOW = 17  # pixels
EDGE_SHARE = 0.1  # of the windows, those with the strongest edges
MOST_FRAMES = 8


def clarity(frames_THWC: np.ndarray, times_s: np.ndarray) -> float:
  """Laplacian energy over gradient energy at the strongest edges; 0 for flat frames. Median over frames.

  A step edge under a Gaussian of total deviation s has, per unit length, the gradient energy a^2 / (2 sqrt(pi) s) and
  the Laplacian energy a^2 / (4 sqrt(pi) s^3): their ratio 1 / (2 s^2) holds neither the contrast a nor the number of
  edges. With the smoothing s0 = 1 pixel at 256 pixels on the shorter side and a blur b already in the picture,

    clarity = s0 * sqrt(2 * Laplacian energy / gradient energy) = s0 / sqrt(s0^2 + b^2)

  at an edge: 1 for an ideal one. Texture finer than edges reads up to 2, the value of white noise: noise and blocking
  artefacts count as sharpness (the known weakness of all Laplacian measures).

  Args:
    frames_THWC: uint8 RGB; at most 8, evenly spread, are looked at.
    times_s: (T,), unused; all scorers are called alike.
  """
  del times_s
  picks = np.unique(np.linspace(0, len(frames_THWC) - 1, min(len(frames_THWC), MOST_FRAMES)).round().astype(int))
  return float(np.median([_frame_clarity(frames_THWC[i]) for i in picks]))


def _frame_clarity(frame_HWC: np.ndarray) -> float:
  height, width = frame_HWC.shape[:2]
  scale = SHORTER_SIDE / min(height, width)
  size = round(width * scale), round(height * scale)
  grey: np.ndarray = cv2.cvtColor(np.ascontiguousarray(frame_HWC), cv2.COLOR_RGB2GRAY).astype(np.float32)
  if scale != 1:
    grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
  grey = cv2.GaussianBlur(grey, (0, 0), SMOOTHING)
  # Central differences and the sum of second differences, both exact for quadratics.
  dx = (grey[1:-1, 2:] - grey[1:-1, :-2]) / 2
  dy = (grey[2:, 1:-1] - grey[:-2, 1:-1]) / 2
  inner = grey[1:-1, 1:-1]
  laplacian = grey[1:-1, 2:] + grey[1:-1, :-2] + grey[2:, 1:-1] + grey[:-2, 1:-1] - 4 * inner
  gradient_energy = cv2.blur(dx * dx + dy * dy, (WINDOW, WINDOW))
  laplacian_energy = cv2.blur(laplacian * laplacian, (WINDOW, WINDOW))
  strong = gradient_energy >= np.quantile(gradient_energy, 1 - EDGE_SHARE)
  total = float(gradient_energy[strong].sum(dtype=np.float64))
  if total < 1e-3 * strong.sum():  # a flat frame: mean gradient below 0.03 of 255 grey levels a pixel
    return 0.0
  ratio = float(laplacian_energy[strong].sum(dtype=np.float64)) / total
  return float(SMOOTHING * np.sqrt(2 * ratio))
