"""Thumbnails for detectors that look at every frame: 64 x 32 luma and 32 x 16 chroma, read off the decoder's planes.

A conversion to RGB and an area mean of the whole frame cost as much as decoding a small video. Here each value is the
mean of a few samples: the planes are sampled on a grid, which leaves most of the memory alone.
The picture is stretched to 2 : 1 whatever its shape and stays as stored (the rotation flag is not applied).
"""

import typing

import av
import av.buffer
import av.video.plane
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Interpolation

from kling_jax.data import picture

HEIGHT, WIDTH = 32, 64
SIZE = HEIGHT * WIDTH * 3 // 2
_MOST_SAMPLES = 4, 8  # rows and columns that are averaged for one value
_SMALL = 2**15  # pixels; smaller planes are averaged whole
_PLANAR = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "yuv440p", "yuvj440p", "gray"}


def thumbnail(frame: av.VideoFrame) -> np.ndarray:
  """The thumbnail of a frame: uint8 (3072,), full range, BT.601 or BT.709 as stored.

  Holds luma (32, 64), then blue chroma (16, 32), then red chroma (16, 32), 128 where there is no colour. Planar 8-bit
  frames are sampled in place; any other format goes through swscale's area mean first.
  """
  full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
  if frame.format.name not in _PLANAR:
    # Alpha is dropped, not composited: only differences between frames matter here.
    options = {"width": WIDTH * 4, "height": HEIGHT * 4, "format": "yuvj444p", "interpolation": Interpolation.AREA}
    frame, full = picture.reformat(frame, **options), True
  out = np.full(SIZE, 128, np.uint8)
  luma, chroma = HEIGHT * WIDTH, HEIGHT * WIDTH // 4
  out[:luma] = _shrunk(frame.planes[0], HEIGHT, WIDTH)
  if len(frame.planes) > 1:
    out[luma : luma + chroma] = _shrunk(frame.planes[1], HEIGHT // 2, WIDTH // 2)
    out[luma + chroma :] = _shrunk(frame.planes[2], HEIGHT // 2, WIDTH // 2)
  if not full:
    out[:luma] = _LUMA_TO_FULL[out[:luma]]
    out[luma:] = _CHROMA_TO_FULL[out[luma:]]
  return out


_LEVELS = np.arange(256, dtype=np.float32)
_LUMA_TO_FULL = np.clip(np.rint((_LEVELS - 16) * 255 / 219), 0, 255).astype(np.uint8)
_CHROMA_TO_FULL = np.clip(np.rint((_LEVELS - 128) * 255 / 224 + 128), 0, 255).astype(np.uint8)


def _shrunk(plane: av.video.plane.VideoPlane, height: int, width: int) -> np.ndarray:
  """A plane as (height * width,) means of up to 4 x 8 samples each."""
  memory = np.frombuffer(memoryview(typing.cast(av.buffer.Buffer, plane)), np.uint8)
  rows = memory[: plane.height * plane.line_size].reshape(plane.height, plane.line_size)
  samples: np.ndarray = rows[:, : plane.width]
  if samples.size > _SMALL:
    down = min(_MOST_SAMPLES[0], max(1, plane.height // height))
    across = min(_MOST_SAMPLES[1], max(1, plane.width // width))
    samples = cv2.resize(samples, (width * across, height * down), interpolation=cv2.INTER_NEAREST)
  return cv2.resize(samples, (width, height), interpolation=cv2.INTER_AREA).reshape(-1)


def of_rgb(frame_HWC: np.ndarray) -> np.ndarray:
  """The thumbnail of uint8 RGB pixels (H, W, 3), H and W at least 32 and 64: uint8 (3072,)."""
  ycrcb = cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2YCrCb)
  luma = cv2.resize(ycrcb[..., 0], (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
  chroma = cv2.resize(ycrcb[..., 1:], (WIDTH // 2, HEIGHT // 2), interpolation=cv2.INTER_AREA)
  return np.concatenate([luma.reshape(-1), chroma[..., 1].reshape(-1), chroma[..., 0].reshape(-1)])
