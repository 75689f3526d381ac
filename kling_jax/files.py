"""Files that appear whole or not at all: write beside the target, flush to the disk, rename."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """Yields a temporary path in the target's folder; renames it to `path` when the block ends without an error.

  A kill at any line leaves either the old file or the new one under `path`, never a part. The temporary name starts
  with a dot and keeps the suffix (encoders choose the container by it), so that folder scans can skip leftovers.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
  os.close(handle)
  temporary = pathlib.Path(name)
  try:
    yield temporary
    with temporary.open("rb") as file:
      os.fsync(file.fileno())
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes `text` as UTF-8, whole or not at all."""
  with whole(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes `value` as indented JSON with a closing newline, whole or not at all."""
  write_text(path, json.dumps(value, indent=1) + "\n")
