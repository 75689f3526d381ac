"""Training times: their distributions against SciPy, one draw a key, and the algebra of the shift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_jax.diffusion import time as time_lib
from kling_jax.errors import ConfigError

keys_B = jax.random.split(jax.random.key(7), 4000)
shifts = st.floats(0.05, 20.0)
times = st.floats(0.0, 1.0, width=32)


def logit(time):
  time = np.asarray(time, np.float64)
  return np.log(time) - np.log1p(-time)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_logit_normal_quantiles(shift):
  """In logits the draw is normal, and the shift by s adds log s."""
  drawn = logit(time_lib.sample(keys_B, "logit_normal", shift=shift, mean=-0.4, std=1.3))
  assert scipy.stats.kstest(drawn, scipy.stats.norm(-0.4 + np.log(shift), 1.3).cdf).pvalue > 0.01
  quantiles = scipy.stats.norm(-0.4 + np.log(shift), 1.3).ppf([0.1, 0.5, 0.9])
  np.testing.assert_allclose(np.quantile(drawn, [0.1, 0.5, 0.9]), quantiles, atol=0.12)


def test_uniform_is_uniform_and_never_clean_data():
  drawn = np.asarray(time_lib.sample(keys_B, "uniform"))
  assert scipy.stats.kstest(drawn, "uniform").pvalue > 0.01
  assert drawn.min() > 0
  assert drawn.max() <= 1


def test_shifted_uniform_quantiles():
  drawn = np.asarray(time_lib.sample(keys_B, "uniform", shift=5.0), np.float64)
  cdf = lambda t: t / (5 - 4 * t)  # the inverse of t -> 5 t / (1 + 4 t)
  assert scipy.stats.kstest(drawn, cdf).pvalue > 0.01


@pytest.mark.parametrize(("name", "shape"), [("uniform", ()), ("logit_normal", (5,))])
def test_a_sample_keeps_its_time_under_any_batch_split(name, shape):
  whole = time_lib.sample(keys_B[:12], name, shape=shape, shift=2.0)
  assert whole.shape == (12, *shape)
  assert whole.dtype == jnp.float32
  parts = [time_lib.sample(keys_B[start:end], name, shape=shape, shift=2.0) for start, end in ((0, 2), (2, 12))]
  np.testing.assert_array_equal(whole, jnp.concatenate(parts))
  order = np.random.default_rng(0).permutation(12)
  np.testing.assert_array_equal(whole[order], time_lib.sample(keys_B[order], name, shape=shape, shift=2.0))


def test_frames_get_independent_times():
  drawn = np.asarray(time_lib.sample(keys_B, "uniform", shape=(3,)))
  correlation = np.corrcoef(drawn.T) - np.eye(3)
  assert np.abs(correlation).max() < 0.05


@settings(max_examples=100, deadline=None)
@given(shift=shifts, time=times)
def test_shift_multiplies_the_odds_of_noise(shift, time):
  shifted = float(time_lib.shift_time(time, shift))
  assert 0 <= shifted <= 1
  np.testing.assert_allclose(shifted, shift * time / (1 + (shift - 1) * time), rtol=1e-5, atol=1e-30)


@settings(max_examples=50, deadline=None)
@given(first=shifts, second=shifts)
def test_shifts_compose_and_invert(first, second):
  grid = jnp.linspace(0, 1, 33)
  both = time_lib.shift_time(time_lib.shift_time(grid, first), second)
  np.testing.assert_allclose(both, time_lib.shift_time(grid, first * second), atol=1e-5)
  np.testing.assert_allclose(time_lib.shift_time(time_lib.shift_time(grid, first), 1 / first), grid, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(shift=shifts)
def test_shift_keeps_the_ends_exactly_and_the_order(shift):
  shifted = np.asarray(time_lib.shift_time(jnp.linspace(0, 1, 257), shift))
  assert shifted[0] == 0
  assert shifted[-1] == 1
  assert (np.diff(shifted) > 0).all()


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"name": "logitnormal"}, "did you mean 'logit_normal'"),
    ({"name": "uniform", "shift": 0.0}, "shift must be positive"),
    ({"name": "uniform", "shift": float("nan")}, "shift must be positive"),
    ({"name": "logit_normal", "std": 0.0}, "std of logit-normal"),
  ],
)
def test_wrong_settings_are_named(options, message):
  with pytest.raises(ConfigError, match=message):
    time_lib.sample(keys_B[:2], **options)


def test_rows_of_a_table_have_the_quantiles_of_training_evenly_spread():
  """Golden-ratio places: any run of n rows puts at most three into one of n equal bins."""
  places = np.asarray(time_lib.place(jnp.arange(5000, dtype=jnp.uint32)), np.float64)
  exact = (np.arange(5000) * (0x9E3779B9 / 2**32) + 0.5) % 1
  np.testing.assert_allclose(places, exact, atol=2.0**-23)
  for start, rows in ((0, 64), (37, 100), (1234, 1000)):
    assert np.histogram(places[start : start + rows], rows, (0, 1))[0].max() <= 3
  index = jnp.arange(2048, dtype=jnp.uint32)
  for name, quantile in (
    ("uniform", lambda u: u),
    ("logit_normal", lambda u: scipy.special.expit(scipy.stats.norm.ppf(u))),
  ):
    spread = np.asarray(time_lib.stratified(index, name, shift=3.0), np.float64)
    expected = quantile(np.asarray(time_lib.place(index), np.float64))
    np.testing.assert_allclose(spread, 3 * expected / (1 + 2 * expected), rtol=2e-5)
    assert np.abs(spread.mean() - np.asarray(time_lib.sample(keys_B, name, shift=3.0)).mean()) < 0.02
  with pytest.raises(ConfigError, match="unknown time sampling"):
    time_lib.stratified(index, "normal")
