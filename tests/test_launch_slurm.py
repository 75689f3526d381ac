"""The launcher of SLURM against a queue in a folder that runs the batch scripts and fails in the usual ways."""

import json
import pathlib
import subprocess
import sys

import fake_cloud
import pytest

from kling_jax.launch import slurm

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def cloud(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> fake_cloud.Cloud:
  programs = ("sbatch", "squeue", "scancel", "srun", "scontrol")
  made = fake_cloud.Cloud(tmp_path / "cloud", monkeypatch, "fake_slurm", *programs)
  monkeypatch.chdir(tmp_path)
  return made


def words(*more: str) -> list[str]:
  return ["--config", "run.py", "--workdir", "runs/a", "--nodes", "2", "--gpus", "8", "--poll_s", "0.01", *more]


ARRAY = ["--array", "2", "--gpus", "1", "--logs", "logs", "--poll_s", "0.01", "--name", "sweep", "--",
         "sweep", "work", "s.py", "--output", "it's here"]  # fmt: skip


def codes(cloud: fake_cloud.Cloud, *exits: int) -> None:
  (cloud.folder / "codes").write_text(json.dumps(exits))


def count(cloud: fake_cloud.Cloud, program: str) -> int:
  return sum(call[0] == program for call in cloud.calls())


@pytest.mark.parametrize(("name", "given"), [("slurm", words()), ("slurm_array", ARRAY)])
def test_dry_runs_are_the_golden_ones_and_their_scripts_pass_shellcheck(
  cloud: fake_cloud.Cloud, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], name: str, given: list[str]
) -> None:
  fake_cloud.golden(name, ["--dry_run", *given], slurm.main, tmp_path, capsys)
  assert not cloud.calls()
  text = (HERE / "fixtures" / "launch" / f"{name}.txt").read_text()
  script = text[text.index("#!/bin/bash") : text.index("\nsqueue")]
  (tmp_path / "job.sbatch").write_text(script)
  fake_cloud.shellcheck(tmp_path / "job.sbatch")


def test_a_job_is_submitted_followed_and_put_back_while_it_gets_on(
  cloud: fake_cloud.Cloud, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  (cloud.folder / "progress").touch()
  codes(cloud, 75, 1, 0)
  assert slurm.main(words("--usd_per_gpu_hour", "2")) == 0
  assert (count(cloud, "sbatch"), count(cloud, "srun"), count(cloud, "scontrol")) == (1, 3, 2)
  said = capsys.readouterr().out
  assert "cost: 16 gpus x $2 = $32.00 an hour, at most $768.00 in 24 h" in said
  assert said.count("training train --config run.py --workdir runs/a") == 3
  assert cloud.state()["resources"] == {}
  assert (tmp_path / "runs/a/slurm/exit").read_text() == "0\n"


@pytest.mark.parametrize(("code", "progress", "tries"), [(1, False, 1), (124, True, 1), (75, False, 2)])
def test_what_would_come_again_is_not_put_back(
  cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str], code: int, progress: bool, tries: int
) -> None:
  if progress:
    (cloud.folder / "progress").touch()
  codes(cloud, code)
  assert slurm.main(words("--restarts", "1")) == 1
  assert count(cloud, "srun") == tries and cloud.state()["resources"] == {}
  assert f"failed (exit {code})" in capsys.readouterr().err


def test_an_array_of_tasks(cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str]) -> None:
  codes(cloud, 0, 1)
  assert slurm.main(ARRAY) == 1
  assert count(cloud, "srun") == 2
  streams = capsys.readouterr()
  assert "training sweep work s.py --output it's here" in streams.out
  assert "failed (exit-1 1)" in streams.err, "the second task"


@pytest.mark.parametrize(
  ("faults", "exit_code", "expected"),
  [
    ([("squeue", 1, "away"), ("squeue", 3, "away")], 0, "training"),
    ([("sbatch", 1, "lost")], 0, "training"),
    ([("sbatch", 1, "quota")], 1, "Job violates accounting/QOS policy"),
  ],
)
def test_faults_end_in_the_documented_state_with_nothing_left(
  cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str], faults: list, exit_code: int, expected: str
) -> None:
  cloud.faults(*faults)
  assert slurm.main(words()) == exit_code
  streams = capsys.readouterr()
  assert expected in streams.out + streams.err
  assert count(cloud, "sbatch") == 1 and cloud.state()["resources"] == {}


def test_a_launcher_that_is_killed_goes_on_when_it_is_started_again(cloud: fake_cloud.Cloud) -> None:
  cloud.faults(("sbatch", 1, "kill"))
  done = subprocess.run([sys.executable, "-m", "kling_jax.launch.slurm", *words()], capture_output=True)
  assert done.returncode == -9 and cloud.state()["resources"]
  assert slurm.main(words()) == 0
  assert count(cloud, "sbatch") == 1 and cloud.state()["resources"] == {}


def test_list_and_delete_touch_what_launchers_submitted(
  cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
  assert slurm.main(words("--detach", "--name", "mine")) == 0
  state = cloud.state()
  state["resources"]["other"] = state["resources"]["mine"] | {"script": ""}
  (cloud.folder / "state.json").write_text(json.dumps(state))
  capsys.readouterr()
  assert slurm.main(["list"]) == 0
  assert capsys.readouterr().out == "mine\tPENDING\t1:00:00\n"
  assert slurm.main(["delete", "--name", "other"]) == 2
  assert slurm.main(["delete", "--all"]) == 0
  assert list(cloud.state()["resources"]) == ["other"]
