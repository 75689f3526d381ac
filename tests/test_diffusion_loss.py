"""The loss against float64 NumPy, and what must not matter to it: batch splits, masked frames, what they hold."""

import jax.numpy as jnp
import numpy as np
import pytest

from kling_jax.diffusion import loss as loss_lib

generator = np.random.default_rng(3)
prediction, target = generator.standard_normal((2, 6, 5, 2, 3, 4)).astype(np.float32)
mask_BT = np.array([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1] * 5, [0] * 5, [0, 0, 0, 0, 1], [1, 0, 1, 0, 1]], bool)
weight_B = generator.uniform(0.1, 1, 6).astype(np.float32)
weight_BT = generator.uniform(0.1, 1, (6, 5)).astype(np.float32)


@pytest.mark.parametrize("weight", [0.7, weight_B, weight_BT], ids=["scalar", "sample", "frame"])
@pytest.mark.parametrize("mask", [None, mask_BT, mask_BT.astype(np.float32)], ids=["all", "bool", "float"])
def test_is_the_weighted_mean_over_what_counts(weight, mask):
  found = loss_lib.mse_per_sample(prediction, target, weight, mask)
  error = np.square(prediction.astype(np.float64) - target).mean((2, 3, 4))  # (B, T)
  error = error * np.broadcast_to(np.reshape(weight, np.shape(weight) + (1,) * (2 - np.ndim(weight))), (6, 5))
  counts = mask_BT if mask is not None else np.ones((6, 5), bool)
  expected = [row[count].mean() if count.any() else 0.0 for row, count in zip(error, counts, strict=True)]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_mean_over_equal_parts_is_the_mean_over_the_whole():
  whole = loss_lib.mse_per_sample(prediction, target, weight_B, mask_BT)
  parts = [
    loss_lib.mse_per_sample(prediction[rows], target[rows], weight_B[rows], mask_BT[rows])
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
  ]
  np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-6)
  np.testing.assert_allclose(np.mean([part.mean() for part in parts]), whole.mean(), rtol=1e-6)


def test_masked_frames_may_hold_anything():
  wild = np.where(mask_BT[:, :, None, None, None], prediction, np.inf)
  found = loss_lib.mse_per_sample(wild, target, 1.0, mask_BT)
  np.testing.assert_array_equal(found, loss_lib.mse_per_sample(prediction, target, 1.0, mask_BT))
  assert np.isfinite(found).all()


def test_sample_mask_removes_a_sample():
  found = loss_lib.mse_per_sample(prediction, target, 1.0, np.array([1, 0, 1, 1, 1, 1]))
  assert found[1] == 0
  np.testing.assert_allclose(found[0], loss_lib.mse_per_sample(prediction, target)[0], rtol=1e-6)


def test_half_precision_errors_are_taken_in_float32():
  """In bfloat16, 256.5^2 and its mean would lose the small part."""
  ones = jnp.ones((2, 3, 2, 2, 1), jnp.bfloat16)
  found = loss_lib.mse_per_sample(ones * 257, ones)
  assert found.dtype == jnp.float32
  exact = (float(jnp.bfloat16(257)) - 1) ** 2
  np.testing.assert_array_equal(found, [exact, exact])
