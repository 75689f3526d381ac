"""Samplers on Gaussian data, whose estimates are exact: measured orders, exact limits, exact ends.

Data N(mu, s^2) gives x_t ~ N(a mu, a^2 s^2 + b^2) and E[x0 | x_t] = mu + a s^2 (x_t - a mu) / (a^2 s^2 + b^2). The
deterministic path of the noise z is x_t = a mu + sqrt(a^2 s^2 + b^2) z at every time, so that data is mu + s z.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kling_jax.diffusion import process as process_lib
from kling_jax.diffusion import sampler as sampler_lib
from kling_jax.errors import ConfigError

MEAN, STD = 0.7, 0.5
METHODS = ("euler", "heun", "ddim", "dpmpp_2m")
PROCESSES = {
  "flow": process_lib.make("flow"),
  "v": process_lib.make("v"),
  "v-scaled_linear": process_lib.make("v", schedule="scaled_linear"),
  "x": process_lib.make("x"),
}
z = jnp.linspace(-2, 2, 9)[None]


def exact_network(process, mean=MEAN, std=STD):
  """The ideal network for N(mean, std^2): the conditional mean of whatever the process predicts."""

  def predict(x, time):
    a, b = process.coefficients(time)
    score = (x - a * mean) / (a * a * std * std + b * b)
    x0, noise = mean + a * std * std * score, b * score
    return {"x0": x0, "noise": noise, "v": a * noise - b * x0, "velocity": noise - x0}[process.prediction]

  return predict


def path(process, time):
  a, b = process.coefficients(time)
  return a * MEAN + jnp.sqrt(a * a * STD * STD + b * b) * z


def grid(process, steps):
  """Even in time; squared for scaled_linear, whose noise rises with the root of time."""
  times = sampler_lib.times(steps)
  return times**2 if process.schedule == "scaled_linear" else times


def error(process, method, times):
  run = jax.jit(lambda x: sampler_lib.sample(exact_network(process), x, times, process, method))
  return float(jnp.abs(run(path(process, times[0])) - path(process, times[-1])).max())


def order(process, method, coarse, fine):
  ratio = error(process, method, coarse) / error(process, method, fine)
  return np.log(ratio) / np.log((len(fine) - 1) / (len(coarse) - 1))


@pytest.mark.parametrize(("method", "expected"), [("euler", 1), ("ddim", 1), ("heun", 2)])
@pytest.mark.parametrize("name", ["flow", "v", "v-scaled_linear"])
def test_order_of_convergence_from_noise_to_data(name, method, expected):
  process = PROCESSES[name]
  assert order(process, method, grid(process, 16), grid(process, 64)) == pytest.approx(expected, abs=0.12)


@pytest.mark.parametrize("name", ["flow", "v"])
def test_order_of_dpmpp_2m_where_its_theory_holds(name):
  """Even steps in log(a / b) between finite ends; the first step is of first order and its error is of second."""
  process = PROCESSES[name]
  fine = jnp.linspace(0.002, 0.998, 20001)
  a, b = process.coefficients(fine)
  log_ratio = jnp.log(a / b)
  even = lambda steps: jnp.interp(jnp.linspace(-3.0, 3.0, steps + 1), log_ratio[::-1], fine[::-1])
  assert order(process, "dpmpp_2m", even(16), even(64)) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("name", ["flow", "v", "v-scaled_linear"])
def test_dpmpp_2m_from_noise_to_data_beats_first_order(name):
  """From time 1 to 0 log(a / b) is infinite at both ends; order 2 up to a logarithm remains."""
  process = PROCESSES[name]
  assert order(process, "dpmpp_2m", grid(process, 64), grid(process, 256)) > 1.4
  assert error(process, "dpmpp_2m", grid(process, 64)) < error(process, "ddim", grid(process, 64)) / 5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["v", "x"])
def test_mean_and_variance_are_exact_in_the_limit(name, method):
  process = PROCESSES[name]
  noise = jax.random.normal(jax.random.key(0), (4096, 1))
  noise = (noise - noise.mean()) / noise.std()
  times = grid(process, 512)
  data = jax.jit(lambda x: sampler_lib.sample(exact_network(process), x, times, process, method))(noise)
  assert float(data.mean()) == pytest.approx(MEAN, abs=4e-3)
  assert float(data.std()) == pytest.approx(STD, abs=4e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_point_of_data_is_reached_exactly_in_any_number_of_steps(process, method, steps):
  """Data without spread: the path is a straight line to it. Step 1 starts where the signal is exactly 0."""
  times = sampler_lib.times(steps, shift=3.0)
  found = sampler_lib.sample(exact_network(process, std=0.0), z, times, process, method)
  np.testing.assert_allclose(found, MEAN, atol=2e-6)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_ddim_is_euler_in_straight_coordinates(process):
  network = lambda x, time: jnp.tanh(3 * x + time)  # any function at all
  times = sampler_lib.times(7, shift=2.0)
  euler, ddim = (sampler_lib.sample(network, z, times, process, method) for method in ("euler", "ddim"))
  np.testing.assert_allclose(euler, ddim, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["x0", "noise", "v"])
@pytest.mark.parametrize("method", ["heun", "dpmpp_2m"])
def test_what_the_network_predicts_does_not_matter(kind, method):
  """The same knowledge in four parameterisations; eps says nothing about x0 at time 1, so start just below it."""
  process = dataclasses.replace(PROCESSES["flow"], prediction=kind)
  times = jnp.linspace(0.99, 0.0, 9)
  found = sampler_lib.sample(exact_network(process), path(process, 0.99), times, process, method)
  expected = sampler_lib.sample(exact_network(PROCESSES["flow"]), path(process, 0.99), times, PROCESSES["flow"], method)
  np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(("method", "calls"), [("euler", 6), ("ddim", 6), ("dpmpp_2m", 6), ("heun", 11)])
def test_network_calls(method, calls):
  seen = []

  def predict(x, time):
    jax.debug.callback(lambda t: seen.append(float(t)), time)
    return x

  sampler_lib.sample(predict, z, sampler_lib.times(6), PROCESSES["flow"], method).block_until_ready()
  jax.effects_barrier()
  assert len(seen) == calls
  assert max(seen) == 1.0
  assert min(seen) > 0.0


def test_state_is_float32_whatever_comes_in_and_goes_out():
  predict = lambda x, time: x.astype(jnp.bfloat16)
  found = sampler_lib.sample(predict, z.astype(jnp.bfloat16), sampler_lib.times(3), PROCESSES["flow"], "heun")
  assert found.dtype == jnp.float32


def test_stops_at_the_last_time():
  process = PROCESSES["flow"]
  times = sampler_lib.times(400)[:201]
  found = sampler_lib.sample(exact_network(process), z, times, process, "heun")
  np.testing.assert_allclose(found, path(process, 0.5), atol=1e-4)


@pytest.mark.parametrize("shift", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_time_grid(steps, shift):
  times = np.asarray(sampler_lib.times(steps, shift))
  assert times.shape == (steps + 1,)
  assert times[0] == 1.0
  assert times[-1] == 0.0
  assert (np.diff(times) < 0).all()


def test_wrong_settings_are_named():
  with pytest.raises(ConfigError, match="at least 1 step"):
    sampler_lib.times(0)
  with pytest.raises(ConfigError, match="did you mean 'dpmpp_2m'"):
    sampler_lib.sample(lambda x, t: x, z, sampler_lib.times(2), PROCESSES["flow"], "dpmpp2m")
