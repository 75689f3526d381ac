"""Columns of a table of clips as arrays with a mask of what is known: scores, vtss, lengths, captions, sources."""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kling_jax.data import koala
from kling_jax.errors import DataError, nearest

DERIVED = ("duration_s",)
_ALIASES = {name: column for column, name in koala.SCORES.items()} | {"vtss": koala.VTSS}


@dataclasses.dataclass(frozen=True)
class Column:
  """One value a clip.

  Attributes:
    kind: number (float64), truth (bool) or text (int32 codes into `words`).
    values: (N,); meaningless where not known.
    known: (N,) bool.
    words: of text: its distinct values.
  """

  kind: str
  values: np.ndarray
  known: np.ndarray
  words: tuple[str, ...] = ()


class ClipColumns:
  """The columns of a set's table, or of any table of clips; each is read out when it is first asked for.

  A name means, in this order: a score of the column `scores`, a column of the table, a column of Koala-36M's release
  (`motion` is `motion_score`, `vtss` is `video_training_suitability_score`), `duration_s` (from start_s and end_s, or
  from timestamp).
  """

  def __init__(self, table: pa.Table, where: str = "the table"):
    self.table, self.where = table, where
    self._read: dict[str, Column] = {}
    self._scores: dict[str, Column] | None = None
    self._scorers: dict[str, tuple[str, ...]] = {}

  def __len__(self) -> int:
    return len(self.table)

  @functools.cached_property
  def names(self) -> tuple[str, ...]:
    """Every name that can be asked for."""
    plain = [name for name in self.table.column_names if _readable(self.table.schema.field(name).type)]
    return tuple(sorted({*self.scores, *plain, *self._aliases(), *self._derived()}))

  @property
  def scores(self) -> dict[str, Column]:
    """The entries of the column `scores`; {} where there is none."""
    if self._scores is None:
      self._scores, self._scorers = _unpacked(self.table) if "scores" in self.table.column_names else ({}, {})
    return self._scores

  def scorers(self, name: str) -> tuple[str, ...]:
    """Who made the values of a score: "scorer version", all that occur; () for other columns."""
    return self._scorers.get(name, ()) if name in self.scores else ()

  def has(self, name: str) -> bool:
    """Whether any clip has a value under this name."""
    return name in self.names and bool(self[name].known.any())

  def __getitem__(self, name: str) -> Column:
    """Reads a column.

    Raises:
      DataError: there is none of that name.
    """
    if name not in self._read:
      self._read[name] = self._column(name)
    return self._read[name]

  def ids(self) -> list[str]:
    """Names of the clips: clip_id, or videoID of a released table, or the row's number."""
    for name in ("clip_id", "videoID"):
      if name in self.table.column_names:
        return [str(value) for value in self.table[name].to_pylist()]
    return [str(row) for row in range(len(self.table))]

  def _aliases(self) -> Iterable[str]:
    return (name for name, column in _ALIASES.items() if column in self.table.column_names)

  def _derived(self) -> Iterable[str]:
    has = set(self.table.column_names)
    return DERIVED if {"start_s", "end_s"} <= has or "timestamp" in has else ()

  def _column(self, name: str) -> Column:
    if name in self.scores:
      return self.scores[name]
    columns = self.table.column_names
    if name in columns and _readable(self.table.schema.field(name).type):
      return _read(self.table[name])
    if name in self._aliases():
      return _read(self.table[_ALIASES[name]])
    if name in self._derived():
      return self._duration()
    raise DataError(f"{self.where} has no column {name!r}{nearest(name, self.names)}")

  def _duration(self) -> Column:
    if "start_s" in self.table.column_names and "end_s" in self.table.column_names:
      start, end = self["start_s"], self["end_s"]
      return Column("number", end.values - start.values, start.known & end.known)
    lengths = np.full(len(self), np.nan)
    for row, text in enumerate(self.table["timestamp"].to_pylist()):
      if text:
        start_s, end_s = koala.parse_span(text)
        lengths[row] = end_s - start_s
    return Column("number", lengths, ~np.isnan(lengths))


def _readable(kind: pa.DataType) -> bool:
  return any(test(kind) for test in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, _is_text))


def _is_text(kind: pa.DataType) -> bool:
  return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)


def _read(column: pa.ChunkedArray) -> Column:
  known = np.asarray(column.is_valid().combine_chunks(), bool)
  if _is_text(column.type):
    coded = column.combine_chunks()
    coded = coded if pa.types.is_dictionary(coded.type) else coded.dictionary_encode()
    if isinstance(coded, pa.ChunkedArray):
      coded = coded.combine_chunks()
    codes = np.asarray(coded.indices.fill_null(0).cast(pa.int32()))
    return Column("text", codes, known, tuple(coded.dictionary.to_pylist()))
  if pa.types.is_boolean(column.type):
    return Column("truth", np.asarray(column.fill_null(False).combine_chunks(), bool), known)
  values = np.asarray(column.cast(pa.float64()).fill_null(np.nan).combine_chunks(), np.float64)
  return Column("number", values, known & np.isfinite(values))


def _unpacked(table: pa.Table) -> tuple[dict[str, Column], dict[str, tuple[str, ...]]]:
  """The map column `scores` as one column a name, and who made each."""
  column = table["scores"].combine_chunks()
  chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
  values: dict[str, np.ndarray] = {}
  makers: dict[str, set[str]] = {}
  first = 0
  for chunk in chunks:
    offsets = np.asarray(chunk.offsets)
    entries = slice(int(offsets[0]), int(offsets[-1]))
    rows = first + np.repeat(np.arange(len(chunk)), np.diff(offsets))
    keys = chunk.keys[entries].dictionary_encode()
    items = chunk.items[entries]
    numbers = np.asarray(items.field("value"), np.float64)
    maker = pc.binary_join_element_wise(items.field("scorer"), items.field("version"), " ").dictionary_encode()
    codes, maker_codes = np.asarray(keys.indices), np.asarray(maker.indices)
    for code, name in enumerate(keys.dictionary.to_pylist()):
      mine = codes == code
      values.setdefault(name, np.full(len(table), np.nan))[rows[mine]] = numbers[mine]
      who = maker.dictionary.to_pylist()
      makers.setdefault(name, set()).update(who[k] for k in np.unique(maker_codes[mine]))
    first += len(chunk)
  columns = {name: Column("number", array, np.isfinite(array)) for name, array in values.items()}
  return columns, {name: tuple(sorted(who)) for name, who in makers.items()}
