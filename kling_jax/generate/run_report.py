"""The page of training runs, side by side: losses, also by diffusion time, samples, throughput, warnings, configs.

It opens from disk and asks nothing of the network. A curve has at most POINTS points, each the mean of its share.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kling_jax import config as config_lib
from kling_jax import page
from kling_jax.errors import UsageError
from kling_jax.train import metrics, workdir

POINTS = 600  # of a curve
SAMPLES = 4  # newest of each run
AT = "val_loss_at_"
WAITING = 0.2  # of the time for data, above which a run is slowed by it
FIRST = ("loss", "val_loss", "grad_norm", "lr", "tokens_per_s", "steps_per_s", "data_wait", "mfu")
NOT_SHOWN = ("step", "tokens", "flops", "seconds", "streak", "val_stderr")
WHAT = {
  "loss": "training loss", "val_loss": "validation loss, EMA weights", "grad_norm": "gradient norm before clipping",
  "lr": "learning rate", "tokens_per_s": "tokens a second", "steps_per_s": "updates a second",
  "data_wait": "share of the time that the step waits for data", "mfu": "model FLOPs utilisation",
  "skipped": "updates that were skipped", "failed_clips": "clips that could not be decoded (process 0)",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """What a work directory holds: its config as plain values, and the rows of metrics.jsonl."""

  name: str
  folder: pathlib.Path
  config: dict[str, Any]
  rows: list[dict[str, Any]]

  @classmethod
  def read(cls, folder: pathlib.Path, name: str) -> "Run":
    """Raises: UsageError: it is no work directory."""
    config = config_lib.plain(workdir.read_config(folder))
    return cls(name, folder, config, metrics.read(folder / "metrics.jsonl"))

  def curve(self, name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of a figure, thinned to POINTS means; values that are not finite stay gaps."""
    pairs = [(row["step"], row[name]) for row in self.rows if _number(row.get(name))]
    if len(pairs) <= POINTS:
      return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]
    parts = np.array_split(np.array(pairs, np.float64), POINTS)
    return [float(part[-1, 0]) for part in parts], [float(part[:, 1].mean()) for part in parts]

  def last(self, name: str) -> float:
    """The newest value of a figure; nan where it was never written."""
    return next((float(row[name]) for row in reversed(self.rows) if _number(row.get(name))), math.nan)

  @property
  def step(self) -> int:
    return int(self.rows[-1]["step"]) if self.rows else 0

  def validations(self) -> list[dict[str, Any]]:
    return [row for row in self.rows if _number(row.get("val_loss"))]

  def samples(self) -> list[pathlib.Path]:
    """The newest sampled videos, the newest first."""
    return sorted((self.folder / "samples").glob("*.mp4"), reverse=True)[:SAMPLES]


def write(folders: Sequence[pathlib.Path], out: pathlib.Path) -> pathlib.Path:
  """Writes the page of one or several work directories.

  Raises:
    UsageError: one is no work directory, or plotly is not installed.
  """
  page.require()
  runs = [Run.read(folder, name) for folder, name in zip(folders, names(folders), strict=True)]
  build(runs).write(out)
  return out


def names(folders: Sequence[pathlib.Path]) -> list[str]:
  """The shortest ends of the paths that tell the folders apart.

  Raises:
    UsageError: one is given twice.
  """
  whole = [folder.resolve().parts for folder in folders]
  if len(set(whole)) < len(whole):
    raise UsageError("a work directory is given twice")
  for length in range(1, max(map(len, whole)) + 1):
    ends = ["/".join(parts[-length:]) for parts in whole]
    if len(set(ends)) == len(ends):
      return ends
  raise AssertionError("different paths have different ends")


def build(runs: Sequence[Run]) -> page.Page:
  """The page, to be written."""
  one = runs[0]
  title = f"Run {one.name}" if len(runs) == 1 else f"{len(runs)} runs"
  document = page.Page(title, ", ".join(f"{run.name}: {run.config.get('task', '')}" for run in runs))
  document.section("Summary")
  document.table(*_summary(runs))
  found = [(run.name, text) for run in runs for text in warnings(run)] + [("all", text) for text in among(runs)]
  document.section("Warnings", "" if found else "None.")
  if found:
    document.table(["run", "what was seen"], found)
  document.section("Curves", "By update. Drag to zoom, double-click to go back.")
  document.charts([(WHAT.get(name, name), _chart(runs, name)) for name in figures(runs)])
  _by_time(document, runs)
  tiles = [
    page.Tile(path.read_bytes(), f"{run.name}, step {int(path.stem) if path.stem.isdigit() else path.stem}")
    for run in runs
    for path in run.samples()
  ]
  if tiles:
    document.section("Samples", f"The newest {SAMPLES} of each run at most; rows of a grid are conditions.")
    document.gallery(tiles, width=300)
  document.section("Config")
  if len(runs) > 1:
    document.text("Keys in which the runs differ; all others are those of the first run below.")
    document.table(["key", *(run.name for run in runs)], differing(runs))
  document.code("\n".join(f"{key} = {json.dumps(value)}" for key, value in flat(one.config).items()))
  return document


def figures(runs: Sequence[Run]) -> list[str]:
  """Names of what is charted: the trainer's own first, then those of the tasks."""
  seen = {name: None for run in runs for row in run.rows for name, value in row.items() if _number(value)}
  others = [name for name in seen if name not in (*FIRST, *NOT_SHOWN) and not name.startswith(AT)]
  # What never moved from zero says nothing in a chart.
  others = [name for name in others if any(any(run.curve(name)[1]) for run in runs)]
  return [name for name in FIRST if name in seen] + others


def warnings(run: Run) -> list[str]:
  """What one should look at before trusting a run."""
  if not run.rows:
    return ["it has written no figures yet"]
  found = []
  wanted = run.config.get("steps", run.step)
  if run.step < wanted:
    found.append(f"it stands at update {run.step} of {wanted}")
  broken = [row["step"] for row in run.rows if not _number(row.get("loss", 0.0))]
  if broken:
    found.append(f"the loss was not finite at update {broken[0]}, and in {len(broken)} rows in all")
  skipped = run.last("skipped")
  if skipped > 0:
    found.append(f"{skipped:g} updates were skipped (config key guard)")
  failed = run.last("failed_clips")
  if failed > 0:
    found.append(f"{failed:g} clips could not be decoded and were replaced; check the set with `kling data verify`")
  waits = [row["data_wait"] for row in run.rows[len(run.rows) // 2 :] if _number(row.get("data_wait"))]
  if waits and float(np.median(waits)) > WAITING:
    found.append(
      f"it waits for data {100 * float(np.median(waits)):.0f} % of the time: raise data.threads or data.workers, or "
      "encode latents once with `kling encode`"
    )
  validations = run.validations()
  if len(validations) > 1:
    best = min(validations, key=lambda row: row["val_loss"])
    last = validations[-1]
    error = max(float(best.get("val_stderr", 0.0)), float(last.get("val_stderr", 0.0)))
    if last["val_loss"] > best["val_loss"] + 2 * error:
      found.append(
        f"the validation loss has risen since update {best['step']}: {best['val_loss']:.4g}, now {last['val_loss']:.4g}"
      )
  if len({row.get("table_id") for row in validations}) > 1:
    found.append("its validation table changed on the way; losses before and after do not compare")
  return found


def among(runs: Sequence[Run]) -> list[str]:
  """What forbids to compare runs with one another."""
  tables = {row["table_id"] for run in runs for row in run.validations()[-1:] if "table_id" in row}
  if len(tables) > 1:
    return ["validation losses do not compare: the runs have different validation tables (table_id)"]
  return []


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{dotted key: value} of a plain config."""
  found: dict[str, Any] = {}
  for key, value in config.items():
    found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
  return found


def differing(runs: Sequence[Run]) -> list[tuple[str, ...]]:
  """(key, value of each run) of the keys in which runs differ."""
  configs = [{key: json.dumps(value) for key, value in flat(run.config).items()} for run in runs]
  keys = dict.fromkeys(key for config in configs for key in config)
  return [
    (key, *(config.get(key, "") for config in configs))
    for key in keys
    if len({config.get(key) for config in configs}) > 1
  ]


def _summary(runs: Sequence[Run]) -> tuple[list[str], list[tuple[object, ...]]]:
  header = ["run", "updates", "loss", "best validation", "at update", "tokens", "FLOPs", "hours", "updates/s",
            "tokens/s", "MFU"]  # fmt: skip
  rows: list[tuple[object, ...]] = []
  for run in runs:
    best = min(run.validations(), key=lambda row: row["val_loss"], default=None)
    shown = f"{best['val_loss']:.4g} ± {best.get('val_stderr', math.nan):.2g}" if best else ""
    speeds = [_middle(run.curve(name)[1]) for name in ("steps_per_s", "tokens_per_s", "mfu")]
    rows.append(
      (run.name, run.step, _shown(run.last("loss")), shown, best["step"] if best else "", _shown(run.last("tokens")),
       _shown(run.last("flops")), _shown(run.last("seconds") / 3600), *map(_shown, speeds))
    )  # fmt: skip
  return header, rows


def _by_time(document: page.Page, runs: Sequence[Run]) -> None:
  """Validation loss by diffusion time: the newest of each run; of a single run also how it came about."""
  curves: dict[str, tuple[Sequence[float], Sequence[float]]] = {}
  for run in runs:
    rows = [row for row in run.validations() if any(name.startswith(AT) for name in row)]
    picks = rows[-1:] if len(runs) > 1 else [rows[k] for k in _even(len(rows), 4)]
    for row in picks:
      points = sorted((float(name.removeprefix(AT)), value) for name, value in row.items() if name.startswith(AT))
      name = run.name if len(runs) > 1 else f"update {row['step']}"
      curves[name] = [x for x, _ in points], [y for _, y in points]
  if curves:
    document.section(
      "Loss by diffusion time",
      "Validation loss of the rows whose time lies in an eighth of the training distribution; 0 is hardly any noise.",
    )
    document.chart(page.lines(curves, "quantile of the diffusion times", "validation loss"))


def _even(count: int, most: int) -> list[int]:
  """At most `most` of the numbers below `count`, evenly spread, first and last included."""
  return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []


def _chart(runs: Sequence[Run], name: str) -> dict[str, Any]:
  curves = {run.name: run.curve(name) for run in runs if run.curve(name)[0]}
  positive = all(value > 0 for _, values in curves.values() for value in values)
  return page.lines(curves, "update", name, log_y=positive and name in ("loss", "grad_norm"))


def _middle(values: Sequence[float]) -> float:
  return float(np.median(values)) if values else math.nan


def _shown(value: float) -> object:
  return value if math.isfinite(value) else ""


def _number(value: object) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
