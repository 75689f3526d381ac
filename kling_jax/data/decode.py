"""Frames of a video by time: all of them in presentation order, or the ones shown at given seconds.

Times are container times in float64 seconds (time stamp x time base); a frame shows from its time stamp until the next
one, whatever the frame rate. Start times need not be 0 (MPEG-TS); `start_s=None` means "from the first frame".
"""

import os
import pathlib
import typing
from collections.abc import Iterator

import av
import numpy as np

from kling_jax.data import picture, reasons
from kling_jax.data.container import DEFAULT_LIMITS, Limits, Video, open_video
from kling_jax.data.probe import VideoInfo, probe

__all__ = ["DEFAULT_LIMITS", "Limits", "Video", "VideoInfo", "frames_at", "image", "iterate", "open_video", "probe"]

Media = str | os.PathLike[str] | bytes

# Containers round time stamps to their tick: 1/30 s is 33 ms in Matroska, so the frame "at 2/30 s" starts at 67 ms.
# Half a tick, at most half a millisecond, is forgiven when a time is looked up.
_ROUNDING_S = 0.0005
_SEEK_AHEAD_S = 1.0  # Nearer frames are reached by decoding on.


def iterate(
  source: Media | Video,
  *,
  size: tuple[int, int] | None = None,
  start_s: float | None = None,
  end_s: float | None = None,
  limits: Limits = DEFAULT_LIMITS,
) -> Iterator[tuple[int, float, np.ndarray]]:
  """Yields every frame in presentation order as (index, time_s, uint8 RGB).

  Args:
    source: a file, bytes, or an open video (whose `damage` and `time_base` the caller wants); the latter stays open.
    size: (height, width) to cover and crop to; None gives the displayed size of the first frame to all frames (streams
      may change size midway).
    start_s, end_s: only frames that start in [start_s, end_s), in container time; `index` counts from the file's start.
    limits: time, size and threads.

  Raises:
    MediaError: nothing can be decoded. A file that is damaged midway gives the frames that can be had.
  """
  video = source if isinstance(source, Video) else open_video(source, limits)
  first = None if start_s is None else video.ticks(start_s)
  after = None if end_s is None else video.ticks(end_s)
  index = -1
  try:
    for index, (pts, frame) in enumerate(video.frames()):
      if after is not None and pts >= after:
        return
      size = size or picture.upright_size(frame)
      if first is None or pts >= first:
        yield index, video.seconds(pts), picture.cover(frame, *size)
    if index < 0:
      raise _nothing(video)
  finally:
    if video is not source:
      video.close()


def frames_at(
  source: Media,
  times_s: np.ndarray,
  height: int,
  width: int,
  *,
  start_s: float | None = None,
  end_s: float | None = None,
  limits: Limits = DEFAULT_LIMITS,
) -> np.ndarray:
  """Decodes the frames shown at `start_s + times_s`: for each time the last frame whose time stamp is not later.

  Holds the requested frames and one decoded frame in memory, and seeks to the keyframe before a time that is far ahead
  (not in MPEG-TS/PS, whose time stamps may start over in the middle).

  Args:
    source: a file or bytes.
    times_s: (T,) ascending seconds from `start_s`. Times before the first frame show the first frame, times after the
      last frame show the last one.
    height, width: each frame is resized to cover this (area filter when shrinking) and cropped at the centre.
    start_s: container time of the clip's start; None: the first frame.
    end_s: container time of the clip's end; frames that start there or later are not shown. None: the file's end.
    limits: time, size and threads.

  Returns:
    uint8 (T, height, width, 3), RGB.

  Raises:
    MediaError: not one frame can be decoded.
    ValueError: the times do not ascend.
  """
  times_s = np.asarray(times_s, np.float64)
  if times_s.ndim != 1 or not np.all(np.isfinite(times_s)) or np.any(np.diff(times_s) < 0):
    raise ValueError(f"times_s must be finite, one-dimensional and ascending, not {times_s!r}")
  frames_THWC = np.empty((len(times_s), height, width, 3), np.uint8)
  if len(times_s) == 0:
    return frames_THWC
  with Cursor(source, limits) as cursor:
    origin_s = cursor.video.seconds(cursor.pts) if start_s is None else start_s
    targets = ticks(origin_s + times_s, cursor.video)
    if end_s is not None:
      targets = np.minimum(targets, cursor.video.ticks(end_s) - 1)
    done: av.VideoFrame | None = None
    for k, target in enumerate(targets):
      shown = cursor.shown_at(int(target))
      if shown is done:
        frames_THWC[k] = frames_THWC[k - 1]
      else:
        frames_THWC[k] = picture.cover(shown, height, width)
      done = shown
  return frames_THWC


def image(
  path: str | os.PathLike[str], size: tuple[int, int] | None = None, limits: Limits = DEFAULT_LIMITS
) -> np.ndarray:
  """Reads a still picture (PNG, JPEG, WebP, BMP, TIFF, GIF), or a video's first frame, as upright uint8 RGB (H, W, 3).

  Args:
    path: a local file.
    size: (height, width) to cover and crop to; None keeps the picture's own.
    limits: time, size and threads.

  Raises:
    MediaError: it is no picture.
  """
  try:
    data = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise reasons.MediaError(os.fspath(path), "unreadable", error.strerror or str(error)) from error
  try:
    with open_video(data, limits, stills=True) as video:
      frame = next((frame for _, frame in video.frames()), None)
      if frame is None:
        raise _nothing(video)
      return picture.cover(frame, *(size or picture.upright_size(frame)))
  except reasons.MediaError as error:
    raise reasons.MediaError(os.fspath(path), error.reason, error.detail) from error


def ticks(times_s: np.ndarray, video: Video) -> np.ndarray:
  """The last tick not later than each time, rounding forgiven; int64."""
  tick = float(video.time_base)
  return np.floor((times_s + min(_ROUNDING_S, tick / 2)) / tick).astype(np.int64)


def _nothing(video: Video) -> reasons.MediaError:
  detail = "; ".join(video.damage)
  return reasons.MediaError(video.source, "decode_error" if detail else "zero_frames", detail or "no frame in the file")


class Cursor:
  """A place in a video that moves forward; knows the frame shown there and the one after it.

  With `vectors`, frames carry the codec's motion vectors as side data, where it keeps any.
  """

  def __init__(self, source: Media, limits: Limits, *, vectors: bool = False):
    self._source, self._limits, self._vectors = source, limits, vectors
    self._open()
    self._can_seek = not self.video.container.format.flags & typing.cast(int, av.format.Flags.ts_discont.value)
    self._ahead = self.video.ticks(_SEEK_AHEAD_S)

  def __enter__(self) -> "Cursor":
    return self

  def __exit__(self, *_: object) -> None:
    self.video.close()

  def _open(self) -> None:
    self.video = open_video(self._source, self._limits, vectors=self._vectors)
    self._frames = self.video.frames()
    first = next(self._frames, None)
    if first is None:
      self.video.close()
      raise _nothing(self.video)
    self.pts, self._frame = first
    self._next = next(self._frames, None)

  def shown_at(self, target: int) -> av.VideoFrame:
    """The last frame whose time stamp is at most `target`; targets must ascend."""
    if self._can_seek and target - self.pts > self._ahead:
      self._jump(target)
    while self._next is not None and self._next[0] <= target:
      self.pts, self._frame = self._next
      self._next = next(self._frames, None)
    return self._frame

  def _jump(self, target: int) -> None:
    """Restarts at the nearest keyframe before `target`; at the file's start where the container's index is no help."""
    position, second = self.pts, self.video.ticks(1.0)
    # Some containers land after the wished time, so each try aims further back.
    for back in (0, second, 4 * second, 16 * second):
      if target - back <= position or not self.video.seek(target - back):
        break
      frames = self.video.frames()
      # Frames before the first keyframe lean on ones that the seek skipped.
      key = next(((pts, frame) for pts, frame in frames if frame.key_frame), None)
      if key is None or key[1].pts is None:
        break
      if key[0] <= target:
        if key[0] <= position:  # No keyframe between here and there: decoding on would have been cheaper.
          self._ahead *= 4
        self.pts, self._frame = key
        self._frames = frames
        self._next = next(frames, None)
        return
    self.video.close()
    self._can_seek = False
    self._open()

  def span(self, start: int, end: int) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (pts, frame) of the frames that start in [start, end) ticks."""
    self.shown_at(start - 1)  # The frame before the span, or the file's first frame.
    if start <= self.pts < end:
      yield self.pts, self._frame
    while self._next is not None and self._next[0] < end:
      self.pts, self._frame = self._next
      if self.pts >= start:
        yield self.pts, self._frame
      self._next = next(self._frames, None)
