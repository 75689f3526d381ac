"""Reads a table file (CSV, JSON lines, Parquet) into Arrow."""

import os
import pathlib
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from kling_jax import errors

SUFFIXES = (".csv", ".jsonl", ".parquet")


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
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
          column_types={name: pa.string() for name in strings}, strings_can_be_null=False
        ),
      )
    if path.suffix.lower() == ".jsonl":
      return pa.json.read_json(path)
    return pa.parquet.read_table(path)
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
    raise errors.DataError(f"{path}: no table that can be read ({str(error).splitlines()[0]})") from error
