"""The launcher of GKE: manifests against the published schemas, runs against a cluster in a folder that fails."""

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import fake_cloud
import jsonschema
import pytest
import yaml

from kling_jax.launch import gke, kubernetes
from kling_jax.scaling import clusters

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
  """JobSet's, in which no unknown field passes (as `kubectl --validate=strict`)."""

  def strict(node: Any) -> Any:
    if isinstance(node, list):
      return [strict(item) for item in node]
    if not isinstance(node, dict):
      return node
    closed = {"additionalProperties": False} if "properties" in node else {}
    inner = {key: {name: strict(item) for name, item in value.items()} if key == "properties" else strict(value)
             for key, value in node.items()}  # fmt: skip
    return closed | inner

  found = strict(json.loads((HERE / "fixtures" / "launch" / "jobset_v1alpha2.json").read_text()))
  names = ("annotations", "labels")
  strings = {name: {"type": "object", "additionalProperties": {"type": "string"}} for name in names}
  found["properties"]["metadata"] = {"type": "object", "additionalProperties": False, "required": ["name"],
                                     "properties": {"name": {"type": "string", "maxLength": 63}} | strings}  # fmt: skip
  jsonschema.Draft202012Validator.check_schema(found)
  return jsonschema.Draft202012Validator(found)


@pytest.fixture
def cloud(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> fake_cloud.Cloud:
  made = fake_cloud.Cloud(tmp_path / "cloud", monkeypatch, "fake_kubectl", "kubectl", "docker", "xpk")
  fake_cloud.checkout(tmp_path / "code")
  monkeypatch.chdir(tmp_path)
  return made


def words(*more: str) -> list[str]:
  return ["--config", "run.py", "--workdir", "runs/a", "--code", "code", "--image", "reg/kling",
          "--poll_s", "0.01", *more]  # fmt: skip


TPU = (
  "--tpu",
  "tpu-v5p-slice:2x2x4",
  "--slices",
  "2",
  "--spot",
  "--bucket",
  "b",
  "--usd_per_chip_hour",
  "2",
  "--build",
)
GPU = ("--nodes", "4", "--gpus", "8", "--cores", "96", "--memory", "1000", "--claim", "disk", "--usd_per_gpu_hour", "3")
XPK = ("--xpk", "--cluster", "c", "--project", "p", "--zone", "z", "--tpu_type", "v5p-32", "--slices", "2",
       "--usd_per_chip_hour", "2", "--build", "--spot")  # fmt: skip


def manifest(*more: str) -> dict[str, Any]:
  args, job = gke.job_lib.parse(gke.parser(), words(*more), [])
  return gke.Gke(args, job, gke.job_lib.Package.of(args) if args.build else None).manifest()


# ---- manifests -----------------------------------------------------------------------------------------------------


def test_manifests_follow_the_published_schemas(
  cloud: fake_cloud.Cloud, schema: jsonschema.Draft202012Validator
) -> None:
  for flags in (TPU, GPU, ("--tpu", "tpu-v6e-slice:2x4", "--claim", "c")):
    schema.validate(manifest(*flags))
  jobs = schema.schema["properties"]["spec"]["properties"]["replicatedJobs"]["items"]["properties"]["template"]
  for tpu, kind in (("tpu-v5p-slice:2x2x4", "JobSet"), ("tpu-v5p-slice:2x2x1", "Job"), ("", "Job")):
    made = clusters.Gke("s.py", pathlib.Path("study"), image="i", claim="c", tpu=tpu).manifest()  # a sweep's workers
    assert made["kind"] == kind
    validator = schema if kind == "JobSet" else schema.evolve(schema=jobs["properties"]["spec"])
    validator.validate(made if kind == "JobSet" else made["spec"])


@pytest.mark.parametrize(
  ("path", "value"),
  [("spec.failurePolicy.maxRestart", 1), ("spec.failurePolicy.rules.0.action", "Fail"),
   ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.imagee", "x"),
   ("spec.replicatedJobs.0.template.spec.template.spec.nodeSelector.x", 1)],
)  # fmt: skip
def test_the_schemas_would_see_a_mistake(
  cloud: fake_cloud.Cloud, schema: jsonschema.Draft202012Validator, path: str, value: Any
) -> None:
  made = manifest(*TPU)
  *parts, last = path.split(".")
  node = made
  for part in parts:
    node = node[int(part)] if part.isdigit() else node[part]
  node[last] = value
  with pytest.raises(jsonschema.ValidationError):
    schema.validate(made)


def test_a_slice_a_job_and_a_pod_a_host(cloud: fake_cloud.Cloud) -> None:
  made = manifest(*TPU)
  (replicated,) = made["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  assert (replicated["replicas"], job["completions"], job["parallelism"], job["backoffLimit"]) == (2, 4, 4, 0)
  assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice", "cloud.google.com/gke-spot":
                                 "true", "cloud.google.com/gke-tpu-topology": "2x2x4"}  # fmt: skip
  assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
  assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in made["metadata"]["annotations"]
  assert pod["terminationGracePeriodSeconds"] >= 60, "time to save"
  policy = made["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 100 and policy["rules"][0]["action"] == "FailJobSet"
  assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 74, 124], "these would come again"
  (container,) = pod["containers"]
  assert container["workingDir"] == "/src" and container["image"].startswith("reg/kling:")
  assert container["command"][:4] == ["python", "-m", "kling_jax.launch.attempt", "--until"]
  assert container["command"][5:] == ["train", "--config", "run.py", "--workdir", "/kling/runs/a"]
  assert job["activeDeadlineSeconds"] == 24 * 3600 + gke.SLACK_S and made["spec"]["ttlSecondsAfterFinished"]


def test_gpu_hosts_are_told_their_coordinator(cloud: fake_cloud.Cloud) -> None:
  made = manifest(*GPU, "--name", "j")
  job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
  variables = {pair["name"]: pair["value"] for pair in job["template"]["spec"]["containers"][0]["env"]}
  from kling_jax.train import distributed

  found = distributed.detect(environ=variables | {"JOB_COMPLETION_INDEX": "3"})
  assert (found.coordinator, found.count, found.index) == ("j-worker-0-0.j:12321", 4, 3)


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "flags"), [("gke", TPU), ("gke_gpu", GPU), ("gke_xpk", XPK)])
def test_dry_runs_are_the_golden_ones_and_the_calls_of_a_run(
  cloud: fake_cloud.Cloud, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str, flags: tuple
) -> None:
  fake_cloud.golden(name, words(*flags, "--dry_run"), gke.main, tmp_path, capsys)
  assert not cloud.calls()
  assert gke.main(words(*flags, "--dry_run")) == 0
  printed = capsys.readouterr().out.splitlines()
  lines = [line for line in printed if line.split(" ")[0] in ("docker", "kubectl", "xpk")]
  assert gke.main(words(*flags)) == 0
  timeless = lambda lines: {re.sub(r"\b1\d{9}\b", "UNTIL", line.replace("pod-0", "POD")) for line in lines}
  calls = [call for call in cloud.calls() if call[-1] != "--since=30s"]  # the log is over, the pod is still there
  assert timeless(map(gke.shlex.join, calls)) == timeless(lines)
  assert cloud.state()["resources"] == {}
  if name == "gke":
    applied = yaml.safe_load((tmp_path / "cloud/home/.cache/kling/kling-me-a/jobset.yaml").read_text())
    assert applied["metadata"]["labels"] == kubernetes.MANAGED
    said = capsys.readouterr().out
    assert "cost: 32 chips x $2 = $64.00 an hour" in said and said.index("cost") < said.index("deleted")
    assert (tmp_path / "cloud/home/.cache/kling/kling-me-a/context/Dockerfile").exists()


@pytest.mark.parametrize(
  ("faults", "exit_code", "expected"),
  [
    ([("kubectl apply", 1, "unavailable"), ("kubectl get", 3, "unavailable")], 0, "pod-0: training"),
    ([("kubectl apply", 1, "lost"), ("kubectl delete", 1, "lost")], 0, "deleted"),
    ([("kubectl apply", 1, "quota")], 1, "exceeded quota: team"),
    ([("kubectl apply", 1, "no controller")], 2, "has no JobSet controller"),
    ([("kubectl get", 2, "node taken away")], 0, "restarted by the cluster (1 of 100)"),
    ([("kubectl get", 2, "failed: exit code 2")], 1, "failed: FailedJobs failed: exit code 2"),
  ],
)
def test_faults_end_in_the_documented_state_with_nothing_left(
  cloud: fake_cloud.Cloud, capfd: pytest.CaptureFixture[str], faults: list, exit_code: int, expected: str
) -> None:
  cloud.faults(*faults)
  assert gke.main(words(*GPU)) == exit_code
  streams = capfd.readouterr()
  assert expected in streams.out + streams.err
  assert cloud.state()["resources"] == {}


@pytest.mark.parametrize(
  ("flags", "call"),
  [(GPU, "kubectl apply"), pytest.param(GPU, "kubectl delete", marks=pytest.mark.drill),
   pytest.param(XPK, "xpk workload create", marks=pytest.mark.drill)],
)  # fmt: skip
def test_a_launcher_that_is_killed_goes_on_when_it_is_started_again(
  cloud: fake_cloud.Cloud, flags: tuple, call: str
) -> None:
  cloud.faults((call, 1, "kill"))
  done = subprocess.run([sys.executable, "-m", "kling_jax.launch.gke", *words(*flags)], capture_output=True)
  assert done.returncode == -9
  cloud.faults()
  assert gke.main(words(*flags)) == 0
  made = [words for words in cloud.calls() if " ".join(words).startswith(call) and not call.endswith("delete")]
  assert len(made) == (0 if call.endswith("delete") else 1), "not created twice"
  assert cloud.state()["resources"] == {}


def test_a_network_that_is_away_ends_the_launcher_and_leaves_the_job(
  cloud: fake_cloud.Cloud, capfd: pytest.CaptureFixture[str]
) -> None:
  cloud.faults(("kubectl get", 2, "unavailable"))
  assert gke.main(words(*GPU, "--patience_s", "0")) == 1
  assert "the pods go on, start again to follow" in capfd.readouterr().err
  assert gke.main(words(*GPU)) == 0
  assert cloud.state()["created"] == 1 and cloud.state()["resources"] == {}


def test_list_and_delete_touch_what_launchers_made(cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str]) -> None:
  assert gke.main(words(*GPU, "--detach")) == 0
  state = cloud.state()
  state["resources"]["other"] = {"labels": {}, "looks": 0, "restarts": 0, "over": None}
  (cloud.folder / "state.json").write_text(json.dumps(state))
  capsys.readouterr()
  assert gke.main(["list"]) == 0
  assert capsys.readouterr().out == "kling-me-a\trunning\trestarts 0\n"
  assert gke.main(["delete", "--name", "other"]) == 2
  assert gke.main(words(*GPU, "--name", "other")) == 2
  assert gke.main(["delete", "--all"]) == 0
  assert list(cloud.state()["resources"]) == ["other"]


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    (("--gpus", "1", "--usd_per_gpu_hour", "1"), "give --bucket NAME or --claim NAME"),
    (("--gpus", "1", "--claim", "c"), "give --usd_per_gpu_hour"),
    (("--tpu", "tpu-v6e-slice:2x4", "--slices", "2", "--claim", "c"), "joins slices of several hosts only"),
    (("--tpu", "v6e", "--claim", "c", "--usd_per_chip_hour", "1"), "not of the form ACCELERATOR:TOPOLOGY"),
    (("--xpk", "--cluster", "c"), "--xpk needs --project, --zone, --tpu_type"),
  ],
)
def test_refusals_come_before_anything_is_asked(
  cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str], flags: tuple, expected: str
) -> None:
  assert gke.main(words(*flags)) == 2
  assert expected in capsys.readouterr().err and not cloud.calls()
