"""Splits videos into shots: one pass of decoding, a detector that sees each frame, times from the container."""

import dataclasses
import fractions
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kling_jax.curation import content, transitions
from kling_jax.curation.detector import Detector
from kling_jax.data import container, picture, reasons
from kling_jax.data.record import Transition
from kling_jax.errors import UsageError, nearest


@dataclasses.dataclass(frozen=True)
class Shot:
  """Between two transitions: frames [start_frame, end_frame), seconds [start_s, end_s) from the video's start."""

  start_frame: int
  end_frame: int
  start_s: float
  end_s: float


@dataclasses.dataclass(frozen=True)
class Split:
  """A video taken apart.

  Attributes:
    video: its file name.
    width, height: as displayed.
    fps: mean frames per second.
    pts: (num_frames,) time stamps in ticks of time_base, ascending; end_pts: the end of the last frame.
    transitions: what lies between the shots; their frames are in no shot, except that start_frame is the last frame
      of the shot before and end_frame the first of the shot after.
    shots: in order; a fade at an end of the video leaves its blank frames as a shot. Method `css` trims its shots as
      the released code does.
    damage: signs of damage that the decoder met, in words.
    method: who found the transitions.
    statistics: {name: (num_frames,)} what the method measured between each frame and the one before; nan for the first.
  """

  video: str
  width: int
  height: int
  fps: float
  time_base: fractions.Fraction
  pts: np.ndarray
  end_pts: int
  transitions: tuple[Transition, ...]
  shots: tuple[Shot, ...]
  damage: tuple[str, ...] = ()
  method: str = "default"
  statistics: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  @property
  def num_frames(self) -> int:
    return len(self.pts)

  def seconds(self, frame: int) -> float:
    """When `frame` starts, in seconds from the first frame; `num_frames` is the end of the video."""
    return float((self.ticks(frame) - int(self.pts[0])) * self.time_base)

  def ticks(self, frame: int) -> int:
    """The time stamp of `frame`; `num_frames` is the end of the video."""
    return int(self.pts[frame]) if frame < len(self.pts) else self.end_pts

  def to_json(self) -> dict[str, Any]:
    """The object that `kling split --json` prints for a video. A transition's end_s is the start of its end_frame."""
    spans = [
      {
        "start_frame": t.start_frame,
        "end_frame": t.end_frame,
        "start_s": self.seconds(t.start_frame),
        "end_s": self.seconds(t.end_frame),
        "kind": t.kind,
        "confidence": round(t.confidence, 4),
      }
      for t in self.transitions
    ]
    shots = [dataclasses.asdict(shot) for shot in self.shots]
    return {
      "video": self.video,
      "fps": self.fps,
      "num_frames": self.num_frames,
      "transitions": spans,
      "shots": shots,
    }


def _default(weights: str | None, rate: float | None) -> Detector:
  if weights is not None:
    raise UsageError("method default takes no weights; leave --weights out or choose --method css")
  return transitions.Watcher(rate)


def _css(weights: str | None, rate: float | None) -> Detector:
  from kling_jax.curation import color_struct  # it starts JAX

  del rate  # its rule counts frames
  return color_struct.Detector(color_struct.PUBLISHED if weights is None else color_struct.Weights.load(weights))


def _content(weights: str | None, rate: float | None) -> Detector:
  if weights is not None:
    raise UsageError("method content takes no weights; leave --weights out or choose --method css")
  del rate  # its rule counts frames
  return content.Detector()


METHODS: dict[str, Callable[[str | None, float | None], Detector]] = {
  "default": _default, "css": _css, "content": _content,
}  # fmt: skip


def detector(method: str, weights: str | None = None, rate: float | None = None) -> Detector:
  """A fresh detector of a method, for a video of about `rate` frames a second.

  Raises:
    UsageError: an unknown method, or weights for a method that takes none.
    WeightsError: the weights are damaged.
  """
  if method not in METHODS:
    raise UsageError(f"unknown method {method!r} to split videos{nearest(method, METHODS)}")
  return METHODS[method](weights, rate)


def split(
  video: str | os.PathLike[str] | bytes,
  method: str = "default",
  limits: container.Limits = container.DEFAULT_LIMITS,
  *,
  weights: str | None = None,
) -> Split:
  """Finds the transitions and shots of a video.

  Args:
    video: a file or bytes.
    method: one of METHODS.
    limits: time, size and threads of the decoder.
    weights: a file of other weights for the method; see `kling split --fit`.

  Raises:
    UsageError, WeightsError: see `detector`.
    MediaError: not one frame can be decoded; a file that is damaged midway gives what can be had.
  """
  detector(method, weights)  # what is wrong with the call is said before what is wrong with the file
  pts: list[int] = []
  size, last_duration = (0, 0), 1
  with container.open_video(video, limits) as opened:
    watcher = detector(method, weights, float(opened.rate) if opened.rate else None)
    for stamp, frame in opened.frames():
      if not pts:
        size = picture.upright_size(frame)
      watcher.look(frame)
      pts.append(stamp)
      last_duration = opened.duration(frame)
    if not pts:
      detail = "; ".join(opened.damage)
      raise reasons.MediaError(opened.source, "decode_error" if detail else "zero_frames", detail or "no frame in it")
    name, tick, damage = opened.source, opened.time_base, tuple(opened.damage)
  end_pts = pts[-1] + last_duration
  fps = len(pts) / float((end_pts - pts[0]) * tick)
  found = watcher.finish(fps)
  stamps = np.array(pts, np.int64)
  bare = Split(
    name, size[1], size[0], fps, tick, stamps, end_pts, tuple(found.transitions), (), damage, method, found.statistics
  )
  return dataclasses.replace(bare, shots=_shots(bare, found.spans))


def _shots(video: Split, spans: list[tuple[int, int]] | None) -> tuple[Shot, ...]:
  if spans is None:
    starts = [0] + [t.end_frame for t in video.transitions]
    ends = [t.start_frame + 1 for t in video.transitions] + [video.num_frames]
    spans = [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]
  return tuple(Shot(start, end, video.seconds(start), video.seconds(end)) for start, end in spans)
