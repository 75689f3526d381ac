"""A table of clips (CSV, JSON lines, Parquet) as a clip source, Koala-36M's released columns included."""

import dataclasses
import math
import os
import pathlib
import typing
from collections.abc import Iterator, Sequence

from kling_jax import errors
from kling_jax.data import clip_table, decode, folder, koala, record
from kling_jax.data import quarantine as quarantine_lib
from kling_jax.data.columns import column_names, row_batches
from kling_jax.data.source import ClipInfo, Score

# A column of ours that means the same as the released one.
_OURS = tuple(clip_table.SCHEMA.names)
_TEXT = ("videoID", "url", "timestamp", "caption")
_SLACK_S = 0.5  # How far a span may reach past its file: rounding, and downloads that lost their last frames.


class _BadRow(Exception):
  """A row that cannot be a clip."""

  def __init__(self, reason: quarantine_lib.Reason, detail: str):
    super().__init__(detail)
    self.reason, self.detail = reason, detail


class TableSource(folder.FileClips):
  """The rows of a table, in order; implements ClipSource.

  Columns (all but `url` optional):
    url: path of a video, relative to `root`. Web addresses are refused: download first.
    timestamp: the clip's span in player time, "['0:00:01.234', '0:00:05.678']"; absent or empty: the whole file.
    caption, videoID (the part after the last "_" is the clip's index), and the scores clarity_score,
    aesthetic_score, motion_score, video_training_suitability_score.
    The columns of our own clips.parquet; its rows with status "dropped" are left out.

  The number of frames of a span is its length times the file's mean frame rate, unless the table states it.

  Args:
    path: .csv, .jsonl or .parquet.
    root: folder that relative paths start from; the table's own by default. A path that climbs out with ".." is
      refused.
    quarantine: a quarantine.jsonl that each refused row is appended to.
    ignore: columns to overlook.
    scorer: (name, version) of what made the score columns; a released table does not say.
    min_frames, min_side: smaller clips are refused.
    limits: what one file may cost.

  Attributes:
    refused: verdicts of the rows that were left out.

  Raises:
    DataError: no table; unknown columns (named); not one row that can be used.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None = None,
    quarantine: str | os.PathLike[str] | None = None,
    *,
    ignore: Sequence[str] = (),
    scorer: tuple[str, str] = ("table", "unknown"),
    min_frames: int = 1,
    min_side: int = 1,
    limits: decode.Limits = decode.DEFAULT_LIMITS,
  ):
    self._path = pathlib.Path(path)
    self._root = pathlib.Path(root) if root is not None else self._path.parent
    self._scorer, self._min_frames = scorer, min_frames
    self._check_columns(ignore)
    # The table is gone through twice, so that its rows are never held together.
    verdicts: list[quarantine_lib.Verdict] = []
    named: dict[str, None] = {}
    for number, row in self._rows():
      try:
        named[self._file(row)] = None
      except _BadRow as bad:
        verdicts.append(_refusal(self._name(number, row), bad))
    # One look at each file, however many clips it gives.
    files = folder.admit(named, None, min_side=min_side, limits=limits)
    refused = {verdict.source for verdict in verdicts}
    clips = []
    whole: dict[str, ClipInfo] = {}
    for number, row in self._rows():
      if self._name(number, row) in refused:
        continue
      name = self._file(row)
      try:
        clips.append(self._clip(row, files[name], name, whole))
      except _BadRow as bad:
        verdicts.append(_refusal(self._name(number, row), bad))
    if quarantine is not None:
      book = quarantine_lib.Log(quarantine)
      for verdict in verdicts:
        book.add(verdict.source, typing.cast(quarantine_lib.Reason, verdict.reason), verdict.detail)
    super().__init__(clips, f"table {str(self._path)!r}", verdicts)

  def _check_columns(self, ignore: Sequence[str]) -> None:
    names = column_names(self._path)
    known = {*koala.COLUMNS, *_OURS, *ignore}
    unknown = [name for name in names if name not in known]
    if unknown:
      listed = ", ".join(f"{name!r}{errors.nearest(name, koala.COLUMNS)}" for name in unknown)
      raise errors.DataError(f"{self._path}: unknown columns: {listed}; rename them, or name them in `ignore`")
    if "url" not in names:
      raise errors.DataError(f"{self._path}: no column 'url' with the videos' paths; it has {names}")

  def _rows(self) -> Iterator[tuple[int, dict[str, typing.Any]]]:
    """(number, row) of the rows that are not dropped, a part of the table at a time."""
    rows = (row for batch in row_batches(self._path, _TEXT) for row in batch)
    return enumerate(row for row in rows if row.get("status") != "dropped")

  def _name(self, number: int, row: dict[str, typing.Any]) -> str:
    return f"{self._path.name}, row {number + 1}: {row['url']}"

  def _file(self, row: dict[str, typing.Any]) -> str:
    url = row["url"]
    if not isinstance(url, str) or not url:
      raise _BadRow("unreadable", "the url is empty")
    if url.startswith(("http://", "https://")):
      raise _BadRow("unreadable", "a web address; `kling fetch` downloads it; put its local path into the column url")
    why = quarantine_lib.hostile(url)
    if not why and ".." in pathlib.PurePath(url).parts:
      why = "the path climbs out of its folder with '..'; give `root`, or an absolute path"
    if why:
      raise _BadRow("hostile_name", why)
    return str(self._root / url)

  def _clip(
    self, row: dict[str, typing.Any], verdict: quarantine_lib.Verdict, path: str, whole: dict[str, ClipInfo]
  ) -> folder.FileClip:
    if verdict.reason is not None or verdict.info is None:
      raise _BadRow(verdict.reason or "unreadable", verdict.detail)
    file = verdict.info
    if path not in whole:
      whole[path] = folder.whole_file(path, file, row["url"], "")
    start_s, end_s = self._span(row, file)
    frames = row.get("num_frames") or max(1, round((end_s - start_s) * file.fps))
    if frames < self._min_frames:
      raise _BadRow("too_short", f"{frames} frames; at least {self._min_frames} are asked")
    video, index = _video(row)
    start, end = (round((s - file.start_s) * 1e6) for s in (start_s, end_s))
    info = dataclasses.replace(
      whole[path],
      clip_id=record.clip_id(whole[path].clip_id, start, end, "1/1000000", "table"),
      caption=(row.get("caption") or "").strip(),
      duration_s=end_s - start_s,
      num_frames=frames,
      scores=self._scores(row),
      video_id=video or whole[path].video_id,
      index=index,
      start_s=start_s - file.start_s,
    )
    return folder.FileClip(path, info, start_s, end_s)

  def _span(self, row: dict[str, typing.Any], file: decode.VideoInfo) -> tuple[float, float]:
    """The row's span in container time."""
    start_s, end_s = file.start_s, file.end_s
    if row.get("start_s") is not None and row.get("end_s") is not None:  # exact, and in container time already
      start_s, end_s = float(row["start_s"]), float(row["end_s"])
    elif row.get("timestamp"):
      try:
        start, end = koala.parse_span(row["timestamp"])
      except errors.DataError as error:
        raise _BadRow("unreadable", str(error)) from error
      start_s, end_s = file.start_s + start, file.start_s + end
    if not start_s < end_s or start_s >= file.end_s or end_s > file.end_s + _SLACK_S:
      lies = f"the span {start_s:.3f} to {end_s:.3f} s does not lie within the file's"
      raise _BadRow("too_short", f"{lies} {file.start_s:.3f} to {file.end_s:.3f} s")
    return start_s, min(end_s, file.end_s)

  def _scores(self, row: dict[str, typing.Any]) -> dict[str, Score]:
    if row.get("scores"):
      scores = {name: Score(**score) for name, score in row["scores"]}
    else:
      named = koala.SCORES.items()
      scores = {name: Score(float(row[c]), *self._scorer) for c, name in named if _is_number(row.get(c))}
    if _is_number(row.get(koala.VTSS)) and "vtss" not in scores:
      scores["vtss"] = Score(float(row[koala.VTSS]), *self._scorer)
    return scores


def _is_number(value: typing.Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def _video(row: dict[str, typing.Any]) -> tuple[str, int]:
  """(video_id, index) of a row; ("", 0) where it does not say."""
  if row.get("video_id"):
    return row["video_id"], int(row.get("index") or 0)
  video, _, index = (row.get("videoID") or "").rpartition("_")
  return (video, int(index)) if video and index.isascii() and index.isdigit() else (row.get("videoID") or "", 0)


def _refusal(name: str, bad: _BadRow) -> quarantine_lib.Verdict:
  return quarantine_lib.Verdict(name, "quarantine", bad.reason, bad.detail)
