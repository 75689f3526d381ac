"""The page of control matrices: a heat map, a table and strips of samples for each model."""

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np

from kling_jax import page
from kling_jax.data import encode, grid
from kling_jax.evals.control import Cell, Matrix

SIDE = 96  # pixels; smaller samples are shown larger
STRIP_FRAMES = 6
STYLE_NOTE = "A cell is 1 where the measured score follows the told one in full, 0 where it does not move."


def build(models: Mapping[str, Matrix], facts: Mapping[str, object], fps: float) -> page.Page:
  """The page, to be written.

  Args:
    models: {name: its matrix}. facts: figures for the top. fps: of the samples.
  """
  document = page.Page("Control matrix", "What happens to every measured score when one told score is raised")
  document.section("Control", _scale(next(iter(models.values()))))
  document.facts(facts)
  document.table(
    ["model", "told", "own slope", "p", "strongest cross-talk", "its slope", "p of own above cross-talk"],
    [
      (name, one.told, one.slope, one.p, one.strongest, one.cross_talk, one.p_over_cross_talk)
      for name, found in models.items()
      for one in map(found.verdict, found.told)
    ],
  )
  for name, found in models.items():
    document.section(f"{name}: slopes", f"Rows: the score that was raised. Columns: what was measured. {STYLE_NOTE}")
    cells = [[_shown(found.cell(told, other)) for other in found.measured] for told in found.told]
    document.heatmap(found.measured, cells, rows=found.told)
    document.table(
      ["told", "measured", "slope", "95 % interval", "p", "pairs", *(f"mean at {level:g}" for level in found.levels)],
      [_row(found.cell(told, other)) for told in found.told for other in found.told],
    )
    document.text("Measured by " + ", ".join(f"{key}: {who}" for key, who in found.scorers.items()) + ".")
    for told in found.told:
      document.section(f"{name}: {told} raised", "Of each pair a strip, levels from top to bottom, and a video, levels "
                       "from left to right.")  # fmt: skip
      document.gallery(_tiles(found, told, fps), width=len(found.levels) * SIDE)
  return document


def _scale(found: Matrix) -> str:
  levels = ", ".join(f"{level:g}" for level in found.levels)
  return (
    "Each told score is raised by itself, the others stay in the middle; text and seed are the same at all levels "
    f"({levels}). Scores are counted on one scale: 0 and 1 are the 1st and 99th percentile of real clips of the same "
    "size. Slopes are means over pairs of text and seed; p-values and intervals are Student's, for each cell alone."
  )


def _shown(cell: Cell) -> float | None:
  return cell.slope if np.isfinite(cell.slope) else None


def _row(cell: Cell) -> tuple[Any, ...]:
  interval = f"{cell.low:.3f} to {cell.high:.3f}"
  return (cell.told, cell.measured, cell.slope, interval, cell.p, cell.pairs, *cell.levels)


def _tiles(found: Matrix, told: str, fps: float) -> list[page.Tile]:
  """A strip of frames a pair, one row a level, and the same as a video, one column a level."""
  tiles = []
  for pair in range(len(found.videos[told, 0])):
    clips = np.stack([_enlarged(found.videos[told, k][pair]) for k in range(len(found.levels))])
    levels = " / ".join(f"{level:g}" for level in found.levels)
    strip = grid.png(grid.contact_sheet(clips, STRIP_FRAMES))
    tiles.append(page.Tile(strip, f"{told} {levels}, pair {pair}, in time from left to right"))
    beside = np.concatenate(list(clips), axis=2)
    even = beside[:, : beside.shape[1] // 2 * 2, : beside.shape[2] // 2 * 2]
    tiles.append(page.Tile(encode.encode(list(even), fps=fps), f"{told} {levels}, pair {pair}"))
  return tiles


def _enlarged(frames_THWC: np.ndarray) -> np.ndarray:
  """The frames, enlarged by a whole factor to a shorter side of at least SIDE pixels where they are smaller."""
  factor = max(1, -(-SIDE // min(frames_THWC.shape[1:3])))
  size = frames_THWC.shape[2] * factor, frames_THWC.shape[1] * factor
  return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_NEAREST) for frame in frames_THWC])
