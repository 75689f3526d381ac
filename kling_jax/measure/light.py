"""Exposure and colour: brightness, contrast, dark and bright shares, saturation, greyness, borders."""

import numpy as np

from kling_jax.measure.sample import Sample

NAME, VERSION = "levels", "1"
CONDITIONS = ("brightness", "contrast", "dark", "bright", "saturation", "grey")
DARK, BRIGHT = 5, 250  # levels of 255: UltraVideo's ends of the range
GREY_CHROMA = 12  # levels between the largest and the smallest of R, G, B; 4:2:0 and quantisation leave a few

BORDERS_NAME, BORDERS_VERSION = "flat-margins", "1"
FLAT = 4.0  # levels: most deviation within a row or column of a border
STILL = 3.0  # levels: most change of its mean over the clip
STEP = 6.0  # levels: least mean step between a border and the picture


def light(sample: Sample) -> dict[str, float]:
  """Levels of the frames, all from 0 to 1 (contrast to 0.5).

  Returns:
    brightness: mean luma / 255 (BT.601, full range).
    contrast: standard deviation of luma / 255 within a frame.
    dark, bright: share of pixels with luma below 5, above 250.
    saturation: mean of HSV's S, (max - min) / max; noise in dark parts counts as colour.
    grey: share of pixels without colour: R, G and B within 12 levels; 1 for black-and-white films.
  """
  luma = sample.grey_THW[sample.places]
  colour = sample.frames_THWC[sample.places, ::2, ::2]
  red, green, blue = np.moveaxis(colour, -1, 0)
  most = np.maximum(np.maximum(red, green), blue).astype(np.float32)
  least = np.minimum(np.minimum(red, green), blue).astype(np.float32)
  return {
    "brightness": float(luma.mean(dtype=np.float64) / 255),
    "contrast": float(luma.std(axis=(1, 2), dtype=np.float64).mean() / 255),
    "dark": float((luma < DARK).mean()),
    "bright": float((luma > BRIGHT).mean()),
    "saturation": float(((most - least) / np.maximum(most, 1)).mean(dtype=np.float64)),
    "grey": float((most - least <= GREY_CHROMA).mean()),
  }


def borders(sample: Sample) -> dict[str, float]:
  """borders: share of the frame's area outside the picture proper: letterbox, pillarbox, or both, of any flat colour.

  A border is rows (or columns) from the frame's edge on that are flat, alike and unchanged in all places, and end in a
  step; a clip that is flat all over has none. Blurred copies of the picture as a border are not seen.
  """
  luma = sample.grey_THW[sample.places].astype(np.float32)
  bottom = slice(None, None, -1)
  top, low = _border(luma), _border(luma[:, bottom])
  left, right = _border(luma.swapaxes(1, 2)), _border(luma.swapaxes(1, 2)[:, bottom])
  height, width = luma.shape[1:]
  inside = max(height - top - low, 0) * max(width - left - right, 0)
  return {"borders": 1 - inside / (height * width)}


def _border(luma_THW: np.ndarray) -> int:
  """Rows of the border at the top."""
  height = luma_THW.shape[1]
  deviation_H = luma_THW.std(axis=2).max(0)
  mean_TH = luma_THW.mean(2)
  alike = (np.abs(mean_TH - mean_TH[:1, :1]) <= STILL).all(0) & (deviation_H <= FLAT)
  rows = height if alike.all() else int(alike.argmin())
  if rows == 0 or rows == height:
    return 0
  # The first row of the picture may be half border: the step is taken over two rows.
  inner = luma_THW[:, min(rows + 1, height - 1)]
  step = np.abs(inner - luma_THW[:, rows - 1]).max(0)
  return rows if np.median(step) >= STEP else 0
