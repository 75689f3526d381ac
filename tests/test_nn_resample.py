"""Resampling matrices against Pillow, and against what they must keep."""

import numpy as np
import pytest
from PIL import Image

from kling_jax.nn import resample


@pytest.mark.parametrize("kernel,pillow", [("cubic-antialias", Image.BICUBIC), ("linear-antialias", Image.BILINEAR)])
@pytest.mark.parametrize("size,wanted", [((9, 13), (4, 20)), ((16, 16), (5, 7)), ((3, 5), (11, 5)), ((30, 7), (1, 1))])
def test_antialiased_kernels_are_pillows(kernel, pillow, size, wanted):
  picture = np.random.default_rng(0).normal(size=size).astype(np.float32)
  expected = np.asarray(Image.fromarray(picture).resize(wanted[::-1], pillow))
  ours = resample.grid(picture[..., None], wanted, kernel)[..., 0]
  np.testing.assert_allclose(ours, expected, atol=3e-6)


@pytest.mark.parametrize("kernel", resample.KERNELS)
def test_constants_mirror_images_and_the_same_size_are_kept(kernel):
  for size, wanted in ((8, 21), (21, 8), (5, 2)):
    weights = resample.matrix(size, wanted, kernel)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(weights[::-1, ::-1], weights, atol=1e-6)
  np.testing.assert_array_equal(resample.matrix(8, 8, kernel), np.eye(8))


def test_cubic_is_keys_kernel_at_its_places():
  weights = resample.matrix(6, 12, "cubic")
  a = -0.75
  keys = lambda x: ((a + 2) * x - (a + 3)) * x * x + 1 if x < 1 else ((x - 5) * x + 8) * x * a - 4 * a
  np.testing.assert_allclose(weights[5, [1, 2, 3, 4]], [keys(1.25), keys(0.25), keys(0.75), keys(1.75)], atol=1e-6)
  np.testing.assert_allclose(weights[0, 0], keys(0.25) + keys(0.75) + keys(1.75), atol=1e-6)  # edges are repeated
  np.testing.assert_allclose(resample.matrix(3, 5, "linear-corners") @ [0, 4, 2], [0, 2, 4, 3, 2], atol=1e-6)
  with pytest.raises(ValueError, match="known: cubic"):
    resample.matrix(2, 3, "cubicle")
