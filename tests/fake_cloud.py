"""Sets up clouds and clusters for tests of launchers: programs on PATH that keep their state in a folder."""

import json
import os
import pathlib
import re
import stat
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
# A host's `python3` makes environments whose `pip` notes what it is asked for, and whose `python` is bin/hostpython.
PYTHON3 = """#!/bin/bash
mkdir -p "$3/bin"
cp "$FAKE_CLOUD/bin/hostpython" "$3/bin/python"
cp "$FAKE_CLOUD/bin/hostpip" "$3/bin/pip"
"""
PIP = """#!/bin/bash
echo "$@" >>"$FAKE_CLOUD/pip"
[ ! -e "$FAKE_CLOUD/pip_fails" ] || { echo no route; exit 1; }
"""
# Stands for `python -m kling_jax.launch.attempt`: makes checkpoints and leaves with the codes that `codes` holds.
HOSTPYTHON = """#!/bin/bash
shift 2
if [ "$1" = --newest ]; then
  n=$(ls "$2/checkpoints" 2>/dev/null | sort -n | tail -1)
  echo "${n:-0}"
  exit
fi
while [ "$1" != --workdir ]; do shift; done
work=$2
mkdir -p "$work/checkpoints"
echo "$FAKE_HOST: training"
[ "$FAKE_HOST" = host-0 ] || { while [ -e "$FAKE_CLOUD/slow" ]; do sleep 0.02; done; exit 0; }
n=$(ls "$work/checkpoints" | wc -l)
code=$(sed -n "$((n + 1))p" "$FAKE_CLOUD/codes")
if [ -e "$FAKE_CLOUD/progress" ] || [ "${code:-0}" = 0 ]; then mkdir -p "$work/checkpoints/$((n + 1))"; fi
while [ -e "$FAKE_CLOUD/slow" ]; do sleep 0.02; done
echo '{"steps": 3}' >"$work/config.json"
echo '{"step": 1, "loss": 0.5}' >"$work/metrics.jsonl"
exit "${code:-0}"
"""
# A program on PATH is a module beside this file: Python keeps it compiled, which a script is not.
SHIM = """#!/bin/bash
export FAKE_PROGRAM={name}
exec {python} -SIE -c 'import sys; sys.path.insert(0, "{folder}"); import {module}' "$@"
"""


def program(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Cloud:
  """A folder with a cloud in it; `gcloud` and others are on PATH, and this machine's home is inside of it."""

  def __init__(self, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, module: str, *programs: str):
    self.folder = folder
    for name in programs:
      text = SHIM.format(name=name, python=sys.executable, folder=HERE, module=module)
      program(folder / "local" / name, text)
    for name, text in {
      "python3": PYTHON3, "hostpip": PIP, "hostpython": HOSTPYTHON, "hostname": '#!/bin/bash\necho "$FAKE_HOST"\n',
      "mountpoint": '#!/bin/bash\nmkdir -p "$2"\n', "sudo": '#!/bin/bash\nexec "$@"\n',
    }.items():  # fmt: skip
      program(folder / "bin" / name, text)
    (folder / "home").mkdir()
    monkeypatch.setenv("FAKE_CLOUD", str(folder))
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("PATH", str(folder / "local"), prepend=os.pathsep)
    monkeypatch.setenv("LOGNAME", "me")

  def faults(self, *faults: tuple[str, int, str]) -> None:
    """(kind of call, at which of them, what happens)."""
    rows = [{"call": call, "at": at, "do": do} for call, at, do in faults]
    new = self.folder / "faults.new"
    new.write_text(json.dumps(rows))
    new.replace(self.folder / "faults.json")  # a program may be reading it

  def calls(self) -> list[list[str]]:
    path = self.folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def state(self) -> dict:
    return json.loads((self.folder / "state.json").read_text())

  def hosts(self) -> list[str]:
    """Home folders of hosts that are there."""
    folder = self.folder / "hosts"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

  def settled(self) -> bool:
    """Nothing is left that costs money."""
    return self.state()["resources"] == {} and self.hosts() == []


def checkout(folder: pathlib.Path) -> pathlib.Path:
  """A git checkout of a package."""
  folder.mkdir()
  (folder / "setup.py").write_text("import setuptools\n\nsetuptools.setup(name='kling_jax')\n")
  (folder / "run.py").write_text("def get_config(arg=''):\n  return {}\n")
  (folder / ".gitignore").write_text("data/\n")
  for words in (["init", "-q"], ["add", "."]):
    subprocess.run(["git", *words], cwd=folder, check=True)
  return folder


def golden(name: str, words: list[str], main, folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  """Compares what a dry run prints with tests/fixtures/launch/NAME.txt; KLING_GOLDEN=1 writes it anew."""
  capsys.readouterr()
  assert main(words) == 0
  printed = capsys.readouterr().out.replace(str(folder), "/TMP").replace(sys.executable, "PYTHON")
  printed = re.sub(r"\b1[0-9]{9}\b", "UNTIL", printed)
  printed = re.sub(r"\b[0-9a-f]{12}\b", "DIGEST", printed)
  path = HERE / "fixtures" / "launch" / f"{name}.txt"
  if os.environ.get("KLING_GOLDEN"):
    path.parent.mkdir(exist_ok=True)
    path.write_text(printed)
  assert printed == path.read_text()


def shellcheck(*paths: pathlib.Path) -> None:
  """Fails on anything that shellcheck says."""
  program = pathlib.Path(sys.executable).with_name("shellcheck")
  done = subprocess.run([program, *paths], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout
