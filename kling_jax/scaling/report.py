"""The page of a fit: figures, verdict, pictures, what the law rests on; with fit.json and the pictures beside it."""

import dataclasses
import os
import pathlib

import numpy as np

from kling_jax import files, page
from kling_jax.answers import plain
from kling_jax.scaling import influence, plots
from kling_jax.scaling.analysis import Analysis
from kling_jax.scaling.fit import PARAMETERS

SHOWN = 25  # rows of a table


def write(found: Analysis, folder: str | os.PathLike[str], title: str = "Scaling law") -> pathlib.Path:
  """Writes fit.json, one PNG a picture and index.html, which holds them all; returns the page's path.

  Raises:
    UsageError: matplotlib is missing.
  """
  folder = pathlib.Path(folder)
  made = plots.pictures(found)
  folder.mkdir(parents=True, exist_ok=True)
  files.write_json(folder / "fit.json", plain(found.to_json()))
  for name, (_, data) in made.items():
    with files.whole(folder / f"{name}.png") as path:
      path.write_bytes(data)
  document = page.Page(title, _subtitle(found))
  _law(document, found)
  document.section("Pictures")
  wide = ("residuals", "lr_batch", "fixed")
  for names, width in (([name for name in made if name not in wide], 460), (wide, 900)):
    document.gallery([page.Tile(made[name][1], made[name][0]) for name in names if name in made], width=width)
  _holdout(document, found)
  _hyper(document, found)
  _rests(document, found)
  document.write(folder / "index.html")
  return folder / "index.html"


def _subtitle(found: Analysis) -> str:
  table = found.fit.table
  return (
    f"{len(found.raw)} runs, {len(table)} fitted rows, N {table.params.min():.3g} to {table.params.max():.3g}, "
    f"T {table.tokens.min():.3g} to {table.tokens.max():.3g}; verdict: {found.verdict}"
  )


def _law(document: page.Page, found: Analysis) -> None:
  fitted, law = found.fit, found.fit.surface
  document.section("Law", "L = E + A / N^alpha + B / T^beta; N parameters, T tokens, raw counts; 90 % intervals.")
  pairs = fitted.intervals(found.target, found.rule)
  best = law.optimum(found.target, found.rule)
  document.facts({
    f"N_opt at {found.target:.3g} FLOPs": f"{float(best.params):.3g}",
    "T_opt": f"{float(best.tokens):.3g}",
    "loss there": f"{float(best.loss):.5g}",
    "N_opt ~ C^a": f"{law.params_exponent:.3f}",
    "noise of a run": f"{fitted.sigma:.2g}",
  })  # fmt: skip
  values = {name: getattr(law, name) for name in PARAMETERS} | {"params_exponent": law.params_exponent}
  values |= {f"{name}_opt": float(value) for name, value in best._asdict().items()}
  others = dict(zip(PARAMETERS, dataclasses.astuple(found.other), strict=True))
  other = "huber" if fitted.options.method == "vp" else "vp"
  document.table(
    ["", fitted.options.method, "from", "to", other],
    [(name, value, *map(float, pairs[name]), others.get(name, "")) for name, value in values.items()],
  )
  for warning in found.warnings:
    document.text(f"⚠ {warning}")


def _holdout(document: page.Page, found: Analysis) -> None:
  checked = found.checked
  if checked is None:
    document.section("Hold-out", found.verdict)
    return
  document.section(
    "Hold-out",
    f"{checked.source}: {len(checked.rows)} runs predicted from the {len(checked.fit.table)} others. Verdict: "
    f"{checked.verdict}. Mean error {checked.error.mean():+.3%}, {abs(checked.sigmas):.1f} sigma; "
    f"{checked.inside:.0%} of the losses lie inside the 90 % interval of a run.",
  )
  order = np.argsort(-checked.rows.params * checked.rows.tokens)[:SHOWN]
  document.table(
    ["N", "T", "measured", "predicted", "error"],
    [
      (float(checked.rows.params[k]), float(checked.rows.tokens[k]), f"{checked.rows.loss[k]:.5g}",
       f"{checked.predicted[k]:.5g}", f"{checked.error[k]:+.3%}")
      for k in order
    ],
  )  # fmt: skip
  if len(checked.rows) > SHOWN:
    document.text(f"... and {len(checked.rows) - SHOWN} more in fit.json.")


def _hyper(document: page.Page, found: Analysis) -> None:
  if found.hyper is None:
    document.section("Learning rate and batch", found.hyper_reason)
    return
  laws = found.hyper
  document.section("Learning rate and batch", f"Power laws through the best of {len(laws.cells)} (N, T), raw counts.")
  rows = []
  for name, law in (("lr", laws.lr), ("batch_tokens", laws.batch_tokens)):
    pairs = law.intervals()
    rows.append((name, "coefficient", law.law.coefficient, *pairs["coefficient"]))
    rows += [(name, f"exponent of {x}", value, *pairs[x]) for x, value in law.law.exponents.items()]
  document.table(["", "", "value", "from", "to"], rows)
  document.text(
    f"Where another batch is forced, the best learning rate moves by (B / B_opt)^{laws.tilt:.3f}. A learning rate off "
    f"by 2 costs {50 * laws.curvature[0, 0] * np.log(2) ** 2:.2f} %, a batch off by 2 costs "
    f"{50 * laws.curvature[1, 1] * np.log(2) ** 2:.2f} % of the loss."
  )
  if laws.left_out:
    document.table(["N", "T", "left out, because"], [(c.params, c.tokens, c.reason) for c in laws.left_out[:SHOWN]])


def _rests(document: page.Page, found: Analysis) -> None:
  document.section(
    "What it rests on",
    f"N_opt at {found.target:.3g} FLOPs with something left out; the share is of half the interval: beyond 1 the law "
    "hangs on it.",
  )
  for title, shifts in (("run", found.runs), ("size", found.sizes)):
    if shifts:
      document.table([f"{title} left out", "rows", "N_opt", "loss", "share of interval"],
                     [_shift(shift) for shift in shifts[:SHOWN]])  # fmt: skip
  spans = ", ".join(f"{name} {factor:.3g}x" for name, factor in found.told.spans.items())
  document.text(f"The runs span: {spans}. Condition of the parameters' correlations: {found.told.condition:.3g}.")


def _shift(shift: influence.Shift) -> tuple[object, ...]:
  return (shift.left_out, shift.rows, f"{shift.params_opt:+.1%}", f"{shift.loss_opt:+.3%}", f"{shift.share:+.2f}")
