"""Sentences with times for long videos, from the layouts that dense captions are published in.

  activitynet  ActivityNet Captions: JSON {video: {duration, timestamps: [[start, end], ...], sentences: [...]}}
  vript        Vript: JSON {meta, data: {clip: {caption: {content, ...}, ...}}}, one video a file of a folder or a line;
               each scene is a file of its own, `ID-Scene-001.mp4`, and begins with a cut
  webvid       WebVid: CSV videoid,contentUrl,duration,page_dir,name; one sentence a video
  panda        Panda-70M: CSV videoID,url,timestamp,caption,...; lists of spans and of captions in the cells
  lines        our own: JSON lines {file, caption, start_s, end_s}; times may be missing

Rows that cannot be read are left out, listed in `refused`, and written into a quarantine.jsonl where one is given.
"""

import ast
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import typing
from collections.abc import Callable, Iterator

import pyarrow as pa

from kling_jax import errors
from kling_jax.data import columns, koala
from kling_jax.data import quarantine as quarantine_lib
from kling_jax.data.quarantine import Verdict

KINDS = ("activitynet", "vript", "webvid", "panda", "lines")
LEAST_SHARE = 0.5  # of the shorter of clip and sentence, that a sentence must overlap to speak for the clip
_SCENE = re.compile(r"(.+)-Scene-(\d{1,9})", re.ASCII)

Keep = Callable[[str], bool]


@dataclasses.dataclass(frozen=True)
class Sentence:
  """What is said of the seconds [start_s, end_s) from a video's start."""

  video: str
  start_s: float
  end_s: float
  text: str


class _BadRow(Exception):
  """A row that says nothing; the message says why."""


class DenseCaptions:
  """The sentences of a set of videos.

  Attributes:
    sentences: {video: its sentences by time}.
    refused: verdicts of the rows that were left out.
  """

  def __init__(self, sentences: typing.Iterable[Sentence], refused: typing.Sequence[Verdict] = ()):
    self.sentences: dict[str, list[Sentence]] = {}
    for sentence in sentences:
      self.sentences.setdefault(sentence.video, []).append(sentence)
    for said in self.sentences.values():
      said.sort(key=lambda sentence: (sentence.start_s, sentence.end_s))
    self.refused = tuple(refused)

  def of(self, video: str, start_s: float, end_s: float) -> str:
    """What is said of [start_s, end_s) of a video: sentences that overlap it by half of the shorter, in order.

    A video is found by its name, by its file's name without folder and suffix, and with or without ActivityNet's "v_".
    """
    said = []
    for sentence in named(self.sentences, video) or ():
      overlap = min(end_s, sentence.end_s) - max(start_s, sentence.start_s)
      if overlap > 0 and overlap >= LEAST_SHARE * min(end_s - start_s, sentence.end_s - sentence.start_s):
        said.append(sentence.text)
    return " ".join(dict.fromkeys(said))

  @staticmethod
  def place(video: str) -> tuple[str, int] | None:
    """(video, scene) of a file that is one scene of a video, as Vript names them; None for other names."""
    match = _SCENE.fullmatch(_stem(video))
    return (match[1], int(match[2])) if match else None


def named(table: typing.Mapping[str, typing.Any], video: str) -> typing.Any:
  """What a table by video names says of `video`; None where it says nothing."""
  stem = _stem(video)
  for name in (video, os.path.basename(video), stem, f"v_{stem}", stem.removeprefix("v_")):
    if name in table:
      return table[name]
  return None


def _stem(video: str) -> str:
  return pathlib.PurePosixPath(video).name.rsplit(".", 1)[0]


def read(
  path: str | os.PathLike[str],
  kind: str | None = None,
  *,
  keep: Keep | None = None,
  quarantine: str | os.PathLike[str] | None = None,
) -> DenseCaptions:
  """Reads a file (for vript also a folder) of dense captions.

  Args:
    kind: one of KINDS; None: told from the content.
    keep: whether a video's sentences are wanted; a released table is larger than what anyone has of it.
    quarantine: a quarantine.jsonl that each refused row is appended to.

  Raises:
    DataError: no such file, another layout, or not one sentence in it.
    UsageError: an unknown kind.
  """
  path = pathlib.Path(path)
  if kind is not None and kind not in KINDS:
    raise errors.UsageError(f"dense captions of kind {kind!r}{errors.nearest(kind, KINDS)}")
  if not path.exists():
    raise errors.DataError(f"dense captions {str(path)!r} do not exist")
  kind = kind or _kind(path)
  said: list[Sentence] = []
  refused: list[Verdict] = []
  for where, row in _READERS[kind](path):
    try:
      if isinstance(row, Exception):
        raise _BadRow(str(row))
      for sentence in row():
        if keep is None or keep(sentence.video):
          said.append(sentence)
    except _BadRow as bad:
      refused.append(Verdict(quarantine_lib.printable(where), "quarantine", "unreadable", str(bad)))
  if quarantine is not None:
    book = quarantine_lib.Log(quarantine)
    for verdict in refused:
      book.add(verdict.source, "unreadable", verdict.detail)
  if not said:
    first = f"; the first of {len(refused)} refused: {refused[0].source}: {refused[0].detail}" if refused else ""
    raise errors.DataError(f"{path}: not one sentence in it (read as {kind}){first}")
  return DenseCaptions(said, refused)


Row = tuple[str, Callable[[], Iterator[Sentence]] | Exception]


def _kind(path: pathlib.Path) -> str:
  """The layout of a file, from its suffix and its first names."""
  if path.is_dir():
    return "vript"
  suffix = path.suffix.lower()
  if suffix == ".csv":
    names = set(columns.column_names(path))
    if {"contentUrl", "name"} <= names:
      return "webvid"
    if {"videoID", "timestamp", "caption"} <= names:
      return "panda"
    raise errors.DataError(f"{path}: columns {', '.join(sorted(names))}; neither WebVid's nor Panda-70M's")
  if suffix == ".jsonl":
    with path.open(encoding="utf-8", errors="replace") as file:
      head = next((line for line in file if line.strip()), "")
    return "vript" if re.match(r'\s*\{\s*"(meta|data)"', head) else "lines"
  if suffix == ".json":
    values = _json(path)
    return "vript" if isinstance(values, dict) and "data" in values else "activitynet"
  raise errors.DataError(f"{path}: wants .json, .jsonl, .csv, or a folder of Vript's .json files")


def _json(path: pathlib.Path) -> typing.Any:
  try:
    return json.loads(path.read_text(encoding="utf-8-sig"))
  except (OSError, ValueError, RecursionError) as error:
    raise errors.DataError(f"{path}: cannot be read as JSON ({error})") from error


# ---------------------------------------------------------------------------------------------------------- layouts


def _activitynet(path: pathlib.Path) -> Iterator[Row]:
  values = _json(path)
  if not isinstance(values, dict):
    raise errors.DataError(f"{path}: a JSON {type(values).__name__}; ActivityNet Captions are an object by video")
  for video, entry in values.items():
    where = f"{path.name}: {video}"
    try:
      spans, texts = (_field(entry, name, list) for name in ("timestamps", "sentences"))
      if len(spans) != len(texts):
        raise _BadRow(f"{len(spans)} timestamps for {len(texts)} sentences")
    except _BadRow as bad:
      yield where, bad
      continue
    for number, (span, text) in enumerate(zip(spans, texts, strict=True), start=1):
      yield f"{where}, sentence {number}", functools.partial(_of_activitynet, video, span, text)


def _of_activitynet(video: str, span: typing.Any, text: typing.Any) -> Iterator[Sentence]:
  yield Sentence(video, *_span(span), _words(text))


def _vript(path: pathlib.Path) -> Iterator[Row]:
  if path.is_dir():
    files = sorted(path.glob("*.json"))
    if not files:
      raise errors.DataError(f"{path}: no .json file in this folder")
    for file in files:
      try:
        yield file.name, functools.partial(_of_vript, _json(file))
      except errors.DataError as error:
        yield file.name, error
  elif path.suffix.lower() == ".jsonl":
    yield from ((where, error or functools.partial(_of_vript, values)) for where, values, error in _lines(path))
  else:
    yield path.name, functools.partial(_of_vript, _json(path))


def _of_vript(values: typing.Any) -> Iterator[Sentence]:
  scenes = _field(values, "data", dict)
  found = []
  for clip, scene in scenes.items():
    if not _SCENE.fullmatch(clip):
      raise _BadRow(f"scene {clip!r}: wants a name like ID-Scene-001")
    found.append(Sentence(clip, 0.0, math.inf, _words(_field(_field(scene, "caption", dict), "content", str))))
  yield from found


def _webvid(path: pathlib.Path) -> Iterator[Row]:
  types = {name: pa.string() for name in ("videoid", "page_dir", "name")}
  for number, row in enumerate(columns.rows(path, types), start=1):
    yield f"{path.name}, row {number}", functools.partial(_of_webvid, row)


def _of_webvid(row: dict[str, typing.Any]) -> Iterator[Sentence]:
  video = str(row.get("videoid") or "")
  if not video.isascii() or not video.isdigit():
    raise _BadRow(f"videoid {video[:40]!r} is no number")
  yield Sentence(video, 0.0, math.inf, _words(row.get("name")))


def _panda(path: pathlib.Path) -> Iterator[Row]:
  types = {name: pa.string() for name in ("videoID", "timestamp", "caption")}
  for number, row in enumerate(columns.rows(path, types), start=1):
    yield f"{path.name}, row {number}", functools.partial(_of_panda, row)


def _of_panda(row: dict[str, typing.Any]) -> Iterator[Sentence]:
  video = row.get("videoID") or ""
  if not video:
    raise _BadRow("the videoID is empty")
  spans, texts = (_literal(name, row.get(name) or "") for name in ("timestamp", "caption"))
  if len(spans) != len(texts):
    raise _BadRow(f"{len(spans)} time spans for {len(texts)} captions")
  try:
    times = [koala.parse_span(repr(span)) for span in spans]
  except errors.DataError as error:
    raise _BadRow(str(error)) from error
  found = [Sentence(video, start, end, _words(text)) for (start, end), text in zip(times, texts, strict=True)]
  yield from found


def _own_lines(path: pathlib.Path) -> Iterator[Row]:
  yield from ((where, error or functools.partial(_of_line, values)) for where, values, error in _lines(path))


def _of_line(values: typing.Any) -> Iterator[Sentence]:
  video, text = _field(values, "file", str), _words(_field(values, "caption", str))
  if why := quarantine_lib.hostile(video):
    raise _BadRow(why)
  span = (values.get("start_s", 0.0), values.get("end_s", math.inf))
  yield Sentence(str(pathlib.PurePosixPath(video)), *_span(span), text)


_READERS: dict[str, Callable[[pathlib.Path], Iterator[Row]]] = {
  "activitynet": _activitynet,
  "vript": _vript,
  "webvid": _webvid,
  "panda": _panda,
  "lines": _own_lines,
}


def _lines(path: pathlib.Path) -> Iterator[tuple[str, typing.Any, Exception | None]]:
  """(where, values, error) of each line of a JSON lines file."""
  with path.open("rb") as file:
    for number, line in enumerate(file, start=1):
      where = f"{path.name}, line {number}"
      if not line.strip():
        continue
      try:
        yield where, json.loads(line.decode("utf-8-sig")), None
      except (ValueError, RecursionError) as error:
        yield where, None, _BadRow(f"no JSON ({error})")


def _field(values: typing.Any, name: str, kind: type) -> typing.Any:
  found = values.get(name) if isinstance(values, dict) else None
  if not isinstance(found, kind):
    raise _BadRow(f"{name!r} is no {kind.__name__}")
  return found


def _words(text: typing.Any) -> str:
  cleaned = " ".join(text.split()) if isinstance(text, str) else ""
  if not cleaned:
    raise _BadRow("a sentence is empty")
  return cleaned


def _span(span: typing.Any) -> tuple[float, float]:
  """(start, end) seconds of a pair."""
  if not isinstance(span, list | tuple) or len(span) != 2:
    raise _BadRow(f"time span {str(span)[:60]!r}: wants [start, end]")
  if not all(type(value) in (int, float) for value in span) or not 0 <= span[0] < span[1]:
    raise _BadRow(f"time span {span}: wants 0 <= start < end, in seconds")
  return float(span[0]), float(span[1])


def _literal(name: str, text: str) -> list[typing.Any]:
  """A list written as Python writes it, in a cell of a table."""
  try:
    values = ast.literal_eval(text) if len(text) < 2**20 else None
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    values = None
  if not isinstance(values, list) or not values:
    raise _BadRow(f"{name} {text[:60]!r}: wants a list")
  return values


# ------------------------------------------------------------------------------------------------------------ shots


def read_shots(path: str | os.PathLike[str]) -> dict[str, tuple[tuple[float, float], ...]]:
  """The shots of videos, {video: ((start_s, end_s), ...)}, from the output of `kling split --json`.

  Raises:
    DataError: it is no such output.
  """
  values = _json(pathlib.Path(path))
  try:
    shots = {
      entry["video"]: tuple((float(shot["start_s"]), float(shot["end_s"])) for shot in entry["shots"])
      for entry in values
    }
  except (TypeError, KeyError, ValueError) as error:
    mend = "write it with `kling split VIDEO... --json > shots.json`"
    raise errors.DataError(f"{path}: not what `kling split --json` prints ({error!r}); {mend}") from error
  for video, spans in shots.items():
    if any(not 0 <= start < end for start, end in spans) or list(spans) != sorted(spans):
      raise errors.DataError(f"{path}: the shots of {video!r} do not ascend")
  return shots
