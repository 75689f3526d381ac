"""Many processes: where this one runs, how it joins the others, and how all of them end when one fails.

`detect` reads the environment and imports nothing heavy; `start` joins the job before JAX makes its first device.
"""

import ctypes
import dataclasses
import functools
import glob
import os
import re
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from kling_jax.errors import ProcessError, UsageError, nearest

KINDS = ("auto", "none", "flags", "tpu", "slurm", "kubernetes")
HEARTBEAT_S = 100  # a process that is silent for so long is dead, and the job ends
START_S = 300  # how long processes wait for one another at the start
TPU_PORT, OTHER_PORT = 8482, 12321
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"

Metadata = Callable[[str], str | None]


@dataclasses.dataclass(frozen=True)
class Job:
  """A job and this process's place in it.

  Attributes:
    kind: how it was found out.
    coordinator: host:port of process 0; "" in a job of one.
    count, index: processes, and which of them this is.
    local_devices: the GPUs of this host that this process drives; None for all of them.
  """

  kind: str
  coordinator: str = ""
  count: int = 1
  index: int = 0
  local_devices: tuple[int, ...] | None = None

  def __post_init__(self):
    if not 0 <= self.index < self.count:
      raise UsageError(f"process {self.index} is not one of {self.count} processes ({self.kind}); they count from 0")
    if self.count > 1 and not re.fullmatch(r".+:\d+", self.coordinator):
      raise UsageError(f"coordinator {self.coordinator!r} ({self.kind}) is not of the form host:port")


# ---- where this process runs ---------------------------------------------------------------------------------------


def detect(
  kind: str = "auto",
  *,
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  environ: Mapping[str, str] | None = None,
  metadata: Metadata | None = None,
) -> Job:
  """Finds out which job this process belongs to.

  "auto" asks in this order: the three flags, JAX_COORDINATOR_ADDRESS with its companions, TPU hosts (GKE's variables,
  else the metadata server where there are TPU chips), SLURM; nothing of it is a job of one process.

  Args:
    kind: one of `KINDS`; "none" is one process, whatever the environment says.
    coordinator, processes, process: the flags; all or none.
    environ, metadata: for tests; the process's own by default.

  Raises:
    UsageError: half of what a system sets is there, or an unknown kind.
  """
  environ = os.environ if environ is None else environ
  if kind not in KINDS:
    raise UsageError(f"--distributed {kind!r} is unknown{nearest(kind, KINDS)}")
  given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
  if kind == "none":
    return Job("none")
  if any(value is not None for value in given.values()) or kind == "flags":
    _complete(given, "these flags go together")
    assert coordinator is not None and processes is not None and process is not None
    return Job("flags", coordinator, processes, process)
  asked = {
    "kubernetes": lambda: _variables(environ),
    "tpu": lambda: _tpu(environ, metadata),
    "slurm": lambda: _slurm(environ),
  }
  for name, find in asked.items():
    if kind in ("auto", name):
      job = find()
      if job is not None:
        return job
      if kind == name:
        raise UsageError(f"--distributed {name}: nothing in the environment says so; --distributed none is one process")
  return Job("none")


def _complete(values: Mapping[str, object], why: str) -> None:
  missing = [name for name, value in values.items() if value is None]
  if missing:
    there = [name for name in values if name not in missing]
    raise UsageError(
      f"{', '.join(missing)} missing{' beside ' + ', '.join(there) if there else ''} ({why}); "
      "set them, or pass --distributed none for one process"
    )


def _number(name: str, text: str | None) -> int:
  if text is None or not text.isdigit():
    raise UsageError(f"environment variable {name}={text!r} is not a number; --distributed none ignores it")
  return int(text)


def _variables(environ: Mapping[str, str]) -> Job | None:
  """JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or the index of an indexed Kubernetes job."""
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  values: dict[str, str | None] = {name: environ.get(name) for name in names}
  indexed = environ.get("JOB_COMPLETION_INDEX")
  on_tpu = any(name in environ for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))
  if all(value is None for value in values.values()) and (indexed is None or on_tpu):
    return None
  if values["JAX_PROCESS_ID"] is None:
    values["JAX_PROCESS_ID"] = indexed
  _complete(values, "a job of several processes sets all of them" if indexed is None else "pod of an indexed job")
  count, index = (_number(name, values[name]) for name in names[1:])
  address = str(values[names[0]])
  return Job("kubernetes", address if ":" in address else f"{address}:{OTHER_PORT}", count, index)


def _tpu(environ: Mapping[str, str], metadata: Metadata | None) -> Job | None:
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
  worker = environ.get("TPU_WORKER_ID")
  if hosts is None:
    if metadata is None:
      if "TPU_SKIP_MDS_QUERY" in environ or not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")):
        return None
      metadata = _ask_metadata
    endpoints, worker = metadata("worker-network-endpoints"), metadata("agent-worker-number")
    if endpoints is None or worker is None:
      return None
    hosts = ",".join(part.split(":")[-1] for part in endpoints.split(","))
  addresses = [host.split(":")[0] for host in hosts.split(",")]
  slices, number, first = 1, 0, addresses[0]
  names = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
  megascale = {name: environ.get(name) for name in names}
  if any(value is not None for value in megascale.values()):
    _complete(megascale, "slices over the data-centre network set all of them")
    first = str(megascale[names[0]]).split(":")[0]
    slices, number = (_number(name, megascale[name]) for name in names[1:])
  count = len(addresses) * slices
  if count == 1:
    return Job("tpu")
  _complete({"TPU_WORKER_ID": worker}, f"{len(addresses)} TPU hosts a slice")
  return Job("tpu", f"{first}:{TPU_PORT}", count, number * len(addresses) + _number("TPU_WORKER_ID", worker))


def _ask_metadata(key: str) -> str | None:
  request = urllib.request.Request(METADATA + key, headers={"Metadata-Flavor": "Google"})
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except urllib.error.HTTPError as error:
    if error.code == 404:
      return None
    raise UsageError(
      f"the TPU metadata server answered {error.code} for {key}; pass --coordinator and the rest"
    ) from error
  except OSError as error:
    raise UsageError(
      f"this machine has TPU chips but its metadata server does not answer ({error}); pass --coordinator, --processes "
      "and --process, or --distributed none for this host alone"
    ) from error


def _slurm(environ: Mapping[str, str]) -> Job | None:
  """One process a task of a SLURM step. Outside `srun` (in a batch script, a login shell) there is no step."""
  if "SLURM_JOB_ID" not in environ:
    return None
  tasks = environ.get("SLURM_STEP_NUM_TASKS")
  if tasks is None:
    if _number("SLURM_NTASKS", environ.get("SLURM_NTASKS", "1")) > 1:
      raise UsageError(
        f"SLURM job {environ['SLURM_JOB_ID']} has {environ['SLURM_NTASKS']} tasks, and this is none of them: start "
        "with `srun kling train ...`, or pass --distributed none for one process"
      )
    return Job("slurm")
  count = _number("SLURM_STEP_NUM_TASKS", tasks)
  if count == 1:
    return Job("slurm")
  names = ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
  values = {name: environ.get(name) for name in names}
  _complete(values, f"a SLURM step of {count} tasks")
  # The last 4096 ports, by job: two jobs on one host do not meet. JAX chooses the same.
  port = _number("SLURM_JOB_ID", environ["SLURM_JOB_ID"]) % 2**12 + (65535 - 2**12 + 1)
  first = re.match(r"([^,\[]+)(?:\[(\d+))?", str(values["SLURM_STEP_NODELIST"]))
  assert first is not None
  host = first.group(1) + (first.group(2) or "")
  local = _number("SLURM_LOCALID", values["SLURM_LOCALID"])
  index = _number("SLURM_PROCID", values["SLURM_PROCID"])
  return Job("slurm", f"{host}:{port}", count, index, _gpus(environ, local))


def _gpus(environ: Mapping[str, str], local: int) -> tuple[int, ...] | None:
  """The GPUs of one task: all that it sees where it is alone on its host or sees its own only, else its share."""
  seen = [gpu for gpu in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
  tasks = [int(n) for n in re.findall(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))]
  on_host = max(tasks, default=1)
  if on_host == 1 or len(seen) < on_host:
    return None
  share = len(seen) // on_host
  return tuple(range(local * share, (local + 1) * share))


# ---- joining, and ending together ----------------------------------------------------------------------------------


def start(job: Job, heartbeat_s: int = HEARTBEAT_S) -> None:
  """Joins the job; JAX then shows the devices of all its processes. A job of one needs nothing."""
  if job.count == 1:
    return
  _wait_for_name(job.coordinator.rsplit(":", 1)[0])
  import jax

  jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM; train/preemption.py agrees on it
  jax.distributed.initialize(
    job.coordinator,
    job.count,
    job.index,
    local_device_ids=job.local_devices,
    cluster_detection_method="deactivate",
    initialization_timeout=START_S,
    heartbeat_timeout_seconds=heartbeat_s,
  )
  if jax.default_backend() == "cpu":
    # JAX's cache of compiled programs has an entry for each process on CPU, of which only process 0 writes its own. At
    # the next start it would be ahead of the others by one compilation, and Gloo waits for them for 30 s only.
    jax.config.update("jax_enable_compilation_cache", False)


def _wait_for_name(host: str) -> None:
  """Pods start in any order: the coordinator's name may come into being after us."""
  last = time.monotonic() + START_S
  while True:
    try:
      socket.getaddrinfo(host, None)
      return
    except socket.gaierror as error:
      if time.monotonic() > last:
        raise ProcessError(f"no host {host!r} after {START_S} s; check the coordinator's name") from error
      time.sleep(2)


def supervise(job: Job, heartbeat_s: int = HEARTBEAT_S) -> Callable[[int], None]:
  """Returns in a child process, which trains, what ends that process: call it with the exit code.

  The parent passes signals on, and says how the child ended. JAX ends a process whose peers are lost from within, with
  abort(): only another process can then say so in one line. A job of one needs no parent; ending it does nothing.
  """
  if job.count == 1:
    return lambda code: None
  told, telling = os.pipe()  # the child tells the parent that all is done, whatever becomes of it afterwards
  parent, child = os.getpid(), os.fork()
  if child == 0:
    os.close(told)
    if sys.platform == "linux":
      ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: who kills the parent means the child
      if os.getppid() != parent:
        os._exit(1)
    return functools.partial(_end, telling)
  os.close(telling)
  os.set_blocking(told, False)
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(child, number))
  _, status = os.waitpid(child, 0)
  try:
    done = bool(os.read(told, 1))
  except BlockingIOError:  # nothing was written, and a process of the child's still holds the pipe
    done = False
  code = 0 if done else os.waitstatus_to_exitcode(status)
  if code < 0:
    name = signal.Signals(-code).name
    why = (
      f"another process of the job ended, or was silent for {heartbeat_s} s (see above)"
      if -code == signal.SIGABRT
      else f"it was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
    )
    print(f"kling: ProcessError: process {job.index} of {job.count} ended: {why}; start the job again, on any number "
          "of processes: it goes on from the last checkpoint", file=sys.stderr, flush=True)  # fmt: skip
    code = 1
  os._exit(code)


def _end(telling: int, code: int) -> None:
  """Ends a process of several at once.

  An ordinary exit takes JAX's services down one by one while the others still use them, and after a SIGTERM may wait
  for ever; an ordinary exit of a failed process would wait for the others, and they for it.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  if code == 0:
    from jax.experimental import multihost_utils

    os.write(telling, b"1")
    try:
      multihost_utils.sync_global_devices("the job is done")  # the others may still need the coordinator
    except (ValueError, RuntimeError) as error:
      print(f"kling: all is saved; then a process was lost ({' '.join(str(error).split())[:200]})", file=sys.stderr)
      sys.stderr.flush()
  os._exit(code)


def lost(error: BaseException) -> ProcessError | None:
  """What an error of JAX's runtime means in a job of several: that others are gone, or (None) something else."""
  text = " ".join(str(error).split())
  # JAX raises these as JaxRuntimeError or, where a program is started, as ValueError.
  if not isinstance(error, (ValueError, RuntimeError)) or not re.search(
    r"Gloo \S+ failed|Connection (closed|reset) by peer|CoordinationService|stopped sending heartbeats", text
  ):
    return None
  return ProcessError(
    f"contact to another process of the job was lost ({text[:200]}); start the job again, on any number of processes: "
    "it goes on from the last checkpoint"
  )
