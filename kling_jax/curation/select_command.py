"""`kling select`: rules from flags, files and presets; what they would do, why of one clip, or doing it."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kling_jax import files
from kling_jax.curation import balance, duplicates, presets, rules, select
from kling_jax.curation.rules import Rule
from kling_jax.data import clip_table
from kling_jax.errors import DataError, UsageError, nearest

WEIGHTS = "weights.parquet"


def run(
  source: str,
  *,
  keep: Sequence[str] = (),
  file: str | None = None,
  presets: Sequence[str] = (),
  without: Sequence[str] = (),
  seed: int | None = None,
  what_if: bool = False,
  explain: str | None = None,
  weights: str | None = None,
  as_json: bool = False,
) -> int:
  """Runs the verb and prints; without any rule those of the last time are used. Returns the exit code."""
  chosen = gather(keep, file, presets, without)
  also = [rules.parse(weights)] if weights is not None else []
  is_set = not pathlib.Path(source).is_file()
  if not is_set and not (what_if or explain):
    raise UsageError(f"{source} is a table and not a clip set: it can only be looked at, with --what_if")
  if what_if or explain is not None:
    selection = _would(source, chosen, seed, is_set, also)
  else:
    selection = select.select(source, chosen, seed, also=also)
  answer: dict[str, Any] = selection.to_json()
  text = selection.text()
  if explain is not None:
    answer = _explained(selection, explain)
    text = _trail(answer)
  elif also:
    written = _write_weights(source, selection, also[0], what_if)
    answer["weights"], text = (
      written,
      f"{text}\n{written['file']}: weights {written['least']:.3g} to {written['most']:.3g}",
    )
  print(json.dumps(answer, indent=1) if as_json else text)
  return 0


def gather(
  keep: Sequence[str], file: str | None, names: Sequence[str], without: Sequence[str] = ()
) -> tuple[Rule, ...] | None:
  """The rules of presets, then of a file, then of flags; None where nothing is given.

  Raises:
    UsageError: one is no rule, or a name stands twice.
  """
  found: list[str | Rule] = list(presets.rules(names, without))
  if file is not None:
    try:
      found += rules.from_json(json.loads(pathlib.Path(file).read_text(encoding="utf-8")), file)
    except (OSError, ValueError) as error:
      raise UsageError(f"--rules {file}: no JSON file that can be read ({error})") from error
  found += keep
  return rules.parse_all(found) if found else None


def _would(
  source: str, chosen: tuple[Rule, ...] | None, seed: int | None, is_set: bool, also: list[Rule]
) -> select.Selection:
  held = select.stored(source) if is_set else None
  if chosen is None:
    chosen = held[0] if held else select.DEFAULT_RULES
  seed = (held[1] if held else 0) if seed is None else seed
  pairs = duplicates.load(clip_table.set_folder(source)) if is_set else None
  return select.evaluate(select.load(source, [*chosen, *also]), chosen, seed, pairs)


def _explained(selection: select.Selection, clip: str) -> dict[str, Any]:
  matches = [
    row for row, name in enumerate(selection.ids) if name == clip or (len(clip) >= 6 and name.startswith(clip))
  ]
  if len(matches) != 1:
    many = f"; {len(matches)} clips start so" if matches else nearest(clip, selection.ids[:10000])
    raise DataError(f"{selection.columns.where} has no single clip {clip!r}{many}")
  row = matches[0]
  status = "kept" if selection.kept[row] else "dropped"
  return {"clip": selection.ids[row], "status": status, "reason": selection.reason(row), "trail": selection.trail(row)}


def _trail(answer: dict[str, Any]) -> str:
  head = f"{answer['clip']}: {answer['status']}" + (f", {answer['reason']}" if answer["reason"] else "")
  steps = answer["trail"]
  width = max((len(step["rule"]) for step in steps), default=0)
  return "\n".join([head, *(f"  {s['verdict']:<12}{s['rule']:<{width}}  {s['found']}  [{s['wants']}]" for s in steps)])


def _write_weights(source: str, selection: select.Selection, rule: Rule, dry: bool) -> dict[str, Any]:
  """weights.parquet beside the set: clip_id and weight of every kept clip, mean 1."""
  values = balance.weights(rule, rules.Evaluator(selection.columns), selection.kept)[selection.kept]
  path = pathlib.Path(source) / WEIGHTS
  if not dry:
    ids = [selection.ids[row] for row in np.flatnonzero(selection.kept)]
    with files.whole(path) as temporary:
      pq.write_table(pa.table({"clip_id": pa.array(ids, pa.string()), "weight": values}), temporary)
  ends = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
  return {"file": str(path), "rule": rule.keep, "least": ends[0], "most": ends[1]}
