"""Motion of a clip: mean optical flow in frame diagonals per second, whatever its frame rate and resolution."""

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
  if not pairs:
    return None
  grey = {i: _small_grey(frames_THWC[i]) for i in sorted({i for pair in pairs for i in pair})}
  speeds = []
  for first, second in pairs:
    start = np.zeros((*grey[first].shape, 2), np.float32)
    flow_HWC = cv2.calcOpticalFlowFarneback(grey[first], grey[second], start, 0.5, 4, 15, 3, 5, 1.1, 0)
    length = np.hypot(flow_HWC[..., 0], flow_HWC[..., 1]).mean(dtype=np.float64)
    speeds.append(length / (np.hypot(*grey[first].shape) * (times_s[second] - times_s[first])))
  return float(np.mean(speeds))


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


def _small_grey(frame_HWC: np.ndarray) -> np.ndarray:
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
  return np.clip(128 + 50 * detail / (deviation + NOISE_FLOOR), 0, 255).astype(np.uint8)
