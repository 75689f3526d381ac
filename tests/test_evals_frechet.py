"""Frechet and kernel distances against closed forms, and the features that they are taken of."""

import numpy as np
import parity_fixture
import pytest
import scipy.linalg

from kling_jax.errors import DataError, WeightsError
from kling_jax.evals import frechet
from kling_jax.interop import safetensors, vision
from kling_jax.nn import params as params_lib


def gaussian(mean, covariance, count=50):
  """Moments that are exactly these."""
  mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
  return frechet.Moments(count, mean, covariance * (count - 1))


def spread(size, seed=0, low=-2, high=2):
  """A random covariance whose variances span decades."""
  draw = np.random.default_rng(seed)
  basis = np.linalg.qr(draw.normal(size=(size, size)))[0]
  return basis * 10 ** draw.uniform(low, high, size) @ basis.T


def test_moments_grow_by_parts():
  x = 1e4 + np.random.default_rng(0).normal(size=(97, 6)) @ np.diag([1, 1e-3, 5, 1, 1, 0])  # far from zero
  whole = frechet.Moments.of(x)
  np.testing.assert_allclose(whole.covariance_DD, np.cov(x.T), rtol=1e-6, atol=1e-10)
  parts = frechet.moments(np.split(x, [1, 40, 41, 90]))
  other = frechet.moments(np.split(x, [50])[::-1])
  for found in (parts, other):
    assert found.count == 97
    np.testing.assert_allclose(found.mean_D, whole.mean_D, rtol=1e-14)
    np.testing.assert_allclose(found.scatter_DD, whole.scatter_DD, rtol=1e-9, atol=1e-9)


def test_frechet_of_gaussians_is_the_closed_form():
  a, b = np.array([4.0, 0.25, 9.0]), np.array([1.0, 1.0, 1e-8])
  value = frechet.frechet(gaussian([0, 1, 2], np.diag(a)), gaussian([3, 1, -2], np.diag(b)))
  assert value == pytest.approx(25 + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-12)
  first, second = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])  # they do not commute
  root = np.sqrt(np.trace(first @ second) + 2 * np.sqrt(np.linalg.det(first @ second)))  # trace of a 2 x 2 root
  expected = np.trace(first) + np.trace(second) - 2 * root
  assert frechet.frechet(gaussian([0, 0], first), gaussian([0, 0], second)) == pytest.approx(expected, rel=1e-12)
  first, second = spread(20, 1), spread(20, 2)
  expected = np.trace(first) + np.trace(second) - 2 * np.trace(scipy.linalg.sqrtm(first @ second)).real
  zero = np.zeros(20)
  assert frechet.frechet(gaussian(zero, first), gaussian(zero, second)) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_equal_sets_is_zero_also_with_few_videos():
  x = np.random.default_rng(3).normal(size=(12, 64)) * np.logspace(-4, 2, 64)  # fewer videos than features
  one = frechet.Moments.of(x)
  total = np.trace(one.covariance_DD)
  assert frechet.frechet(one, frechet.Moments.of(x[::-1])) <= 1e-12 * total
  turn = np.linalg.qr(np.random.default_rng(4).normal(size=(64, 64)))[0]
  other = np.random.default_rng(5).normal(size=(15, 64)) + 1
  value = frechet.frechet(one, frechet.Moments.of(other))
  turned = frechet.frechet(frechet.Moments.of(x @ turn + 7), frechet.Moments.of(other @ turn + 7))
  assert turned == pytest.approx(value, rel=1e-9)  # a distance knows no axes and no origin
  scaled = frechet.frechet(frechet.Moments.of(3 * x), frechet.Moments.of(3 * other))
  assert scaled == pytest.approx(9 * value, rel=1e-9)
  moved = frechet.frechet(one, frechet.Moments.of(x + np.eye(64)[0]))
  assert moved == pytest.approx(1, rel=1e-9)  # one unit along one feature
  still = frechet.Moments.of(np.ones((5, 64)))
  assert frechet.frechet(still, one) == pytest.approx(total + np.square(one.mean_D - 1).sum(), rel=1e-9)
  assert frechet.frechet(still, frechet.Moments.of(np.full((5, 64), 3.0))) == pytest.approx(4 * 64)


def test_few_videos_read_too_high_as_much_as_the_docstring_says():
  draw = np.random.default_rng(10)
  size, count = 24, 600
  values = [
    frechet.frechet(*(frechet.Moments.of(draw.normal(size=(count, size))) for _ in range(2))) for _ in range(12)
  ]
  assert np.mean(values) == pytest.approx((size + 4) / (4 * count) * 2 * size, rel=0.1)


def test_kernel_is_unbiased():
  draw = np.random.default_rng(6)
  x, y = draw.normal(size=(9, 4)), draw.normal(size=(7, 4)) + 0.5
  k = lambda a, b: (a @ b / 4 + 1) ** 3
  pairs = lambda z: np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])
  expected = pairs(x) + pairs(y) - 2 * np.mean([k(a, b) for a in x for b in y])
  assert frechet.kernel(x, y) == pytest.approx(expected, rel=1e-10)
  # Of degree 1 it is the squared distance of the means less what their errors add.
  variance = sum(np.trace(np.cov(z.T)) / len(z) for z in (x, y))
  expected = (np.square(x.mean(0) - y.mean(0)).sum() - variance) / 4
  assert frechet.kernel(x, y, degree=1) == pytest.approx(expected, rel=1e-10)
  same = draw.normal(size=(2, 2000, 4))
  mean, error = frechet.kernel_blocks(*same, size=50)
  assert abs(mean) < 4 * error and error > 0
  shifted, error = frechet.kernel_blocks(same[0], same[1] + 0.3, size=50)
  assert shifted > 4 * error
  assert frechet.kernel_blocks(*same, size=50) == frechet.kernel_blocks(*same, size=50)


def test_kernel_by_rows_is_the_kernel_at_once(monkeypatch):
  draw = np.random.default_rng(7)
  x, y = draw.normal(size=(23, 5)), draw.normal(size=(17, 5))
  whole = frechet.kernel(x, y)
  monkeypatch.setattr(frechet, "ROWS", 4)
  assert frechet.kernel(x, y) == pytest.approx(whole, rel=1e-12)


def test_what_has_no_distance_is_refused():
  one, two = frechet.Moments.of(np.ones((1, 3))), frechet.Moments.of(np.eye(3))
  with pytest.raises(DataError, match="two videos in each set, got 1 and 3"):
    frechet.frechet(one, two)
  with pytest.raises(DataError, match="two extractors"):
    frechet.frechet(two, frechet.Moments.of(np.eye(4)))
  with pytest.raises(DataError, match="two extractors"):
    two + frechet.Moments.of(np.eye(4))
  with pytest.raises(DataError, match="two extractors"):
    frechet.kernel(np.eye(3), np.eye(4))
  with pytest.raises(DataError, match="not finite"):
    frechet.kernel(np.eye(3), np.full((3, 3), np.nan))
  with pytest.raises(DataError, match="no two blocks of 100"):
    frechet.kernel_blocks(np.eye(3), np.eye(3))
  with pytest.raises(DataError, match="no features"):
    frechet.moments([])
  with pytest.raises(DataError, match="uint8"):
    frechet.low_frequency(np.zeros((1, 4, 8, 8, 3), np.float32))


def test_low_frequencies_are_in_units_of_pixels():
  grey = np.full((1, 9, 20, 30, 3), 51, np.uint8)
  light = frechet.low_frequency(grey + 51) - frechet.low_frequency(grey)
  assert light.shape == (1, 192) and np.linalg.norm(light) == pytest.approx(0.2, rel=1e-6)  # 51 of 255 everywhere
  ramp = np.broadcast_to(np.linspace(0, 255, 40).round().astype(np.uint8)[:, None, None], (1, 9, 40, 30, 3))
  moved = frechet.low_frequency(ramp[:, :, ::-1]) - frechet.low_frequency(ramp)
  assert np.linalg.norm(moved) == pytest.approx(2 / np.sqrt(12), rel=0.03)  # a ramp's deviation, against its mirror
  noise = np.random.default_rng(8).integers(0, 256, (1, 16, 64, 64, 3), np.uint8)
  assert np.linalg.norm(frechet.low_frequency(noise) - frechet.low_frequency(np.full_like(noise, 128))) < 0.01


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  folder = tmp_path_factory.mktemp("video_mae")
  parity_fixture.load("video_mae_tuned", folder)
  return folder


def test_video_mae_features_are_the_networks(weights):
  features, version = frechet.video_mae(weights)
  assert version == safetensors.fingerprint(weights)
  videos = np.random.default_rng(9).integers(0, 256, (3, 4, 14, 14, 3), np.uint8)  # of the network's own size
  found = features(videos)
  loaded = vision.load(weights)
  normal = (videos / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  expected = params_lib.merge(loaded.graph, loaded.params)(normal.astype(np.float32))
  np.testing.assert_allclose(found, expected, atol=1e-5)
  longer = np.repeat(videos, 2, axis=1)  # each frame twice: the same four are picked
  picks = np.linspace(0, 7, 4).round().astype(int)
  np.testing.assert_array_equal(features(longer), features(longer[:, picks]))


def test_the_middle_of_a_video_is_seen():
  video = np.zeros((5, 28, 60, 3), np.float32)
  video[:, :, 16:44] = 1
  seen = frechet.prepared(video, 3, 14)
  assert seen.shape == (3, 14, 14, 3) and seen.dtype == np.float32
  inner = (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
  np.testing.assert_allclose(seen[:, :, 1:-1], np.broadcast_to(inner, (3, 14, 12, 3)), rtol=1e-5)


def test_other_weights_give_no_features(tmp_path):
  parity_fixture.load("dinov2", tmp_path)
  with pytest.raises(WeightsError, match="no video_mae"):
    frechet.video_mae(tmp_path)
