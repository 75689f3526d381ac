"""From a budget to a run: N, T, learning rate, batch, steps and the loss to expect, from a law in print or a fit."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from kling_jax.errors import DataError, UsageError
from kling_jax.models.flop_rules import FlopRule
from kling_jax.scaling import analysis, intervals, loglinear, published
from kling_jax.scaling.fit import LEVEL, PARAMETERS
from kling_jax.scaling.laws import Law, Surface

SHARES = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2)  # of N_opt in the trade-off of smaller models
FAR = 10.0  # beyond the fitted box by this factor, a prediction carries a warning


@dataclasses.dataclass(frozen=True)
class Source:
  """What predictions are made from.

  Attributes:
    law: its surface and, where it has them, lr and batch_tokens.
    rule: how FLOPs are counted.
    draws: surfaces of the bootstrap, or None for a law in print. dof: that their percentiles are expanded by.
    sigma: standard deviation of a run's loss about the law; None where nobody has stated it.
    lr, batch_tokens: fitted power laws with their errors, or None.
    tilt: d log lr / d log B of the best learning rate; None where it is not known.
    warnings: of the fit.
  """

  law: Law
  rule: FlopRule
  draws: Surface | None = None
  dof: float = math.inf
  sigma: float | None = None
  lr: loglinear.PowerFit | None = None
  batch_tokens: loglinear.PowerFit | None = None
  tilt: float | None = None
  warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Batching:
  """What batches are legal: a whole number of clips on every device.

  Attributes:
    clip_tokens: tokens of one clip. devices: that the batch is divided over, times accumulation.
  """

  clip_tokens: int
  devices: int = 1

  @property
  def multiple(self) -> int:
    return self.clip_tokens * self.devices


@dataclasses.dataclass(frozen=True)
class Prediction:
  """A run to make; counts are raw, shares are relative (0.01 is one percent).

  Attributes:
    params, tokens, flops, flop_rule: N, T, C.
    loss: expected. lr, batch_tokens, steps: to train with; None where the law does not state them.
    best_lr, best_batch_tokens: before rounding. multiple: tokens that a legal batch is a multiple of.
    regret: relative loss that rounding costs, by the quadratic; None where its curvature is not known.
    intervals: {name: (low, high)}: loss (of a run), expected_loss (of the law), lr, batch_tokens; params_opt,
      tokens_opt, loss_opt for the optimum of the same budget.
    optimum: {params, tokens, loss} of the same budget. penalty: relative loss of this N above it.
    within: x, and within_params: the N whose loss lies within x of the optimum.
    trade_off: rows {share, params, tokens, loss, penalty, inference}: smaller models for the same FLOPs; inference is
      the cost of a generated token relative to the optimum's.
    extrapolation: {params, tokens, flops: factor beyond the fitted box; 1 within}.
    others: {published law: its N_opt at this budget}.
    warnings: what to know.
  """

  params: float
  tokens: float
  flops: float
  flop_rule: str
  loss: float
  lr: float | None
  batch_tokens: int | None
  steps: int | None
  best_lr: float | None
  best_batch_tokens: float | None
  multiple: int
  regret: float | None
  intervals: dict[str, tuple[float, float]]
  optimum: dict[str, float]
  penalty: float
  within: float
  within_params: tuple[float, float]
  trade_off: list[dict[str, float]]
  extrapolation: dict[str, float]
  others: dict[str, float]
  law: str
  warnings: tuple[str, ...]

  def to_json(self) -> dict[str, Any]:
    """JSON-ready."""
    return dataclasses.asdict(self)


def from_published(name: str) -> Source:
  """A law in print; UsageError where it has no loss surface."""
  law = published.get(name)
  sigma = None if law.residual is None else law.residual * float(law.surface(1e9, 1e10))
  tilt = None if law.curvature is None else -law.curvature[0][1] / law.curvature[0][0]
  return Source(law, law.rule, sigma=sigma, tilt=tilt)


def from_analysis(found: analysis.Analysis, name: str = "fit") -> Source:
  """A fit made now."""
  return from_json(found.to_json(), name)


def load(path: str | os.PathLike[str]) -> Source:
  """A fit.json that `kling sweep fit --out` wrote; DataError where it is none."""
  path = pathlib.Path(path)
  file = path / "fit.json" if path.is_dir() else path
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise DataError(f"{file}: no fit that can be read ({error}); write one with `kling sweep fit --out`") from error
  if not isinstance(values, dict) or not str(values.get("format", "")).startswith("kling_jax scaling fit"):
    raise DataError(f"{file}: is not a fit.json of `kling sweep fit --out`")
  return from_json(values, str(file))


def from_json(values: dict[str, Any], name: str) -> Source:
  """The source in the values of a fit.json."""
  hyper = values["hyper"]
  lr = batch = None
  if hyper is not None:
    lr, batch = (analysis.power_from_json(hyper[key]) for key in ("lr", "batch_tokens"))
  quantities: dict[str, Any] = {"loss": Surface(*(values[key] for key in PARAMETERS))}
  if lr is not None and batch is not None:
    quantities |= {"lr": lr.law, "batch_tokens": batch.law}
  rule = FlopRule.parse(values["flop_rule"])
  law = Law(
    name, f"fitted to {values['rows']} runs", "raw counts", quantities,
    {key: (low, high) for key, (low, high) in values["box"].items()}, rule=rule,
    curvature=None if hyper is None else ((hyper["curvature"][0][0], hyper["curvature"][0][1]),
                                          (hyper["curvature"][1][0], hyper["curvature"][1][1])),
  )  # fmt: skip
  warnings = list(values["warnings"])
  if values["verdict"] != "pass":
    warnings.insert(0, f"hold-out verdict of this fit: {values['verdict']}")
  return Source(
    law, rule, Surface(*(np.array(values["draws"][key]) for key in PARAMETERS)), values["dof"], values["sigma"], lr,
    batch, None if hyper is None else hyper["tilt"], tuple(warnings),
  )  # fmt: skip


def predict(
  source: Source,
  *,
  params: float | None = None,
  tokens: float | None = None,
  flops: float | None = None,
  batching: Batching | None = None,
  within: float = 1e-3,
  rule: FlopRule | None = None,
) -> Prediction:
  """Predicts the run with N and T, or the best one for C (or for C and one of the others).

  Args:
    source: the law.
    params, tokens, flops: two of N, T, C, or C alone.
    batching: what batches are legal; any by default.
    within: share above the lowest loss for the range of N.
    rule: how FLOPs are counted, if not as the law says.

  Raises:
    UsageError: another number of N, T, C.
  """
  rule = rule or source.rule
  surface = source.law.surface
  params, tokens, flops = _resolve(surface, rule, params, tokens, flops)
  best = surface.optimum(flops, rule)
  loss = float(surface(params, tokens))
  box = {"params": params, "tokens": tokens, "flops": flops}
  beyond = {name: _beyond(box[name], source.law.box[name]) for name in box if name in source.law.box}
  warnings = list(source.warnings)
  if far := [f"{name} by {factor:.3g}x" for name, factor in beyond.items() if factor > FAR]:
    warnings.append(f"far beyond what the law was fitted to: {', '.join(far)}")
  if source.draws is None:
    known = "the interval of the loss is its residual noise alone" if source.sigma is not None else "no interval"
    warnings.append(f"law {source.law.name} prints no errors of its constants: {known}")
  choice = _hyper(source, params, tokens, batching)
  return Prediction(
    params=params, tokens=tokens, flops=flops, flop_rule=str(rule), loss=loss,
    **choice,
    steps=None if choice["batch_tokens"] is None else math.ceil(tokens / choice["batch_tokens"]),
    intervals=_intervals(source, params, tokens, flops, rule),
    optimum={name: float(value) for name, value in best._asdict().items()},
    penalty=loss / float(best.loss) - 1,
    within=within,
    within_params=within_params(surface, flops, within, rule),
    trade_off=trade_off(surface, flops, rule),
    extrapolation=beyond,
    others={name: float(law("params", flops=flops)) for name, law in published.LAWS.items()
            if "params" in law.quantities and name != source.law.name},
    law=source.law.name,
    warnings=tuple(warnings),
  )  # fmt: skip


def _resolve(surface: Surface, rule: FlopRule, params, tokens, flops) -> tuple[float, float, float]:
  for name, value in (("params", params), ("tokens", tokens), ("flops", flops)):
    if value is not None and not (math.isfinite(value) and value >= 1e3):
      raise UsageError(f"{name} = {value:g}: raw counts are needed, e.g. 1e9")
  given = (params is not None, tokens is not None, flops is not None)
  if given == (True, True, False):
    return params, tokens, float(rule.flops(params, tokens))
  if given == (True, False, True):
    return params, float(rule.tokens(params, flops)), flops
  if given == (False, False, True):
    best = surface.optimum(flops, rule)
    return float(best.params), float(best.tokens), flops
  raise UsageError("a prediction needs params and tokens, or flops (alone, or with params)")


def _beyond(value: float, box: tuple[float, float]) -> float:
  return max(value / box[1], box[0] / value, 1.0)


def _hyper(source: Source, params: float, tokens: float, batching: Batching | None) -> dict[str, Any]:
  """lr, batch_tokens, best_lr, best_batch_tokens, multiple, regret."""
  multiple = 1 if batching is None else batching.multiple
  if "lr" not in source.law.quantities:
    return dict.fromkeys(("lr", "batch_tokens", "best_lr", "best_batch_tokens", "regret")) | {"multiple": multiple}
  best_lr = float(source.law("lr", params=params, tokens=tokens))
  best = float(source.law("batch_tokens", params=params, tokens=tokens))
  below = max(math.floor(best / multiple), 1)
  legal = min((below, below + 1), key=lambda count: abs(math.log(count * multiple / best))) * multiple
  away = math.log(legal / best)
  lr = best_lr * math.exp(away * (source.tilt or 0.0))
  regret = None
  if source.law.curvature is not None:
    step = np.array([math.log(lr / best_lr), away])
    regret = float(step @ np.array(source.law.curvature) @ step / 2)
  return {"lr": lr, "batch_tokens": legal, "best_lr": best_lr, "best_batch_tokens": best, "multiple": multiple,
          "regret": regret}  # fmt: skip


def _intervals(source: Source, params, tokens, flops, rule) -> dict[str, tuple[float, float]]:
  surface, found = source.law.surface, {}
  value = float(surface(params, tokens))
  if source.draws is not None:
    draws = source.draws(params, tokens)
    best, middle = source.draws.optimum(flops, rule), surface.optimum(flops, rule)
    noisy = draws + (source.sigma or 0.0) * np.random.default_rng(0).standard_normal(draws.shape)
    pairs = {"loss": (noisy, value), "expected_loss": (draws, value)}
    pairs |= {f"{name}_opt": (getattr(best, name), getattr(middle, name)) for name in best._fields}
    found = {name: intervals.interval(some, LEVEL, source.dof, centre) for name, (some, centre) in pairs.items()}
  elif source.sigma is not None:
    reach = intervals.student((1 + LEVEL) / 2) * source.sigma
    found["loss"] = (value - reach, value + reach)
  for name, law in (("lr", source.lr), ("batch_tokens", source.batch_tokens)):
    if law is not None:
      found[name] = law.interval(LEVEL, params=params, tokens=tokens)
  return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def within_params(surface: Surface, flops: float, share: float, rule: FlopRule) -> tuple[float, float]:
  """The smallest and the largest N whose loss for C = flops lies within `share` of the lowest; by bisection."""
  best = surface.optimum(flops, rule)
  limit = float(best.loss) * (1 + share)
  ends = []
  for direction in (-1, 1):
    inside, outside = math.log(float(best.params)), math.log(float(best.params)) + direction * math.log(1e4)
    for _ in range(60):
      middle = (inside + outside) / 2
      size = math.exp(middle)
      if float(surface(size, rule.tokens(size, flops))) <= limit:
        inside = middle
      else:
        outside = middle
    ends.append(math.exp(inside))
  return ends[0], ends[1]


def trade_off(surface: Surface, flops: float, rule: FlopRule) -> list[dict[str, float]]:
  """Smaller models for the same FLOPs: what they cost in loss and data, and what they save at inference."""
  best = surface.optimum(flops, rule)
  rows = []
  for share in SHARES:
    size = share * float(best.params)
    tokens = float(rule.tokens(size, flops))
    loss = float(surface(size, tokens))
    rows.append({
      "share": share, "params": size, "tokens": tokens, "loss": loss, "penalty": loss / float(best.loss) - 1,
      "inference": float(rule.per_token(size) / rule.per_token(float(best.params))),
    })  # fmt: skip
  return rows


def text(found: Prediction) -> str:
  """What a person reads in the terminal."""
  pairs = found.intervals
  span = lambda name, form: f"   ({pairs[name][0]:{form}} to {pairs[name][1]:{form}})" if name in pairs else ""
  lines = [
    f"law {found.law}; 90 % intervals in brackets",
    f"  N {found.params:.4g} parameters, T {found.tokens:.4g} tokens, C {found.flops:.4g} FLOPs ({found.flop_rule})",
    f"  loss          {found.loss:.5g}{span('loss', '.5g')}",
  ]
  if found.lr is not None and found.batch_tokens is not None:
    cost = "" if found.regret is None else f"; rounding costs {found.regret:.2g} of the loss"
    rounded = f"best {found.best_batch_tokens:,.0f}, multiple of {found.multiple:,}{cost}"
    lines += [
      f"  learning rate {found.lr:.4g}{span('lr', '.3g')}",
      f"  batch         {found.batch_tokens:,} tokens{span('batch_tokens', '.3g')}, {rounded}",
      f"  steps         {found.steps:,}",
    ]
  else:
    lines.append("  learning rate and batch: this law states none")
  low, high = found.within_params
  best = found.optimum
  here = f"T {best['tokens']:.4g}, loss {best['loss']:.5g}; the N above costs {found.penalty:+.3%}"
  lines += [
    f"  best for C    N {best['params']:.4g}{span('params_opt', '.3g')}, {here}",
    f"  N from {low:.3g} to {high:.3g} stays within {found.within:.2%} of the lowest loss",
    "  smaller models for the same FLOPs:",
    *(f"    N {row['params']:.3g} ({row['share']:.0%}), T {row['tokens']:.3g}: loss {row['penalty']:+.3%}, "
      f"inference {row['inference'] - 1:+.0%}" for row in found.trade_off[1:]),
    "  beyond the fitted runs: " + ", ".join(f"{name} {factor:.3g}x" for name, factor in found.extrapolation.items()),
    "  N_opt by other laws: " + ", ".join(f"{name} {value:.3g}" for name, value in found.others.items()),
  ]  # fmt: skip
  return "\n".join(lines)
