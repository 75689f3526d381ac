"""Signs of damage in the pixels of the media: sharpness, blur, noise, blockiness; read from native luma, no resizing.

Resizing would destroy what they look for, so they depend on the resolution of the media and say so in their units.
Median over every other place of a clip.
"""

import cv2
import numpy as np

from kling_jax.measure.sample import Sample

NAME, VERSION = "luma", "1"
CONDITIONS = ("sharpness", "blur", "noise", "blockiness")
BLOCK = 8  # pixels between the edges of transform blocks of JPEG, MPEG-2, MPEG-4 and most of H.264
PATCH = 16  # pixels
FLATTEST = 0.2  # share of the patches that count as without texture
WINDOW, EDGE_SHARE = 17, 0.1  # as in `clarity`


def degradation(sample: Sample) -> dict[str, float]:
  """Returns sharpness, blur, noise and blockiness of the clip, each as its function below says."""
  measures = {"sharpness": sharpness, "blur": blur, "noise": noise, "blockiness": blockiness}
  crops = [crop for crop in sample.crops if min(crop.shape) >= 2 * PATCH]
  if not crops:
    return {}
  return {name: float(np.median([measure(crop) for crop in crops])) for name, measure in measures.items()}


def sharpness(luma_HW: np.ndarray) -> float:
  """Variance of the 4-neighbour Laplacian of luma, in squared levels of 255: the usual focus measure.

  Grows with contrast, texture and noise as with focus: good for comparing versions of one picture.
  """
  return float(cv2.Laplacian(luma_HW, cv2.CV_32F, borderType=cv2.BORDER_REFLECT).var(dtype=np.float64))


def blur(luma_HW: np.ndarray) -> float:
  """Spread of the strongest edges: the standard deviation of a Gaussian over ideal edges, in pixels of the media.

  From the ratio of Laplacian to gradient energy at edges, 1 / (2 s^2) for an edge of spread s (see `clarity`), after a
  smoothing by 1 pixel that is taken off again. Two pixels and more: the picture was enlarged or is out of focus. Zero
  for pixel-sharp edges, and where noise drowns them; also for a flat picture.
  """
  smooth = cv2.GaussianBlur(luma_HW.astype(np.float32), (0, 0), 1.0)
  dx, dy = (smooth[1:-1, 2:] - smooth[1:-1, :-2]) / 2, (smooth[2:, 1:-1] - smooth[:-2, 1:-1]) / 2
  around = smooth[1:-1, 2:] + smooth[1:-1, :-2] + smooth[2:, 1:-1] + smooth[:-2, 1:-1]
  gradient = cv2.blur(dx * dx + dy * dy, (WINDOW, WINDOW))
  laplacian = cv2.blur((around - 4 * smooth[1:-1, 1:-1]) ** 2, (WINDOW, WINDOW))
  strong = gradient >= np.quantile(gradient, 1 - EDGE_SHARE)
  edges, bends = gradient[strong].sum(dtype=np.float64), laplacian[strong].sum(dtype=np.float64)
  if edges < 1e-3 * strong.sum() or bends <= 0:
    return 0.0
  return float(np.sqrt(max(edges / (2 * bends) - 1.0, 0.0)))


def noise(luma_HW: np.ndarray) -> float:
  """Standard deviation of additive noise, in levels of 255, from the least textured fifth of the picture.

  The mask of Immerkaer (Fast noise variance estimation, 1996), [1 -2 1; -2 4 -2; 1 -2 1], sees no planes and no
  straight edges along rows or columns, and turns white noise of deviation s into 6 s. Noise that a codec removed is
  not there; fine texture all over the picture counts as noise. Patches at the ends of the range do not count.
  """
  mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
  answer = cv2.filter2D(luma_HW.astype(np.float32), -1, mask, borderType=cv2.BORDER_REFLECT)[1:-1, 1:-1]
  rows, columns = (side // PATCH for side in answer.shape)
  cut = lambda a: a[: rows * PATCH, : columns * PATCH].reshape(rows, PATCH, columns, PATCH)
  energy = np.square(cut(answer)).mean((1, 3)).ravel()
  level = cut(luma_HW[1:-1, 1:-1].astype(np.float32)).mean((1, 3)).ravel()
  inside = energy[(level > 12) & (level < 243)]
  if not len(inside):
    return 0.0
  few = np.sort(inside)[: max(1, round(FLATTEST * len(inside)))]
  return float(np.sqrt(np.median(few)) / 6)


def blockiness(luma_HW: np.ndarray) -> float:
  """How much steeper luma is across the edges of 8 x 8 blocks than elsewhere: 0 without blocks, 1 for twice as steep.

  For columns (and rows) the mean of max(0, step - mean of its two neighbouring steps) is taken by place modulo 8; the
  steepest place against the median of the others, less 1. Any offset of the grid is found; resizing hides it, and the
  loop filters of H.264 and later codecs smooth much of it away.
  """
  pixels = luma_HW.astype(np.float32)
  return float(np.mean([_grid(pixels), _grid(pixels.T)]))


def _grid(pixels: np.ndarray) -> float:
  step = np.abs(np.diff(pixels, axis=1))
  excess = np.maximum(step[:, 1:-1] - (step[:, :-2] + step[:, 2:]) / 2, 0).mean(0)
  count = len(excess) // BLOCK * BLOCK
  if not count:
    return 0.0
  by_place = excess[:count].reshape(-1, BLOCK).mean(0)
  best = int(by_place.argmax())
  rest = float(np.median(np.delete(by_place, best)))
  return max(0.0, (float(by_place[best]) + 0.05) / (rest + 0.05) - 1)  # a twentieth of a level: no blocks in flat ones
