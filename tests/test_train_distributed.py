"""Where a process runs, read from recorded environments; two processes that join share out a batch."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Mapping

import pytest

from kling_jax.errors import UsageError
from kling_jax.train import distributed
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


TWO = """
import os, sys
import numpy as np
from kling_jax.train import distributed, sharding
index, coordinator, axis = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.start(distributed.detect(coordinator=coordinator, processes=2, process=index), 10)
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = sharding.make_mesh({name: 2 if name == axis else 1 for name in sharding.AXES})
part, parts = sharding.data_part(mesh)
rows = np.split(np.arange(8, dtype=np.float32), parts)[part]
x = sharding.put_batch(mesh, {"rows": rows})["rows"]
with jax.transfer_guard("disallow"):
  total = jax.jit(lambda x: (x * x).sum(), out_shardings=NamedSharding(mesh, P()))(x)
print(part, parts, float(total))
"""


@pytest.mark.parametrize(("axis", "fed"), [("fsdp", ["0 2 140.0", "1 2 140.0"]), ("context", ["0 1 140.0"] * 2)])
def test_two_processes_share_out_a_batch(axis: str, fed: list[str]) -> None:
  """Each its own rows where the mesh cuts rows; both the same where it cuts tokens."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    coordinator = f"127.0.0.1:{free.getsockname()[1]}"
  environ = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  command = [sys.executable, "-c", TWO]
  started = [
    subprocess.Popen([*command, str(n), coordinator, axis], stdout=subprocess.PIPE, text=True, env=environ, cwd=ROOT)
    for n in (0, 1)
  ]
  answers = [process.communicate(timeout=120)[0] for process in started]
  assert [answer.strip().splitlines()[-1] for answer in answers] == fed


LOST = [
  ValueError("UNKNOWN: Gloo all-reduce failed: [pair.cc:538] Read error [127.0.0.1]:11996: Connection reset by peer"),
  RuntimeError("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1"),
]
OTHERS = [ValueError("RESOURCE_EXHAUSTED: Out of memory"), UsageError("Connection closed by peer"), KeyboardInterrupt()]


def test_lost_processes_are_told_from_other_errors() -> None:
  for error in LOST:
    found = distributed.lost(error)
    assert found is not None and "goes on from the last checkpoint" in str(found)
  assert [distributed.lost(error) for error in OTHERS] == [None] * 3


def test_constants_are_those_of_the_command_line() -> None:
  from kling_jax import cli

  args = cli.parse(["train", "--config", "c", "--workdir", "w"])
  assert (args.heartbeat, args.distributed) == (distributed.HEARTBEAT_S, "auto")
