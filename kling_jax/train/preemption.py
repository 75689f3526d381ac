"""SIGTERM as a request: finish the step, save, leave with exit code 0."""

import signal
import threading
from types import FrameType

import jax


class Preemption:
  """While entered, SIGTERM sets a flag instead of killing the process.

  With several processes the flag must be agreed upon, or one would save while another steps: JAX's coordination
  service then announces a common step (`reached_preemption_sync_point`).
  """

  def __init__(self) -> None:
    self._requested = False
    self._previous: signal.Handlers | object | None = None

  def __enter__(self) -> "Preemption":
    # Python delivers signals to the main thread only; jax.distributed installs its own handler.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(signal.SIGTERM, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)  # type: ignore[arg-type]
      self._previous = None

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self._requested = True

  def requested(self, step: int) -> bool:
    """Whether the run should save and leave after `step`; the same answer on every process."""
    if jax.process_count() == 1:
      return self._requested
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
