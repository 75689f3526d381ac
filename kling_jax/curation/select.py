"""Selection: ordered rules decide which clips are kept; a dropped clip keeps its row, with the rule that dropped it.

Rules are tried in order and the first that is not true is the reason: "motion: motion 0.0003; wants motion >= 0.0005".
Then duplicates that `dedup` found are dropped ("duplicate of CLIP_ID"), then balancing rules look at what is left.
Media and records stay as they are: a set is selected by writing its table anew.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kling_jax import files
from kling_jax.curation import balance, duplicates, rules
from kling_jax.curation.clip_columns import ClipColumns
from kling_jax.curation.rules import Rule
from kling_jax.data import clip_table, columns, conditions, record, records
from kling_jax.data.source import ClipInfo, Score
from kling_jax.errors import DataError, UsageError, nearest

FILE = "select.json"
CONDITIONS = ("motion", "aesthetic", "clarity", "vtss")
# Freezes, flat frames and black leaders; everything else is for the user to judge (docs/guide/curation.md).
DEFAULT_RULES = (Rule("motion", "motion >= 0.0005"), Rule("clarity", "clarity >= 0.05"))
_HEAVY = ("caption", *record.CAPTION_FIELDS, "caption_part_tokens", "source", "url", "transitions", "status_reason")


@dataclasses.dataclass(frozen=True)
class Step:
  """One rule on one set.

  Attributes:
    name, text: of the rule, with the quantiles that it met.
    seen: clips that earlier rules left. dropped: of them by this one. unknown: of the dropped, for want of a value.
    alone: clips that it would drop if it stood alone; None where it looks at what others left.
  """

  name: str
  text: str
  seen: int
  dropped: int
  unknown: int = 0
  alone: int | None = None


@dataclasses.dataclass(frozen=True)
class Selection:
  """What rules make of a table; nothing is written yet.

  Attributes:
    steps: one a rule, then duplicates, then balancing.
    dropped_by: (N,) index of the step that drops a clip, -1 for kept ones.
    ids: names of the clips.
  """

  columns: ClipColumns
  steps: tuple[Step, ...]
  dropped_by: np.ndarray
  ids: list[str]
  _rules: tuple[Rule | None, ...]  # None: duplicates
  _truths: tuple[tuple[np.ndarray, np.ndarray] | None, ...]
  _balances: dict[int, balance.Balance]
  _kept_copy: dict[int, str]

  @property
  def kept(self) -> np.ndarray:
    """(N,) bool."""
    return self.dropped_by < 0

  def reason(self, row: int) -> str:
    """Why a clip is dropped; "" where it is kept."""
    step = int(self.dropped_by[row])
    return "" if step < 0 else self._say(step, row)

  def _say(self, step: int, row: int) -> str:
    rule = self._rules[step]
    if rule is None:
      return f"duplicate of {self._kept_copy[row]}"
    if step in self._balances:
      made = self._balances[step]
      place = f"place {made.rank[row] + 1} of {made.size[row]} in its group, {made.share[row]} are taken"
      return f"{rule.name}: {place}; wants {rule.keep}"
    return f"{rule.name}: {rules.facts(rule, self.columns, row)}; wants {self.steps[step].text}"

  def trail(self, row: int) -> list[dict[str, Any]]:
    """Every step of one clip: {rule, wants, found, verdict}; verdict is kept, dropped, unknown or not reached."""
    found = []
    for number, (step, rule) in enumerate(zip(self.steps, self._rules, strict=True)):
      truth = self._truths[number]
      if rule is None or truth is None:
        reached = not 0 <= self.dropped_by[row] < number
        verdict = "dropped" if self.dropped_by[row] == number else "kept" if reached else "not reached"
        what = self._say(number, row) if verdict == "dropped" else ""
      else:
        verdict = "kept" if truth[0][row] else "dropped" if truth[1][row] else "unknown"
        what = rules.facts(rule, self.columns, row)
      found.append({"rule": step.name, "wants": step.text, "found": what, "verdict": verdict})
    return found

  def to_json(self) -> dict[str, Any]:
    """{clips, kept, kept_seconds, steps: [{name, text, seen, dropped, unknown, alone}]}."""
    steps = [dataclasses.asdict(step) for step in self.steps]
    return {"clips": len(self.columns), "kept": int(self.kept.sum()), "kept_seconds": self.kept_seconds, "steps": steps}

  @property
  def kept_seconds(self) -> float | None:
    if not self.columns.has("duration_s"):
      return None
    length = self.columns["duration_s"]
    return float(length.values[self.kept & length.known].sum())

  def text(self) -> str:
    """The funnel for a terminal."""
    rows = [("rule", "seen", "dropped", "unknown", "alone", "wants")]
    rows += [
      (s.name, f"{s.seen:,}", f"{s.dropped:,}", f"{s.unknown:,}", "" if s.alone is None else f"{s.alone:,}", s.text)
      for s in self.steps
    ]
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    lines = [
      "  ".join([row[0].ljust(widths[0]), *(row[k].rjust(widths[k]) for k in range(1, 5)), row[5]]).rstrip()
      for row in rows
    ]
    seconds = "" if self.kept_seconds is None else f", {self.kept_seconds / 3600:,.3g} h"
    kept = int(self.kept.sum())
    share = 100 * kept / max(len(self.columns), 1)
    return "\n".join([*lines, f"{len(self.columns):,} clips, {kept:,} kept ({share:.1f} %{seconds})"])


def evaluate(
  table: ClipColumns, chosen: Sequence[Rule], seed: int = 0, pairs: duplicates.Pairs | None = None, strict: bool = True
) -> Selection:
  """Tries the rules on every clip.

  Args:
    table: the clips.
    chosen: rules in order; balancing ones come after all others whatever their place.
    seed: of balancing.
    pairs: duplicates that were found in the set.
    strict: a column that no clip has is an error; else all clips are unknown.

  Raises:
    DataError: a column is missing, or was made by a scorer whose unit is another than the rule's.
    UsageError: a rule compares what cannot be compared.
  """
  evaluator, count = rules.Evaluator(table), len(table)
  ids = table.ids()
  dropped_by = np.full(count, -1, np.int32)
  steps: list[Step] = []
  order: list[Rule | None] = []
  truths: list[tuple[np.ndarray, np.ndarray] | None] = []
  balances: dict[int, balance.Balance] = {}
  copies: dict[int, str] = {}
  plain = [rule for rule in chosen if not rule.balances]
  queue: list[Rule | None] = [*plain, *([None] if pairs is not None else []), *(r for r in chosen if r.balances)]
  for number, rule in enumerate(queue):
    left = dropped_by < 0
    unknown, alone = 0, None
    if rule is None:
      assert pairs is not None
      copies = pairs.resolve(left, table, ids)
      failing = np.zeros(count, bool)
      failing[list(copies)] = True
      text, truth = f"no copy of a better clip ({pairs.stated})", None
    elif rule.balances:
      _require(table, rule, strict)
      balances[number] = balance.balance(rule, evaluator, left, ids, seed)
      failing, text, truth = left & ~balances[number].taken, rule.keep, None
    else:
      truth = _truth(evaluator, rule, strict)
      failing, text = left & ~truth[0], rules.stated(rule, evaluator.quantiles)
      unknown, alone = int((failing & ~truth[1]).sum()), int((~truth[0]).sum())
    dropped_by[failing] = number
    steps.append(
      Step(rule.name if rule else rules.DUPLICATE, text, int(left.sum()), int(failing.sum()), unknown, alone)
    )
    order.append(rule)
    truths.append(truth)
  return Selection(table, tuple(steps), dropped_by, ids, tuple(order), tuple(truths), balances, copies)


def _truth(evaluator: rules.Evaluator, rule: Rule, strict: bool) -> tuple[np.ndarray, np.ndarray]:
  table = evaluator.columns
  if not _require(table, rule, strict):
    nothing = np.zeros(len(table), bool)
    return nothing, nothing
  return evaluator.truth(rule)


def _require(table: ClipColumns, rule: Rule, strict: bool) -> bool:
  """Whether the rule's columns are there, made by the scorers that it means.

  Raises:
    DataError: they are not, and `strict`; or another scorer made them.
  """
  for name, wanted in rule.scorers:
    made = table.scorers(name)
    if any(who.split(" ")[0] not in wanted for who in made):
      raise DataError(
        f"rule {rule.name!r} is in the unit of {' or '.join(wanted)}, but {name} of {table.where} was made by "
        f"{', '.join(made)}; {rule.hint or 'score the set with that scorer'}, or leave it out: --without {rule.name!r}"
      )
  # A rule that asks whether a value is missing may meet a column without any.
  guarded = rules.guarded(rule.tree)
  absent = [name for name in rule.columns if not (table.has(name) or (name in guarded and name in table.names))]
  if absent and strict:
    hint = rule.hint or f"score the set (`kling score`), or mend the name{nearest(absent[0], table.names)}"
    raise DataError(f"no clip of {table.where} has {absent[0]!r}, which rule {rule.name!r} wants: {hint}")
  return not absent


# ---- sets ------------------------------------------------------------------------------------------------------------


def load(source: str | os.PathLike[str], chosen: Sequence[Rule] = ()) -> ClipColumns:
  """The columns of a set, or of a table file (.parquet, .csv, .jsonl), that rules may ask for.

  Long texts are read only where a rule names them.

  Raises:
    DataError: neither a set nor a table.
  """
  path = pathlib.Path(source)
  if path.is_file():
    return ClipColumns(columns.read_table(path, ("videoID", "url", "timestamp", "caption")), path.name)
  folder = clip_table.set_folder(path)
  named = {name for rule in chosen for name in rule.columns}
  try:
    found = pq.read_schema(folder / clip_table.TABLE).names
    wanted = [name for name in found if name not in _HEAVY or name in named]
    return ClipColumns(pq.read_table(folder / clip_table.TABLE, columns=wanted), path.name)
  except (pa.ArrowException, OSError) as error:
    raise DataError(f"{folder / clip_table.TABLE} cannot be read: {str(error).splitlines()[0]}") from error


def stored(folder: str | os.PathLike[str]) -> tuple[tuple[Rule, ...], int] | None:
  """The rules and the seed that a set was last selected with; None where it has none.

  Raises:
    DataError: select.json is damaged.
  """
  path = pathlib.Path(folder) / FILE
  if not path.exists():
    return None
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
    return rules.from_json(value["rules"], str(path)), int(value["seed"])
  except (ValueError, KeyError, TypeError, UsageError) as error:
    raise DataError(f"{path} is damaged ({error}); remove it and select again") from error


def select(
  folder: str | os.PathLike[str],
  chosen: Sequence[Rule] | None = None,
  seed: int | None = None,
  strict: bool = True,
  also: Sequence[Rule] = (),
) -> Selection:
  """Judges every clip of a set anew; the set changes at once or not at all.

  Writes the table, conditions.json (percentiles of the kept clips) and select.json (the rules, for the next time).

  Args:
    folder: the set.
    chosen: rules in order; None: those of the last time, else DEFAULT_RULES.
    seed: of balancing; None: that of the last time, else 0.
    strict: see `evaluate`.
    also: rules that are not applied, but whose columns the caller wants to read.

  Raises:
    DataError: no set, a damaged one, a column that no clip has; or two versions of a scorer in one column.
  """
  folder = clip_table.set_folder(folder)
  held = stored(folder)
  if chosen is None:
    chosen = held[0] if held else DEFAULT_RULES
  seed = (held[1] if held else 0) if seed is None else seed
  selection = evaluate(load(folder, [*chosen, *also]), chosen, seed, duplicates.load(folder), strict)
  percentiles = _conditions(selection)
  _mark(folder, selection)
  if percentiles is not None:
    percentiles.save(folder / conditions.FILE)
  else:
    (folder / conditions.FILE).unlink(missing_ok=True)
  files.write_json(folder / FILE, {"rules": rules.to_json(chosen), "seed": seed})
  return selection


def _mark(folder: pathlib.Path, selection: Selection) -> None:
  """Writes status and reason of every clip, where they differ from what the table says."""
  reasons = np.full(len(selection.columns), "", object)
  for row in np.flatnonzero(~selection.kept):
    reasons[row] = selection.reason(int(row))
  texts = pa.array(reasons, pa.string())
  statuses = pa.array(np.where(selection.kept, "kept", "dropped").astype(object), pa.string())
  before = pq.read_table(folder / clip_table.TABLE, columns=list(clip_table.MARKS))
  if all(
    before[name].combine_chunks().equals(now) for name, now in zip(clip_table.MARKS, (statuses, texts), strict=True)
  ):
    return
  records.mark(folder, statuses, texts, selection.columns.table["clip_id"])


def _conditions(selection: Selection) -> conditions.Percentiles | None:
  """Percentiles of the kept clips; None where none of them has a score.

  Raises:
    DataError: a score of the kept clips comes from two scorers or versions.
  """
  kept = selection.columns.table.filter(pa.array(selection.kept))
  infos = []
  for row in kept.select(["clip_id", "scores", "vtss"]).to_pylist():
    scores = {name: Score(**score) for name, score in row["scores"] if name in CONDITIONS}
    if row["vtss"] is not None:
      scores.setdefault("vtss", Score(row["vtss"], "vtss", ""))
    infos.append(ClipInfo(row["clip_id"], "", 0.0, 0.0, 0, 0, 0, scores))
  names = [name for name in CONDITIONS if any(name in info.scores for info in infos)]
  return conditions.fit(infos, names) if names else None
