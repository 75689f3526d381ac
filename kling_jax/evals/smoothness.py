"""Transition smoothness: how steadily things move where clips join, and elsewhere (PAN, arXiv 2511.09057, 7.2)."""

import dataclasses

import numpy as np

from kling_jax.errors import DataError
from kling_jax.evals import horn_schunck


@dataclasses.dataclass(frozen=True)
class Smoothness:
  """Scores in (0, 1], 1 for motion without acceleration; nan where there is nothing to measure.

  Attributes:
    joins: over the accelerations that straddle a join between clips without a cut. elsewhere: over all others.
    scores_T: of every acceleration; entry t belongs to frames t, t + 1, t + 2.
  """

  joins: float
  elsewhere: float
  scores_T: np.ndarray


def transition_smoothness(frames_OTHWC: np.ndarray, cut_O: np.ndarray | None = None) -> Smoothness:
  """Velocity is Horn and Schunck's flow, acceleration its difference in time, the score exp(-acceleration).

  The acceleration is the mean length over the frame, in percent of the frame's diagonal a frame squared, so that the
  score does not depend on the size. PAN gives the form and no unit; the unit is ours. Frames of both sides of a cut
  count nowhere.

  Args:
    frames_OTHWC: uint8 RGB, O clips of T frames.
    cut_O: bool, a cut lies directly before the clip.

  Raises:
    DataError: fewer than three frames.
  """
  clips, steps, height, width, _ = frames_OTHWC.shape
  if clips * steps < 3:
    raise DataError(f"{clips * steps} frames have no acceleration; give at least 3")
  velocity_THWC = horn_schunck.flows(frames_OTHWC.reshape(-1, height, width, 3))
  acceleration_T = np.linalg.norm(np.diff(velocity_THWC, axis=0), axis=-1).mean((1, 2))
  scores_T = np.exp(-100 * acceleration_T / np.hypot(height, width))
  clip_T = np.arange(clips * steps) // steps
  cuts_T = np.zeros(clips * steps, bool)
  if cut_O is not None:
    cuts_T[np.arange(1, clips) * steps] = np.asarray(cut_O, bool)[1:]
  straddles = clip_T[:-2] != clip_T[2:]
  cut = cuts_T[1:-1] | cuts_T[2:]
  scores_T = np.where(cut, np.nan, scores_T)
  return Smoothness(_mean(scores_T[straddles & ~cut]), _mean(scores_T[~straddles & ~cut]), scores_T)


def _mean(values: np.ndarray) -> float:
  return float(values.mean()) if values.size else float("nan")
