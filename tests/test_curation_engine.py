"""Worker processes: every job gets its answer or its failure, whatever happens to the process."""

import os
import signal
import time

from kling_jax.curation import engine

HERE = "test_curation_engine:act"


def act(job: dict) -> dict:
  """What the workers of these tests do."""
  match job["do"]:
    case "double":
      print("noise on standard output")
      return {"value": 2 * job["value"], "threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}
    case "raise":
      raise ValueError("odd \n value")
    case "exit":
      os._exit(3)
    case "kill":
      os.kill(os.getpid(), signal.SIGKILL)
    case "hang":
      time.sleep(60)
  return {"text": "x" * job["size"]}


def test_all_jobs_are_answered_by_as_many_processes_as_asked():
  jobs = [{"do": "double", "value": k} for k in range(7)]
  answers = dict(engine.run(HERE, jobs, workers=2))
  assert {k: a["value"] for k, a in answers.items()} == {k: 2 * k for k in range(7)}
  assert len({a["pid"] for a in answers.values()}) == 2
  assert {a["threads"] for a in answers.values()} == {"1"}
  assert list(engine.run(HERE, [])) == []


def test_a_worker_that_dies_hangs_or_raises_costs_its_own_job_only():
  jobs = [{"do": "kill"}, {"do": "exit"}, {"do": "raise"}, {"do": "hang"}, *({"do": "double", "value": 1},) * 3]
  start = time.monotonic()
  answers = dict(engine.run(HERE, jobs, workers=2, deadline_s=5))
  kinds = [answers[k].kind for k in range(4)]
  assert kinds == ["memory", "died", "raised", "deadline"]
  assert answers[2].detail == "unexpected ValueError: odd value"
  assert "exit code 3" in answers[1].detail
  assert all(answers[k]["value"] == 2 for k in (4, 5, 6))
  assert time.monotonic() - start < 40


def test_long_answers_come_whole():
  jobs = [{"do": "fill", "size": 1_000_000}] * 2
  assert [len(answer["text"]) for _, answer in engine.run(HERE, jobs, workers=2)] == [1_000_000] * 2


def test_leaving_early_ends_the_workers():
  running = engine.run(HERE, [{"do": "double", "value": 1}, {"do": "hang"}], workers=2)
  _, answer = next(running)
  running.close()
  time.sleep(0.1)
  try:
    os.kill(answer["pid"], 0)
  except ProcessLookupError:
    return
  raise AssertionError("the worker is still there")
