"""All scores of one clip: which frames to look at, which scorers to ask, what each answer is called."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from kling_jax.data.source import Score
from kling_jax.errors import DataError
from kling_jax.measure import aesthetic, clarity, motion

PLACES = 8  # of a clip that are looked at, each with two frames


@dataclasses.dataclass(frozen=True)
class Scorer:
  """One way to measure one condition.

  Attributes:
    condition: the score's name in a clip record (motion, aesthetic, clarity, ...).
    name, version: written beside every value; a change of the arithmetic is a new version.
    measure: (frames uint8 (T, H, W, 3) RGB, ascending seconds (T,)) -> value, or none where it is undefined.
  """

  condition: str
  name: str
  version: str
  measure: Callable[[np.ndarray, np.ndarray], float | None]


SCORERS = (
  Scorer("motion", motion.NAME, motion.VERSION, motion.motion),
  Scorer("aesthetic", aesthetic.NAME, aesthetic.VERSION, aesthetic.aesthetic),
  Scorer("clarity", clarity.NAME, clarity.VERSION, clarity.clarity),
)


def score(frames_THWC: np.ndarray, times_s: np.ndarray, scorers: Sequence[Scorer] = SCORERS) -> dict[str, Score]:
  """Measures a clip.

  Args:
    frames_THWC: uint8 RGB frames (T, H, W, 3) at any size; `sample_times` says which frames of a long clip to take.
    times_s: (T,) their ascending times in seconds.
    scorers: who measures; the default three are motion, aesthetic and clarity.

  Returns:
    {condition: Score}. A condition that the frames do not define (the motion of a single frame) is left out.

  Raises:
    DataError: no frames, a wrong shape or dtype, or times that do not match them.
  """
  if frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or frames_THWC.dtype != np.uint8 or not frames_THWC.size:
    found = f"{frames_THWC.dtype} {frames_THWC.shape}"
    raise DataError(f"scores need at least one frame, as uint8 of shape (T, H, W, 3); got {found}")
  times_s = np.asarray(times_s, np.float64)
  if times_s.shape != frames_THWC.shape[:1] or (np.diff(times_s) < 0).any():
    raise DataError(f"{len(frames_THWC)} frames need as many ascending times, got shape {times_s.shape}")
  scores = {}
  for scorer in scorers:
    value = scorer.measure(frames_THWC, times_s)
    if value is not None:
      scores[scorer.condition] = Score(value, scorer.name, scorer.version)
  return scores


def sample_times(duration_s: float, fps: float) -> np.ndarray:
  """The times that `score` wants of a clip: eight places spread over it, at each two frames about 0.1 s apart.

  Args:
    duration_s: length of the clip. fps: its mean frame rate; a gap is a whole number of frames where there are any.

  Returns:
    (16,) ascending seconds in [0, duration_s), fewer for clips so short that places coincide; (1,) for a single frame.
  """
  step = 1 / fps
  last = max(duration_s - step, 0.0)  # the last frame's start
  gap = min(max(round(motion.GAP_S * fps), 1) * step, last)
  starts = np.linspace(0, last - gap, PLACES)
  starts = np.unique(np.round(starts * fps)) * step
  return np.unique(np.round(np.concatenate([starts, starts + gap]), 9))
