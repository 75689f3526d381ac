"""SLURM and Kubernetes executors against programs on PATH that record their calls and fail in the usual ways."""

import json
import os
import pathlib
import stat
import subprocess
import sys

import pytest
import yaml

from kling_jax.errors import DataError, NoRoom, UsageError
from kling_jax.scaling import clusters, executor
from kling_jax.scaling.clusters import Gke, Needs, Slurm, Unreached

FAKE = """#!{python}
import json, pathlib, sys
folder = pathlib.Path({folder!r})
with (folder / "calls.jsonl").open("a") as calls:
  calls.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
answers = folder / "{name}.json"
script = json.loads(answers.read_text())
answer = script.pop(0) if len(script) > 1 else script[0]
answers.write_text(json.dumps(script))
sys.stdout.write(answer.get("out", ""))
sys.stderr.write(answer.get("err", ""))
sys.exit(answer.get("code", 0))
"""


class Fakes:
  """Fake programs in a folder of their own: each call takes the next of the scripted answers, the last one for ever."""

  def __init__(self, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    self.folder = folder
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

  def answer(self, name: str, *answers: dict) -> None:
    path = self.folder / name
    path.write_text(FAKE.format(python=sys.executable, folder=str(self.folder), name=name))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    (self.folder / f"{name}.json").write_text(json.dumps(list(answers)))

  def calls(self, name: str) -> list[list[str]]:
    path = self.folder / "calls.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row[1:] for row in rows if row[0] == name]


@pytest.fixture
def fakes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
  return Fakes(tmp_path / "bin", monkeypatch)


def slurm(tmp_path: pathlib.Path, patience_s: float = 60.0, **needs) -> Slurm:
  (tmp_path / "study").mkdir(exist_ok=True)
  return Slurm("s.py", tmp_path / "study", ["--retries", "1"], Needs(**needs), patience_s=patience_s, pause_s=0.01)


def gke(tmp_path: pathlib.Path, tpu: str = "", **needs) -> Gke:
  (tmp_path / "Study_1").mkdir(exist_ok=True)
  return Gke(
    "sweeps/s.py", pathlib.Path("Study_1"), [], Needs(**needs), image="reg/kling:1", claim="shared", tpu=tpu,
    patience_s=60.0, pause_s=0.01,
  )  # fmt: skip


# ---- SLURM ---------------------------------------------------------------------------------------------------------


def test_slurm_submits_one_array_and_follows_it(tmp_path: pathlib.Path, fakes: Fakes) -> None:
  fakes.answer("sbatch", {"out": "4711\n"})
  fakes.answer("squeue", {}, {"out": "RUNNING\nPENDING\nPENDING\n"})
  workers = slurm(tmp_path, workers=3, cores=8, gpus=1, hours=2.5, options=("--partition=gpu",))
  workers.start()
  workers.start()
  assert workers.alive() == 3
  assert len(fakes.calls("sbatch")) == 1, "an array that is there is not submitted again"
  script = (tmp_path / "study" / "logs" / "sweep.sbatch").read_text()
  for line in ("--array=0-2", "--time=2:30:00", "--cpus-per-task=8", "--gpus-per-task=1", "--partition=gpu",
               "--signal=TERM@120", "--requeue"):  # fmt: skip
    assert f"#SBATCH {line}\n" in script
  assert f"sweep work s.py --workdir {tmp_path / 'study'} --retries 1 --seconds 8760" in script
  assert subprocess.run(["bash", "-n", str(tmp_path / "study" / "logs" / "sweep.sbatch")]).returncode == 0


def test_slurm_asks_again_where_the_controller_is_away(tmp_path: pathlib.Path, fakes: Fakes) -> None:
  away = {"err": "slurm_load_jobs error: Unable to contact slurm controller (connect failure)", "code": 1}
  fakes.answer("squeue", away, away, {"out": "RUNNING\n"})
  assert slurm(tmp_path).alive() == 1
  fakes.answer("squeue", away)
  with pytest.raises(Unreached, match="the workers go on, start again to follow them"):
    slurm(tmp_path, patience_s=0.0).alive()


def test_slurm_does_not_submit_twice_when_the_answer_is_lost(tmp_path: pathlib.Path, fakes: Fakes) -> None:
  lost = {"err": "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", "code": 1}
  fakes.answer("sbatch", lost, {"out": "4712\n"})
  fakes.answer("squeue", {}, {"out": "PENDING\n"})
  slurm(tmp_path).start()
  assert len(fakes.calls("sbatch")) == 1, "it was there after all"
  fakes.answer("sbatch", lost, {"out": "4712\n"})
  fakes.answer("squeue", {})
  slurm(tmp_path).start()
  assert len(fakes.calls("sbatch")) == 3, "it was not: submitted again"


@pytest.mark.parametrize(
  "said", ["Batch job submission failed: Invalid account or account/partition combination specified",
           "Batch job submission failed: Job violates accounting/QOS policy (job submit limit)"],
)  # fmt: skip
def test_slurm_says_why_it_is_refused(tmp_path: pathlib.Path, fakes: Fakes, said: str) -> None:
  fakes.answer("sbatch", {"err": f"sbatch: error: {said}", "code": 1})
  fakes.answer("squeue", {})
  with pytest.raises(DataError) as caught:
    slurm(tmp_path).start()
  assert said in str(caught.value) and not isinstance(caught.value, Unreached)


def test_arrays_that_end_without_a_trace_are_an_error(tmp_path: pathlib.Path, fakes: Fakes) -> None:
  fakes.answer("sbatch", {"out": "1\n"})
  fakes.answer("squeue", {"out": "FAILED\n"})
  workers = slurm(tmp_path)
  with pytest.raises(DataError, match="recorded nothing; look at"):
    for _ in range(10):
      workers.start()
  assert len(fakes.calls("sbatch")) == clusters.EMPTY
  workers = slurm(tmp_path)
  for k in range(6):  # a ledger that grows is a sweep that gets on, however often workers are lost
    workers.start()
    (tmp_path / "study" / "ledger.jsonl").write_text("x" * k)


def test_missing_tools_say_where_to_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(UsageError, match="squeue is not on PATH"):
    slurm(tmp_path).start()


# ---- Kubernetes ----------------------------------------------------------------------------------------------------


def test_gke_applies_an_indexed_job(tmp_path: pathlib.Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  running = {"out": json.dumps({"status": {"active": 2}})}
  fakes.answer("kubectl", {}, {"out": "job created"}, running)
  workers = gke(tmp_path, workers=3, gpus=1, cores=4, memory_gib=32)
  workers.start()
  assert workers.alive() == 2
  (applied,) = [call for call in fakes.calls("kubectl") if call[0] == "apply"]
  job = yaml.safe_load(pathlib.Path(applied[2]).read_text())
  assert job["kind"] == "Job" and job["metadata"]["name"] == "kling-study-1"
  spec = job["spec"]
  assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
  pod = spec["template"]["spec"]
  (container,) = pod["containers"]
  assert pod["restartPolicy"] == "Never", "podFailurePolicy needs it"
  assert container["command"][:6] == ["python", "-m", "kling_jax", "sweep", "work", "/sweep/sweeps/s.py"]
  assert container["command"][6:8] == ["--workdir", "/sweep/Study_1"]
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
  assert container["resources"]["requests"] == {"cpu": 4, "memory": "32Gi", "nvidia.com/gpu": 1}
  assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "shared"
  codes = spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
  assert NoRoom.exit_code in codes, "a full disk fails the job instead of starting pods for ever"


@pytest.mark.parametrize(
  ("tpu", "kind", "hosts", "chips"),
  [("tpu-v5p-slice:2x2x1", "job", 1, 4), ("tpu-v5p-slice:2x2x4", "jobset", 4, 4),
   ("tpu-v5-lite-podslice:2x4", "job", 1, 8), ("tpu-v5-lite-podslice:4x4", "jobset", 4, 4)],
)  # fmt: skip
def test_a_slice_of_several_hosts_is_a_jobset(
  tmp_path: pathlib.Path, tpu: str, kind: str, hosts: int, chips: int
) -> None:
  made = gke(tmp_path, tpu=tpu, workers=2)
  manifest = made.manifest()
  assert made.kind == kind and manifest["kind"].lower() == kind
  job = manifest["spec"] if kind == "job" else manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["completions"] == (2 if kind == "job" else hosts)
  pod = job["template"]["spec"]
  assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == tpu.partition(":")[2]
  assert ("--distributed" in pod["containers"][0]["command"]) == (kind == "jobset")


def test_gke_starts_anew_where_pods_ended_with_runs_left(
  tmp_path: pathlib.Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.chdir(tmp_path)
  complete = {"out": json.dumps({"status": {"conditions": [{"type": "Complete", "status": "True"}]}})}
  fakes.answer("kubectl", complete, {"out": "deleted"}, {"out": "created"})
  gke(tmp_path).start()
  assert [call[0] for call in fakes.calls("kubectl")] == ["get", "delete", "apply"]


def test_gke_survives_a_silent_server_and_reports_a_broken_worker(
  tmp_path: pathlib.Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.chdir(tmp_path)
  away = {"err": "Unable to connect to the server: net/http: TLS handshake timeout", "code": 1}
  fakes.answer("kubectl", away, away, {"out": json.dumps({"status": {"active": 1}})})
  assert gke(tmp_path).alive() == 1
  failed = {
    "type": "Failed",
    "status": "True",
    "reason": "PodFailurePolicy",
    "message": "Container worker exited with 74",
  }
  fakes.answer("kubectl", {"out": json.dumps({"status": {"conditions": [failed]}})})
  with pytest.raises(DataError, match=r"exited with 74; see `kubectl logs`"):
    gke(tmp_path).alive()
  fakes.answer("kubectl", {"err": "error: You must be logged in to the server (Unauthorized)", "code": 1})
  with pytest.raises(DataError, match="Unauthorized"):
    gke(tmp_path).alive()


# ---- this machine --------------------------------------------------------------------------------------------------


def test_local_workers_share_the_cores_or_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
  monkeypatch.setattr(executor, "_gpus", list)
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4}, raising=False)
  places = executor.places(None, None)
  assert [place["KLING_CORES"] for place in places] == ["0", "1", "2", "3", "4"]
  assert "multi_thread_eigen=false" in places[0]["XLA_FLAGS"] and places[0]["OMP_NUM_THREADS"] == "1"
  assert [place["KLING_CORES"] for place in executor.places(2, None)] == ["0,1", "2,3"]
  assert [place["KLING_CORES"] for place in executor.places(None, 3)] == ["0,1,2"]
  with pytest.raises(UsageError, match="need 6 cores, there are 5"):
    executor.places(3, 2)
  monkeypatch.setattr(executor, "_gpus", lambda: ["0", "2"])
  assert executor.places(None, None) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "2"}]
  with pytest.raises(UsageError, match="has 2 GPUs"):
    executor.places(3, None)
