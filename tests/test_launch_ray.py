"""The launcher of Ray: cluster files against Ray's schema, runs against a cluster in a folder that fails."""

import json
import pathlib
import subprocess
import sys

import fake_cloud
import jsonschema
import pytest
import yaml

from kling_jax.launch import ray as launch_ray

SCHEMA = pathlib.Path(__file__).parent / "fixtures" / "launch" / "ray_cluster.json"


@pytest.fixture
def cloud(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> fake_cloud.Cloud:
  made = fake_cloud.Cloud(tmp_path / "cloud", monkeypatch, "fake_ray", "ray")
  fake_cloud.checkout(tmp_path / "code")
  monkeypatch.chdir(tmp_path)
  return made


def words(*more: str) -> list[str]:
  return ["--code", "code", "--project", "p", "--zone", "us-central1-a", "--machine", "n2-standard-32", "--workers",
          "4", "--spot", "--usd_per_machine_hour", "0.5", "--hours", "12", "--name", "set", "--poll_s", "0.01", *more,
          "--", "curate", "--input", "gs://b/raw", "--output", "/data/set", "--engine", "ray"]  # fmt: skip


TRAIN = ["--code", "code", "--address", "http://head:8265", "--processes", "4", "--gpus", "8", "--poll_s", "0.01",
         "--config", "run.py", "--workdir", "runs/a", "--config.steps=3"]  # fmt: skip


def ends(cloud: fake_cloud.Cloud, *states: str) -> None:
  (cloud.folder / "codes").write_text(json.dumps(states))


def submitted(cloud: fake_cloud.Cloud) -> int:
  return sum("submit" in " ".join(call) for call in cloud.calls())


def test_cluster_files_follow_the_schema_of_ray(cloud: fake_cloud.Cloud) -> None:
  schema = json.loads(SCHEMA.read_text())
  own, command = launch_ray.job_lib.split(words())
  args, job = launch_ray.job_lib.parse(launch_ray.parser(), own, command)
  made = launch_ray.Ray(args, job, launch_ray.job_lib.Package.of(args)).manifest()
  jsonschema.validate(made, schema)
  workers = made["available_node_types"]["worker"]
  assert (workers["min_workers"], made["max_workers"]) == (4, 4)
  assert workers["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
  head = made["available_node_types"][made["head_node_type"]]
  assert "provisioningModel" not in head["node_config"]["scheduling"], "the head stays"
  for node in (head, workers):
    scheduling = node["node_config"]["scheduling"]
    assert scheduling["maxRunDuration"] == {"seconds": "43200"} and scheduling["instanceTerminationAction"] == "DELETE"
    assert node["node_config"]["labels"] == {"kling": "launch"}
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(made | {"workers": 3}, schema)


@pytest.mark.parametrize(("name", "given"), [("ray", words()), ("ray_train", TRAIN)])
def test_dry_runs_are_the_golden_ones_and_the_calls_of_a_run(
  cloud: fake_cloud.Cloud, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str, given: list[str]
) -> None:
  fake_cloud.golden(name, ["--dry_run", *given], launch_ray.main, tmp_path, capsys)
  assert not cloud.calls()
  assert launch_ray.main(["--dry_run", *given]) == 0
  printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ray ")]
  assert launch_ray.main(given) == 0
  assert list(dict.fromkeys(map(launch_ray.shlex.join, cloud.calls()))) == printed
  assert cloud.state()["resources"] == {}
  said = capsys.readouterr().out
  job = "set-1" if name == "ray" else "kling-me-a-1"
  assert said.count(f"{job}: line") == 2, "each line of the log once"
  context = tmp_path / "cloud/home/.cache/kling" / job.removesuffix("-1")
  assert (context / "context" / "run.py").exists()
  if name == "ray":
    assert "cost: 5 machines x $0.5 = $2.50 an hour, at most $30.00 in 12 h" in said
    assert yaml.safe_load((context / "cluster.yaml").read_text())["cluster_name"] == "set"


@pytest.mark.parametrize(
  ("faults", "codes", "exit_code", "tries", "expected"),
  [
    ([("up", 1, "quota")], ["SUCCEEDED"], 1, 0, "Quota 'N2_CPUS' exceeded"),
    ([("job submit", 1, "lost"), ("job status", 2, "silent")], ["SUCCEEDED"], 0, 1, "set-1: line 1"),
    ([], ["FAILED", "SUCCEEDED"], 0, 2, "set-2: line 1"),
    ([], ["FAILED"], 1, 2, "set-2 ended as FAILED (--restarts 1)"),
  ],
)
def test_faults_end_in_the_documented_state_with_nothing_left(
  cloud: fake_cloud.Cloud,
  capsys: pytest.CaptureFixture[str],
  faults: list,
  codes: list[str],
  exit_code: int,
  tries: int,
  expected: str,
) -> None:
  cloud.faults(*faults)
  ends(cloud, *codes)
  assert launch_ray.main(words("--restarts", "1")) == exit_code
  streams = capsys.readouterr()
  assert expected in streams.out + streams.err
  assert submitted(cloud) == tries and cloud.state()["resources"] == {}


@pytest.mark.parametrize("call", [pytest.param("up", marks=pytest.mark.drill), "job submit"])
def test_a_launcher_that_is_killed_goes_on_when_it_is_started_again(cloud: fake_cloud.Cloud, call: str) -> None:
  cloud.faults((call, 1, "kill"))
  done = subprocess.run([sys.executable, "-m", "kling_jax.launch.ray", *words()], capture_output=True)
  assert done.returncode == -9 and cloud.state()["resources"]
  cloud.faults()
  assert launch_ray.main(words()) == 0
  assert submitted(cloud) == 1 and cloud.state()["created"] == 1 and cloud.state()["resources"] == {}


@pytest.mark.parametrize(
  ("given", "expected"),
  [(["--code", "code", "--", "curate"], "give --address of a cluster"),
   ([word for word in words() if word not in ("--usd_per_machine_hour", "0.5")], "give --usd_per_machine_hour")],
)  # fmt: skip
def test_refusals_come_before_anything_is_asked(
  cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str], given: list[str], expected: str
) -> None:
  assert launch_ray.main(given) == 2
  assert expected in capsys.readouterr().err and not cloud.calls()
