"""Scores become conditions the same way everywhere, and scores of other scorers are refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kling_jax.config import load
from kling_jax.data import conditions, encode, pipeline, records
from kling_jax.data.conditions import Condition, Percentiles
from kling_jax.data.mixture import Mixture
from kling_jax.data.record import ClipRecord
from kling_jax.data.source import ClipInfo, Score
from kling_jax.data.worlds import WorldSource
from kling_jax.errors import ConfigError, DataError, UsageError


def clip(number, scorer="flow", version="1", **scores):
  raw = {name: Score(value, scorer, version) for name, value in scores.items()}
  return ClipInfo(f"clip-{number}", "", 2.0, 24.0, 48, 64, 64, raw)


def some_clips(count=200):
  generator = np.random.default_rng(0)
  return [clip(n, motion=float(m), clarity=float(c)) for n, (m, c) in enumerate(generator.gamma(2, 5, (count, 2)))]


def test_percentiles_and_u_follow_the_formula():
  clips = some_clips()
  fitted = conditions.fit(clips, ("clarity", "motion"))
  assert fitted.names == ("clarity", "motion")
  for name, transform in (("clarity", lambda x: x), ("motion", np.log1p)):
    x = transform(np.array([info.scores[name].value for info in clips]))
    q1, q99 = np.percentile(x, [1, 99])
    expected = np.clip((x - q1) / (q99 - q1), 0, 1) * 1000
    u = [fitted.normalise(name, info.scores[name].value) for info in clips]
    np.testing.assert_allclose(u, expected, rtol=1e-6, atol=1e-4)
    assert min(u) == 0.0 and max(u) == 1000.0
    # 1 % of the clips lie at each end, up to interpolation.
    assert 2 <= sum(value == 0 for value in u) <= 3 and 2 <= sum(value == 1000 for value in u) <= 3


@given(raw=st.floats(0, 1e6), scale=st.floats(1e-3, 1e3))
def test_clips_knobs_and_restored_checkpoints_get_the_same_bits(raw, scale):
  made = Percentiles((Condition("motion", "flow", "1", "log1p", 0.1 * scale, 2.0 * scale, 10),))
  restored = Percentiles.from_json(json.loads(json.dumps(made.to_json())))
  assert restored == made
  (of_clip,), (known,) = made.of_clip({"motion": Score(raw, "flow", "1")}, "clip")
  assert known and of_clip.dtype == np.float32
  assert of_clip == np.float32(restored.normalise("motion", raw))
  assert 0 <= of_clip <= 1000


@given(a=st.floats(0, 1e4), b=st.floats(0, 1e4))
def test_u_keeps_the_order_of_the_scores(a, b):
  made = Percentiles((Condition("motion", "flow", "1", "log1p", 0.5, 5.0, 10),))
  low, high = sorted((a, b))
  assert made.normalise("motion", low) <= made.normalise("motion", high)


def test_files_round_trip_and_damage_is_named(tmp_path):
  fitted = conditions.fit(some_clips(), ("motion", "clarity"))
  path = tmp_path / "conditions.json"
  fitted.save(path)
  assert conditions.load(path) == fitted
  good = json.loads(path.read_text())
  damaged = [
    "", "[]", "{}", '{"format": "other", "conditions": []}', path.read_text()[:-9],
    json.dumps(good | {"conditions": [{"name": "motion"}]}),
    json.dumps(good | {"conditions": [good["conditions"][0] | {"q1": math.nan}]}),
    json.dumps(good | {"conditions": [good["conditions"][0] | {"q1": 9e9}]}),
    json.dumps(good | {"conditions": [good["conditions"][0] | {"q1": "low"}]}),
    json.dumps(good | {"conditions": [good["conditions"][0] | {"transform": "exp"}]}),
    json.dumps(good | {"conditions": [good["conditions"][0]] * 2}),
  ]  # fmt: skip
  for text in damaged:
    path.write_text(text)
    with pytest.raises(DataError, match=r"conditions\.json"):
      conditions.load(path)
  with pytest.raises(DataError, match="does not exist"):
    conditions.load(tmp_path / "none.json")


def test_a_missing_score_is_unknown_not_zero_motion():
  fitted = conditions.fit(some_clips(), ("motion", "clarity"))
  u, known = fitted.of_clip({"clarity": Score(3.0, "flow", "1"), "other": Score(1.0, "x", "9")}, "clip")
  assert known.tolist() == [False, True] and u[0] == 0


@pytest.mark.parametrize("change", [{"scorer": "edges"}, {"version": "2"}])
def test_scores_of_another_scorer_or_version_are_refused(change):
  clips = some_clips()
  fitted = conditions.fit(clips, ("motion",))
  other = clip("odd", motion=1.0, **change)
  with pytest.raises(DataError, match="clip clip-odd: motion comes from"):
    conditions.fit([*clips, other], ("motion",))
  with pytest.raises(DataError, match="percentiles from flow 1"):
    fitted.of_clip(other.scores, "clip clip-odd")


@pytest.mark.parametrize("raw", [math.nan, math.inf, -0.5])
def test_values_that_mean_nothing_are_refused(raw):
  fitted = conditions.fit(some_clips(), ("motion",))
  with pytest.raises(DataError, match="must be a finite number of at least 0"):
    fitted.normalise("motion", raw)
  with pytest.raises(DataError, match="clip-7: motion"):
    conditions.fit([clip(7, motion=raw)], ("motion",))


def test_names_that_do_not_exist_give_the_nearest():
  fitted = conditions.fit(some_clips(), ("motion", "clarity"))
  with pytest.raises(UsageError, match="did you mean 'motion'"):
    fitted.normalise("moton", 1.0)
  with pytest.raises(DataError, match="did you mean 'clarity'"):
    conditions.fit(some_clips(), ("claritty",))
  with pytest.raises(DataError, match="did you mean 'clarity'"):
    fitted.select(("clarit",))
  with pytest.raises(ConfigError, match="twice"):
    conditions.fit(some_clips(), ("motion", "motion"))


def test_a_score_with_one_value_is_neutral_and_said_so(caplog):
  fitted = conditions.fit([clip(n, clarity=0.25) for n in range(5)], ("clarity",))
  assert "all 5 clips have the same clarity" in caplog.text
  assert [fitted.normalise("clarity", raw) for raw in (0.2, 0.25, 0.3)] == [0.0, 500.0, 1000.0]


def test_one_set_brings_its_percentiles_and_a_mixture_is_fitted_as_a_whole(tmp_path):
  names = ("clarity", "motion")
  one, two = WorldSource(count=20, seed=0), WorldSource(count=30, seed=1)
  own = conditions.fit(Mixture((one,)).infos(), ("motion", "aesthetic", "clarity"))
  shifted = Percentiles(tuple(dataclasses.replace(c, q99=c.q99 + 1) for c in own.conditions))
  shifted.save(tmp_path / conditions.FILE)
  assert conditions.for_sources(Mixture((one,), folders=(tmp_path,)), names) == shifted.select(names)
  both = conditions.for_sources(Mixture((one, two), folders=(tmp_path, None)), names)
  assert [condition.clips for condition in both.conditions] == [50, 50]
  assert conditions.for_sources(Mixture((one,)), ()) == Percentiles(())


def test_raw_is_the_inverse_of_the_condition_between_the_percentiles():
  fitted = conditions.fit(some_clips(), ("clarity", "motion"))
  for name in fitted.names:
    for u in (0.0, 250.0, 1000.0):
      assert fitted.normalise(name, fitted.raw(name, u)) == pytest.approx(u, abs=1e-3)
  with pytest.raises(UsageError, match="did you mean 'motion'"):
    fitted.raw("motoin", 0.0)


def test_scores_stand_behind_a_caption_in_the_order_of_the_model():
  fitted = conditions.fit(some_clips(), ("clarity", "motion"))
  raw = {"motion": 10.0, "clarity": 0.52349, "other": 1.0}
  assert fitted.in_caption("A cat sleeps. ", raw, 99) == "A cat sleeps. clarity score: 0.523, motion score: 10."
  assert fitted.in_caption("a cat", {"motion": 1e-3}, 99) == "a cat. motion score: 0.001."
  assert fitted.in_caption("", {"motion": 2.0}, 99) == "motion score: 2."
  assert fitted.in_caption("a cat.", {}, 99) == "a cat."
  assert fitted.caption_of(clip(0, motion=4.0), 99) == "motion score: 4."
  for room in range(16, 40):  # a long caption is cut, between characters, and never the scores
    told = fitted.in_caption("ein Käfer fährt", {"motion": 2.0}, room)
    assert told.endswith("motion score: 2.") and len(told.encode()) <= room
    assert "ein Käfer fährt".startswith(told.removesuffix("motion score: 2.").removesuffix(". "))
    assert room < 34 or told == "ein Käfer fährt. motion score: 2."[:room] or len(told.encode()) > room - 2
  with pytest.raises(ConfigError, match="text.tokens = 12 holds no 'motion score: 2'"):
    fitted.in_caption("a", {"motion": 2.0}, 10)


def test_vtss_of_records_becomes_a_fourth_condition_and_another_model_of_it_is_refused(tmp_path):
  """Through a set on disk and the batches that a model sees."""
  media = encode.encode([np.full((32, 32, 3), 90, np.uint8)] * 9, fps=8)
  names = ("motion", "aesthetic", "clarity", "vtss")

  def write(folder, versions):
    with records.RecordWriter(folder, "test") as writer:
      for k, version in enumerate(versions):
        scores = {name: Score(0.1 + k, name, "1") for name in names[:3]} | {"vtss": Score(1.5 + k, "tsa", version)}
        clip_record = ClipRecord(f"c{k}", f"v{k}", "v", 0, 9, "1/8", 8.0, 32, 32, 9, scores=scores, vtss=1.5 + k)
        writer.write(clip_record, media)
    return Mixture.open((str(folder),))

  sources = write(tmp_path / "one", ["a1"] * 3)
  fitted = conditions.for_sources(sources, names)
  assert (fitted.conditions[3].scorer, fitted.conditions[3].version) == ("tsa", "a1")
  batch = pipeline.Batches(sources, buckets=[(5, 32, 32)], fps=8.0, batch=3, percentiles=fitted)[0]
  assert batch["scores"].shape == (3, 4) and batch["scores_known"].all()
  expected = [fitted.normalise("vtss", 1.5 + k) for k in range(3)]
  assert sorted(batch["scores"][:, 3]) == expected and 0 == expected[0] < expected[1] < expected[2] == 1000
  assert load("video_dit").model.conditions == names[:3], "off by default"
  mixed = write(tmp_path / "two", ["a1", "a1", "b2"])
  with pytest.raises(DataError, match="vtss comes from tsa b2, the percentiles from tsa a1"):
    conditions.for_sources(mixed, names)
  fitted.save(tmp_path / "two" / conditions.FILE)  # percentiles of before the set was scored again
  with pytest.raises(DataError, match="clip c2: vtss comes from tsa b2"):
    pipeline.Batches(mixed, buckets=[(5, 32, 32)], fps=8.0, batch=3, percentiles=conditions.for_sources(mixed, names))
