"""From the ledger to a table: one row for each horizon T that a run was read at, as `kling sweep fit` takes them."""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from typing import Any

from kling_jax import files

COLUMNS = (
  "run", "split", "arm", "params", "tokens", "loss", "table_stderr", "lr", "batch_tokens", "steps", "flops",
  "flop_rule", "width", "depth", "context", "ema_decay", "seed", "table_id", "wall_s",
)  # fmt: skip


def points(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The points of finished runs.

  `table_stderr` is the standard error of the validation table, which all runs share: an error of the level of all
  losses, not of their differences, and so no weight for a fit (which would read a column `stderr` as one).

  Args:
    records: `Ledger.finished()`.

  Returns:
    Dicts with the keys `COLUMNS`, in the order of runs, then horizons.
  """
  found = []
  for record in records:
    shared = {name: record[name] for name in COLUMNS if name in record}
    for point in record["points"]:
      own = {name: point[name] for name in ("tokens", "loss", "flops")} | {"steps": point["step"]}
      own |= {"table_stderr": point["stderr"], "arm": "+".join(record["arms"])}
      row = shared | own
      found.append({name: row[name] for name in COLUMNS})
  return found


def write_csv(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
  """Writes points as CSV, whole or not at all."""
  text = io.StringIO()
  writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  files.write_text(path, text.getvalue())
