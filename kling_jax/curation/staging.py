"""What a video leaves on its way into a set: its clips, one by one, and its summary; each whole or not there.

A worker that dies, on this machine or on another, loses the clip that it was at. Two workers that are at the same video
by mistake write the same bytes.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import struct
from collections.abc import Iterator
from typing import Any

from kling_jax import files
from kling_jax.data import record
from kling_jax.data.record import ClipRecord

_COPIED = struct.Struct("<Q")


@dataclasses.dataclass(frozen=True)
class Clip:
  """A clip that waits for its place in the set; copied: how many of its frames are the source's own packets."""

  clip: ClipRecord
  media: bytes
  copied: int


@dataclasses.dataclass(frozen=True)
class Place:
  """The files of one video in a set's staging folder.

  Attributes:
    folder: the staging folder. stem: the video's name in it.
  """

  folder: pathlib.Path
  stem: str

  def summary(self) -> dict[str, Any] | None:
    """What `video.work` answered, if it came to its end."""
    path = self._summary
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

  def finish(self, summary: dict[str, Any]) -> None:
    """Keeps the answer; from here on the video is done."""
    files.write_json(self._summary, summary)

  def clip(self, content: str, index: int) -> Clip | None:
    """A clip that stands from an earlier try on the same content."""
    path = self._clip(content, index)
    return _read(path) if path.exists() else None

  def add(self, content: str, clip: Clip) -> None:
    with files.whole(self._clip(content, clip.clip.index)) as temporary:
      temporary.write_bytes(_COPIED.pack(clip.copied) + record.pack(clip.clip, clip.media))

  def clips(self, summary: dict[str, Any]) -> Iterator[Clip]:
    """The clips that the summary tells of, in order."""
    for index in range(len(summary["clips"])):
      yield _read(self._clip(summary["content"], index))

  def clear(self) -> None:
    """Removes everything of the video."""
    with contextlib.suppress(FileNotFoundError):
      shutil.rmtree(self.folder / self.stem)
    self._summary.unlink(missing_ok=True)

  @property
  def _summary(self) -> pathlib.Path:
    return self.folder / f"{self.stem}.json"

  def _clip(self, content: str, index: int) -> pathlib.Path:
    return self.folder / self.stem / f"{content[:16]}-{index:05d}"


def _read(path: pathlib.Path) -> Clip:
  data = path.read_bytes()
  return Clip(*record.unpack(data[_COPIED.size :]), _COPIED.unpack_from(data)[0])
