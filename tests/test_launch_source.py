"""What travels to hosts: git's files, no secrets, the same bytes for the same files; slices and their cost."""

import json
import pathlib
import subprocess
import sys
import tarfile
import time

import fake_cloud
import pytest

from kling_jax.errors import UsageError
from kling_jax.launch import attempt, job, slices, source

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def code(tmp_path: pathlib.Path) -> pathlib.Path:
  return fake_cloud.checkout(tmp_path / "code")


def named(root: pathlib.Path, *exclude: str) -> list[str]:
  return [str(name) for name in source.tracked(root, exclude)]


# ---- the checkout --------------------------------------------------------------------------------------------------


def test_files_that_git_has_or_would_add_travel_as_they_are_now(code: pathlib.Path, tmp_path: pathlib.Path) -> None:
  (code / "new.py").write_text("1\n")
  (code / "data").mkdir()
  (code / "data" / "big.bin").write_text("ignored")
  (code / "run.py").write_text("changed\n")
  (code / "link").symlink_to("run.py")
  assert named(code) == [".gitignore", "link", "new.py", "run.py", "setup.py"]
  assert named(code, "new*") == [".gitignore", "link", "run.py", "setup.py"]
  (code / "new.py").unlink()
  (code / "run.py").unlink()
  assert named(code) == [".gitignore", "link", "setup.py"], "deleted, and still in the index"
  subprocess.run(["git", "rm", "-qf", "--cached", "run.py"], cwd=code, check=True)
  assert named(code) == [".gitignore", "link", "setup.py"]
  with pytest.raises(UsageError, match="is not a git checkout"):
    source.tracked(tmp_path)


def test_the_same_files_make_the_same_archive_and_any_change_another_digest(
  code: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  names = source.tracked(code)
  first = source.digest(code, names)
  source.pack(code, names, tmp_path / "a.tar.gz")
  time.sleep(0.01)
  (code / "run.py").touch()
  source.pack(code, names, tmp_path / "b.tar.gz")
  assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
  assert source.digest(code, names) == first
  assert source.unpack((tmp_path / "a.tar.gz").read_bytes(), tmp_path / "out") == named(code)
  assert (tmp_path / "out" / "run.py").read_text() == (code / "run.py").read_text()
  seen = {first}
  (code / "run.py").chmod(0o755)
  seen.add(source.digest(code, names))
  (code / "run.py").write_text("more")
  seen.add(source.digest(code, names))
  (code / "x").write_text("")
  seen.add(source.digest(code, source.tracked(code)))
  assert len(seen) == 4


def test_an_archive_from_a_host_stays_in_its_folder(tmp_path: pathlib.Path) -> None:
  with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as tar:
    tar.add(__file__, arcname="../evil")
  with pytest.raises(tarfile.OutsideDestinationError):
    source.unpack((tmp_path / "evil.tar.gz").read_bytes(), tmp_path / "out")
  assert not (tmp_path / "evil").exists()


# Put together here, so that this file holds none.
SECRETS = {
  "deploy.py": "KEY = '-----BEGIN " + "RSA PRIVATE KEY-----'", "a.txt": "AKIA" + "A1B2" * 4,
  "push.sh": "git push https://gh" + "p_" + "aB3" * 12 + "@github.com", "train.py": "token='hf" + "_" + "aB" * 17 + "'",
  "maps.js": "AIza" + "x" * 35, "bot.yaml": "xox" + "b-1234567890-abc", "ask.py": "s" + "k-proj-" + "a1" * 20,
  "run.sh": "export WANDB_API" + "_KEY=" + "0f" * 20, "x.cfg": "glp" + "at-" + "a" * 20,
}  # fmt: skip


def test_secrets_are_found_by_name_and_by_form(code: pathlib.Path) -> None:
  for name, text in SECRETS.items():
    (code / name).write_text(f"first line\n{text}\n")
  found = source.secrets(code, source.tracked(code))
  assert {line.partition(":")[0] for line in found} == set(SECRETS)
  assert all(line.split(":")[1] == "2" for line in found)
  for name in SECRETS:
    (code / name).unlink()
  for name in (".env", ".env.local", "id_ed25519", "server.pem", "service_account-1.json", ".netrc", ".env.example"):
    (code / name).write_text("harmless")
  with pytest.raises(UsageError, match=r"\.env: a file of this name holds secrets.*add them to \.gitignore") as caught:
    source.check(code, source.tracked(code))
  assert str(caught.value).count("a file of this name") == 6, "an example is none"
  (code / ".gitignore").write_text(".env*\n*.pem\nid_*\n*.json\n.netrc\n")
  source.check(code, source.tracked(code))


def test_this_repository_may_be_copied() -> None:
  names = source.tracked(ROOT)
  assert "kling_jax/cli.py" in map(str, names)
  source.check(ROOT, names)


def test_a_checkout_full_of_data_is_refused(code: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(source, "LARGEST_BYTES", 2**20)
  with (code / "video.mp4").open("wb") as file:
    file.truncate(2**21)
  with pytest.raises(UsageError, match=r"holds 2 MiB, above 1 \(largest: video\.mp4"):
    source.check(code, source.tracked(code))


# ---- slices and prices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "chips", "hosts"),
  [("v4-8", 4, 1), ("v4-32", 16, 4), ("v5p-8", 4, 1), ("v5p-128", 64, 16), ("v5litepod-8", 8, 1),
   ("v5litepod-16", 16, 4), ("v6e-4", 4, 1), ("v6e-256", 256, 64)],
)  # fmt: skip
def test_chips_and_hosts_of_slices(name: str, chips: int, hosts: int) -> None:
  """The tables of cloud.google.com/tpu/docs/v5e, v5p, v6e and v4."""
  found = slices.Slice(name)
  assert (found.chips, found.hosts) == (chips, hosts)


def test_prices_are_given_not_guessed() -> None:
  assert slices.cost(64, "chip", 2.5, 10) == "cost: 64 chips x $2.5 = $160.00 an hour, at most $1,600.00 in 10 h"
  for price, hours in ((None, 1), (-1, 1), (1, 0)):
    with pytest.raises(UsageError, match="--usd_per_chip_hour"):
      slices.cost(4, "chip", price, hours)
  with pytest.raises(UsageError, match=r"'v5lite-8' is unknown; did you mean 'v5litepod'\?"):
    slices.Slice("v5lite-8")
  for name in ("v4-0", "v4-x", "v4-1"):
    with pytest.raises(UsageError, match="not of the form v4-NUMBER"):
      slices.Slice(name)


# ---- the job and its attempts --------------------------------------------------------------------------------------


def test_words_of_a_job() -> None:
  parser = job.Parser("x")
  job.add_flags(parser)
  args, made = job.parse(parser, ["--config", "c.py", "--workdir", "runs/A b", "--config.lr=1", "--hours", "2"], [])
  assert made.words == ("train", "--config", "c.py", "--workdir", "runs/A b", "--config.lr=1")
  assert made.name.endswith("-a-b") and made.name.startswith("kling-") and made.hours == args.hours == 2
  assert made.attempt(12.3, "/mnt/w") == [
    "--until", "12", "train", "--config", "c.py", "--workdir", "/mnt/w", "--config.lr=1"
  ]  # fmt: skip
  _, other = job.parse(parser, ["--name", "Mine_1"], ["curate", "--output=set", "--workdir=d"])
  assert (other.name, other.workdir) == ("mine-1", "d")
  assert other.attempt(1, "/e")[2:] == ["curate", "--output=set", "--workdir=/e"]


def test_what_is_finished_stands_in_the_work_directory(tmp_path: pathlib.Path) -> None:
  words = ["train", "--config", "c", "--workdir", str(tmp_path)]
  assert not attempt.finished(words), "no config yet"
  (tmp_path / "config.json").write_text(json.dumps({"steps": 30}))
  assert not attempt.finished(words)
  for name in ("9", "20", "30.orbax-checkpoint-tmp"):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
  assert attempt.newest(tmp_path) == 20 and not attempt.finished(words), "a part of a checkpoint is none"
  (tmp_path / "checkpoints" / "30").mkdir()
  assert attempt.finished(words) and attempt.finished(["curate", "--output", "x"])


# A `kling` that writes its process id, waits for SIGTERM or for the file `go`, and leaves with the code in `code`.
KLING = """
import os, pathlib, signal, sys, time
here = pathlib.Path({folder!r})
done = []
signal.signal(signal.SIGTERM, lambda *_: done.append((here / "asked").touch()))
(here / "pid").write_text(str(os.getpid()))
while not done and not (here / "go").exists():
  time.sleep(0.01)
sys.exit(int((here / "code").read_text()))
"""


@pytest.mark.parametrize(
  ("code", "steps", "until", "expected"),
  [("0", 5, None, 0), ("0", 6, None, attempt.STOPPED), ("0", 6, 0.3, attempt.EXPIRED), ("1", 5, None, 1),
   ("74", 5, None, 74)],
)  # fmt: skip
def test_an_attempt_says_by_its_code_whether_to_try_again(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, code: str, steps: int, until: float | None, expected: int
) -> None:
  monkeypatch.setattr(attempt, "TIED", KLING.format(folder=str(tmp_path)))
  (tmp_path / "code").write_text(code)
  (tmp_path / "config.json").write_text(json.dumps({"steps": steps}))
  (tmp_path / "checkpoints" / "5").mkdir(parents=True)
  if until is None:
    (tmp_path / "go").touch()
  words = ["train", "--workdir", str(tmp_path)]
  assert attempt.run(words, None if until is None else time.time() + until) == expected
  assert (tmp_path / "asked").exists() == (until is not None), "its time is over: it is asked to save and leave"
  if until is not None:
    assert attempt.run(words, time.time() - 1) == attempt.EXPIRED


def test_sigterm_to_an_attempt_reaches_the_command(tmp_path: pathlib.Path) -> None:
  (tmp_path / "code").write_text("0")
  script = f"from kling_jax.launch import attempt\nattempt.TIED = {KLING.format(folder=str(tmp_path))!r}\n" \
           f"raise SystemExit(attempt.run(['train', '--workdir', {str(tmp_path)!r}]))"  # fmt: skip
  process = subprocess.Popen([sys.executable, "-c", script])
  while not (tmp_path / "pid").exists():
    time.sleep(0.01)
  process.terminate()
  assert process.wait(timeout=200) == attempt.STOPPED
  assert (tmp_path / "asked").exists()


def test_launchers_start_from_the_repository_without_jax() -> None:
  code = (
    "import sys; from launch import gke, ray, slurm, tpu_vm; sys.exit('jax' in sys.modules or 'ray' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
  done = subprocess.run([sys.executable, "-m", "launch.slurm", "--help"], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0 and "--array" in done.stdout
