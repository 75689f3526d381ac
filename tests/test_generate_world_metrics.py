"""What a world model has learnt: measures of films whose faults are known, the sweep of evidence, and its table."""

import importlib
import itertools
import pathlib

import jax
import numpy as np
import pytest
import scipy.stats

from kling_jax.data import memory_world
from kling_jax.data.memory_world_frames import render
from kling_jax.errors import UsageError
from kling_jax.generate import world_metrics
from kling_jax.generate.rollout import Model
from kling_jax.scaling import cost, sweep, worker
from kling_jax.train import task

ROOT = pathlib.Path(__file__).parents[1]
CLIPS = 8
STORIES = [memory_world.story(31, index, CLIPS) for index in (0, 3)]
END = np.arange(1, 4) / 3


def films(stories) -> np.ndarray:
  return np.stack(
    [np.stack([render(a, b, END, 32, 32) for a, b in itertools.pairwise(story.states)]) for story in stories]
  )


def test_true_films_are_perfect_and_faults_show_where_they_are() -> None:
  true = films(STORIES)
  found = world_metrics.pictures(true, true, STORIES, 3.0)
  assert found["following"] == 1 and found["rmse"] == found["rmse_late"] == 0 and set(found["drift"].values()) == {0}
  assert found["reappearance"]["both"] == 1 and found["reappearance"]["count"] > 0 < found["chance"] < 0.5
  pale = true.copy()
  pale[:, -world_metrics.LATE :] = (true[:, -world_metrics.LATE :] * 0.5 + 64).astype(np.uint8)
  faded = world_metrics.pictures(pale, true, STORIES, 3.0)
  late = np.square(pale.astype(float) - true)[:, -world_metrics.LATE :].mean()
  assert faded["rmse_late"] == pytest.approx(np.sqrt(late), rel=1e-5)
  assert faded["rmse"] == pytest.approx(np.sqrt(late * world_metrics.LATE / CLIPS), rel=1e-5)
  assert faded["drift"]["saturation"] > 0.05
  still = np.repeat(true[:, :, :1], 3, axis=2)
  frozen = world_metrics.motions(still, STORIES, 3.0)
  assert frozen["dynamic_degree"] == 0 < found["dynamic_degree"] and frozen["seam_ratio"] == np.inf
  other = world_metrics.pictures(true[::-1], true, STORIES, 3.0)
  assert other["following"] < 0.6 and other["stayed"]["both"] < 0.7


def test_a_world_model_of_a_sweep_is_counted_by_its_parts() -> None:
  module = sweep.load("owl_evidence").module
  for arm in ("base", "replace"):
    c = module.get_config()
    c.update_from_flattened_dict(module.ARMS[arm])
    job, size = task.make(c), cost.of(c)
    trained = {name: leaf.size for name, leaf in job.shapes.items() if job.trainable(name)}
    assert size.params == sum(size.params_by_part.values()) == sum(trained.values())
    assert size.params_by_part["language"] == sum(n for name, n in trained.items() if name.startswith("lm."))
    d = c.data
    rows = {"frames": jax.ShapeDtypeStruct((d.batch, d.clips, d.frames, d.height, d.width, 3), np.uint8)}
    assert job.step_cost(rows) == (d.batch * size.clip_tokens, pytest.approx(size.flops(d.batch * size.clip_tokens)))


def test_the_table_pairs_seeds_and_gives_student_intervals(monkeypatch) -> None:
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  evidence = importlib.import_module("owl_evidence")

  def line(arm: str, seed: int, value: float) -> dict:
    film = {"following": value, "reappearance": {"both": value}, "seam_ratio": 1.0, "dynamic_degree": value,
            "rmse_late": 3.0, "drift": {"saturation": 0.1, "histogram": 0.2}}  # fmt: skip
    probe = {"column": {"hidden": value}}
    return {"run": f"{arm}{seed}", "arms": [arm], "seed": seed, "text": {"determined": value},
            "film": dict.fromkeys(("true", "null", "shuffled"), film), "probe": {"true": probe, "shuffled": probe},
            "data": {"dynamic_degree": 0.5}}  # fmt: skip

  base, other = [0.5, 0.7, 0.8], [0.45, 0.62, 0.77]
  lines = [line("base", seed, value) for seed, value in enumerate(base)]
  lines += [line("queries_4", seed, value) for seed, value in enumerate(other)] + [line("lone", 0, 0.9)]
  rows = {(row["arm"], row["what"]): row for row in evidence.summary(lines)}
  found = rows["queries_4", "determined texts right"]
  paired = scipy.stats.ttest_rel(other, base).confidence_interval(0.95)
  assert found["difference_mean"] == pytest.approx(np.mean(paired))
  assert found["difference_half"] == pytest.approx((paired.high - paired.low) / 2)
  alone = scipy.stats.ttest_1samp(other, 0).confidence_interval(0.95)
  assert (found["mean"], found["half"]) == pytest.approx((np.mean(alone), (alone.high - alone.low) / 2))
  assert rows["base", "determined texts right"]["difference_mean"] is None
  assert rows["base", "dynamic degree / data's"]["mean"] == pytest.approx(np.mean(base) / 0.5)
  assert rows["lone", "events followed"]["half"] is None
  text = evidence.markdown(evidence.summary(lines))
  assert "| determined texts right (> 0.9) | 0.667 ± 0.38 | 0.613 ± 0.4 (-0.0533 ± 0.063) | 0.9 (+0.4) |" in text


@pytest.mark.drill
def test_runs_of_the_evidence_sweep_are_trained_measured_and_shown(tmp_path, monkeypatch) -> None:
  """An arm at :runlocal, through the ledger; measuring again does nothing."""
  runs = sweep.load("owl_evidence").runs()
  assert len(runs) == 33 == len({run.id for run in runs})
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
  evidence = importlib.import_module("owl_evidence")
  monkeypatch.setattr(jax, "devices", lambda *_: [jax.local_devices()[0]])
  (tmp_path / "small.py").write_text(
    "from kling_jax.scaling import sweep as lib\n"
    "MODULE = lib.load('owl_evidence').module\n"
    "get_config = lambda: MODULE.get_config('runlocal')\n"
    "def sweep():\n"
    "  yield {'sweep.arm': 'current', **MODULE.ARMS['current']}\n"
  )
  jax.config.update("jax_disable_most_optimizations", True)  # programs run for moments and compile for minutes
  try:
    assert worker.work(str(tmp_path / "small.py"), tmp_path) == 1
    options = world_metrics.Options(readings=16, walks=2, clips=3)
    assert evidence.measure(tmp_path, options) == 1
  finally:
    jax.config.update("jax_disable_most_optimizations", False)
  assert evidence.measure(tmp_path, options) == 0
  lines = evidence.read(tmp_path)
  assert [line["arms"] for line in lines] == [["current"]]
  for line in lines:
    assert line["text"]["determined_sentences"] > 0 and 0 <= line["film"]["true"]["following"] <= 1
    assert set(line["film"]) == set(world_metrics.STATES)
  assert "| events followed (> 0.8) |" in evidence.markdown(evidence.summary(lines))
  model = Model(next((tmp_path / "runs").iterdir()))
  with pytest.raises(UsageError, match="at least 2 and 5"):
    world_metrics.measure(model, world_metrics.Options(walks=1))
