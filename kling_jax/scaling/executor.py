"""Where workers run: the interface of all executors, and the one that uses the cores or GPUs of this machine."""

import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Protocol

from kling_jax.errors import DataError, NoRoom, UsageError

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# Measured on the small models of CPU sweeps: half the time to compile, the same time a step (docs/results.md).
_CPU_COMPILER = "--xla_backend_optimization_level=1"


class Executor(Protocol):
  """Starts workers somewhere, and says how many are there."""

  def start(self) -> None:
    """Starts as many workers as it has room for, beside those that are there.

    Raises:
      UsageError, DataError: the system that should run them refuses; says what it said and what to do.
    """
    ...

  def alive(self) -> int:
    """How many workers run or wait to run.

    Raises:
      NoRoom: a worker ended because the disk is full.
      DataError: workers end without having done anything; says where their output is.
    """
    ...

  def stop(self) -> None:
    """Asks the workers to save and leave, and waits for them."""
    ...


def command(sweep: str, folder: pathlib.Path, flags: Sequence[str] = ()) -> list[str]:
  """The command line of a worker."""
  return [sys.executable, "-m", "kling_jax", "sweep", "work", sweep, "--workdir", str(folder), *flags]


def environment(folder: pathlib.Path) -> dict[str, str]:
  """What every worker is told: where compiled programs are shared, and how to find this package."""
  shared = {
    "JAX_COMPILATION_CACHE_DIR": str(folder.absolute() / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  return {name: os.environ.get(name, value) for name, value in shared.items()}


class Local:
  """Workers on this machine: one a share of the cores, or one a GPU where there are GPUs (a TPU host gets one).

  Args:
    workers: how many; None for one a core, GPU or TPU host.
    cores: cores of each worker on a machine without accelerators; None shares them out evenly.
  """

  def __init__(
    self,
    sweep: str,
    folder: pathlib.Path,
    flags: Sequence[str] = (),
    *,
    workers: int | None = None,
    cores: int | None = None,
  ):
    self._command = command(sweep, folder, [*flags, "--parent"])
    self._folder = folder
    self._places = places(workers, cores)
    self._crew: dict[int, subprocess.Popen[bytes]] = {}
    self._idle_deaths = 0

  def start(self) -> None:
    for place, settings in enumerate(self._places):
      if place not in self._crew:
        self._crew[place] = self._spawn(place, settings)

  def _spawn(self, place: int, settings: dict[str, str]) -> subprocess.Popen[bytes]:
    logs = self._folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    cores = settings.get("KLING_CORES")
    with (logs / f"worker-{place}.log").open("ab") as output:
      process = subprocess.Popen(
        self._command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True,
        env={**os.environ, **environment(self._folder), **settings},
      )  # fmt: skip
    if cores and hasattr(os, "sched_setaffinity"):
      try:
        os.sched_setaffinity(process.pid, {int(core) for core in cores.split(",")})
      except ProcessLookupError:
        return process  # it is gone already; `alive` says why
    return process

  def alive(self) -> int:
    for place, process in list(self._crew.items()):
      code = process.poll()
      if code is None:
        continue
      del self._crew[place]
      _close(process.stdin)
      if code == NoRoom.exit_code:
        raise NoRoom(f"{self._folder}: a worker ended because the disk is full; make room and start again")
      if code > 0:  # a kill (below 0) takes the run under way with it, and the ledger counts that
        self._idle_deaths += 1
        if self._idle_deaths > 2 * len(self._places):
          log = self._folder / "logs" / f"worker-{place}.log"
          raise DataError(f"workers end with exit code {code} again and again; {log} ends with: {_tail(log)}")
    return len(self._crew)

  def stop(self) -> None:
    for process in self._crew.values():
      _close(process.stdin)  # to a worker this means: save and leave
    for process in self._crew.values():
      process.wait()
    self._crew.clear()


def places(workers: int | None, cores: int | None) -> list[dict[str, str]]:
  """The environment of each worker of this machine.

  Raises:
    UsageError: more workers than there are cores or GPUs.
  """
  gpus = _gpus()
  if gpus:
    if workers is not None and workers > len(gpus):
      raise UsageError(f"--workers {workers}: this machine has {len(gpus)} GPUs, and a worker needs one of its own")
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[: workers or len(gpus)]]
  if any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(pathlib.Path("/dev/vfio").glob("[0-9]*")):
    return [{}]  # one process holds all chips of a TPU host
  here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
  each = cores or max(1, len(here) // (workers or len(here)))
  count = workers or max(1, len(here) // each)
  if count * each > len(here):
    raise UsageError(f"{count} workers of {each} cores need {count * each} cores, there are {len(here)}")
  settings = []
  for place in range(count):
    mine = here[place * each : (place + 1) * each]
    flags = [os.environ.get("XLA_FLAGS", ""), _CPU_COMPILER, "--xla_cpu_multi_thread_eigen=false" if each == 1 else ""]
    settings.append(
      {"KLING_CORES": ",".join(map(str, mine)), "XLA_FLAGS": " ".join(filter(None, flags))}
      | dict.fromkeys(_THREADS, str(each))
    )
  return settings


def _gpus() -> list[str]:
  """The NVIDIA GPUs that this process may use, without waking them."""
  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  if visible is not None:
    return [gpu for gpu in visible.split(",") if gpu not in ("", "-1")]
  nodes = (re.fullmatch(r"nvidia(\d+)", path.name) for path in pathlib.Path("/dev").glob("nvidia*"))
  return sorted((match[1] for match in nodes if match), key=int)


def _close(pipe: IO[bytes] | None) -> None:
  if pipe is not None and not pipe.closed:
    pipe.close()


def _tail(path: pathlib.Path, length: int = 400) -> str:
  text = path.read_bytes()[-4000:].decode(errors="replace")
  return " ".join(text.split())[-length:]
