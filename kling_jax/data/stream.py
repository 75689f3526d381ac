"""Streams of batches that are functions of their step: built ahead by Grain's threads and workers, in order."""

import abc
import contextlib
import logging
import sys
import traceback
from collections.abc import Generator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from kling_jax.errors import DataError, KlingError

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

FAILURES_IN_A_ROW = 8  # clips that follow each other, before a row gives up
FAILURES_ALLOWED = 0.01  # of the clips of a split, before a run gives up; at least FAILURES_IN_A_ROW clips


class StepBatches(abc.ABC):
  """Batches by step; picklable.

  Attributes:
    failed: {clip id: message} of clips that could not be decoded, seen by this process so far.
  """

  def __init__(self) -> None:
    self.failed: dict[str, str] = {}

  @property
  @abc.abstractmethod
  def clip_count(self) -> int:
    """The number of clips that batches are made of."""

  @abc.abstractmethod
  def _build(self, step: int) -> tuple[Batch, list[tuple[str, str]]]:
    """The batch of `step`, and (clip id, message) of each clip that was replaced in it."""

  def __getitem__(self, step: int) -> Batch:
    """This process's rows of the global batch of `step`.

    Raises:
      DataError: too many clips cannot be decoded; single ones are replaced, counted and logged.
    """
    batch, failures = self._build(step)
    self._note(failures, step)
    return batch

  def _note(self, failures: Sequence[tuple[str, str]], step: int) -> None:
    """Counts and logs replaced clips; raises where they are too many to be an accident."""
    for clip_id, message in failures:
      if clip_id not in self.failed:
        self.failed[clip_id] = message
        log.warning("step %d: clip %s cannot be decoded and is replaced by the next: %s", step, clip_id, message)
    total = self.clip_count
    allowed = max(FAILURES_IN_A_ROW, int(FAILURES_ALLOWED * total))
    if len(self.failed) > allowed:
      clip_id, message = next(iter(self.failed.items()))
      raise DataError(
        f"{len(self.failed)} of {total} clips cannot be decoded, more than the {allowed} that are replaced; first "
        f"{clip_id}: {message}; check the set with `kling data verify`"
      )

  def iterate(
    self, start_step: int, *, threads: int = 4, workers: int = 0, stop: int | None = None
  ) -> Generator[tuple[int, Batch], None, None]:
    """Yields (step, batch) from `start_step` up to before `stop`, built ahead while the caller computes.

    Args:
      start_step: the first step; nothing before it is read.
      threads: batches built at a time, in each worker where there are workers; 0 builds them when asked.
      workers: processes beside this one. PyAV, OpenCV and NumPy let threads run side by side, so that workers pay only
        where Python itself is the limit. Scripts that use them need the `if __name__ == "__main__"` guard.
      stop: the step to end before; None never ends.

    Close the generator (or exhaust it) to end threads and workers.
    """
    steps = grain.MapDataset.source(_Steps(self, sys.maxsize if stop is None else stop))
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + bool(threads))
    stream = steps[start_step:].to_iter_dataset(ahead)
    if workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain hands absl's flags to its workers and refuses unparsed ones
      stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    if stop is not None and start_step >= stop:
      return
    with contextlib.closing(iter(stream)) as built:
      for step, (batch, failures, error) in enumerate(built, start_step):
        if error is not None:
          raise error
        self._note(failures, step)
        yield step, {name: _plain(array) for name, array in batch.items()}


class _Steps:
  """What Grain indexes: one element a step. Errors travel as values: one that cannot be pickled would hang a worker."""

  def __init__(self, batches: StepBatches, stop: int):
    self._batches, self._stop = batches, stop

  def __len__(self) -> int:
    return self._stop

  def __getitem__(self, step: Any) -> tuple[Batch | None, list[tuple[str, str]], Exception | None]:
    try:
      return (*self._batches._build(int(step)), None)
    except KlingError as error:  # subclasses may take other arguments than pickle gives them
      kind = next(kind for kind in type(error).__mro__ if kind.__module__ == KlingError.__module__)
      return None, [], kind(str(error))
    except Exception as error:  # noqa: BLE001  raised again in the caller's process, with its traceback
      return None, [], RuntimeError(f"building the batch of step {step} failed: {error!r}\n{traceback.format_exc()}")


def _plain(array: np.ndarray) -> np.ndarray:
  """A worker's array lives in shared memory that ends with it: give the caller one of its own."""
  return array if type(array) is np.ndarray else np.array(array)
