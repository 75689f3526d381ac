"""Fragments of a clip as FAST-VQA samples them: mosaics of small patches in the media's own pixels; a plain picture.

A mosaic is a grid of patches, one from a random place of each cell of the frame, the same places in all frames of a
mosaic. Frames follow one another by a stride from a random start within the mosaic's share of the clip. All of it is a
function of a seed, which at test time comes from the clip's id: scores do not change from run to run.
"""

import dataclasses
import hashlib
import itertools

import av
import cv2
import numpy as np

from kling_jax.data import picture

MEAN = (123.675, 116.28, 103.53)  # of R, G, B in 0..255, as both backbones were trained
DEVIATION = (58.395, 57.12, 57.375)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is sampled of a clip.

  Attributes:
    grid: rows and columns of patches of a mosaic. patch: pixels of a patch's side.
    frames, stride: of a mosaic; the stride is in frames of the clip, which is walked in a circle where it is shorter.
    mosaics: of a clip, each from its own equal share of it.
    image: pixels of the sides of the picture, the clip's middle frame with its proportions given up.
    small_video_bug: cells of videos that had to be enlarged are cut by their size before, as in the released code, so
      that patches come from the upper left part alone; what its weights were trained with.
  """

  grid: tuple[int, int] = (7, 7)
  patch: int = 32
  frames: int = 32
  stride: int = 2
  mosaics: int = 4
  image: int = 224
  small_video_bug: bool = False

  @property
  def size(self) -> tuple[int, int]:
    """Rows and columns of pixels of a mosaic."""
    return self.grid[0] * self.patch, self.grid[1] * self.patch

  def shown(self, height: int, width: int) -> tuple[int, int]:
    """The size at which a frame is sampled: its own, enlarged where its shorter side is smaller than a mosaic's."""
    scale = max(1.0, min(self.size) / min(height, width))
    return max(self.size[0], round(height * scale)), max(self.size[1], round(width * scale))

  def indices(self, num_frames: int, seed: int) -> np.ndarray:
    """(mosaics, frames): numbers of the frames of each mosaic."""
    rng = _rng(seed, 0)
    span = self.frames * self.stride
    borders = np.linspace(0, num_frames, self.mosaics + 1).astype(int)
    rows = []
    for start, end in itertools.pairwise(borders.tolist()):
      room = max(0, end - start - span)
      rows.append((start + int(rng.integers(room + 1)) + self.stride * np.arange(self.frames)) % max(num_frames, 1))
    return np.array(rows)

  def places(self, height: int, width: int, seed: int) -> np.ndarray:
    """(mosaics, rows, columns, 2): upper left corners of the patches in a frame of this size, before enlarging."""
    rng = _rng(seed, 1)
    shown = self.shown(height, width)
    base = (height, width) if self.small_video_bug else shown
    cells = [base[axis] // self.grid[axis] for axis in (0, 1)]
    corners = np.empty((self.mosaics, *self.grid, 2), int)
    for axis, size in enumerate(shown):
      room = max(0, cells[axis] - self.patch)
      first = np.minimum(cells[axis] * np.arange(self.grid[axis]), size - self.patch)
      first = first[:, None] if axis == 0 else first[None, :]
      corners[..., axis] = first + rng.integers(0, room + 1, (self.mosaics, *self.grid))
    return corners

  def mosaic(self, frame_HWC: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """One frame's patches side by side: uint8 (rows, columns, 3); `corners` (rows, columns, 2)."""
    steps = np.arange(self.patch)
    rows = corners[..., 0, None, None] + steps[:, None]
    columns = corners[..., 1, None, None] + steps[None, :]
    return frame_HWC[rows, columns].transpose(0, 2, 1, 3, 4).reshape(*self.size, 3)


def _rng(seed: int, stream: int) -> np.random.Generator:
  return np.random.Generator(np.random.PCG64([seed, stream]))


def seed_of(clip_id: str) -> int:
  """The seed of a clip at test time."""
  return int.from_bytes(hashlib.sha256(clip_id.encode("utf-8", "surrogateescape")).digest()[:8], "little")


class Collector:
  """Takes the frames of a plan's mosaics while a clip is decoded."""

  def __init__(self, plan: Plan, seed: int, height: int, width: int, num_frames: int, duration_s: float):
    """
    Args:
      plan, seed: what, and of which draw. height, width: upright size of the frames.
      num_frames, duration_s: of the clip; frame k is the one shown at k / num_frames of it.
    """
    self._plan, self._size = plan, plan.shown(height, width)
    self._corners = plan.places(height, width, seed)
    self._indices = plan.indices(num_frames, seed)
    self.wanted = np.unique(self._indices)
    self.times_s = self.wanted * duration_s / max(num_frames, 1)
    self.mosaics_QTHWC = np.zeros((plan.mosaics, plan.frames, *plan.size, 3), np.uint8)

  def take(self, number: int, frame: av.VideoFrame | np.ndarray) -> None:
    """The frame shown at `times_s[number]`."""
    if isinstance(frame, np.ndarray):
      rgb = (
        frame if frame.shape[:2] == self._size else cv2.resize(frame, self._size[::-1], interpolation=cv2.INTER_LINEAR)
      )
    else:
      rgb = picture.cover(frame, *self._size)
    for mosaic, place in np.argwhere(self._indices == self.wanted[number]):
      self.mosaics_QTHWC[mosaic, place] = self._plan.mosaic(rgb, self._corners[mosaic])


def normalised(pixels: np.ndarray) -> np.ndarray:
  """uint8 RGB (.., 3) as the backbones want it, float32."""
  return (pixels.astype(np.float32) - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)


def image(frame_HWC: np.ndarray, side: int) -> np.ndarray:
  """The frame as a square, uint8."""
  smaller = side < min(frame_HWC.shape[:2])
  return cv2.resize(frame_HWC, (side, side), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
