"""Shot lists for other programs: CSV as PySceneDetect writes it, CMX 3600 EDL, OpenTimelineIO, statistics."""

import csv
import io
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kling_jax import files
from kling_jax.curation.split import Split

TIMECODE_RATES = 24, 25, 30, 48, 50, 60  # frames a second; 23.976 counts as 24
HEADER = (
  "Scene Number", "Start Frame", "Start Timecode", "Start Time (seconds)", "End Frame", "End Timecode",
  "End Time (seconds)", "Length (frames)", "Length (timecode)", "Length (seconds)",
)  # fmt: skip


def scenes_csv(video: Split) -> str:
  """The shots in PySceneDetect's columns: frames count from 1 and the last one is included, times are seconds.

  The first line lists the timecodes at which shots begin, as its readers expect.
  """
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["Timecode List:", *(_clock(shot.start_s) for shot in video.shots[1:])])
  writer.writerow(HEADER)
  for number, shot in enumerate(video.shots, 1):
    length = shot.end_s - shot.start_s
    writer.writerow([
      number, shot.start_frame + 1, _clock(shot.start_s), f"{shot.start_s:.3f}",
      shot.end_frame, _clock(shot.end_s), f"{shot.end_s:.3f}",
      shot.end_frame - shot.start_frame, _clock(length), f"{length:.3f}",
    ])  # fmt: skip
  return text.getvalue()


def statistics_csv(video: Split) -> str:
  """One row a frame: what the method measured between it and the frame before (empty for the first frame)."""
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["Frame Number", "Timecode", "Time (seconds)", *video.statistics])
  columns = list(video.statistics.values())
  for frame in range(video.num_frames):
    time_s = video.seconds(frame)
    values = ["" if math.isnan(column[frame]) else f"{column[frame]:.6g}" for column in columns]
    writer.writerow([frame + 1, _clock(time_s), f"{time_s:.6f}", *values])
  return text.getvalue()


def edl(video: Split) -> str:
  """A CMX 3600 edit decision list: an event a shot, source and record times alike, transitions as comments.

  Timecode counts frames of the nearest rate of TIMECODE_RATES, without drop frames; frames of a variable or another
  rate are placed by their time.
  """
  rate = next((rate for rate in TIMECODE_RATES if rate >= video.fps - 0.1), TIMECODE_RATES[-1])
  even = is_even(video) and round(video.fps) == rate
  code = lambda frame: _timecode(frame if even else round(video.seconds(frame) * rate), rate)
  lines = [f"TITLE: {_one_line(pathlib.PurePath(video.video).stem)[:70]}", "FCM: NON-DROP FRAME", ""]
  ends = [shot.start_frame for shot in video.shots[1:]] + [video.num_frames]
  for number, shot in enumerate(video.shots, 1):
    start, end = code(shot.start_frame), code(shot.end_frame)
    lines.append(f"{number:03d}  AX       V     C        {start} {end} {start} {end}")
    lines.append(f"* FROM CLIP NAME: {_one_line(pathlib.PurePath(video.video).name)}")
    for t in video.transitions:
      if not shot.end_frame <= t.start_frame + 1 <= ends[number - 1]:
        continue
      span = f"FRAMES {t.start_frame} {t.end_frame}"
      lines.append(f"* COMMENT: {t.kind.upper()} {span} CONFIDENCE {t.confidence:.2f}")
  return "\n".join(lines) + "\n"


def otio(video: Split) -> str:
  """An OpenTimelineIO timeline (schema Timeline.1): one track of the shots, and of what lies between them.

  Times are exact: frames at the video's rate where that is constant, else ticks of its time base.
  """
  even = is_even(video)
  rate = video.fps if even else float(1 / video.time_base)
  place = (lambda frame: frame) if even else (lambda frame: video.ticks(frame) - video.ticks(0))

  def span(start: int, end: int) -> dict[str, Any]:
    time = lambda value: {"OTIO_SCHEMA": "RationalTime.1", "rate": rate, "value": float(value)}
    length = place(end) - place(start)
    return {"OTIO_SCHEMA": "TimeRange.1", "start_time": time(place(start)), "duration": time(length)}

  def clip(name: str, start: int, end: int, facts: dict[str, Any]) -> dict[str, Any]:
    media = {
      "OTIO_SCHEMA": "ExternalReference.1",
      "target_url": _address(video.video),
      "available_range": span(0, video.num_frames),
    }
    return {
      "OTIO_SCHEMA": "Clip.2",
      "name": name,
      "source_range": span(start, end),
      "media_references": {"DEFAULT_MEDIA": media},
      "active_media_reference_key": "DEFAULT_MEDIA",
      "metadata": {"kling": facts},
    }

  children, reached = [], 0
  for number, shot in enumerate(video.shots, 1):
    if shot.start_frame > reached:
      children.append(clip("between shots", reached, shot.start_frame, {"role": "transition"}))
    children.append(clip(f"shot {number:04d}", shot.start_frame, shot.end_frame, {"role": "shot"}))
    reached = shot.end_frame
  if reached < video.num_frames:
    children.append(clip("between shots", reached, video.num_frames, {"role": "transition"}))
  markers = [
    {
      "OTIO_SCHEMA": "Marker.2",
      "name": t.kind,
      "color": "RED",
      "marked_range": span(t.start_frame, t.end_frame),
      "metadata": {"kling": {"kind": t.kind, "confidence": t.confidence, "frames": [t.start_frame, t.end_frame]}},
    }
    for t in video.transitions
  ]
  track = {"OTIO_SCHEMA": "Track.1", "name": "video", "kind": "Video", "children": children, "markers": markers}
  timeline = {
    "OTIO_SCHEMA": "Timeline.1",
    "name": pathlib.PurePath(video.video).stem,
    "tracks": {"OTIO_SCHEMA": "Stack.1", "name": "tracks", "children": [track]},
    "metadata": {"kling": {"fps": video.fps, "num_frames": video.num_frames, "method": video.method}},
  }
  return json.dumps(timeline, indent=1) + "\n"


WRITERS: dict[str, tuple[str, Callable[[Split], str]]] = {
  "csv": (".scenes.csv", scenes_csv),
  "edl": (".edl", edl),
  "otio": (".otio", otio),
  "stats": (".stats.csv", statistics_csv),
}


def write(video: Split, folder: str | os.PathLike[str], formats: Sequence[str]) -> list[pathlib.Path]:
  """Writes `<folder>/<file name of the video><suffix>` for each format of WRITERS."""
  written = []
  for name in formats:
    suffix, text = WRITERS[name]
    path = pathlib.Path(folder) / (pathlib.PurePath(video.video).name + suffix)
    files.write_text(path, text(video))
    written.append(path)
  return written


def is_even(video: Split) -> bool:
  """Whether frames follow each other at one rate, to a tick of the time base."""
  if video.num_frames < 2:
    return True
  step = (video.ticks(video.num_frames - 1) - video.ticks(0)) / (video.num_frames - 1)
  ideal = video.ticks(0) + step * np.arange(video.num_frames)
  return bool(np.abs(video.pts - ideal).max() <= 1)


def _clock(time_s: float) -> str:
  """HH:MM:SS.mmm."""
  milliseconds = round(time_s * 1000)
  seconds, milliseconds = divmod(milliseconds, 1000)
  return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{milliseconds:03d}"


def _timecode(frame: int, rate: int) -> str:
  """HH:MM:SS:FF of a frame number."""
  seconds, frames = divmod(frame, rate)
  return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}:{frames:02d}"


def _one_line(name: str) -> str:
  """A file name on one line of printable text: an EDL has no quoting."""
  return "".join(c if c.isprintable() else "?" for c in name)


def _address(video: str) -> str:
  return pathlib.Path(video).absolute().as_uri()
