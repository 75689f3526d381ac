"""Everything that a table of runs says: surface, laws of learning rate and batch, checks; as text and as JSON."""

import dataclasses
import datetime
import math
from typing import Any

import numpy as np

from kling_jax import __version__
from kling_jax.errors import DataError
from kling_jax.models.flop_rules import EXACT, FlopRule
from kling_jax.scaling import fit as fit_lib
from kling_jax.scaling import holdout, influence, loglinear, lr_batch
from kling_jax.scaling.fit import LEVEL, PARAMETERS, Fit, Options
from kling_jax.scaling.laws import SIX_NT, Surface
from kling_jax.scaling.table import RunTable

BEYOND = 10.0  # default target: so many times the largest budget of the table


@dataclasses.dataclass(frozen=True)
class Fixed:
  """The same runs with one learning rate and batch for all (N, T), against the tuned ones: the paper's Fig. 6.

  Attributes:
    lr, batch_tokens: those that are best for the cheapest (N, T).
    table: its run of each (N, T), the nearest in logs. surface: fitted to them.
    regret: mean relative loss above the tuned runs.
    residual, tuned_residual: root mean squares of the two fits.
  """

  lr: float
  batch_tokens: float
  table: RunTable
  surface: Surface
  regret: float
  residual: float
  tuned_residual: float


@dataclasses.dataclass(frozen=True)
class Analysis:
  """A table and what was made of it.

  Attributes:
    raw: all rows as read. table: the rows of the surface: one for each (N, T) where learning rates and batches vary.
    fit: the surface. other: the surface by the other method, as a check against outliers.
    checked: the hold-out, or None. verdict: what it says.
    hyper: laws of learning rate and batch, or None; hyper_reason: why there are none. fixed: what not tuning them does.
    valleys: IsoFLOP parabolas; valley_law: N_opt(C) through them, or None.
    runs, sizes: what leaving one out does. told: what the data can tell.
    target: budget in FLOPs that N_opt and its loss are quoted at. rule: how FLOPs are counted.
    warnings: everything that a reader must know.
  """

  raw: RunTable
  table: RunTable
  fit: Fit
  other: Surface
  checked: holdout.Holdout | None
  verdict: str
  hyper: lr_batch.Laws | None
  hyper_reason: str
  fixed: Fixed | None
  valleys: list[loglinear.Valley]
  valley_law: loglinear.PowerFit | None
  runs: list[influence.Shift]
  sizes: list[influence.Shift]
  told: influence.Identifiability
  target: float
  rule: FlopRule
  warnings: tuple[str, ...]

  def answer(self, flops: float | None = None) -> dict[str, Any]:
    """The keys that others rely on; with `flops` the intervals hold the optimum at that budget too."""
    law = {name: float(getattr(self.fit.surface, name)) for name in PARAMETERS}
    return law | {
      "objective": self.fit.objective,
      "intervals": {name: list(pair) for name, pair in self.fit.intervals(flops, self.rule).items()},
      "holdout": None if self.checked is None else self.checked.to_json(),
      "verdict": self.verdict,
    }

  def to_json(self) -> dict[str, Any]:
    """All of it, draws included, so that predictions need no second fit."""
    fitted = self.fit
    optimum = fitted.surface.optimum(self.target, self.rule)
    return self.answer(self.target) | {
      "format": "kling_jax scaling fit 1",
      "version": __version__,
      "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "level": LEVEL,
      "method": fitted.options.method,
      "delta": fitted.options.delta,
      "bootstrap": fitted.bootstrap,
      "sigma": fitted.sigma,
      "rows": len(self.raw),
      "fitted_rows": len(fitted.table),
      "box": self.box,
      "flop_rule": str(self.rule),
      "target": {"flops": self.target} | {f"{k}_opt": float(v) for k, v in optimum._asdict().items()},
      "other_method": dict(zip(PARAMETERS, dataclasses.astuple(self.other), strict=True)),
      "identifiability": self.told.to_json(),
      "influence": {"runs": [s.to_json() for s in self.runs], "sizes": [s.to_json() for s in self.sizes]},
      "isoflop": {
        "valleys": [
          {"flops": v.flops, "params": v.params, "loss": v.loss, "stderr_log_params": v.stderr, "inside": v.inside}
          for v in self.valleys
        ],
        "law": None if self.valley_law is None else _power_json(self.valley_law),
      },
      "hyper": None if self.hyper is None else _hyper_json(self.hyper),
      "fixed_hyper": None
      if self.fixed is None
      else {
        "lr": self.fixed.lr,
        "batch_tokens": self.fixed.batch_tokens,
        "mean_regret": self.fixed.regret,
        "residual": self.fixed.residual,
        "tuned_residual": self.fixed.tuned_residual,
        "params_exponent": float(self.fixed.surface.params_exponent),
      },
      "warnings": list(self.warnings),
      "draws": {name: np.asarray(getattr(fitted.draws, name)).tolist() for name in PARAMETERS},
      "dof": fitted.dof,
    }

  @property
  def box(self) -> dict[str, list[float]]:
    """{params | tokens | flops: [lowest, highest]} of the fitted rows."""
    table = self.fit.table
    flops = self.rule.flops(table.params, table.tokens)
    return {name: [float(values.min()), float(values.max())] for name, values in
            (("params", table.params), ("tokens", table.tokens), ("flops", flops))}  # fmt: skip


def analyse(
  table: RunTable,
  options: Options | None = None,
  flops: float | None = None,
  rule: FlopRule | None = None,
  least_tokens: float = 0.0,
) -> Analysis:
  """Fits and checks a table.

  Args:
    table: runs; with columns lr and batch_tokens and several of them for an (N, T), the surface is that of the tuned
      losses, and laws of learning rate and batch are fitted.
    flops: budget to quote the optimum at; ten times the largest one by default.
    rule: how FLOPs are counted; the table's own rule by default, else 6NT.
    least_tokens: rows of fewer tokens are left out of the surface (not out of the laws of learning rate and batch).

  Raises:
    DataError: a table that cannot carry the surface.
  """
  options = options or Options()
  nearest, said = _rule(table)
  rule = rule or nearest
  raw, warnings = table, [*table.warnings, *(said if rule == nearest else ())]
  hyper, reason = None, "the table has no grids of learning rate and batch"
  if lr_batch.has_grids(table):
    table = lr_batch.tuned(raw)
    warnings.append(f"the surface is fitted to the tuned loss of {len(table)} (N, T), from {len(raw)} runs")
    try:
      hyper = lr_batch.fit(raw.fitted)
      warnings += hyper.warnings
    except DataError as error:
      reason = str(error)
      warnings.append(f"no laws of learning rate and batch: {reason}")
  if (table.tokens < least_tokens).any():
    warnings.append(f"{(table.tokens < least_tokens).sum()} rows below {least_tokens:.4g} tokens are left out")
    table = table.take(table.tokens >= least_tokens)
  fitted = fit_lib.fit(table, options)
  warnings += fitted.warnings
  target = flops or BEYOND * float(rule.flops(fitted.table.params, fitted.table.tokens).max())
  other = _other(fitted)
  checked = holdout.check(table, options, fitted)
  told = influence.identifiability(fitted)
  warnings += told.warnings + tuple(_doubts(fitted, other, checked, target, rule))
  valleys, valley_law = _isoflop(fitted.table, rule)
  return Analysis(
    raw=raw, table=table, fit=fitted, other=other, checked=checked, verdict=holdout.verdict(checked), hyper=hyper,
    hyper_reason="" if hyper else reason,
    fixed=None if hyper is None else _fixed(raw, fitted), valleys=valleys, valley_law=valley_law,
    runs=influence.runs(fitted, target, rule), sizes=influence.sizes(fitted, target, rule), told=told, target=target,
    rule=rule, warnings=tuple(warnings),
  )  # fmt: skip


def _rule(table: RunTable) -> tuple[FlopRule, list[str]]:
  """How the table counts FLOPs, as a function of N; where it counts exactly, the nearest such function."""
  if table.flop_rule not in ("", EXACT):
    return FlopRule.parse(table.flop_rule), []
  if not table.flop_rule or table.flops is None:
    return SIX_NT, []
  # C / T = 3/4 N (7 + n / N^(1/3)) of the scaling family: the context n that fits best.
  share = table.flops / table.tokens / (0.75 * table.params) - 7
  rule = FlopRule("cross_dit", max(0.0, float(np.median(share * table.params ** (1 / 3)))))
  off = float(np.abs(rule.flops(table.params, table.tokens) / table.flops - 1).max())
  return rule, [f"FLOPs are counted exactly; as a function of N they are nearest to {rule}, within {off:.1%}"]


def _other(fitted: Fit) -> Surface:
  method = "huber" if fitted.options.method == "vp" else "vp"
  changed = dataclasses.replace(fitted.options, method=method)
  return fit_lib.point(fitted.table, changed)[0]


def _fixed(raw: RunTable, fitted: Fit) -> Fixed:
  tuned = fitted.table
  assert tuned.lr is not None and tuned.batch_tokens is not None
  cheapest = int((tuned.params * tuned.tokens).argmin())
  lr, batch = float(tuned.lr[cheapest]), float(tuned.batch_tokens[cheapest])
  seen = raw.fitted.take(raw.fitted.tokens >= tuned.tokens.min() * (1 - 1e-9))
  table = lr_batch.fixed(seen, lr, batch)
  surface, _ = fit_lib.point(table, fitted.options)
  rms = lambda of, law: float(np.sqrt(np.mean((of.loss - law(of.params, of.tokens)) ** 2)))
  return Fixed(
    lr, batch, table, surface, float((table.loss / tuned.loss - 1).mean()), rms(table, surface),
    rms(tuned, fitted.surface),
  )  # fmt: skip


def _isoflop(table: RunTable, rule: FlopRule) -> tuple[list[loglinear.Valley], loglinear.PowerFit | None]:
  flops = rule.flops(table.params, table.tokens)
  found = loglinear.valleys(table.params, table.tokens, flops, table.loss, table.weight)
  return found, loglinear.valley_law(found) if sum(valley.inside for valley in found) >= 3 else None


def _doubts(fitted: Fit, other: Surface, checked: holdout.Holdout | None, target: float, rule: FlopRule) -> list[str]:
  said = []
  far = influence.outliers(fitted)
  if len(far):
    table, row = fitted.table, far[0]
    rows = f"{len(far)} row" + ("s" if len(far) > 1 else "")
    said.append(
      f"{rows} beyond {influence.OUTLIER} robust standard deviations (the furthest: "
      f"{table.params[row]:.4g} parameters, {table.tokens[row]:.4g} tokens, loss {table.loss[row]:.4g}); compare huber"
    )
  found = fitted.intervals()
  apart = [
    f"{name} {getattr(fitted.surface, name):.3g} against {getattr(other, name):.3g}"
    for name in ("alpha", "beta", "E")
    if not found[name][0] <= getattr(other, name) <= found[name][1]
    and abs(getattr(other, name) - getattr(fitted.surface, name)) > 0.01 * getattr(other, name)
  ]
  if apart:
    said.append(f"least squares and Huber disagree beyond the intervals: {', '.join(apart)}; look at the residuals")
  if checked is not None and checked.law_error > 0.01:
    said.append(f"the hold-out says little: without those runs the law is uncertain by {checked.law_error:.1%} there")
  low, high = fitted.intervals(target, rule)["params_opt"]
  if high > 3 * low:
    said.append(f"N_opt at {target:.3g} FLOPs is known to a factor of {high / low:.3g} only: {low:.3g} to {high:.3g}")
  return said


def _power_json(law: loglinear.PowerFit) -> dict[str, Any]:
  return {
    "coefficient": law.law.coefficient,
    "exponents": dict(law.law.exponents),
    "intervals": {name: list(pair) for name, pair in law.intervals().items()},
    "residual": law.residual,
    "points": law.points,
    "estimate": law.estimate.tolist(),
    "covariance": law.covariance.tolist(),
    "dof": law.dof if math.isfinite(law.dof) else None,
  }


def power_from_json(values: dict[str, Any]) -> loglinear.PowerFit:
  """The inverse of what `to_json` writes for a power law."""
  return loglinear.PowerFit(
    tuple(values["exponents"]), np.array(values["estimate"]), np.array(values["covariance"]),
    math.inf if values["dof"] is None else values["dof"], values["residual"], values["points"],
  )  # fmt: skip


def _hyper_json(laws: lr_batch.Laws) -> dict[str, Any]:
  return {
    "lr": _power_json(laws.lr),
    "batch_tokens": _power_json(laws.batch_tokens),
    "curvature": laws.curvature.tolist(),
    "tilt": laws.tilt,
    "cells": [
      {"params": c.params, "tokens": c.tokens, "lr": c.lr, "batch_tokens": c.batch_tokens, "loss": c.loss,
       "runs": len(c.rows), "left_out": c.reason}
      for c in laws.cells + laws.left_out
    ],
  }  # fmt: skip


def text(found: Analysis) -> str:
  """What a person reads in the terminal."""
  fitted, law = found.fit, found.fit.surface
  pairs = fitted.intervals(found.target, found.rule)
  line = lambda name, value: f"  {name:<16}{value:>12.5g}   {pairs[name][0]:.5g} to {pairs[name][1]:.5g}"
  how = f"{fitted.options.method}" + (f", delta {fitted.options.delta:g}" if fitted.options.method == "huber" else "")
  best = law.optimum(found.target, found.rule)
  lines = [
    f"L = E + A/N^alpha + B/T^beta on {len(fitted.table)} rows ({how}); 90 % intervals from "
    f"{len(np.atleast_1d(fitted.draws.E))} draws of {'runs' if fitted.bootstrap == 'runs' else 'noise'}",
    *(line(name, getattr(law, name)) for name in PARAMETERS),
    line("params_exponent", law.params_exponent) + "   N_opt ~ C^a",
    f"objective {fitted.objective:.8g}; noise of a run {fitted.sigma:.3g} in loss",
    f"optimum at {found.target:.3g} FLOPs ({found.rule}):",
    *(line(f"{name}_opt", float(value)) for name, value in best._asdict().items()),
  ]
  if found.hyper is not None:
    lines += [_law_line("lr", found.hyper.lr), _law_line("batch_tokens", found.hyper.batch_tokens)]
  if found.valley_law is not None:
    a = found.valley_law.intervals()["flops"]
    lines.append(f"IsoFLOP parabolas: N_opt ~ C^{found.valley_law.estimate[1]:.3f} ({a[0]:.3f} to {a[1]:.3f})")
  if found.checked is not None:
    h = found.checked
    lines.append(
      f"hold-out ({h.source}): {len(h.rows)} runs, predicted - measured {h.error.mean():+.2%} on average, "
      f"{abs(h.sigmas):.1f} sigma, worst {h.error[np.abs(h.error).argmax()]:+.2%}"
    )
  return "\n".join([*lines, f"verdict: {found.verdict}"])


def _law_line(name: str, law: loglinear.PowerFit) -> str:
  pairs = law.intervals()
  terms = [f"{x}^{value:.3f} ({pairs[x][0]:.3f} to {pairs[x][1]:.3f})" for x, value in law.law.exponents.items()]
  return f"{name} = {law.law.coefficient:.4g} " + " ".join(terms) + f", {law.points} cells"
