"""What `kling curate` reads: a folder, one video, WebDataset tars, or a table of videos that lie on this disk.

A video in a tar has the path TAR/member. It is copied out when a worker looks at it, and the copy is removed after.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from kling_jax.curation.split import Shot, Split
from kling_jax.data import columns, container, download, fetch, folder, probe, quarantine, span_index, webdataset
from kling_jax.data.caption import Caption
from kling_jax.data.record import CAPTION_FIELDS
from kling_jax.data.span_index import Span, SpanCaptions
from kling_jax.errors import DataError, UsageError

TABLE = "table"  # the method that cuts the spans of a table
_ROUNDING_S = 0.00051  # released time stamps are whole milliseconds


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Videos to curate.

  Attributes:
    top: the folder that names start from.
    paths: in order; of files, or TAR/member.
    captions: folder or table with captions.
    jobs: what a worker has to know beside a path: {path: fields of its job}; empty where it is only the path.
    spans: index of the table's spans; "" where there is none. table: its name.
    refused: members of tars that are no input.
    counts: of the table.
  """

  top: pathlib.Path
  paths: list[str]
  captions: str
  jobs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  spans: str = ""
  table: str = ""
  refused: tuple[quarantine.Verdict, ...] = ()
  counts: span_index.Counts | None = None

  def job(self, path: str) -> dict[str, Any]:
    """The fields that `local`, `said` and `spans_of` want in a job, beside its path."""
    return {"sample": self.jobs.get(path), "spans": self.spans, "table": self.table, "captions": self.captions}

  def holds(self, path: str) -> bool:
    """Whether there is such a file or member."""
    return path in self.jobs or os.path.isfile(path)


def find(
  input: str | os.PathLike[str], staging: pathlib.Path, *, method: str, videos: str | os.PathLike[str] | None = None
) -> Inputs:
  """Looks up the videos at `input`.

  Args:
    staging: where the index of a table goes.
    method: who splits; `TABLE` cuts the table's spans.
    videos: folder that the paths of a table start from; the table's own by default. What `kling fetch` left there is
      known by its address.

  Raises:
    DataError: there are none. UsageError: `videos` without a table.
  """
  path = pathlib.Path(os.path.abspath(input))
  if path.is_file() and path.suffix.lower() in columns.SUFFIXES:
    if method != TABLE and videos is None and "file" in columns.column_names(path):
      return _of_files(path)
    return _of_table(path, staging, pathlib.Path(os.path.abspath(videos or path.parent)))
  if videos is not None:
    raise UsageError(f"--videos is for tables; {path} is none")
  if method == TABLE:
    raise DataError(f"{path}: --method table wants a table with spans (.csv, .jsonl or .parquet)")
  if tars := webdataset.find_tars(path):
    return _of_tars(path if path.is_dir() else path.parent, tars)
  if path.is_file():
    return Inputs(path.parent, [str(path)], str(path.parent))
  return Inputs(path, [os.path.abspath(found) for found in folder.find_videos(path)], str(path))


def _of_tars(top: pathlib.Path, tars: list[str]) -> Inputs:
  samples, refused = webdataset.scan_all(tars)
  if not samples:
    raise DataError(folder.none_left(str(top), refused))
  jobs = {sample.media.source: dataclasses.asdict(sample) for sample in samples}
  return Inputs(top, list(jobs), str(top), jobs, refused=tuple(refused))


def _of_files(path: pathlib.Path) -> Inputs:
  """The videos of a table with a column `file`, whose captions `folder.Captions` reads."""
  listed = dict.fromkeys(row["file"] for row in columns.rows(path, {"file": span_index.TYPES["file"]}) if row["file"])
  captions = path if {"caption", *CAPTION_FIELDS} & set(columns.column_names(path)) else path.parent
  return Inputs(path.parent, [os.path.abspath(path.parent / name) for name in listed], str(captions))


def _of_table(path: pathlib.Path, staging: pathlib.Path, videos: pathlib.Path) -> Inputs:
  if not videos.is_dir():
    raise DataError(f"{videos}: no folder with the videos of {path}")
  # Of its own for each table: a second run with another table, which is about to be refused, must not replace it.
  mark = hashlib.sha256(os.fsencode(path) + b"\n" + os.fsencode(videos)).hexdigest()[:12]
  index = staging / f"spans-{mark}.sqlite"
  counts, found = span_index.build(path, index, _locator(videos))
  if not found:
    damaged = f"; {counts.damaged} rows cannot be read, the first: {counts.first}" if counts.damaged else ""
    raise DataError(
      f"{path}: none of its {counts.rows} rows names a video in {videos}{damaged}; `kling fetch` gets them"
    )
  return Inputs(videos, found, "", spans=str(index), table=path.name, counts=counts)


def _locator(videos: pathlib.Path) -> Callable[[dict[str, Any]], str | None]:
  """Finds the file of a row: its `file`; its `url`, fetched or a path; or VIDEO.mp4 for the videoID VIDEO_3."""
  fetched = {entry.key: str(videos / entry.file) for entry in fetch.read(videos)}
  by_stem: dict[str, str] = {}
  for name in sorted(os.listdir(videos)):
    stem, suffix = os.path.splitext(name)
    if suffix.lower() in folder.SUFFIXES and not name.startswith(".") and not quarantine.hostile(name):
      by_stem.setdefault(stem, str(videos / name))

  def locate(row: dict[str, Any]) -> str | None:
    if row.get("file"):
      return os.path.abspath(videos / row["file"])
    url = row.get("url") or ""
    if url and download.key(url) in fetched:
      return fetched[download.key(url)]
    if url and "://" not in url and os.path.isfile(videos / url):
      return os.path.abspath(videos / url)
    video, _, index = (row.get("videoID") or "").rpartition("_")
    return by_stem.get(video) if index.isascii() and index.isdigit() else by_stem.get(row.get("videoID") or "")

  return locate


# ---- in a worker -----------------------------------------------------------------------------------------------------


class Captions(Protocol):
  """Captions by path, name and span."""

  def of(self, path: str, name: str, span: tuple[float, float] | None = None) -> Caption: ...


class _Told:
  """One caption, whatever is asked."""

  def __init__(self, caption: Caption):
    self._caption = caption

  def of(self, path: str, name: str, span: tuple[float, float] | None = None) -> Caption:
    return self._caption


@contextlib.contextmanager
def local(job: dict[str, Any]) -> Iterator[str]:
  """A file with the job's video: itself, or a copy of the tar's member that is removed after.

  Raises:
    DataError: the member cannot be read.
  """
  if not job.get("sample"):
    yield job["path"]
    return
  media = webdataset.Member(**job["sample"]["media"])
  handle, copy = tempfile.mkstemp(prefix=".member-", suffix=os.path.splitext(media.name)[1], dir=job["staging"])
  os.close(handle)
  try:
    media.copy(copy)
    yield copy
  finally:
    os.unlink(copy)


def said(job: dict[str, Any], beside: Callable[[str], Captions]) -> Captions:
  """The captions of the job's video; `beside` gives those of a folder or table."""
  if job.get("sample"):
    parts = {name: value and webdataset.Member(**value) for name, value in job["sample"].items() if name != "key"}
    return _Told(webdataset.Sample(job["sample"]["key"], **parts).caption())
  if job.get("spans"):
    return SpanCaptions(spans_of(job))
  return beside(job["captions"])


def spans_of(job: dict[str, Any]) -> list[Span]:
  """The table's spans of the job's video, by start."""
  return span_index.read(job["spans"], job["path"], job["table"])


def split(path: str, spans: list[Span], limits: container.Limits) -> tuple[Split, list[Span]]:
  """A video whose shots are the spans of a table that lie in it, and those spans, each once; one frame is decoded.

  A shot has the frames that start in the span; time stamps of half a millisecond's difference are the same.

  Raises:
    MediaError: the video cannot be used.
  """
  info = probe.probe(path, limits, decode=False)
  pts, end_pts = probe.stamps(path, limits)
  bare = Split(path, info.width, info.height, info.fps, info.time_base, pts, end_pts, (), (), info.damage, TABLE)
  starts_s = (pts - pts[0]) * float(info.time_base)
  shots, kept = [], []
  seen: set[tuple[int, int]] = set()
  for span in spans:
    first, stop = map(int, np.searchsorted(starts_s, [span.start_s - _ROUNDING_S, span.end_s - _ROUNDING_S]))
    if first < stop and (first, stop) not in seen:
      seen.add((first, stop))
      shots.append(Shot(first, stop, bare.seconds(first), bare.seconds(stop)))
      kept.append(span)
  return dataclasses.replace(bare, shots=tuple(shots)), kept


def file_state(path: str) -> tuple[int, int]:
  """(bytes, time of the last change in ns) of a file, or of a member's tar; (-1, -1) where there is none."""
  try:
    state = os.stat(path)
  except NotADirectoryError:
    head = os.path.dirname(path)
    return file_state(head) if head != path else (-1, -1)
  except (OSError, ValueError):
    return -1, -1
  return state.st_size, state.st_mtime_ns
