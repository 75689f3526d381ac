"""The page of a sweep: progress, curves, learning rate x batch, arms against each other; one file, no network."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from kling_jax import page
from kling_jax.errors import DataError
from kling_jax.scaling import paired
from kling_jax.scaling.ledger import Ledger
from kling_jax.scaling.status import Line, Status, count
from kling_jax.scaling.sweep import Sweep


def write(path: str | os.PathLike[str], loaded: Sweep, ledger: Ledger, found: Status) -> None:
  """Writes the page, whole or not at all.

  Raises:
    UsageError: plotly is not installed.
  """
  page.require()
  records = ledger.finished()
  seconds = sum(line.wall_s for line in found.lines)
  made = page.Page(f"Sweep {loaded.path.stem}", f"{len(found.lines)} runs; N, T, B, C are raw counts")
  made.section("Progress")
  made.facts(
    {f"runs {name}": number for name, number in found.counts.items()}
    | {"of all FLOPs": f"{found.done:.1%}", "hours of training": f"{seconds / 3600:.2f}"}
  )
  for warning in found.warnings:
    made.text(f"Warning: {warning}")
  if any(line.status in ("failed", "abandoned", "diverged") for line in found.lines):
    made.table(("run", "status", "starts", "why"),
               [(line.run, line.status, line.starts, line.reason) for line in found.lines
                if line.status in ("failed", "abandoned", "diverged")])  # fmt: skip
  if records:
    _losses(made, records)
    _grids(made, [record for record in records if record["split"] == "fit"])
  _arms(made, ledger, records)
  made.section("All runs", "A star marks hold-outs, which no law may see.")
  made.table(("run", "arm", "status", "N", "T", "B", "lr", "step", "loss", "s"), map(_row, found.lines))
  made.write(path)


def _row(line: Line) -> Sequence[object]:
  return (
    line.run, "+".join(line.arms) + (" *" if line.split == "holdout" else ""), line.status, count(line.params),
    count(line.tokens), count(line.batch_tokens), f"{line.lr:.3g}", f"{line.step} of {line.steps}",
    "" if line.loss is None else f"{line.loss:.5f}", round(line.wall_s),
  )  # fmt: skip


def _losses(made: page.Page, records: Sequence[Mapping[str, Any]]) -> None:
  """For each size the lowest loss at each T that any run was read at."""
  best: dict[int, dict[float, float]] = {}
  for record in records:
    for point in record["points"]:
      at = best.setdefault(record["params"], {})
      at[point["tokens"]] = min(point["loss"], at.get(point["tokens"], point["loss"]))
  curves = {f"N = {count(n)}": (sorted(best[n]), [best[n][t] for t in sorted(best[n])]) for n in sorted(best)}
  figure = page.lines(curves, "T, tokens", "lowest loss", log_y=True)
  figure["layout"]["xaxis"]["type"] = "log"
  for curve in figure["data"]:
    curve["mode"] = "lines+markers"
  made.section("Loss", "EMA weights on the fixed validation table; the best of all learning rates and batches.")
  made.chart(figure)


def _grids(made: page.Page, records: Sequence[Mapping[str, Any]]) -> None:
  """Learning rate x batch, one chart a size, at the longest T that most of its runs reached."""
  charts = []
  for params in sorted({record["params"] for record in records}):
    mine = [record for record in records if record["params"] == params]
    longest = max(record["tokens"] for record in mine)
    cells = {(r["lr"], r["batch_tokens"]): r["loss"] for r in mine if r["tokens"] == longest}
    rates, batches = sorted({lr for lr, _ in cells}), sorted({batch for _, batch in cells})
    if len(rates) < 2 or len(batches) < 2:
      continue
    values = [[cells.get((lr, batch)) for lr in rates] for batch in batches]
    heat = {
      "type": "heatmap", "x": [f"{lr:.2g}" for lr in rates], "y": [count(b) for b in batches], "z": values,
      "colorscale": "Viridis", "reversescale": True, "texttemplate": "%{z:.4f}", "showscale": False,
    }  # fmt: skip
    axes = {"xaxis": {"title": {"text": "learning rate"}, "type": "category"},
            "yaxis": {"title": {"text": "tokens a batch"}, "type": "category"}}  # fmt: skip
    charts.append((f"N = {count(params)}, T = {count(longest)}", {"data": [heat], "layout": axes}))
  if charts:
    made.section("Learning rate x batch", "Loss of each run; light is low.")
    made.charts(charts, height=260)


def _arms(made: page.Page, ledger: Ledger, records: Sequence[Mapping[str, Any]]) -> None:
  try:
    rows = paired.regrets(ledger, records)
  except DataError as error:  # a ledger without its work directories still has its losses
    made.section("Arms at the hold-outs", f"Rows of the validation table are gone, so arms are not compared: {error}")
    return
  if not rows:
    return
  made.section(
    "Arms at the hold-outs",
    "Loss above that of the tuned run, row by row of the validation table: the regret with its paired standard error. "
    "The absolute error is that of the level, which all runs share.",
  )
  made.table(
    ("arm", "N", "T", "lr", "B", "loss", "absolute error", "regret %", "± %"),
    [
      (row["arm"], count(row["params"]), count(row["tokens"]), f"{row['lr']:.3g}", count(row["batch_tokens"]),
       f"{row['loss']:.5f}", f"{row['stderr_a']:.1e}", f"{100 * row['relative']:+.3f}",
       f"{100 * row['relative_stderr']:.3f}")
      for row in sorted(rows, key=lambda row: (row["params"], row["tokens"], row["relative"]))
    ],
  )  # fmt: skip
