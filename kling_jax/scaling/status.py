"""Where a sweep stands: every run with its state, progress and loss; as a table, as JSON, and as what a page shows."""

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table

from kling_jax.scaling import cost as cost_lib
from kling_jax.scaling.ledger import Ledger, RunState
from kling_jax.scaling.sweep import Run

ORDER = ("running", "failed", "abandoned", "diverged", "pending", "finished")
STYLES = {"running": "cyan", "finished": "green", "failed": "yellow", "abandoned": "red", "diverged": "magenta"}


@dataclasses.dataclass(frozen=True)
class Line:
  """One run of the table.

  Attributes:
    run, arms, split, status: as in the ledger.
    params, tokens, batch_tokens, lr: the plan. steps: of the plan; step: done so far.
    loss: newest validation loss, or None. wall_s: of training so far.
    starts, failures: how often it was started, and failed. worker: who is at it. reason: what it died of.
    flops: of the whole run, exact.
  """

  run: str
  arms: tuple[str, ...]
  split: str
  status: str
  params: int
  tokens: float
  batch_tokens: int
  lr: float
  steps: int
  step: int
  loss: float | None
  wall_s: float
  starts: int
  failures: int
  worker: str
  reason: str
  flops: float


@dataclasses.dataclass(frozen=True)
class Status:
  """The state of a sweep.

  Attributes:
    lines: one a run, in the order of the plan; runs of the ledger that the plan no longer has come after.
    counts: {status: runs}.
    done: share of the plan's FLOPs that is finished.
    codes: versions of the training code that finished runs were made with; more than one should not be mixed.
    tables: validation tables of finished runs; losses of different ones do not compare.
  """

  lines: tuple[Line, ...]
  counts: dict[str, int]
  done: float
  codes: tuple[str, ...]
  tables: tuple[str, ...]

  @property
  def ended(self) -> bool:
    """Whether no run is left to do."""
    return all(line.status in ("finished", "diverged", "abandoned") for line in self.lines)

  @property
  def warnings(self) -> tuple[str, ...]:
    """What a reader of the losses must know."""
    said = []
    if len(self.codes) > 1:
      said.append(
        f"finished runs were made by {len(self.codes)} versions of the training code: {', '.join(self.codes)}"
      )
    if len(self.tables) > 1:
      said.append(f"losses come from {len(self.tables)} validation tables and do not compare: {', '.join(self.tables)}")
    return tuple(said)

  def to_json(self) -> dict[str, Any]:
    """JSON-ready: counts, done, warnings, runs."""
    return {
      "counts": self.counts,
      "done": self.done,
      "warnings": list(self.warnings),
      "runs": [dataclasses.asdict(line) for line in self.lines],
    }


def of(ledger: Ledger, runs: Sequence[Run]) -> Status:
  """The status of `runs` by what stands in the ledger and in the work directories."""
  states = ledger.states([run.id for run in runs])
  lines = [_line(ledger, run, states[run.id]) for run in runs]
  total = sum(line.flops for line in lines)
  finished = [line for line in lines if line.status == "finished"]
  records = [states[line.run].record for line in finished]
  counts = Counter(line.status for line in lines)
  return Status(
    lines=tuple(lines),
    counts={name: counts[name] for name in ORDER if counts[name]},
    done=sum(line.flops for line in finished) / total if total else 0.0,
    codes=tuple(sorted({record["code"] for record in records})),
    tables=tuple(sorted({record["table_id"] for record in records if record["table_id"]})),
  )


def _line(ledger: Ledger, run: Run, state: RunState) -> Line:
  c, size, record = run.config, cost_lib.of(run.config), state.record
  batch_tokens = c.data.batch * size.clip_tokens
  newest = _newest(ledger.workdir(run.id)) if state.status == "running" else {}
  return Line(
    run=run.id, arms=run.arms, split=run.split, status=state.status, params=size.params,
    tokens=c.steps * batch_tokens, batch_tokens=batch_tokens, lr=c.optimizer.lr, steps=c.steps,
    step=newest.get("step", record.get("steps", 0)), loss=newest.get("val_loss", record.get("loss")),
    wall_s=newest.get("seconds", record.get("wall_s", 0.0)), starts=state.starts, failures=state.failures,
    worker=state.lease.get("runner", ""), reason=record.get("reason", ""),
    flops=size.flops(c.steps * batch_tokens),
  )  # fmt: skip


def _newest(workdir: pathlib.Path) -> Mapping[str, Any]:
  """The last whole line of a run's metrics, with the newest validation loss; {} before there is one."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return {}
  with path.open("rb") as file:
    file.seek(max(0, path.stat().st_size - 65536))
    lines = file.read().split(b"\n")[:-1]
  rows = [json.loads(line) for line in lines if line.startswith(b"{")]
  losses = [row["val_loss"] for row in rows if "val_loss" in row]
  return ({"val_loss": losses[-1]} if losses else {}) | (rows[-1] if rows else {})


def table(found: Status, most: int = 0) -> rich.table.Table:
  """The runs as a table; with `most`, the finished and pending ones that do not fit are left out."""
  lines = sorted(found.lines, key=lambda line: ORDER.index(line.status)) if most else list(found.lines)
  left_out = max(0, len(lines) - most) if most else 0
  caption = ", ".join(f"{count} {name}" for name, count in found.counts.items()) + f"; {found.done:.1%} of all FLOPs"
  drawn = rich.table.Table(title=caption, title_justify="left")
  for name in ("run", "arm", "status", "N", "T", "B", "lr", "step", "loss", "s", ""):
    drawn.add_column(name, justify="right" if name in ("N", "T", "B", "lr", "step", "loss", "s") else "left")
  for line in lines[: len(lines) - left_out]:
    style = STYLES.get(line.status, "")
    arm = "+".join(line.arms) + (" *" if line.split == "holdout" else "")
    drawn.add_row(
      line.run, arm, f"[{style}]{line.status}[/]" if style else line.status, count(line.params), count(line.tokens),
      count(line.batch_tokens), f"{line.lr:.3g}", f"{line.step}/{line.steps}",
      "" if line.loss is None else f"{line.loss:.5f}", f"{line.wall_s:.0f}" if line.wall_s else "",
      rich.markup.escape(line.reason or line.worker)[:60],
    )  # fmt: skip
  if left_out:
    drawn.add_row("...", f"{left_out} more", *[""] * 9)
  return drawn


def text(found: Status) -> str:
  """The table as plain text of 160 columns; a star marks hold-outs."""
  console = rich.console.Console(width=160, color_system=None)
  with console.capture() as captured:
    console.print(table(found))
  return captured.get()


def count(value: float) -> str:
  """A raw count in few letters: 512, 33.2k, 1.07G."""
  for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if value >= limit:
      return f"{value / limit:.3g}{unit}"
  return f"{value:.4g}"
