"""Figures of a world model's rollouts: from their frames and texts alone, and in memory-v1 against what was asked."""

import math
from collections.abc import Sequence

import numpy as np

from kling_jax.data.memory_world import Story
from kling_jax.evals import compare, following, reappearance, repetition, seams, smoothness


def alone(frames_OTHWC: np.ndarray, fps: float, cut_O: Sequence[bool], written: Sequence[str]) -> dict[str, float]:
  """The figures of one rollout; names as in `compare.MEANING`, nan where there is nothing to measure.

  Args:
    frames_OTHWC: uint8, O clips. cut_O: whether a cut lies before the clip. written: the texts that the model wrote.
  """
  cuts = np.asarray(cut_O, bool)
  film_THWC = frames_OTHWC.reshape(-1, *frames_OTHWC.shape[2:])
  smooth = smoothness.transition_smoothness(frames_OTHWC, cuts)
  found = compare.alone(film_THWC, fps)
  del found["acceleration_smoothness"]  # apart at joins and elsewhere
  found["seam_ratio"] = seams.seams(frames_OTHWC, cuts).ratio
  found["smoothness_joins"], found["smoothness_elsewhere"] = smooth.joins, smooth.elsewhere
  if written:
    found["distinct_2"] = repetition.distinct(written, 2)
    found["repeat_rate"] = repetition.repeat_rate(written)
    found["self_bleu"] = repetition.self_bleu(written)
  return {name: value for name, value in found.items() if not math.isnan(value)}


def in_memory_world(frames_OTHWC: np.ndarray, story: Story) -> dict[str, float]:
  """Whether a film of memory-v1 shows the story that its model was told: actions, and things that return.

  Things are looked for where the story has them, so that a clip that does something else also costs what comes later.

  Args:
    frames_OTHWC: uint8, a clip an action; frame k of a clip is its moment (k + 1) / T.
  """
  verdicts, _ = following.judge(frames_OTHWC, story.states[0], story.sentences)
  back = reappearance.reappearance(frames_OTHWC, story.states)
  control = reappearance.reappearance(frames_OTHWC, story.states, reappearance.stayed(story.states))
  return {
    "following": following.share(verdicts),
    "following_by_chance": float(np.mean([1 / verdict.choices for verdict in verdicts])),
    "reappearance": back.both,
    "returns": float(back.count),
    "stayed": control.both,
  }
