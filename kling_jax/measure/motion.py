"""Motion of a clip: mean optical flow in frame diagonals per second, whatever its frame rate and resolution."""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

NAME, VERSION = "flow", "1"
GAP_S = 0.1  # wanted time between the frames of a pair: the same at 24, 30 and 60 frames a second
MOST_PAIRS = 12
LOCAL_SIGMA = 8.0  # pixels; neighbourhood whose contrast is evened out
NOISE_FLOOR = 3.0  # grey levels; fainter contrast than this is not lifted to full strength
LONGER_SIDE = 160  # pixels of the frames that the flow is computed on


def motion(frames_THWC: np.ndarray, times_s: np.ndarray) -> float | None:
  """Mean over pairs and pixels of |flow| / (frame diagonal * time between the frames).

  Farneback's dense flow (Two-Frame Motion Estimation Based on Polynomial Expansion, SCIA 2003) between frames about
  0.1 s apart, both resized to 160 pixels on the longer side. Pairs are chosen by time stamps, so that variable frame
  rates and sparsely sampled clips are measured in the same unit. Speeds above about 1.5 diagonals per second leave the
  search range and read low; sensor noise reads as a little motion (0.04 for white noise of 4 levels on a still scene).

  Args:
    frames_THWC: uint8 RGB.
    times_s: (T,) ascending seconds, from the container.

  Returns:
    A value of 0 or more in diagonals per second; none where there are not two frames at different times.
  """
  pairs = frame_pairs(times_s)
  grey = {i: prepare(frames_THWC[i]) for i in sorted({i for pair in pairs for i in pair})}
  return mean_speed([flow(grey[i], grey[j], times_s[j] - times_s[i]) for i, j in pairs])


@dataclasses.dataclass(frozen=True)
class Prepared:
  """A frame at the measuring size.

  Attributes:
    grey_HW: uint8, contrast evened out. trust_HW: float32 in [0, 1), how much of the contrast there is above noise.
  """

  grey_HW: np.ndarray
  trust_HW: np.ndarray


@dataclasses.dataclass(frozen=True)
class Flow:
  """Where the pixels of a frame went.

  Attributes:
    flow_HWC: float32 (H, W, 2), columns and rows moved to the right and down, in pixels of the measuring size.
    trust_HW: float32 in [0, 1), how far the first frame's texture carries the flow.
    gap_s: time between the frames.
  """

  flow_HWC: np.ndarray
  trust_HW: np.ndarray
  gap_s: float

  @property
  def diagonal(self) -> float:
    """Of the frame, in pixels of the measuring size."""
    return float(np.hypot(*self.trust_HW.shape))


def flow(first: Prepared, second: Prepared, gap_s: float) -> Flow:
  """Farneback's flow between two frames."""
  start = np.zeros((*first.grey_HW.shape, 2), np.float32)
  flow_HWC = cv2.calcOpticalFlowFarneback(first.grey_HW, second.grey_HW, start, 0.5, 4, 15, 3, 5, 1.1, 0)
  return Flow(flow_HWC, first.trust_HW, float(gap_s))


def mean_speed(flows: Sequence[Flow]) -> float | None:
  """Mean over flows and pixels of |flow|, in diagonals per second; none without a flow."""
  lengths = [np.hypot(f.flow_HWC[..., 0], f.flow_HWC[..., 1]).mean(dtype=np.float64) for f in flows]
  speeds = [length / (f.diagonal * f.gap_s) for length, f in zip(lengths, flows, strict=True)]
  return float(np.mean(speeds)) if speeds else None


def frame_pairs(times_s: np.ndarray) -> list[tuple[int, int]]:
  """Pairs of frames about `GAP_S` apart, at most `MOST_PAIRS` spread evenly.

  Every frame's best partner is the later frame nearest to 0.1 s away; only partners about as good as the best of the
  clip count (so that of frames sampled in separate pairs only those pairs are taken).
  """
  times_s = np.asarray(times_s, np.float64)
  pairs, errors = [], []
  for i in range(len(times_s) - 1):
    gaps = times_s[i + 1 :] - times_s[i]
    error = np.where(gaps > 0, np.abs(gaps - GAP_S), np.inf)
    j = int(error.argmin())
    if np.isfinite(error[j]):
      pairs.append((i, i + 1 + j))
      errors.append(float(error[j]))
  good = [pair for pair, error in zip(pairs, errors, strict=True) if error <= min(errors) + GAP_S / 4]
  picks = np.unique(np.linspace(0, len(good) - 1, min(len(good), MOST_PAIRS)).round().astype(int))
  return [good[k] for k in picks] if good else []


def prepare(frame_HWC: np.ndarray) -> Prepared:
  """The frame at the measuring size, grey, its contrast evened out so that faint textures carry flow as strong ones do.

  Without this Farneback's flow reads far too low over faint textures: on 100 clips of shapes-v1 the rank correlation
  with the true motion is 0.70 without and 0.97 with it.
  """
  height, width = frame_HWC.shape[:2]
  scale = LONGER_SIDE / max(height, width)
  size = max(16, round(width * scale)), max(16, round(height * scale))
  grey = cv2.cvtColor(np.ascontiguousarray(frame_HWC), cv2.COLOR_RGB2GRAY)
  grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC).astype(np.float32)
  detail = grey - cv2.GaussianBlur(grey, (0, 0), LOCAL_SIGMA)
  deviation = np.sqrt(cv2.GaussianBlur(detail * detail, (0, 0), LOCAL_SIGMA))
  even = np.clip(128 + 50 * detail / (deviation + NOISE_FLOOR), 0, 255).astype(np.uint8)
  return Prepared(even, deviation / (deviation + NOISE_FLOOR))
