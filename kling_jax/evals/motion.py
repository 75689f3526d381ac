"""Motion of generated videos without learned networks: VBench's dynamic degree, smoothness and flickering.

VBench (arXiv 2311.17982) measures dynamic degree with RAFT and motion smoothness with AMT; here Horn and Schunck's flow
stands in for the first, and the mean of the neighbours or a warp for the second. Temporal flickering is VBench's own,
without its filter for static videos.
"""

import jax.numpy as jnp
import numpy as np

from kling_jax.errors import DataError
from kling_jax.evals import horn_schunck

FPS = 8.0  # that VBench looks at
LIMIT = 6.0  # pixels a frame, at a shorter side of 256
SHARE = 0.05  # of the pixels, the fastest ones


def speeds(frames_THWC: np.ndarray) -> np.ndarray:
  """Mean flow length of the fastest 5 % of the pixels for each pair of frames, float64 (T - 1,), in pixels."""
  _enough(frames_THWC, 2)
  length = np.linalg.norm(horn_schunck.flows(frames_THWC), axis=-1).reshape(len(frames_THWC) - 1, -1)
  fastest = max(1, int(SHARE * length.shape[1]))
  return np.sort(length, axis=1)[:, -fastest:].mean(1).astype(np.float64)


def is_dynamic(frames_THWC: np.ndarray, fps: float) -> bool:
  """VBench's verdict "moving": enough pairs, at about 8 fps, are faster than 6 pixels at a shorter side of 256."""
  every = max(1, round(fps / FPS))
  frames_THWC = frames_THWC[::every]
  limit = LIMIT * min(frames_THWC.shape[1:3]) / 256
  return bool((speeds(frames_THWC) > limit).sum() >= round(4 * len(frames_THWC) / 16))


def dynamic_degree(videos: list[np.ndarray], fps: float) -> float:
  """The share of videos that move. Raises: DataError: no videos, or one of fewer than 2 frames."""
  if not videos:
    raise DataError("dynamic degree of no videos; give at least one")
  return float(np.mean([is_dynamic(video, fps) for video in videos]))


def temporal_flickering(frames_THWC: np.ndarray) -> float:
  """(255 - mean absolute difference of consecutive frames) / 255; 1 for a still video."""
  _enough(frames_THWC, 2)
  return float(1 - np.abs(np.diff(frames_THWC.astype(np.float64), axis=0)).mean() / 255)


def motion_smoothness(frames_THWC: np.ndarray, interpolation: str = "linear") -> float:
  """How well every second frame is made up from its neighbours, (255 - mean absolute error) / 255.

  Args:
    interpolation: "linear", the mean of the neighbours; "flow", their luma moved half way along the flow between them.

  Raises:
    DataError: fewer than 3 frames. ValueError: another interpolation.
  """
  _enough(frames_THWC, 3)
  first, middle, last = (frames_THWC[k : len(frames_THWC) - 2 + k : 2] for k in range(3))
  if interpolation == "linear":
    made = (first.astype(np.float64) + last) / 2
    return float(1 - np.abs(made - middle).mean() / 255)
  if interpolation != "flow":
    raise ValueError(f"interpolation {interpolation!r}: legal are 'linear' and 'flow'")
  a, b, true = (horn_schunck.luma(frames) for frames in (first, last, middle))
  way = jnp.asarray(horn_schunck.between(a, b))
  made = (horn_schunck.warp(jnp.asarray(a), -way / 2) + horn_schunck.warp(jnp.asarray(b), way / 2)) / 2
  return float(1 - np.abs(np.asarray(made) - true).mean() / 255)


def _enough(frames_THWC: np.ndarray, count: int) -> None:
  if len(frames_THWC) < count:
    raise DataError(f"a video of {len(frames_THWC)} frames; motion needs at least {count}")
