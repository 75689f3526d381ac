"""The wheel: what it carries, that it works outside of the repository, and that `kling --help` starts at once."""

import email
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import numpy as np
import pytest

import kling_jax
from kling_jax import cli
from kling_jax.data import encode

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = ("kling_jax", "configs", "launch")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
  """Built from a copy, so that no build folder stays in the repository; needs no network."""
  top = tmp_path_factory.mktemp("source")
  for name in SOURCES:
    shutil.copytree(ROOT / name, top / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, top / name)
  command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", "out"]
  done = subprocess.run(command, cwd=top, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  [path] = (top / "out").glob("*.whl")
  return path


def test_the_wheel_carries_code_configs_launchers_and_weights_and_nothing_else(wheel):
  with zipfile.ZipFile(wheel) as held:
    names = {name for name in held.namelist() if ".dist-info/" not in name}
    about = {name.split("/")[-1]: name for name in held.namelist() if ".dist-info/" in name}
    metadata = email.message_from_bytes(held.read(about["METADATA"]))
    assert held.read(about["entry_points.txt"]).decode().split() == [
      "[console_scripts]",
      "kling",
      "=",
      "kling_jax.cli:main",
    ]
    weights = [held.getinfo(name).file_size for name in names if name.endswith(".safetensors")]
  expected, top = set(), wheel.parents[1]
  for source in SOURCES:
    for path in (top / source).rglob("*"):
      wanted = path.suffix in (".py", ".sh", ".typed") or path.name == "Dockerfile"
      wanted |= path.parent.parent.name == "assets"
      if path.is_file() and wanted:
        inside = path.relative_to(top).as_posix()
        expected.add(inside if source == "kling_jax" else f"kling_jax/{inside}")
  assert names == expected
  assert len(weights) >= 2 and min(weights) > 10_000 and sum(weights) < 8 * 2**20
  assert metadata["Name"] == "kling_jax" and metadata["Version"] == kling_jax.__version__
  assert metadata["Requires-Python"] == ">=3.11" and "LICENSE" in about
  extras = set(metadata.get_all("Provides-Extra"))
  assert {"demo", "tpu", "cuda", "ray", "track", "cloud", "test"} <= extras


def test_every_release_has_notes():
  notes = (ROOT / "docs" / "release_notes.md").read_text(encoding="utf-8")
  assert re.search(rf"^## {re.escape(kling_jax.__version__)}$", notes, re.M)


def cpu_s(*command: str) -> float:
  """Least CPU time of three starts."""
  found = []
  for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], capture_output=True, check=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
  return min(found)


def test_help_costs_little_more_than_python_s_start():
  """Below 0.5 s where Python itself starts in 50 ms; a machine ten times slower is slow at both."""
  assert cpu_s("-m", "kling_jax", "--help") < 10 * max(cpu_s("-c", "pass"), 0.02)


@pytest.mark.drill
def test_the_wheel_works_in_a_fresh_environment_away_from_the_repository(wheel, tmp_path):
  """Its dependencies are this environment's, behind a path; the package is the wheel's."""
  fresh, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
  elsewhere.mkdir()
  subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(fresh)], check=True)
  python = fresh / "bin" / "python"
  install = ["--python", str(python), "install", "--no-deps", "--no-index", "--no-compile", str(wheel)]
  subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True)
  site = sysconfig.get_path("purelib", vars={"base": str(fresh), "platbase": str(fresh)})
  (pathlib.Path(site) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
  environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}

  def kling(*words: str) -> str:
    command = [str(fresh / "bin" / "kling"), *words]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout

  where = subprocess.run([str(python), "-c", "import kling_jax; print(kling_jax.__file__)"], cwd=elsewhere,
                         env=environment, capture_output=True, text=True, check=True)  # fmt: skip
  assert pathlib.Path(where.stdout.strip()).is_relative_to(fresh), "not the repository's"
  for verb in cli.VERBS:
    assert "usage: kling" in kling(verb, "--help")
  assert json.loads(kling("doctor", "--json"))["encoders"]["libx264"]
  frames = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8).repeat(24, axis=0)
  encode.write(elsewhere / "a.mp4", frames, fps=12)  # one cut
  [found] = json.loads(kling("split", "a.mp4", "--json"))  # reads the embedded network
  assert found["num_frames"] == 48 and len(found["shots"]) >= 1
  [scored] = json.loads(kling("score", "--input", "a.mp4", "--json"))  # and the embedded suitability model
  assert 1 <= scored["vtss"] <= 5
  kling(
    "train", "--config", "video_dit:runlocal", "--workdir", "run", "--config.steps=2", "--config.validation.every=0"
  )
  assert (elsewhere / "run" / "metrics.jsonl").read_text().count("\n") >= 1
