"""Worker processes: every job gets its answer or its failure, whatever happens to the process."""

import os
import signal
import sys
import time

import pytest

from kling_jax.curation import engine, ray_engine
from kling_jax.errors import UsageError

HERE = "test_curation_engine:act"


def act(job: dict) -> dict:
  """What the workers of these tests do."""
  match job["do"]:
    case "double":
      print("noise on standard output")
      return {"value": 2 * job["value"], "threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}
    case "slow":
      time.sleep(1.0)
      return {"value": 2 * job["value"]}
    case "raise":
      raise ValueError("odd \n value")
    case "exit":
      os._exit(3)
    case "kill":
      os.kill(os.getpid(), signal.SIGKILL)
    case "kill once":
      if os.path.exists(job["mark"]):
        return {"second": True}
      open(job["mark"], "w").close()
      os.kill(os.getpid(), signal.SIGKILL)
    case "hang":
      time.sleep(60)
    case "grow":
      held = bytearray(os.urandom(1) * (300 << 20))
      time.sleep(30)
      return {"bytes": len(held)}
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
  assert kinds == ["killed", "died", "raised", "deadline"]
  assert answers[2].detail == "unexpected ValueError: odd value"
  assert "exit code 3" in answers[1].detail
  assert all(answers[k]["value"] == 2 for k in (4, 5, 6))
  assert time.monotonic() - start < 40


def test_a_job_whose_process_is_killed_once_is_done_again(tmp_path):
  jobs = [{"do": "kill once", "mark": str(tmp_path / "mark")}, {"do": "double", "value": 3}]
  answers = dict(engine.run(HERE, jobs, workers=1))
  assert answers[0] == {"second": True} and answers[1]["value"] == 6


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


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_a_worker_that_grows_too_large_is_ended_and_others_go_on():
  jobs = [{"do": "grow"}, {"do": "double", "value": 2}]
  begun = time.monotonic()
  answers = dict(engine.run(HERE, jobs, workers=1, memory_bytes=200 << 20))
  assert answers[0].kind == "memory" and "0.195 GiB" in answers[0].detail
  assert answers[1]["value"] == 4
  assert time.monotonic() - begun < 25


def test_a_lane_answers_one_job_after_the_other_and_survives_its_process():
  lane = engine.Lane(HERE, deadline_s=20)
  first, second = (lane.do({"do": "double", "value": k}) for k in (1, 2))
  assert (first["value"], second["value"]) == (2, 4) and first["pid"] == second["pid"]
  assert lane.do({"do": "exit"}).kind == "died"
  third = lane.do({"do": "double", "value": 3})
  assert third["value"] == 6 and third["pid"] != first["pid"]
  lane.close()


# ---- Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster():
  """Two nodes of two CPUs on this machine."""
  ray = pytest.importorskip("ray")
  from ray.cluster_utils import Cluster

  nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
  nodes.wait_for_nodes()
  other = nodes.add_node(num_cpus=2)
  nodes.wait_for_nodes()
  paths = os.pathsep.join(path for path in sys.path if path)
  ray.init(address=nodes.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
  yield nodes, other
  ray.shutdown()
  nodes.shutdown()


@pytest.mark.drill
@pytest.mark.timeout(300)
def test_a_ray_cluster_answers_all_jobs_though_a_node_dies(cluster):
  nodes, other = cluster
  jobs = [{"do": "slow", "value": k} for k in range(12)] + [{"do": "raise"}, {"do": "exit"}]
  answers: dict = {}
  for index, answer in ray_engine.run(HERE, jobs, deadline_s=60):
    assert index not in answers
    answers[index] = answer
    if len(answers) == 2:
      nodes.remove_node(other, allow_graceful=False)
  assert {k: answers[k]["value"] for k in range(12)} == {k: 2 * k for k in range(12)}
  assert answers[12].kind == "raised" and answers[13].kind == "died"


def test_ray_that_is_not_installed_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "ray", None)
  with pytest.raises(UsageError, match="extra ray"):
    next(ray_engine.run(HERE, [{"do": "double", "value": 1}]))
