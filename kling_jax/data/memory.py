"""A memory in front of a clip source: headers and decoded frames are made once a process, up to a limit of bytes."""

import functools
import threading

import numpy as np

from kling_jax.data.open import open_source
from kling_jax.data.source import ClipInfo, ClipSource


class MemorySource:
  """The clips of another source, the same to the last bit; what was read once is not read again.

  Frames are found again where a clip is shown at the same times (to a microsecond) and size: where a clip is as long as
  its bucket, or in validation. When the limit is reached, frames pass through and are not kept.
  """

  def __init__(self, source: ClipSource, limit_bytes: int):
    self.source, self.limit_bytes = source, limit_bytes
    self._forget()

  def _forget(self) -> None:
    self._infos: dict[int, ClipInfo] = {}
    self._frames: dict[tuple[int, int, int, bytes], np.ndarray] = {}
    self._bytes = 0
    self._lock = threading.Lock()

  def __getstate__(self) -> dict:
    return {"source": self.source, "limit_bytes": self.limit_bytes}  # a worker process starts with an empty memory

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state)
    self._forget()

  @property
  def fingerprint(self) -> str:
    return self.source.fingerprint

  def __len__(self) -> int:
    return len(self.source)

  def info(self, index: int) -> ClipInfo:
    """See `ClipSource.info`."""
    if index not in self._infos:
      self._infos[index] = self.source.info(index)
    return self._infos[index]

  def frames(self, index: int, times_s: np.ndarray, height: int, width: int) -> np.ndarray:
    """See `ClipSource.frames`; the array is read-only."""
    key = (index, height, width, np.round(np.asarray(times_s) * 1e6).astype(np.int64).tobytes())
    kept = self._frames.get(key)
    if kept is not None:
      return kept
    frames_THWC = self.source.frames(index, times_s, height, width)
    with self._lock:
      if key not in self._frames and self._bytes + frames_THWC.nbytes <= self.limit_bytes:
        frames_THWC.setflags(write=False)
        self._frames[key] = frames_THWC
        self._bytes += frames_THWC.nbytes
    return frames_THWC


@functools.lru_cache(maxsize=4)
def remembered(spec: str, limit_bytes: int) -> MemorySource:
  """The source `spec` behind a memory that later runs of this process find filled."""
  return MemorySource(open_source(spec), limit_bytes)
