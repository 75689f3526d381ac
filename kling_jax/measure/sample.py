"""What scorers see of a clip: a few frames, native luma, thumbnails of consecutive frames, motion vectors; one decode.

A clip is looked at in eight places spread over it, in each at two frames about 0.1 s apart; every other place is looked
at closely: a third frame, native pixels, the second frame's luma. Clips of up to 20 s are
decoded once from end to end, so that thumbnails of all their frames come along; of longer ones only the places are.
"""

import dataclasses
import functools
import typing

import av
import av.buffer
import cv2
import numpy as np
from av.video.reformatter import ColorRange

from kling_jax.data import decode, picture, thumbnail
from kling_jax.errors import DataError
from kling_jax.measure import fragments, motion

PLACES = 8
CLOSELY = slice(None, None, 2)  # of the places
SIDE = 256  # pixels of the shorter side of the frames
LUMA_SIDE = 480  # most pixels of the shorter side of the luma pictures
CROP = 512  # most pixels of the sides of the native crops
GRID = 16  # pixels; crops begin at its multiples, so that codecs' blocks keep their place
WHOLE_S = 20.0  # longest clip that is decoded from end to end
_PLANAR = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "yuv440p", "yuvj440p", "gray"}
_TO_FULL = np.clip(np.rint((np.arange(256) - 16) * 255 / 219), 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Vectors:
  """The motion vectors of one frame, as the codec coded them.

  Attributes:
    blocks: int32 (N, 6): x and y of the block's middle, its width and height, and where it comes from (x, y) relative
      to its place, in quarter pixels.
    height, width: of the frame, as stored.
  """

  blocks: np.ndarray
  height: int
  width: int


@dataclasses.dataclass(frozen=True)
class Sample:
  """The part of a clip that is measured.

  Attributes:
    frames_THWC: uint8 RGB, ascending in time.
    times_s: (T,) their seconds from the clip's start.
    pairs: indices of frames about 0.1 s apart, one a place.
    triples: of every other place, indices (i, j, k) of frames with both steps about 0.1 s; one step is among `pairs`.
    luma: a place, its first frame's luma, uint8, at most 480 pixels on the shorter side.
    later: of every other place the same of its second frame.
    crops: of every other place the middle of its first frame's luma, in the pixels of the media, at most 512 x 512.
    thumbs_FHW: uint8 luma thumbnails (F, 32, 64) of every decoded frame.
    thumb_times_s: (F,) their seconds; frames are consecutive within a run.
    runs: (F,) number of the run of consecutive frames that a thumbnail belongs to.
    vectors: of the second frames of the pairs, where they have any; none where the codec keeps none.
    media: the file or bytes that the frames come from; none for bare frames.
    mosaics_QTHWC: uint8 fragments (`fragments.Plan`), where they were asked for.
  """

  frames_THWC: np.ndarray
  times_s: np.ndarray
  pairs: list[tuple[int, int]]
  triples: list[tuple[int, int, int]]
  luma: list[np.ndarray]
  later: list[np.ndarray]
  crops: list[np.ndarray]
  thumbs_FHW: np.ndarray
  thumb_times_s: np.ndarray
  runs: np.ndarray
  vectors: list[Vectors] | None = None
  media: decode.Media | None = None
  mosaics_QTHWC: np.ndarray | None = None

  @functools.cached_property
  def places(self) -> list[int]:
    """Index of the first frame of each place: frames well apart in time."""
    return [pair[0] for pair in self.pairs] or list(range(len(self.times_s)))[:PLACES]

  @functools.cached_property
  def looks(self) -> tuple[np.ndarray, np.ndarray]:
    """The frames of the pairs and their times; of bare frames all."""
    if self.media is None or not self.pairs:
      return self.frames_THWC, self.times_s
    picks = sorted({i for pair in self.pairs for i in pair})
    return self.frames_THWC[picks], self.times_s[picks]

  @functools.cached_property
  def grey_THW(self) -> np.ndarray:
    """The frames' luma (BT.601), uint8."""
    return np.stack([cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in self.frames_THWC])

  @property
  def steps(self) -> list[tuple[int, int]]:
    """The pairs and both steps of the triples."""
    return sorted({*self.pairs, *(step for i, j, k in self.triples for step in ((i, j), (j, k)))})

  @functools.cached_property
  def flows(self) -> dict[tuple[int, int], motion.Flow]:
    """Farneback's optical flow of the steps."""
    small = {i: motion.prepare(self.frames_THWC[i]) for i in sorted({i for step in self.steps for i in step})}
    return {(i, j): motion.flow(small[i], small[j], self.times_s[j] - self.times_s[i]) for i, j in self.steps}


Wish = tuple[fragments.Plan, int]  # which fragments, and the seed of their places


def of_frames(frames_THWC: np.ndarray, times_s: np.ndarray, wish: Wish | None = None) -> Sample:
  """The sample of frames that are at hand, such as a generated video: all of them.

  Args:
    frames_THWC: uint8 RGB (T, H, W, 3) at any size.
    times_s: (T,) their ascending seconds.
    wish: fragments to take along.

  Raises:
    DataError: no frames, a wrong shape or dtype, or times that do not match them.
  """
  if frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or frames_THWC.dtype != np.uint8 or not frames_THWC.size:
    found = f"{frames_THWC.dtype} {frames_THWC.shape}"
    raise DataError(f"scores need at least one frame, as uint8 of shape (T, H, W, 3); got {found}")
  times_s = np.asarray(times_s, np.float64)
  if times_s.shape != frames_THWC.shape[:1] or (np.diff(times_s) < 0).any():
    raise DataError(f"{len(frames_THWC)} frames need as many ascending times, got shape {times_s.shape}")
  pairs = motion.frame_pairs(times_s)
  greys = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in frames_THWC]
  firsts = [i for i, _ in pairs] or list(range(len(times_s)))[:PLACES]
  size = (thumbnail.WIDTH, thumbnail.HEIGHT)
  height, width = frames_THWC.shape[1:3]
  collector = fragments.Collector(*wish, height, width, len(times_s), 1.0) if wish else None
  if collector:
    for number, index in enumerate(collector.wanted):
      collector.take(number, frames_THWC[index])
  return Sample(
    frames_THWC=frames_THWC,
    times_s=times_s,
    pairs=pairs,
    triples=_triples(times_s, pairs[CLOSELY]),
    luma=[at_most(greys[i], LUMA_SIDE) for i in firsts],
    later=[at_most(greys[j], LUMA_SIDE) for _, j in pairs[CLOSELY]],
    crops=[_crop(greys[i]) for i in firsts[CLOSELY]],
    thumbs_FHW=np.stack([cv2.resize(grey, size, interpolation=cv2.INTER_AREA) for grey in greys]),
    thumb_times_s=times_s,
    runs=np.zeros(len(times_s), np.int64),
    mosaics_QTHWC=collector.mosaics_QTHWC if collector else None,
  )


def _triples(times_s: np.ndarray, pairs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
  """Every pair with a third frame a like step after it, or else before it."""
  found = []
  for i, j in pairs:
    gap = times_s[j] - times_s[i]
    after, before = int(np.abs(times_s - times_s[j] - gap).argmin()), int(np.abs(times_s - times_s[i] + gap).argmin())
    if after > j and abs(times_s[after] - times_s[j] - gap) <= gap / 4:
      found.append((i, j, after))
    elif before < i and abs(times_s[i] - times_s[before] - gap) <= gap / 4:
      found.append((before, i, j))
  return found


def sample_times(duration_s: float, fps: float) -> np.ndarray:
  """The times of the pairs of a clip: eight places spread over it, at each two frames about 0.1 s apart.

  Args:
    duration_s: length of the clip. fps: its mean frame rate; a gap is a whole number of frames where there are any.

  Returns:
    (16,) ascending seconds in [0, duration_s), fewer for clips so short that places coincide; (1,) for a single frame.
  """
  starts, gap = _places(duration_s, fps)
  return np.unique(np.round(np.concatenate([starts, starts + gap]), 9))


def _places(duration_s: float, fps: float) -> tuple[np.ndarray, float]:
  step = 1 / fps
  last = max(duration_s - step, 0.0)  # the last frame's start
  gap = min(max(round(motion.GAP_S * fps), 1) * step, last)
  starts = np.linspace(0, last - gap, PLACES)
  return np.unique(np.round(starts * fps)) * step, gap


def of_media(
  source: decode.Media, wish: Wish | None = None, *, limits: decode.Limits = decode.DEFAULT_LIMITS
) -> Sample:
  """Samples a video file or encoded bytes in one decoding pass (long ones: by seeking to the places).

  Args:
    source: a file or bytes.
    wish: fragments to take along: in the same pass, or, of a clip so long that only its places are decoded, in another
      that seeks to them.
    limits: time, size and threads.

  Raises:
    MediaError: not one frame can be decoded.
  """
  info = decode.probe(source, limits, decode=False)
  scale = min(1.0, SIDE / min(info.height, info.width))
  size = max(1, round(info.height * scale)), max(1, round(info.width * scale))
  starts, gap = _places(info.duration_s, info.fps)
  last = max(info.duration_s - 1 / info.fps, 0.0)
  close = starts[CLOSELY]
  thirds = np.where(close + 2 * gap <= last + 1e-6, close + 2 * gap, close - gap)
  times_s = np.unique(np.round(np.concatenate([starts, starts + gap, thirds[thirds >= -1e-6]]), 9).clip(0))
  index = lambda second: int(np.abs(times_s - second).argmin())
  pairs = [(index(start), index(start + gap)) for start in starts] if gap > 0 else []
  triples = sorted(
    tuple(sorted((index(start), index(start + gap), index(third))))
    for start, third in zip(close, thirds, strict=True)
    if third >= -1e-6 and gap > 0
  )
  collector = fragments.Collector(*wish, info.height, info.width, info.num_frames, info.duration_s) if wish else None
  whole = info.duration_s <= WHOLE_S
  with decode.Cursor(source, limits, vectors=True) as cursor:
    firsts, seconds = ([index(second) for second in moments] for moments in (starts, starts + gap))
    seen = _look(cursor, times_s, info, size, firsts, seconds, collector if whole else None)
  if collector and not whole:
    _collect(source, collector, limits)
  return Sample(
    frames_THWC=seen.frames_THWC,
    times_s=times_s,
    pairs=pairs,
    triples=typing.cast(list[tuple[int, int, int]], [t for t in triples if len(set(t)) == 3]),
    luma=seen.luma,
    later=seen.later,
    crops=seen.crops,
    thumbs_FHW=np.stack(seen.thumbs),
    thumb_times_s=np.array(seen.thumb_times_s),
    runs=np.array(seen.runs),
    vectors=seen.vectors or None,
    media=source,
    mosaics_QTHWC=collector.mosaics_QTHWC if collector else None,
  )


def _collect(source: decode.Media, collector: fragments.Collector, limits: decode.Limits) -> None:
  """The fragments of a long clip."""
  with decode.Cursor(source, limits) as cursor:
    targets = decode.ticks(cursor.video.seconds(cursor.pts) + collector.times_s, cursor.video)
    for number, target in enumerate(targets.tolist()):
      collector.take(number, cursor.shown_at(target))


@dataclasses.dataclass
class _Seen:
  """What one pass collects."""

  frames_THWC: np.ndarray
  luma: list[np.ndarray] = dataclasses.field(default_factory=list)
  later: list[np.ndarray] = dataclasses.field(default_factory=list)
  crops: list[np.ndarray] = dataclasses.field(default_factory=list)
  thumbs: list[np.ndarray] = dataclasses.field(default_factory=list)
  thumb_times_s: list[float] = dataclasses.field(default_factory=list)
  runs: list[int] = dataclasses.field(default_factory=list)
  vectors: list[Vectors] = dataclasses.field(default_factory=list)


def _look(
  cursor: decode.Cursor,
  times_s: np.ndarray,
  info: decode.VideoInfo,
  size: tuple[int, int],
  firsts: list[int],
  seconds: list[int],
  collector: fragments.Collector | None,
) -> _Seen:
  """Walks over the spans of a clip and takes the frames shown at `times_s`: luma of `firsts`, vectors of `seconds`.

  `collector` is shown the frames that it wants.
  """
  seen = _Seen(np.empty((len(times_s), *size, 3), np.uint8))
  video = cursor.video
  origin = cursor.pts
  targets = decode.ticks(video.seconds(origin) + times_s, video)
  mosaic_times_s = np.zeros(0) if collector is None else collector.times_s
  mosaic_targets = decode.ticks(video.seconds(origin) + mosaic_times_s, video)

  def take(number: int, frame: av.VideoFrame) -> None:
    seen.frames_THWC[number] = picture.cover(frame, *size)
    if number in seconds:
      seen.vectors += vectors_of(frame)
    if number in firsts or number in seconds[CLOSELY]:
      luma = _luma(frame)
      small = at_most(luma, LUMA_SIDE)
      if seen.luma and small.shape != seen.luma[0].shape:  # streams may change size midway
        small = cv2.resize(small, seen.luma[0].shape[::-1], interpolation=cv2.INTER_AREA)
      if number in seconds[CLOSELY]:
        seen.later.append(small)
      if number in firsts:
        seen.luma.append(small)
      if number in firsts[CLOSELY]:
        seen.crops.append(_crop(luma).copy())

  number = mosaic = 0

  def advance(before: int, shown: av.VideoFrame) -> None:
    """Takes what is wanted of the frame that shows until tick `before`."""
    nonlocal number, mosaic
    while number < len(targets) and targets[number] < before:
      take(number, shown)
      number += 1
    while collector is not None and mosaic < len(mosaic_targets) and mosaic_targets[mosaic] < before:
      collector.take(mosaic, shown)
      mosaic += 1

  for run, (start, end) in enumerate(_spans(targets, info)):
    shown = cursor.shown_at(start - 1)  # a long frame may begin before the span
    for pts, frame in cursor.span(start, end):
      advance(pts, shown)
      shown = frame
      seen.thumbs.append(thumbnail.thumbnail(frame)[: thumbnail.HEIGHT * thumbnail.WIDTH].reshape(thumbnail.HEIGHT, -1))
      seen.thumb_times_s.append(video.seconds(pts - origin))
      seen.runs.append(run)
    advance(end, shown)
  return seen


def _spans(targets: np.ndarray, info: decode.VideoInfo) -> list[tuple[int, int]]:
  """The ticks [start, end) to decode: all of a short clip, else a stretch around each place."""
  frame = max(1, round(1 / (info.fps * float(info.time_base))))
  if info.duration_s <= WHOLE_S:
    return [(int(targets[0]), max(info.end_pts, int(targets[-1]) + frame) + 1)]
  near = np.diff(targets) > 4 * motion.GAP_S / float(info.time_base)
  groups = np.split(targets, np.flatnonzero(near) + 1)
  # A frame before the first target, so that the frame shown at the target is in the span.
  return [(int(group[0]) - frame, int(group[-1]) + frame) for group in groups]


def _luma(frame: av.VideoFrame) -> np.ndarray:
  """The upright luma of a frame at full range, uint8 (H, W)."""
  full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
  if frame.format.name not in _PLANAR:
    frame, full = picture.reformat(frame, format="yuvj444p"), True
  plane = frame.planes[0]
  memory = np.frombuffer(memoryview(typing.cast(av.buffer.Buffer, plane)), np.uint8)
  luma: np.ndarray = memory[: plane.height * plane.line_size].reshape(plane.height, plane.line_size)[:, : plane.width]
  luma = luma if full else _TO_FULL[luma]
  transpose, flip_rows, flip_columns = picture.orientation(frame)
  luma = luma.T if transpose else luma
  return np.ascontiguousarray(luma[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def at_most(luma: np.ndarray, side: int) -> np.ndarray:
  """The picture, shrunk to a shorter side of at most `side` pixels."""
  scale = side / min(luma.shape)
  if scale >= 1:
    return luma
  size = round(luma.shape[1] * scale), round(luma.shape[0] * scale)
  return cv2.resize(luma, size, interpolation=cv2.INTER_AREA)


def _crop(luma: np.ndarray) -> np.ndarray:
  """The middle, at most CROP x CROP, beginning at multiples of GRID."""
  top, left = (max(0, (side - CROP) // 2) // GRID * GRID for side in luma.shape)
  return luma[top : top + CROP, left : left + CROP]


def vectors_of(frame: av.VideoFrame) -> list[Vectors]:
  """[] for frames without any (key frames, and codecs that keep none)."""
  tiny = picture.tiny(frame)  # what reads side data keeps its frame alive for a while
  try:
    side = tiny.side_data.get("MOTION_VECTORS")
  except ValueError:  # PyAV does not know a kind of side data that its FFmpeg attached.
    return []
  if side is None:
    return []
  raw = typing.cast(typing.Any, side).to_ndarray()
  names = ("dst_x", "dst_y", "w", "h", "motion_x", "motion_y")
  blocks = np.stack([raw[name].astype(np.int32) for name in names], axis=1)
  scale = np.maximum(raw["motion_scale"].astype(np.int32), 1)
  blocks[:, 4:] = blocks[:, 4:] * 4 // scale[:, None]
  return [Vectors(blocks, frame.height, frame.width)]
