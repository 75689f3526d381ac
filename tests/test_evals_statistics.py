"""Drift, fidelity and repetition against closed forms and independent implementations."""

import numpy as np
import pytest
from skimage import metrics

from kling_jax.errors import DataError
from kling_jax.evals import drift, fidelity, repetition

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (2, 3, 24, 20, 3), dtype=np.uint8)


def test_psnr_and_ssim_are_scikit_image_s():
  changed = np.clip(NOISE + RNG.normal(0, 30, NOISE.shape), 0, 255).astype(np.uint8)
  changed[0, 1] = 255 - NOISE[0, 1]
  flat = np.full_like(NOISE, 250)  # large means, no variance: where float32 would cancel
  flat[..., 0] = 3
  for made, true in ((changed, NOISE), (flat, np.clip(flat + RNG.normal(0, 2, flat.shape), 0, 255).astype(np.uint8))):
    for k in np.ndindex(2, 3):
      expected = metrics.structural_similarity(
        made[k], true[k], channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
      )
      assert fidelity.ssim(made, true)[k] == pytest.approx(expected, abs=2e-4)
      assert fidelity.psnr(made, true)[k] == pytest.approx(
        metrics.peak_signal_noise_ratio(true[k], made[k], data_range=255)
      )
  assert np.all(np.isinf(fidelity.psnr(NOISE, NOISE))) and np.allclose(fidelity.ssim(NOISE, NOISE), 1)
  assert fidelity.mse(NOISE[:1], NOISE[:1] ^ 1).max() == 1.0
  with pytest.raises(DataError, match="must be alike"):
    fidelity.ssim(NOISE, NOISE[:, :2])
  with pytest.raises(DataError, match="at least 11"):
    fidelity.ssim(NOISE[..., :8, :, :], NOISE[..., :8, :, :])


def test_drift_curves_are_closed_forms():
  flat = np.zeros((3, 2, 8, 8, 3), np.uint8)
  flat[0], flat[1] = (100, 100, 100), (200, 100, 100)
  flat[2, :, ::2], flat[2, :, 1::2] = 0, 100
  found = drift.curves(flat)
  np.testing.assert_allclose(found["luma"], [100, 129.9, 50])
  np.testing.assert_allclose(found["saturation"], [0, 0.5, 0])
  np.testing.assert_allclose(found["red_std"], [0, 0, 50])
  np.testing.assert_allclose(found["sharpness"], [0, 0, 200**2])  # stripes: the Laplacian is 200 and -200
  np.testing.assert_allclose(found["high_frequencies"], [0, 0, 1])
  np.testing.assert_allclose(found["histogram"], [0, 1, 0.5])
  assert drift.slopes({"a": np.array([1.0, 3.0, 5.0]), "b": np.array([7.0])}) == {"a": pytest.approx(2.0), "b": 0.0}
  with pytest.raises(DataError, match="sides of 4"):
    drift.curves(flat[:, :, :3])


def test_sharpness_sees_blur_and_colours_do_not():
  blurred = NOISE.astype(float)
  blurred = ((blurred + np.roll(blurred, 1, 2) + np.roll(blurred, 1, 3)) / 3).astype(np.uint8)
  found = drift.curves(np.stack([NOISE[0], blurred[0]]))
  assert found["sharpness"][1] < 0.5 * found["sharpness"][0]
  assert found["high_frequencies"][1] < found["high_frequencies"][0]
  assert found["luma"][1] == pytest.approx(found["luma"][0], rel=0.01)


def test_late_errors_weigh_more():
  assert drift.late_weighted(np.array([1.0, 1.0, 0.0])) == pytest.approx(0.5)
  assert drift.late_weighted(np.array([0.0, 1.0, 1.0])) == pytest.approx(5 / 6)
  assert drift.late_weighted(np.array([0.0, 1.0]), power=0) == 0.5


def test_distinct_n_and_repeats_are_counts():
  texts = ["The ball moves left.", "the ball moves left", "the ball moves right", "the ball moves left"]
  assert repetition.distinct(texts, 1) == 5 / 16
  assert repetition.distinct(texts, 2) == 4 / 12
  assert np.isnan(repetition.distinct(["one"], 2))
  assert repetition.repeat_rate(texts) == pytest.approx(1 / 3)
  assert repetition.repeat_rate(texts, "any") == pytest.approx(2 / 3)
  assert np.isnan(repetition.repeat_rate(texts[:1]))


def test_self_bleu_is_one_for_copies_low_for_strangers_and_papineni_s_in_between():
  assert repetition.self_bleu(["a b c d e"] * 3) == pytest.approx(1)
  assert repetition.self_bleu(["a b c d e", "f g h i j"]) < 0.2
  # Papineni et al. (2002), example 1: clipped unigrams 17/18 and bigrams 10/17 of candidate 1.
  candidate = repetition.words(
    "it is a guide to action which ensures that the military always obeys the commands of the party"
  )
  references = [
    repetition.words("it is a guide to action that ensures that the military will forever heed party commands"),
    repetition.words(
      "it is the guiding principle which guarantees the military forces always being under the command of the party"
    ),
    repetition.words("it is the practical guide for the army always to heed the directions of the party"),
  ]
  assert repetition.bleu(candidate, references, 1) == pytest.approx(17 / 18)
  assert repetition.bleu(candidate, references, 2) == pytest.approx(np.sqrt(17 / 18 * 10 / 17))
  # ... and its example 2 of clipping, with the brevity penalty of 7 words against 6: none.
  assert repetition.bleu(["the"] * 7, [repetition.words("the cat is on the mat")], 1) == pytest.approx(2 / 7)
  assert repetition.bleu(["the", "cat"], [repetition.words("the cat is on")], 2) == pytest.approx(np.exp(1 - 2))
  assert repetition.bleu([], references) == 0


def test_perplexity_of_a_fair_die_is_six():
  assert repetition.perplexity(np.full((2, 3), -np.log(6)), np.array([[1, 1, 0], [1, 0, 0]])) == pytest.approx(6)
