"""A folder of videos as a clip source: each file is one clip, broken ones are quarantined, captions lie beside them."""

import concurrent.futures
import dataclasses
import functools
import math
import os
import pathlib
import typing
from collections.abc import Iterable, Sequence

import numpy as np

from kling_jax import errors, progress
from kling_jax.data import caption as caption_lib
from kling_jax.data import decode, quarantine, record
from kling_jax.data.caption import Caption
from kling_jax.data.columns import read_table
from kling_jax.data.source import ClipInfo

SUFFIXES = (
  *(".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
  *(".mts", ".mxf", ".nut", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m"),
  *(".264", ".265", ".apng", ".h264", ".hevc", ".ivf", ".obu"),
)
CAPTION_TABLES = ("captions.csv", "captions.jsonl")


@dataclasses.dataclass(frozen=True)
class FileClip:
  """A clip that is a video file, or its span [start_s, end_s)."""

  path: str
  info: ClipInfo
  start_s: float | None = None
  end_s: float | None = None


class FileClips:
  """Clips that lie in video files: the part of ClipSource that folders and tables share.

  Args:
    clips: in order.
    what: the source in words, for the error.
    refused: verdicts of what was left out.

  Raises:
    DataError: no clip is left.
  """

  def __init__(self, clips: Sequence[FileClip], what: str, refused: Sequence[quarantine.Verdict]):
    if not clips:
      raise errors.DataError(none_left(what, refused))
    self.refused = tuple(refused)
    self._clips = list(clips)
    self._fingerprint = record.fingerprint(clip.info.clip_id for clip in clips)

  @property
  def fingerprint(self) -> str:
    return self._fingerprint

  def __len__(self) -> int:
    return len(self._clips)

  def path(self, index: int) -> str:
    """The file of clip `index`."""
    return self._clips[index].path

  def info(self, index: int) -> ClipInfo:
    return self._clips[index].info

  def frames(self, index: int, times_s: np.ndarray, height: int, width: int) -> np.ndarray:
    clip = self._clips[index]
    return decode.frames_at(clip.path, times_s, height, width, start_s=clip.start_s, end_s=clip.end_s)


class FolderSource(FileClips):
  """The videos below a folder, sorted by relative path; implements ClipSource.

  Every file is walked once when the source is made (headers, packets, one frame), so that broken files are known
  before training starts. Files and folders whose names start with a dot are skipped, links to folders not followed.

  Captions, first found first taken: `name.txt`; `name.json` with a key "caption" or Koala's six fields (`caption.merge`
  joins them); `captions.csv` or `captions.jsonl` in the top folder, with columns `file` (relative path), `caption` or
  the six fields, and `start_s` and `end_s` (seconds) where a row speaks for a span. A video without any has an empty
  caption.

  Args:
    folder: the top folder.
    quarantine_path: a quarantine.jsonl that each refused file is appended to.
    min_frames, min_side: smaller videos are refused.
    limits: what one file may cost.

  Attributes:
    refused: verdicts of the files that were left out.

  Raises:
    DataError: no folder, no video in it, or none that can be used; a caption file that is none.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    quarantine: str | os.PathLike[str] | None = None,
    *,
    min_frames: int = 1,
    min_side: int = 1,
    limits: decode.Limits = decode.DEFAULT_LIMITS,
  ):
    top = pathlib.Path(folder)
    paths = find_videos(top)
    verdicts = admit(paths, quarantine, min_frames=min_frames, min_side=min_side, limits=limits)
    captions = Captions(top)
    clips = []
    for path, verdict in verdicts.items():
      if verdict.outcome != "quarantine" and verdict.info is not None:
        name = os.path.relpath(path, top).replace(os.sep, "/")
        clips.append(FileClip(path, whole_file(path, verdict.info, name, captions.of(path, name).text)))
    refused = [verdict for verdict in verdicts.values() if verdict.outcome == "quarantine"]
    super().__init__(clips, f"folder {os.fspath(folder)!r}", refused)


def one_file(path: str | os.PathLike[str], limits: decode.Limits = decode.DEFAULT_LIMITS) -> FileClips:
  """One video as a source of one clip, with the caption beside it.

  Raises:
    DataError: it cannot be used.
  """
  path = os.fspath(path)
  verdict = admit([path], None, limits=limits)[path]
  clips = []
  if verdict.outcome != "quarantine" and verdict.info is not None:
    name, top = os.path.basename(path), os.path.dirname(path)
    clips = [FileClip(path, whole_file(path, verdict.info, name, Captions(top).of(path, name).text))]
  return FileClips(clips, f"video {path!r}", [] if clips else [verdict])


def find_videos(top: str | os.PathLike[str]) -> list[str]:
  """Paths below `top` that end like videos, sorted by relative path.

  Raises:
    DataError: `top` is no folder that can be read, or holds no such file.
  """
  top = os.fspath(top)
  if not os.path.isdir(top):
    raise errors.DataError(f"{top!r} is no folder; name one that holds video files")
  found = videos_below(top)
  if not found:
    raise errors.DataError(f"folder {top!r} holds no video file; known suffixes: {' '.join(SUFFIXES)}")
  return found


def videos_below(top: str | os.PathLike[str]) -> list[str]:
  """`find_videos`, [] where there are none."""
  found = []
  for folder, subfolders, names in os.walk(top, onerror=_raise):
    subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    found += [os.path.join(folder, n) for n in names if not n.startswith(".") and _suffix(n) in SUFFIXES]
  return sorted(found, key=lambda path: os.path.relpath(path, top).split(os.sep))


def admit(
  paths: Iterable[str],
  log: str | os.PathLike[str] | None,
  *,
  min_frames: int = 1,
  min_side: int = 1,
  limits: decode.Limits = decode.DEFAULT_LIMITS,
) -> dict[str, quarantine.Verdict]:
  """Classifies files (several at once, one thread each) and writes the refused ones into a quarantine.jsonl.

  Returns:
    path -> verdict, in the order of `paths`.
  """
  paths = list(paths)
  book = quarantine.Log(log) if log is not None else None
  judge = functools.partial(quarantine.classify, min_frames=min_frames, min_side=min_side, decode=False, limits=limits)
  verdicts: dict[str, quarantine.Verdict] = {}
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for path, verdict in progress.track(zip(paths, pool.map(judge, paths), strict=True), "look at videos", len(paths)):
      verdicts[path] = verdict
      if verdict.reason is not None and book is not None:
        book.add(path, verdict.reason, verdict.detail)
  return verdicts


def whole_file(path: str, info: decode.VideoInfo, name: str, caption: str) -> ClipInfo:
  """The clip that a file as a whole is."""
  identity = record.clip_id(record.content_hash(path), info.start_pts, info.end_pts, info.time_base, "file")
  return ClipInfo(
    clip_id=identity,
    caption=caption,
    duration_s=info.duration_s,
    fps=info.fps,
    num_frames=info.num_frames,
    width=info.width,
    height=info.height,
    video_id=name,
  )


def none_left(where: str, refused: Sequence[quarantine.Verdict]) -> str:
  """The error of a source whose files were all refused: how many for which reason, and one of them."""
  counts: dict[str, int] = {}
  for verdict in refused:
    counts[str(verdict.reason)] = counts.get(str(verdict.reason), 0) + 1
  listed = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
  first = f"; the first: {refused[0].source!r}: {refused[0].detail}" if refused else ""
  return f"{where} holds no clip that can be used ({listed or 'nothing at all'}{first})"


class Captions:
  """Captions beside a folder's videos, for whole files and for spans of them (see `FolderSource`).

  Args:
    top: the folder, or a table to be read in place of its caption table; paths start from the table's folder.

  Raises:
    DataError: two caption tables, or one without the columns `file` and `caption` (or one of the six parts).
  """

  def __init__(self, top: str | os.PathLike[str]):
    self._rows: dict[str, list[tuple[float, float, Caption]]] = {}
    found = [path for path in (pathlib.Path(top) / name for name in CAPTION_TABLES) if path.is_file()]
    if pathlib.Path(top).is_file():
      found = [pathlib.Path(top)]
    if len(found) > 1:
      raise errors.DataError(f"{top}: both {' and '.join(CAPTION_TABLES)}; keep one")
    for path in found:
      table = read_table(path, ("file", "caption", *record.CAPTION_FIELDS))
      if "file" not in table.column_names or not {"caption", *record.CAPTION_FIELDS} & set(table.column_names):
        names = ", ".join(table.column_names)
        raise errors.DataError(f"{path}: wants the columns file and caption; it has {names}")
      for row in table.to_pylist():
        if row["file"]:
          parts = {name: row.get(name) or "" for name in record.CAPTION_FIELDS}
          said = Caption(**parts, text=row.get("caption") or "", captioner="sidecar", model=path.name)
          spanned = (_seconds(path, row, "start_s", 0.0), _seconds(path, row, "end_s", math.inf), said)
          self._rows.setdefault(str(pathlib.PurePosixPath(row["file"])), []).append(spanned)

  def of(self, path: str, name: str, span: tuple[float, float] | None = None) -> Caption:
    """The caption of the video at `path`, known as `name` below the top folder; empty where there is none.

    Args:
      span: (start, end) seconds from the video's start. The row of the table that covers most of it speaks for it, if
        that is at least half. None: the whole file; the captions of its spans are joined in their order.
    """
    beside = pathlib.Path(path)
    text, values = beside.with_suffix(".txt"), beside.with_suffix(".json")
    if text.is_file():
      said = Caption(text=_read(text), captioner="sidecar", model="txt")
      return said if said else Caption()
    if values.is_file():
      return _from_json(values)
    rows = self._rows.get(name, [])
    if span is None:
      found = [caption for _, _, caption in sorted(rows, key=lambda row: row[:2]) if caption]
      if len(found) <= 1:
        return found[0] if found else Caption()
      joined = " ".join(dict.fromkeys(caption.text for caption in found))
      return Caption(text=joined, captioner="sidecar", model=found[0].model)
    start, end = span
    covered = [(min(end, row_end) - max(start, row_start), caption) for row_start, row_end, caption in rows]
    length, caption = max(covered, default=(0.0, Caption()), key=lambda item: item[0])
    return caption if caption and length >= (end - start) / 2 else Caption()


def _seconds(path: pathlib.Path, row: dict[str, typing.Any], column: str, missing: float) -> float:
  value = row.get(column)
  if value is None or value == "":
    return missing
  try:
    return float(value)
  except (TypeError, ValueError) as error:
    raise errors.DataError(f"{path}: {column} of {row['file']!r} is {value!r}; wants seconds") from error


def _from_json(path: pathlib.Path) -> Caption:
  text = _read(path)
  try:
    return caption_lib.of_json(text, captioner="sidecar", model="json")
  except errors.DataError as error:
    raise errors.DataError(f"{path}: {error}; mend or remove this caption file") from error


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeDecodeError) as error:
    raise errors.DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error


def _suffix(name: str) -> str:
  return os.path.splitext(name)[1].lower()


def _raise(error: OSError) -> None:
  raise errors.DataError(f"{error.filename!r} cannot be listed: {error.strerror}") from error
