"""Samplers: from noise at time 1 to data at time 0 with few network calls, in one `lax.scan`.

All of them see the network only through its estimates of x0 and eps, so each works with every process. One step goes
from (a, b) at time t to (a', b') at the next, smaller time. For the flow process a = 1 - t and b = t.

  euler     y' = y + (u' - u) velocity in the straight coordinates y = x / (a + b), u = b / (a + b)       order 1
  heun      the same, with the mean of the velocities at both ends of the step; the last step is Euler's, because at
            time 0 x_t says nothing about eps (Karras et al. 2022, algorithm 1); 2 n - 1 network calls    order 2
  ddim      x' = a' x0 + b' eps (Song et al. 2020, eta = 0). The same step as euler, written otherwise     order 1
  dpmpp_2m  x' = (b' / b) x - a' (exp(-h) - 1) D, where D = x0 + (h / (2 h_last)) (x0 - x0_last) and h is the step in
            lambda = log(a / b) (Lu et al. 2022, DPM-Solver++ algorithm 2). Where a lambda of the step or of the last
            one is infinite (at times 1 and 0) the correction has no meaning and D = x0                    order 2

With exp(-h) = (a b') / (a' b) the last one is x' = (b' / b) (x - a D) + a' D: finite at both ends.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kling_jax.diffusion import time as time_lib
from kling_jax.diffusion.process import Estimate, Process
from kling_jax.errors import ConfigError, nearest

Predict = Callable[[jax.Array, jax.Array], jax.Array]
Remembering = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
_Estimate = Callable[[jax.Array, jax.Array, Any], tuple[Estimate, Any]]
_Row = dict[str, jax.Array]
_Carry = tuple[jax.Array, jax.Array, Any]  # x, the last estimate of x0, the network's memory


def times(steps: int, shift: float = 1.0) -> jax.Array:
  """Returns the grid of `steps` steps from exactly 1 to exactly 0, float32 (steps + 1,), evenly spaced, then shifted.

  It starts at pure noise (Lin et al. 2023, section 3.3, "trailing"), where the zero-terminal-SNR processes were
  trained too.

  Raises:
    ConfigError: fewer than one step, or a shift that is not positive.
  """
  if steps < 1:
    raise ConfigError(f"sampling needs at least 1 step, not {steps}")
  return time_lib.shift_time(jnp.linspace(1.0, 0.0, steps + 1), shift)


def sample(predict: Predict, noise: jax.Array, times: jax.Array, process: Process, method: str = "euler") -> jax.Array:
  """Integrates from `noise` at times[0] to times[-1]; with the grid of `times` that is a sample of the data.

  Args:
    predict: (x float32 in the shape of `noise`, time float32 scalar) -> the raw output of the network, in the unit of
      `process.prediction`. Guidance and conditions are already inside (guidance.py).
    noise: standard normal, (B, T, H, W, C); the state stays float32.
    times: (steps + 1,), strictly falling, in [0, 1].
    process: what the network was trained on.
    method: "euler", "heun", "ddim" or "dpmpp_2m".

  Returns:
    The state at times[-1], float32, in the shape of `noise`.

  Raises:
    ConfigError: an unknown method.
  """
  forgetful = lambda x, time, memory: (predict(x, time), memory)
  return sample_remembering(forgetful, noise, times, process, method, ())[0]


def sample_remembering(
  predict: Remembering, noise: jax.Array, times: jax.Array, process: Process, method: str, memory: Any
) -> tuple[jax.Array, Any]:
  """`sample` with a network that is handed on what its last call left behind.

  Args:
    predict: (x, time, memory) -> (raw output, memory of the same shapes).
    noise, times, process, method: as in `sample`.
    memory: any pytree of arrays, for the first call.

  Returns:
    The state at times[-1], and what the last call left.
  """
  if method not in _STEPS:
    raise ConfigError(f"unknown sampler {method!r}{nearest(method, _STEPS)}")
  step = _STEPS[method]

  def estimate(x: jax.Array, time: jax.Array, memory: Any) -> tuple[Estimate, Any]:
    output, memory = predict(x, time, memory)
    return process.estimate(output, x, time), memory

  def body(carry: _Carry, row: _Row) -> tuple[_Carry, None]:
    return step(estimate, *carry, row), None

  x = noise.astype(jnp.float32)
  (x, _, memory), _ = jax.lax.scan(body, (x, jnp.zeros_like(x), memory), _rows(times, process))
  return x, memory


def calls(steps: int, method: str) -> int:
  """Network calls of `steps` steps that end at time 0."""
  return 2 * steps - 1 if method == "heun" else steps


def _rows(times: jax.Array, process: Process) -> _Row:
  """The scalars of each step: times, coefficients at both ends, and the factor h / (2 h_last) of dpmpp_2m."""
  times = jnp.asarray(times, jnp.float32)
  a, b = process.coefficients(times)
  finite = (a > 0) & (b > 0)
  log_snr = jnp.where(finite, jnp.log(jnp.where(finite, a, 1.0)) - jnp.log(jnp.where(finite, b, 1.0)), 0.0)
  h = jnp.diff(log_snr)
  known = finite[:-1] & finite[1:]
  usable = known[1:] & known[:-1]
  correction = jnp.where(usable, h[1:] / (2 * jnp.where(usable, h[:-1], 1.0)), 0.0)
  return {
    "time": times[:-1],
    "time_next": times[1:],
    "a": a[:-1],
    "b": b[:-1],
    "a_next": a[1:],
    "b_next": b[1:],
    "correction": jnp.concatenate([jnp.zeros(1), correction]),
  }


def _straight_step(x: jax.Array, velocity: jax.Array, row: _Row) -> jax.Array:
  norm, norm_next = row["a"] + row["b"], row["a_next"] + row["b_next"]
  return norm_next * (x / norm + (row["b_next"] / norm_next - row["b"] / norm) * velocity)


def _euler(estimate: _Estimate, x: jax.Array, x0_last: jax.Array, memory: Any, row: _Row) -> _Carry:
  here, memory = estimate(x, row["time"], memory)
  return _straight_step(x, here.velocity, row), here.x0, memory


def _heun(estimate: _Estimate, x: jax.Array, x0_last: jax.Array, memory: Any, row: _Row) -> _Carry:
  here, memory = estimate(x, row["time"], memory)
  guess = _straight_step(x, here.velocity, row)

  def mean_velocity() -> tuple[jax.Array, Any]:
    there, left = estimate(guess, row["time_next"], memory)
    return (here.velocity + there.velocity) / 2, left

  velocity, memory = jax.lax.cond(row["b_next"] > 0, mean_velocity, lambda: (here.velocity, memory))
  return _straight_step(x, velocity, row), here.x0, memory


def _ddim(estimate: _Estimate, x: jax.Array, x0_last: jax.Array, memory: Any, row: _Row) -> _Carry:
  here, memory = estimate(x, row["time"], memory)
  return row["a_next"] * here.x0 + row["b_next"] * here.noise, here.x0, memory


def _dpmpp_2m(estimate: _Estimate, x: jax.Array, x0_last: jax.Array, memory: Any, row: _Row) -> _Carry:
  here, memory = estimate(x, row["time"], memory)
  x0 = here.x0 + row["correction"] * (here.x0 - x0_last)
  return row["b_next"] / row["b"] * (x - row["a"] * x0) + row["a_next"] * x0, here.x0, memory


_STEPS = {"euler": _euler, "heun": _heun, "ddim": _ddim, "dpmpp_2m": _dpmpp_2m}
