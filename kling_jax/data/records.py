"""Sharded sets of clip records on disk: a writer that commits whole sets, and a random-access source."""

import contextlib
import fcntl
import os
import pathlib
import threading
import typing
from collections.abc import Callable

import numpy as np
import pyarrow as pa
from array_record.python import array_record_module

from kling_jax import errors
from kling_jax.data import decode, reasons, record
from kling_jax.data.clip_table import (
  MARKS,
  RECORDS,
  TABLE,
  Index,
  Shard,
  open_reader,
  read_all,
  read_record,
  reindex,
  set_folder,
  shard_files,
  shard_number,
  to_row,
  write_table,
)
from kling_jax.data.clip_table import SCHEMA as _SCHEMA
from kling_jax.data.record import ClipRecord
from kling_jax.data.source import ClipInfo
from kling_jax.data.verify import Report, verify

__all__ = ["RecordSource", "RecordWriter", "Report", "mark", "read_all", "reindex", "rewrite", "verify"]

SHARD_BYTES = 256 * 2**20

_WRITER_OPTIONS = "group_size:1,uncompressed"


class RecordWriter:
  """Appends clips to a set; nothing shows before `commit` (called by a with block that ends without an error).

  Args:
    folder: the set; made where it is missing.
    recipe: what decides the clips' frames beside their spans; a set has one.
    shard_bytes: a shard is closed when it reaches this size.

  Raises:
    DataError: the set was written with another recipe, or another writer is at work on it.
  """

  def __init__(self, folder: str | os.PathLike[str], recipe: str, *, shard_bytes: int = SHARD_BYTES):
    self._folder = pathlib.Path(folder)
    self._recipe, self._shard_bytes = recipe, shard_bytes
    self._lock = _locked(self._folder)
    self._table: pa.Table | None = None
    self._shards: list[Shard] = []
    if (self._folder / TABLE).exists():
      index = Index.load(self._folder)
      if index.recipe != recipe:
        self._lock.close()
        raise errors.DataError(
          f"{folder} was written with the recipe {index.recipe!r}, not {recipe!r}: write to another folder"
        )
      self._table, self._shards = index.table, list(index.shards)
    self._ids = set(self._table["clip_id"].to_pylist()) if self._table is not None else set()
    self._next = 1 + max((shard_number(path) for path in shard_files(self._folder)), default=-1)
    self._rows: list[dict[str, typing.Any]] = []
    self._shard: _OpenShard | None = None

  def write(self, clip: ClipRecord, media: bytes) -> None:
    """Adds one clip; its id must be new to the set."""
    if clip.clip_id in self._ids:
      raise errors.DataError(f"{self._folder}: clip {clip.clip_id} is already in the set")
    data = record.pack(clip, media)
    if self._shard is None:
      self._shard = _OpenShard(self._folder / RECORDS / f"clips-{self._next:05d}.array_record")
      self._next += 1
    self._rows.append(to_row(clip, self._shard.target.name, self._shard.count))
    self._ids.add(clip.clip_id)
    self._shard.write(data)
    if self._shard.size >= self._shard_bytes:
      self._finish_shard()

  def __contains__(self, clip_id: str) -> bool:
    return clip_id in self._ids

  def commit(self) -> None:
    """Makes everything written so far part of the set, at once."""
    self._finish_shard()
    table = pa.Table.from_pylist(self._rows, _SCHEMA)
    if self._table is not None:
      table = pa.concat_tables([self._table, table])
    write_table(self._folder, table, self._recipe, self._shards)
    self._table, self._rows = table, []

  def close(self) -> None:
    """Gives up what was not committed."""
    if self._shard is not None:
      self._shard.discard()
      self._shard = None
    if not self._lock.closed:
      self._remove_unlisted()
      self._lock.close()

  def _remove_unlisted(self) -> None:
    """Removes what killed writers and replaced sets left behind; the lock is held."""
    listed = {shard.file for shard in Index.load(self._folder).shards} if (self._folder / TABLE).exists() else set()
    for path in (self._folder / RECORDS).iterdir():
      if path.name not in listed and (shard_number(path) >= 0 or path.name.startswith(".clips-")):
        path.unlink()

  def __enter__(self) -> "RecordWriter":
    return self

  def __exit__(self, kind: object, *_: object) -> None:
    try:
      if kind is None:
        self.commit()
    finally:
      self.close()

  def _finish_shard(self) -> None:
    if self._shard is not None:
      self._shards.append(self._shard.finish())
      self._shard = None

  def _forget_committed(self) -> None:
    """The next commit replaces the set instead of adding to it."""
    self._table, self._shards, self._ids = None, [], set()


class _OpenShard:
  """A shard under a temporary name; takes its own name when it is whole."""

  def __init__(self, target: pathlib.Path):
    self.target, self.count, self.size = target, 0, 0
    self._temporary = target.with_name(f".{target.name}")
    self._writer = array_record_module.ArrayRecordWriter(str(self._temporary), _WRITER_OPTIONS)

  def write(self, data: bytes) -> None:
    self._writer.write(data)
    self.count += 1
    self.size += len(data)

  def finish(self) -> Shard:
    self._writer.close()
    with self._temporary.open("rb") as file:
      os.fsync(file.fileno())
    self._temporary.replace(self.target)
    return Shard(self.target.name, self.count, self.target.stat().st_size)

  def discard(self) -> None:
    self._writer.close()
    self._temporary.unlink(missing_ok=True)


class RecordSource:
  """The clips of a set, in the order of its table; implements ClipSource.

  Args:
    folder: the set, or its `records` folder.
    status: only clips of this status; None: all of them.

  Raises:
    DataError: no set, or no clip of that status.
  """

  def __init__(self, folder: str | os.PathLike[str], status: str | None = "kept"):
    self._folder, self._status = set_folder(folder), status
    self._loaded: tuple[Index, np.ndarray] | None = None
    self._readers: dict[str, typing.Any] = {}
    self._lock = threading.Lock()
    index, rows = self._load()
    if len(rows) == 0:
      counts = {s: index.table["status"].to_pylist().count(s) for s in record.STATUSES}
      raise errors.DataError(f"{self._folder}: no clip with status {status!r}; the set holds {counts}")
    ids = index.table["clip_id"].take(rows).to_pylist()
    self._fingerprint, self._length = record.fingerprint(ids), len(rows)

  @property
  def fingerprint(self) -> str:
    return self._fingerprint

  def __len__(self) -> int:
    return self._length

  def __getstate__(self) -> dict[str, typing.Any]:
    return self.__dict__ | {"_loaded": None, "_readers": {}, "_lock": None}

  def __setstate__(self, state: dict[str, typing.Any]) -> None:
    self.__dict__ |= state
    self._lock = threading.Lock()

  def record(self, index: int) -> ClipRecord:
    """The header of clip `index`, from the table."""
    table, rows = self._load()
    return table.clip(int(rows[self._checked(index)]))

  def info(self, index: int) -> ClipInfo:
    return self.record(index).info()

  def media(self, index: int) -> bytes:
    """The encoded clip."""
    table, rows = self._load()
    row = table.table.slice(int(rows[self._checked(index)]), 1).to_pylist()[0]
    clip, media = record.unpack(self._read(row["shard"], row["position"]))
    if clip.clip_id != row["clip_id"]:
      raise errors.DataError(
        f"{self._folder}: {row['shard']} record {row['position']} is clip {clip.clip_id}, the table says "
        f"{row['clip_id']}; `kling data verify` shows the extent"
      )
    return media

  def frames(self, index: int, times_s: np.ndarray, height: int, width: int) -> np.ndarray:
    try:
      return decode.frames_at(self.media(index), times_s, height, width)
    except reasons.MediaError as error:
      raise errors.DataError(f"{self._folder}: clip {self.record(index).clip_id} does not decode: {error}") from error

  def _checked(self, index: int) -> int:
    if not 0 <= index < self._length:
      raise IndexError(f"{self._folder} holds {self._length} clips; there is no clip {index}")
    return index

  def _load(self) -> tuple[Index, np.ndarray]:
    with self._lock:
      if self._loaded is None:
        index = Index.load(self._folder)
        statuses = index.table["status"].to_pylist()
        rows = np.array([k for k, s in enumerate(statuses) if self._status in (None, s)], np.int64)
        known = getattr(self, "_fingerprint", None)  # An unpickled copy must see the set that its parent saw.
        if known is not None and known != record.fingerprint(index.table["clip_id"].take(rows).to_pylist()):
          raise errors.DataError(f"{self._folder} was rewritten while it was in use; open it again")
        self._loaded = index, rows
      return self._loaded

  def _read(self, shard: str, position: int) -> bytes:
    path = self._folder / RECORDS / shard
    with self._lock:
      if shard not in self._readers:
        self._readers[shard] = open_reader(path)
      reader = self._readers[shard]
    return read_record(reader, path, position)


def _locked(folder: pathlib.Path) -> typing.IO[str]:
  """The set's lock; closing it, or the end of the process, frees it.

  Raises:
    DataError: another writer holds it.
  """
  (folder / RECORDS).mkdir(parents=True, exist_ok=True)
  lock = (folder / RECORDS / ".lock").open("w")
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    lock.close()
    raise errors.DataError(f"{folder}: another writer is at work on this set; wait until it is done") from error
  return lock


def mark(folder: str | os.PathLike[str], statuses: pa.Array, reasons: pa.Array, clip_ids: pa.ChunkedArray) -> None:
  """Gives every clip a status and a reason; only the table changes, at once or not at all.

  Args:
    statuses, reasons: texts in the order of the table. clip_ids: the clips that they were worked out for.

  Raises:
    DataError: the set is damaged, another writer is at work on it, or its clips are no longer those.
  """
  with contextlib.closing(_locked(set_folder(folder))):
    index = Index.load(folder)
    if not index.table["clip_id"].equals(clip_ids):
      raise errors.DataError(f"{folder}: clips came or went in the meantime; select again")
    table = index.table
    for name, values in zip(MARKS, (statuses, reasons), strict=True):
      table = table.set_column(table.schema.get_field_index(name), name, values)
    write_table(index.folder, table, index.recipe, index.shards)


def rewrite(folder: str | os.PathLike[str], update: Callable[[ClipRecord], ClipRecord]) -> None:
  """Replaces every header by `update(header)`; media stay as they are. The set changes at once or not at all.

  Raises:
    DataError: the set is damaged, or `update` changed a clip_id.
  """
  index = Index.load(folder)
  with RecordWriter(index.folder, index.recipe) as writer:
    writer._forget_committed()
    for clip, media in read_all(index.folder):
      changed = update(clip)
      if changed.clip_id != clip.clip_id:
        raise errors.DataError(f"clip {clip.clip_id}: an update may not change the id (to {changed.clip_id})")
      writer.write(changed, media)
