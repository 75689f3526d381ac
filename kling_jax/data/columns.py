"""Reads a table file (CSV, JSON lines, Parquet) into Arrow."""

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from kling_jax import errors

SUFFIXES = (".csv", ".jsonl", ".parquet")
_CSV = pa.csv.ParseOptions(newlines_in_values=True)
_READ = pa.csv.ReadOptions(block_size=4 * 2**20, use_threads=False)  # its threads read far ahead of us


def read_table(path: str | os.PathLike[str], strings: Iterable[str] = ("file", "caption")) -> pa.Table:
  """Reads a .csv, .jsonl or .parquet file; the columns `strings` are text in a CSV whatever they look like.

  Raises:
    DataError: the file is no such table.
  """
  path = pathlib.Path(path)
  try:
    if path.suffix.lower() == ".csv":
      return pa.csv.read_csv(
        path,
        parse_options=_CSV,
        convert_options=pa.csv.ConvertOptions(
          column_types={name: pa.string() for name in strings}, strings_can_be_null=False
        ),
      )
    if path.suffix.lower() == ".jsonl":
      return pa.json.read_json(path)
    return pa.parquet.read_table(path)
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    raise _no_table(path, error) from error


def row_batches(
  path: str | os.PathLike[str], strings: Iterable[str] = ("file", "caption"), most: int = 8192
) -> Iterator[list[dict[str, Any]]]:
  """Yields a table's rows, at most `most` at a time, with the types that `read_table` gives them.

  Parquet is read a part at a time; of the others, whose types show at their end, Arrow holds the whole, which is a
  small part of what rows of Python need.

  Raises:
    DataError: the file is no such table.
  """
  path = pathlib.Path(path)
  if path.suffix.lower() != ".parquet":
    for batch in read_table(path, strings).to_batches(max_chunksize=most):
      yield batch.to_pylist()
    return
  try:
    with pa.parquet.ParquetFile(path) as file:
      for batch in file.iter_batches(batch_size=most):
        yield batch.to_pylist()
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    raise _no_table(path, error) from error


def column_names(path: str | os.PathLike[str]) -> list[str]:
  """The names of a table's columns, from its head alone where the format allows.

  Raises:
    DataError: the file is no such table.
  """
  path = pathlib.Path(path)
  try:
    if path.suffix.lower() == ".csv":
      with pa.csv.open_csv(path, parse_options=_CSV) as reader:
        return reader.schema.names
    if path.suffix.lower() == ".parquet":
      return pa.parquet.read_schema(path).names
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    raise _no_table(path, error) from error
  return read_table(path).column_names


def rows(path: str | os.PathLike[str], types: Mapping[str, pa.DataType]) -> Iterator[dict[str, Any]]:
  """Yields a table's rows without holding it, as {column: value}: those of `types` that it has, in these types.

  CSV and Parquet are read some MiB at a time; JSON lines are read whole. Empty cells of text are "", of numbers None.

  Raises:
    DataError: the file is no such table, or a cell is not of its column's type.
  """
  path = pathlib.Path(path)
  known = [name for name in column_names(path) if name in types]
  wanted = {name: types[name] for name in known}
  schema = pa.schema(list(wanted.items()))
  try:
    if path.suffix.lower() == ".csv":
      convert = pa.csv.ConvertOptions(column_types=wanted, include_columns=known, strings_can_be_null=False)
      with pa.csv.open_csv(path, _READ, parse_options=_CSV, convert_options=convert) as reader:
        for batch in reader:
          yield from batch.to_pylist()
    elif path.suffix.lower() == ".parquet":
      with pa.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=8192, columns=known):
          yield from batch.cast(schema).to_pylist()
    else:
      yield from read_table(path).select(known).cast(schema).to_pylist()
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    raise _no_table(path, error) from error


def _no_table(path: pathlib.Path, error: Exception) -> errors.DataError:
  return errors.DataError(f"{path}: no table that can be read ({str(error).splitlines()[0][:200]})")
