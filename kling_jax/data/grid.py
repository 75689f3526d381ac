"""Pictures of many clips at once: a grid video, and a contact sheet with one row of frames a clip."""

import math
import os

import cv2
import numpy as np

from kling_jax import files


def grid(frames_BTHWC: np.ndarray, gap: int = 2) -> np.ndarray:
  """Tiles B clips into one video (T, H', W', 3), as square as possible, white gaps of `gap` pixels; sizes are even."""
  clips, frames, height, width, _ = frames_BTHWC.shape
  columns = math.ceil(math.sqrt(clips))
  rows = math.ceil(clips / columns)
  tall, wide = rows * (height + gap) - gap, columns * (width + gap) - gap
  canvas = np.full((frames, tall + tall % 2, wide + wide % 2, 3), 255, np.uint8)
  for number, clip_THWC in enumerate(frames_BTHWC):
    top, left = number // columns * (height + gap), number % columns * (width + gap)
    canvas[:, top : top + height, left : left + width] = clip_THWC
  return canvas


def contact_sheet(frames_BTHWC: np.ndarray, columns: int = 8, gap: int = 2) -> np.ndarray:
  """One row of at most `columns` evenly spaced frames a clip, first and last included: uint8 (H', W', 3)."""
  frames = frames_BTHWC.shape[1]
  chosen = np.unique(np.linspace(0, frames - 1, min(columns, frames)).round().astype(int))
  picked = frames_BTHWC[:, chosen]
  clips, count, height, width, _ = picked.shape
  sheet = np.full((clips * (height + gap) - gap, count * (width + gap) - gap, 3), 255, np.uint8)
  for row in range(clips):
    for column in range(count):
      top, left = row * (height + gap), column * (width + gap)
      sheet[top : top + height, left : left + width] = picked[row, column]
  return sheet


def write_png(path: str | os.PathLike[str], image_HWC: np.ndarray) -> None:
  """Writes an RGB uint8 image, whole or not at all."""
  with files.whole(path) as temporary:
    temporary.write_bytes(png(image_HWC))


def png(image_HWC: np.ndarray) -> bytes:
  """Encodes an RGB uint8 image as PNG bytes."""
  _, data = cv2.imencode(".png", np.ascontiguousarray(image_HWC[..., ::-1]))
  return data.tobytes()
