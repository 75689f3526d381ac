"""A clip set in the formats of others: WebDataset tars, and tables with Koala-36M's released columns."""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv

from kling_jax import errors, files, progress
from kling_jax.data import clip_table, koala, record, records

FORMATS = ("webdataset", "koala")
INDEX = "index.json"
SHARD_BYTES, SHARD_CLIPS = 2**30, 10_000
_MATROSKA = b"\x1aE\xdf\xa3"
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE


@dataclasses.dataclass(frozen=True)
class Exported:
  """What an export wrote: clips, files with their bytes; `kept_before`: files of an earlier, ended run."""

  clips: int
  files: tuple[str, ...]
  bytes: int
  kept_before: int = 0

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def text(self) -> str:
    before = f" ({self.kept_before} were there)" if self.kept_before else ""
    return f"{self.clips} clips in {len(self.files)} files{before}, {self.bytes} bytes"


def export(
  folder: str | os.PathLike[str], output: str | os.PathLike[str], format: str, *, dropped: bool = False, **limits: int
) -> Exported:
  """Writes a clip set in another format: `webdataset` (a folder) or `koala` (a .csv file).

  Raises:
    UsageError: no such format. DataError: no set, no clip to write, or another export lies there.
  """
  if format == "webdataset":
    return webdataset(folder, output, dropped=dropped, **limits)
  if format == "koala":
    return koala_csv(folder, output, dropped=dropped)
  raise errors.UsageError(f"format {format!r}{errors.nearest(format, FORMATS)}")


# ---- WebDataset ------------------------------------------------------------------------------------------------------


def webdataset(
  folder: str | os.PathLike[str],
  output: str | os.PathLike[str],
  *,
  dropped: bool = False,
  shard_bytes: int = SHARD_BYTES,
  shard_clips: int = SHARD_CLIPS,
) -> Exported:
  """Writes `shard-000000.tar`, ... with `<clip_id>.mp4`, `.txt` (caption) and `.json` (header) for each clip.

  Equal sets give equal bytes: members have time 0, no owner, and the order of the set. Each tar appears whole; what is
  there stands in `index.json` (the form of `wids`, with a SHA-256 of each tar), so that an export that was killed goes
  on behind its last tar.

  Args:
    output: a new folder, or one that an export of this set was started in.
    dropped: also clips that selection dropped.
    shard_bytes: most bytes of a tar, unless one clip has more. shard_clips: most clips of a tar.
  """
  if shard_bytes < 1 or shard_clips < 1:
    raise errors.UsageError("a shard has at least 1 byte and 1 clip")
  source = records.RecordSource(folder, status=None if dropped else "kept")
  output = pathlib.Path(output)
  if output.resolve() == clip_table.set_folder(folder).resolve():
    raise errors.UsageError(f"--output {output} is the set itself; name another folder")
  state = _State(output, folder, {"dropped": dropped, "shard_bytes": shard_bytes, "shard_clips": shard_clips})
  before = len(state.shards)
  place = sum(shard["nsamples"] for shard in state.shards)
  with progress.bar("export", len(source)) as line:
    line.advance(place)
    while place < len(source):
      name = f"shard-{len(state.shards):06d}.tar"
      with files.whole(output / name) as temporary, temporary.open("wb") as file:
        hashed = _Hashed(file)
        count = _write_tar(hashed, source, place, shard_bytes, shard_clips, line)
      state.add({"url": name, "nsamples": count, "filesize": hashed.size, "sha256": hashed.digest.hexdigest()})
      place += count
  state.finish()
  return Exported(len(source), tuple(s["url"] for s in state.shards), sum(s["filesize"] for s in state.shards), before)


def _write_tar(
  file: "_Hashed", source: records.RecordSource, start: int, most_bytes: int, most_clips: int, line: progress.Bar
) -> int:
  """Writes clips from `start` on into one tar; returns how many fit."""
  with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
    for index in range(start, min(len(source), start + most_clips)):
      members = list(_sample(source, index))
      size = sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for _, data in members)
      total = -(-(file.size + size + 2 * _BLOCK) // _RECORD) * _RECORD
      if index > start and total > most_bytes:
        return index - start
      for name, data in members:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        tar.addfile(info, io.BytesIO(data))
      line.advance()
  return min(len(source), start + most_clips) - start


def _sample(source: records.RecordSource, index: int) -> Iterator[tuple[str, bytes]]:
  clip, media = source.record(index), source.media(index)
  # Ids of our own sets are hexadecimal; one of a stranger may be anything, and a name in a tar must not.
  safe = re.fullmatch(r"[A-Za-z0-9_-]{1,64}", clip.clip_id)
  key = clip.clip_id if safe else record.content_hash(clip.clip_id.encode())
  suffix = "mkv" if media.startswith(_MATROSKA) else "mp4"
  yield f"{key}.{suffix}", media
  yield f"{key}.txt", clip.caption.encode("utf-8")
  yield f"{key}.json", record.header_json(clip)


class _Hashed:
  """A file that is only written, with the SHA-256 and number of its bytes."""

  def __init__(self, file: IO[bytes]):
    self._file, self.size, self.digest = file, 0, hashlib.sha256()

  def write(self, data: bytes) -> int:
    self.digest.update(data)
    self.size += len(data)
    return self._file.write(data)

  def tell(self) -> int:
    return self.size


class _State:
  """index.json of an export: which tars are whole, and what they were made of."""

  def __init__(self, output: pathlib.Path, folder: str | os.PathLike[str], options: dict[str, Any]):
    self._path = output / INDEX
    table = clip_table.set_folder(folder) / clip_table.TABLE
    self._made_of = {"table": record.content_hash(table), **options}
    self.shards: list[dict[str, Any]] = []
    if not self._path.exists():
      if any(output.glob("*.tar")):
        raise errors.DataError(f"{output} holds tars that no export of ours wrote; name another folder")
      return
    try:
      held = json.loads(self._path.read_text(encoding="utf-8"))
      made_of, shards = held["kling"], held["shardlist"]
      wrong = [name for name in self._made_of if made_of.get(name) != self._made_of[name]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      raise errors.DataError(f"{self._path}: no index of an export ({error}); name another folder") from error
    if wrong:
      raise errors.DataError(f"{output} holds an export of another {' and '.join(wrong)}; name another folder")
    for shard in shards:
      path = output / shard["url"]
      if not path.is_file() or path.stat().st_size != shard["filesize"]:
        raise errors.DataError(f"{path}: missing or of another size than {self._path} says; remove the folder")
    self.shards = shards

  def add(self, shard: dict[str, Any]) -> None:
    self.shards.append(shard)
    self._write(complete=False)

  def finish(self) -> None:
    self._write(complete=True)

  def _write(self, complete: bool) -> None:
    made_of = self._made_of | {"complete": complete}
    files.write_json(self._path, {"wids_version": 1, "shardlist": self.shards, "kling": made_of})


# ---- Koala-36M -------------------------------------------------------------------------------------------------------


def koala_csv(
  folder: str | os.PathLike[str], output: str | os.PathLike[str], *, dropped: bool = False, rows: int = 10_000
) -> Exported:
  """Writes the eight released columns of a set's clips as CSV, `rows` at a time."""
  output = pathlib.Path(output)
  if output.suffix.lower() != ".csv":
    raise errors.UsageError(f"--output {output}: the format koala is one .csv file")
  table = clip_table.Index.load(folder).table
  if not dropped:
    table = table.filter(pa.compute.equal(table["status"], "kept"))
  if not len(table):
    raise errors.DataError(f"{folder}: no clip to write")
  table = table.select(koala.COLUMNS)
  options = pa.csv.WriteOptions(quoting_style="needed")
  with files.whole(output) as temporary, pa.csv.CSVWriter(temporary, table.schema, write_options=options) as writer:
    for batch in table.to_batches(max_chunksize=rows):
      writer.write_batch(batch)
  return Exported(len(table), (str(output),), output.stat().st_size)
