"""Which runs to do: grids of learning rate and batch, IsoFLOP grids around a law, hold-outs, repeats; and their cost.

Every function takes a base config and returns the dicts that a sweep file yields. Runs are at a constant learning rate
and are read at many horizons T from one run (EMA weights, whose memory is a number of tokens and so the same for every
batch); `cooldown` asks for runs that end in a short decay instead, one run a horizon.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_collections

from kling_jax.errors import ConfigError
from kling_jax.scaling import cost as cost_lib
from kling_jax.scaling.cost import Cost

Overrides = dict[str, Any]
WIDE = 256  # widths from here on are multiples of 64, so that heads have 64


@dataclasses.dataclass(frozen=True)
class Hyper:
  """How learning rate, batch and memory of a run are chosen.

  Attributes:
    lr: of (N, T, B). batch_tokens: of (N, T). All raw counts; B is the batch after rounding to clips.
    memory: horizon of the EMA weights as a share of T (of the shortest T of a run).
    multiple: clips of a batch are a multiple of this (devices times accumulation).
  """

  lr: Callable[[float, float, float], float]
  batch_tokens: Callable[[float, float], float]
  memory: float = 0.1
  multiple: int = 1


def sized(base: ml_collections.ConfigDict, size: str) -> Cost:
  """The cost of the base config with another model."""
  config = base.copy_and_resolve_references()
  config.model.size = size
  return cost_lib.of(config)


def width(params: float) -> int:
  """The width of the scaling family's member nearest to N = width^3."""
  step = 64 if params ** (1 / 3) >= WIDE else 16
  return max(step, round(params ** (1 / 3) / step) * step)


def grid(
  base: ml_collections.ConfigDict,
  size: str,
  *,
  horizons: Sequence[float],
  batches: Sequence[int],
  rates: Sequence[float],
  memory: float = 0.1,
  seeds: Sequence[int] = (0,),
  arm: str = "tuned",
  split: str = "fit",
) -> list[Overrides]:
  """One run for each (clips of a batch, learning rate, seed), each read at all horizons.

  Args:
    horizons: T in tokens; their greatest common divisor is rounded to whole steps of the largest batch.
    batches: clips a step; each divides the largest.
    rates: learning rates. memory: of the EMA weights, as a share of the shortest horizon.

  Raises:
    ConfigError: a batch that does not divide the largest one, or horizons without a common step.
  """
  tokens = sized(base, size).clip_tokens
  if any(max(batches) % batch for batch in batches):
    raise ConfigError(f"batches {tuple(batches)} must each divide the largest, so that all runs meet at one T")
  largest = tokens * max(batches)
  unit = math.gcd(*map(round, horizons))
  if unit < largest:
    raise ConfigError(
      f"horizons {tuple(horizons)} have the common step of {unit:,} tokens, less than the largest batch of {largest:,};"
      " make them multiples of a longer one, runs are read at each of its multiples"
    )
  stops = [round(unit / largest) * largest * round(horizon / unit) for horizon in horizons]
  return [
    _run(size, batch, lr, tokens, stops, memory, seed, arm, split)
    for batch in batches
    for lr in rates
    for seed in seeds
  ]


def isoflop(
  base: ml_collections.ConfigDict,
  budgets: Sequence[float],
  best_params: Callable[[float], float],
  hyper: Hyper,
  *,
  sizes: int = 7,
  spread: float = 8.0,
  arm: str = "isoflop",
) -> list[Overrides]:
  """For each budget C models around N_opt(C), each trained on the tokens that the budget pays for.

  Args:
    budgets: C in FLOPs, counted exactly. best_params: the current law N_opt(C).
    sizes: models a budget. spread: the largest and smallest are this much above and below N_opt; the same for every
      budget, for grids that lie differently about the optimum bias a parabola. Sizes that the family has once are run
      once.
  """
  runs = []
  for budget in budgets:
    centre = best_params(budget)
    steps = [spread ** (2 * k / max(sizes - 1, 1) - 1) for k in range(sizes)]
    for d in sorted({width(centre * step) for step in steps}):
      model = sized(base, f"d{d}")
      runs.append(tuned(base, f"d{d}", budget / model.flops_per_token, hyper, arm=arm))
  return runs


def tuned(
  base: ml_collections.ConfigDict,
  size: str,
  tokens: float,
  hyper: Hyper,
  *,
  seed: int = 0,
  reads: int = 1,
  arm: str = "tuned",
  split: str = "fit",
) -> Overrides:
  """One run of `tokens` at the learning rate and batch of `hyper`, read at `reads` equal parts of T.

  The batch is rounded to a legal number of clips, the learning rate to three digits.
  """
  model = sized(base, size)
  multiple = hyper.multiple
  clips = max(1, round(hyper.batch_tokens(model.params, tokens) / model.clip_tokens / multiple)) * multiple
  step = clips * model.clip_tokens
  stops = [max(1, round(tokens / reads / step)) * step * (k + 1) for k in range(reads)]
  lr = float(f"{hyper.lr(model.params, tokens, step):.3g}")
  return _run(size, clips, lr, model.clip_tokens, stops, hyper.memory, seed, arm, split)


def cooldown(runs: Iterable[Overrides], share: float = 0.2, arm: str = "cooldown") -> list[Overrides]:
  """The same runs with a decay of the learning rate over the last `share` of their steps (1 - sqrt)."""
  return [
    run | {"optimizer.schedule": "wsd", "optimizer.decay": share, "validation.every": run["steps"], "sweep.arm": arm}
    for run in runs
  ]


def _run(
  size: str,
  clips: int,
  lr: float,
  clip_tokens: int,
  stops: Sequence[int],
  memory: float,
  seed: int,
  arm: str,
  split: str,
) -> Overrides:
  step = clips * clip_tokens
  counts = [round(stop / step) for stop in stops]
  # A weight of exp(-1) after `memory` of the shortest horizon, counted in tokens; at least two steps.
  decay = math.exp(-1 / max(memory * min(counts), 2.0))
  return {
    "model.size": size,
    "data.batch": clips,
    "optimizer.lr": lr,
    "steps": max(counts),
    "validation.every": math.gcd(*counts),
    "ema.decay": float(f"{decay:.6g}"),
    "seed": seed,
    "sweep.arm": arm,
    "sweep.split": split,
  }


# ---- cost ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Hardware:
  """What a run is done on.

  Attributes:
    flops_per_s: peak of one device. mfu: share of it that training reaches. devices: of one run.
    price: of one device for an hour, in dollars; NaN where it is not known.
  """

  flops_per_s: float
  mfu: float = 0.4
  devices: int = 1
  price: float = math.nan

  def device_hours(self, flops: float) -> float:
    """Hours of one device."""
    return flops / (self.flops_per_s * self.mfu) / 3600

  def flops(self, device_hours: float) -> float:
    """The inverse: what so many hours of one device pay for."""
    return device_hours * 3600 * self.flops_per_s * self.mfu


@dataclasses.dataclass(frozen=True)
class Planned:
  """A run with what it costs.

  Attributes:
    run, arms, split: as in the sweep. size: of the model. params, tokens, batch_tokens, lr, steps: of the run.
    reads: at how many T it is read. flops: exact. device_hours, hours: of one device, and of waiting.
    dollars: NaN where no price is known.
  """

  run: str
  arms: tuple[str, ...]
  split: str
  size: str
  params: int
  tokens: int
  batch_tokens: int
  lr: float
  steps: int
  reads: int
  flops: float
  device_hours: float
  hours: float
  dollars: float


def plan(runs: Iterable[Any], hardware: Hardware) -> list[Planned]:
  """The cost of every run of a sweep (`sweep.Run`), on that hardware."""
  planned = []
  for run in runs:
    c, model = run.config, cost_lib.of(run.config)
    tokens = c.steps * c.data.batch * model.clip_tokens
    flops = model.flops(tokens)
    used = hardware.device_hours(flops)
    planned.append(
      Planned(
        run=run.id, arms=run.arms, split=run.split, size=c.model.size, params=model.params, tokens=tokens,
        batch_tokens=c.data.batch * model.clip_tokens, lr=c.optimizer.lr, steps=c.steps,
        reads=-(-c.steps // c.validation.every) if c.validation.every else 0, flops=flops, device_hours=used,
        hours=used / hardware.devices, dollars=used * hardware.price,
      )
    )  # fmt: skip
  return planned
