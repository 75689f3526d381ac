"""`kling encode` by workers: the same shards whoever writes them and in whatever order, also after a kill."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from kling_jax import cli
from kling_jax import config as config_lib
from kling_jax.data import buckets, cache, encode
from kling_jax.errors import UsageError
from kling_jax.generate import encode as generate_encode
from kling_jax.generate import encode_job
from kling_jax.train import encoders

ROOT = pathlib.Path(__file__).parents[1]
CLIPS = 5
BUCKET = buckets.Bucket(5, 16, 16, 8.0)
FLAGS = ["--config.data.buckets=((5,16,16),)", "--config.data.fps=8.0", "--config.data.validation_fraction=0.0"]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
  folder = tmp_path_factory.mktemp("films")
  for number in range(CLIPS):
    frames = np.random.default_rng(number).integers(0, 256, (9, 32, 32, 3), np.uint8)
    encode.write(folder / f"{number}.mp4", frames, fps=8)
    (folder / f"{number}.txt").write_text(f"film {number}", encoding="utf-8")
  return folder


def settings(folder):
  return config_lib.load("video_dit:runlocal", [*FLAGS, f"--config.data.sources=({str(folder)!r},)"])


def copied(films: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
  shutil.copytree(films, to, ignore=shutil.ignore_patterns("cache"))
  return to


def shards(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.rglob("cache/**/*.safetensors")}


def work_through(folder: pathlib.Path, order: slice) -> dict[str, bytes]:
  """All jobs in this process, in some order; the shards."""
  c = settings(folder)
  card = encoders.latent_encoder(c).card
  [(clips, place)] = generate_encode.opened(c, None)
  _, jobs = encode_job.missing_jobs("latents", card, clips, place, c)
  for job in jobs[order]:
    encode_job.work({"config": config_lib.plain(c), "source": str(folder), "kind": "latents", **job})
  return shards(folder)


def test_shards_depend_on_the_clips_alone_and_hold_what_one_process_writes(films, tmp_path, monkeypatch):
  monkeypatch.setattr(encode_job, "MOST_CLIPS", 2)
  first = work_through(copied(films, tmp_path / "a"), slice(None))
  second = work_through(copied(films, tmp_path / "b"), slice(None, None, -1))
  assert len(first) == 3 and sorted(first.values()) == sorted(second.values())

  c = settings(copied(films, tmp_path / "c"))
  generate_encode.run(c)
  card = encoders.latent_encoder(c).card
  whole, parts = (cache.LatentCache(card.folder(tmp_path / name), card) for name in "ca")
  assert whole.entries.keys() != {} and len(whole.entries) == CLIPS
  [(clips, _)] = generate_encode.opened(settings(tmp_path / "a"), None)
  [(others, _)] = generate_encode.opened(c, None)
  for index in range(CLIPS):
    a, b = clips.info(index).clip_id, others.info(index).clip_id
    np.testing.assert_array_equal(parts.get(a, BUCKET.name), whole.get(b, BUCKET.name))

  # What is lost is written again, byte for byte, and nothing else.
  lost = sorted((tmp_path / "a").rglob("pjob-*.safetensors"))[1]
  lost.unlink()
  before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("pjob-*")}
  assert work_through(tmp_path / "a", slice(None)) == first
  assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
  assert work_through(tmp_path / "a", slice(None)) == first, "nothing is left to do"


def test_flags_of_workers_are_checked(films, capsys):
  base = ["encode", "--config", "video_dit:runlocal", "--input", str(films), *FLAGS]
  for words, message in (
    (["--engine", "rya"], "did you mean 'ray'"), (["--workers", "2", "--per_worker", "GPU=1"], "is of --engine ray"),
    (["--engine", "ray", "--per_worker", "GPU"], "NAME=NUMBER"), (["--workers", "0"], "at least 1"),
  ):  # fmt: skip
    assert cli.main([*base, *words]) == 2
    assert message in capsys.readouterr().err
  with pytest.raises(UsageError, match="NAME=NUMBER"):
    encode_job.parse_needs(["GPU=-1"])
  assert encode_job.parse_needs(["TPU=4", "GPU=0.5"]) == {"TPU": 4.0, "GPU": 0.5}


@pytest.mark.drill
def test_a_killed_run_goes_on_and_ends_with_the_same_shards(films, tmp_path):
  reference = None
  script = (
    "import sys; from kling_jax.generate import encode_job; encode_job.MOST_CLIPS = 1; from kling_jax import cli; "
    "sys.exit(cli.main(sys.argv[1:]))"
  )

  def command(folder: pathlib.Path, workers: int) -> list[str]:
    words = ["encode", "--config", "video_dit:runlocal", "--input", "films", "--workers", str(workers), *FLAGS]
    return [sys.executable, "-c", script, *words]

  for name, workers, kill in (("one", 1, False), ("two", 2, True)):
    top = tmp_path / name
    top.mkdir()
    folder = copied(films, top / "films")
    if kill:
      process = subprocess.Popen(command(folder, workers), cwd=top, start_new_session=True, stdout=subprocess.DEVNULL)
      while not shards(folder) and process.poll() is None:
        time.sleep(0.02)
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
    done = subprocess.run(command(folder, workers), cwd=top, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not kill or f"{CLIPS} encoded" not in done.stdout, "it went on"
    found = shards(folder)
    assert len(found) == CLIPS
    reference = reference or found
    assert found == reference, "by one worker, or by two and killed in between"


@pytest.mark.drill
def test_ray_writes_the_same_shards(films, tmp_path, monkeypatch):
  ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'kling_jax[ray]'")
  monkeypatch.setattr(encode_job, "MOST_CLIPS", 2)
  paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
  ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
  try:
    folder = copied(films, tmp_path / "ray")
    text = encode_job.run(settings(folder), None, "ray", None, {})
  finally:
    ray.shutdown()
  assert f"{CLIPS} encoded, 0 were there" in text
  assert shards(folder) == work_through(copied(films, tmp_path / "here"), slice(None)) != {}
