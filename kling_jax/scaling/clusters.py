"""Workers on other machines: SLURM arrays, Kubernetes (GKE) jobs, Ray tasks.

The sweep file and the work directory lie on a file system that all of them see. A worker that the system ends early
(preemption, wall clock) saves and leaves; `start` asks for another as long as runs are left.
"""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from kling_jax import files
from kling_jax.errors import DataError, UsageError
from kling_jax.scaling.executor import command, environment

GRACE_S = 120  # between the announcement of a worker's end and its end: enough to save
EMPTY = 3  # times that all workers may end without anything recorded before that is an error


class Program:
  """A command line tool of a cluster, asked again where it cannot reach its server.

  Args:
    name: of the program on PATH.
    transient: patterns of messages that pass by themselves.
    patience_s: for how long to ask again, with growing pauses.
  """

  def __init__(self, name: str, transient: Sequence[str], patience_s: float = 600.0, pause_s: float = 2.0):
    self.name, self.patience_s, self.pause_s = name, patience_s, pause_s
    self._transient = re.compile("|".join(transient), re.IGNORECASE)

  def run(self, *words: str, once: bool = False) -> str:
    """Standard output of `name words`.

    Args:
      once: do not ask again where the answer was lost; the caller finds out whether it was done.

    Raises:
      UsageError: the program is not installed.
      Unreached: its server cannot be reached.
      DataError: it refuses; its own words.
    """
    begun, pause = time.monotonic(), self.pause_s
    while True:
      try:
        done = subprocess.run([self.name, *words], capture_output=True, text=True)
      except FileNotFoundError as error:
        raise UsageError(f"{self.name} is not on PATH; run this where the cluster's tools are installed") from error
      if done.returncode == 0:
        return done.stdout
      said = " ".join((done.stderr or done.stdout).split())[:500]
      if not self._transient.search(said):
        raise DataError(f"`{self.name} {' '.join(words[:3])} ...` refused: {said or f'exit code {done.returncode}'}")
      if once or time.monotonic() - begun > self.patience_s:
        raise Unreached(f"{self.name} cannot reach its server: {said}; the workers go on, start again to follow them")
      time.sleep(min(pause, 60.0))
      pause *= 2


class Unreached(DataError):
  """The cluster's server does not answer."""


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

  TRANSIENT = (
    r"socket timed out", r"unable to contact slurm controller", r"connection refused", r"communication connection",
    r"slurm_load_jobs error: (?!invalid job id)", r"resource temporarily unavailable", r"zero bytes were transmitted",
  )  # fmt: skip

  def __init__(
    self, sweep: str, folder: pathlib.Path, flags: Sequence[str] = (), needs: Needs | None = None, **patience: float
  ):
    needs = needs or Needs()
    self._sbatch = Program("sbatch", self.TRANSIENT, **patience)
    self._squeue = Program("squeue", self.TRANSIENT, **patience)
    self.folder, self.needs = folder, needs
    self.name = f"kling-{folder.name}"
    seconds = max(60.0, needs.hours * 3600 - 2 * GRACE_S)
    self._command = command(sweep, folder, [*flags, "--seconds", f"{seconds:g}"])
    self._watch = _Watch(folder)

  def script(self) -> str:
    """The batch script of the array."""
    n = self.needs
    lines = [
      f"--job-name={self.name}", f"--array=0-{n.workers - 1}", f"--time={_clock(n.hours)}",
      f"--output={self.folder.absolute()}/logs/slurm-%A_%a.log", f"--signal=TERM@{GRACE_S}", "--requeue",
      *([f"--cpus-per-task={n.cores}"] if n.cores else []), *([f"--gpus-per-task={n.gpus}"] if n.gpus else []),
      *([f"--mem={n.memory_gib}G"] if n.memory_gib else []), "--ntasks=1", *n.options,
    ]  # fmt: skip
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment(self.folder).items()]
    head = "\n".join(f"#SBATCH {line}" for line in lines)
    body = "\n".join(exports)
    return f"#!/bin/bash\n{head}\n\n{body}\ncd {shlex.quote(os.getcwd())}\nexec srun {shlex.join(self._command)}\n"

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
    return [state for state in states.split() if state not in ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT")]

  def alive(self) -> int:
    return len(self._jobs())

  def stop(self) -> None:
    """Nothing: tasks go on without anyone who watches, and end when nothing is left (`scancel --name` ends them)."""


def _clock(hours: float) -> str:
  minutes = max(1, round(hours * 60))
  return f"{minutes // 60}:{minutes % 60:02d}:00"


# ---- Kubernetes ----------------------------------------------------------------------------------------------------


class Gke:
  """Workers as pods of an indexed Job, or of a JobSet with one slice of TPU hosts a worker; `kubectl` on PATH.

  Args:
    image: container image with kling_jax. claim: persistent volume claim (ReadWriteMany) that is mounted at /sweep and
      holds the work directory `folder` (its path within the claim) and the sweep file.
    tpu: "tpu-v5p-slice:2x2x1": accelerator and topology of a worker; "" for CPU or GPU pods.
  """

  TRANSIENT = (
    r"unable to connect to the server", r"connection refused", r"i/o timeout", r"tls handshake timeout",
    r"etcdserver: request timed out", r"the server is currently unable", r"too many requests",
    r"internal error occurred",
  )  # fmt: skip

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
    self._kubectl = Program("kubectl", self.TRANSIENT, **patience)
    self.folder, self.needs, self.image, self.claim, self.tpu = folder, needs, image, claim, tpu
    self.name = re.sub(r"[^a-z0-9-]+", "-", f"kling-{folder.name}".lower()).strip("-")[:50]
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
    return "jobset" if _hosts(self.tpu) > 1 else "job"

  def manifest(self) -> dict[str, Any]:
    """The Job or JobSet."""
    if self.kind == "job":
      return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": self.name}, "spec": self._job()}
    replicated = {"name": "worker", "replicas": self.needs.workers, "template": {"spec": self._job()}}
    return {
      "apiVersion": "jobset.x-k8s.io/v1alpha2",
      "kind": "JobSet",
      "metadata": {"name": self.name, "annotations": {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}},
      "spec": {"failurePolicy": {"maxRestarts": 10}, "replicatedJobs": [replicated]},
    }  # fmt: skip

  def _job(self) -> dict[str, Any]:
    n, hosts = self.needs, _hosts(self.tpu)
    pods = hosts if self.kind == "jobset" else n.workers
    limits: dict[str, Any] = {"google.com/tpu": _chips(self.tpu) // hosts} if self.tpu else {}
    limits |= {"nvidia.com/gpu": n.gpus} if n.gpus else {}
    requests: dict[str, Any] = {"cpu": n.cores} if n.cores else {}
    requests |= {"memory": f"{n.memory_gib}Gi"} if n.memory_gib else {}
    folder = pathlib.Path("/sweep") / self.folder
    words = [*self._command, "--distributed"] if self.kind == "jobset" else self._command
    container = {
      "name": "worker", "image": self.image, "command": words, "workingDir": "/sweep",
      "env": [{"name": name, "value": value} for name, value in environment(folder).items()],
      "resources": {"limits": limits, "requests": requests | limits},
      "volumeMounts": [{"name": "sweep", "mountPath": "/sweep"}],
    }  # fmt: skip
    accelerator, _, topology = self.tpu.partition(":")
    selector = {"nodeSelector": {"cloud.google.com/gke-tpu-accelerator": accelerator,
                                 "cloud.google.com/gke-tpu-topology": topology}} if self.tpu else {}  # fmt: skip
    return {
      "completionMode": "Indexed",
      "completions": pods,
      "parallelism": pods,
      "backoffLimit": 100 * pods,
      "activeDeadlineSeconds": round(n.hours * 3600),
      "ttlSecondsAfterFinished": 600,
      # A pod that is preempted or drained says nothing about its runs; the ledger counts what a run really kills.
      "podFailurePolicy": {"rules": [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [2, 74]}},
      ]},
      "template": {"spec": {
        "restartPolicy": "Never", "terminationGracePeriodSeconds": GRACE_S, **selector, "containers": [container],
        "volumes": [{"name": "sweep", "persistentVolumeClaim": {"claimName": self.claim}}],
      }},
    }  # fmt: skip

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


def _chips(tpu: str) -> int:
  topology = tpu.partition(":")[2]
  if not re.fullmatch(r"\d+(x\d+){1,2}", topology):
    raise UsageError(f"--tpu {tpu!r} is not of the form ACCELERATOR:TOPOLOGY, e.g. tpu-v5p-slice:2x2x1")
  chips = 1
  for side in topology.split("x"):
    chips *= int(side)
  return chips


def _hosts(tpu: str) -> int:
  """Hosts of a slice: four chips each, but for slices of eight and fewer v5e or v6e chips, which stand in one."""
  if not tpu:
    return 1
  chips = _chips(tpu)
  single = 8 if re.search(r"v5-lite|v5e|v6e", tpu) else 4
  return 1 if chips <= single else -(-chips // 4)


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
