"""Overlay text without a network: rows of letter-like shapes that stand still; an OCR model can take its place.

In every other place of a clip, shapes darker or lighter than their surroundings are taken as letters where their size,
stroke and contrast fit, and lines are rows of at least four letters of like height on one base. A letter counts only if
it is there, unmoved, in the next frame of the place as well. A recogniser goes in as a scorer of the same condition:
`kling score --scorers package.module:SCORER` (see `measure.Scorer`).
"""

import cv2
import numpy as np

from kling_jax.measure.sample import CLOSELY, Sample

NAME, VERSION = "letter-rows", "1"
CONDITIONS = ("text",)
AROUND = 25  # pixels: window of the mean that letters are compared with
CONTRAST = 28  # levels
LEAST_HEIGHT, MOST_HEIGHT = 7, 64  # pixels at 480 on the shorter side
LEAST_LETTERS = 4
UNMOVED = 0.7  # share of a letter's pixels that must be the same in the next frame
MOVED = 12  # levels
SPREAD, SOFT = 20, 0.25  # most deviation within a letter: levels, and of its contrast for its soft edges
WITHIN_WORDS = 0.5  # least share of the gaps that are narrow, as between the letters of a word
INTRUDERS = 0.4  # shapes that reach into a line from above or below, for each of its letters


def text(sample: Sample) -> dict[str, float]:
  """text: share of the frame's area under lines of text (their boxes), mean over every other place of the clip."""
  if not sample.luma:
    return {}
  shares = []
  for place, luma in enumerate(sample.luma[CLOSELY]):
    steady = cv2.absdiff(luma, sample.later[place]) <= MOVED if place < len(sample.later) else None
    shares.append(area(lines(luma, steady), luma.shape))
  return {"text": float(np.mean(shares))}


def area(boxes_N4: np.ndarray, shape: tuple[int, ...]) -> float:
  """Share of a picture of `shape` under boxes (left, top, right, bottom)."""
  covered = np.zeros(shape[:2], bool)
  for left, top, right, bottom in boxes_N4:
    covered[top:bottom, left:right] = True
  return float(covered.mean())


def lines(luma_HW: np.ndarray, steady_HW: np.ndarray | None = None) -> np.ndarray:
  """Boxes (N, 4) of lines of text in a picture: left, top, right, bottom in pixels, ends exclusive.

  Args:
    luma_HW: uint8, about 480 pixels on the shorter side.
    steady_HW: bool, what stands still; letters elsewhere do not count.
  """
  mean = cv2.blur(luma_HW, (AROUND, AROUND))
  darker, lighter = cv2.subtract(mean, luma_HW), cv2.subtract(luma_HW, mean)
  return np.concatenate([_rows(*_shapes(contrast, luma_HW, steady_HW)) for contrast in (darker, lighter)])


def _shapes(
  contrast_HW: np.ndarray, luma_HW: np.ndarray, steady_HW: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
  """What stands out: letters (N, 7) of left, top, width, height, stroke width, level, fill; boxes (M, 4) of all."""
  mask = (contrast_HW > CONTRAST).view(np.uint8)
  count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
  left, top, width, height, pixels = stats.T.astype(np.float64)
  fill = pixels / (width * height)
  rows, columns = luma_HW.shape
  fits = (height >= LEAST_HEIGHT) & (height <= MOST_HEIGHT) & (width <= 2.5 * height) & (width >= 0.08 * height)
  fits &= (fill > 0.12) & (fill < 0.95)
  fits &= (left > 0) & (top > 0) & (left + width < columns) & (top + height < rows)
  fits[0] = False  # the background
  seen = (pixels >= 6) & (np.arange(count) > 0)
  boxes_M4 = np.stack([left, top, left + width, top + height], -1)[seen]
  if np.count_nonzero(fits) < LEAST_LETTERS:
    return np.zeros((0, 7)), boxes_M4
  where = np.flatnonzero(mask)
  number, grey = labels.ravel()[where], luma_HW.ravel()[where].astype(np.float64)
  level = np.bincount(number, grey, count) / np.maximum(pixels, 1)
  spread = np.sqrt(np.maximum(np.bincount(number, grey * grey, count) / np.maximum(pixels, 1) - level**2, 0))
  contrast = np.bincount(number, contrast_HW.ravel()[where], count) / np.maximum(pixels, 1)
  outline = np.flatnonzero(mask - cv2.erode(mask, np.ones((3, 3), np.uint8)))
  edge = np.bincount(labels.ravel()[outline], minlength=count)
  stroke = 2 * pixels / np.maximum(edge, 1)  # a bar of width w has w pixels for two of its outline
  fits &= (stroke < 0.42 * height) & (stroke < 14) & (spread < SPREAD + SOFT * contrast)
  if steady_HW is not None:
    fits &= np.bincount(number, steady_HW.ravel()[where], count) >= UNMOVED * pixels
  return np.stack([left, top, width, height, stroke, level, fill], axis=-1)[fits], boxes_M4


def _rows(letters_N7: np.ndarray, boxes_M4: np.ndarray) -> np.ndarray:
  """Boxes of rows of letters that are alike and follow one another, with nothing reaching in from above or below."""
  none = np.zeros((0, 4), np.int64)
  if len(letters_N7) < LEAST_LETTERS:
    return none
  left, top, width, height, stroke, level, fill = letters_N7.T
  right, bottom = left + width, top + height
  tall = np.maximum(height[:, None], height)
  gap = np.maximum(left[:, None], left) - np.minimum(right[:, None], right)
  base = np.abs(bottom[:, None] - bottom)
  near = (tall / np.minimum(height[:, None], height) < 2.0) & (gap < 1.0 * tall) & (gap > -0.3 * tall)
  near &= (base < 0.2 * tall) | (np.abs((top + bottom)[:, None] - (top + bottom)) / 2 < 0.15 * tall)
  near &= np.maximum(stroke[:, None], stroke) / np.minimum(stroke[:, None], stroke) < 1.7
  near &= np.abs(level[:, None] - level) < 30
  from scipy import sparse  # half a second that other users of this package need not wait

  _, group = sparse.csgraph.connected_components(sparse.csr_array(near), directed=False)
  boxes = []
  for number in np.flatnonzero(np.bincount(group) >= LEAST_LETTERS):
    inside = group == number
    box = left[inside].min(), top[inside].min(), right[inside].max(), bottom[inside].max()
    size = np.median(height[inside])
    # A line is one line high and longer than high; its letters are of one colour, and not alike as bricks are.
    if box[3] - box[1] > 2.5 * size or box[2] - box[0] < 2.5 * size:
      continue
    alike = np.ptp(width[inside]) < 0.25 * size and np.ptp(fill[inside]) < 0.15
    if np.std(level[inside]) > 14 or np.median(fill[inside]) > 0.8 or alike:
      continue
    order = np.argsort(left[inside])
    gaps = left[inside][order][1:] - np.maximum.accumulate(right[inside][order])[:-1]
    if np.mean(gaps < 0.4 * size) < WITHIN_WORDS:
      continue
    across = (boxes_M4[:, 0] < box[2]) & (boxes_M4[:, 2] > box[0])
    reach = 0.25 * size
    cut_top = (boxes_M4[:, 1] < box[1] - reach) & (boxes_M4[:, 3] > box[1] + reach)
    cut_bottom = (boxes_M4[:, 1] < box[3] - reach) & (boxes_M4[:, 3] > box[3] + reach)
    if np.count_nonzero(across & (cut_top | cut_bottom)) > INTRUDERS * np.count_nonzero(inside):
      continue
    boxes.append(box)
  return np.array(boxes, np.int64) if boxes else none
