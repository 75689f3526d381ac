"""Color-Struct SVM: reference numbers of the released detector, the temporal rule, the fit."""

import json

import cv2
import numpy as np
import pytest
import skimage.metrics

from kling_jax.curation import color_struct, split, split_command
from kling_jax.curation.color_struct import Frames, Weights
from kling_jax.data import encode
from kling_jax.errors import UsageError, WeightsError


@pytest.fixture(scope="module")
def golden(shared):
  held = np.load(shared / "golden" / "css" / "pairs.npz")
  return Frames.of(held["frames"][:, 0]), Frames.of(held["frames"][:, 1]), held["csm"]


@pytest.fixture(scope="module")
def videos(shared):
  return json.loads((shared / "golden" / "css" / "videos.json").read_text())["videos"]


@pytest.mark.parametrize("similar", [color_struct.similarities, color_struct.similarities_batched])
def test_pairs_have_the_reference_similarities_and_margins(golden, similar):
  first, second, csm = golden
  found = similar(first, second)
  np.testing.assert_allclose(found[:, 0], csm[:, 0], rtol=0, atol=1e-12)
  np.testing.assert_allclose(found[:, 1], csm[:, 1], rtol=0, atol=1e-10)
  np.testing.assert_allclose(color_struct.PUBLISHED.margins(found), csm[:, 2], rtol=0, atol=1e-9)


def opencv_frames(path):
  capture = cv2.VideoCapture(str(path))
  while True:
    ok, frame = capture.read()
    if not ok:
      return
    yield frame


@pytest.mark.parametrize("name", ["bikes_city.mp4", "plane_flyover_fade.mp4"])
def test_flags_and_clips_are_the_released_ones_through_opencv(shared, videos, name):
  frames = Frames.of(opencv_frames(shared / "videos" / name))
  pairs = np.arange(len(frames) - 1)
  margins = color_struct.PUBLISHED.margins(color_struct.similarities(frames.take(pairs), frames.take(pairs + 1)))
  np.testing.assert_allclose(margins, videos[name]["m"], rtol=0, atol=1e-9)
  flagged = color_struct.flags(margins)
  assert (~flagged).tolist() == videos[name]["visible"]
  assert color_struct.clips(flagged) == [tuple(clip) for clip in videos[name]["clips"]]


def test_the_rule_on_the_reference_margins_of_every_video(videos):
  for video in videos.values():
    margins = np.array(video["m"])
    np.testing.assert_allclose(color_struct.smoothed(margins), video["a"], rtol=0, atol=1e-12)
    flagged = color_struct.flags(margins)
    assert (~flagged).tolist() == video["visible"]
    assert color_struct.clips(flagged) == [tuple(clip) for clip in video["clips"]]


@pytest.mark.parametrize("name", ["carphone_qcif.mp4", "bikes_city.mp4"])
def test_our_decoder_gives_the_same_flags_where_the_margin_is_clear(shared, videos, name):
  video = split.split(shared / "videos" / name, "css")
  margins = np.array(videos[name]["m"])
  clear = np.abs(margins) >= 0.05
  np.testing.assert_allclose(video.statistics["margin"][1:], margins, rtol=0, atol=0.05)
  assert (video.statistics["flag"][1:] == 0)[clear].tolist() == np.array(videos[name]["visible"])[clear].tolist()
  assert [(shot.start_frame, shot.end_frame) for shot in video.shots] == [tuple(c) for c in videos[name]["clips"]]


def test_structural_similarity_is_scikit_images():
  rng = np.random.default_rng(0)
  a = rng.integers(0, 256, (128, 128)).astype(np.uint8)
  b = np.clip(a + rng.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
  frames = [Frames(np.zeros((1, 762), np.float32), x[None]) for x in (a, b)]
  want = skimage.metrics.structural_similarity(a, b, data_range=255)
  assert color_struct.similarities(*frames)[0, 1] == pytest.approx(want, abs=1e-12)


def test_black_frames_have_equal_colours_and_canny_edges_count():
  black = np.zeros((20, 30, 3), np.uint8)
  frames = Frames.of([black, black])
  assert frames.histograms_TC.sum() == 0  # levels 0 and 255 are not counted
  assert color_struct.similarities(frames.take([0]), frames.take([1])).tolist() == [[1.0, 1.0]]
  edge = black.copy()
  edge[:, 15:] = 200
  assert Frames.of([edge]).structure_THW.max() == 255  # brighter than any pixel: an edge


def slow_flags(m):
  """The rule as the brief words it, one pair at a time."""
  n = len(m)
  a = [m[i] if i in (0, n - 1) else np.mean(m[i - 1 : i + 2]) for i in range(n)]
  flags = []
  for i in range(n):
    kept = sorted(a[i - 8 : i])[1:6] if i >= 8 else []
    out = bool(kept) and a[i] < 0.75 and a[i] < np.mean(kept) - 3 * max(0.2, np.std(kept))
    flags.append(bool(m[i] < 0 or out))
  return flags


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 9, 10, 200])
def test_flags_equal_the_rule_taken_word_by_word(count):
  rng = np.random.default_rng(count)
  margins = rng.choice([2.5, 0.7, 0.2, -1.0], count, p=[0.6, 0.2, 0.15, 0.05]) + rng.normal(0, 0.1, count)
  assert color_struct.flags(margins).tolist() == slow_flags(margins.tolist())


def test_clips_lose_four_frames_at_the_head_and_five_at_the_tail():
  assert color_struct.clips(np.zeros(175, bool)) == [(4, 171)]  # 176 frames; the writer's end is exclusive
  flagged = np.zeros(30, bool)
  flagged[8] = True  # 8 pairs before it: too few
  assert color_struct.clips(flagged) == [(13, 26)]


def test_fit_is_optimal_and_separates_free_pairs():
  rng = np.random.default_rng(3)
  x = np.concatenate([rng.normal([0.95, 0.9], 0.08, (200, 2)), rng.normal([0.3, 0.1], 0.25, (200, 2))])
  y = np.repeat([1.0, -1.0], 200)
  weights = color_struct.fit(x, y)
  w, margins = np.array([weights.colour, weights.structure]), weights.margins(x)
  value = lambda w, b: w @ w / 2 + np.maximum(0, 1 - y * (x @ w + b)).sum()
  best = value(w, weights.bias)
  for _ in range(300):  # convex: no worse neighbour means the optimum
    assert value(w + rng.normal(0, 0.02, 2), weights.bias + rng.normal(0, 0.02)) >= best - 1e-3
  assert (np.sign(margins) == y).mean() > 0.97


def test_fit_from_videos_writes_weights_that_split_uses(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(split_command, "FIT_PAIRS", 128)
  rng = np.random.default_rng(5)
  names = []
  for k in range(3):
    picture = cv2.resize(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8), (128, 96))
    frames = [np.roll(picture, t, 1) for t in range(12)]
    encode.write(tmp_path / f"{k}.mp4", frames, fps=25)
    names.append(str(tmp_path / f"{k}.mp4"))
  target = str(tmp_path / "svm.json")
  assert split_command.fit(names, target, as_json=True) == 0
  facts = json.loads(capsys.readouterr().out)
  assert facts["videos"] == 3 and facts["accuracy"] > 0.99
  split_command.fit(names, str(tmp_path / "again.json"))
  assert Weights.load(target) == Weights.load(tmp_path / "again.json")
  assert split.split(names[0], "css", weights=target).transitions == ()
  (tmp_path / "bad.json").write_text('{"colour": 1}')
  with pytest.raises(WeightsError, match="--fit"):
    split.split(names[0], "css", weights=str(tmp_path / "bad.json"))
  with pytest.raises(UsageError, match="css"):
    split.split(names[0], "default", weights=target)
