"""One decoded frame to an upright RGB array: colour, alpha, rotation flag, covering resize."""

import threading
import typing
from typing import Any

import av
import av.buffer
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

_SHRINK = Interpolation.AREA
_ENLARGE = Interpolation.BICUBIC
# Rounded, full-resolution chroma: without these swscale's RGB is off by up to 4 levels.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP


_scalers = threading.local()


def reformat(frame: av.VideoFrame, **options: Any) -> av.VideoFrame:
  """`frame.reformat` with one scaler a thread; PyAV's own method sets one up for every frame."""
  return _scaler("scaler").reformat(frame, **options)


def _scaler(name: str) -> VideoReformatter:
  """The scaler of this thread under `name`; one keeps its tables as long as sizes stay the same."""
  if not hasattr(_scalers, name):
    setattr(_scalers, name, VideoReformatter())
  return getattr(_scalers, name)


def tiny(frame: av.VideoFrame) -> av.VideoFrame:
  """A copy of 2 x 2 pixels with the frame's side data.

  PyAV's frame and its side data hold each other until the cyclic collector runs, which counts objects and not bytes: a
  training run that read the display matrix off its 720p frames grew to 16 GB.
  """
  return _scaler("tiny").reformat(frame, width=2, height=2, format="gray", interpolation=Interpolation.POINT)


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
  """The display matrix as (transpose, flip_rows, flip_columns), to be applied in this order; (False,) * 3 without one.

  A matrix that is no multiple of a right angle is rounded to the nearest one, as players do.
  """
  try:
    side = tiny(frame).side_data.get("DISPLAYMATRIX")
  except ValueError:  # PyAV does not know a kind of side data that its FFmpeg attached (EXIF, stereo views).
    turns = round(frame.rotation / 90) % 4  # counter-clockwise; mirroring is not told
    return turns % 2 == 1, turns in (1, 2), turns in (2, 3)
  if side is None:
    return False, False, False
  a, b, _, c, d = np.frombuffer(bytes(typing.cast(av.buffer.Buffer, side)), "<i4")[:5].astype(np.float64)
  # A stored point (column p, row q) is shown at column a p + c q, row b p + d q, up to a shift.
  if abs(b) + abs(c) > abs(a) + abs(d):
    return True, bool(b < 0), bool(c < 0)
  return False, bool(d < 0), bool(a < 0)


def upright_size(frame: av.VideoFrame) -> tuple[int, int]:
  """(height, width) as displayed, after the rotation flag."""
  return (frame.width, frame.height) if orientation(frame)[0] else (frame.height, frame.width)


def to_rgb(frame: av.VideoFrame, size: tuple[int, int] | None = None) -> np.ndarray:
  """Converts a frame to upright uint8 RGB (height, width, 3).

  Args:
    frame: any pixel format: 8 to 16 bits, any chroma subsampling, grey, palette, full or limited range. Alpha is
      composited on black. Interlaced frames stay woven, both fields as stored. The sample aspect ratio is not applied.
    size: (height, width) after rotation; None keeps the frame's own. Shrinking averages over areas.
  """
  transpose, flip_rows, flip_columns = orientation(frame)
  height, width = size or upright_size(frame)
  if transpose:
    height, width = width, height
  if any(component.is_alpha for component in frame.format.components):
    rgb = _shrink_array(_on_black(frame), height, width)
  else:
    shrinks = height <= frame.height and width <= frame.width
    flags = (_SHRINK if shrinks else _ENLARGE) | _EXACT
    rgb = reformat(frame, width=width, height=height, format="rgb24", interpolation=flags, threads=1).to_ndarray()
  if transpose:
    rgb = rgb.swapaxes(0, 1)
  if flip_rows:
    rgb = rgb[::-1]
  if flip_columns:
    rgb = rgb[:, ::-1]
  return np.ascontiguousarray(rgb)


def cover(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
  """Resizes the upright frame so that it covers height x width, keeping its shape, and crops at the centre."""
  rows, columns = upright_size(frame)
  scale = max(height / rows, width / columns)
  scaled = max(height, round(rows * scale)), max(width, round(columns * scale))
  top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
  return to_rgb(frame, scaled)[top : top + height, left : left + width]


def _on_black(frame: av.VideoFrame) -> np.ndarray:
  """Straight alpha over black, rounded."""
  rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
  return ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)


def _shrink_array(rgb: np.ndarray, height: int, width: int) -> np.ndarray:
  if rgb.shape[:2] == (height, width):
    return rgb
  shrinks = height <= rgb.shape[0] and width <= rgb.shape[1]
  return cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
