"""SIGTERM as a request: finish the step, save, leave with exit code 0."""

import signal
import threading
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class Preemption:
  """While entered, SIGTERM sets a flag instead of killing the process.

  With several processes the flag must be agreed upon, or one would save while another steps. A program of one number a
  device goes out behind every step, and its answer is read a step later, when it has long been there: all processes
  read the same, with no wait. (JAX's own `reached_preemption_sync_point` has told two processes different steps.)
  """

  def __init__(self) -> None:
    self._requested = False
    self._previous: signal.Handlers | object | None = None
    self._asked: jax.Array | None = None
    mesh = Mesh(np.array(jax.devices()), ("device",))
    self._every = NamedSharding(mesh, P("device"))
    self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))

  def __enter__(self) -> "Preemption":
    # Python delivers signals to the main thread only.
    if threading.current_thread() is threading.main_thread():
      self._previous = signal.signal(signal.SIGTERM, self._handle) or signal.SIG_DFL
    return self

  def __exit__(self, *_: object) -> None:
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)  # type: ignore[arg-type]
      self._previous = None

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self._requested = True

  def requested(self) -> bool:
    """Whether the run should save and leave after this step; to be asked once a step, the same answer on every process.

    With several processes the answer is that of the step before.
    """
    if jax.process_count() == 1:
      return self._requested
    flag = np.array([self._requested], np.int32)
    before, self._asked = (
      self._asked,
      self._any(jax.make_array_from_callback((jax.device_count(),), self._every, lambda index: flag)),
    )
    return before is not None and bool(before)
