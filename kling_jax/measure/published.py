"""Scores as published filters define them, in their units and on their frames, so that their thresholds mean the same.

Measured only when asked for (`kling score --scorers presets`): each decodes the media as its model does. Sources:
Cosmos and NeMo Curator's motion filter, Data-Juicer's video_motion_score_filter, Open-Sora 1.3's optical_flow tool,
UltraVideo's rules for bad frames (arXiv 2506.13691).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import av
import cv2
import numpy as np

from kling_jax.data import decode, picture
from kling_jax.errors import DataError
from kling_jax.measure import sample as sample_lib
from kling_jax.measure import text, vectors
from kling_jax.measure.sample import Sample

VERSION = "1"
COSMOS_FPS, COSMOS_SHARE, COSMOS_LEAST_FRAMES, COSMOS_LEAST_SIDE, COSMOS_PATCH = 2.0, 0.5, 10, 256, 256
JUICER_FPS = 2.0
OPEN_SORA_FRAMES, OPEN_SORA_SIZE = tuple(range(0, 136, 15)), (320, 576)  # (height, width); turned for upright videos
ULTRA_FPS = 2.0
ULTRA_TEXT, ULTRA_EXTREME, ULTRA_BORDER, ULTRA_BORDER_LEVEL, ULTRA_VARIANCE = 0.02, 0.12, 0.03, 3.0, 1.2
FARNEBACK = (0.5, 3, 15, 3, 5, 1.2, 0)  # Data-Juicer's


@dataclasses.dataclass(frozen=True)
class Definition:
  """A published score: who defined it and with what it is computed, the conditions, and the measure."""

  name: str
  conditions: tuple[str, ...]
  measure: Callable[[Sample], dict[str, float]]


def cosmos(sample: Sample) -> dict[str, float]:
  """Cosmos' and NeMo's motion filter: motion vectors of frames at 2 a second over half of the clip, at least ten.

  Returns:
    cosmos_motion: mean of |vector| / (height + width), 0 where no vector is. cosmos_motion_patch: the least value of
    that field, averaged over frames and shrunk 256 times by bilinear interpolation (which looks at single pixels, as
    theirs does). {} for codecs without motion vectors and, as there, for sides below 256 pixels.
    They keep clips from 0.00098 and 1e-6.
  """
  with decode.Cursor(_media(sample), decode.DEFAULT_LIMITS, vectors=True) as cursor:
    info_fps = float(cursor.video.rate or 30)
    step = max(1, round(info_fps / COSMOS_FPS))
    frames: list[sample_lib.Vectors] = []
    count = 0
    for count, frame in enumerate(_frames(cursor), 1):
      if (count - 1) % step == 0:
        frames += sample_lib.vectors_of(frame)
  most = max(COSMOS_LEAST_FRAMES, round(COSMOS_FPS * COSMOS_SHARE * count / info_fps))
  frames = frames[:most]
  if not frames or min(frames[0].height, frames[0].width) < COSMOS_LEAST_SIDE:
    return {}
  height, width = frames[0].height, frames[0].width
  cells = vectors.mean_length(frames)
  pixels = np.repeat(np.repeat(cells, vectors.CELL, 0), vectors.CELL, 1)[:height, :width].astype(np.float32)
  patches = cv2.resize(pixels, None, fx=1 / COSMOS_PATCH, fy=1 / COSMOS_PATCH)
  return {"cosmos_motion": float(pixels.mean(dtype=np.float64)), "cosmos_motion_patch": float(patches.min())}


def data_juicer(sample: Sample) -> dict[str, float]:
  """Data-Juicer's motion: mean length of Farneback's flow in pixels of the media, between frames at 2 a second.

  Its reader takes frames 0, 1, s, 2 s, ... with s = round(fps / 2), at most one less than there are frames. It keeps
  clips from 0.25 pixels. Other resolutions give other values; that is how it is defined.
  """
  with decode.Cursor(_media(sample), decode.DEFAULT_LIMITS) as cursor:
    fps = float(cursor.video.rate or 30)
    total = sum(1 for _ in _frames(cursor))
  step = max(min(round(fps / min(JUICER_FPS, fps)), total - 1), 1)
  picks = [0, 1, *range(step, total, step)] if total > 1 else []
  greys = _greys(sample, picks)
  flows = [
    cv2.calcOpticalFlowFarneback(first, second, np.zeros((*first.shape, 2), np.float32), *FARNEBACK)
    for first, second in itertools.pairwise(greys)
  ]
  lengths = [np.hypot(flow[..., 0], flow[..., 1]).mean(dtype=np.float64) for flow in flows]
  return {"datajuicer_motion": float(np.mean(lengths))} if lengths else {}


def open_sora(sample: Sample) -> dict[str, float]:
  """Open-Sora's flow score: mean flow in pixels of 576 x 320 between frames 0, 15, ..., 135 (those that there are).

  Their flow is UniMatch's; here it is OpenCV's dense inverse search, which the scorer's name says. Read its values as
  theirs only roughly: large displacements over half a second are where a network is better.
  """
  height, width = OPEN_SORA_SIZE
  upright = sample.frames_THWC.shape[1] > sample.frames_THWC.shape[2]
  size = (height, width) if upright else (width, height)
  greys = [cv2.resize(grey, size, interpolation=cv2.INTER_AREA) for grey in _greys(sample, OPEN_SORA_FRAMES)]
  search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
  flows = [
    search.calc(first, second, np.zeros((*first.shape, 2), np.float32)) for first, second in itertools.pairwise(greys)
  ]
  lengths = [np.hypot(flow[..., 0], flow[..., 1]).mean(dtype=np.float64) for flow in flows]
  return {"opensora_motion": float(np.mean(lengths))} if lengths else {}


def ultra_video(sample: Sample) -> dict[str, float]:
  """UltraVideo's share of bad frames, at 2 frames a second; it drops clips above 0.05.

  A frame is bad where text covers more than 2 % (here `measure.text`, there PaddleOCR), a border of 3 % of a side is
  darker than 3 levels on the mean, more than 12 % of the pixels are above 250 or below 5, or the variance of R, G
  and B is below 1.2 on the mean.
  """
  with decode.Cursor(_media(sample), decode.DEFAULT_LIMITS) as cursor:
    step = max(1, round(float(cursor.video.rate or 30) / ULTRA_FPS))
    size = sample.frames_THWC.shape[1:3]
    bad = [_bad(picture.cover(frame, *size)) for number, frame in enumerate(_frames(cursor)) if number % step == 0]
  return {"ultravideo_bad_frames": float(np.mean(bad))}


def _bad(frame_HWC: np.ndarray) -> bool:
  grey = cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2GRAY)
  rows, columns = (max(1, round(ULTRA_BORDER * side)) for side in grey.shape)
  borders = (grey[:rows], grey[-rows:], grey[:, :columns], grey[:, -columns:])
  extreme = ((grey > 250) | (grey < 5)).mean()
  return bool(
    extreme > ULTRA_EXTREME
    or min(border.mean() for border in borders) < ULTRA_BORDER_LEVEL
    or frame_HWC.reshape(-1, 3).var(0).mean() < ULTRA_VARIANCE
    or text.area(text.lines(grey), grey.shape) > ULTRA_TEXT
  )


DEFINITIONS = (
  Definition("cosmos-bitstream", ("cosmos_motion", "cosmos_motion_patch"), cosmos),
  Definition("data-juicer-farneback", ("datajuicer_motion",), data_juicer),
  Definition("open-sora-frames+dis-flow", ("opensora_motion",), open_sora),
  Definition("ultravideo-rules+letter-rows", ("ultravideo_bad_frames",), ultra_video),
)


def _media(sample: Sample) -> decode.Media:
  if sample.media is None:
    raise DataError("the scores of published filters need a video file: they are defined on its frame numbers")
  return sample.media


def _frames(cursor: decode.Cursor) -> Iterator[av.VideoFrame]:
  """All frames of a cursor that has not moved yet."""
  for _, frame in cursor.span(cursor.pts, 2**62):
    yield frame


def _greys(sample: Sample, picks: Sequence[int]) -> list[np.ndarray]:
  """Luma of the frames with these ascending numbers, those that there are; uint8 in the size of the media."""
  wanted, found = set(picks), []
  with decode.Cursor(_media(sample), decode.DEFAULT_LIMITS) as cursor:
    for number, frame in enumerate(_frames(cursor)):
      if number in wanted:
        found += [cv2.cvtColor(picture.to_rgb(frame), cv2.COLOR_RGB2GRAY)] * list(picks).count(number)
      if number >= max(picks, default=0):
        break
  return found
