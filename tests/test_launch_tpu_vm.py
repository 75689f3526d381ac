"""The launcher of TPU VMs against a cloud in a folder: every run ends in its documented state, with nothing left."""

import json
import pathlib
import re
import subprocess
import sys
import time

import fake_cloud
import pytest

from kling_jax.launch import tpu_vm

ROOT = pathlib.Path(__file__).parents[1]
DRILL = pytest.mark.drill


@pytest.fixture
def cloud(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> fake_cloud.Cloud:
  made = fake_cloud.Cloud(tmp_path / "cloud", monkeypatch, "fake_gcloud", "gcloud")
  fake_cloud.checkout(tmp_path / "code")
  monkeypatch.chdir(tmp_path)
  codes(made, 0)
  return made


def codes(cloud: fake_cloud.Cloud, *exits: int) -> None:
  """Exit codes of the attempts, in turn."""
  (cloud.folder / "codes").write_text("".join(f"{code}\n" for code in exits))


def words(cloud: fake_cloud.Cloud, *more: str) -> list[str]:
  return [
    "--config", "run.py", "--workdir", "runs/a", "--code", "code", "--accelerator_type", "v5litepod-16",
    "--zone", "us-west4-a", "--project", "p", "--nfs", "10.0.0.2:/share", "--root", str(cloud.folder / "shared"),
    "--usd_per_chip_hour", "0.5", "--spot", "--poll_s", "0.1", *more,
  ]  # fmt: skip


@pytest.fixture(autouse=True)
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
  """v5litepod-16 has four; two of them are enough here."""
  monkeypatch.setattr(tpu_vm.slices.Slice, "hosts", property(lambda _: 2))


def kinds(cloud: fake_cloud.Cloud) -> list[str]:
  """What was done, in order, without looking and polling."""
  done = []
  for call in cloud.calls():
    verb = call[3]
    if verb == "ssh":
      command = next(word for word in call if word.startswith("--command="))
      verb = re.findall(r"kling-host.sh (\w+)", command)[0]
    if verb not in ("describe", "status", "log"):
      done.append(verb)
  return done


# ---- a run in which all goes well ----------------------------------------------------------------------------------


def test_a_run_makes_exactly_the_calls_of_its_dry_run_from_nothing_to_deleted(
  cloud: fake_cloud.Cloud, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  assert tpu_vm.main(words(cloud, "--dry_run")) == 0
  assert not cloud.calls(), "nothing was asked of the cloud"
  printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gcloud ")]
  assert tpu_vm.main(words(cloud)) == 0
  made = ["gcloud " + tpu_vm.shlex.join(call) for call in cloud.calls()]
  plain = lambda line: re.sub(r"(log \S+ 1) \d+", r"\1 OFFSET", re.sub(r"\b1\d{9}\b", "UNTIL", line))
  timeless = lambda lines: list(dict.fromkeys(map(plain, lines)))
  assert timeless(made) == timeless(printed)
  assert kinds(cloud) == ["create", "scp", "mount", "install", "start", "pack", "scp", "delete"]
  assert cloud.settled()
  said = capsys.readouterr().out
  assert "cost: 16 chips x $0.5 = $8.00 an hour, at most $192.00 in 24 h (spot)" in said
  assert said.index("cost:") < said.index("copying") < said.index("host-0: training") < said.index("deleted")
  assert json.loads((tmp_path / "runs/a/metrics.jsonl").read_text())["loss"] == 0.5, "fetched"
  asked = (cloud.folder / "pip").read_text().split()
  assert len([word for word in asked if word.endswith("src[tpu,cloud]")]) == 2, "on both hosts"


def test_the_dry_run_is_the_golden_one(
  cloud: fake_cloud.Cloud, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  fake_cloud.golden("tpu_vm", words(cloud, "--dry_run"), tpu_vm.main, tmp_path, capsys)


def test_flags_reach_the_cloud(cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str]) -> None:
  flexible = [word for word in words(cloud, "--slices", "2", "--flex_start", "--hours", "3") if word != "--spot"]
  assert tpu_vm.main([*flexible, "--dry_run"]) == 0
  said = capsys.readouterr().out
  assert "gcloud alpha compute tpus queued-resources create" in said
  for flag in ("--provisioning-model=flex-start", "--max-run-duration=10800s", "--valid-until-duration=10800s",
               "--node-count=2", "--node-prefix=kling-me-a"):  # fmt: skip
    assert flag in said
  assert "cost: 32 chips" in said and "--spot" not in said
  pathlib.Path("kling_jax-1-py3-none-any.whl").touch()
  assert tpu_vm.main(words(cloud, "--wheel", "kling_jax-1-py3-none-any.whl", "--dry_run")) == 0
  assert "install kling-me-a kling_jax-1-py3-none-any kling_jax-1-py3-none-any.whl tpu,cloud" in capsys.readouterr().out


# ---- clouds that fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("faults", "exit_code", "created", "expected"),
  [
    ([("create", 1, "quota")], 1, 0, "no quota for v5litepod-16 in us-west4-a"),
    ([("create", 1, "stockout")], 1, 1, "There is no more capacity in the zone"),
    pytest.param([("create", 1, "unavailable"), ("describe", 2, "unavailable")], 0, 1, "", marks=DRILL),
    pytest.param([("create", 1, "lost"), ("delete", 1, "lost")], 0, 1, "", marks=DRILL),
    ([("ssh:status", 2, "silent 1"), ("ssh:start", 1, "silent 1")], 0, 1, "a host does not answer"),
    ([("ssh:status", 2, "preempt")], 0, 2, "hosts are gone (SUSPEND"),
    pytest.param([("ssh:start", 1, "hang")], 0, 1, "a host does not answer", marks=DRILL),
    pytest.param([("ssh:mount", 1, "preempt, noticed late")], 0, 2, "hosts are gone (PREEMPTED)", marks=DRILL),
    pytest.param([("ssh:pack", 1, "preempt")], 0, 2, "hosts are gone", marks=DRILL),
  ],
)  # fmt: skip
def test_faults_end_in_the_documented_state_with_nothing_left(
  cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str], faults: list, exit_code: int, created: int, expected: str
) -> None:
  cloud.faults(*faults)
  assert tpu_vm.main(words(cloud, "--ssh_timeout_s", "20")) == exit_code
  streams = capsys.readouterr()
  assert expected in streams.out + streams.err
  assert cloud.settled() and cloud.state()["created"] == created
  if exit_code:
    assert streams.err.startswith("launch: DataError: ") and len(streams.err.splitlines()) == 1


@DRILL
def test_a_job_that_fails_is_tried_again_while_it_gets_on(
  cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
  (cloud.folder / "progress").touch()
  codes(cloud, 1, 0)
  assert tpu_vm.main(words(cloud)) == 0
  assert kinds(cloud).count("start") == 2 and kinds(cloud).count("create") == 1
  assert cloud.settled()


@DRILL
def test_a_job_that_fails_without_a_checkpoint_ends(
  cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
  codes(cloud, 1)
  assert tpu_vm.main(words(cloud)) == 1
  assert kinds(cloud).count("start") == 3 and cloud.settled()
  assert "3 attempts failed (exit code 1) without a checkpoint beyond step 0" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "expected"), [(2, "which would come again"), (124, "24 h of --hours are over")])
def test_what_would_come_again_is_not_tried_again(
  cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str], code: int, expected: str
) -> None:
  codes(cloud, code)
  assert tpu_vm.main(words(cloud)) == 1
  assert kinds(cloud).count("start") == 1 and cloud.settled()
  assert expected in capsys.readouterr().err


@DRILL
def test_an_installation_that_fails_is_tried_three_times_and_told(
  cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
  (cloud.folder / "pip_fails").write_text("yes")
  assert tpu_vm.main(words(cloud)) == 1
  assert kinds(cloud).count("install") == 3 and cloud.settled()
  assert "on host host-0 (exit code 1): no route" in capsys.readouterr().err


# ---- launchers that are ended --------------------------------------------------------------------------------------

LAUNCH = "import sys; from kling_jax.launch import tpu_vm; " \
  "tpu_vm.slices.Slice.hosts = property(lambda _: 2); sys.exit(tpu_vm.main(sys.argv[1:]))"  # fmt: skip


@pytest.mark.parametrize(
  "call",
  ["ssh:start", *(pytest.param(call, marks=DRILL) for call in
                            ("create", "scp", "ssh:install", "ssh:status", "ssh:pack", "delete"))],
)  # fmt: skip
def test_a_launcher_that_is_killed_goes_on_when_it_is_started_again(cloud: fake_cloud.Cloud, call: str) -> None:
  cloud.faults((call, 1, "kill"))
  assert subprocess.run([sys.executable, "-c", LAUNCH, *words(cloud)], capture_output=True).returncode == -9
  left = cloud.state()["resources"]
  assert (left == {}) == (call == "delete")
  cloud.faults()
  assert tpu_vm.main(words(cloud)) == 0
  assert cloud.settled()
  if call != "delete":  # that run was over, and is found finished
    assert cloud.state()["created"] == 1, "the same resource"
    assert kinds(cloud).count("start") <= 2
    logs = (cloud.folder / "pip").read_text().splitlines()
    assert len(logs) == 2, "installed once on each host"


def test_ctrl_c_deletes_and_detach_leaves(cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str]) -> None:
  (cloud.folder / "slow").touch()
  assert tpu_vm.main(words(cloud, "--detach")) == 0
  assert len(cloud.hosts()) == 2
  assert "stays, at most until" in capsys.readouterr().out
  follower = subprocess.Popen([sys.executable, "-c", LAUNCH, *words(cloud)], stdout=subprocess.PIPE, text=True)
  assert follower.stdout is not None
  for line in follower.stdout:
    if "host-0: training" in line:
      break
  follower.terminate()
  assert follower.wait(timeout=200) == 143
  assert cloud.settled()


@DRILL
def test_a_network_that_is_away_ends_the_launcher_and_leaves_the_job(
  cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
  cloud.faults(("ssh:status", 2, "unavailable"), ("describe", 6, "unavailable"))
  assert tpu_vm.main(words(cloud, "--patience_s", "0")) == 1
  streams = capsys.readouterr()
  assert "cannot reach its server" in streams.err and "stays, at most until" in streams.out
  assert len(cloud.hosts()) == 2
  cloud.faults()
  assert tpu_vm.main(words(cloud)) == 0
  assert cloud.settled() and cloud.state()["created"] == 1 and kinds(cloud).count("start") == 1


def test_list_shows_and_delete_deletes_what_launchers_made_and_nothing_else(
  cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str]
) -> None:
  at = ["--zone", "us-west4-a", "--project", "p"]
  assert tpu_vm.main(words(cloud, "--detach", "--name", "mine")) == 0
  state = cloud.state()
  state["resources"]["other"] = state["resources"]["mine"] | {"labels": {"team": "b"}, "number": 9}
  (cloud.folder / "state.json").write_text(json.dumps(state))
  capsys.readouterr()
  assert tpu_vm.main(["list", *at]) == 0
  listed = capsys.readouterr().out
  assert listed.startswith("mine\tv5litepod-16\tACTIVE\tuntil 20") and "other" not in listed
  assert tpu_vm.main(["delete", "--name", "other", *at]) == 2
  assert tpu_vm.main(words(cloud, "--name", "other")) == 2
  assert "is not this job's" in capsys.readouterr().err
  assert tpu_vm.main(["delete", "--all", *at]) == 0
  assert list(cloud.state()["resources"]) == ["other"], "what is not ours is left alone"


@DRILL
def test_the_end_of_life_is_that_of_the_first_start(cloud: fake_cloud.Cloud) -> None:
  assert tpu_vm.main(words(cloud, "--detach", "--hours", "1")) == 0
  first = next(word for call in cloud.calls() for word in call if word.startswith("--labels="))
  cloud.faults(("ssh:log", 1, "preempt"))
  assert tpu_vm.main(words(cloud, "--hours", "50")) == 0
  labels = [word for call in cloud.calls() for word in call if word.startswith("--labels=")]
  assert labels == [first, first], "the resource that replaces it ends with it"
  until = float(first.rpartition("=")[2])
  assert 3000 < until - time.time() <= 3600
  (started,) = {re.search(r"--until (\d+)", word)[1] for call in cloud.calls() for word in call if "--until" in word}
  assert float(started) == until, "and the job is told"


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("drop", "more", "expected"),
  [
    (["--usd_per_chip_hour", "0.5"], [], "give --usd_per_chip_hour"),
    (["--nfs", "10.0.0.2:/share"], [], "need a disk that all see"),
    (["--config", "run.py"], [], "or another command behind --"),
    ([], ["--accelerator_typ", "x", "y"], "unknown flags"),
    (["--accelerator_type", "v5litepod-16"], ["--accelerator_type", "v5lite-16"], "did you mean 'v5litepod'?"),
    ([], ["--reserved"], "not allowed with argument --spot"),
    ([], ["--wheel", "none.whl"], "is no wheel"),
  ],
)
def test_refusals_come_before_anything_is_asked_of_the_cloud(
  cloud: fake_cloud.Cloud, capsys: pytest.CaptureFixture[str], drop: list[str], more: list[str], expected: str
) -> None:
  given = " ".join(words(cloud, *more)).replace(" ".join(drop), "", 1).split() if drop else words(cloud, *more)
  assert tpu_vm.main(given) == 2
  assert expected in capsys.readouterr().err and not cloud.calls()


def test_secrets_are_not_copied(
  cloud: fake_cloud.Cloud, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  (tmp_path / "code" / ".env").write_text("TOKEN=1\n")
  assert tpu_vm.main(words(cloud)) == 2
  assert ".env: a file of this name holds secrets" in capsys.readouterr().err and not cloud.calls()
  assert tpu_vm.main(words(cloud, "--exclude", ".env", "--dry_run")) == 0


def test_the_shell_parts_pass_shellcheck(cloud: fake_cloud.Cloud, tmp_path: pathlib.Path, capsys) -> None:
  assert tpu_vm.main(words(cloud, "--dry_run")) == 0
  startup = capsys.readouterr().out.partition("startup.sh:\n")[2].partition("\ngcloud")[0]
  (tmp_path / "startup.sh").write_text(startup)
  fake_cloud.shellcheck(ROOT / "launch" / "host.sh", tmp_path / "startup.sh")
