"""What `kling sweep design` answers: plan and cost of a sweep, a new sweep file for budgets, the runs to do next."""

import dataclasses
import itertools
import json
import math
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.table

from kling_jax import files
from kling_jax.errors import DataError, UsageError, nearest
from kling_jax.scaling import adaptive, points, predict, sweep
from kling_jax.scaling import design as design_lib
from kling_jax.scaling.design import Hardware, Hyper, Planned
from kling_jax.scaling.ledger import Ledger
from kling_jax.scaling.status import count
from kling_jax.train import peak

NOISE = 1e-3  # of a run's loss, relative, where no repeats with another seed measure it


@dataclasses.dataclass(frozen=True)
class Centre:
  """The law that a design is centred on: one in print ("law", its name) or fitted ("fit", path of fit.json)."""

  name: str
  kind: str = "law"

  @property
  def source(self) -> predict.Source:
    return predict.load(self.name) if self.kind == "fit" else predict.from_published(self.name)

  def params(self, flops: float) -> float:
    """N_opt(C): the law's own, else that of its loss surface."""
    source = self.source
    if "params" in source.law.quantities:
      return float(source.law("params", flops=flops))
    return float(source.law.surface.optimum(flops, source.rule).params)

  def hyper(self, multiple: int = 1) -> Hyper:
    """Its learning rate and batch.

    Raises:
      UsageError: it states none.
    """
    source = self.source
    law, tilt = source.law, source.tilt or 0.0
    best = lambda n, t: float(law("batch_tokens", params=n, tokens=t, flops=6 * n * t))
    rate = lambda n, t, b: float(law("lr", params=n, tokens=t, flops=6 * n * t)) * (b / best(n, t)) ** tilt
    return Hyper(rate, best, multiple=multiple)


def hardware(device: str | None, flops_per_s: float | None, mfu: float, devices: int, price: float) -> Hardware:
  """From the flags; a core of this machine, measured, where no device is named."""
  if device and device not in peak.DEVICE_PEAKS:
    raise UsageError(f"--device {device!r} is unknown{nearest(device, peak.DEVICE_PEAKS)} (or give --flops_per_s)")
  if not 0 < mfu <= 1 or devices < 1:
    raise UsageError("--mfu must lie above 0 and at most at 1, --devices at 1 or more")
  return Hardware(flops_per_s or (peak.DEVICE_PEAKS[device] if device else peak.measured_gemm()), mfu, devices, price)


def numbers(words: str, flag: str, how_many: int | None = None) -> list[float]:
  """Positive numbers between commas; UsageError that names the flag."""
  try:
    values = [float(word) for word in words.split(",")]
  except ValueError as error:
    raise UsageError(f"{flag} {words!r} is not of the form 3e17,6e17") from error
  if not all(value > 0 and math.isfinite(value) for value in values) or how_many not in (None, len(values)):
    raise UsageError(f"{flag} {words!r}: give {how_many or 'some'} positive numbers between commas")
  return values


# ---- plans ---------------------------------------------------------------------------------------------------------


def of_sweep(path: str, on: Hardware) -> dict[str, Any]:
  """The plan of a sweep file: its runs and their sums; of one whose later runs depend on results, the first runs."""
  loaded = sweep.load(path)
  planned = design_lib.plan(loaded.runs(), on)
  sums = {name: sum(getattr(run, name) for run in planned) for name in ("flops", "device_hours", "dollars")}
  runs = [dataclasses.asdict(run) for run in planned]
  return {"sweep": str(loaded.path), "adaptive": loaded.adaptive, "total": {"runs": len(runs), **sums}, "runs": runs}


def of_text(text: str, on: Hardware, out: str | None) -> dict[str, Any]:
  """The plan of a sweep file's text, which is written to `out` where one is given."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "design.py"
    path.write_text(text, encoding="utf-8")
    answer = of_sweep(str(path), on)
  if out is not None:
    if not out.endswith(".py"):
      raise UsageError(f"--out {out}: a sweep is a .py file")
    files.write_text(out, text)
  return answer | {"sweep": out or "(not written)"}


def isoflop_file(
  config: str, budgets: Sequence[float], centre: Centre, sizes: int, spread: float, multiple: int
) -> str:
  """A sweep file of IsoFLOP grids; it says in Python what the flags said."""
  if sizes < 3 or not spread > 1 or multiple < 1:
    raise UsageError("--sizes must be at least 3 (a parabola has three coefficients), --spread above 1, --multiple 1")
  listed = ", ".join(f"{budget:g}" for budget in budgets)
  return f'''"""IsoFLOP grids at {listed} FLOPs around {centre.name}, by `kling sweep design`."""

from kling_jax import config
from kling_jax.scaling import design, planning

BUDGETS = ({listed},)
CENTRE = planning.Centre({json.dumps(centre.name)}, {json.dumps(centre.kind)})


def get_config():
  c = config.load({json.dumps(config)})
  c.checkpoint.keep = 1
  return c


def sweep():
  yield from design.isoflop(
    get_config(), BUDGETS, CENTRE.params, CENTRE.hyper(multiple={multiple}), sizes={sizes}, spread={spread!r}
  )
'''


def plan_text(answer: Mapping[str, Any]) -> str:
  """A plan as a table, one line for each arm and size."""
  runs = [Planned(**run) for run in answer["runs"]]
  group = lambda run: ("+".join(run.arms) + (" *" if run.split == "holdout" else ""), run.params, run.size)
  total = answer["total"]
  drawn = rich.table.Table(title=f"{answer['sweep']}: {total['runs']} runs", title_justify="left", show_footer=True)
  sums = {"runs": str(total["runs"]), "FLOPs": f"{total['flops']:.3g}", "device h": _hours(total["device_hours"]),
          "$": _money(total["dollars"])}  # fmt: skip
  for name in ("arm", "size", "N", "runs", "T", "reads", "B", "lr", "FLOPs", "device h", "longest", "$"):
    drawn.add_column(name, footer=sums.get(name, ""), justify="left" if name in ("arm", "size") else "right")
  order = {name: place for place, name in enumerate(dict.fromkeys(group(run)[0] for run in runs))}
  for (arm, params, size), members in itertools.groupby(
    sorted(runs, key=lambda run: (order[group(run)[0]], *group(run)[1:])), key=group
  ):
    some = list(members)
    drawn.add_row(
      arm, size, count(params), str(len(some)), _span([run.tokens for run in some], count),
      _span([run.reads for run in some], str), _span([run.batch_tokens for run in some], count),
      _span([run.lr for run in some], "{:.2g}".format), f"{sum(run.flops for run in some):.3g}",
      _hours(sum(run.device_hours for run in some)), _hours(max(run.hours for run in some)),
      _money(sum(run.dollars for run in some)),
    )  # fmt: skip
  later = "\nFurther runs depend on the results of these.\n" if answer["adaptive"] else ""
  return _drawn(drawn) + later


def show(answer: Mapping[str, Any], text: Callable[[Mapping[str, Any]], str], as_json: bool) -> int:
  """Prints an answer; the exit code."""
  from kling_jax import answers

  if as_json:
    answers.show(answer)
  else:
    print(text(answer), end="")
  return 0


def _span(values: Sequence[float], write: Callable[[Any], str]) -> str:
  low, high = min(values), max(values)
  return write(low) if low == high else f"{write(low)} .. {write(high)}"


def _hours(hours: float) -> str:
  return f"{hours:.3g}" if hours >= 0.1 else f"{hours * 3600:.0f} s"


def _money(dollars: float) -> str:
  return "" if math.isnan(dollars) else f"{dollars:,.0f}"


def _drawn(table: rich.table.Table) -> str:
  console = rich.console.Console(width=150, color_system=None)
  with console.capture() as captured:
    console.print(table)
  return captured.get()


# ---- the next runs -------------------------------------------------------------------------------------------------


def following(loaded: sweep.Sweep, folder: pathlib.Path, how_many: int, aim: Sequence[float] | None) -> dict[str, Any]:
  """The runs that would shrink the uncertainty of the laws most for their FLOPs, by what the ledger holds.

  Candidates are the sizes of the sweep (and its largest plan), batches and learning rates in steps of two about the
  present optimum, and once, twice or four times the longest T so far.

  Args:
    aim: (N, T) whose best loss is to be known; None: all coefficients alike.
  """
  rows = [row for row in points.points(Ledger(folder).finished()) if row["split"] == "fit"]
  if not rows:
    raise DataError(f"{folder}: no finished run yet; do a first grid")
  column = lambda name: np.array([row[name] for row in rows], float)
  n, t, lr, batch, loss = map(column, ("params", "tokens", "lr", "batch_tokens", "loss"))
  sigma = noise(rows)
  response = adaptive.fit(n, t, lr, batch, loss, sigma)
  runs = np.array([row["run"] for row in rows])
  jacobians = [response.jacobian(*(x[runs == run] for x in (n, t, lr, batch))) for run in np.unique(runs)]
  now = adaptive.covariance(response, jacobians, sigma)
  choices = adaptive.choose(
    response, now, _candidates(loaded, response, t), how_many, sigma,
    aim=None if aim is None else adaptive.predicted_loss(*aim), power=1.0,
  )  # fmt: skip
  return {
    "sigma": sigma,
    "runs": [
      {
        "params": c.candidate.params, "tokens": max(c.candidate.tokens), "lr": c.candidate.lr,
        "batch_tokens": c.candidate.batch_tokens, "flops": c.candidate.cost, "gain": c.gain,
        "gain_per_flop": c.gain_per_cost,
      }
      for c in choices
    ],
  }  # fmt: skip


def noise(rows: Sequence[Mapping[str, Any]]) -> float:
  """Standard deviation of a run's loss between seeds, pooled over whatever was repeated; else `NOISE` of the loss."""
  keys = ("params", "tokens", "lr", "batch_tokens")
  groups: dict[tuple, list[float]] = {}
  for row in rows:
    groups.setdefault(tuple(row[key] for key in keys), []).append(row["loss"])
  squares = sum(np.square(np.array(losses) - np.mean(losses)).sum() for losses in groups.values())
  freedom = sum(len(losses) - 1 for losses in groups.values())
  return float(np.sqrt(squares / freedom)) if freedom else NOISE * float(np.mean([row["loss"] for row in rows]))


def _candidates(loaded: sweep.Sweep, response: adaptive.Response, t: np.ndarray) -> list[adaptive.Candidate]:
  base = loaded.module.get_config()
  sizes = {run.config.model.size for run in loaded.runs()}
  found = []
  for size in sorted(sizes):
    model = design_lib.sized(base, size)
    for horizon in float(t.max()) * np.array([1.0, 2.0, 4.0]):
      best_lr, best_batch = response.best(model.params, horizon)
      for a, b in itertools.product((-1, 0, 1), repeat=2):
        clips = max(1, round(best_batch * 2.0**b / model.clip_tokens))
        tokens = (horizon / 4, horizon / 2, horizon)
        found.append(
          adaptive.Candidate(
            model.params, float(f"{best_lr * 2.0**a:.3g}"), clips * model.clip_tokens, tokens, model.flops(horizon)
          )
        )
  return found


def following_text(answer: Mapping[str, Any]) -> str:
  """The next runs as a table."""
  drawn = rich.table.Table(title=f"noise of a run: {answer['sigma']:.2g}", title_justify="left")
  for name in ("N", "T", "B", "lr", "FLOPs", "gain", "gain / 1e12 FLOPs"):
    drawn.add_column(name, justify="right")
  for run in answer["runs"]:
    drawn.add_row(
      count(run["params"]), count(run["tokens"]), count(run["batch_tokens"]), f"{run['lr']:.3g}", f"{run['flops']:.3g}",
      f"{run['gain']:.3f}", f"{run['gain_per_flop'] * 1e12:.3g}",
    )  # fmt: skip
  return _drawn(drawn)
