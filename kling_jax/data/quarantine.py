"""Decides whether a file can be used, says why not, and keeps the list of those that cannot."""

import dataclasses
import json
import os
import pathlib
import threading
import typing
import unicodedata

from kling_jax import errors
from kling_jax.data import container, reasons
from kling_jax.data.probe import VideoInfo, probe
from kling_jax.data.reasons import REASONS, MediaError, Reason

__all__ = ["REASONS", "Entry", "Log", "MediaError", "Reason", "Verdict", "classify", "hostile", "printable", "read"]

Outcome = typing.Literal["accept", "salvage", "quarantine"]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What becomes of a file.

  Attributes:
    source: the file's name, printable.
    outcome: accept; salvage (damaged, but gives whole frames: its clips are marked); quarantine.
    reason, detail: why not accept; reason is None unless quarantined.
    info: what the file holds; None when quarantined unread.
  """

  source: str
  outcome: Outcome
  reason: Reason | None = None
  detail: str = ""
  info: VideoInfo | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of quarantine.jsonl."""

  source: str
  reason: Reason
  detail: str


def classify(
  path: str | os.PathLike[str],
  *,
  min_frames: int = 1,
  min_side: int = 1,
  decode: bool = True,
  limits: container.Limits = container.DEFAULT_LIMITS,
) -> Verdict:
  """Reads a file and decides; never raises for what the file holds.

  Args:
    path: a local file.
    min_frames: fewer frames are too_short.
    min_side: a shorter side of fewer pixels is too_small.
    decode: decode every frame; else only the first (see `probe`): the same files are quarantined, but damage within
      a file may go unseen, so salvage may read accept.
    limits: time, size and threads.
  """
  name = printable(path)
  why = hostile(path)
  if why:
    return Verdict(name, "quarantine", "hostile_name", why)
  try:
    info = probe(path, limits, decode=decode)
  except reasons.MediaError as error:
    return Verdict(name, "quarantine", error.reason, error.detail)
  except MemoryError:
    return Verdict(name, "quarantine", "out_of_memory", "decoding did not fit into memory")
  if info.num_frames < min_frames:
    return Verdict(name, "quarantine", "too_short", f"{info.num_frames} frames; at least {min_frames} are asked", info)
  if min(info.width, info.height) < min_side:
    detail = f"{info.width} x {info.height} pixels; at least {min_side} on the shorter side are asked"
    return Verdict(name, "quarantine", "too_small", detail, info)
  if info.salvaged:
    return Verdict(name, "salvage", None, "; ".join(info.damage), info)
  return Verdict(name, "accept", info=info)


def hostile(path: str | os.PathLike[str]) -> str:
  """Says what is wrong with a file name, or "".

  Names that lie about themselves in logs, tables and pages are refused: control characters (line breaks, escapes),
  characters that turn the reading direction, bytes that are no UTF-8. Spaces, quotes, leading dashes, colons and
  glob characters are harmless here, since no name ever reaches a shell or an address parser.
  """
  for character in os.fspath(path):
    kind = unicodedata.category(character)
    if kind == "Cs":
      return "the name is no UTF-8"
    if kind in ("Cc", "Zl", "Zp") or character in "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069":
      return f"the name holds the control character U+{ord(character):04X}"
  return ""


def printable(path: str | os.PathLike[str]) -> str:
  """The name as legal Unicode; bytes that are no UTF-8 become \\xNN."""
  return os.fsencode(os.fspath(path)).decode("utf-8", "backslashreplace")


class Log:
  """quarantine.jsonl: one object {source, reason, detail} a line, appended so that a kill costs at most one line.

  A line that an earlier kill cut short is removed at opening; the same entry is not written twice.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)
    self._lock = threading.Lock()
    self.path.parent.mkdir(parents=True, exist_ok=True)
    if self.path.exists():
      text = self.path.read_bytes()
      if not text.endswith(b"\n"):
        os.truncate(self.path, text.rfind(b"\n") + 1)
    self.entries: list[Entry] = read(self.path) if self.path.exists() else []
    self._known = set(self.entries)

  def add(self, source: str | os.PathLike[str], reason: Reason, detail: str) -> None:
    """Appends one line and flushes it to the disk."""
    if reason not in REASONS:
      raise ValueError(f"{reason!r} is no quarantine reason; legal: {', '.join(REASONS)}")
    entry = Entry(printable(source), reason, detail)
    with self._lock:
      if entry in self._known:
        return
      line = json.dumps(dataclasses.asdict(entry)).encode() + b"\n"
      handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
      try:
        os.write(handle, line)  # One write of one line: processes that share the file do not mix theirs.
        os.fsync(handle)
      finally:
        os.close(handle)
      self.entries.append(entry)
      self._known.add(entry)


def read(path: str | os.PathLike[str]) -> list[Entry]:
  """The entries of a quarantine.jsonl.

  Raises:
    DataError: a line is no such object; names its number.
  """
  entries = []
  lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
  for number, line in enumerate(lines[:-1], start=1):
    try:
      values = json.loads(line)
      entry = Entry(**values)
    except (ValueError, TypeError) as error:
      raise errors.DataError(f"{path}, line {number}: no quarantine entry ({error})") from error
    if entry.reason not in REASONS:
      raise errors.DataError(f"{path}, line {number}: unknown reason {entry.reason!r}; legal: {', '.join(REASONS)}")
    entries.append(entry)
  return entries
