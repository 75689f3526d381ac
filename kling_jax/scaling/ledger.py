"""The ledger of a sweep: one JSON line an event, only ever appended, safe with many writers and any kind of end.

    FOLDER/ledger.jsonl       the events; what a sweep is
           ledger.lock        held (flock) while a line is appended or a lease changes hands
           leases/<run>.json  who works on a run; the time of its last change is the heartbeat
           runs/<run>/        work directories of the trainer

Events of a run: `start` (a lease was taken), then `finished`, `diverged`, `failed` or `stopped`. A start without an end
is a worker that was killed, or one that is still at it: the lease tells. A line is one write and is flushed to the disk
before its writer goes on; a line that a kill tore is left out by readers and cut off by the next writer. All hosts of a
sweep must see one file system on which flock works between them (local disks, NFS 4, Lustre with -o flock, Filestore).
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import math
import os
import pathlib
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kling_jax import files
from kling_jax.errors import NO_ROOM, DataError, NoRoom

ENDS = ("finished", "diverged", "failed", "stopped")


class LeaseLost(DataError):
  """Another worker took over the run, because this one did not say for too long that it lives."""


@dataclasses.dataclass
class RunState:
  """What the ledger says of one run.

  Attributes:
    status: pending, running, finished, diverged, failed (will be tried again) or abandoned (will not).
    starts, failures, kills: how often it was started, failed, and lost its worker without making progress since.
    record: the event that ended it last; {} where none did.
    lease: who works on it: runner, host, pid, beat (age of the heartbeat in seconds); {} where nobody does.
  """

  status: str = "pending"
  starts: int = 0
  failures: int = 0
  kills: int = 0
  record: dict[str, Any] = dataclasses.field(default_factory=dict)
  lease: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def ended(self) -> bool:
    """Whether nothing is left to do."""
    return self.status in ("finished", "diverged", "abandoned")


@dataclasses.dataclass(frozen=True)
class Limits:
  """When to give up.

  Attributes:
    retries: how often a run that failed is tried again.
    kills: how many workers a run may lose in a row without a newer checkpoint, before it is taken for the cause.
    stale_s: a lease without a heartbeat for so long is free.
  """

  retries: int = 2
  kills: int = 20
  stale_s: float = 120.0


class Ledger:
  """The ledger in `folder`, as one worker or reader sees it."""

  def __init__(self, folder: str | os.PathLike[str], limits: Limits = Limits()):
    self.folder = pathlib.Path(folder)
    self.path = self.folder / "ledger.jsonl"
    self.limits = limits
    self.runner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"

  def workdir(self, run: str) -> pathlib.Path:
    """The trainer's work directory of a run."""
    return self.folder / "runs" / run

  # ---- reading -----------------------------------------------------------------------------------------------------

  def rows(self) -> list[dict[str, Any]]:
    """All events in order; a last line that is not whole is left out.

    Raises:
      DataError: a line before the last is not JSON.
    """
    if not self.path.exists():
      return []
    lines = self.path.read_bytes().split(b"\n")
    lines.pop()  # what follows the last newline: nothing, or a torn line
    rows = []
    for number, line in enumerate(lines, 1):
      try:
        rows.append(json.loads(line))
      except ValueError as error:
        raise DataError(
          f"{self.path}, line {number} is damaged: {line[:60]!r}; delete that line, its run is then run again"
        ) from error
    return rows

  def states(self, runs: Sequence[str] = ()) -> dict[str, RunState]:
    """{run: state} of `runs` and of every run that the ledger names."""
    found = {run: RunState() for run in runs}
    open_start: dict[str, dict[str, Any]] = {}
    for row in self.rows():
      state = found.setdefault(row["run"], RunState())
      if row["event"] == "start":
        if row["run"] in open_start:  # the worker before was killed
          state.kills = state.kills + 1 if row["step"] <= open_start[row["run"]]["step"] else 0
        open_start[row["run"]] = row
        state.starts += 1
        continue
      open_start.pop(row["run"], None)
      state.kills = 0
      state.record, state.status = row, "pending" if row["event"] == "stopped" else row["event"]
      state.failures += row["event"] == "failed"
    now = self._now()
    for run, state in found.items():
      if state.status in ("finished", "diverged"):
        continue
      lease = self._lease(run, now)
      if lease and not self._stale(lease):
        state.lease, state.status = lease, "running"
      elif state.failures > self.limits.retries or state.kills + (run in open_start) > self.limits.kills:
        state.status = "abandoned"
      elif run in open_start:
        state.status = "pending"
    return found

  def finished(self) -> list[dict[str, Any]]:
    """The records of finished runs, in the order of their ids."""
    rows = {row["run"]: row for row in self.rows() if row["event"] == "finished"}
    return [rows[run] for run in sorted(rows)]

  # ---- taking, keeping and ending a run ----------------------------------------------------------------------------

  def claim(self, runs: Sequence[str]) -> str | None:
    """Takes the lease of the first of `runs` that is to be done and that nobody works on; None where there is none.

    Raises:
      NoRoom: the disk is full.
    """
    with self._locked():
      states = self.states(runs)
      for run in runs:
        if states[run].status in ("pending", "failed"):
          files.write_json(self._lease_path(run), {"run": run, "runner": self.runner, **_process()})
          try:
            self._append({"event": "start", "run": run, "runner": self.runner, "step": self._progress(run)})
          except BaseException:
            self._lease_path(run).unlink()
            raise
          return run
    return None

  def beat(self, run: str) -> None:
    """Says that this worker is still at `run`.

    Raises:
      LeaseLost: another worker has it.
    """
    self._check_lease(run)
    os.utime(self._lease_path(run))

  def end(self, run: str, event: str, record: Mapping[str, Any]) -> None:
    """Appends the event that ends this worker's turn at `run`, and frees its lease.

    Raises:
      LeaseLost: another worker has it; nothing is appended.
      NoRoom: the disk is full; nothing is appended, and the lease is freed.
    """
    assert event in ENDS, event
    with self._locked():
      self._check_lease(run)
      try:
        self._append({"event": event, "run": run, "runner": self.runner, **record})
      except NoRoom:
        self._lease_path(run).unlink()
        raise
      self._lease_path(run).unlink()

  def release(self, run: str) -> None:
    """Frees the lease without a word, where the disk has no room for one."""
    with self._locked():
      self._check_lease(run)
      self._lease_path(run).unlink()

  # ---- the file ----------------------------------------------------------------------------------------------------

  @contextlib.contextmanager
  def _locked(self) -> Iterator[None]:
    self.folder.mkdir(parents=True, exist_ok=True)
    with (self.folder / "ledger.lock").open("a") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      yield

  def _append(self, row: Mapping[str, Any]) -> None:
    """Writes one line whole or not at all; the caller holds the lock."""
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = json.dumps(_finite({**row, "time": stamp}), allow_nan=False).encode() + b"\n"
    handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      size = _mend(handle)
      try:
        written = os.pwrite(handle, line, size)
        if written != len(line):
          raise OSError(errno.ENOSPC, "only a part of the line was written")
        os.fsync(handle)
      except OSError as error:
        os.ftruncate(handle, size)
        if error.errno in NO_ROOM:
          raise NoRoom(
            f"{self.path}: {error.strerror}; make room and start again, what stands there is intact"
          ) from error
        raise
    finally:
      os.close(handle)

  # ---- leases ------------------------------------------------------------------------------------------------------

  def _lease_path(self, run: str) -> pathlib.Path:
    return self.folder / "leases" / f"{run}.json"

  def _lease(self, run: str, now: float) -> dict[str, Any]:
    path = self._lease_path(run)
    try:
      return {**json.loads(path.read_text()), "beat": now - path.stat().st_mtime}
    except FileNotFoundError:
      return {}

  def _stale(self, lease: Mapping[str, Any]) -> bool:
    """No heartbeat for too long, or a process of this very machine that is gone."""
    here = _process()
    if lease["host"] == here["host"] and _started(lease["pid"]) != lease["started"]:
      return True
    return lease["beat"] > self.limits.stale_s

  def _check_lease(self, run: str) -> None:
    lease = self._lease(run, 0.0)
    if lease.get("runner") != self.runner:
      raise LeaseLost(f"run {run} was taken over by {lease.get('runner', 'nobody')}; its result is theirs to record")

  def _now(self) -> float:
    """The clock of the file system, which the heartbeats are written by."""
    if not self.folder.is_dir():
      return 0.0
    with contextlib.suppress(PermissionError):  # a reader of someone else's sweep: the last change is near enough
      (self.folder / "ledger.lock").touch()
    return (self.folder / "ledger.lock").stat().st_mtime

  def _progress(self, run: str) -> int:
    """The newest checkpoint of a run, 0 where it has none."""
    folder = self.workdir(run) / "checkpoints"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0)


def _finite(value: Any) -> Any:
  """JSON knows no NaN: what is not finite becomes null."""
  if isinstance(value, Mapping):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _mend(handle: int) -> int:
  """Cuts off what a killed writer left of a line; returns the size of what is whole."""
  size = end = os.fstat(handle).st_size
  while end and os.pread(handle, 1, end - 1) != b"\n":
    start = max(0, end - 4096)
    newline = os.pread(handle, end - start, start).rfind(b"\n")
    end = start + newline + 1 if newline >= 0 else start
  if end != size:
    os.ftruncate(handle, end)
  return end


def _process() -> dict[str, Any]:
  """What tells this process from every other: host (with its boot and process namespace), pid, start time."""
  boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
  space = pathlib.Path("/proc/self/ns/pid")
  host = [socket.gethostname()]
  if boot.exists() and space.exists():
    host += [boot.read_text().strip()[:8], str(space.stat().st_ino)]
  return {"host": "/".join(host), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> int | None:
  """The start time of a process in clock ticks after boot; None where it does not run (or there is no /proc)."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_bytes()
  except (FileNotFoundError, ProcessLookupError):
    return None
  fields = stat.rsplit(b")", 1)[1].split()
  return None if fields[0] == b"Z" else int(fields[19])
