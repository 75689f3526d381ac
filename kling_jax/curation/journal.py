"""videos.jsonl of a set: one object a video, added as videos are done, never rewritten."""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

FILE = "videos.jsonl"


def read(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The objects of a set's journal, one a video, [] where there is none: `video.work`'s answers with duplicate_of.

  Of a video that was tried again the last object counts. A line that a kill cut in half is no line.
  """
  path = pathlib.Path(folder) / FILE
  if not path.exists():
    return []
  entries: dict[str, dict[str, Any]] = {}
  for line in path.read_bytes().split(b"\n")[:-1]:
    entry = json.loads(line)
    entries[entry["name"]] = entry
  return list(entries.values())


def add(folder: str | os.PathLike[str], entries: Iterable[dict[str, Any]]) -> None:
  """Appends objects; they are on the disk when it returns."""
  with (pathlib.Path(folder) / FILE).open("ab+") as file:
    file.seek(0)
    held = file.read()
    file.truncate(held.rfind(b"\n") + 1)
    file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
    file.flush()
    os.fsync(file.fileno())
