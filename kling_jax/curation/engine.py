"""Runs one function over many jobs in worker processes that may hang or die without taking the run with them.

Jobs and answers are JSON. A worker is `python -m kling_jax.curation.engine module:function`: it reads a job a line from
standard input and writes an answer a line to standard output. So nothing is pickled, the caller's script needs no
main guard, and a worker whose parent was killed ends at the end of its job.
"""

import collections
import dataclasses
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, Literal

# One thread a worker: files, not threads, fill the cores.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
TRIES = 3  # of a job whose process dies
_LOOK_S = 0.5  # between two looks at the workers' memory
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True)
class Failure:
  """A job without an answer.

  Attributes:
    kind: died (the process ended), killed (from outside, as systems do when memory runs out), memory (it was ended for
      its size), deadline (it took too long and was ended), raised (a bug: an exception that the function does not
      handle).
    detail: in words.
  """

  kind: Literal["died", "killed", "memory", "deadline", "raised"]
  detail: str


Answer = tuple[int, dict[str, Any] | Failure]


def run(
  function: str,
  jobs: Sequence[dict[str, Any]],
  workers: int | None = None,
  deadline_s: float | None = None,
  memory_bytes: float | None = None,
) -> Iterator[Answer]:
  """Yields (index of the job, answer or failure) as they come, in any order.

  A job whose process dies or is killed is done again, at the end, TRIES times in all: the next one may live.

  Args:
    function: "module:name" of a function from a JSON object to a JSON object.
    jobs: its arguments, in the order in which they are begun.
    workers: processes; None: one a core.
    deadline_s: longest time of one job; a worker that takes longer is ended.
    memory_bytes: a worker whose resident memory is larger is ended (on Linux; looked at twice a second).
  """
  waiting = collections.deque(enumerate(jobs))
  tries: collections.Counter[int] = collections.Counter()
  count = max(1, min(workers or os.cpu_count() or 1, len(jobs)))
  with selectors.DefaultSelector() as selector:
    crew: list[_Worker] = []
    try:
      for _ in range(count):
        crew.append(_Worker(function, selector))
      while True:
        for worker in crew:
          if worker.job is None and waiting:
            worker.start(*waiting.popleft(), deadline_s, memory_bytes)
        busy = [worker for worker in crew if worker.job is not None]
        if not busy:
          return
        for worker in _ready(selector, busy):
          index, answer = worker.job, worker.answer()
          if answer is None or index is None:
            continue
          if worker.ended:
            worker.close()
            crew[crew.index(worker)] = _Worker(function, selector)
          if isinstance(answer, Failure) and answer.kind in ("died", "killed"):
            tries[index] += 1
            if tries[index] < TRIES:
              waiting.append((index, jobs[index]))
              continue
          yield index, answer
    finally:
      for worker in crew:
        worker.close()


def _ready(selector: selectors.BaseSelector, busy: list["_Worker"]) -> list["_Worker"]:
  """Waits until a worker has something to say or is past its deadline."""
  ends = [worker.deadline for worker in busy if worker.deadline is not None]
  ends += [time.monotonic() + _LOOK_S for worker in busy if worker.memory_bytes is not None]
  timeout = max(0.0, min(ends) - time.monotonic()) if ends else None
  spoke = [key.data for key, _ in selector.select(timeout)]
  return spoke + [worker for worker in busy if worker not in spoke and (worker.late() or worker.large())]


class Lane:
  """One worker process for one job after the other; a new one where it failed."""

  def __init__(self, function: str, deadline_s: float | None = None, memory_bytes: float | None = None):
    self._function, self._limits = function, (deadline_s, memory_bytes)
    self._selector = selectors.DefaultSelector()
    self._worker: _Worker | None = None

  def do(self, job: dict[str, Any]) -> dict[str, Any] | Failure:
    """The answer to a job, or its failure after as many tries as `run` makes."""
    for _ in range(TRIES):
      answer = self._once(job)
      if not isinstance(answer, Failure) or answer.kind not in ("died", "killed"):
        break
    return answer

  def _once(self, job: dict[str, Any]) -> dict[str, Any] | Failure:
    if self._worker is None:
      self._worker = _Worker(self._function, self._selector)
    worker = self._worker
    worker.start(0, job, *self._limits)
    while True:
      for ready in _ready(self._selector, [worker]):
        answer = ready.answer()
        if answer is not None:
          if worker.ended:
            self.close()
          return answer

  def close(self) -> None:
    if self._worker is not None:
      self._worker.close()
      self._worker = None


class _Worker:
  """One process, at most one job."""

  def __init__(self, function: str, selector: selectors.BaseSelector):
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | dict.fromkeys(_THREADS, "1") | {"PYTHONPATH": paths}
    command = [sys.executable, "-m", "kling_jax.curation.engine", function]
    self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    self._selector = selector
    self._heard = b""
    self._limit_s: float | None = None
    self.job: int | None = None
    self.deadline: float | None = None
    self.memory_bytes: float | None = None
    self.ended = False
    selector.register(self._pipe(self._process.stdout), selectors.EVENT_READ, self)

  def start(self, index: int, job: dict[str, Any], limit_s: float | None, memory_bytes: float | None) -> None:
    self.job, self._limit_s, self.memory_bytes = index, limit_s, memory_bytes
    self.deadline = None if limit_s is None else time.monotonic() + limit_s
    pipe = self._pipe(self._process.stdin)
    try:
      pipe.write(json.dumps(job).encode() + b"\n")
      pipe.flush()
    except BrokenPipeError:
      return  # It died; its closed output says so.

  def answer(self) -> dict[str, Any] | Failure | None:
    """The answer to the job, once it is whole; `ended` tells that the process is of no more use."""
    if self.late():
      self.ended, self.job = True, None
      return Failure("deadline", f"took longer than {self._limit_s:g} s and was ended")
    if self.large():
      self.ended, self.job = True, None
      return Failure("memory", f"needed more than {(self.memory_bytes or 0) / 2**30:.3g} GiB of memory and was ended")
    said = os.read(self._pipe(self._process.stdout).fileno(), 1 << 16)
    self._heard += said
    if not said:
      self.ended, self.job = True, None
      code = self._process.wait()
      if code == -signal.SIGKILL:
        return Failure("killed", "the worker was killed from outside, as happens when memory runs out")
      how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
      return Failure("died", f"the worker died ({how})")
    if not self._heard.endswith(b"\n"):
      return None
    reply, self._heard, self.job, self.deadline = json.loads(self._heard), b"", None, None
    return Failure("raised", reply["raised"]) if "raised" in reply else reply["answer"]

  def late(self) -> bool:
    """Whether the job takes too long."""
    return self.deadline is not None and time.monotonic() > self.deadline

  def large(self) -> bool:
    """Whether the process holds more memory than it may."""
    if self.memory_bytes is None or self.job is None:
      return False
    try:
      with open(f"/proc/{self._process.pid}/statm") as file:
        return int(file.read().split()[1]) * _PAGE > self.memory_bytes
    except (FileNotFoundError, ProcessLookupError, IndexError):  # no such system, or a process that has just ended
      return False

  def close(self) -> None:
    """Ends the process."""
    if self._process.stdout is not None and not self._process.stdout.closed:
      self._selector.unregister(self._process.stdout)
      self._process.stdout.close()
    self._process.kill()
    self._process.wait()
    if self._process.stdin is not None:
      try:
        self._process.stdin.close()
      except BrokenPipeError:
        return

  @staticmethod
  def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None  # both were asked for
    return pipe


def _serve(function: str) -> None:
  """The worker's loop; ends with its input."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
  # Answers go through a private copy of standard output, so that no library's print can mix with them.
  answers = os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)
  module, name = function.split(":")
  call = getattr(importlib.import_module(module), name)
  for line in sys.stdin.buffer:
    try:
      reply = {"answer": call(json.loads(line))}
    except Exception as error:  # noqa: BLE001  the parent reports it with the job's name and goes on
      reply = {"raised": f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    answers.write(json.dumps(reply).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
  _serve(sys.argv[1])
