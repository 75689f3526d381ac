"""Splits videos into shots: one pass of decoding at low resolution, exact times from the container."""

import dataclasses
import fractions
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kling_jax import progress
from kling_jax.curation import transitions
from kling_jax.data import container, picture, reasons
from kling_jax.data.record import Transition
from kling_jax.errors import UsageError, nearest

SMALL_SIDE = 32  # pixels of the longer side that the detectors see
METHODS: dict[str, Callable[[np.ndarray, float], list[Transition]]] = {"default": transitions.find_transitions}


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
    shots: in order; a fade at an end of the video leaves its blank frames as a shot.
    damage: signs of damage that the decoder met, in words.
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


def split(
  video: str | os.PathLike[str] | bytes,
  method: str = "default",
  limits: container.Limits = container.DEFAULT_LIMITS,
) -> Split:
  """Finds the transitions and shots of a video.

  Args:
    video: a file or bytes.
    method: who finds the transitions in the small pictures; one of METHODS.
    limits: time, size and threads of the decoder.

  Raises:
    UsageError: an unknown method.
    MediaError: not one frame can be decoded; a file that is damaged midway gives what can be had.
  """
  find = METHODS.get(method)
  if find is None:
    raise UsageError(f"unknown method {method!r} to split videos{nearest(method, METHODS)}")
  small: list[np.ndarray] = []
  pts: list[int] = []
  size, last_duration = (0, 0), 1
  with container.open_video(video, limits) as opened:
    for stamp, frame in opened.frames():
      if not pts:
        size = picture.upright_size(frame)
      small.append(picture.to_rgb(frame, _small(size)))
      pts.append(stamp)
      last_duration = opened.duration(frame)
    if not pts:
      detail = "; ".join(opened.damage)
      raise reasons.MediaError(opened.source, "decode_error" if detail else "zero_frames", detail or "no frame in it")
    name, tick, damage = opened.source, opened.time_base, tuple(opened.damage)
  end_pts = pts[-1] + last_duration
  fps = len(pts) / float((end_pts - pts[0]) * tick)
  found = tuple(find(np.stack(small), fps))
  bare = Split(name, size[1], size[0], fps, tick, np.array(pts, np.int64), end_pts, found, (), damage)
  return dataclasses.replace(bare, shots=_shots(bare))


def _small(size: tuple[int, int]) -> tuple[int, int]:
  """(height, width) of the pictures that the detectors see."""
  scale = SMALL_SIDE / max(size)
  return max(4, round(size[0] * scale)), max(4, round(size[1] * scale))


def _shots(video: Split) -> tuple[Shot, ...]:
  starts = [0] + [t.end_frame for t in video.transitions]
  ends = [t.start_frame + 1 for t in video.transitions] + [video.num_frames]
  spans = [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]
  return tuple(Shot(start, end, video.seconds(start), video.seconds(end)) for start, end in spans)


def command(videos: Sequence[str], *, method: str = "default", as_json: bool = False) -> int:
  """`kling split VIDEO...`: prints one JSON list, or a readable list; a broken file costs a line on standard error.

  Returns:
    Exit code: 1 where a video could not be read.
  """
  if method not in METHODS:
    raise UsageError(f"unknown method {method!r} to split videos{nearest(method, METHODS)}")
  answers, failed = [], 0
  for video in progress.track(videos, "split"):
    try:
      answers.append(split(video, method, container.Limits(threads=0)))
    except reasons.MediaError as error:
      failed += 1
      print(f"kling: {error}", file=sys.stderr)
  if as_json:
    print(json.dumps([answer.to_json() for answer in answers], indent=1))
  else:
    for answer in answers:
      print(_text(answer))
  return 1 if failed else 0


def _text(video: Split) -> str:
  count = f"{len(video.shots)} shot{'s' * (len(video.shots) != 1)}"
  lines = [f"{video.video}: {video.num_frames} frames, {video.fps:.3f} fps, {count}"]
  for t in video.transitions:
    span = f"{video.seconds(t.start_frame):9.3f} s - {video.seconds(t.end_frame):9.3f} s"
    lines.append(f"  {t.kind:<9}{span}   frames {t.start_frame} - {t.end_frame}   confidence {t.confidence:.2f}")
  return "\n".join(lines)
