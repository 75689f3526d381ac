"""The spans that a table names, by video: a table of any size is streamed once into a file that is asked per video.

Koala-36M's ten tables have 4.9 GB each. Only rows whose video lies on this disk are kept, and no more than a few MiB of
the table are in memory at a time.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import sqlite3
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from kling_jax import errors, files
from kling_jax.data import columns, koala
from kling_jax.data.caption import Caption
from kling_jax.data.record import CAPTION_FIELDS
from kling_jax.data.source import Score

_TEXT = ("file", "url", "videoID", "timestamp", "caption", *CAPTION_FIELDS)
_NUMBERS = ("start_s", "end_s", *koala.SCORES, koala.VTSS)
TYPES = {**dict.fromkeys(_TEXT, pa.string()), **dict.fromkeys(_NUMBERS, pa.float64())}


@dataclasses.dataclass(frozen=True)
class Span:
  """A row: seconds from the video's start, what is said of them, and the released scores under `koala_` names."""

  start_s: float
  end_s: float
  caption: Caption
  scores: dict[str, Score]
  vtss: float | None = None


@dataclasses.dataclass(frozen=True)
class Counts:
  """Of a table: rows, rows whose video is not here, rows whose span cannot be read (the first of them in words)."""

  rows: int
  absent: int
  damaged: int
  first: str = ""

  def text(self, table: str) -> str:
    """One line for the terminal."""
    first = f", the first: {self.first}" if self.damaged else ""
    return f"{table}: of {self.rows} rows {self.absent} name no video here, {self.damaged} cannot be read{first}"


def build(
  table: str | os.PathLike[str], target: pathlib.Path, locate: Callable[[dict[str, Any]], str | None]
) -> tuple[Counts, list[str]]:
  """Streams `table` into the index `target`.

  Args:
    locate: row -> path of its video, None where it is not here.

  Returns:
    The counts, and the videos in the order of their first rows.

  Raises:
    DataError: no table, or one without columns that name videos.
  """
  table = pathlib.Path(table)
  names = columns.column_names(table)
  if not {"file", "url", "videoID"} & set(names):
    raise errors.DataError(f"{table}: wants a column file, url or videoID that names videos; it has {', '.join(names)}")
  with files.whole(target) as temporary, contextlib.closing(sqlite3.connect(temporary)) as base:
    base.execute("PRAGMA synchronous = OFF")  # a half-made index never takes its name
    base.execute("CREATE TABLE spans (video TEXT, number INTEGER, start_s REAL, end_s REAL, row TEXT)")
    counts, videos = _fill(base, table, locate)
    base.execute("CREATE INDEX by_video ON spans (video, start_s)")
    base.commit()
  return counts, videos


def _fill(
  base: sqlite3.Connection, table: pathlib.Path, locate: Callable[[dict[str, Any]], str | None]
) -> tuple[Counts, list[str]]:
  videos: dict[str, None] = {}
  rows = absent = damaged = 0
  first = ""
  for row in columns.rows(table, TYPES):
    rows += 1
    path = locate(row)
    if path is None:
      absent += 1
      continue
    try:
      start_s, end_s = _span(row)
    except errors.DataError as error:
      damaged, first = damaged + 1, first or f"row {rows}: {error}"
      continue
    videos.setdefault(path)
    said = {name: row[name] for name in _TEXT[4:] if row.get(name)}
    said |= {name: row[name] for name in _NUMBERS[2:] if row.get(name) is not None and math.isfinite(row[name])}
    base.execute("INSERT INTO spans VALUES (?, ?, ?, ?, ?)", (path, rows, start_s, end_s, json.dumps(said)))
  return Counts(rows, absent, damaged, first), list(videos)


def _span(row: dict[str, Any]) -> tuple[float, float | None]:
  """(start, end) of a row; (0, None) is the whole video."""
  if row.get("timestamp"):
    return koala.parse_span(row["timestamp"])
  start_s, end_s = row.get("start_s") or 0.0, row.get("end_s")
  if not start_s >= 0 or (end_s is not None and not end_s > start_s):
    raise errors.DataError(f"the span {start_s} to {end_s} is none")
  return start_s, end_s


def read(index: str | os.PathLike[str], video: str, table: str) -> list[Span]:
  """The spans of a video, by start; `end_s` is inf for "to the end". `table` names the scorer of released scores."""
  path = pathlib.Path(index).absolute().as_uri() + "?mode=ro"
  with contextlib.closing(sqlite3.connect(path, uri=True)) as base:
    found = base.execute("SELECT start_s, end_s, row FROM spans WHERE video = ? ORDER BY start_s, number", (video,))
    return [_parsed(start_s, end_s, json.loads(row), table) for start_s, end_s, row in found]


def _parsed(start_s: float, end_s: float | None, row: dict[str, Any], table: str) -> Span:
  parts = {name: row.get(name, "") for name in CAPTION_FIELDS}
  said = Caption(**parts, text=row.get("caption", ""), captioner="sidecar", model=table)
  scores = {
    f"koala_{name}": Score(row[column], "table", table) for column, name in koala.SCORES.items() if column in row
  }
  return Span(
    start_s, float("inf") if end_s is None else end_s, said if said else Caption(), scores, row.get(koala.VTSS)
  )


class SpanCaptions:
  """Captions of one video's spans, asked like `folder.Captions`."""

  def __init__(self, spans: list[Span]):
    self._spans = spans

  def of(self, path: str, name: str, span: tuple[float, float] | None = None) -> Caption:
    """The caption of the row that covers most of `span`, if that is at least half."""
    if span is None:
      return Caption(
        text=" ".join(dict.fromkeys(s.caption.text for s in self._spans if s.caption)), captioner="sidecar"
      )
    start, end = span
    covered = [(min(end, s.end_s) - max(start, s.start_s), k) for k, s in enumerate(self._spans)]
    length, best = max(covered, default=(0.0, -1), key=lambda item: item[0])
    return self._spans[best].caption if best >= 0 and length >= (end - start) / 2 else Caption()
