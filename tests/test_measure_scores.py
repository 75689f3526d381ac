"""Scores of a clip against closed forms, known translations, and the procedural world's true scores."""

import itertools

import cv2
import numpy as np
import pytest
import scipy.stats

from kling_jax import measure
from kling_jax.data import worlds
from kling_jax.errors import DataError
from kling_jax.measure.aesthetic import aesthetic, colourfulness, contrast
from kling_jax.measure.clarity import SMOOTHING, clarity
from kling_jax.measure.motion import frame_pairs, motion


def texture(size: int, seed: int = 0) -> np.ndarray:
  noise = np.random.default_rng(seed).normal(size=(size, size, 3)).astype(np.float32)
  smooth = cv2.GaussianBlur(noise, (0, 0), 4)
  return np.clip(128 + 60 * smooth / smooth.std(), 0, 255).astype(np.float32)


def translated(speed_px: float, angle: float, times: np.ndarray, height: int, width: int) -> np.ndarray:
  """A texture moving at `speed_px` pixels per second, cut out of a larger one."""
  picture = texture(600)
  frames = []
  for t in times:
    dx, dy = speed_px * t * np.cos(angle), speed_px * t * np.sin(angle)
    shift = np.array([[1, 0, dx - 100], [0, 1, dy - 100]], np.float32)
    frames.append(cv2.warpAffine(picture, shift, (width, height), flags=cv2.INTER_CUBIC))
  return np.clip(np.rint(np.stack(frames)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("diagonals_per_s", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("angle", [0.0, 2.0])
def test_motion_of_a_translation_is_its_speed(diagonals_per_s, angle):
  times = np.arange(8) / 24
  frames = translated(diagonals_per_s * np.hypot(120, 160), angle, times, 120, 160)
  assert motion(frames, times) == pytest.approx(diagonals_per_s, rel=0.12)


def test_motion_does_not_depend_on_frame_rate_or_resolution():
  speed = 0.15
  values = []
  for fps, height, width in ((12, 120, 160), (24, 120, 160), (60, 120, 160), (24, 240, 320), (24, 300, 400)):
    times = np.arange(round(fps * 0.6)) / fps
    frames = translated(speed * np.hypot(120, 160), 0.5, times, 120, 160)
    frames = np.stack([cv2.resize(f, (width, height), interpolation=cv2.INTER_CUBIC) for f in frames])
    values.append(motion(frames, times))
  np.testing.assert_allclose(values, speed, rtol=0.12)


def test_motion_uses_time_stamps_not_frame_numbers():
  times = np.cumsum([0, 1, 3, 1, 2, 5, 1, 1, 2, 4, 1, 1]) / 30  # variable frame rate
  frames = translated(0.1 * np.hypot(120, 160), 0.0, times, 120, 160)
  assert motion(frames, times) == pytest.approx(0.1, rel=0.12)


def test_motion_of_a_still_is_zero_and_of_one_frame_undefined():
  still = np.repeat(texture(96)[None].astype(np.uint8), 6, 0)
  assert motion(still, np.arange(6) / 24) == pytest.approx(0.0, abs=3e-4)
  assert motion(still[:1], np.zeros(1)) is None
  assert "motion" not in measure.score(still[:1], np.zeros(1))
  assert motion(still[:3], np.zeros(3)) is None  # a container without time stamps


def test_pairs_are_near_a_tenth_of_a_second_at_any_rate():
  for fps in (8, 24, 30000 / 1001, 60):
    times = np.arange(round(3 * fps)) / fps
    gaps = np.array([times[j] - times[i] for i, j in frame_pairs(times)])
    assert np.abs(gaps - 0.1).max() <= 0.5 / fps + 0.025
  pairs = frame_pairs(measure.sample_times(2.5, 24))
  assert pairs == [(2 * k, 2 * k + 1) for k in range(8)]


@pytest.mark.parametrize("duration_s,fps", [(0.04, 25), (0.2, 25), (2.5, 24), (60.0, 30000 / 1001)])
def test_sampled_times_lie_in_the_clip(duration_s, fps):
  times = measure.sample_times(duration_s, fps)
  assert times[0] == 0 and (np.diff(times) > 0).all() and times[-1] <= duration_s - 1 / fps + 1e-6
  assert len(times) <= 16


def edge(blur: float, levels=(40, 200), size: int = 256, angle: float = 0.3) -> np.ndarray:
  """A straight edge under a Gaussian of `blur` pixels, in closed form."""
  y, x = np.indices((size, size)) - size / 2
  distance = x * np.cos(angle) + y * np.sin(angle)
  low, high = levels
  grey = low + (high - low) * scipy.stats.norm.cdf(distance / max(blur, 0.3))
  return np.repeat(np.rint(grey)[..., None], 3, -1).astype(np.uint8)


@pytest.mark.parametrize("blur", [0.7, 1.0, 2.0, 4.0])
def test_clarity_of_a_blurred_edge_is_its_closed_form(blur):
  expected = SMOOTHING / np.hypot(SMOOTHING, blur)
  assert clarity(edge(blur)[None], np.zeros(1)) == pytest.approx(expected, rel=0.1)
  weak = clarity(edge(blur, (100, 130))[None], np.zeros(1))  # less contrast, equal sharpness
  assert weak == pytest.approx(expected, rel=0.15)


def test_clarity_falls_along_a_blur_ladder_of_every_texture():
  source = worlds.WorldSource(count=12, seed=4)
  for index in range(12):
    sharp = worlds.render(worlds.dataclasses.replace(source.script(index), blur=0.0), np.array([1.0]), 256, 256)[0]
    ladder = [sharp] + [cv2.GaussianBlur(sharp, (0, 0), sigma) for sigma in (0.7, 1.5, 3, 6)]
    values = [clarity(frame[None], np.zeros(1)) for frame in ladder]
    assert all(a > b for a, b in itertools.pairwise(values)), (index, values)


def test_clarity_of_the_same_picture_at_another_resolution():
  clip = worlds.dataclasses.replace(worlds.script("shapes-v1", 0, 1), blur=0.012)
  values = [clarity(worlds.render(clip, np.array([1.0]), size, size), np.zeros(1)) for size in (192, 256, 512)]
  np.testing.assert_allclose(values, values[1], rtol=0.06)


def test_clarity_of_white_noise_is_two():
  noise = np.random.default_rng(0).normal(128, 20, (256, 256, 1)).clip(0, 255).astype(np.uint8).repeat(3, -1)
  assert clarity(noise[None], np.zeros(1)) == pytest.approx(2.0, rel=0.1)


def test_clarity_of_a_flat_frame_is_zero():
  assert clarity(np.full((2, 90, 160, 3), 77, np.uint8), np.arange(2.0)) == 0.0


def test_colourfulness_and_contrast_closed_forms():
  grey = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, -1)
  assert colourfulness(grey) == pytest.approx(0.0, abs=1e-9)
  assert contrast(grey) == pytest.approx(np.sqrt((256**2 - 1) / 12))
  halves = np.zeros((8, 8, 3), np.uint8)
  halves[:, :4] = (200, 0, 0)  # rg: 200 and 0; yb: 100 and 0
  expected = np.hypot(100, 50) + 0.3 * np.hypot(100, 50)
  assert colourfulness(halves) == pytest.approx(expected)


def test_aesthetic_stand_in_rises_with_saturation_and_with_contrast():
  frame = texture(128, 1)
  grey = frame.mean(-1, keepdims=True)
  frames = [np.clip(grey + k * (frame - grey), 0, 255).astype(np.uint8) for k in (0.0, 0.4, 0.8)]
  values = [aesthetic(f[None], np.zeros(1)) for f in frames]
  assert all(a < b for a, b in itertools.pairwise(values)) and values[0] >= 0 and values[-1] < 10
  faint = np.clip(128 + 0.3 * (frame - 128), 0, 255).astype(np.uint8)
  assert aesthetic(faint[None], np.zeros(1)) < aesthetic(frame.astype(np.uint8)[None], np.zeros(1))


def test_measured_scores_rank_clips_of_the_world_as_its_true_scores_do():
  source = worlds.WorldSource(count=24, seed=11)
  true, found = [], []
  for index in range(24):
    info = source.info(index)
    times = measure.sample_times(info.duration_s, info.fps)
    names = ("motion", "aesthetic", "clarity")
    scores = measure.score(source.frames(index, times, 128, 128), times, measure.chosen(names))
    true.append([info.scores[n].value for n in names])
    found.append([scores[n].value for n in names])
  rank = [scipy.stats.spearmanr(t, f).statistic for t, f in zip(np.transpose(true), np.transpose(found), strict=True)]
  assert rank[0] > 0.9 and rank[1] > 0.5 and rank[2] > 0.8, rank


def test_scores_carry_scorer_and_version():
  scores = measure.score(np.repeat(texture(64)[None].astype(np.uint8), 3, 0), np.arange(3) / 10)
  named = {n: (s.scorer, s.version) for n, s in scores.items()}
  expected = {"motion": ("flow", "1"), "aesthetic": ("colourfulness+contrast", "1"), "clarity": ("laplacian", "1")}
  assert expected.items() <= named.items()
  assert named.keys() <= {condition for scorer in measure.SCORERS for condition in scorer.conditions}
  assert "safety" not in named  # nothing here measures it, and nothing passes as if it did


@pytest.mark.parametrize(
  "frames,times",
  [
    (np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0)),
    (np.zeros((2, 8, 8, 3), np.float32), np.zeros(2)),
    (np.zeros((2, 8, 8), np.uint8), np.zeros(2)),
    (np.zeros((2, 8, 8, 3), np.uint8), np.zeros(3)),
    (np.zeros((2, 8, 8, 3), np.uint8), np.array([1.0, 0.0])),
  ],
)
def test_wrong_input_is_a_data_error(frames, times):
  with pytest.raises(DataError):
    measure.score(frames, times)
