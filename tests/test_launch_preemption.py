"""A job of two processes that a launcher runs, whose spot hosts are taken away: what is left is as if nothing was."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading

import fake_cloud
import pytest

from kling_jax.launch import tpu_vm
from kling_jax.train import metrics

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 8
GRACE_S = 120  # of which nothing is waited for that the job does not need
# As in tests/test_train_jobs.py.
CHANGES = {
  "steps": STEPS, "log.every": 1, "checkpoint.every": 2, "validation.every": 0, "data.batch": 8,
  "data.sources": ("worlds:shapes-v1?count=24&seed=0",), "data.validation_fraction": 0.3, "data.threads": 1,
  "text.tokens": 16, "model.conditions": ("motion",), "optimizer.warmup": 2, "mesh.fsdp": -1,
}  # fmt: skip

# The `python` of a host. `attempt` runs as it is; the command that it starts notes what goes into each step. The first
# hosts wait before batch 4, the second ones before batch 6, until they are taken away. The first then go on slowly,
# since JAX looks for the signal once a second.
HOSTPYTHON = """#!/bin/bash
exec {python} {script} "$@"
"""
SCRIPT = """
import os, sys

sys.path.insert(0, {root!r})
sys.argv = sys.argv[1:]
if sys.argv[:2] == ["-m", "kling_jax.launch.attempt"]:
  from kling_jax.launch import attempt
  attempt.TIED = open(os.path.join(os.path.dirname(__file__), "kling.py")).read()
  sys.exit(attempt.main(sys.argv[2:]))
raise SystemExit(f"a host was asked for {{sys.argv}}")
"""
KLING = """
import ctypes, faulthandler, json, os, signal, sys, time
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
faulthandler.register(signal.SIGUSR1)
sys.path.insert(0, {root!r})
from kling_jax import cli
from kling_jax.data import pipeline
from kling_jax.train.task import digests

iterate = pipeline.Batches.iterate
name = os.environ.get("JAX_PROCESS_ID", "alone")
hosts = 0 if name == "alone" else int(os.path.basename(os.environ["HOME"]).partition("-")[0])

def recorded(self, *args, **kwargs):
  for step, batch in iterate(self, *args, **kwargs):
    with open({folder!r} + f"/fed-{{name}}.jsonl", "a") as file:
      for index, digest in zip(batch["index"].tolist(), digests(batch)):
        file.write(json.dumps([step, index, digest.tobytes().hex(), hosts]) + chr(10))
    if step == {{1: 4, 2: 6}}.get(hosts):
      open({folder!r} + f"/waits-{{hosts}}-{{name}}", "w").close()
      while not os.path.exists({folder!r} + f"/cloud/told-{{hosts}}"):
        time.sleep(0.05)
    if hosts == 1 and step >= 4:
      time.sleep(2)
    yield step, batch

pipeline.Batches.iterate = recorded
sys.exit(cli.main())
"""


def command(workdir: str) -> list[str]:
  words = ["--config", f"{ROOT}/configs/video_dit.py:runlocal", "--workdir", workdir]
  return [*words, *(f"--config.{key}={value}" for key, value in CHANGES.items())]


def environment(**more: str) -> dict[str, str]:
  flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 "
  flags += "--xla_cpu_use_fusion_emitters=false"
  return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "OMP_NUM_THREADS": "1", **more}


def fed(folder: pathlib.Path, *names: str) -> list[tuple[int, int, str, int]]:
  """What processes fed: step, row, its hash, and on which hosts."""
  lines = [line for name in names for line in (folder / f"fed-{name}.jsonl").read_text().splitlines()]
  return [tuple(json.loads(line)) for line in lines]


@pytest.mark.drill
def test_a_job_whose_spot_hosts_are_taken_away_goes_on_elsewhere_as_if_nothing_was(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  cloud = fake_cloud.Cloud(tmp_path / "cloud", monkeypatch, "fake_gcloud", "gcloud")
  monkeypatch.setattr(tpu_vm.slices.Slice, "hosts", property(lambda _: 2))
  monkeypatch.chdir(tmp_path)
  fake_cloud.checkout(tmp_path / "code")
  names = {"root": str(ROOT), "folder": str(tmp_path), "python": sys.executable, "script": tmp_path / "host.py"}
  fake_cloud.program(cloud.folder / "bin" / "hostpython", HOSTPYTHON.format(**names))
  (tmp_path / "host.py").write_text(SCRIPT.format(**names))
  (tmp_path / "kling.py").write_text(KLING.format(**names))
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    joining = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
  hosts = [environment(JAX_PROCESS_ID=str(n), **joining) for n in range(2)]
  (cloud.folder / "host_env.json").write_text(json.dumps(hosts))

  def take_away() -> None:
    """Once both processes wait, the next look at the hosts finds them taken away: with a warning, then without."""
    for hosts, grace_s in ((1, GRACE_S), (2, 0)):
      while not all((tmp_path / f"waits-{hosts}-{n}").exists() for n in (0, 1)):
        if stop.wait(0.05):
          return
      (cloud.folder / "grace.json").write_text(json.dumps(grace_s))
      cloud.faults(("ssh:status", cloud.state()["count"]["ssh:status"] + 1, "preempt"))

  stop = threading.Event()
  watcher = threading.Thread(target=take_away)
  watcher.start()
  place = ["--accelerator_type", "v5litepod-16", "--zone", "z", "--project", "p", "--spot", "--nfs", "h:/s"]
  place += ["--root", str(cloud.folder / "shared"), "--code", "code", "--usd_per_chip_hour", "0", "--poll_s", "3"]
  try:
    assert tpu_vm.main([*command("runs/a"), *place]) == 0, capsys.readouterr()
  finally:
    stop.set()
    watcher.join()
  said = capsys.readouterr().out
  assert cloud.settled() and cloud.state()["created"] == 3, said
  assert said.count("hosts are gone") == 2

  alone = subprocess.run(
    [sys.executable, str(tmp_path / "kling.py"), "train", *command(str(tmp_path / "alone"))],
    env=os.environ | environment(), capture_output=True, text=True, cwd=ROOT,
  )  # fmt: skip
  assert alone.returncode == 0, alone.stderr
  rows = metrics.read(tmp_path / "runs" / "a" / "metrics.jsonl")
  expected = metrics.read(tmp_path / "alone" / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "no metric is lost, none is there twice"
  assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
  assert rows[-1]["tokens"] == expected[-1]["tokens"]
  rows_fed = fed(tmp_path, "0", "1")
  assert {row[:3] for row in rows_fed} == {row[:3] for row in fed(tmp_path, "alone")}, "and the rows of each step"
  first = {hosts: min(step for step, *_, here in rows_fed if here == hosts) for hosts in (1, 2, 3)}
  assert first[1] == 0 and first[2] > 4, "told to leave in step 4, they saved what checkpoint.every did not ask for"
  assert first[2] <= first[3] <= 6, "killed before step 6"
