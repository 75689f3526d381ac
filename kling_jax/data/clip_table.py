"""The table of a clip set (`clips.parquet`): rows, schema, the list of shards, and the shards' raw records.

Layout of a set: `clips.parquet` (one row a clip, without media; its metadata lists the shards) and
`records/clips-00000.array_record`, ... The table is the commit point: a shard that it does not list is no part of the
set, so a killed writer leaves the set as it was.
"""

import dataclasses
import json
import os
import pathlib
import re
import typing
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module

from kling_jax import errors, files
from kling_jax.data import card, koala, record
from kling_jax.data.record import ClipRecord

TABLE = "clips.parquet"
RECORDS = "records"
MARKS = ("status", "status_reason")  # of selection: the table leads, records keep what they were written with

_METADATA = b"kling_clips"

_SCORE = pa.struct([("value", pa.float64()), ("scorer", pa.string()), ("version", pa.string())])
_TRANSITION = pa.struct(
  [("start_frame", pa.int64()), ("end_frame", pa.int64()), ("kind", pa.string()), ("confidence", pa.float64())]
)
_TYPES = {
  str: pa.string(),
  int: pa.int64(),
  float: pa.float64(),
  bool: pa.bool_(),
  float | None: pa.float64(),
  tuple[int, ...]: pa.list_(pa.int64()),
}


def _schema() -> pa.Schema:
  columns = [(name, pa.string() if k < 4 else pa.float64()) for k, name in enumerate(koala.COLUMNS)]
  hints = typing.get_type_hints(ClipRecord)
  for field in dataclasses.fields(ClipRecord):
    if field.name == "scores":
      columns.append((field.name, pa.map_(pa.string(), _SCORE)))
    elif field.name == "transitions":
      columns.append((field.name, pa.list_(_TRANSITION)))
    elif field.name != "caption":  # Already among Koala's columns.
      columns.append((field.name, _TYPES[hints[field.name]]))
  return pa.schema([*columns, ("shard", pa.string()), ("position", pa.int64())])


SCHEMA = _schema()
# What the header fields that came after the first release of the format are where they are missing.
_YOUNGER = ("caption_part_tokens", "caption_tokenizer", "captioner", "caption_model", "caption_prompt")
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(ClipRecord) if field.name in _YOUNGER}


def to_row(clip: ClipRecord, shard: str, position: int) -> dict[str, typing.Any]:
  """A table row: Koala's eight columns, then every header field, then where the record lies."""
  row = dataclasses.asdict(clip)
  row["scores"] = list(row["scores"].items())
  row["transitions"] = list(row["transitions"])
  row["caption_part_tokens"] = list(row["caption_part_tokens"])
  row |= {
    "videoID": f"{clip.video_id}_{clip.index}",
    "url": clip.source,
    "timestamp": koala.format_span(clip.start_s - clip.source_start_s, clip.end_s - clip.source_start_s),
    koala.VTSS: clip.vtss,
    "shard": shard,
    "position": position,
  }
  for column, name in koala.SCORES.items():
    row[column] = clip.scores[name].value if name in clip.scores else None
  return row


def from_row(row: dict[str, typing.Any]) -> ClipRecord:
  """The header that `to_row` was given."""
  names = [field.name for field in dataclasses.fields(ClipRecord)]
  values = {name: row[name] for name in names}
  values["scores"] = dict(values["scores"])
  return record.from_dict(values)


@dataclasses.dataclass(frozen=True)
class Shard:
  """One ArrayRecord file of a set."""

  file: str
  records: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class Index:
  """The table of a set, with what its metadata says."""

  folder: pathlib.Path
  table: pa.Table
  recipe: str
  shards: tuple[Shard, ...]

  @classmethod
  def load(cls, folder: str | os.PathLike[str]) -> "Index":
    """Reads clips.parquet of a set (or of the set whose `records` folder is given).

    Raises:
      DataError: there is none, or it is not one of ours.
    """
    folder = set_folder(folder)
    path = folder / TABLE
    try:
      table = pq.read_table(path)
      values = json.loads((table.schema.metadata or {})[_METADATA])
      shards = tuple(Shard(**shard) for shard in values["shards"])
      recipe = str(values["recipe"])
    except (KeyError, TypeError, ValueError, OSError) as error:  # pyarrow's errors are ValueErrors and OSErrors
      mend = "is it a set of this project? `records.reindex(folder, recipe)` rebuilds the table from the records"
      raise errors.DataError(f"{path}: no table of a clip set ({type(error).__name__}: {error}); {mend}") from error
    odd = set(table.schema.names) - set(SCHEMA.names) | set(SCHEMA.names) - set(table.schema.names) - set(_DEFAULTS)
    if odd or len(set(table.schema.names)) != len(table.schema.names):
      raise errors.DataError(f"{path}: its columns differ from this release's in {', '.join(sorted(odd)) or 'number'}")
    for name in SCHEMA.names:  # a field that is younger than the set
      if name not in table.schema.names:
        table = table.append_column(name, pa.array([_DEFAULTS[name]] * len(table), SCHEMA.field(name).type))
    table = table.select(SCHEMA.names).replace_schema_metadata(None).cast(SCHEMA)
    return cls(folder, table, recipe, shards)

  def clip(self, row: int) -> ClipRecord:
    return from_row(self.table.slice(row, 1).to_pylist()[0])


def set_folder(folder: str | os.PathLike[str]) -> pathlib.Path:
  """The folder with clips.parquet, for a set or for its `records` folder."""
  folder = pathlib.Path(folder)
  if not (folder / TABLE).exists() and folder.name == RECORDS and (folder.parent / TABLE).exists():
    return folder.parent
  if not (folder / TABLE).exists():
    raise errors.DataError(
      f"{folder}: no {TABLE}: not a clip set, or its writer never came to its end; "
      "write it again, or rebuild the table with `records.reindex(folder, recipe)`"
    )
  return folder


def write_table(folder: pathlib.Path, table: pa.Table, recipe: str, shards: Sequence[Shard]) -> None:
  """Commits a set: from here on it holds the clips of `table`, in `shards`; writes its card."""
  values = {"recipe": recipe, "shards": [dataclasses.asdict(shard) for shard in shards]}
  table = table.cast(SCHEMA).replace_schema_metadata({_METADATA: json.dumps(values).encode()})
  with files.whole(folder / TABLE) as temporary:
    pq.write_table(table, temporary)
  card.write(folder, table, recipe, [(shard.records, shard.bytes) for shard in shards])


def shard_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Finished shards in the folder, listed in the table or not, by number."""
  found = [path for path in (folder / RECORDS).glob("*.array_record") if not path.name.startswith(".")]
  return sorted(found, key=lambda path: (shard_number(path), path.name))


def shard_number(path: pathlib.Path) -> int:
  """The number in a shard's name; -1 for a foreign name."""
  match = re.fullmatch(r"clips-(\d+)\.array_record", path.name)
  return int(match[1]) if match else -1


def open_reader(path: pathlib.Path) -> typing.Any:
  """An ArrayRecord reader for random access.

  Raises:
    DataError: the file is missing or damaged.
  """
  if not path.is_file():
    raise errors.DataError(f"{path}: the shard is missing; copy the set again, or `records.reindex` what is left")
  try:
    reader = array_record_module.ArrayRecordReader(str(path), options="readahead_buffer_size:0")
    sound = reader.ok() and reader.num_records() > 0
  except RuntimeError as error:
    raise errors.DataError(f"{path}: no ArrayRecord file ({error})") from error
  if not sound:
    raise errors.DataError(f"{path}: a damaged or cut ArrayRecord file; copy it again")
  return reader


def read_record(reader: typing.Any, path: str | pathlib.Path, position: int) -> bytes:
  """The bytes of one record.

  Raises:
    DataError: there is no such record, or its checksum is wrong.
  """
  try:
    return reader.read([position])[0]
  except (RuntimeError, IndexError) as error:
    raise errors.DataError(f"{path} record {position} cannot be read: {error}") from error


def read_all(folder: str | os.PathLike[str]) -> Iterator[tuple[ClipRecord, bytes]]:
  """Yields (header, media) of every clip of a set, whatever its status, in the order of its table.

  Status and its reason are the table's: selection changes them there and leaves the records as they are.
  """
  index = Index.load(folder)
  readers = {shard.file: open_reader(index.folder / RECORDS / shard.file) for shard in index.shards}
  columns = (index.table[name].to_pylist() for name in ("shard", "position", *MARKS))
  for shard, position, status, reason in zip(*columns, strict=True):
    clip, media = record.unpack(read_record(readers[shard], index.folder / RECORDS / shard, position))
    yield dataclasses.replace(clip, status=status, status_reason=reason), media


def reindex(folder: str | os.PathLike[str], recipe: str) -> None:
  """Rebuilds clips.parquet from the whole shards in `records/`, for a set that lost its table.

  What was selected since the records were written is lost; select again (the rules lie in select.json).
  """
  folder = pathlib.Path(folder)
  rows, shards = [], []
  for path in shard_files(folder):
    reader = open_reader(path)
    shards.append(Shard(path.name, reader.num_records(), path.stat().st_size))
    for position in range(reader.num_records()):
      clip = record.unpack_header(read_record(reader, path, position))
      rows.append(to_row(clip, path.name, position))
  if not rows:
    raise errors.DataError(f"{folder}: no records in {folder / RECORDS}")
  write_table(folder, pa.Table.from_pylist(rows, SCHEMA), recipe, shards)
