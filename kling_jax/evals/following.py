"""Action-following in memory-v1: which event a clip shows, decided from its frames, against the sentence asked for.

Of all events that the state allows, the one is taken whose true film is nearest to the frames (the maximum-likelihood
decision under Gaussian noise); no learned judge. The state is followed along: after a clip in which a model did
something else, the next one is judged from where that led.
"""

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np

from kling_jax.data import memory_world
from kling_jax.data.memory_world import Action, State
from kling_jax.data.memory_world_frames import render
from kling_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What one clip shows.

  Attributes:
    asked, shown: sentences; `shown` is the nearest event's.
    followed: they are the same.
    error: root mean squared distance of the frames to the film of the event shown, in levels of 255.
    margin: how much nearer that is than the next event's, in levels; near 0 it is a guess.
    choices: the number of events that were compared: guessing follows one in as many.
  """

  asked: str
  shown: str
  followed: bool
  error: float
  margin: float
  choices: int


def judge(frames_OTHWC: np.ndarray, start: State, asked: Sequence[str]) -> tuple[list[Verdict], list[State]]:
  """Judges a rollout of O clips.

  Args:
    frames_OTHWC: uint8; frame k of a clip is its moment (k + 1) / T, as walks have it.
    start: the state before the first clip (of the image that the rollout began from).
    asked: the sentence of each clip. One that the world does not allow in the state that the rollout is in counts as
      not followed.

  Returns:
    A verdict of each clip, and the O + 1 states that the rollout went through.

  Raises:
    DataError: another number of sentences than of clips.
  """
  if len(asked) != len(frames_OTHWC):
    raise DataError(f"{len(asked)} sentences for {len(frames_OTHWC)} clips; give one a clip")
  verdicts, states = [], [start]
  for frames_THWC, text in zip(frames_OTHWC, asked, strict=True):
    verdict, action = _decide(frames_THWC, states[-1], text)
    verdicts.append(verdict)
    states.append(memory_world.apply(states[-1], action))
  return verdicts, states


def share(verdicts: Sequence[Verdict]) -> float:
  """The share of clips that followed; nan without any."""
  return float(np.mean([verdict.followed for verdict in verdicts])) if verdicts else float("nan")


def _decide(frames_THWC: np.ndarray, state: State, asked: str) -> tuple[Verdict, Action]:
  steps, height, width, _ = frames_THWC.shape
  progress_T = np.arange(1, steps + 1) / steps
  choices = list(memory_world.legal(state))
  wanted: Action | None = None
  with contextlib.suppress(DataError):  # what the state does not allow cannot be followed
    wanted = memory_world.parse(state, asked)
  if wanted is not None and wanted.kind == "cut":
    # The other rooms count only where one was asked for: there are 144 of them.
    choices += list(memory_world.other_rooms(state))
  target = frames_THWC.astype(np.float32)
  errors = []
  for action in choices:
    film = render(state, memory_world.apply(state, action), progress_T, height, width)
    errors.append(float(np.sqrt(np.square(film - target).mean())))
  order = np.argsort(errors, kind="stable")
  nearest = choices[order[0]]
  margin = errors[order[1]] - errors[order[0]] if len(order) > 1 else float("inf")
  verdict = Verdict(
    asked=asked,
    shown=memory_world.sentence(state, nearest),
    followed=nearest == wanted,
    error=errors[order[0]],
    margin=margin,
    choices=len(choices),
  )
  return verdict, nearest
