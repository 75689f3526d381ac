"""What every method of splitting offers: it sees each frame of a video once, and then says what it found."""

import dataclasses
from typing import Protocol

import av
import numpy as np

from kling_jax.data.record import Transition


@dataclasses.dataclass(frozen=True)
class Found:
  """What a detector found.

  Attributes:
    transitions: in order, without overlap.
    spans: frames [start, end) of the shots; None: all that lies between the transitions.
    statistics: {name: (frames,)} what was measured between each frame and the one before; nan for the first.
  """

  transitions: list[Transition]
  spans: list[tuple[int, int]] | None
  statistics: dict[str, np.ndarray]


class Detector(Protocol):
  """Finds the transitions of one video."""

  def look(self, frame: av.VideoFrame) -> None:
    """Sees the next frame in presentation order."""
    ...

  def finish(self, fps: float) -> Found:
    """After the last frame; `fps` is the mean rate."""
    ...
