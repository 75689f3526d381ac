"""The ledger: nothing lost, nothing twice, whoever writes, dies, stalls or runs out of disk."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from kling_jax.errors import DataError, NoRoom
from kling_jax.scaling.ledger import LeaseLost, Ledger, Limits

ROOT = pathlib.Path(__file__).parents[1]
PRELUDE = "import sys, time, os; from kling_jax.scaling.ledger import *; ledger = Ledger(sys.argv[1]);"


def python(script: str, folder: pathlib.Path, **options) -> subprocess.Popen[str]:
  command = [sys.executable, "-c", PRELUDE + script, str(folder)]
  return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def events(folder: pathlib.Path) -> list[tuple[str, str]]:
  return [(row["event"], row["run"]) for row in Ledger(folder).rows()]


def test_a_run_goes_from_pending_to_finished_once(tmp_path: pathlib.Path) -> None:
  ledger = Ledger(tmp_path)
  assert ledger.states(["a"])["a"].status == "pending"
  assert ledger.claim(["a", "b"]) == "a"
  assert ledger.states(["a"])["a"].status == "running" and ledger.states(["a"])["a"].lease["pid"] == os.getpid()
  assert Ledger(tmp_path).claim(["a"]) is None, "who else asks gets nothing"
  ledger.end("a", "finished", {"loss": 0.5, "stderr": float("nan")})
  assert ledger.claim(["a"]) is None
  assert [(row["run"], row["loss"], row["stderr"]) for row in ledger.finished()] == [("a", 0.5, None)]
  with pytest.raises(LeaseLost):
    ledger.end("a", "finished", {"loss": 0.4})
  assert events(tmp_path) == [("start", "a"), ("finished", "a")]
  assert not list((tmp_path / "leases").iterdir())


def test_failures_are_retried_up_to_the_limit_and_stops_do_not_count(tmp_path: pathlib.Path) -> None:
  ledger = Ledger(tmp_path, Limits(retries=1))
  for event in ("stopped", "stopped", "failed", "stopped", "failed"):
    assert ledger.claim(["a"]) == "a"
    ledger.end("a", event, {"reason": "why"})
  state = ledger.states()["a"]
  assert ledger.claim(["a"]) is None
  assert (state.status, state.failures, state.starts, state.record["reason"]) == ("abandoned", 2, 5, "why")
  assert Ledger(tmp_path, Limits(retries=2)).claim(["a"]) == "a", "another limit takes it up again"


def test_a_line_cut_in_half_is_left_out_and_mended_by_the_next_writer(tmp_path: pathlib.Path) -> None:
  ledger = Ledger(tmp_path)
  for run in "ab":
    ledger.claim([run])
    ledger.end(run, "finished", {"loss": 1.0})
  whole = ledger.path.read_bytes()
  for cut in (1, 7, len(whole.splitlines()[-1])):
    ledger.path.write_bytes(whole[:-cut])
    assert [event for event in events(tmp_path)] == [("start", "a"), ("finished", "a"), ("start", "b")]
    assert Ledger(tmp_path).claim(["b"]) == "b", "the run whose line was lost is run again"
    assert [json.loads(line)["event"] for line in ledger.path.read_text().splitlines()][-2:] == ["start", "start"]
    (tmp_path / "leases" / "b.json").unlink()
  ledger.path.write_bytes(whole.replace(b"finished", b'fin"', 1))
  with pytest.raises(DataError, match="line 2 is damaged"):
    ledger.rows()


def test_many_writers_end_every_run_exactly_once(tmp_path: pathlib.Path) -> None:
  runs = [f"run{k:02d}" for k in range(40)]
  script = (
    f"runs = {runs!r}; mine = 0\n"
    "while (run := ledger.claim(runs)) is not None:\n"
    "  time.sleep(0.002); ledger.beat(run); ledger.end(run, 'finished', {'loss': 1.0, 'pad': 'x' * 3000}); mine += 1\n"
    "print(mine)\n"
  )
  writers = [python(script, tmp_path) for _ in range(4)]
  done = [int(writer.communicate(timeout=120)[0]) for writer in writers]
  assert sum(done) == len(runs)
  assert sorted(events(tmp_path)) == sorted([("start", run) for run in runs] + [("finished", run) for run in runs])


def test_the_lease_of_a_dead_process_is_free_at_once(tmp_path: pathlib.Path) -> None:
  worker = python("print(ledger.claim(['a']), flush=True); time.sleep(60)", tmp_path)
  assert worker.stdout is not None and worker.stdout.readline() == "a\n"
  assert Ledger(tmp_path).claim(["a"]) is None
  worker.kill()
  worker.communicate()
  assert Ledger(tmp_path).claim(["a"]) == "a"


def test_a_silent_lease_is_taken_over_and_its_old_owner_can_say_nothing_more(tmp_path: pathlib.Path) -> None:
  first, second = Ledger(tmp_path, Limits(stale_s=0.3)), Ledger(tmp_path, Limits(stale_s=0.3))
  assert first.claim(["a"]) == "a"
  for _ in range(4):
    time.sleep(0.15)
    first.beat("a")
    assert second.claim(["a"]) is None, "a heart that beats keeps the run"
  time.sleep(0.4)
  assert second.claim(["a"]) == "a"
  for say in (lambda: first.beat("a"), lambda: first.end("a", "finished", {}), lambda: first.release("a")):
    with pytest.raises(LeaseLost, match=second.runner):
      say()
  second.end("a", "finished", {"loss": 1.0})
  assert [event for event, _ in events(tmp_path)] == ["start", "start", "finished"]


def test_a_run_that_kills_its_workers_is_given_up_unless_it_gets_further(tmp_path: pathlib.Path) -> None:
  die = "ledger.claim(['a']); os._exit(1)"
  for step in (0, 0, 10, 10):
    if step:
      (tmp_path / "runs" / "a" / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
    python(die, tmp_path).communicate()
  assert Ledger(tmp_path, Limits(kills=2)).states()["a"].status == "pending", "a newer checkpoint starts the count anew"
  python(die, tmp_path).communicate()
  state = Ledger(tmp_path, Limits(kills=2)).states()["a"]
  assert state.status == "abandoned" and state.starts == 5
  assert Ledger(tmp_path, Limits(kills=2)).claim(["a"]) is None


def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path: pathlib.Path) -> None:
  for run in "abc":
    ledger = Ledger(tmp_path)
    ledger.claim([run])
    ledger.end(run, "finished", {"loss": 1.0, "pad": "x" * 500})
  before = events(tmp_path)
  limit = (tmp_path / "ledger.jsonl").stat().st_size + 300  # a start fits, a result does not
  script = (
    f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    "run = ledger.claim(['d'])\n"
    "try: ledger.end(run, 'finished', {'loss': 1.0, 'pad': 'x' * 500})\n"
    "except NoRoom as error: print(error)\n"
  )
  said, errors = python(script, tmp_path).communicate()
  assert "make room and start again" in said, errors
  assert events(tmp_path) == [*before, ("start", "d")]
  assert Ledger(tmp_path).claim(["d"]) == "d", "its lease was freed"
  assert NoRoom.exit_code == 74
