"""Real jobs of one, two and four processes on this machine: the same curve, the same rows, and an end that is clean."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import psutil
import pytest

from kling_jax.train import metrics, sharding
from kling_jax.train.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = f"{ROOT}/configs/video_dit.py:runlocal"
HEARTBEAT_S = 10
STEPS = 6
SMALL = {
  "steps": STEPS, "log.every": 1, "checkpoint.every": 2, "validation.every": 3, "validation.rows": 8, "data.batch": 8,
  "data.sources": ("worlds:shapes-v1?count=24&seed=0",), "data.validation_fraction": 0.3, "data.threads": 1,
  "text.tokens": 16, "model.conditions": ("motion",), "optimizer.warmup": 2,
}  # fmt: skip

# `kling train`, with a record of what goes into each step (step, row, hash of the row), and something that happens to
# this process while a step runs or where its batch is built.
SCRIPT = """
import faulthandler, json, os, signal, sys, threading, time
faulthandler.register(signal.SIGUSR1)  # the test asks a process that hangs where it is
from kling_jax import cli
from kling_jax.data import pipeline
from kling_jax.errors import DataError
from kling_jax.train import preemption, state
from kling_jax.train.task import digests

record, event, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
iterate, update = pipeline.Batches.iterate, state.Update.step

def recorded(self, *args, **kwargs):
  for step, batch in iterate(self, *args, **kwargs):
    if (step, event) == (at, "damaged"):
      raise DataError("a file of this host is damaged")
    with open(record, "a") as file:
      for index, digest in zip(batch["index"].tolist(), digests(batch)):
        file.write(json.dumps([step, index, digest.tobytes().hex()]) + chr(10))
    yield step, batch

steps, caught = [], []
handle = preemption.Preemption._handle

def handled(self, *args):
  handle(self, *args)
  caught.append(args)

def stepped(self, state, batch):
  if len(steps) == at and event == "SIGTERM":
    os.kill(os.getppid(), signal.SIGTERM)
    while not caught:
      time.sleep(0.01)
  elif len(steps) == at and event.endswith("SIGKILL"):
    threading.Timer(0.01, os.kill, (os.getppid() if "parent" in event else os.getpid(), signal.SIGKILL)).start()
  steps.append(None)
  return update(self, state, batch)

pipeline.Batches.iterate, state.Update.step = recorded, stepped
preemption.Preemption._handle = handled
sys.exit(cli.main(sys.argv[4:]))
"""


@dataclasses.dataclass(frozen=True)
class Trained:
  """The folder of one run, which may have seen several jobs."""

  folder: pathlib.Path

  @property
  def work(self) -> pathlib.Path:
    return self.folder / "run"

  def start(
    self,
    processes: int,
    devices: int,
    mesh: Sequence[int] = (1, -1, 1, 1),
    events: Mapping[int, tuple[str, int]] = {},
    **changes: object,
  ) -> list[subprocess.Popen]:
    """A job of `processes` with `devices` each; `events` is {process: (what happens to it, at which step)}."""
    self.folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    words, environ = self._command(devices, mesh, changes)
    started = []
    for n in range(processes):
      joining = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process", str(n)]
      joining = [*joining, "--heartbeat", str(HEARTBEAT_S)] if processes > 1 else []
      event, at = events.get(n, ("", -1))
      command = [sys.executable, "-c", SCRIPT, str(self._record(processes, n)), event, str(at), *words, *joining]
      with self._log(processes, n).open("w") as log:
        started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=ROOT))
    return started

  def _command(self, devices: int, mesh: Sequence[int], changes: Mapping[str, object]) -> tuple[list[str], dict]:
    """Words behind `kling`, and the environment of a process with so many fake devices that compiles fast."""
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    environ = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {quick}"}
    sizes = {f"mesh.{axis}": size for axis, size in zip(sharding.AXES, mesh, strict=True)}
    keys = SMALL | sizes | {key.replace("__", "."): value for key, value in changes.items()}
    words = ["train", "--config", CONFIG, "--workdir", str(self.work)]
    return [*words, *(f"--config.{key}={value}" for key, value in keys.items())], environ

  def on_ray(self, processes: int, devices: int, **changes: object) -> subprocess.Popen:
    """The driver of a job on a Ray cluster of this machine."""
    self.folder.mkdir(parents=True, exist_ok=True)
    words, environ = self._command(devices, (1, -1, 1, 1), changes)
    own = ["--processes", str(processes), "--cpus", "0.5"]
    command = [sys.executable, "-m", "kling_jax.launch.ray_train", *own, "--", *words[1:], "--heartbeat", "30"]
    with self._log(processes, 0).open("w") as log:
      return subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=ROOT)

  def train(self, processes: int, devices: int, *args, **options) -> "Trained":
    """A job that ends well."""
    assert finish(self.start(processes, devices, *args, **options)) == [0] * processes, self.said()
    return self

  def curve(self) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics.read(self.work / "metrics.jsonl")}

  def fed(self, processes: int) -> dict[int, list[tuple[int, str]]]:
    """What went into each step of the job with so many processes, over all of them, in the order of rows."""
    found: dict[int, set[tuple[int, str]]] = {}
    for n in range(processes):
      for step, index, digest in map(json.loads, self._record(processes, n).read_text().splitlines()):
        found.setdefault(step, set()).add((index, digest))
    return {step: sorted(rows) for step, rows in found.items()}

  def rows_of(self, processes: int, n: int) -> set[int]:
    """The rows that process n fed."""
    return {json.loads(line)[1] for line in self._record(processes, n).read_text().splitlines()}

  def last_words(self, processes: int, n: int) -> str:
    return self._log(processes, n).read_text().strip().splitlines()[-1]

  def said(self) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("log-*")))

  def _record(self, processes: int, n: int) -> pathlib.Path:
    return self.folder / f"fed-{processes}-{n}.jsonl"

  def _log(self, processes: int, n: int) -> pathlib.Path:
    return self.folder / f"log-{processes}-{n}"


def finish(started: Sequence[subprocess.Popen], seconds: float = 400) -> list[int]:
  """Exit codes; what still runs at the end of the time says in its log where it hangs, and is killed."""
  last = time.monotonic() + seconds
  try:
    return [process.wait(timeout=max(last - time.monotonic(), 0.1)) for process in started]
  except subprocess.TimeoutExpired:
    hanging = [psutil.Process(process.pid) for process in started if process.poll() is None]
    for process in [*hanging, *(child for parent in hanging for child in parent.children())]:
      process.send_signal(signal.SIGUSR1)
    time.sleep(5)
    return [-1] * len(started)
  finally:
    for process in started:
      process.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Trained:
  """One process with one device."""
  return Trained(tmp_path_factory.mktemp("alone")).train(1, 1)


def assert_same(job: Trained, alone: Trained, *jobs: int) -> None:
  """The curve, the rows that one of these jobs (of so many processes) fed into each step, the validation."""
  assert list(job.curve()) == list(alone.curve()) == list(range(1, STEPS + 1))
  assert job.curve() == pytest.approx(alone.curve(), rel=1e-5)
  expected, fed = alone.fed(1), [job.fed(processes) for processes in jobs]
  for step, rows in expected.items():
    assert any(found.get(step) == rows for found in fed), f"step {step} was fed whole by none"
    assert all(set(found.get(step, ())) <= set(rows) for found in fed)
  ours, theirs = (metrics.read(run.work / "metrics.jsonl")[-1] for run in (job, alone))
  assert (ours["table_id"], ours["tokens"]) == (theirs["table_id"], theirs["tokens"])
  assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-5)


def test_two_processes_train_as_one(alone: Trained, tmp_path: pathlib.Path) -> None:
  job = Trained(tmp_path).train(2, 1)
  assert_same(job, alone, 2)
  assert [job.rows_of(2, n) for n in (0, 1)] == [set(range(4)), set(range(4, 8))]  # each decoded its own only
  assert "step 6" in job.last_words(2, 0) and "step 6" not in job.said().partition("--- log-2-1")[2]


@pytest.mark.drill
@pytest.mark.parametrize(
  ("first", "victim", "event", "then"),
  [
    ((4, 2, (1, 2, 4, 1)), 0, "parent SIGKILL", (2, 4, (2, 2, 1, 2))),
    ((2, 1, (1, 2, 1, 1)), 1, "SIGKILL", (1, 8, (1, 2, 2, 2))),
  ],
)
def test_a_process_killed_in_a_step_ends_the_job_and_fewer_go_on(
  first: tuple, victim: int, event: str, then: tuple, alone: Trained, tmp_path: pathlib.Path
) -> None:
  job, others = Trained(tmp_path), [n for n in range(first[0]) if n != victim]
  codes = finish(job.start(*first, {victim: (event, 5)}))
  assert [codes[n] for n in others] == [1] * len(others) and codes[victim], job.said()
  for n in others:
    assert job.last_words(first[0], n).startswith("kling: ProcessError: "), job.said()
    assert job.last_words(first[0], n).endswith("it goes on from the last checkpoint"), job.said()
  reached = Checkpoints(job.work).latest()
  assert reached in (2, 4)  # 4, if it was written before the end
  job.train(*then)
  assert min(job.fed(then[0])) == reached
  assert_same(job, alone, first[0], then[0])


@pytest.mark.drill
def test_sigterm_to_one_process_saves_on_all_and_exits_with_zero(alone: Trained, tmp_path: pathlib.Path) -> None:
  job = Trained(tmp_path)
  assert finish(job.start(2, 4, (1, 8, 1, 1), {1: ("SIGTERM", 2)})) == [0, 0], job.said()
  step = max(job.curve())
  assert step == 4 and "stopped by SIGTERM" in job.last_words(2, 0)
  assert Checkpoints(job.work).latest() == step
  job.train(1, 1)
  assert min(job.fed(1)) == step
  assert_same(job, alone, 2, 1)


@pytest.mark.drill
def test_a_failure_of_one_host_ends_all(tmp_path: pathlib.Path) -> None:
  job = Trained(tmp_path)
  assert finish(job.start(2, 1, events={1: ("damaged", 3)})) == [1, 1], job.said()
  assert "DataError: a file of this host is damaged" in job.said()
  assert job.last_words(2, 0).startswith("kling: ProcessError"), job.said()


@pytest.mark.drill
def test_a_job_on_ray_trains_as_one_and_saves_when_its_driver_is_told_to_leave(
  alone: Trained, tmp_path: pathlib.Path
) -> None:
  """A real cluster of this machine; the number of steps is no part of what a step does."""
  pytest.importorskip("ray")
  job = Trained(tmp_path)
  driver = job.on_ray(2, 1, steps=2000, checkpoint__every=0, validation__every=0)
  last = time.monotonic() + 240
  while len(job.curve()) < STEPS and driver.poll() is None and time.monotonic() < last:
    time.sleep(0.05)
  driver.send_signal(signal.SIGTERM)
  assert finish([driver]) == [0], job.said()
  curve = job.curve()
  assert STEPS <= len(curve) < 2000 and Checkpoints(job.work).latest() == max(curve)
  assert {step: curve[step] for step in alone.curve()} == pytest.approx(alone.curve(), rel=1e-5)
