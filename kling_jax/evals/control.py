"""The control matrix: what becomes of every measured score of samples when the score that the model is told is raised.

For each told score i a video is sampled at several levels of it, everything else equal: text, seed, and the other
scores at their middle. All scores j of the videos are measured, and put on the scale on which they were told:

    y = (x - q1) / (q99 - q1),   x the measured value (log1p of motion), q1 and q99 of real clips of the same size

so that 0 and 1 are the 1st and 99th percentile of real clips, as u / 1000 is for what is told. The cell (i, j) is the
slope of y_j over u_i / 1000: 1 where a score follows as told, 0 where nothing happens; off the diagonal it is
cross-talk. Each pair (text and seed) has a slope of its own, by least squares over the levels; the cell is their mean,
its interval and its p-value are Student's over pairs. Koala-36M (section 4.4) claims such control from samples that
were looked at; no paper reports the matrix.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from kling_jax import measure
from kling_jax.data import conditions
from kling_jax.data.source import ClipInfo
from kling_jax.errors import DataError, UsageError

LEVELS = (0.0, 0.5, 1.0)  # of the told score: 1st percentile, middle, 99th
MIDDLE = 0.5  # where the scores that are not raised stand
LEAST_PAIRS = 8
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Ask:
  """One video to sample: a text, a seed, and every told score in [0, 1] between its 1st and 99th percentile."""

  prompt: str
  seed: int
  told: tuple[tuple[str, float], ...]


# (asks) -> one video uint8 (T, H, W, 3) each; equal asks give equal videos, whatever the batch.
Sampler = Callable[[Sequence[Ask]], Sequence[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Cell:
  """A told score and a measured one.

  Attributes:
    told, measured: their names.
    slope: mean over pairs of d y / d told. low, high: its 95 % interval. p: that there is no effect, two-sided.
    pairs: texts and seeds that count: those whose videos define the score at every level.
    levels: mean of y at each level of the told score.
  """

  told: str
  measured: str
  slope: float
  low: float
  high: float
  p: float
  pairs: int
  levels: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Whether a told score is in control of itself.

  Attributes:
    told: its name. slope, p: of its own cell (p one-sided, for a slope above 0).
    strongest, cross_talk: the other told score that follows most, and its slope.
    p_over_cross_talk: that the own slope is not above |cross_talk| (one-sided, paired).
  """

  told: str
  slope: float
  p: float
  strongest: str
  cross_talk: float
  p_over_cross_talk: float


@dataclasses.dataclass(frozen=True)
class Matrix:
  """The result for one model.

  Attributes:
    told, measured: names of rows and columns; the told ones are the first columns.
    levels: of the told scores.
    cells: row by row.
    slopes: {(told, measured): slope of each pair (P,)}, NaN where a video does not define the score.
    scorers: {measured: "scorer version"}.
    videos: {(told, level number): the first videos}, for the page.
  """

  told: tuple[str, ...]
  measured: tuple[str, ...]
  levels: tuple[float, ...]
  cells: tuple[Cell, ...]
  slopes: Mapping[tuple[str, str], np.ndarray]
  scorers: Mapping[str, str]
  videos: Mapping[tuple[str, int], list[np.ndarray]]

  def cell(self, told: str, measured: str) -> Cell:
    return self.cells[self.told.index(told) * len(self.measured) + self.measured.index(measured)]

  def verdict(self, told: str) -> Verdict:
    """Own slope against the strongest cross-talk among the told scores."""
    own = self.cell(told, told)
    others = [self.cell(told, name) for name in self.told if name != told]
    p = _one_sided(self.slopes[told, told])
    if not others:
      return Verdict(told, own.slope, p, "", 0.0, p)
    worst = max(others, key=lambda cell: abs(cell.slope))
    apart = self.slopes[told, told] - math.copysign(1.0, worst.slope) * self.slopes[told, worst.measured]
    return Verdict(told, own.slope, p, worst.measured, worst.slope, _one_sided(apart))

  def to_json(self) -> dict[str, Any]:
    """JSON-ready, without videos."""
    return {
      "told": list(self.told),
      "measured": list(self.measured),
      "levels": list(self.levels),
      "scorers": dict(self.scorers),
      "cells": [dataclasses.asdict(cell) for cell in self.cells],
      "verdicts": [dataclasses.asdict(self.verdict(name)) for name in self.told],
    }


@dataclasses.dataclass(frozen=True)
class Yardstick:
  """The scale of measured scores: percentiles over real clips at the size and rate of the samples.

  Attributes:
    scorers: who measures samples and real clips alike. percentiles: of the scores that differ between real clips.
    clips: how many were measured. fps: frames a second of all videos.
  """

  scorers: tuple[measure.Scorer, ...]
  percentiles: conditions.Percentiles
  clips: int
  fps: float

  @classmethod
  def of_clips(cls, clips: Sequence[np.ndarray], fps: float, scorers: Sequence[measure.Scorer]) -> "Yardstick":
    """Measures real clips, uint8 (T, H, W, 3) each.

    Raises:
      DataError: fewer than two clips, or no score differs between them.
    """
    infos = [
      ClipInfo(str(k), "", len(frames) / fps, fps, len(frames), frames.shape[2], frames.shape[1],
               measure.score(frames, np.arange(len(frames)) / fps, scorers))
      for k, frames in enumerate(clips)
    ]  # fmt: skip
    names = [name for scorer in scorers for name in scorer.conditions if any(name in info.scores for info in infos)]
    fitted = conditions.fit(infos, tuple(dict.fromkeys(names)))
    spread = tuple(one for one in fitted.conditions if one.q99 > one.q1)
    if len(clips) < 2 or not spread:
      raise DataError(f"{len(clips)} real clips give no scale of scores; a set with more, and other, clips is needed")
    return cls(tuple(scorers), conditions.Percentiles(spread), len(clips), fps)

  def __call__(self, frames_THWC: np.ndarray) -> dict[str, float]:
    """{score: y} of one video; scores that it does not define are left out."""
    found = measure.score(frames_THWC, np.arange(len(frames_THWC)) / self.fps, self.scorers)
    y = {}
    for one in self.percentiles.conditions:
      if one.name in found:
        x = conditions.transformed(one.name, one.transform, found[one.name].value)
        y[one.name] = (x - one.q1) / (one.q99 - one.q1)
    return y


def matrix(
  sampler: Sampler,
  told: Sequence[str],
  prompts: Sequence[str],
  yardstick: Yardstick,
  *,
  seed: int = 0,
  levels: Sequence[float] = LEVELS,
  shown: int = 3,
) -> Matrix:
  """Samples, measures and fits.

  Args:
    sampler: see `Sampler`.
    told: the scores that the model is told.
    prompts: one a pair; pair p has the seed `seed` + p at every level of every score.
    yardstick: who measures, and the scale.
    seed: of the first pair.
    levels: of the raised score, ascending in [0, 1].
    shown: videos a level that the result keeps.

  Raises:
    UsageError: nothing to raise, levels that do not ascend, or fewer than 8 pairs.
    DataError: a told score that the yardstick does not measure.
  """
  levels = tuple(float(level) for level in levels)
  if not told or len(prompts) < LEAST_PAIRS:
    raise UsageError(f"a control matrix needs a told score and at least {LEAST_PAIRS} prompts, got {len(prompts)}")
  if len(levels) < 2 or any(b <= a for a, b in itertools.pairwise(levels)) or not 0 <= levels[0] <= levels[-1] <= 1:
    raise UsageError(f"levels must ascend in [0, 1], at least two of them; got {levels}")
  known = yardstick.percentiles.names
  for name in told:
    if name not in known:
      raise DataError(f"no scorer measures the told score {name!r} of these clips (measured: {', '.join(known)}); "
                      "name one by --scorers")  # fmt: skip
  measured = (*told, *(name for name in known if name not in told))
  asks = {
    (name, number, pair): Ask(prompt, seed + pair, tuple((one, level if one == name else MIDDLE) for one in told))
    for name in told
    for number, level in enumerate(levels)
    for pair, prompt in enumerate(prompts)
  }
  distinct = list(dict.fromkeys(asks.values()))  # with the middle among the levels, all scores share those videos
  videos = dict(zip(distinct, sampler(distinct), strict=True))
  values = {ask: yardstick(video) for ask, video in videos.items()}
  cells, slopes = [], {}
  for name in told:
    for other in measured:
      y_PL = np.array(
        [[values[asks[name, k, pair]].get(other, math.nan) for k in range(len(levels))] for pair in range(len(prompts))]
      )
      slopes[name, other] = _slopes(y_PL, np.array(levels))
      cells.append(_cell(name, other, y_PL, slopes[name, other]))
  return Matrix(
    told=tuple(told),
    measured=measured,
    levels=levels,
    cells=tuple(cells),
    slopes=slopes,
    scorers={one.name: f"{one.scorer} {one.version}" for one in yardstick.percentiles.conditions},
    videos={
      (name, k): [videos[asks[name, k, pair]] for pair in range(min(shown, len(prompts)))]
      for name in told
      for k in range(len(levels))
    },
  )


def _slopes(y_PL: np.ndarray, levels_L: np.ndarray) -> np.ndarray:
  """The least-squares slope of each row; NaN where a value of the row is."""
  apart_L = levels_L - levels_L.mean()
  return y_PL @ apart_L / (apart_L @ apart_L)


def _cell(told: str, measured: str, y_PL: np.ndarray, slopes_P: np.ndarray) -> Cell:
  there_P = np.isfinite(slopes_P)
  count = int(there_P.sum())
  if count < 2:
    return Cell(told, measured, math.nan, math.nan, math.nan, math.nan, count, (math.nan,) * y_PL.shape[1])
  mean, stderr = _mean(slopes_P)
  reach = float(scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * stderr
  levels = tuple(float(value) for value in y_PL[there_P].mean(0))
  return Cell(told, measured, mean, mean - reach, mean + reach, _p(mean, stderr, count), count, levels)


def _mean(slopes_P: np.ndarray) -> tuple[float, float]:
  """The mean of what is finite, and its standard error."""
  finite = slopes_P[np.isfinite(slopes_P)]
  return float(finite.mean()), float(finite.std(ddof=1) / math.sqrt(len(finite)))


def _p(mean: float, stderr: float, count: int) -> float:
  """Two-sided p-value of a mean of 0; where all pairs agree to the last digit, 1 for no effect and else 0."""
  if stderr == 0:
    return float(mean == 0)
  return float(2 * scipy.stats.t.sf(abs(mean) / stderr, count - 1))


def _one_sided(slopes_P: np.ndarray) -> float:
  """The p-value of a mean that is not above 0; 1 where there are not two pairs."""
  count = int(np.isfinite(slopes_P).sum())
  if count < 2:
    return 1.0
  mean, stderr = _mean(slopes_P)
  half = _p(mean, stderr, count) / 2
  return half if mean > 0 else 1 - half


def text(name: str, found: Matrix) -> str:
  """The matrix as a table for a terminal, and a line a told score."""
  width = max(len(one) for one in found.told) + 2
  lines = [f"{name}: slope of measured scores (columns) over told ones (rows); * p < 0.01"]
  lines.append(" " * width + "".join(f"{one[:10]:>12}" for one in found.told))
  for told in found.told:
    row = [found.cell(told, other) for other in found.told]
    lines.append(f"{told:<{width}}" + "".join(f"{c.slope:>11.3f}{'*' if c.p < 0.01 else ' '}" for c in row))
  for told in found.told:
    one = found.verdict(told)
    against = (
      f"; cross-talk {one.cross_talk:+.3f} on {one.strongest}, p {one.p_over_cross_talk:.2g}" if one.strongest else ""
    )
    lines.append(f"  {told}: slope {one.slope:+.3f}, p {one.p:.2g}{against}")
  return "\n".join(lines)
