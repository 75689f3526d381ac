"""Persistent graphics: logos, channel marks and captions that stay while the picture behind them changes."""

import cv2
import numpy as np

from kling_jax.measure.sample import Sample, at_most
from kling_jax.measure.text import area

NAME, VERSION = "persistent-edges", "1"
CONDITIONS = ("watermark",)
SIDE = 320  # most pixels of the shorter side
EDGE = 24.0  # levels over two pixels: weakest gradient that counts
STEADY = 0.35  # most median deviation of a gradient over the clip, of its median
CELL = 16  # pixels: parts of the picture that are told to stay or to change
TEXTURED = 3.0  # mean gradient of a cell that can tell
STAYS = 0.5  # of a cell's usual gradient that its median over the clip keeps, where it stays
ONE_WAY = 0.7  # most coherence of a mark's gradients: straight edges stay where they slide along themselves
LEAST_EDGES = 24  # pixels of a mark
LEAST_PLACES = 4
TELLING = 0.6  # least share of the textured cells that change; below, marks cannot be told from scenery
JOIN = 7  # pixels between the strokes of one mark
MARGIN = 3  # pixels at the frame's edge, where filters of codecs and scalers leave lines


def watermark(sample: Sample) -> dict[str, float]:
  """watermark: share of the frame's area under marks that stay while most of the picture changes.

  {} where it cannot be told: fewer than four places, or a picture whose edges stay (a tripod shot), or without edges.
  """
  if len(sample.luma) < LEAST_PLACES:
    return {}
  boxes = marks(np.stack([at_most(luma, SIDE) for luma in sample.luma]))
  if boxes is None:
    return {}
  return {"watermark": area(boxes, at_most(sample.luma[0], SIDE).shape)}


def marks(luma_THW: np.ndarray) -> np.ndarray | None:
  """Boxes (N, 4) of persistent graphics: left, top, right, bottom in pixels, ends exclusive; none where untold.

  A pixel is part of one where the gradient of luma is strong and the same, in both components, in most of the pictures.
  """
  gradients = [[cv2.Sobel(luma, cv2.CV_16S, *order, scale=0.25) for luma in luma_THW] for order in ((1, 0), (0, 1))]
  dx, dy = (np.stack(component).astype(np.float32) for component in gradients)
  mid_x, mid_y = _median(dx), _median(dy)
  strength = np.hypot(mid_x, mid_y)
  if _changing(strength, np.hypot(dx, dy).mean(0)) < TELLING:
    return None
  deviation = _median(np.hypot(dx - mid_x, dy - mid_y))
  steady = (strength >= EDGE) & (deviation <= STEADY * strength)
  steady[:MARGIN], steady[-MARGIN:], steady[:, :MARGIN], steady[:, -MARGIN:] = False, False, False, False
  joined = cv2.dilate(steady.astype(np.uint8), np.ones((JOIN, JOIN), np.uint8))
  count, labels, stats, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
  edges = np.bincount(labels[steady], minlength=count)
  height, width = steady.shape
  # Longer ones are the edges of a letterbox.
  sums = lambda product: np.bincount(labels[steady], product[steady], count)
  xx, yy, xy = sums(mid_x * mid_x), sums(mid_y * mid_y), sums(mid_x * mid_y)
  coherence = np.hypot(xx - yy, 2 * xy) / np.maximum(xx + yy, 1e-6)  # 1: all one way, 0: all ways alike
  kept = (edges >= LEAST_EDGES) & (coherence <= ONE_WAY) & (stats[:, 2] <= 0.9 * width) & (stats[:, 3] <= 0.9 * height)
  kept[0] = False
  left, top, across, down = stats[kept, :4].T
  inset = JOIN // 2
  return np.stack([left + inset, top + inset, left + across - inset, top + down - inset], -1)


def _changing(median_HW: np.ndarray, usual_HW: np.ndarray) -> float:
  """Share of the textured cells whose gradient does not stay; 0 without any."""
  size = median_HW.shape[1] // CELL, median_HW.shape[0] // CELL
  if not all(size):
    return 0.0
  kept, usual = (cv2.resize(field, size, interpolation=cv2.INTER_AREA) for field in (median_HW, usual_HW))
  textured = usual >= TEXTURED
  return float((kept < STAYS * usual)[textured].mean()) if textured.any() else 0.0


def _median(values_THW: np.ndarray) -> np.ndarray:
  """The upper median over the first axis."""
  middle = len(values_THW) // 2
  return np.partition(values_THW, middle, axis=0)[middle]
