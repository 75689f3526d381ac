"""The splitter's network: one forward pass on two libraries, its reach, its hand-made views."""

import jax
import numpy as np
import pytest
from flax import nnx

from kling_jax.models import shot_net
from kling_jax.models.shot_module import ShotNet
from kling_jax.nn import params as params_lib


@pytest.fixture(scope="module")
def network():
  module = ShotNet(rngs=nnx.Rngs(params=jax.random.key(0)))
  _, params = params_lib.split(module)
  return module, {name: np.asarray(value) for name, value in params.items()}


@pytest.fixture(scope="module")
def thumbnails():
  return np.random.default_rng(1).integers(0, 256, (150, 3072)).astype(np.uint8)


def test_numpy_and_jax_agree(network, thumbnails):
  module, params = network
  shown = thumbnails[:40]
  on_jax = np.asarray(jax.jit(module)(shown[None], shot_net.histograms(shown)[None]))[0]
  on_numpy = shot_net.forward_numpy(params, shown)
  assert on_numpy.shape == (39, 6) and np.abs(on_jax).max() > 0.1
  np.testing.assert_allclose(on_numpy, on_jax, rtol=0, atol=1e-5)


def test_an_output_depends_on_frames_within_reach_and_on_no_others(network, thumbnails):
  _, params = network
  middle, reach = 75, shot_net.REACH
  whole = shot_net.forward_numpy(params, thumbnails)
  near = shot_net.forward_numpy(params, thumbnails[middle - reach : middle + reach + 2])
  np.testing.assert_allclose(near[reach], whole[middle], rtol=0, atol=1e-5)
  changed = thumbnails.copy()
  changed[middle + 5] = 255 - changed[middle + 5]
  assert np.abs(shot_net.forward_numpy(params, changed)[middle] - whole[middle]).max() > 1e-3


def test_histograms_equal_a_count_value_by_value():
  shown = np.random.default_rng(2).integers(0, 256, (3, 3072)).astype(np.uint8)
  for frame, found in zip(shown, shot_net.histograms(shown), strict=True):
    want = []
    for values, bins, low, high in (
      (frame[:2048], 16, 0, 255), (frame[2048:2560], 13, 51, 204), (frame[2560:], 13, 51, 204)
    ):  # fmt: skip
      mass = np.zeros(bins)
      for value in values:
        place = min(max((int(value) - low) / (high - low), 0), 1) * (bins - 1)
        lower = min(int(place), bins - 2)
        mass[lower] += 1 - (place - lower)
        mass[lower + 1] += place - lower
      want.append(mass / len(values))
    np.testing.assert_allclose(found, np.sqrt(np.concatenate(want) / 3), atol=1e-5)


def test_similarities_are_inner_products_of_the_frames_that_they_name():
  x = np.random.default_rng(3).normal(size=(1, 80, 5)).astype(np.float32)
  found = shot_net.similarities(np, x)[0]
  at = lambda t: x[0, min(max(t, 0), 79)]
  lags = shot_net.LAGS
  across = [(-i, 1 + j) for i in lags for j in lags]
  inner = [(i, j) for k, i in enumerate(lags) for j in lags[k + 1 :]]
  pairs = across + [(-j, -i) for i, j in inner] + [(1 + i, 1 + j) for i, j in inner]
  for step in (0, 7, 40, 78):
    want = [at(step + first) @ at(step + second) for first, second in pairs]
    np.testing.assert_allclose(found[step], want, rtol=0, atol=1e-4)


def test_cells_hold_each_value_of_the_thumbnail_once(thumbnails):
  luma = np.arange(2048).reshape(32, 64) % 251
  shown = np.concatenate([luma.reshape(-1), np.full(512, 10), np.full(512, 20)]).astype(np.uint8)
  cells = shot_net.cells(np, shown[None, None])[0, 0]
  back = np.rint((cells + 2) * 255 / 4).astype(int)
  np.testing.assert_array_equal(back[9, :64].reshape(8, 8), luma[8:16, 8:16])  # row 1, column 1 of 4 x 8
  assert (back[:, 64:80] == 10).all() and (back[:, 80:] == 20).all()
