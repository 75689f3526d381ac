"""The study of arXiv 2411.17470 at any scale, and its arms: four ways to choose learning rate and batch."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from kling_jax.errors import ConfigError
from kling_jax.scaling import design, loglinear, lr_batch, table
from kling_jax.scaling.design import Hyper, Overrides

LONG = "long"  # arm of the longer runs of the sizes of the grids
WITHIN = 0.03  # at small scale a step of the grid costs percents, and a quadratic needs its neighbours


@dataclasses.dataclass(frozen=True)
class Arm:
  """A way to choose (lr, B), by name.

  tuned: power laws of N and T (arXiv 2411.17470, eqs. 10 and 13); lr at the batch that is rounded to clips.
  kaplan: small batch with more steps (Kaplan et al. 2020): the smallest batch that was run, at its best lr.
  chinchilla: one (lr, B) for all, the geometric mean of the optima (Hoffmann et al. 2022 kept both over sizes).
  deepseek: power laws of C alone (DeepSeek LLM, arXiv 2401.02954, eq. 1), C = 6 N T.
  """

  name: str
  hyper: Hyper


def fitted(
  points: Iterable[Mapping[str, Any]], within: float = WITHIN, memory: float = 0.1, multiple: int = 1
) -> list[Arm]:
  """The arms, fitted to the points that are not held out.

  Args:
    points: `points.points`. within: see `lr_batch.cells`. memory, multiple: see `Hyper`.

  Raises:
    DataError: the points have no optimum of learning rate and batch at four (N, T).
  """
  rows = [point for point in points if _first(point)]
  names = ("params", "tokens", "loss", "lr", "batch_tokens", "run")
  runs = table.from_columns({name: [row[name] for row in rows] for name in names}, "the sweep's points")
  laws = lr_batch.fit(runs, within)
  best = lambda n, t: float(laws.batch_tokens.law(params=n, tokens=t))
  smallest = float(min(row["batch_tokens"] for row in rows))
  flops = np.array([6 * cell.params * cell.tokens for cell in laws.cells])
  optimum_lr = np.array([cell.lr for cell in laws.cells])
  optimum_batch = np.array([cell.batch_tokens for cell in laws.cells])
  mean = lambda values: float(np.exp(np.log(values).mean()))
  fixed_lr, fixed_batch = mean(optimum_lr), mean(optimum_batch)
  lr_of_c = loglinear.fit(optimum_lr, {"flops": flops}).law
  batch_of_c = loglinear.fit(optimum_batch, {"flops": flops}).law
  return [
    Arm("tuned", Hyper(lambda n, t, b: laws.lr_given_batch(b, n, t), best, memory, multiple)),
    Arm("kaplan", Hyper(lambda n, t, b: laws.lr_given_batch(b, n, t), lambda n, t: smallest, memory, multiple)),
    Arm("chinchilla", Hyper(lambda n, t, b: fixed_lr, lambda n, t: fixed_batch, memory, multiple)),
    Arm("deepseek", Hyper(lambda n, t, b: float(lr_of_c(flops=6 * n * t)),
                          lambda n, t: float(batch_of_c(flops=6 * n * t)), memory, multiple)),
  ]  # fmt: skip


def _first(point: Mapping[str, Any]) -> bool:
  """Whether a point belongs to the first stage, whose laws decide the later runs."""
  return point["split"] == "fit" and LONG not in point["arm"].split("+")


@dataclasses.dataclass(frozen=True)
class Study:
  """Grids at small sizes, then longer runs of them and hold-outs at large ones, both where the laws of the grids say.

  Attributes:
    horizons: T of the grids, in tokens.
    batches, rates: {size: clips of a batch, learning rates} of each grid.
    repeats: {size: (clips, learning rate)} that is done again with other seeds: the noise of a run.
    holdouts: (size, T, parts of T at which it is read, arms: how many of them run).
    memory: tokens that the averaged weights remember, the same in all runs; math.inf: a ninth of those trained so far
      (what the trainer's ramp comes to), so that every T is read with the same share of it averaged.
    longer: (T, parts of T at which it is read) of one run of each size of the grids, for the loss surface.
    between: further sizes that have such a run, and no grid.
    seeds: how many other seeds a repeat has. again: how many other seeds the hold-outs have.
    within: see `lr_batch.cells`. multiple: clips of a batch.
  """

  horizons: Sequence[float]
  batches: Mapping[str, Sequence[int]]
  rates: Mapping[str, Sequence[float]]
  repeats: Mapping[str, tuple[int, float]]
  holdouts: Sequence[tuple[str, float, int, int]]
  memory: float
  longer: tuple[float, int] | None = None
  between: Sequence[str] = ()
  seeds: int = 1
  again: int = 0
  within: float = WITHIN
  multiple: int = 1

  def __post_init__(self) -> None:
    """Raises ConfigError where no grid has the three batches and three rates that a quadratic in both needs."""
    if not any(len(set(batches)) >= 3 and len(set(self.rates[size])) >= 3 for size, batches in self.batches.items()):
      raise ConfigError(
        "no size of the study has three batches and three learning rates; one grid of 3 x 3 at least is needed to know "
        "the curvature of the loss in both"
      )

  def grids(self, base: ml_collections.ConfigDict) -> list[Overrides]:
    """The runs of the first stage."""
    shared: dict[str, Any] = {"horizons": self.horizons, "memory": self.memory / min(self.horizons)}
    runs = []
    for size, batches in self.batches.items():
      runs += design.grid(base, size, batches=batches, rates=self.rates[size], **shared)
    for size, (clips, lr) in self.repeats.items():
      seeds = range(1, 1 + self.seeds)
      runs += design.grid(base, size, batches=(clips,), rates=(lr,), seeds=seeds, arm="repeat", **shared)
    return runs

  def runs(
    self, base: ml_collections.ConfigDict, points: Sequence[Mapping[str, Any]], more: Sequence[Overrides] = ()
  ) -> Iterator[Overrides]:
    """All that can be said by now: the grids and `more` fitting runs, and the hold-outs once those have finished.

    Runs that diverged never finish: take them out of the grids, or the hold-outs do not come.
    """
    first = [*self.grids(base), *more]
    yield from first
    if len({point["run"] for point in points if _first(point)}) < len(first):
      return
    if self.longer is not None:
      tokens, reads = self.longer
      hyper = fitted(points, self.within, self.memory * reads / tokens, self.multiple)[0].hyper
      for size in (*self.batches, *self.between):
        yield design.tuned(base, size, tokens, hyper, reads=reads, arm=LONG)
    for size, tokens, reads, arms in self.holdouts:
      found = fitted(points, self.within, self.memory * reads / tokens, self.multiple)
      for seed in range(1 + self.again):
        for arm in found[:arms]:
          yield design.tuned(base, size, tokens, arm.hyper, seed=seed, reads=reads, arm=arm.name, split="holdout")
