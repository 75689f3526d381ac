"""Cuts by the change of colour: PySceneDetect's ContentDetector, as Panda-70M splits its videos."""

import av
import cv2
import numpy as np

from kling_jax.curation.detector import Found
from kling_jax.data import picture
from kling_jax.data.record import Transition

THRESHOLD = 25.0  # Panda-70M's; PySceneDetect's own is 27
SHORTEST = 15  # frames of a shot
WIDTH = 256  # pixels that wider frames are shrunk to


class Detector:
  """A cut lies where the mean of the changes of hue, saturation and value reaches the threshold.

  Each is the mean over pixels of the absolute difference between consecutive frames, in OpenCV's HSV (hue 0 to 179,
  the others 0 to 255). A cut that comes less than 15 frames after the one before it is none.
  """

  def __init__(self, threshold: float = THRESHOLD):
    self._threshold = threshold
    self._before: np.ndarray | None = None
    self._changes: list[float] = []

  def look(self, frame: av.VideoFrame) -> None:
    """See `detector.Detector`."""
    rows, columns = picture.upright_size(frame)
    factor = max(1.0, columns / WIDTH)
    size = max(1, round(rows / factor)), max(1, round(columns / factor))
    hsv = cv2.cvtColor(picture.cover(frame, *size), cv2.COLOR_RGB2HSV)
    if self._before is None or self._before.shape != hsv.shape:  # streams may change size midway: that is a cut
      self._changes.append(np.nan if self._before is None else np.inf)
    else:
      self._changes.append(change(self._before, hsv))
    self._before = hsv

  def finish(self, fps: float) -> Found:
    """See `detector.Detector`."""
    del fps  # the rule counts frames
    changes = np.array(self._changes)
    cuts: list[int] = []
    for frame in np.flatnonzero(changes >= self._threshold).tolist():
      if frame - (cuts[-1] if cuts else 0) >= SHORTEST:
        cuts.append(frame)
    statistics = {"content": np.where(np.isinf(changes), 255.0, changes)}
    return Found([Transition(frame - 1, frame, "cut", 1.0) for frame in cuts], None, statistics)


def change(before_HWC: np.ndarray, after_HWC: np.ndarray) -> float:
  """The mean over pixels and the three channels of the absolute difference of two HSV frames."""
  return float(cv2.absdiff(before_HWC, after_HWC).mean(dtype=np.float64))
