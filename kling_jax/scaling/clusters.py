"""Workers on other machines: SLURM arrays, Kubernetes (GKE) jobs, Ray tasks.

The sweep file and the work directory lie on a file system that all of them see. A worker that the system ends early
(preemption, wall clock) saves and leaves; `start` asks for another as long as runs are left.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from kling_jax import files
from kling_jax.errors import DataError, NoRoom, UsageError
from kling_jax.launch import kubernetes, sbatch
from kling_jax.launch.kubernetes import GRACE_S
from kling_jax.launch.program import Program, Unreached
from kling_jax.scaling.executor import command, environment

EMPTY = 3  # times that all workers may end without anything recorded before that is an error


@dataclasses.dataclass(frozen=True)
class Needs:
  """What a worker needs.

  Attributes:
    workers: at a time. cores, gpus, memory_gib: of each; 0 = the system's default.
    hours: longest life of a worker. options: further lines of the system's own (#SBATCH ...).
  """

  workers: int = 1
  cores: int = 0
  gpus: int = 0
  memory_gib: int = 0
  hours: float = 24.0
  options: tuple[str, ...] = ()


# ---- SLURM ---------------------------------------------------------------------------------------------------------


class Slurm:
  """Workers as tasks of a job array, one array at a time; `sbatch` and `squeue` on PATH."""

  def __init__(
    self, sweep: str, folder: pathlib.Path, flags: Sequence[str] = (), needs: Needs | None = None, **patience: float
  ):
    needs = needs or Needs()
    self._sbatch = Program("sbatch", sbatch.TRANSIENT, **patience)
    self._squeue = Program("squeue", sbatch.TRANSIENT, **patience)
    self.folder, self.needs = folder, needs
    self.name = f"kling-{folder.name}"
    seconds = max(60.0, needs.hours * 3600 - 2 * GRACE_S)
    self._command = command(sweep, folder, [*flags, "--seconds", f"{seconds:g}"])
    self._watch = _Watch(folder)

  def script(self) -> str:
    """The batch script of the array."""
    n = self.needs
    lines = [
      f"--job-name={self.name}", f"--array=0-{n.workers - 1}", f"--time={sbatch.clock(n.hours)}",
      f"--output={self.folder.absolute()}/logs/slurm-%A_%a.log", f"--signal=TERM@{GRACE_S}", "--requeue",
      *sbatch.resources(n.cores, n.gpus, n.memory_gib), "--ntasks=1", *n.options,
    ]  # fmt: skip
    return sbatch.script(lines, environment(self.folder), os.getcwd(), f"exec srun {shlex.join(self._command)}")

  def start(self) -> None:
    if self._jobs():
      return
    self._watch.check()
    path = self.folder / "logs" / "sweep.sbatch"
    files.write_text(path, self.script())
    try:
      self._sbatch.run("--parsable", str(path), once=True)
    except Unreached:
      # The answer was lost, and perhaps not the job: submitting again would start the array twice.
      time.sleep(self._sbatch.pause_s)
      if not self._jobs():
        self._sbatch.run("--parsable", str(path))

  def _jobs(self) -> list[str]:
    user = os.environ.get("USER") or str(os.getuid())
    states = self._squeue.run("--noheader", "--array", "--name", self.name, "--user", user, "--format", "%T")
    return [state for state in states.split() if state not in sbatch.ENDED]

  def alive(self) -> int:
    return len(self._jobs())

  def stop(self) -> None:
    """Nothing: tasks go on without anyone who watches, and end when nothing is left (`scancel --name` ends them)."""


# ---- Kubernetes ----------------------------------------------------------------------------------------------------


class Gke:
  """Workers as pods of an indexed Job, or of a JobSet with one slice of TPU hosts a worker; `kubectl` on PATH.

  Args:
    image: container image with kling_jax. claim: persistent volume claim (ReadWriteMany) that is mounted at /sweep and
      holds the work directory `folder` (its path within the claim) and the sweep file.
    tpu: "tpu-v5p-slice:2x2x1": accelerator and topology of a worker; "" for CPU or GPU pods.
  """

  def __init__(
    self,
    sweep: str,
    folder: pathlib.Path,
    flags: Sequence[str] = (),
    needs: Needs | None = None,
    *,
    image: str,
    claim: str,
    tpu: str = "",
    **patience: float,
  ):
    needs = needs or Needs()
    self._kubectl = Program("kubectl", kubernetes.TRANSIENT, **patience)
    self.folder, self.needs, self.image, self.claim = folder, needs, image, claim
    self._shape = kubernetes.Shape(tpu, needs.gpus, needs.cores, needs.memory_gib)
    self.name = kubernetes.identifier(f"kling-{folder.name}")
    inside = pathlib.PurePosixPath("/sweep")
    seconds = max(60.0, needs.hours * 3600 - 2 * GRACE_S)
    words = command(
      str(inside / sweep.lstrip("/")), pathlib.Path(inside / folder), [*flags, "--seconds", f"{seconds:g}"]
    )
    self._command = ["python", *words[1:]]
    self._watch = _Watch(folder)

  @property
  def kind(self) -> str:
    """jobset where a worker is a slice of several hosts, job elsewhere."""
    return "jobset" if self._shape.hosts > 1 else "job"

  def manifest(self) -> dict[str, Any]:
    """The Job or JobSet."""
    if self.kind == "job":
      spec = self._job() | {"ttlSecondsAfterFinished": 600}
      metadata = {"name": self.name, "labels": kubernetes.MANAGED}
      return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}
    policy = {"maxRestarts": 10}
    return kubernetes.jobset(
      self.name, self._job(), replicas=self.needs.workers, exclusive=True, policy=policy, ttl_s=600
    )

  def _job(self) -> dict[str, Any]:
    pods = self._shape.hosts if self.kind == "jobset" else self.needs.workers
    folder = pathlib.Path("/sweep") / self.folder
    words = [*self._command, "--distributed"] if self.kind == "jobset" else self._command
    pod = kubernetes.pod(
      self._shape, image=self.image, words=words, environment=environment(folder),
      volume=kubernetes.claim(self.claim), mount="/sweep",
    )  # fmt: skip
    # A pod that is preempted or drained says nothing about its runs; the ledger counts what a run really kills.
    return kubernetes.job(
      pod, pods=pods, backoff=100 * pods, seconds=round(self.needs.hours * 3600),
      fatal=(UsageError.exit_code, NoRoom.exit_code), ignore_disruption=True,
    )  # fmt: skip

  def start(self) -> None:
    found = self._state()
    if found and not found["ended"]:
      return
    self._watch.check()
    if found:  # a job that ended cannot be started again under its name
      self._kubectl.run("delete", self.kind, self.name, "--ignore-not-found", "--wait=true")
    path = self.folder / "logs" / f"{self.kind}.yaml"
    files.write_text(path, yaml.safe_dump(self.manifest(), sort_keys=False))
    self._kubectl.run("apply", "-f", str(path))

  def _state(self) -> dict[str, Any] | None:
    said = self._kubectl.run("get", self.kind, self.name, "--ignore-not-found", "-o", "json")
    if not said.strip():
      return None
    status = json.loads(said).get("status", {})
    ends = {c["type"]: c for c in status.get("conditions", ()) if c.get("status") == "True"}
    failed = ends.get("Failed")
    if failed and failed.get("reason") in ("PodFailurePolicy", "BackoffLimitExceeded"):
      raise DataError(
        f"{self.kind} {self.name} failed: {failed.get('message', failed['reason'])}; see `kubectl logs` of its pods, "
        f"mend the cause, then `kubectl delete {self.kind} {self.name}` and start again"
      )
    ended = bool({"Complete", "Completed", "Failed"} & set(ends))
    return {"ended": ended, "active": int(status.get("active", 0) or 0)}

  def alive(self) -> int:
    found = self._state()
    return 0 if found is None or found["ended"] else max(1, found["active"])

  def stop(self) -> None:
    """Nothing: pods go on without anyone who watches, and end when nothing is left (`kubectl delete` ends them)."""


# ---- Ray -----------------------------------------------------------------------------------------------------------


class Ray:
  """Workers as Ray tasks, on the cluster that this process is connected to or that `address` names (else this machine).

  Raises:
    UsageError: ray is not installed.
  """

  def __init__(
    self,
    sweep: str,
    folder: pathlib.Path,
    flags: Sequence[str] = (),
    needs: Needs | None = None,
    address: str | None = None,
  ):
    try:
      import ray
    except ImportError as error:
      raise UsageError("--executor ray needs ray: pip install 'kling_jax[ray]'") from error
    needs = needs or Needs()
    self._ray: Any = ray
    if not ray.is_initialized():
      ray.init(address=address or os.environ.get("RAY_ADDRESS"), log_to_driver=False, include_dashboard=False)
    folder = folder.absolute()  # tasks run in a folder of their own
    words = command(str(pathlib.Path(sweep).absolute()), folder, [*flags, "--parent"])
    self._remote = ray.remote(max_retries=0, num_cpus=needs.cores or 1, num_gpus=needs.gpus)(_serve)
    self._arguments = (words, environment(folder), str(folder), os.getcwd())
    self._count = needs.workers
    self._tasks: list[Any] = []
    self._watch = _Watch(folder)

  def start(self) -> None:
    while len(self._tasks) < self._count:
      self._watch.check()
      self._tasks.append(self._remote.remote(*self._arguments))

  def alive(self) -> int:
    done, self._tasks = (
      self._ray.wait(self._tasks, num_returns=len(self._tasks), timeout=0) if self._tasks else ([], [])
    )
    for task in done:
      try:
        self._ray.get(task)
      except self._ray.exceptions.RayError as error:  # a node that went away; the ledger says what it had
        self._watch.said = " ".join(str(error).split())[-300:]
    return len(self._tasks)

  def stop(self) -> None:
    for task in self._tasks:
      self._ray.cancel(task, force=True)  # its worker's standard input closes: it saves and leaves
    self._tasks.clear()


def _serve(words: list[str], variables: dict[str, str], folder: str, cwd: str) -> int:
  """The Ray task: one worker process, which ends when the task does."""
  logs = pathlib.Path(folder) / "logs"
  logs.mkdir(parents=True, exist_ok=True)
  with (logs / f"ray-{os.getpid()}.log").open("ab") as output:
    process = subprocess.Popen(
      words, stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=cwd, env={**os.environ, **variables}
    )
    code = process.wait()
  if code:
    raise RuntimeError(f"worker ended with exit code {code}; see {logs}")
  return code


# ---- what all share ------------------------------------------------------------------------------------------------


class _Watch:
  """Notices workers that come and go without leaving a trace in the ledger."""

  def __init__(self, folder: pathlib.Path):
    self._ledger, self._size, self._empty = folder / "ledger.jsonl", -1, 0
    self._folder = folder
    self.said = ""

  def check(self) -> None:
    """Called before workers are started; DataError where that has not helped several times."""
    size = self._ledger.stat().st_size if self._ledger.exists() else 0
    self._empty = self._empty + 1 if size == self._size else 0
    self._size = size
    if self._empty >= EMPTY:
      raise DataError(
        f"workers were started {EMPTY} times and recorded nothing; look at {self._folder / 'logs'}"
        + (f" (last words: {self.said})" if self.said else "")
      )


Make = Callable[..., Any]
EXECUTORS: dict[str, Make] = {"slurm": Slurm, "gke": Gke, "ray": Ray}
