"""Drift curves: what changes slowly from clip to clip though it should not (colour, contrast, sharpness)."""

import numpy as np

from kling_jax.errors import DataError

LUMA = np.array([0.299, 0.587, 0.114])
BINS = 8  # of each colour channel


def curves(frames_OTHWC: np.ndarray) -> dict[str, np.ndarray]:
  """Statistics of each clip of a rollout, float64 (O,).

  luma: mean, 0..255. saturation: mean of (max - min) / max over the channels, 0..1. red_std, green_std, blue_std:
  deviation of each channel within frames, levels. sharpness: variance of luma's Laplacian (4-neighbour), levels
  squared. high_frequencies: share of luma's power, the mean left out, above half of the Nyquist frequency in either
  direction. histogram: distance of the colour histogram (8 x 8 x 8 bins) to that of the first clip, half the sum of
  absolute differences, 0 (equal) to 1 (nothing in common).

  Args:
    frames_OTHWC: uint8 RGB; sides of at least 4.
  """
  if min(frames_OTHWC.shape[2:4]) < 4:
    raise DataError(f"frames of {frames_OTHWC.shape[2]} x {frames_OTHWC.shape[3]}; drift curves need sides of 4")
  found: dict[str, list[float]] = {}
  first: np.ndarray | None = None
  for clip_THWC in frames_OTHWC:
    rgb = clip_THWC.astype(np.float64)
    grey = rgb @ LUMA
    top = rgb.max(-1)
    deviation_C = rgb.std((1, 2)).mean(0)
    histogram = _histogram(clip_THWC)
    first = histogram if first is None else first
    values = {
      "luma": grey.mean(),
      "saturation": ((top - rgb.min(-1)) / np.maximum(top, 1)).mean(),
      "red_std": deviation_C[0],
      "green_std": deviation_C[1],
      "blue_std": deviation_C[2],
      "sharpness": _laplacian(grey).var((1, 2)).mean(),
      "high_frequencies": _high_share(grey),
      "histogram": np.abs(histogram - first).sum() / 2,
    }
    for name, value in values.items():
      found.setdefault(name, []).append(float(value))
  return {name: np.array(values) for name, values in found.items()}


def slopes(found: dict[str, np.ndarray]) -> dict[str, float]:
  """Least-squares slope of each curve, in its unit a clip; 0 for a single clip."""
  return {name: float(np.polyfit(np.arange(len(c)), c, 1)[0]) if len(c) > 1 else 0.0 for name, c in found.items()}


def late_weighted(scores_O: np.ndarray, power: float = 1.0) -> float:
  """Mean of scores with weights (1, 2, ..., O) ** power, so that late errors count more (after PAN, section 7.2)."""
  weights = np.arange(1, len(scores_O) + 1, dtype=np.float64) ** power
  return float(np.average(scores_O, weights=weights))


def _laplacian(grey_THW: np.ndarray) -> np.ndarray:
  inner = grey_THW[:, 1:-1, 1:-1]
  return (
    grey_THW[:, :-2, 1:-1] + grey_THW[:, 2:, 1:-1] + grey_THW[:, 1:-1, :-2] + grey_THW[:, 1:-1, 2:] - 4 * inner
  )  # fmt: skip


def _high_share(grey_THW: np.ndarray) -> float:
  power = np.abs(np.fft.fft2(grey_THW - grey_THW.mean((1, 2), keepdims=True))) ** 2
  rows, columns = (np.abs(np.fft.fftfreq(size)) >= 0.25 for size in grey_THW.shape[1:])
  total = power.sum()
  return float(power[:, rows[:, None] | columns[None, :]].sum() / total) if total else 0.0


def _histogram(clip_THWC: np.ndarray) -> np.ndarray:
  place = (clip_THWC.astype(np.int64) * BINS) >> 8
  flat = (place[..., 0] * BINS + place[..., 1]) * BINS + place[..., 2]
  return np.bincount(flat.ravel(), minlength=BINS**3) / flat.size
