"""Task tsa: the losses are their formulas, rows and folds are as documented, a run learns and exports a model."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kling_jax import config as config_lib
from kling_jax.data import records
from kling_jax.data.record import ClipRecord
from kling_jax.data.source import Score
from kling_jax.errors import ConfigError
from kling_jax.measure import vtss, vtss_calibration, vtss_labels
from kling_jax.train import loop, metrics, tsa_export
from kling_jax.train import task as task_lib
from kling_jax.train.tasks import tsa


def test_plcc_loss_is_its_closed_form():
  rng = np.random.default_rng(0)
  raw, rating = rng.normal(size=30), rng.normal(size=30)
  rho = np.corrcoef(raw, rating)[0, 1]
  found = float(jnp.mean(tsa.plcc_loss(jnp.asarray(raw), jnp.asarray(rating))))
  assert found == pytest.approx((1 - rho) / 4 + (1 - rho**2) / 8, abs=1e-5)
  assert float(jnp.mean(tsa.plcc_loss(jnp.asarray(3 * rating - 7), jnp.asarray(rating)))) == pytest.approx(0, abs=1e-5)


def test_rank_loss_is_its_double_sum():
  rng = np.random.default_rng(1)
  raw, rating = rng.normal(size=7), rng.integers(1, 4, 7).astype(float)
  p = (raw - raw.mean()) / raw.std()
  terms = [[max(0.0, (p[i] - p[j]) * np.sign(rating[j] - rating[i])) for j in range(7)] for i in range(7)]
  wanted = np.sum(terms) / (7 * 6) / (1 + np.max(terms))
  assert float(jnp.mean(tsa.rank_loss(jnp.asarray(raw), jnp.asarray(rating)))) == pytest.approx(wanted, rel=1e-5)


def test_pairs_count_only_where_the_order_is_known():
  reference, kind = jnp.array([1, 1, 1, 1, 2]), jnp.array([0, 5, 5, 6, 0])
  rating = jnp.array([5.0, 4.0, 3.0, 4.0, 5.0])
  known = np.asarray(tsa.known(reference, kind, rating))
  pairs = {(i, j) for i, j in zip(*np.nonzero(known), strict=True) if i < j}
  assert pairs == {(0, 1), (0, 2), (0, 3), (1, 2)}  # not two kinds of damage, not two shots
  people = np.asarray(tsa.known(jnp.zeros(3, int), jnp.zeros(3, int), jnp.array([1.0, 2.0, 2.0])))
  assert {tuple(pair) for pair in np.argwhere(people)} == {(0, 1), (0, 2), (1, 0), (2, 0)}
  raw = jnp.array([0.0, 1.0, 0.5, 0.2, 9.0])
  softplus = lambda x: np.log1p(np.exp(x))
  wanted = np.mean([softplus(1.0), softplus(0.5), softplus(0.2)])  # of the original's row
  assert float(tsa.pair_loss(raw, rating, jnp.asarray(known))[0]) == pytest.approx(wanted, rel=1e-5)
  assert float(tsa.pair_loss(raw, rating, jnp.asarray(known))[4]) == 0


@pytest.fixture(scope="module")
def rated(tmp_path_factory):
  """Clips whose rating is less their noise, some of whose scores are missing; the media are never looked at."""
  folder = tmp_path_factory.mktemp("tsa") / "set"
  rng = np.random.default_rng(2)
  rows = []
  with records.RecordWriter(folder, "test") as writer:
    for index in range(120):
      noise = float(rng.random())
      scores = {"noise": Score(noise, "luma", "1"), "clarity": Score(float(rng.random()), "laplacian", "1")}
      scores |= {"text": Score(0.1, "letter-rows", "1")} if index % 2 else {}
      clip = ClipRecord(
        clip_id=f"{index:032x}", video_id=f"v{index // 4}", source="x", start_pts=0, end_pts=12, time_base="1/12",
        fps=12.0, width=96, height=64, num_frames=12, scores=scores,
      )  # fmt: skip
      writer.write(clip, b"media")
      rows.append((clip.clip_id, clip.video_id, 4.8 - 3.5 * noise + rng.normal(0, 0.1)))
  with (folder / "ratings.csv").open("w", newline="") as file:
    csv.writer(file).writerows([("clip_id", "video_id", "rating"), *rows])
  return folder


def config(folder, *overrides):
  spec = f"configs/tsa.py:runlocal,set={folder},table={folder / 'ratings.csv'},fold=0"
  base = ["--config.labels.features=('noise','clarity','text')", "--config.labels.fold=0"]
  return config_lib.load(spec, [*base, *overrides])


def test_a_run_learns_and_its_model_scores_and_says_how_well(rated, tmp_path, monkeypatch):
  monkeypatch.setattr(vtss_calibration, "DRAWS", 40)
  c = config(rated, "--config.validation.every=60", "--config.validation.rows=40", "--config.log.every=5")
  summary = loop.run(c, tmp_path / "run")
  rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
  assert summary.finished and rows[-1]["plcc"] < 0.1 < rows[0]["plcc"] and "val_loss" in rows[-1]
  model = tsa_export.export(str(tmp_path / "run"), str(tmp_path / "model"), "test")
  assert model.names == ("noise", "clarity", "text") and model.spec.calibration.clips > 20
  job = task_lib.make(c)
  held = job.split("validation")
  answer, sheet = tsa_export.report(model, job.source, held, vtss.load(str(tmp_path / "model")))
  assert answer["test"]["agreement"]["srcc"] > 0.95 and answer["test"]["agreement"]["rmse"] < 0.4
  low, high = answer["test"]["intervals"]["srcc"]
  assert low <= answer["test"]["agreement"]["srcc"] <= high
  assert "Reliability" in sheet.html() and "<svg" in sheet.html()
  assert json.loads((tmp_path / "model" / vtss.FILE).read_text())["training"]["clips"] == 120 - len(held)


def test_folds_part_source_videos_and_percentiles_come_from_training(rated):
  job = task_lib.make(config(rated))
  train, held = job.split("train"), job.split("validation")
  assert len(train) + len(held) == 120 and held
  assert not {row.video_id for row in train} & {row.video_id for row in held}
  assert job.features == vtss_labels.features(("noise", "clarity", "text"), train, job.source)
  assert task_lib.make(config(rated, "--config.labels.fold=-1")).split("validation") == []
  with pytest.raises(ConfigError, match=r"labels.fold.*0 to 4"):
    task_lib.make(config(rated, "--config.labels.fold=7")).split("train")


def test_batches_are_functions_of_their_step_and_see_every_clip(rated):
  job = task_lib.make(config(rated))
  batches = job.batches("train", 0, 1, 1)
  again = task_lib.make(config(rated)).batches("train", 0, 1, 1)
  steps = len(job.split("train")) // 40
  for step in (3, 0):
    assert all(np.array_equal(value, again[step][name], equal_nan=True) for name, value in batches[step].items())
  halves = [job.batches("train", part, 2, 2)[1] for part in (0, 1)]
  whole = batches[1]
  assert np.array_equal(np.concatenate([half["rating"] for half in halves]), whole["rating"])
  seen = np.concatenate([batches[step]["rating"] for step in range(steps)])
  assert len(np.unique(seen)) == len(seen)  # nothing twice in a pass
  assert np.isnan(whole["features"][:, 2]).any() and np.isfinite(whole["features"][:, :2]).all()
  with pytest.raises(ConfigError, match=r"data.batch.*multiple of 16"):
    job.batches("train", 0, 1, 16)


def test_backbones_are_slower_and_batches_are_not_cut_up(rated):
  full = config_lib.load(f"configs/tsa.py:size=tiny,set={rated}")
  job = task_lib.make(full)
  paths = list(job.shapes)
  assert {job.lr_scale(path) for path in paths if path.startswith(("swin.", "convnext."))} == {0.1}
  assert {job.lr_scale(path) for path in paths if not path.startswith(("swin.", "convnext."))} == {1.0}
  tokens, flops = job.step_cost({"index": jax.ShapeDtypeStruct((2,), jnp.uint32)})
  # FAST-VQA's 279 GMACs for four mosaics without attention's share of the gate, and ConvNeXt-T's 4.5.
  assert tokens == 2 and 6 * 2 * 65e9 < flops < 6 * 2 * 110e9
  with pytest.raises(ConfigError, match="compares the rows"):
    task_lib.make(config(rated, "--config.optimizer.accumulate=2"))
