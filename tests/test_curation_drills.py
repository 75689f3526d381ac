"""Curation under kills, on a cluster, on a full disk and on a thousand damaged files: always the same set."""

import contextlib
import dataclasses
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest

from kling_jax.curation import curate, journal, video
from kling_jax.data import encode, films, reasons, records, verify

RECIPE = video.Recipe(min_seconds=0.5, max_seconds=1.5, min_side=16)
OPTIONS = curate.Options(recipe=RECIPE, workers=2, report=False)
RUN = """
import sys
from kling_jax.cli import main
sys.exit(main(["curate", "--input", sys.argv[1], "--output", sys.argv[2], "--workers", "2", "--min_seconds", "0.5",
               "--max_seconds", "1.5", "--min_side", "16", "--no_report", *sys.argv[3:]]))
"""

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def footage(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("footage")
  films.render_films(folder, count=4, seconds=4.0, size=(96, 128), seed=5)
  return folder


@pytest.fixture(scope="module")
def wanted(footage: pathlib.Path, tmp_path_factory) -> list:
  output = tmp_path_factory.mktemp("set") / "set"
  curate.curate(footage, output, OPTIONS)
  return contents(output)


def contents(output: pathlib.Path) -> list:
  assert verify.verify(output).ok
  return list(records.read_all(output))


def start(footage: pathlib.Path, output: pathlib.Path, *flags: str, **options) -> subprocess.Popen:
  command = [sys.executable, "-c", RUN, str(footage), str(output), *flags]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def standing(output: pathlib.Path) -> dict[pathlib.Path, int]:
  """The clips in staging that are whole, with the times they were written; clips come and go meanwhile."""
  found = {}
  for path in (output / "work").glob("*/[!.]*"):
    with contextlib.suppress(FileNotFoundError):
      if "splits" not in path.parts:
        found[path] = path.stat().st_mtime_ns
  return found


def children(pid: int) -> list[int]:
  found = []
  for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      state, parent = stat.read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
      continue
    if int(parent) == pid and state != "Z":
      found.append(int(stat.parent.name))
  return found


@pytest.mark.timeout(400)
def test_workers_killed_at_random_cost_nothing(footage: pathlib.Path, wanted: list, tmp_path: pathlib.Path) -> None:
  """Each kill hits a worker at another stage; what it had finished stands, and nothing is quarantined."""
  draw = random.Random(1)
  kills = 0
  for attempt in range(3):
    output = tmp_path / f"set-{attempt}"
    process = start(footage, output)
    for _ in range(2):  # fewer than a job has tries
      time.sleep(draw.uniform(1.0, 4.0))
      if process.poll() is None and (found := children(process.pid)):
        os.kill(draw.choice(found), signal.SIGKILL)
        kills += 1
    assert process.wait() == 0, process.stderr.read()
    assert not any(entry["reason"] for entry in journal.read(output))
    assert contents(output) == wanted
  assert kills >= 3


@pytest.mark.timeout(400)
def test_a_run_goes_on_in_the_middle_of_a_video(footage: pathlib.Path, wanted: list, tmp_path: pathlib.Path) -> None:
  output = tmp_path / "set"
  process = start(footage, output)
  while process.poll() is None and len(staged := standing(output)) < 3:
    time.sleep(0.01)
  process.kill()
  process.wait()
  assert staged and not (output / "clips.parquet").exists()
  process = start(footage, output)
  while process.poll() is None and not (output / "videos.jsonl").exists():
    now = standing(output)
    assert all(now.get(path, staged[path]) == staged[path] for path in staged), "a clip that stood was made again"
    time.sleep(0.01)
  assert process.wait() == 0
  assert contents(output) == wanted


@pytest.mark.timeout(400)
def test_a_full_disk_is_one_clear_line_and_the_next_run_goes_on(
  footage: pathlib.Path, wanted: list, tmp_path: pathlib.Path
) -> None:
  """A limit on the size of files stands in for the disk: clips fit, a shard does not; then not even clips."""
  sizes = [len(media) for _, media in wanted]
  for limit in (max(sizes) // 2, sum(sizes) // 2):
    output = tmp_path / f"set-{limit}"
    limited = lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    process = start(footage, output, preexec_fn=limited)
    _, said = process.communicate()
    assert process.returncode == 74, said
    assert "make room and start again" in said.splitlines()[-1] and "Traceback" not in said
    assert start(footage, output).wait() == 0
    assert contents(output) == wanted


@pytest.mark.timeout(600)
def test_two_ray_nodes_of_which_one_dies_make_the_same_set(
  footage: pathlib.Path, wanted: list, tmp_path: pathlib.Path
) -> None:
  ray = pytest.importorskip("ray")
  from ray.cluster_utils import Cluster

  nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
  other = nodes.add_node(num_cpus=1)
  nodes.wait_for_nodes()
  paths = os.pathsep.join(path for path in sys.path if path)
  ray.init(address=nodes.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
  output = tmp_path / "set"
  try:
    import threading

    def remove() -> None:
      while not list((output / "work").glob("*/*")):
        time.sleep(0.05)
      nodes.remove_node(other, allow_graceful=False)

    thread = threading.Thread(target=remove)
    thread.start()
    curate.curate(footage, output, dataclasses.replace(OPTIONS, engine="ray", workers=None))
    thread.join()
  finally:
    ray.shutdown()
    nodes.shutdown()
  assert contents(output) == wanted


@pytest.mark.timeout(900)
def test_a_thousand_damaged_files_cost_a_line_each_at_most(tmp_path: pathlib.Path) -> None:
  """Bytes are flipped, cut out and zeroed all over small films of three codecs; every file ends in the journal."""
  rng = np.random.default_rng(0)
  frames = [np.roll(rng.integers(0, 255, (48, 64, 3), np.uint8), 3 * k, 1) for k in range(12)]
  sources = [
    encode.encode(frames, fps=10),
    _other(frames, "mpeg4", "avi", tmp_path),
    _other(frames, "libvpx", "webm", tmp_path),
  ]
  folder = tmp_path / "films"
  folder.mkdir()
  for k in range(1000):
    data = bytearray(sources[k % 3])
    for _ in range(int(rng.integers(1, 9))):
      # Half of the damage goes into the first kilobyte, where the headers are.
      at = int(rng.integers(0, 1024 if rng.random() < 0.5 else len(data)))
      match int(rng.integers(0, 3)):
        case 0:
          data[at] ^= 1 << int(rng.integers(0, 8))
        case 1:
          data[at : at + 16] = bytes(len(data[at : at + 16]))
        case _:
          del data[at : at + int(rng.integers(1, 64))]
    (folder / f"{k:04d}.{('mp4', 'avi', 'webm')[k % 3]}").write_bytes(data)
  (folder / "sound.mp4").write_bytes(sources[0])
  curate.curate(folder, tmp_path / "set", dataclasses.replace(OPTIONS, seconds_per_video=30.0))
  found = {entry["name"]: entry for entry in journal.read(tmp_path / "set")}
  assert len(found) == 1001
  assert all(entry["reason"] in ("", *reasons.REASONS) for entry in found.values())
  assert not [entry for entry in found.values() if "unexpected" in entry["detail"]], "a bug and no damage"
  assert found["sound.mp4"]["clips"] and not found["sound.mp4"]["damage"]
  refused = sum(bool(entry["reason"]) for entry in found.values())
  salvaged = sum(bool(entry["damage"]) for entry in found.values())
  print(f"{refused} quarantined, {salvaged} salvaged, {1001 - refused - salvaged} sound")
  assert refused > 100 and salvaged > 50
  assert verify.verify(tmp_path / "set").ok


def _other(frames: list[np.ndarray], codec: str, kind: str, folder: pathlib.Path) -> bytes:
  path = folder / f"source.{kind}"
  with av.open(str(path), "w", format=kind) as out:
    stream = out.add_stream(codec, rate=10)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for frame in frames:
      out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")))
    out.mux(stream.encode(None))
  return path.read_bytes()
