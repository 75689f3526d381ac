"""One video through curation: admit, split, cut into clips, measure; the result lies whole in a staging folder."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import struct
import time
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from kling_jax import errors, files, measure
from kling_jax.curation import split as split_lib
from kling_jax.data import caption, container, cut, decode, folder, quarantine, reasons, record
from kling_jax.data.record import ClipRecord, Transition

GRADUAL_MARGIN = 2  # frames beside a gradual transition that are trimmed too: its ends are known to about two frames
MEASURE_SIDE = 256  # pixels of the shorter side that scores are measured on
_LENGTH = struct.Struct("<Q")


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What decides the clips of a video; a set has one.

  Attributes:
    method: who finds transitions (`split.METHODS`).
    min_seconds, max_seconds: shorter shots give no clip, longer ones several of equal length.
    min_side: videos with a shorter side of fewer pixels are quarantined.
    short_side: clips are shrunk to this shorter side where the source is larger; None keeps the source's size.
    crf: quality of what is encoded to H.264, 0 (lossless) to 51.
    copy: keep the packets of H.264 sources wherever nothing has to change; see `data.cut`.
  """

  method: str = "default"
  min_seconds: float = 1.0
  max_seconds: float = 10.0
  min_side: int = 32
  short_side: int | None = 720
  crf: float = 18.0
  copy: bool = True

  @property
  def media(self) -> str:
    """What decides the frames of a clip beside its span; part of every clip_id."""
    how = " copied" if self.copy else ""
    return f"h264{how} crf={self.crf:g} short_side={self.short_side or 'source'} v2"


@dataclasses.dataclass(frozen=True)
class Piece:
  """A span of a video that becomes a clip: frames [start, end)."""

  start: int
  end: int
  cut_before: bool
  transitions: tuple[Transition, ...]


def work(job: dict[str, Any]) -> dict[str, Any]:
  """Runs one video and leaves `<stem>.clips` and then `<stem>.json` in the staging folder; returns the latter.

  Args:
    job: path, name (below the input folder), captions (that folder, or a table), stem (of the staging files), recipe
      (fields), seconds (time limit or None).

  Returns:
    {name, path, bytes, modified, reason, detail, damage, content, seconds, frames, copied (frames of the clips that are
    the source's own packets), shots, short_shots, transitions, clips: [clip_id], timings: {stage: s}}; reason is ""
    unless the video is quarantined.
  """
  cv2.setNumThreads(1)
  path, recipe = job["path"], Recipe(**job["recipe"])
  stem = pathlib.Path(job["stem"])
  answer: dict[str, Any] = summary(path, job["name"])
  try:
    limits = container.Limits(seconds=job["seconds"])
    answer |= _curate(path, job["name"], _captions(job["captions"]), recipe, limits, stem)
  except reasons.MediaError as error:
    answer |= {"reason": error.reason, "detail": error.detail}
  except errors.DataError as error:
    answer |= {"reason": "unreadable", "detail": str(error)}
  except MemoryError:
    answer |= {"reason": "out_of_memory", "detail": "the video did not fit into memory"}
  files.write_json(stem.with_suffix(".json"), answer)
  return answer


@functools.lru_cache(maxsize=1)
def _captions(top: str) -> folder.Captions:
  return folder.Captions(top)


def file_state(path: str) -> tuple[int, int]:
  """(bytes, time of the last change in ns) of a file; (-1, -1) where there is none."""
  try:
    state = os.stat(path)
  except (OSError, ValueError):
    return -1, -1
  return state.st_size, state.st_mtime_ns


def summary(path: str, name: str) -> dict[str, Any]:
  """What is known of a video before it is looked at; the form of `work`'s answer."""
  size, modified = file_state(path)
  counts = {"seconds": 0.0, "frames": 0, "copied": 0, "shots": 0, "short_shots": 0}
  lists: dict[str, Any] = {"transitions": [], "clips": [], "timings": {}}
  verdict = {"reason": "", "detail": "", "damage": [], "content": ""}
  return {"name": name, "path": path, "bytes": size, "modified": modified} | verdict | counts | lists


def _curate(
  path: str, name: str, captions: folder.Captions, recipe: Recipe, limits: container.Limits, stem: pathlib.Path
) -> dict[str, Any]:
  timings = dict.fromkeys(("admit", "split", "cut", "measure"), 0.0)
  with _timed(timings, "admit"):
    verdict = quarantine.classify(path, min_side=recipe.min_side, decode=False, limits=limits)
    if verdict.reason is not None:
      raise reasons.MediaError(path, verdict.reason, verdict.detail)
    content = record.content_hash(path)
  with _timed(timings, "split"):
    video = split_lib.split(path, recipe.method, limits)
  seconds = video.seconds(video.num_frames)
  if seconds < recipe.min_seconds:
    detail = f"{seconds:.3f} s; clips have at least {recipe.min_seconds:g} s"
    raise reasons.MediaError(path, "too_short", detail)
  parts = pieces(video, recipe.min_seconds, recipe.max_seconds)
  ids: list[str] = []
  copied = 0
  with files.whole(stem.with_suffix(".clips")) as temporary, temporary.open("wb") as out:
    for index, piece in enumerate(parts):
      start_pts, end_pts = video.ticks(piece.start), video.ticks(piece.end)
      with _timed(timings, "cut"):
        clip_cut = cut.cut(
          path, start_pts, end_pts, short_side=recipe.short_side, crf=recipe.crf, copy=recipe.copy, limits=limits
        )
        media, copied = clip_cut.media, copied + clip_cut.copied
        info = decode.probe(media, decode=False)
      with _timed(timings, "measure"):
        scores = _scores(media, info)
      span = video.seconds(piece.start), video.seconds(piece.end)
      clip = ClipRecord(
        clip_id=record.clip_id(content, start_pts, end_pts, video.time_base, recipe.media),
        video_id=name,
        source=path,
        start_pts=start_pts,
        end_pts=end_pts,
        time_base=str(video.time_base),
        source_start_s=float(int(video.pts[0]) * video.time_base),
        fps=info.fps,
        width=info.width,
        height=info.height,
        num_frames=info.num_frames,
        index=index,
        cut_before=piece.cut_before,
        prev_clip_id=ids[-1] if ids else "",
        scores=scores,
        transitions=piece.transitions,
        salvaged=bool(video.damage or verdict.detail),
      )
      clip = caption.put(clip, captions.of(path, name, span))
      data = record.pack(clip, media)
      out.write(_LENGTH.pack(len(data)) + data)
      ids.append(clip.clip_id)
  return {
    "content": content,
    "damage": list(video.damage) or ([verdict.detail] if verdict.detail else []),
    "seconds": seconds,
    "frames": video.num_frames,
    "shots": len(video.shots),
    "short_shots": len(video.shots) - sum(piece.cut_before for piece in parts),
    "transitions": [dataclasses.asdict(t) for t in video.transitions],
    "clips": ids,
    "copied": copied,
    "timings": timings,
  }


def _scores(media: bytes, info: decode.VideoInfo) -> dict[str, Any]:
  times_s = measure.sample_times(info.duration_s, info.fps)
  scale = min(1.0, MEASURE_SIDE / min(info.height, info.width))
  size = max(1, round(info.height * scale)), max(1, round(info.width * scale))
  return measure.score(decode.frames_at(media, times_s, *size), times_s)


def pieces(video: split_lib.Split, min_seconds: float, max_seconds: float) -> list[Piece]:
  """The spans of a video that become clips, in order.

  A shot loses two frames beside each gradual transition; what is left gives no clip below `min_seconds`, and pieces of
  nearly equal length (to a frame) above `max_seconds`.
  """
  found: list[Piece] = []
  for shot in video.shots:
    before = next((t for t in video.transitions if t.end_frame == shot.start_frame), None)
    after = next((t for t in video.transitions if t.start_frame + 1 == shot.end_frame), None)
    start = shot.start_frame + (GRADUAL_MARGIN if before is not None and before.kind != "cut" else 0)
    end = shot.end_frame - (GRADUAL_MARGIN if after is not None and after.kind != "cut" else 0)
    # A rounding of the container's ticks shall not refuse a shot of exactly the least length.
    length = video.seconds(end) - video.seconds(start) if end > start else 0.0
    if length < min_seconds - 1e-3:
      continue
    count = max(1, math.ceil(length / max_seconds - 1e-6))
    starts_s = (video.pts[start:end] - video.pts[start]) * float(video.time_base)
    inner = np.searchsorted(starts_s, [k * length / count - 1e-6 for k in range(1, count)])
    borders = [start, *(start + int(k) for k in inner), end]
    for k in range(count):
      edges = ([before] if k == 0 and before else []) + ([after] if k == count - 1 and after else [])
      found.append(Piece(borders[k], borders[k + 1], k == 0, tuple(edges)))
  return found


def staged(stem: pathlib.Path) -> Iterator[tuple[ClipRecord, bytes]]:
  """The clips that `work` left."""
  with stem.with_suffix(".clips").open("rb") as file:
    while prefix := file.read(_LENGTH.size):
      yield record.unpack(file.read(_LENGTH.unpack(prefix)[0]))


def read_summary(stem: pathlib.Path) -> dict[str, Any] | None:
  """The answer that `work` left for a stem, if it came to its end."""
  path = stem.with_suffix(".json")
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


@contextlib.contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
  clock = time.perf_counter()
  yield
  timings[stage] += time.perf_counter() - clock
