"""Tables of training runs: reading, naming columns, checking units; what every fit starts from."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kling_jax.data.columns import read_table
from kling_jax.errors import DataError, nearest

# Names that published tables use, in lower case with "_" for blanks. Where several are present, the first one is read.
ALIASES = {
  "params": ("params", "n", "n_params", "num_params", "parameters", "model_size", "params_active_precise",
             "non_embedding_param_size", "non_embedding_params"),
  "tokens": ("tokens", "t", "d", "n_tokens", "num_tokens", "training_tokens", "train_tokens", "data_size"),
  "loss": ("loss", "val_loss", "final_loss", "validation_loss", "lm_loss"),
  "lr": ("lr", "learning_rate"),
  "batch_tokens": ("batch_tokens", "tokens_per_batch"),
  "flops": ("flops", "c", "flop", "training_flops", "training_flop", "compute", "budget"),
  "weight": ("weight", "weights"),
  "stderr": ("loss_stderr", "val_stderr", "stderr", "loss_std"),
  "run": ("run", "run_id", "run_name", "cluster"),
  "split": ("split",),
  "arm": ("arm",),
  "flop_rule": ("flop_rule",),
}  # fmt: skip
REQUIRED = ("params", "tokens", "loss")
TEXT = ("run", "split", "arm", "flop_rule")
TUNED = "tuned"  # arm of a sweep
FIT, HOLDOUT = ("train", "fit", ""), ("test", "holdout", "hold-out", "hold_out", "heldout", "validation", "val")
SEQUENCES = ("bsz", "batch_size", "bs", "batch")  # may be sequences, so they are never read as tokens


@dataclasses.dataclass(frozen=True)
class RunTable:
  """Runs, one a row; all counts raw.

  Attributes:
    params, tokens, loss: N, T, L; float64 (n,).
    weight: of the squared residual; 1 / variance where noise was measured. (n,)
    holdout: rows that no fit may see. (n,) bool
    run: the training run of each row; rows of one run are drawn together. (n,) int
    lr, batch_tokens, flops: (n,), or None where the table lacks them.
    flop_rule: how `flops` were counted; "" where the table does not say.
    has_split: whether the table itself says which rows are held out.
    measured: whether the weights are 1 / variance of measured noise, and not relative ones.
    warnings: what was noticed while reading.
  """

  params: np.ndarray
  tokens: np.ndarray
  loss: np.ndarray
  weight: np.ndarray
  holdout: np.ndarray
  run: np.ndarray
  lr: np.ndarray | None = None
  batch_tokens: np.ndarray | None = None
  flops: np.ndarray | None = None
  flop_rule: str = ""
  has_split: bool = False
  measured: bool = False
  warnings: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.loss)

  @property
  def runs(self) -> int:
    """How many training runs the rows come from."""
    return len(np.unique(self.run))

  def take(self, rows: Any, **changes: Any) -> "RunTable":
    """The table of these rows (indices or a mask)."""
    columns = ("params", "tokens", "loss", "weight", "holdout", "run", "lr", "batch_tokens", "flops")
    parts: dict[str, Any] = {
      name: None if getattr(self, name) is None else getattr(self, name)[rows] for name in columns
    }
    return dataclasses.replace(self, **(parts | changes))

  @property
  def fitted(self) -> "RunTable":
    """The rows that fits see."""
    return self.take(~self.holdout)

  @property
  def held_out(self) -> "RunTable":
    """The rows that they do not."""
    return self.take(self.holdout)


def read(path: str | os.PathLike[str], units: Mapping[str, float] | None = None) -> RunTable:
  """Reads a .csv, .jsonl or .parquet table of runs.

  Columns, by these names or those of `ALIASES`, in any case: params, tokens, loss; optional lr, batch_tokens, flops,
  weight (of the squared residual) or stderr (of the loss; the weight is then 1 / stderr^2), run (rows of one training
  run), split (train, or test / holdout for rows that are only predicted), arm (of a sweep, "a+b" for several),
  flop_rule. Others are left alone. Without tokens, T is flops / (6 params). Rows whose loss is not finite (diverged
  runs) are left out with a warning; so are held-out rows of other arms than "tuned", where there are rows of that.

  Args:
    path: the file.
    units: raw counts in one unit of a column, e.g. {"tokens": 1e9} for tokens given in billions.

  Raises:
    DataError: no such table; a column is missing, no number, or not positive; counts that cannot be raw counts.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise DataError(f"{path}: no such file")
  table = read_table(path, strings=())
  columns = {name: table.column(name).to_pylist() for name in table.column_names}
  return from_columns(columns, str(path), units)


def from_columns(
  columns: Mapping[str, Sequence[Any]], name: str = "table", units: Mapping[str, float] | None = None
) -> RunTable:
  """The table of these columns; see `read`. `name` stands in messages."""
  units = dict(units or {})
  if unknown := [unit for unit in units if unit not in ALIASES or unit in TEXT]:
    raise DataError(f"{name}: a unit is given for {unknown[0]!r}{nearest(unknown[0], ['params', 'tokens', 'flops'])}")
  found, warnings = _find(columns, name)
  numbers = {
    key: _numbers(columns[column], f"{name}, column {column!r}", may_be_missing=key == "loss") * units.get(key, 1.0)
    for key, column in found.items()
    if key not in TEXT
  }
  if "tokens" not in numbers:
    numbers["tokens"] = numbers["flops"] / (6 * numbers["params"])
    warnings.append("no column 'tokens': T is taken to be flops / (6 params)")
  rows = len(numbers["loss"])
  finite = np.isfinite(numbers["loss"])
  if not finite.all():
    gone = ", ".join(str(row + 1) for row in np.flatnonzero(~finite)[:8])
    more = "" if (~finite).sum() <= 8 else ", ..."
    warnings.append(f"{(~finite).sum()} of {rows} rows have no finite loss and are left out: rows {gone}{more}")
  split, has_split = _split([str(value or "") for value in columns[found["split"]]], name) if "split" in found else (
    np.zeros(rows, bool), False)  # fmt: skip
  weight = numbers.get("weight", np.ones(rows))
  if "stderr" in numbers and "weight" not in numbers:
    weight = numbers["stderr"] ** -2.0
  run = np.unique([str(value) for value in columns[found["run"]]], return_inverse=True)[1] if "run" in found else (
    np.arange(rows))  # fmt: skip
  rules = sorted({str(value) for value in columns[found["flop_rule"]]}) if "flop_rule" in found else [""]
  if len(rules) > 1:
    raise DataError(f"{name}: FLOPs are counted by several rules ({', '.join(rules)}); a law needs one")
  whole = RunTable(
    params=numbers["params"], tokens=numbers["tokens"], loss=numbers["loss"], weight=weight, holdout=split, run=run,
    lr=numbers.get("lr"), batch_tokens=numbers.get("batch_tokens"), flops=numbers.get("flops"), flop_rule=rules[0],
    has_split=has_split, measured="stderr" in numbers and "weight" not in numbers, warnings=tuple(warnings),
  )  # fmt: skip
  check_units(whole, name)
  if "arm" in found:
    tuned = np.array([TUNED in str(value).split("+") for value in columns[found["arm"]]])
    others = split & ~tuned & bool((split & tuned).any())
    if others.any():
      said = f"{others.sum()} held-out rows of other arms than {TUNED!r} are left out: the law is that of tuned runs"
      whole = dataclasses.replace(whole, warnings=(*whole.warnings, said))
      finite &= ~others
  return whole.take(finite)


def _find(columns: Mapping[str, Sequence[Any]], name: str) -> tuple[dict[str, str], list[str]]:
  """{our name: the table's}, and warnings."""
  lower = {_word(column): column for column in columns}
  found: dict[str, str] = {}
  for key, names in ALIASES.items():
    present = [lower[alias] for alias in names if alias in lower]
    if present and key in REQUIRED and len(present) > 1 and _word(present[0]) != key:
      raise DataError(f"{name}: columns {', '.join(map(repr, present))} could each be {key}; name one {key!r}")
    if present:
      found[key] = present[0]
  for key in REQUIRED:
    if key not in found and not (key == "tokens" and "flops" in found):
      raise DataError(
        f"{name}: no column {key!r} (nor {', '.join(ALIASES[key][1:6])}, ...); it has {', '.join(columns)}"
      )
  if not len(columns[found["loss"]]):
    raise DataError(f"{name}: no rows")
  warnings = []
  if "batch_tokens" not in found and (sequences := [lower[word] for word in SEQUENCES if word in lower]):
    warnings.append(f"column {sequences[0]!r} is not used: it may count sequences; a column batch_tokens counts tokens")
  return found, warnings


def _word(column: str) -> str:
  return "_".join(re.findall(r"[a-z0-9]+", column.lower()))


def _numbers(values: Sequence[Any], what: str, may_be_missing: bool) -> np.ndarray:
  numbers = np.empty(len(values))
  for row, value in enumerate(values):
    try:
      numbers[row] = np.nan if value is None or value == "" else float(value)
    except (TypeError, ValueError) as error:
      raise DataError(f"{what}, row {row + 1}: {value!r} is no number") from error
  bad = np.flatnonzero((numbers <= 0) | (~np.isfinite(numbers) & ~np.bool_(may_be_missing)))
  if len(bad):
    raise DataError(f"{what}, row {bad[0] + 1}: {numbers[bad[0]]:g} must be a positive number")
  return numbers


def _split(words: list[str], name: str) -> tuple[np.ndarray, bool]:
  lower = [word.strip().lower() for word in words]
  for row, word in enumerate(lower):
    if word not in FIT + HOLDOUT:
      raise DataError(f"{name}, column 'split', row {row + 1}: {words[row]!r} is neither train nor test (or holdout)")
  held = np.array([word in HOLDOUT for word in lower])
  if held.all():
    raise DataError(f"{name}: every row is held out; nothing is left to fit")
  return held, bool(held.any())


def check_units(table: RunTable, name: str) -> None:
  """DataError where N or T cannot be raw counts: a law fitted to billions would be asked in tokens."""
  for key, values in (("params", table.params), ("tokens", table.tokens)):
    if values.max() < 1e3:
      unit = "billions" if values.max() < 200 or key == "tokens" else "millions"
      raise DataError(
        f"{name}: {key} run from {values.min():g} to {values.max():g}; raw counts are needed, these look like {unit}: "
        f"give the unit (--units {key}={'1e9' if unit == 'billions' else '1e6'}) or multiply the column"
      )
  ratio = float(np.median(table.tokens / table.params))
  if not 1e-2 < ratio < 1e6:
    few, many = ("tokens", "params") if ratio < 1 else ("params", "tokens")
    raise DataError(
      f"{name}: the median run has {ratio:.3g} tokens a parameter; {few} look like another unit than {many} (raw "
      f"counts are needed, not millions or billions); give the unit, e.g. --units {few}=1e6"
    )
