"""A worker of a sweep: takes runs off the ledger one after the other and trains them, until nothing is left.

Every executor does nothing but start workers: on the cores of this machine, as Ray tasks, as tasks of a SLURM array, as
pods of a Kubernetes job. Which run comes next is decided under the ledger's lock, so that any number of them may come
and go. One process does many runs: those that share compiled programs come after one another.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

from kling_jax.errors import ConfigError, KlingError, NoRoom, no_room
from kling_jax.scaling import cost, points, record, sweep
from kling_jax.scaling.ledger import LeaseLost, Ledger, Limits
from kling_jax.train import loop

log = logging.getLogger(__name__)

NOTHING_LEFT, NOTHING_NOW = "end", "wait"  # instead of the id of a run


@dataclasses.dataclass(frozen=True)
class Options:
  """How a worker works.

  Attributes:
    limits: of retries and leases.
    seconds: no run is begun later than this; 0 = no limit (set it below the queue's wall-clock limit).
    poll_s: how often to look again while others work on what is left.
    parent: end (saving first) when standard input closes, which happens when the process that started this one dies.
    distributed: this process is one of several of a worker (the hosts of a slice); the first one keeps the ledger.
  """

  limits: Limits = dataclasses.field(default_factory=Limits)
  seconds: float = 0.0
  poll_s: float = 2.0
  parent: bool = False
  distributed: bool = False


class Stopped(BaseException):
  """SIGTERM outside the train loop; not an Exception, so that nothing on the way mistakes it for a failure."""


def work(path: str, folder: str | pathlib.Path, options: Options | None = None) -> int:
  """Works on the sweep file `path` with the ledger in `folder`; returns how many runs it ended.

  Raises:
    NoRoom: the disk is full; the run under way is saved as far as its last checkpoint.
    LeaseLost: this process did not run for too long, and another took its run over.
    ConfigError: the sweep file.
  """
  options = options or Options()
  if options.distributed:
    jax.distributed.initialize()  # finds the other hosts by the cluster's environment: TPU slice, SLURM
  loaded = sweep.load(path)
  ledger = Ledger(folder, options.limits)
  begun, done, program = time.monotonic(), 0, ""
  with _Termination(options.parent) as stop:
    while True:
      runs = {run.id: run for run in loaded.runs(points.points(ledger.finished()))}
      over = stop.asked.is_set() or (options.seconds and time.monotonic() - begun > options.seconds)
      run_id = NOTHING_LEFT if over else ""
      if jax.process_index() == 0 and not over:
        run_id = _next(ledger, runs, program)
      run_id = _agreed(run_id)
      if run_id == NOTHING_LEFT:
        return done
      if run_id == NOTHING_NOW:
        stop.asked.wait(options.poll_s)  # others are at it: they may end, die, or make way for the next stage
        continue
      if run_id not in runs:  # it came up since this host of the worker read the ledger
        runs |= {run.id: run for run in loaded.runs(points.points(ledger.finished()))}
      if runs[run_id].program != program:
        jax.clear_caches()
        program = runs[run_id].program
      if jax.process_index() == 0:
        done += train(ledger, runs[run_id], stop)
      else:
        loop.run(runs[run_id].config, ledger.workdir(run_id))
  return done


def _next(ledger: Ledger, runs: dict[str, sweep.Run], program: str) -> str:
  """The run that was claimed, or why there is none."""
  states = ledger.states(list(runs))
  run_id = ledger.claim([run.id for run in order(list(runs.values()), states, program)])
  return run_id or (NOTHING_LEFT if all(states[run].ended for run in runs) else NOTHING_NOW)


def _agreed(word: str) -> str:
  """What the worker's first process says, on all of them."""
  if jax.process_count() == 1:
    return word
  letters = np.frombuffer(word.ljust(16).encode(), np.uint8)
  return bytes(multihost_utils.broadcast_one_to_all(letters).astype(np.uint8)).decode().strip()


def order(runs: list[sweep.Run], states: dict, program: str) -> list[sweep.Run]:
  """In which order this worker would take them: its own program first, then those that nobody is at, dear ones first.

  Dear ones first also keeps the end short: what is left for the last worker is small.
  """
  busy = {run.program for run in runs if states[run.id].status == "running"}
  dear: dict[str, float] = {}
  for run in runs:
    dear[run.program] = dear.get(run.program, 0.0) + _tokens(run) * _params(run)
  key = lambda run: (run.program != program, run.program in busy, -dear[run.program], run.program, -_tokens(run))
  return sorted(runs, key=key)


def train(ledger: Ledger, run: sweep.Run, stop: "_Termination") -> bool:
  """Trains a run that was claimed, and records how it ended; False where SIGTERM ended it."""
  folder, begun = ledger.workdir(run.id), time.process_time()
  used = lambda: {"cpu_s": round(time.process_time() - begun, 1)}  # with compiling; of this process alone
  with _beating(ledger, run.id):
    try:
      with stop.at_once():
        summary = loop.run(run.config, folder)
      if not summary.finished:
        stop.asked.set()  # the loop's own handler took the signal, and saved
      ledger.end(run.id, "finished" if summary.finished else "stopped", record.of(run, folder) | used())
      return summary.finished
    except loop.DivergenceError as error:
      ledger.end(run.id, "diverged", record.of(run, folder) | used() | {"reason": str(error)})
    except (NoRoom, LeaseLost):
      raise
    except Stopped:
      ledger.end(run.id, "stopped", record.plan(run))
      return False
    except Exception as error:  # whatever a run dies of is its record; the next one may be fine
      if no_room(error):
        ledger.release(run.id)
        raise NoRoom(
          f"{folder}: the disk is full; make room and start again, the run goes on from its checkpoint"
        ) from error
      traceback.print_exc()
      kind = type(error).__name__
      reason = str(error) if isinstance(error, KlingError) else f"unexpected {kind}: {error}"
      ledger.end(run.id, "failed", record.plan(run) | {"error": kind, "reason": " ".join(reason.split())[:2000]})
      if isinstance(error, ConfigError):
        print(f"kling: run {run.id} cannot run: {reason}", file=sys.stderr)
  return True


@contextlib.contextmanager
def _beating(ledger: Ledger, run: str) -> Iterator[None]:
  """Beats the lease's heart from a thread while the block runs.

  Where the lease is lost the process ends at once: it was suspended for longer than the lease lasts, another worker has
  the work directory, and not one more file must be written to it.
  """
  over = threading.Event()

  def beat() -> None:
    while not over.wait(ledger.limits.stale_s / 6):
      try:
        ledger.beat(run)
      except LeaseLost as error:
        if over.is_set():
          return
        print(f"kling: {error}", file=sys.stderr, flush=True)
        os._exit(1)
      except OSError as error:  # a file system that answers late: the next beat may reach it
        log.warning("no heartbeat of run %s: %s", run, error)

  thread = threading.Thread(target=beat, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()


class _Termination:
  """While entered, SIGTERM asks this worker to leave after the run under way, or at once where it only gets ready.

  Inside the train loop, the loop's own handler takes the signal and saves first. Nothing interrupts the ledger.

  Attributes:
    asked: whether to leave.
  """

  def __init__(self, parent: bool):
    self.asked = threading.Event()
    self._parent, self._at_once = parent, False

  def __enter__(self) -> "_Termination":
    self._main = threading.current_thread() is threading.main_thread()
    if self._main:
      self._before = signal.signal(signal.SIGTERM, self._handle)
    if self._parent:
      threading.Thread(target=self._watch, daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._main:
      signal.signal(signal.SIGTERM, self._before)

  @contextlib.contextmanager
  def at_once(self) -> Iterator[None]:
    """Inside, the signal raises Stopped wherever the program is."""
    self._at_once = True
    try:
      if self.asked.is_set():
        raise Stopped
      yield
    finally:
      self._at_once = False

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self.asked.set()
    if self._at_once:
      raise Stopped

  def _watch(self) -> None:
    while os.read(0, 4096):
      pass
    os.kill(os.getpid(), signal.SIGTERM)


def _tokens(run: sweep.Run) -> float:
  return run.config.steps * run.config.data.batch * cost.of(run.config).clip_tokens


def _params(run: sweep.Run) -> int:
  return cost.of(run.config).params
