"""The seam ratio: whether the picture jumps where clips of a rollout join."""

import dataclasses

import numpy as np

from kling_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Seams:
  """Mean absolute differences of consecutive frames, in levels of 255.

  Attributes:
    across: over joins without a cut. inside: within the clips after those joins, whose motion the join begins.
    ratio: across / inside; 1 is ideal, above it clips jump, below it they rest. 1 where nothing moves at all, inf where
      only joins change, nan without a join.
  """

  across: float
  inside: float
  ratio: float


def seams(frames_OTHWC: np.ndarray, cut_O: np.ndarray | None = None) -> Seams:
  """Compares the steps across joins with those inside of the clips.

  Args:
    frames_OTHWC: uint8 RGB, O clips of T frames; or (B, O, T, H, W, C), pooled over the rows.
    cut_O: bool, a cut lies directly before the clip; (B, O) for rows. Joins at cuts do not count.

  Raises:
    DataError: clips of one frame have no inside.
  """
  frames = frames_OTHWC if frames_OTHWC.ndim == 6 else frames_OTHWC[None]
  if frames.shape[2] < 2:
    raise DataError("clips of one frame have no steps inside; give clips of at least 2")
  cut_BO = np.zeros(frames.shape[:2], bool) if cut_O is None else np.asarray(cut_O, bool).reshape(frames.shape[:2])
  frames = frames.astype(np.float32)
  joined_BO = ~cut_BO[:, 1:]
  if not joined_BO.any():
    return Seams(float("nan"), float("nan"), float("nan"))
  inside = float(np.abs(np.diff(frames[:, 1:], axis=2)).mean((2, 3, 4, 5))[joined_BO].mean())
  across = float(np.abs(frames[:, 1:, 0] - frames[:, :-1, -1]).mean((2, 3, 4))[joined_BO].mean())
  if inside == 0:
    return Seams(across, inside, 1.0 if across == 0 else float("inf"))
  return Seams(across, inside, across / inside)
