"""Pictures of a fit: surface with hold-outs, IsoFLOP curves, N_opt(C), residuals, heat maps, fixed against tuned."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from kling_jax.errors import UsageError
from kling_jax.page import COLOURS
from kling_jax.scaling import lr_batch, published
from kling_jax.scaling.analysis import Analysis

MENDING = "plots need matplotlib: run `pip install 'kling_jax[sweep]'`"
DPI = 130
PANELS = 6  # heat maps in one picture


def require() -> None:
  """Raises UsageError where plots cannot be made, so that a long fit can say so before it starts."""
  _figure(1, 1)


def _figure(rows: int, columns: int, width: float = 6.4, height: float = 4.4, **options: Any) -> tuple[Any, Any]:
  try:
    from matplotlib.figure import Figure
  except ImportError as error:
    raise UsageError(MENDING) from error
  figure = Figure(figsize=(width * columns, height * rows), dpi=DPI, layout="constrained")  # no global state of pyplot
  return figure, figure.subplots(rows, columns, squeeze=False, **options)


def png(figure: Any) -> bytes:
  """The picture as PNG."""
  data = io.BytesIO()
  figure.savefig(data, format="png")
  return data.getvalue()


def pictures(found: Analysis) -> dict[str, tuple[str, bytes]]:
  """{file stem: (caption, PNG)} of every picture that the table allows."""
  made = {
    "surface": ("Loss over N and T by the fit; dots are runs, diamonds are held out with their error.", surface(found)),
    "residuals": ("Measured minus fitted loss, relative, against N, T and C.", residuals(found)),
    "optimum": ("Compute-optimal N with its 90 % band, beside laws in print.", optimum(found)),
    "trade_off": ("Loss above the optimum for smaller or larger models of the same FLOPs, with its 90 % band.",
                  trade_off(found)),
  }  # fmt: skip
  if len(found.valleys) > 1:
    made["isoflop"] = ("Runs of each budget, the fitted surface (solid) and parabolas (dashed, dots).", isoflop(found))
  if found.hyper is not None:
    made["lr_batch"] = ("Loss above the best over learning rate and batch; cross: fitted optimum, plus: the law.",
                        heat_maps(found))  # fmt: skip
  if found.fixed is not None:
    made["fixed"] = ("One learning rate and batch for all (N, T) against tuned ones (Fig. 6 of arXiv 2411.17470).",
                     fixed(found))  # fmt: skip
  return {name: (caption, png(figure)) for name, (caption, figure) in made.items()}


def _grid(values: np.ndarray, reach: float = 1.3, count: int = 120) -> np.ndarray:
  return np.geomspace(values.min() / reach, values.max() * reach, count)


def surface(found: Analysis) -> Any:
  """Contours of the reducible loss over (N, T)."""
  table, law = found.fit.table, found.fit.surface
  held = None if found.checked is None else found.checked.rows
  everything = [table] if held is None else [table, held]
  n = _grid(np.concatenate([part.params for part in everything]))
  t = _grid(np.concatenate([part.tokens for part in everything]))
  figure, axes = _figure(1, 1, 7.4, 5.2)
  axis = axes[0, 0]
  loss = law(n[None], t[:, None])
  levels = law.E + np.geomspace(loss.min() - law.E, loss.max() - law.E, 16)
  shades = axis.contourf(n, t, loss, levels=levels, cmap="viridis_r", alpha=0.75)
  figure.colorbar(shades, ax=axis, label="loss", format="%.4g")
  seen = table if held is None or found.checked is None else found.checked.fit.table
  axis.plot(seen.params, seen.tokens, "o", color="k", ms=3, label="runs")
  if held is not None and found.checked is not None:
    axis.plot(held.params, held.tokens, "D", color=COLOURS[1], mec="w", ms=6, label="held out")
    for row in np.argsort(-np.abs(found.checked.error))[:6]:
      axis.annotate(f"{found.checked.error[row]:+.2%}", (held.params[row], held.tokens[row]), xytext=(-6, 5),
                    textcoords="offset points", fontsize=7, ha="right")  # fmt: skip
  axis.legend(loc="upper left", fontsize=8)
  _logs(axis, "parameters N", "tokens T")
  return figure


def _logs(axis: Any, x: str, y: str, y_log: bool = True) -> None:
  from matplotlib import ticker

  axis.set_xscale("log")
  if y_log:
    axis.set_yscale("log")
  for side, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
    if (side is axis.xaxis or y_log) and high < 40 * low:  # too short for powers of ten alone
      side.set_major_locator(ticker.MaxNLocator(4) if high < 4 * low else ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
      side.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.3g}"))
      side.set_minor_formatter(ticker.NullFormatter())
  axis.set_xlabel(x)
  axis.set_ylabel(y)
  axis.grid(alpha=0.25)


def residuals(found: Analysis) -> Any:
  """Relative residuals in three panels, hold-outs marked."""
  fitted = found.fit
  table = fitted.table
  figure, axes = _figure(1, 3, 4.2, 3.6, sharey=True)
  relative = 100 * fitted.residuals / table.loss
  parts = [(table.params, table.tokens, relative, "o", COLOURS[0], "fitted")]
  if found.checked is not None:
    rows = found.checked.rows
    parts.append((rows.params, rows.tokens, -100 * found.checked.error, "D", COLOURS[1], "held out"))
  for axis, name in zip(axes[0], ("N", "T", "C"), strict=True):
    for params, tokens, values, mark, colour, label in parts:
      x = {"N": params, "T": tokens, "C": found.rule.flops(params, tokens)}[name]
      axis.plot(x, values, mark, color=colour, ms=3.5, alpha=0.7, label=label)
    axis.axhline(0, color="k", lw=0.8)
    _logs(axis, {"N": "parameters N", "T": "tokens T", "C": "FLOPs C"}[name], "", y_log=False)
  axes[0, 0].set_ylabel("measured - fitted, percent of the loss")
  axes[0, 0].legend(fontsize=8)
  return figure


def optimum(found: Analysis) -> Any:
  """N_opt(C) with its band, parabola minima, and laws in print."""
  table = found.fit.table
  flops = found.rule.flops(table.params, table.tokens)
  c = np.geomspace(flops.min(), max(found.target, flops.max()), 60)
  figure, axes = _figure(1, 1, 7.4, 5.0)
  axis = axes[0, 0]
  low, high = found.fit.interval(found.fit.optimum_draws(c, found.rule).params)
  axis.fill_between(c, low, high, color=COLOURS[0], alpha=0.2, lw=0)
  axis.plot(c, found.fit.surface.optimum(c, found.rule).params, color=COLOURS[0], lw=2, label="this fit, 90 % band")
  inside = [valley for valley in found.valleys if valley.inside]
  if inside:
    axis.errorbar([v.flops for v in inside], [v.params for v in inside],
                  yerr=[[v.params * (1 - np.exp(-1.645 * v.stderr)) for v in inside],
                        [v.params * (np.exp(1.645 * v.stderr) - 1) for v in inside]],
                  fmt="o", ms=4, color="k", capsize=2, label="IsoFLOP parabolas")  # fmt: skip
  colours = iter([*COLOURS[1:], "#777777", "#aa3377"])
  for name, law in published.LAWS.items():
    if "params" in law.quantities:
      axis.plot(c, law("params", flops=c), "--", lw=1, color=next(colours), label=name)
  axis.axvspan(flops.min(), flops.max(), color="k", alpha=0.05, lw=0)
  axis.legend(fontsize=7)
  _logs(axis, f"FLOPs C ({found.rule}); shaded: fitted runs", "compute-optimal N")
  return figure


def isoflop(found: Analysis) -> Any:
  """Loss over N at each budget."""
  table, law = found.fit.table, found.fit.surface
  figure, axes = _figure(1, 1, 7.4, 5.0)
  axis = axes[0, 0]
  shades = _shades(len(found.valleys))
  for valley, colour in zip(found.valleys, shades, strict=True):
    rows = valley.rows
    n = _grid(table.params[rows], 1.15, 80)
    axis.plot(table.params[rows], table.loss[rows], "o", ms=4, color=colour, label=f"{valley.flops:.2g} FLOPs")
    axis.plot(n, law(n, found.rule.tokens(n, valley.flops)), color=colour, lw=1.5)
    parabola = valley.loss + valley.curve * np.log(n / valley.params) ** 2
    near = parabola <= 1.02 * table.loss[rows].max()
    axis.plot(n[near], parabola[near], "--", color=colour, lw=0.9)
    axis.plot(valley.params, valley.loss, "*", ms=9, color=colour, mec="k", mew=0.5)
  axis.legend(fontsize=7, ncols=2)
  _logs(axis, "parameters N", "loss", y_log=False)
  return figure


def _shades(count: int) -> Sequence[Any]:
  from matplotlib import colormaps

  return [colormaps["plasma"](x) for x in np.linspace(0.0, 0.85, max(count, 1))]


def heat_maps(found: Analysis) -> Any:
  """Relative loss over (lr, B) of up to six (N, T), spread over their cost; of those with the most runs."""
  assert found.hyper is not None and found.raw.lr is not None and found.raw.batch_tokens is not None
  most = max(len(cell.rows) for cell in found.hyper.cells)
  grids = [cell for cell in found.hyper.cells if len(cell.rows) > most / 2]
  cells = sorted(grids, key=lambda cell: cell.params * cell.tokens)
  cells = [cells[k] for k in np.unique(np.linspace(0, len(cells) - 1, min(PANELS, len(cells))).round().astype(int))]
  raw = found.raw.fitted
  assert raw.lr is not None and raw.batch_tokens is not None
  columns = min(3, len(cells))
  figure, axes = _figure(-(-len(cells) // columns), columns, 4.3, 3.5)
  for axis in axes.flat[len(cells) :]:
    axis.set_visible(False)
  for axis, cell in zip(axes.flat, cells, strict=False):
    _heat_map(axis, figure, cell, raw.lr[cell.rows], raw.batch_tokens[cell.rows], raw.loss[cell.rows], found.hyper)
  return figure


def _heat_map(axis: Any, figure: Any, cell: lr_batch.Cell, lr, batch, loss, laws: lr_batch.Laws) -> None:
  assert cell.hessian is not None
  x, y = _grid(lr), _grid(batch)
  away = np.log(np.stack(np.meshgrid(x / cell.lr, y / cell.batch_tokens), axis=-1))
  bowl = 100 * np.einsum("yxi,ij,yxj->yx", away, cell.hessian, away) / 2
  axis.contour(x, y, bowl, levels=[0.1, 0.25, 0.5, 1.0, 2.0], colors="k", linewidths=0.6, alpha=0.6)
  shown = axis.scatter(lr, batch, c=np.clip(100 * (loss / cell.loss - 1), 0, 2), cmap="viridis_r", s=26, vmin=0, vmax=2)
  figure.colorbar(shown, ax=axis, label="loss above the best, %")
  given = {"params": cell.params, "tokens": cell.tokens}
  axis.plot(cell.lr, cell.batch_tokens, "x", color=COLOURS[1], ms=9, mew=2.5)
  axis.plot(laws.lr.law(**given), laws.batch_tokens.law(**given), "+", color="k", ms=10, mew=2)
  axis.set_title(f"N {cell.params:.3g}, T {cell.tokens:.3g}", fontsize=9)
  _logs(axis, "learning rate", "batch, tokens")


def trade_off(found: Analysis) -> Any:
  """Relative loss over N / N_opt at the target budget, with its band."""
  law, rule = found.fit.surface, found.rule
  best = law.optimum(found.target, rule)
  share = np.geomspace(1 / 8, 8, 80)
  size = share * float(best.params)
  tokens = rule.tokens(size, found.target)
  figure, axes = _figure(1, 1, 6.8, 4.4)
  axis = axes[0, 0]
  draws = found.fit.draws
  at = draws(size[:, None], tokens[:, None]) / draws.optimum(found.target, rule).loss - 1
  low, high = found.fit.interval(100 * at)
  axis.fill_between(share, low, high, color=COLOURS[0], alpha=0.2, lw=0)
  axis.plot(share, 100 * (law(size, tokens) / float(best.loss) - 1), color=COLOURS[0], lw=2)
  axis.set_ylim(0, max(0.5, 1.2 * float(100 * (law(size, tokens).max() / best.loss - 1))))
  _logs(
    axis, f"N / N_opt at {found.target:.3g} FLOPs (N_opt {best.params:.3g})", "loss above the lowest, %", y_log=False
  )
  axis.set_xticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
  axis.minorticks_off()
  return figure


def fixed(found: Analysis) -> Any:
  """Losses and N_opt(C) with one (lr, B) for all against tuned ones."""
  assert found.fixed is not None
  other, tuned = found.fixed, found.fit
  figure, axes = _figure(1, 2, 5.6, 4.4)
  flops = found.rule.flops(tuned.table.params, tuned.table.tokens)
  left, right = axes[0]
  left.plot(flops, 100 * (other.table.loss / tuned.table.loss - 1), "o", color=COLOURS[1], ms=4)
  left.axhline(0, color="k", lw=0.8)
  _logs(left, "FLOPs C", "loss above tuned, %", y_log=False)
  left.set_title(f"lr {other.lr:.3g}, batch {other.batch_tokens:.3g} for all", fontsize=9)
  c = np.geomspace(flops.min(), max(found.target, flops.max()), 60)
  low, high = tuned.interval(tuned.optimum_draws(c, found.rule).params)
  right.fill_between(c, low, high, color=COLOURS[0], alpha=0.2, lw=0)
  for law, colour, name in ((tuned.surface, COLOURS[0], "tuned"), (other.surface, COLOURS[1], "fixed")):
    label = f"{name}: exponent {law.params_exponent:.3f}"
    right.plot(c, law.optimum(c, found.rule).params, color=colour, lw=2, label=label)
  right.legend(fontsize=8)
  _logs(right, "FLOPs C", "compute-optimal N")
  return figure
