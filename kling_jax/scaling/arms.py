"""The named arms of a study: four ways to choose learning rate and batch, each with the constants of the same runs."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from kling_jax.scaling import loglinear, lr_batch, table
from kling_jax.scaling.design import Hyper

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
  rows = [point for point in points if point["split"] == "fit"]
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
