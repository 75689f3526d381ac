"""Suitability scores: fragments, calibration, ratings, models on disk, and scores that never change."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from kling_jax import assets, measure
from kling_jax.curation import score_command
from kling_jax.data import encode, records, worlds
from kling_jax.data.record import ClipRecord
from kling_jax.data.source import Score
from kling_jax.errors import DataError, UsageError, WeightsError
from kling_jax.interop import safetensors
from kling_jax.measure import fragments, vtss, vtss_calibration, vtss_labels, vtss_network, vtss_order
from kling_jax.measure import sample as sample_lib
from kling_jax.measure.fragments import Plan
from kling_jax.measure.vtss_labels import Rated
from kling_jax.models import tsa

PLAN = Plan((2, 3), 8, frames=4, stride=2, mosaics=2, image=16)


@pytest.fixture(scope="module")
def films() -> list[bytes]:
  world = worlds.WorldSource(count=3, seed=3)
  return [encode.encode(world.frames(index, np.arange(12) / 12, 64, 96), fps=12) for index in range(3)]


# ---- fragments -------------------------------------------------------------------------------------------------------


def test_patches_come_from_their_cells_at_the_same_places_in_all_frames_of_a_mosaic():
  height, width = 40, 66
  frame = np.stack(np.broadcast_arrays(np.arange(height)[:, None], np.arange(width), 0), -1).astype(np.uint8)
  seen = sample_lib.of_frames(np.repeat(frame[None], 20, 0), np.arange(20) / 10, (PLAN, 7))
  mosaics = seen.mosaics_QTHWC
  assert mosaics.shape == (2, 4, 16, 24, 3) and np.array_equal(mosaics[:, :1].repeat(4, 1), mosaics)
  assert not np.array_equal(mosaics[0], mosaics[1])  # another draw
  for row in range(2):
    for column in range(3):
      patch = mosaics[0, 0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
      top, left = patch[0, 0, :2].astype(int)
      assert np.array_equal(patch, frame[top : top + 8, left : left + 8])
      assert 20 * row <= top <= 20 * row + 12 and 22 * column <= left <= 22 * column + 14


def test_frames_follow_the_stride_within_the_mosaics_share_and_wrap_where_the_clip_is_short():
  indices = PLAN.indices(40, seed=1)
  assert indices.shape == (2, 4) and (np.diff(indices, axis=1) == 2).all()
  assert indices[0].min() >= 0 and indices[0].max() < 20 <= indices[1].min() and indices[1].max() < 40
  assert np.array_equal(PLAN.indices(5, seed=1)[0], [0, 2, 4, 1])
  assert np.array_equal(PLAN.indices(1, seed=1), np.zeros((2, 4)))
  assert np.array_equal(indices, PLAN.indices(40, seed=1)) and fragments.seed_of("a") != fragments.seed_of("b")


def test_small_videos_are_sampled_all_over_unless_the_released_bug_is_asked_for():
  """12 x 12 pixels shown at 24 x 24: the released code cuts cells of 12 // 3 = 4 pixels; nothing beyond 16 is seen."""
  plan = Plan((3, 3), 8, frames=1, stride=1, mosaics=40, image=8)
  assert plan.shown(12, 12) == (24, 24)
  right, wrong = plan.places(12, 12, 0), dataclasses.replace(plan, small_video_bug=True).places(12, 12, 0)
  assert sorted(set(right.ravel())) == [0, 8, 16] and wrong.max() == 8
  large = plan.places(90, 120, 0)
  assert np.array_equal(large, dataclasses.replace(plan, small_video_bug=True).places(90, 120, 0))
  assert large[..., 0].max() > 70 and large[..., 1].max() > 90


def test_media_are_decoded_once_for_everything_and_sub_metrics_do_not_depend_on_it(films, monkeypatch):
  plain = measure.measured(sample_lib.of_media(films[0]), measure.SCORERS)
  opened = []
  real = sample_lib.decode.Cursor
  monkeypatch.setattr(sample_lib.decode, "Cursor", lambda *a, **k: opened.append(1) or real(*a, **k))
  seen = sample_lib.of_media(films[0], (PLAN, 3))
  assert opened == [1]
  assert measure.measured(seen, measure.SCORERS) == plain
  monkeypatch.setattr(sample_lib, "WHOLE_S", 0.1)  # now it counts as long: the fragments are the same
  assert np.array_equal(sample_lib.of_media(films[0], (PLAN, 3)).mosaics_QTHWC, seen.mosaics_QTHWC)


# ---- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_keeps_order_and_has_the_least_squares_line():
  rng = np.random.default_rng(0)
  raw = rng.normal(size=400)
  rating = np.clip(3 + 1.2 * np.tanh(raw) + rng.normal(0, 0.3, 400), 1, 5)
  found = vtss_calibration.fit(raw, rating)
  assert np.allclose([found.slope, found.offset], np.polyfit(raw, rating, 1))
  grid = found.values(np.linspace(-6, 6, 500))
  assert (np.diff(grid) >= 0).all() and grid.min() >= 1 and grid.max() <= 5
  error = lambda kind: np.mean((dataclasses.replace(found, kind=kind).values(raw) - rating) ** 2)
  assert error("isotonic") < error("affine")
  assert found.vtss(0.3) == found.values(np.array([0.3]))[0]
  bins = vtss_calibration.reliability(found.values(raw), rating)
  assert len(bins) == 10 and max(abs(row["vtss"] - row["rating"]) for row in bins) < 0.15


@pytest.mark.parametrize(
  ("raw", "rating", "says"),
  [
    (np.arange(5.0), np.arange(5.0), "at least 20"),
    (np.full(30, 1.0), np.arange(30.0), "alike"),
    (np.arange(30.0), np.full(30, 3.0), "alike"),
    (np.full(30, np.nan), np.arange(30.0), "finite"),
  ],
)
def test_what_cannot_be_calibrated_says_why(raw, rating, says):
  with pytest.raises(DataError, match=says):
    vtss_calibration.fit(raw, rating)


def test_agreement_intervals_and_threshold_by_hand():
  predicted, rating = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])
  found = vtss_calibration.agreement(predicted, rating)
  assert found["srcc"] == pytest.approx(0.8) and found["krcc"] == pytest.approx(2 / 3)
  assert found["plcc"] == pytest.approx(0.8) and found["rmse"] == pytest.approx(np.sqrt(0.5))
  spans = vtss_calibration.intervals(lambda i: {"mean": float(predicted[i].mean())}, ["a", "a", "b", "b"])
  assert spans["mean"] == (1.5, 3.5)  # whole groups are drawn, so that nothing lies between
  rows = vtss_calibration.trade_off(predicted, rating, wanted=2.5)
  at = {row["threshold"]: row for row in rows}
  assert at[2.0] == {"threshold": 2.0, "kept": 0.75, "mis_kept": 0.25, "mis_dropped": 0.0}
  assert at[3.5]["mis_dropped"] == 0.25 and at[3.5]["mis_kept"] == 0.0
  assert min(row["mis_kept"] + row["mis_dropped"] for row in rows) == pytest.approx(
    sum(at[vtss_calibration.suggested(rows)][name] for name in ("mis_kept", "mis_dropped"))
  )


def test_order_counts_pairs_and_ladders():
  rows = [Rated(0, "o", "v", 5.0, "o", "original", 0)]
  rows += [Rated(k, f"b{k}", "v", 5.0 - k, "o", "blur", k) for k in (1, 2, 3, 4)]
  rows += [Rated(9, "n", "v", 4.0, "o", "noise", 1)]
  found = vtss_order.order(rows, np.array([3.0, 2.0, 4.0, 1.0, 0.0, 3.0]))
  assert found["blur"].pairs == 0.75 and found["blur"].srcc == pytest.approx(0.7) and found["blur"].count == 4
  assert found["noise"].pairs == 0.0 and found["noise"].srcc == 0.0  # equal is not above
  assert found["all"].pairs == 0.6


# ---- ratings ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_set(tmp_path_factory, films):
  folder = tmp_path_factory.mktemp("rated") / "set"
  with records.RecordWriter(folder, "test") as writer:
    for index in range(6):
      clip = ClipRecord(
        clip_id=f"{index:032x}", video_id=f"v{index // 2}", source="x", start_pts=0, end_pts=12, time_base="1/12",
        fps=12.0, width=96, height=64, num_frames=12,
        scores={
          "blur": Score(float(index), "luma", "1" if index < 5 else "2"), "noise": Score(2.0 * index, "luma", "1"),
        },
      )  # fmt: skip
      writer.write(clip, films[0])
  return folder


def ratings(folder, rows, header="clip_id,rating"):
  path = folder / "r.csv"
  path.write_text("\n".join([header, *rows]) + "\n")
  return path


def test_ratings_join_their_clips_and_bad_ones_are_refused(clip_set, tmp_path):
  source = records.RecordSource(clip_set, status=None)
  name = lambda k: f"{k:032x}"
  rows = vtss_labels.read(ratings(tmp_path, [f"{name(3)},4.5", f"{name(0)},1"]), source)
  assert [(row.clip_id, row.video_id, row.rating) for row in rows] == [(name(3), "v1", 4.5), (name(0), "v0", 1.0)]
  for lines, says in (
    ([f"{name(0)},1", "ffff,2", f"{name(1)},3"], "1 of 3 rated clips are not in the set, first ffff"),
    ([f"{name(0)},1", f"{name(0)},2"], "rated twice"),
    ([f"{name(0)},nan", f"{name(1)},2"], "row 0 has rating 'nan'"),
    ([f"{name(0)},9", f"{name(1)},2"], "row 0 has rating '9'"),
    ([f"{name(0)},3", f"{name(1)},3"], "rated alike"),
    ([], "holds no ratings"),
  ):
    with pytest.raises(DataError, match=says):
      vtss_labels.read(ratings(tmp_path, lines), source)
  with pytest.raises(DataError, match="lacks the columns rating"):
    vtss_labels.read(ratings(tmp_path, ["a,1"], "clip_id,score"), source)


def test_features_have_quantiles_and_one_scorer(clip_set, tmp_path):
  source = records.RecordSource(clip_set, status=None)
  rows = vtss_labels.read(ratings(tmp_path, [f"{k:032x},{1 + k % 5}" for k in range(6)]), source)
  (noise,) = vtss_labels.features(["noise"], rows, source)
  assert noise.low == pytest.approx(0.1) and noise.high == pytest.approx(9.9)
  assert noise.usual == pytest.approx(7.0)  # of the clips rated 4 and 5
  assert noise.scaled(5.0) == pytest.approx(np.sqrt(0.5)) and noise.scaled(-1) == 0 and noise.scaled(99) == 1
  assert noise.raw(noise.scaled(5.0)) == pytest.approx(5.0)
  assert np.isnan(noise.value({})) and np.isnan(noise.value({"noise": Score(float("nan"), "luma", "1")}))
  with pytest.raises(UsageError, match="luma 2; the model reads that of luma 1"):
    noise.value({"noise": Score(1.0, "luma", "2")})
  with pytest.raises(DataError, match="'blur' was measured by luma 1, luma 2"):
    vtss_labels.features(["blur"], rows, source)
  with pytest.raises(DataError, match="'text' was measured by nobody"):
    vtss_labels.features(["text"], rows, source)


def test_clips_of_a_video_are_never_parted():
  folds = [vtss_labels.fold(f"video {k}", 5) for k in range(400)]
  assert {folds.count(part) // 40 for part in range(5)} <= {1, 2} and folds[7] == vtss_labels.fold("video 7", 5)


# ---- models ----------------------------------------------------------------------------------------------------------


def test_the_shipped_model_is_what_its_card_and_the_code_say():
  folder = assets.folder("weak_label")
  card = json.loads((folder / "card.json").read_text())
  model = vtss.load(vtss.SHIPPED)
  assert model.version == vtss.SHIPPED_VERSION and model.names == vtss.FEATURES
  assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == card["sha256"]
  assert "weak" in card["labels"] and "weak-label" in model.spec.name
  licences = {facts["licence"] for facts in card["footage"].values()}
  assert licences and not any(word in text for text in licences for word in ("unclear", "not stated"))


def test_numpy_gives_what_the_network_gives():
  folder = assets.folder("weak_label")
  model = vtss.load(vtss.SHIPPED)
  rate = vtss_network.rater(folder, model.spec)
  features = np.random.default_rng(1).random((5, 15)).astype(np.float32)
  features[3, 4] = np.nan
  for row in features:
    assert model.raw({"features": row}) == pytest.approx(rate({"features": row}, None), abs=1e-5)


def test_every_clip_has_a_vtss_without_jax_and_damage_lowers_it(films):
  frames = np.stack([frame for _, _, frame in sample_lib.decode.iterate(films[0])])
  noisy = np.clip(frames + np.random.default_rng(0).normal(0, 25, frames.shape), 0, 255).astype(np.uint8)
  times = np.arange(len(frames)) / 12
  clean, damaged = (measure.score(each, times)["vtss"] for each in (frames, noisy))
  assert clean.scorer == "weak-label" and clean.version == vtss.SHIPPED_VERSION
  assert 1 <= damaged.value < clean.value <= 5


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> vtss.Model:
  """A model with all branches and random weights."""
  folder = tmp_path_factory.mktemp("network")
  spec = dataclasses.replace(
    vtss.load(vtss.SHIPPED).spec, name="all", branches=tsa.BRANCHES, plan=Plan((4, 4), 16, 8, 1, 2, 32),
    usual={"static": [0.0] * 48},
  )  # fmt: skip
  spec = dataclasses.replace(
    spec, calibration=dataclasses.replace(spec.calibration, kind="affine", slope=1.0, offset=3.0)
  )
  rng = np.random.default_rng(0)
  _, shapes = vtss_network.described(vtss_network.of_spec(spec))
  draw = lambda shape: rng.normal(0, max(shape[-2] if len(shape) > 1 else 100, 1) ** -0.5, shape).astype(np.float32)
  safetensors.write(folder, {name: draw(leaf.shape) for name, leaf in shapes.items()})
  spec.save(folder)
  return vtss.Model(folder)


def test_a_clip_scores_the_same_bits_always_and_whatever_is_scored_beside_it(network, films):
  scorers = measure.judged_by(measure.SCORERS, str(network.folder))
  judge = scorers[-1]
  assert judge.name == "all" and [scorer.conditions for scorer in scorers].count(("vtss",)) == 1
  samples = [measure.sampled(film, scorers, f"clip{k}") for k, film in enumerate(films)]
  scores = [measure.measured(sample, scorers[:-1]) for sample in samples]
  first = [judge.measure(s, k)["vtss"] for s, k in zip(samples, scores, strict=True)]
  assert len(set(first)) == 3
  assert {judge.measure(samples[0], scores[0])["vtss"] for _ in range(100)} == {first[0]}
  backwards = [measure.score_media(films[k], scorers, clip_id=f"clip{k}")["vtss"].value for k in (2, 1, 0)]
  assert backwards == first[::-1]
  assert measure.score_media(films[0], scorers, clip_id="another")["vtss"].value != first[0]  # other fragments


def test_why_names_what_moved_the_score(films):
  model = vtss.load(vtss.SHIPPED)
  sample = sample_lib.of_media(films[0])
  given = model.inputs(sample, measure.measured(sample, measure.SCORERS[:-1]))
  found = model.why(given)
  rows = {name: effect for name, _, effect in found}
  assert set(rows) == {*vtss.FEATURES} and [row[2] for row in found] == sorted(rows.values())
  place = vtss.FEATURES.index("noise")
  usual = model.spec.features[place]
  changed = given["features"].copy()
  changed[place] = usual.scaled(usual.usual)
  vtss_of = lambda features: model.spec.calibration.vtss(model.raw({"features": features}))
  assert rows["noise"] == pytest.approx(vtss_of(given["features"]) - vtss_of(changed))


def test_the_command_tells_why(films, tmp_path, capsys):
  for index, film in enumerate(films[:2]):
    (tmp_path / f"{index}.mp4").write_bytes(film)
  assert score_command.command([str(tmp_path)], why=True) == 0
  shown = capsys.readouterr().out.splitlines()
  assert sum("  vtss " in line for line in shown) == 2 and any(line.startswith("  -") for line in shown)
  (tmp_path / "broken.mp4").write_bytes(b"no video")
  assert score_command.command([str(tmp_path)], why=True, as_json=True) == 1
  answer = json.loads(capsys.readouterr().out)
  assert len(answer) == 2 and {row["name"] for row in answer[0]["why"]} == set(vtss.FEATURES)


@pytest.mark.drill
def test_why_names_branches(network, films):
  scorers = measure.judged_by(measure.SCORERS, str(network.folder))
  sample = measure.sampled(films[0], scorers, "clip0")
  names = [name for name, _, _ in network.why(network.inputs(sample, measure.measured(sample, scorers[:-1])))]
  assert sorted(names) == sorted([*vtss.FEATURES, "branch static"])


def test_models_that_do_not_fit_are_refused(network, tmp_path):
  with pytest.raises(WeightsError, match="wants weak-label"):
    vtss.load("weak")
  with pytest.raises(WeightsError, match="holds no suitability model"):
    vtss.Model(tmp_path)
  network.spec.save(tmp_path)
  with pytest.raises(WeightsError, match="holds no weights"):
    vtss.Model(tmp_path)
  safetensors.write(tmp_path, {"head.layers.0.kernel": np.zeros((2, 2), np.float32)})
  with pytest.raises(WeightsError, match="does not fit the model"):
    vtss.Model(tmp_path)
  dataclasses.replace(network.spec, branches=("label",)).save(tmp_path)
  with pytest.raises(WeightsError, match="not for 15 sub-metrics"):
    vtss.Model(tmp_path)
  (tmp_path / vtss.FILE).write_text("{}")
  with pytest.raises(WeightsError, match="no description"):
    vtss.Model(tmp_path)


def test_a_set_gets_the_same_vtss_whatever_the_workers(films, tmp_path):
  answers = []
  for workers in (1, 2):
    folder = tmp_path / f"set{workers}"
    with records.RecordWriter(folder, "test") as writer:
      for index, film in enumerate(films):
        clip = ClipRecord(
          clip_id=f"{index:032x}", video_id="v", source="x", start_pts=0, end_pts=12, time_base="1/12", fps=12.0,
          width=96, height=64, num_frames=12,
        )  # fmt: skip
        writer.write(clip, film)
    assert score_command.command([str(folder)], workers=workers) == 0
    clips = [clip for clip, _ in records.read_all(folder)]
    assert all(clip.vtss == clip.scores["vtss"].value for clip in clips)
    answers.append([clip.scores for clip in clips])
  assert answers[0] == answers[1]


def test_vtss_of_a_released_table_stays_until_a_model_is_named(films, tmp_path):
  folder = tmp_path / "set"
  with records.RecordWriter(folder, "test") as writer:
    for index in range(2):
      clip = ClipRecord(
        clip_id=f"{index:032x}", video_id="v", source="x", start_pts=0, end_pts=12, time_base="1/12", fps=12.0,
        width=96, height=64, num_frames=12, vtss=4.25 if index == 0 else None,
      )  # fmt: skip
      writer.write(clip, films[index])
  held = lambda: [clip for clip, _ in records.read_all(folder)]
  assert score_command.command([str(folder)], workers=1) == 0
  assert [clip.vtss for clip in held()] == [4.25, None] and "motion" in held()[1].scores
  wanted = score_command.Wanted(("vtss",), model=vtss.SHIPPED)
  assert score_command.command([str(folder)], wanted=wanted, workers=1) == 0
  assert all(clip.vtss == clip.scores["vtss"].value != 4.25 for clip in held())
