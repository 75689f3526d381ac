"""Where a process runs, read from recorded environments; and real jobs of 1, 2 and 4 processes on this machine."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import pytest

from kling_jax.errors import UsageError
from kling_jax.train import distributed, metrics
from kling_jax.train.distributed import Job, detect

ROOT = pathlib.Path(__file__).parents[1]

# ---- detection: what the systems set (documentation and logs of GKE, Kubeflow, SLURM) ------------------------------

GKE = {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "t-0.s,t-1.s,t-2.s,t-3.s", "JOB_COMPLETION_INDEX": "2",
       "KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_SKIP_MDS_QUERY": "true", "TPU_TOPOLOGY": "2x2x4"}  # fmt: skip
SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "set-slice-0-0.set", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
SLURM = {"SLURM_JOB_ID": "754197", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
         "SLURM_STEP_NODELIST": "gpu[071-072]", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2",
         "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "CUDA_VISIBLE_DEVICES": "0,1"}  # fmt: skip
KUBEFLOW = {"JAX_COORDINATOR_ADDRESS": "job-node-0-0.job:6666", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "1"}
INDEXED = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2", "JAX_NUM_PROCESSES": "3",
           "JAX_COORDINATOR_ADDRESS": "job-0.job"}  # fmt: skip
RECORDED = [
  ({}, Job("none")),
  (GKE, Job("tpu", "t-0.s:8482", 4, 2)),
  (GKE | SLICES, Job("tpu", "set-slice-0-0.set:8482", 8, 6)),
  ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, Job("tpu")),
  (SLURM, Job("slurm", "gpu071:61973", 4, 3, (1,))),
  (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0"}, Job("slurm", "gpu071:61973", 4, 3)),
  (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, Job("slurm", "gpu071:61973", 4, 3)),  # --gpus-per-task shows one only
  (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Job("slurm", "gpu071:61973", 4, 3, (2, 3))),
  (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, Job("slurm")),  # the shell of salloc
  ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, Job("slurm")),
  (KUBEFLOW, Job("kubernetes", "job-node-0-0.job:6666", 3, 1)),
  (INDEXED, Job("kubernetes", "job-0.job:12321", 3, 2)),
]


@pytest.mark.parametrize(("environ", "expected"), RECORDED)
def test_recorded_environments(environ: Mapping[str, str], expected: Job) -> None:
  assert detect(environ=environ) == expected
  assert detect("none", environ=environ) == Job("none")


def test_flags_come_before_the_environment() -> None:
  assert detect(coordinator="a:1", processes=2, process=1, environ=GKE) == Job("flags", "a:1", 2, 1)


METADATA = {"worker-network-endpoints": "unknown:0:10.1.0.2,unknown:1:10.1.0.3", "agent-worker-number": "1"}


def test_tpu_machines_ask_the_metadata_server() -> None:
  assert detect(environ={}, metadata=METADATA.get) == Job("tpu", "10.1.0.2:8482", 2, 1)
  new = METADATA | {"worker-network-endpoints": "10.1.0.2,10.1.0.3"}
  assert detect(environ={}, metadata=new.get) == Job("tpu", "10.1.0.2:8482", 2, 1)


@pytest.mark.parametrize("environ", [GKE, GKE | SLICES, SLURM])
def test_jax_itself_finds_the_same(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
  """Against the classes that `jax.distributed.initialize()` asks; they read the process's own environment."""
  from jax._src.clusters.cloud_tpu_cluster import BaseTpuCluster, GkeTpuCluster
  from jax._src.clusters.slurm_cluster import SlurmCluster

  for name in os.environ:
    if name.startswith(("TPU_", "MEGASCALE_", "SLURM_")):
      monkeypatch.delenv(name)
  for name, value in environ.items():
    monkeypatch.setenv(name, value)
  for name in SLICES.keys() - environ.keys():
    monkeypatch.setenv(name, "")  # or it would ask a metadata server
  monkeypatch.setattr(BaseTpuCluster, "wait_for_coordinator", lambda *_: None)
  theirs = SlurmCluster if environ is SLURM else GkeTpuCluster
  ours = detect(environ=environ)
  assert ours.coordinator == theirs.get_coordinator_address(1, None)
  assert (ours.count, ours.index) == (theirs.get_process_count(), theirs.get_process_id())


@pytest.mark.parametrize(
  ("environ", "flags", "missing"),
  [
    ({k: v for k, v in KUBEFLOW.items() if k != "JAX_PROCESS_ID"}, {}, "JAX_PROCESS_ID missing"),
    ({"JOB_COMPLETION_INDEX": "0"}, {}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES missing"),
    ({k: v for k, v in GKE.items() if k != "TPU_WORKER_ID"}, {}, "TPU_WORKER_ID missing"),
    (GKE | {"MEGASCALE_NUM_SLICES": "2"}, {}, "MEGASCALE_COORDINATOR_ADDRESS, MEGASCALE_SLICE_ID missing"),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, {}, "srun"),
    ({k: v for k, v in SLURM.items() if k != "SLURM_PROCID"}, {}, "SLURM_PROCID missing"),
    (GKE | {"TPU_WORKER_ID": "x"}, {}, "TPU_WORKER_ID='x' is not a number"),
    (KUBEFLOW | {"JAX_PROCESS_ID": "3"}, {}, "process 3 is not one of 3"),
    ({}, {"coordinator": "a:1"}, "--processes, --process missing"),
    ({}, {"coordinator": "a", "processes": 2, "process": 0}, "not of the form host:port"),
    ({}, {"kind": "slrum"}, "did you mean 'slurm'"),
    ({}, {"kind": "slurm"}, "nothing in the environment says so"),
  ],
)
def test_half_of_a_job_is_refused_with_what_is_missing(environ: dict, flags: dict, missing: str) -> None:
  with pytest.raises(UsageError, match=missing):
    detect(**flags, environ=environ)


def test_finding_out_that_there_is_one_process_needs_no_jax() -> None:
  script = "import sys; from kling_jax.train import distributed as d; d.start(d.detect(environ={})); " \
           "assert 'jax' not in sys.modules"  # fmt: skip
  subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


# ---- real jobs -----------------------------------------------------------------------------------------------------

HEARTBEAT_S = 10
STEPS = 8
# A model of the smallest size, and a record of what every process feeds: step, rows, hash of each row.
SCRIPT = """
import json, sys, time
from absl import flags; flags.FLAGS.mark_as_parsed()
from kling_jax import cli
from kling_jax.models import video_dit
video_dit.PRESETS["tiny"] = video_dit.VideoDiTConfig(width=32, depth=2, heads=2, mlp_width=64)
from kling_jax.data import pipeline
from kling_jax.train.task import digests
record, slow, bad = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
iterate = pipeline.Batches.iterate
def recorded(self, *args, **kwargs):
  for step, batch in iterate(self, *args, **kwargs):
    if step == bad and self.process_index == 1:
      from kling_jax.errors import DataError
      raise DataError("a file of this host is damaged")
    with open(record, "a") as file:
      for index, digest in zip(batch["index"].tolist(), digests(batch)):
        file.write(json.dumps([step, index, digest.tobytes().hex()]) + "\\n")
    yield step, batch
    time.sleep(slow)
pipeline.Batches.iterate = recorded
sys.exit(cli.main(sys.argv[4:]))
"""
CONFIG = {
  "model.size": "tiny", "steps": STEPS, "log.every": 1, "checkpoint.every": 3, "validation.every": 4,
  "validation.rows": 8, "text.tokens": 16, "text.width": 32, "data.batch": 8, "optimizer.warmup": 2,
  "data.sources": ("worlds:shapes-v1?count=24&seed=0",), "data.validation_fraction": 0.3, "data.threads": 1,
}  # fmt: skip


def launch(
  folder: pathlib.Path, processes: int, devices: int, *, slow: float = 0, bad: int = -1, mesh: str = "fsdp",
  config: Mapping[str, object] = {},
) -> list[subprocess.Popen]:  # fmt: skip
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  environ = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false"
  }
  sizes = {f"mesh.{axis}": 1 for axis in ("replica", "fsdp", "context", "tensor")} | {f"mesh.{mesh}": -1}
  started = []
  folder.mkdir(parents=True, exist_ok=True)
  for index in range(processes):
    words = [
      "train",
      "--config",
      str(ROOT / "configs" / "video_dit.py") + ":runlocal",
      "--workdir",
      str(folder / "run"),
    ]
    words += [f"--config.{key}={value}" for key, value in (CONFIG | sizes | dict(config)).items()]
    if processes > 1:
      words += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process", str(index)]
      words += ["--heartbeat", str(HEARTBEAT_S)]
    record = folder / f"fed-{processes}-{index}.jsonl"
    with (folder / f"log-{processes}-{index}").open("w") as log:
      command = [sys.executable, "-c", SCRIPT, str(record), str(slow), str(bad), *words]
      started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=ROOT))
  return started


def finish(started: Sequence[subprocess.Popen], seconds: float = 240) -> list[int]:
  last = time.monotonic() + seconds
  try:
    return [process.wait(timeout=max(last - time.monotonic(), 0.1)) for process in started]
  finally:
    for process in started:
      process.kill()


def logs(folder: pathlib.Path) -> str:
  return "\n".join(f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted(folder.glob("log-*")))


def train(folder: pathlib.Path, processes: int, devices: int, **options: object) -> pathlib.Path:
  codes = finish(launch(folder, processes, devices, **options))  # type: ignore[arg-type]
  assert codes == [0] * processes, logs(folder)
  return folder


def curve(folder: pathlib.Path) -> dict[int, float]:
  return {row["step"]: row["loss"] for row in metrics.read(folder / "run" / "metrics.jsonl")}


def fed(folder: pathlib.Path, processes: int) -> dict[int, set[tuple[int, str]]]:
  """What went into each step, over all processes of a job of so many."""
  found: dict[int, set[tuple[int, str]]] = {}
  for path in folder.glob(f"fed-{processes}-*.jsonl"):
    for line in path.read_text().splitlines():
      step, index, digest = json.loads(line)
      found.setdefault(step, set()).add((index, digest))
  return found


def wait_for_step(folder: pathlib.Path, step: int, started: Sequence[subprocess.Popen]) -> None:
  last = time.monotonic() + 200
  while max(curve(folder), default=0) < step:
    assert time.monotonic() < last and all(process.poll() is None for process in started), logs(folder)
    time.sleep(0.05)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  return train(tmp_path_factory.mktemp("one"), 1, 2)


def assert_same(folder: pathlib.Path, processes: int, one: pathlib.Path) -> None:
  ours, alone = curve(folder), curve(one)
  assert list(ours) == list(alone) == list(range(1, STEPS + 1))
  assert ours == pytest.approx(alone, rel=1e-5)
  assert fed(folder, processes) == fed(one, 1)
  rows, expected = (metrics.read(path / "run" / "metrics.jsonl")[-1] for path in (folder, one))
  assert rows["table_id"] == expected["table_id"] and rows["tokens"] == expected["tokens"]
  assert rows["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


def test_two_processes_train_as_one(one: pathlib.Path, tmp_path: pathlib.Path) -> None:
  train(tmp_path, 2, 1)
  assert_same(tmp_path, 2, one)
  assert "step 8" in (tmp_path / "log-2-0").read_text() and "step 8" not in (tmp_path / "log-2-1").read_text()
  parts = [
    set(json.loads(line)[1] for line in (tmp_path / f"fed-2-{n}.jsonl").read_text().splitlines()) for n in (0, 1)
  ]
  assert parts == [set(range(4)), set(range(4, 8))]  # each decoded its own rows only


@pytest.mark.drill
def test_four_processes_train_as_one(one: pathlib.Path, tmp_path: pathlib.Path) -> None:
  assert_same(train(tmp_path, 4, 2), 4, one)


@pytest.mark.drill
def test_a_sample_cut_over_processes_is_fed_to_both(one: pathlib.Path, tmp_path: pathlib.Path) -> None:
  assert_same(train(tmp_path, 2, 1, mesh="context"), 2, one)


@pytest.mark.drill
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job_and_fewer_go_on(one: pathlib.Path, tmp_path: pathlib.Path, victim: int) -> None:
  started = launch(tmp_path, 2, 1, slow=0.3)
  wait_for_step(tmp_path, 5, started)
  started[victim].send_signal(signal.SIGKILL)
  killed = time.monotonic()
  other = started[1 - victim]
  assert other.wait(timeout=3 * HEARTBEAT_S) == 1, logs(tmp_path)
  assert time.monotonic() - killed < 2 * HEARTBEAT_S
  finish(started)
  last = (tmp_path / f"log-2-{1 - victim}").read_text().strip().splitlines()[-1]
  assert re.match(r"kling: ProcessError: .*goes on from the last checkpoint", last), last
  train(tmp_path, 1, 1)
  assert curve(tmp_path) == pytest.approx(curve(one), rel=1e-5)
  resumed, alone = fed(tmp_path, 1), fed(one, 1)
  assert min(resumed) == 3 and all(resumed[step] == alone[step] for step in resumed)


@pytest.mark.drill
def test_sigterm_to_one_process_saves_on_all_and_exits_with_zero(one: pathlib.Path, tmp_path: pathlib.Path) -> None:
  started = launch(tmp_path, 2, 1, slow=0.3)
  wait_for_step(tmp_path, 2, started)
  started[1].send_signal(signal.SIGTERM)
  assert finish(started) == [0, 0], logs(tmp_path)
  assert 2 < max(curve(tmp_path)) < STEPS
  assert "stopped by SIGTERM" in (tmp_path / "log-2-0").read_text()
  train(tmp_path, 4, 1)
  assert curve(tmp_path) == pytest.approx(curve(one), rel=1e-5)


@pytest.mark.drill
def test_a_failure_of_one_host_ends_all(tmp_path: pathlib.Path) -> None:
  started = launch(tmp_path, 2, 1, bad=4)
  began = time.monotonic()
  assert finish(started) == [1, 1], logs(tmp_path)
  assert time.monotonic() - began < 120
  assert "DataError: a file of this host is damaged" in (tmp_path / "log-2-1").read_text()
  assert "kling: ProcessError" in (tmp_path / "log-2-0").read_text()


def test_constants_are_those_of_the_command_line() -> None:
  from kling_jax import cli

  args = cli.parse(["train", "--config", "c", "--workdir", "w"])
  assert (args.heartbeat, args.distributed) == (distributed.HEARTBEAT_S, "auto")
