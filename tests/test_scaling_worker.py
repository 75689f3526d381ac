"""Workers on real training runs of a tiny model: records, pairs, divergence, failures, kills; and their runner."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from kling_jax import cli
from kling_jax.errors import DataError
from kling_jax.scaling import cost, dashboard, paired, points, record, status, sweep, worker
from kling_jax.scaling.ledger import Ledger, Limits
from kling_jax.train import metrics
from kling_jax.train.defaults import RECIPE

ROOT = pathlib.Path(__file__).parents[1]
SWEEP = """
from kling_jax import config

def get_config():
  c = config.load("video_dit:runlocal")
  c.model.size, c.model.conditions = "d16", ()
  c.codec.channels = 4
  c.text.width, c.text.depth, c.text.tokens = 16, 1, 16
  c.history.probability = c.drop.text = 0.0
  c.data.sources = ("worlds:shapes-v1?count=64&seed=0",)
  c.data.buckets = ((5, 16, 16),)
  c.data.fps, c.data.memory_gib, c.data.threads, c.data.batch = 2.0, 0.1, 1, 4
  c.data.validation_fraction = 0.25
  c.mesh.replica = c.mesh.fsdp = 1
  c.optimizer.warmup = 2
  c.steps, c.validation.every, c.validation.rows = 8, 4, 32
  c.checkpoint.every, c.log.every, c.guard.max_skipped = 0, 4, 3
  return c

def sweep():
  yield {"optimizer.lr": 1e-3}
  yield {"optimizer.lr": 4e-3}
  yield {"optimizer.lr": 4e-3, "sweep.arm": "again"}
  yield {"optimizer.lr": 4e-3, "seed": 1, "sweep.arm": "repeat"}
  yield {"optimizer.lr": 1e-3, "steps": 12, "sweep.split": "holdout"}
  yield {"optimizer.lr": 2e-2, "steps": 12, "sweep.split": "holdout", "sweep.arm": "hot"}
"""


@pytest.fixture(scope="module", autouse=True)
def small_programs() -> Iterator[None]:
  """One device, and programs that compile in half the time: here they run for milliseconds."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda *_: [jax.local_devices()[0]])
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The folder of a sweep that one worker finished."""
  folder = tmp_path_factory.mktemp("sweep")
  (folder / "tiny.py").write_text(SWEEP)
  assert worker.work(str(folder / "tiny.py"), folder) == 5
  return folder


def runs_of(folder: pathlib.Path) -> list[sweep.Run]:
  return sweep.load(str(folder / "tiny.py")).runs()


def test_every_run_has_one_start_one_end_and_a_whole_record(done: pathlib.Path) -> None:
  rows = Ledger(done).rows()
  assert sorted(row["event"] for row in rows) == ["finished"] * 5 + ["start"] * 5
  for run, found in zip(runs_of(done), _records(done), strict=True):
    size = cost.of(run.config)
    trained = metrics.read(done / "runs" / run.id / "metrics.jsonl")[-1]
    assert found["params"] == 16**3 and found["params_by_part"]["blocks"] == 16**3
    assert found["tokens"] == trained["tokens"] == run.config.steps * 4 * size.clip_tokens
    assert found["flops"] == trained["flops"] == pytest.approx(size.flops(found["tokens"])), "the plan's FLOPs are true"
    assert [point["step"] for point in found["points"]] == list(range(4, run.config.steps + 1, 4))
    assert found["loss"] == trained["val_loss"] and found["stderr"] == trained["val_stderr"] > 0
    assert (found["lr"], found["seed"], found["batch_tokens"]) == (run.config.optimizer.lr, run.config.seed, 32)
    assert found["context"] == 8 and found["flop_rule"] == "exact" and found["arms"] == list(run.arms)
    told = "schedule ema_decay table_id wall_s cpu_s device commit code recipe versions"
    assert set(told.split()) <= set(found) and found["cpu_s"] > 0
  assert len({found["table_id"] for found in _records(done)}) == 1, "another seed is validated on the same rows"
  assert len(record.code()) == 12


def test_the_same_config_learns_what_it_learnt_when_recipe_was_raised(done: pathlib.Path) -> None:
  """Who changes what a config learns raises `RECIPE` in train/defaults.py and pins the new losses here."""
  losses = [found["loss"] for found in _records(done)]
  assert (RECIPE, losses) == (1, pytest.approx([1.82683, 1.66281, 1.69862, 1.80332, 1.27665], rel=2e-3))


def _records(folder: pathlib.Path) -> list[dict]:
  found = {row["run"]: row for row in Ledger(folder).finished()}
  return [found[run.id] for run in runs_of(folder)]


def test_work_is_over_when_nothing_is_left(done: pathlib.Path) -> None:
  before = (done / "ledger.jsonl").read_bytes()
  assert worker.work(str(done / "tiny.py"), done) == 0
  assert (done / "ledger.jsonl").read_bytes() == before


def test_pairs_are_far_finer_than_their_losses_and_agree_with_them(done: pathlib.Path) -> None:
  first, second, *_ = _records(done)
  ledger = Ledger(done)
  found = paired.compare(ledger.workdir(first["run"]), 8, ledger.workdir(second["run"]), 8)
  assert found.difference == pytest.approx(first["loss"] - second["loss"], abs=1e-6)
  assert (found.stderr_a, found.stderr_b) == pytest.approx((first["stderr"], second["stderr"]))
  assert 0 < found.stderr < 0.2 * found.stderr_a and found.rows == 32
  same = paired.compare(ledger.workdir(first["run"]), 4, ledger.workdir(first["run"]), 4)
  assert same.difference == same.stderr == 0.0
  with pytest.raises(DataError, match="no validation of step 5"):
    paired.compare(ledger.workdir(first["run"]), 5, ledger.workdir(second["run"]), 8)
  rows = paired.regrets(ledger, list(_records(done)))
  assert [row["arm"] for row in rows] == ["tuned", "hot"] and rows[0]["relative"] == 0.0
  assert rows[1]["relative"] == pytest.approx(_records(done)[4]["loss"] / _records(done)[3]["loss"] - 1, rel=1e-4)


def test_points_are_what_the_fit_reads(done: pathlib.Path, tmp_path: pathlib.Path) -> None:
  from kling_jax.scaling import table

  rows = points.points(Ledger(done).finished())
  points.write_csv(tmp_path / "points.csv", rows)
  read = table.read(tmp_path / "points.csv", units={"tokens": 100.0})  # so few tokens would be taken for millions
  assert len(rows) == 2 + 2 + 2 + 3 + 3 and len(read) == 2 + 2 + 2 + 3, "the held-out arm `hot` checks no law"
  assert read.runs == 4 and read.holdout.sum() == 3 and read.flop_rule == "exact"
  np.testing.assert_allclose(read.loss, [row["loss"] for row in rows if row["arm"] != "hot"])
  assert np.ptp(read.weight) == 0, "the table's own error, which all runs share, is no weight"


def test_status_and_page_tell_how_it_stands(done: pathlib.Path, tmp_path: pathlib.Path, capsys) -> None:
  words = ["sweep", "status", str(done / "tiny.py"), "--workdir", str(done)]
  assert cli.main([*words, "--json", "--html", str(tmp_path / "page.html")]) == 0
  answer = json.loads(capsys.readouterr().out)
  assert answer["counts"] == {"finished": 5} and answer["done"] == 1.0 and not answer["warnings"]
  assert {run["arms"][0] for run in answer["runs"]} == {"tuned", "repeat", "hot"}
  assert cli.main(words) == 0
  text = capsys.readouterr().out
  assert "tuned+again" in text and "tuned *" in text and "5 finished" in text
  html = (tmp_path / "page.html").read_text()
  assert "Arms at the hold-outs" in html and "hot" in html and "http://" not in html.split("<script>")[0]


def test_a_page_of_a_ledger_alone_says_what_it_cannot_show(done: pathlib.Path, tmp_path: pathlib.Path) -> None:
  for name in ("tiny.py", "ledger.jsonl"):
    shutil.copy(done / name, tmp_path / name)
  loaded = sweep.load(str(tmp_path / "tiny.py"))
  ledger = Ledger(tmp_path)
  dashboard.write(tmp_path / "page.html", loaded, ledger, status.of(ledger, loaded.runs()))
  assert "Rows of the validation table are gone" in (tmp_path / "page.html").read_text()


def test_diverged_and_failed_runs_are_recorded_and_the_others_go_on(tmp_path: pathlib.Path) -> None:
  body = SWEEP.partition("def sweep")[0] + (
    "def sweep():\n"
    "  yield {'optimizer.lr': 1e-3}\n"
    "  yield {'optimizer.lr': float('nan')}\n"
    "  yield {'data.sources': ('nowhere/at/all',)}\n"
  )
  (tmp_path / "tiny.py").write_text(body)
  assert worker.work(str(tmp_path / "tiny.py"), tmp_path, worker.Options(Limits(retries=1), poll_s=0.01)) == 4
  states = Ledger(tmp_path, Limits(retries=1)).states()
  fine, diverged, failed = (states[run.id] for run in runs_of(tmp_path))
  assert fine.status == "finished" and diverged.status == "diverged" and failed.status == "abandoned"
  assert diverged.starts == 1 and "updates were skipped" in diverged.record["reason"]
  assert failed.starts == 2 and failed.record["error"] == "DataError" and "nowhere" in failed.record["reason"]


# ---- drills --------------------------------------------------------------------------------------------------------

FAST = SWEEP.partition("def sweep")[0] + (
  "def sweep():\n  for k in range(12): yield {'optimizer.lr': 1e-3 * (1 + k), 'steps': 200, 'validation.every': 100}\n"
)


def _kling(*words: str, folder: pathlib.Path) -> subprocess.Popen[bytes]:
  environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  with (folder / "runner.log").open("ab") as log:
    return subprocess.Popen(
      [sys.executable, "-m", "kling_jax", "sweep", *words], cwd=ROOT, env=environment, stdout=log, stderr=log,
      start_new_session=True,
    )  # fmt: skip


def _workers(folder: pathlib.Path) -> list[int]:
  """Process ids of the workers of this folder, by their leases."""
  found = []
  for path in (folder / "leases").glob("*.json"):
    try:
      found.append(json.loads(path.read_text())["pid"])
    except FileNotFoundError:
      continue
  return found


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_kill_9_of_runner_and_workers_at_random_loses_and_doubles_nothing(tmp_path: pathlib.Path) -> None:
  """Two runners at once on one ledger, killed again and again with whatever they started."""
  (tmp_path / "tiny.py").write_text(FAST)
  words = ("run", str(tmp_path / "tiny.py"), "--workdir", str(tmp_path), "--workers", "1", "--kills", "1000")
  draw = random.Random(0)
  runners = [_kling(*words, folder=tmp_path) for _ in range(2)]
  ledger = Ledger(tmp_path)
  kills, begun, limit_s = 0, time.monotonic(), 150.0
  try:
    while kills < 50 and time.monotonic() - begun < limit_s and len(ledger.finished()) < 12:
      time.sleep(draw.uniform(0.1, 1.5))
      victims = _workers(tmp_path)
      if victims and draw.random() < 0.7:
        with contextlib.suppress(ProcessLookupError):  # it may end between the reading of its lease and the kill
          os.kill(draw.choice(victims), signal.SIGKILL)
          kills += 1
      elif draw.random() < 0.3:
        k = draw.randrange(2)
        runners[k].kill()
        runners[k].wait()
        kills += 1
        runners[k] = _kling(*words, folder=tmp_path)
    for runner in runners:
      assert runner.wait(timeout=300) == 0, (tmp_path / "runner.log").read_text()[-2000:]
  finally:
    for runner in runners:
      runner.kill()
  print(f"{kills} kills in {time.monotonic() - begun:.0f} s")
  assert kills >= 10
  rows = ledger.rows()
  finished = [row["run"] for row in rows if row["event"] == "finished"]
  assert sorted(finished) == sorted(run.id for run in runs_of(tmp_path)), "none lost, none doubled"
  assert all(len(row["points"]) == 2 for row in ledger.finished())
  assert not list((tmp_path / "leases").iterdir())


@pytest.mark.drill
def test_a_full_disk_stops_the_runner_with_one_clear_line(tmp_path: pathlib.Path) -> None:
  """A file size limit stands in for the full disk: the ledger cannot grow, nothing that stands in it is lost."""
  (tmp_path / "tiny.py").write_text(FAST)
  script = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY));"
    f"from kling_jax.cli import main; sys.exit(main(['sweep', 'work', {str(tmp_path / 'tiny.py')!r}, '--workdir', "
    f"{str(tmp_path / 'w')!r}]))"
  )
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                        env={**os.environ, "XLA_FLAGS": ""})  # fmt: skip
  assert done.returncode == 74, done.stderr
  assert "make room and start again" in done.stderr.splitlines()[-1]
  rows = Ledger(tmp_path / "w").rows()
  assert [row["event"] for row in rows] == ["start"]
  assert not list((tmp_path / "w" / "leases").iterdir()), "the run is free for whoever comes next"


@pytest.mark.drill
def test_ray_tasks_do_the_work(tmp_path: pathlib.Path) -> None:
  pytest.importorskip("ray")
  (tmp_path / "tiny.py").write_text(SWEEP)
  runner = _kling("run", str(tmp_path / "tiny.py"), "--workdir", str(tmp_path), "--executor", "ray", folder=tmp_path)
  assert runner.wait(timeout=400) == 0, (tmp_path / "runner.log").read_text()[-2000:]
  assert len(Ledger(tmp_path).finished()) == 5
