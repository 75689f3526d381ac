"""WebDataset tars as a clip source: members that share a basename are one sample; nothing is ever unpacked.

`key.mp4` (or any suffix of a video) is the clip, `key.txt` or `key.json` its caption; a `key.json` that is the header
of one of our records brings everything else. Members are read at their places in the tar: any clip can be had.
"""

import concurrent.futures
import dataclasses
import itertools
import os
import pathlib
import tarfile
from collections.abc import Iterable, Iterator

import numpy as np

from kling_jax import errors, progress
from kling_jax.data import caption as caption_lib
from kling_jax.data import decode, folder, probe, quarantine, reasons, record
from kling_jax.data.caption import Caption
from kling_jax.data.record import ClipRecord
from kling_jax.data.source import ClipInfo

SUFFIX = ".tar"
LONGEST_NAME = 1024  # letters of a member's name
MOST_TEXT = 2**24  # bytes of a member that is read as text


@dataclasses.dataclass(frozen=True)
class Member:
  """A file in a tar that is not compressed: bytes [offset, offset + size)."""

  tar: str
  name: str
  offset: int
  size: int

  @property
  def source(self) -> str:
    """Its name in messages and tables: TAR/member."""
    return f"{self.tar}/{self.name}"

  def read(self) -> bytes:
    """Its content.

    Raises:
      DataError: the tar became shorter, or is gone.
    """
    try:
      with open(self.tar, "rb") as file:
        file.seek(self.offset)
        data = file.read(self.size)
    except OSError as error:
      raise errors.DataError(f"{self.source}: cannot be read ({error.strerror})") from error
    if len(data) != self.size:
      raise errors.DataError(f"{self.source}: the tar became shorter while it was in use")
    return data

  def copy(self, path: str | os.PathLike[str]) -> None:
    """Writes its content to a file, some MiB at a time.

    Raises:
      DataError: the tar became shorter, or is gone.
    """
    left = self.size
    with open(path, "wb") as target:
      try:
        with open(self.tar, "rb") as file:
          file.seek(self.offset)
          while left and (chunk := file.read(min(left, 2**22))):
            target.write(chunk)
            left -= len(chunk)
      except FileNotFoundError as error:
        raise errors.DataError(f"{self.source}: the tar is gone") from error
    if left:
      raise errors.DataError(f"{self.source}: the tar became shorter while it was in use")


@dataclasses.dataclass(frozen=True)
class Sample:
  """A video with what stands beside it under the same key."""

  key: str
  media: Member
  text: Member | None = None
  json: Member | None = None

  def header(self) -> ClipRecord | None:
    """The clip record that `key.json` is; None where it is something else."""
    if self.json is None:
      return None
    try:
      return record.parse_header(self.json.read())
    except errors.DataError:
      return None  # Somebody else's JSON: it may have a caption.

  def caption(self) -> Caption:
    """What `key.txt`, else `key.json` says."""
    if self.text is not None:
      said = Caption(text=self.text.read().decode("utf-8", "replace"), captioner="sidecar", model="txt")
      return said if said else Caption()
    if self.json is not None:
      try:
        return caption_lib.of_json(self.json.read().decode("utf-8", "replace"), captioner="sidecar", model="json")
      except errors.DataError:
        return Caption()  # Other people's tars have JSON of other kinds beside their videos.
    return Caption()


def find_tars(path: str | os.PathLike[str]) -> list[str]:
  """The tars at `path`: itself, or those in the folder, by name; [] where there are none.

  Raises:
    DataError: the folder holds tars and videos, and nobody can know which are meant.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    tars = sorted(str(found) for found in path.glob(f"*{SUFFIX}") if not found.name.startswith("."))
    if tars and (videos := folder.videos_below(path)):
      raise errors.DataError(f"{path} holds tars ({os.path.basename(tars[0])}) and videos ({videos[0]}); part them")
    return tars
  return [str(path)] if path.suffix.lower() == SUFFIX and path.is_file() else []


def scan(tar: str) -> tuple[list[Sample], list[quarantine.Verdict]]:
  """Reads the headers of a tar: (samples in order, what was refused, as verdicts).

  Refused are links, devices and whatever is no plain file (folders are passed over), names that are absolute, climb out
  with "..", hold control characters or are longer than 1,024 letters, sparse and cut members, second videos of a key,
  and keys that come twice. What a damaged tar holds before the damage is used.
  """
  refused: list[quarantine.Verdict] = []
  members = list(_members(tar, refused))
  samples: list[Sample] = []
  known: set[str] = set()
  for key, group in itertools.groupby(members, lambda item: item[0]):
    parts: dict[str, Member] = {}
    for _, suffix, member in group:
      kind = "media" if suffix in folder.SUFFIXES else {".txt": "text", ".json": "json"}.get(suffix, "")
      if kind in parts or key in known:
        refused.append(_verdict(member.source, "unreadable", f"the key {key!r} has this twice"))
      elif kind and kind != "media" and member.size > MOST_TEXT:
        refused.append(_verdict(member.source, "unreadable", f"{member.size} bytes of text; the limit is {MOST_TEXT}"))
      elif kind:
        parts[kind] = member
    if "media" in parts and key not in known:
      samples.append(Sample(key, **parts))
    elif key not in known:
      refused.append(_verdict(f"{tar}/{key}", "no_video_stream", "no video stands under this key"))
    known.add(key)
  return samples, refused


def _members(tar: str, refused: list[quarantine.Verdict]) -> Iterator[tuple[str, str, Member]]:
  """(key, last suffix, member) of the plain files of a tar."""
  size = os.path.getsize(tar) if os.path.isfile(tar) else 0
  end = 0
  try:
    with tarfile.open(tar, "r:") as archive:
      for info in archive:
        if info.offset_data + (0 if info.isdir() else info.size) > size:
          refused.append(_verdict(_name(tar, info), "truncated", "the tar ends within this member"))
          return
        why = _hostile(info)
        if why:
          refused.append(_verdict(_name(tar, info), "hostile_name", why))
        elif info.isreg() and not info.issparse():
          place, _, base = info.name.rpartition("/")
          stem, dot, suffixes = base.partition(".")
          if stem and dot and not stem.startswith("__"):
            key = f"{place}/{stem}" if place else stem
            yield key, "." + suffixes.rpartition(".")[2].lower(), Member(tar, info.name, info.offset_data, info.size)
        elif info.issparse():
          refused.append(_verdict(_name(tar, info), "unreadable", "a sparse member"))
      end = archive.offset
  except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
    how: reasons.Reason = "truncated" if "end of data" in str(error) or "truncated" in str(error) else "unreadable"
    refused.append(_verdict(tar, how, f"no tar, or a damaged or compressed one ({str(error)[:100]})"))
    return
  with open(tar, "rb") as file:  # tarfile takes a damaged header for the end
    file.seek(end)
    if any(file.read(tarfile.BLOCKSIZE)):
      refused.append(_verdict(tar, "truncated", "a damaged header; what lies behind it is lost"))


def _hostile(info: tarfile.TarInfo) -> str:
  if info.issym() or info.islnk():
    return "a link"
  if not (info.isreg() or info.isdir()):
    return "a device or pipe"
  if len(info.name) > LONGEST_NAME:
    return f"a name of {len(info.name)} letters"
  if info.name.startswith("/") or ".." in info.name.split("/"):
    return "the name leads out of the tar's folder"
  return quarantine.hostile(info.name)


def _name(tar: str, info: tarfile.TarInfo) -> str:
  return f"{tar}/{quarantine.printable(info.name)[:LONGEST_NAME]}"


def _verdict(source: str, reason: reasons.Reason, detail: str) -> quarantine.Verdict:
  return quarantine.Verdict(quarantine.printable(source), "quarantine", reason, detail)


class WebDatasetSource:
  """The samples of tars as clips, in the order of names and members; implements ClipSource.

  Samples that bring the header of a clip record are that clip (dropped ones are left out); others are looked at like
  files of a folder: equal media have equal ids, whether they lie in a tar or in a folder.

  Args:
    path: a .tar, or a folder of them.
    quarantine: a quarantine.jsonl that each refused member is appended to.
    min_frames, min_side: smaller clips are refused.
    limits: what one clip may cost.

  Attributes:
    refused: verdicts of what was left out.

  Raises:
    DataError: no tars, or not one clip in them.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    quarantine: str | os.PathLike[str] | None = None,
    *,
    min_frames: int = 1,
    min_side: int = 1,
    limits: decode.Limits = decode.DEFAULT_LIMITS,
  ):
    tars = find_tars(path)
    if not tars:
      raise errors.DataError(f"{os.fspath(path)!r} is no tar and holds none")
    samples, refused = scan_all(tars)
    self._clips: list[tuple[Member, ClipInfo]] = []
    look = lambda sample: _look(sample, min_frames, min_side, limits)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      for sample, seen in progress.track(
        zip(samples, pool.map(look, samples), strict=True), "look at tars", len(samples)
      ):
        if isinstance(seen, ClipInfo):
          self._clips.append((sample.media, seen))
        elif seen is not None:
          refused.append(seen)
    log_all(refused, quarantine)
    self.refused = tuple(refused)
    if not self._clips:
      raise errors.DataError(folder.none_left(f"{os.fspath(path)!r}", refused))
    self._fingerprint = record.fingerprint(info.clip_id for _, info in self._clips)

  @property
  def fingerprint(self) -> str:
    return self._fingerprint

  def __len__(self) -> int:
    return len(self._clips)

  def info(self, index: int) -> ClipInfo:
    return self._clips[index][1]

  def media(self, index: int) -> bytes:
    """The encoded clip."""
    return self._clips[index][0].read()

  def frames(self, index: int, times_s: np.ndarray, height: int, width: int) -> np.ndarray:
    return decode.frames_at(self.media(index), times_s, height, width)


def scan_all(tars: Iterable[str]) -> tuple[list[Sample], list[quarantine.Verdict]]:
  """`scan` of several tars, one after the other."""
  samples, refused = [], []
  for tar in tars:
    found, bad = scan(tar)
    samples += found
    refused += bad
  return samples, refused


def log_all(refused: Iterable[quarantine.Verdict], log: str | os.PathLike[str] | None) -> None:
  """Appends verdicts to a quarantine.jsonl."""
  if log is not None:
    book = quarantine.Log(log)
    for verdict in refused:
      assert verdict.reason is not None
      book.add(verdict.source, verdict.reason, verdict.detail)


def _look(
  sample: Sample, min_frames: int, min_side: int, limits: decode.Limits
) -> ClipInfo | quarantine.Verdict | None:
  """The clip that a sample is; a verdict where it cannot be used, None where it was dropped."""
  header = sample.header()
  if header is not None:
    if header.status == "dropped":
      return None
    info = header.info()
  else:
    try:
      media = sample.media.read()
      seen = probe.probe(media, limits, decode=False)
    except reasons.MediaError as error:
      return _verdict(sample.media.source, error.reason, error.detail)
    except MemoryError:
      return _verdict(sample.media.source, "out_of_memory", "decoding did not fit into memory")
    identity = record.clip_id(record.content_hash(media), seen.start_pts, seen.end_pts, seen.time_base, "file")
    info = ClipInfo(
      clip_id=identity, caption=sample.caption().text, duration_s=seen.duration_s, fps=seen.fps,
      num_frames=seen.num_frames, width=seen.width, height=seen.height, video_id=sample.key,
    )  # fmt: skip
  if info.num_frames < min_frames:
    return _verdict(sample.media.source, "too_short", f"{info.num_frames} frames; at least {min_frames} are asked")
  if min(info.width, info.height) < min_side:
    detail = f"{info.width} x {info.height} pixels; at least {min_side} on the shorter side are asked"
    return _verdict(sample.media.source, "too_small", detail)
  return info
