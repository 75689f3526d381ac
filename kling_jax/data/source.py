"""What every set of clips offers: a header without media, and frames at chosen times."""

import dataclasses
import typing

import numpy as np


@dataclasses.dataclass(frozen=True)
class Score:
  """One measured value of a clip, in the raw unit of the scorer that made it."""

  value: float
  scorer: str
  version: str


@dataclasses.dataclass(frozen=True)
class ClipInfo:
  """What is known of a clip without decoding it.

  Attributes:
    clip_id: stable name of the clip; equal ids mean equal frames.
    caption: the merged caption; empty where there is none.
    duration_s: seconds from the first frame's start to the last frame's end.
    fps: mean frame rate; times of single frames come from the container, never from `frame / fps`.
    num_frames, width, height: as displayed (after the rotation flag).
    scores: raw scores by name (motion, aesthetic, clarity, ...).
    video_id, index: the video that the clip was cut from, and its place in it.
    cut_before: whether a transition lies directly before it; false: it goes on where the clip before it ends.
    start_s: where the clip starts in its video, in seconds from the video's first frame.
    parts: the parts of the caption that are known, by Koala-36M's six names (subject, action, environment, ...).
  """

  clip_id: str
  caption: str
  duration_s: float
  fps: float
  num_frames: int
  width: int
  height: int
  scores: dict[str, Score] = dataclasses.field(default_factory=dict)
  video_id: str = ""
  index: int = 0
  cut_before: bool = True
  start_s: float = 0.0
  parts: dict[str, str] = dataclasses.field(default_factory=dict)


@typing.runtime_checkable
class ClipSource(typing.Protocol):
  """A random-access set of clips: folder, table, ArrayRecord set, TFDS data source or procedural world.

  Implementations are picklable (Grain worker processes receive them) and open files lazily.
  """

  @property
  def fingerprint(self) -> str:
    """Short hash of the identity and order of the clips; caches and run records keep it."""
    ...

  def __len__(self) -> int: ...

  def info(self, index: int) -> ClipInfo:
    """The header of clip `index`; cheap (no decoding)."""
    ...

  def frames(self, index: int, times_s: np.ndarray, height: int, width: int) -> np.ndarray:
    """Decodes the frames shown at `times_s` (seconds from the clip's start, ascending).

    Each frame is resized so that it covers height x width (area filter when shrinking) and cropped at the centre.

    Returns:
      uint8 array (len(times_s), height, width, 3), RGB.

    Raises:
      DataError: the media cannot be decoded.
    """
    ...
