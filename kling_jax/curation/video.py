"""One video through curation: admit, split, cut into clips, measure; what is done lies in a staging folder."""

import bisect
import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from kling_jax import errors, measure
from kling_jax.curation import inputs, split_cache, staging
from kling_jax.curation import merge as merge_lib
from kling_jax.curation import split as split_lib
from kling_jax.data import caption, container, cut, decode, folder, quarantine, reasons, record
from kling_jax.data.record import ClipRecord, Transition
from kling_jax.data.span_index import Span

GRADUAL_MARGIN = 2  # frames beside a gradual transition that are trimmed too: its ends are known to about two frames


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
    merge: cosine of embeddings from which two shots that a cut parts are one; None: never. See `merge`.
    embedding: of `merge`: colours, or package.module:function.
    scorers: who measures, comma-separated; see `measure.chosen`.
    model: suitability model of VTSS; None: the shipped one of sub-metrics.
  """

  method: str = "default"
  min_seconds: float = 1.0
  max_seconds: float = 10.0
  min_side: int = 32
  short_side: int | None = 720
  crf: float = 18.0
  copy: bool = True
  merge: float | None = None
  embedding: str = merge_lib.COLOURS
  scorers: str = "default"
  model: str | None = None

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
  """Runs one video and leaves its clips and then its summary in the staging folder; returns the summary.

  Clips that stand there from an earlier try are kept, and a split that is in the cache is not done again.

  Args:
    job: path, name (below the input folder), captions, sample, spans and table (see `inputs`), staging and stem (see
      `staging`), splits (folder of `split_cache`), recipe (fields), seconds (time limit or None).

  Returns:
    {name, path, bytes, modified, reason, detail, damage, content, seconds, frames, copied (frames of the clips that are
    the source's own packets), media_bytes, shots, short_shots, transitions, clips: [clip_id], timings: {stage: s}};
    reason is "" unless the video is quarantined. {no_room: text} where the disk is full: the video is not done.
  """
  cv2.setNumThreads(1)
  path, recipe = job["path"], Recipe(**job["recipe"])
  place = staging.Place(pathlib.Path(job["staging"]), job["stem"])
  answer: dict[str, Any] = summary(path, job["name"])
  try:
    try:
      limits = container.Limits(seconds=job["seconds"])
      with inputs.local(job) as file:
        answer |= _curate(job, file, recipe, limits, place)
    except reasons.MediaError as error:
      answer |= {"reason": error.reason, "detail": error.detail}
    except errors.DataError as error:
      answer |= {"reason": "unreadable", "detail": str(error)}
    except MemoryError:
      answer |= {"reason": "out_of_memory", "detail": "the video did not fit into memory"}
    place.finish(answer)
  except Exception as error:
    if not errors.no_room(error):
      raise
    return {"no_room": str(error)}
  return answer


@functools.lru_cache(maxsize=1)
def _scorers(words: str, model: str | None) -> tuple[measure.Scorer, ...]:
  return measure.judged_by(measure.chosen([word.strip() for word in words.split(",")]), model)


@functools.lru_cache(maxsize=1)
def _embedding(word: str) -> merge_lib.Embed:
  return merge_lib.embedding(word)


@functools.lru_cache(maxsize=1)
def _captions(top: str) -> folder.Captions:
  return folder.Captions(top)


def summary(path: str, name: str) -> dict[str, Any]:
  """What is known of a video before it is looked at; the form of `work`'s answer."""
  size, modified = inputs.file_state(path)
  counts = {"seconds": 0.0, "frames": 0, "copied": 0, "media_bytes": 0, "shots": 0, "short_shots": 0}
  lists: dict[str, Any] = {"transitions": [], "clips": [], "timings": {}}
  verdict = {"reason": "", "detail": "", "damage": [], "content": ""}
  return {"name": name, "path": path, "bytes": size, "modified": modified} | verdict | counts | lists


def _curate(
  job: dict[str, Any], path: str, recipe: Recipe, limits: container.Limits, place: staging.Place
) -> dict[str, Any]:
  """Curates the video of a job, which lies in the file `path`."""
  name, captions = job["name"], inputs.said(job, _captions)
  spans: list[Span] = []
  timings = dict.fromkeys(("admit", "split", "cut", "measure"), 0.0)
  with _timed(timings, "admit"):
    verdict = quarantine.classify(path, min_side=recipe.min_side, decode=False, limits=limits)
    if verdict.reason is not None:
      raise reasons.MediaError(path, verdict.reason, verdict.detail)
    content = record.content_hash(path)
  with _timed(timings, "split"):
    if recipe.method == inputs.TABLE:
      video, spans = inputs.split(path, inputs.spans_of(job), limits)
    else:
      video = split_cache.split(path, content, recipe.method, limits, pathlib.Path(job["splits"]))
    if recipe.merge is not None:
      video = merge_lib.merged(video, path, recipe.merge, _embedding(recipe.embedding), limits)
  seconds = video.seconds(video.num_frames)
  if seconds < recipe.min_seconds and recipe.method != inputs.TABLE:
    detail = f"{seconds:.3f} s; clips have at least {recipe.min_seconds:g} s"
    raise reasons.MediaError(path, "too_short", detail)
  exact = recipe.method == inputs.TABLE
  parts = exact_pieces(video) if exact else pieces(video, recipe.min_seconds, recipe.max_seconds)
  ids: list[str] = []
  copied = media_bytes = 0
  for index, piece in enumerate(parts):
    start_pts, end_pts = video.ticks(piece.start), video.ticks(piece.end)
    clip_id = record.clip_id(content, start_pts, end_pts, video.time_base, recipe.media)
    held = place.clip(content, index)
    if held is None or held.clip.clip_id != clip_id:
      with _timed(timings, "cut"):
        # Packets of a damaged file may be damaged: what the decoder made of them is encoded instead.
        copy = recipe.copy and not video.damage
        part = cut.cut(path, start_pts, end_pts, short_side=recipe.short_side, crf=recipe.crf, copy=copy, limits=limits)
        info = decode.probe(part.media, decode=False)
      with _timed(timings, "measure"):
        scores = measure.score_media(part.media, _scorers(recipe.scorers, recipe.model), clip_id=clip_id)
      told = spans[index] if spans else None
      if recipe.method == inputs.TABLE and recipe.model is None:
        scores.pop("vtss", None)  # the table's stand; a set must not mix two kinds
      vtss = scores["vtss"].value if "vtss" in scores else told.vtss if told is not None else None
      span = video.seconds(piece.start), video.seconds(piece.end)
      clip = ClipRecord(
        clip_id=clip_id,
        video_id=name,
        source=job["path"],
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
        scores=scores | (told.scores if told else {}),
        vtss=vtss,
        transitions=piece.transitions,
        salvaged=bool(video.damage or verdict.detail),
      )
      held = staging.Clip(caption.put(clip, captions.of(job["path"], name, span)), part.media, part.copied)
      place.add(content, held)
    ids.append(clip_id)
    copied, media_bytes = copied + held.copied, media_bytes + len(held.media)
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
    "media_bytes": media_bytes,
    "timings": timings,
  }


def exact_pieces(video: split_lib.Split) -> list[Piece]:
  """The shots as they are, of any length; one that begins where the one before it ended goes on from it."""
  before = [None, *(shot.end_frame for shot in video.shots)]
  return [
    Piece(shot.start_frame, shot.end_frame, shot.start_frame != end, ())
    for shot, end in zip(video.shots, before, strict=False)
  ]


def pieces(video: split_lib.Split, min_seconds: float, max_seconds: float) -> list[Piece]:
  """The spans of a video that become clips, in order.

  A shot loses two frames beside each gradual transition; what is left gives no clip below `min_seconds`, and pieces of
  nearly equal length (to a frame) above `max_seconds`.
  """
  found: list[Piece] = []
  by_end = {t.end_frame: t for t in video.transitions}
  by_start = {t.start_frame + 1: t for t in video.transitions}
  gradual = [t for t in video.transitions if t.kind != "cut"]
  ends, starts = [t.end_frame for t in gradual], [t.start_frame + 1 for t in gradual]
  for shot in video.shots:
    before, after = by_end.get(shot.start_frame), by_start.get(shot.end_frame)
    start, end = shot.start_frame, shot.end_frame
    # The nearest gradual transition may lie behind a shot of one frame.
    if (k := bisect.bisect_right(ends, start)) > 0:
      start = max(start, ends[k - 1] + GRADUAL_MARGIN)
    if (k := bisect.bisect_left(starts, end)) < len(starts):
      end = min(end, starts[k] - GRADUAL_MARGIN)
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


@contextlib.contextmanager
def _timed(timings: dict[str, float], stage: str) -> Iterator[None]:
  clock = time.perf_counter()
  yield
  timings[stage] += time.perf_counter() - clock
