"""Processes: exact ends, conversions that return what went in, and errors that relate by their known weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_jax.diffusion import process as process_lib
from kling_jax.errors import ConfigError

PROCESSES = [
  process_lib.make("flow"),
  process_lib.make("v"),
  process_lib.make("v", schedule="scaled_linear"),
  process_lib.make("x"),
]
KINDS = ("x0", "noise", "v", "velocity")
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{p.name}-{p.schedule}")
x0, noise = np.random.default_rng(0).standard_normal((2, 3, 4, 2, 2, 5)).astype(np.float32)


@every_process
def test_ends_are_data_and_pure_noise_to_the_last_bit(process):
  for coefficients in (process.coefficients, jax.jit(process.coefficients)):
    assert [float(c) for c in coefficients(0.0)] == [1.0, 0.0]
    assert [float(c) for c in coefficients(1.0)] == [0.0, 1.0]
  assert process.snr(1.0) == 0.0
  assert process.snr(0.0) == np.inf
  np.testing.assert_array_equal(process.corrupt(x0, noise, 0.0), x0)
  np.testing.assert_array_equal(process.corrupt(x0, noise, 1.0), noise)


@every_process
def test_signal_to_noise_falls_strictly(process):
  snr = np.asarray(process.snr(jnp.linspace(0, 1, 1001)))
  assert (np.diff(snr[1:]) < 0).all()


@every_process
def test_v_processes_preserve_variance(process):
  a, b = process.coefficients(jnp.linspace(0, 1, 101))
  if process.name == "v":
    np.testing.assert_allclose(a**2 + b**2, 1, atol=3e-7)
  else:
    np.testing.assert_allclose(a + b, 1, atol=3e-7)


@pytest.mark.parametrize(("steps", "tolerance"), [(1000, 6e-3), (200_000, 3e-5)])
def test_scaled_linear_is_the_limit_of_the_discrete_rescaled_schedule(steps, tolerance):
  """Lin et al. 2023, algorithm 1, on a product of `steps` factors in float64."""
  betas = np.linspace(0.00085**0.5, 0.012**0.5, steps) ** 2 * 1000 / steps
  root = np.sqrt(np.cumprod(1 - betas))
  expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
  a, b = process_lib.make("v", schedule="scaled_linear").coefficients(jnp.arange(1, steps + 1) / steps)
  np.testing.assert_allclose(a, expected, atol=tolerance)
  np.testing.assert_allclose(b, np.sqrt(1 - expected**2), atol=4 * tolerance)


@pytest.mark.parametrize("kind", KINDS)
@every_process
@settings(max_examples=25, deadline=None)
@given(time=st.floats(0.02, 0.98))
def test_estimate_of_the_target_is_the_truth(process, kind, time):
  process = dataclasses.replace(process, prediction=kind)
  x_t = process.corrupt(x0, noise, time)
  estimate = process.estimate(process.target(x0, noise, time), x_t, time)
  a, b = (float(c) for c in process.coefficients(time))
  for found, truth in zip(estimate, (x0, noise, noise - x0, a * noise - b * x0), strict=True):
    np.testing.assert_allclose(found, truth, atol=2e-6 / min(a, b))


@pytest.mark.parametrize("kind", ["v", "velocity"])
@pytest.mark.parametrize("time", [0.0, 1.0])
@every_process
def test_v_and_velocity_determine_everything_at_both_ends(process, kind, time):
  process = dataclasses.replace(process, prediction=kind)
  estimate = process.estimate(process.target(x0, noise, time), process.corrupt(x0, noise, time), time)
  np.testing.assert_allclose(estimate.x0, x0, atol=1e-6)
  np.testing.assert_allclose(estimate.noise, noise, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@every_process
def test_values_and_gradients_are_finite_everywhere(process, kind):
  process = dataclasses.replace(process, prediction=kind)
  prediction, x_t = np.random.default_rng(2).standard_normal((2, 5, 3)).astype(np.float32)
  time_B = jnp.array([0.0, 1e-7, 1e-3, 1 - 6e-8, 1.0])

  def total(prediction, x_t):
    estimate = process.estimate(prediction, x_t, time_B)
    return sum(part.sum() for part in estimate), estimate

  gradients, estimate = jax.jit(jax.grad(total, (0, 1), has_aux=True))(prediction, x_t)
  assert all(np.isfinite(part).all() for part in (*gradients, *estimate))


def test_what_is_undetermined_at_an_end_is_its_mean():
  straight = process_lib.make("x")
  assert not straight.estimate(x0, x0, 0.0).noise.any()
  assert not dataclasses.replace(straight, prediction="noise").estimate(noise, noise, 1.0).x0.any()


@pytest.mark.parametrize("time", [0.2, 0.5, 0.9])
@every_process
def test_errors_relate_by_their_known_weights(process, time):
  """One error of the prediction, seen as an error of each quantity; (a / b)^2 is the signal-to-noise ratio."""
  a, b = (float(c) for c in process.coefficients(time))
  factors = {
    ("velocity", "x0"): b / (a + b),
    ("velocity", "noise"): a / (a + b),
    ("velocity", "v"): (a * a + b * b) / (a + b),
    ("v", "x0"): b / (a * a + b * b),
    ("v", "noise"): a / (a * a + b * b),
    ("x0", "noise"): a / b,
    ("x0", "velocity"): (a + b) / b,
    ("noise", "x0"): b / a,
  }
  x_t = process.corrupt(x0, noise, time)
  error = np.random.default_rng(1).standard_normal(x0.shape).astype(np.float32)
  for (predicted, seen), factor in factors.items():
    reader = dataclasses.replace(process, prediction=predicted)
    truth = reader.target(x0, noise, time)
    difference = getattr(reader.estimate(truth + error, x_t, time), seen) - getattr(
      reader.estimate(truth, x_t, time), seen
    )
    np.testing.assert_allclose(np.square(difference).mean(), factor**2 * np.square(error).mean(), rtol=1e-3)


def test_velocity_of_flow_is_the_time_derivative():
  flow = process_lib.make("flow")
  _, derivative = jax.jvp(lambda time: flow.corrupt(x0, noise, time), (0.3,), (1.0,))
  np.testing.assert_allclose(derivative, flow.target(x0, noise, 0.3), atol=1e-6)


@every_process
def test_every_process_is_straight_in_its_own_coordinate(process):
  time = jnp.linspace(0, 1, 7)[:, None]
  a, b = process.coefficients(time)
  u = b / (a + b)
  y = (a * x0.ravel() + b * noise.ravel()) / (a + b)
  np.testing.assert_allclose(y, (1 - u) * x0.ravel() + u * noise.ravel(), atol=1e-6)


@every_process
def test_time_broadcasts_as_scalar_sample_and_frame(process):
  whole = process.corrupt(x0, noise, 0.3)
  np.testing.assert_allclose(process.corrupt(x0, noise, jnp.full((3,), 0.3)), whole, atol=1e-6)
  np.testing.assert_allclose(process.corrupt(x0, noise, jnp.full((3, 4), 0.3)), whole, atol=1e-6)
  mixed = process.corrupt(x0, noise, jnp.full((3, 4), 0.3).at[:, 0].set(0.0))
  np.testing.assert_array_equal(mixed[:, 0], x0[:, 0])
  np.testing.assert_allclose(mixed[:, 1:], whole[:, 1:], atol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (3, 2), (4, 3)])
def test_time_of_another_batch_is_refused(shape):
  with pytest.raises(ValueError, match="does not lead"):
    process_lib.expand(jnp.zeros(shape), jnp.zeros((3, 4, 2, 2, 5)))


def test_half_precision_input_is_computed_in_float32():
  flow = process_lib.make("flow")
  half = jnp.asarray(x0, jnp.bfloat16)
  assert flow.corrupt(half, half, 0.5).dtype == jnp.float32
  assert flow.estimate(half, half, 0.5).x0.dtype == jnp.float32


def test_weights():
  time = jnp.array([0.0, 0.5, 1.0])
  np.testing.assert_allclose(process_lib.make("x").weight(time), [1.0, 0.55, 0.1], atol=1e-6)
  np.testing.assert_array_equal(process_lib.make("flow").weight(time), [1, 1, 1])
  assert process_lib.make("v").weight(0.5).shape == ()


def test_unknown_names_say_what_is_legal():
  with pytest.raises(ConfigError, match="did you mean 'flow'"):
    process_lib.make("flwo")
  with pytest.raises(ConfigError, match="legal: cosine, scaled_linear"):
    process_lib.make("v", schedule="sigmoid")
  with pytest.raises(ConfigError, match="legal: straight"):
    process_lib.make("flow", schedule="cosine")
