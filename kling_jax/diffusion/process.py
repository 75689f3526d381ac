"""Processes: how data becomes noise, what the network predicts of it, and how every quantity follows from another.

Every process here mixes data x0 with standard normal noise eps, at a time t from 0 (data) to 1 (noise):

  x_t = a(t) x0 + b(t) eps

  schedule        a(t)                       b(t)              source
  straight        1 - t                      t                 rectified flow (Liu et al. 2022, Lipman et al. 2022)
  cosine          cos(pi t / 2)              sin(pi t / 2)     Nichol & Dhariwal 2021 without offset
  scaled_linear   (A(t) - A(1)) / (1 - A(1)) sqrt(1 - a^2)     Lin et al. 2023 section 3.1, see `_scaled_linear`

All three have a(0) = 1, b(0) = 0, a(1) = 0, b(1) = 1 to the last bit: x_0 is the data and x_1 is pure noise, so the
signal-to-noise ratio a^2 / b^2 is exactly 0 where sampling starts (Lin et al. 2023 show what goes wrong otherwise).

The network predicts one of four quantities. Given x_t, each fixes all the others:

  x0
  noise       eps
  v           a eps - b x0      (Salimans & Ho 2022)
  velocity    eps - x0          d x_t / d t of the straight schedule

  from v          x0 = (a x_t - b v) / (a^2 + b^2)      eps = (b x_t + a v) / (a^2 + b^2)
  from velocity   x0 = (x_t - b velocity) / (a + b)     eps = (x_t + a velocity) / (a + b)
  from x0         eps = (x_t - a x0) / b
  from noise      x0 = (x_t - b eps) / a

Velocity keeps its meaning under every schedule: y = x_t / (a + b) runs along the straight path (1 - u) x0 + u eps with
u = b / (a + b), and dy/du = eps - x0. The samplers integrate in these straight coordinates.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from kling_jax.errors import ConfigError, nearest

Prediction = Literal["x0", "noise", "v", "velocity"]

# Below this coefficient x_t carries no usable trace of the factor that it multiplies: float32 resolves 6e-8.
UNDETERMINED = 1e-6

# The betas of Stable Diffusion and DynamiCrafter: square root linear from 0.00085 to 0.012 over 1000 steps.
_BETA_START, _BETA_END, _BETA_STEPS = 0.00085, 0.012, 1000


class Estimate(NamedTuple):
  """All that one prediction says about a sample; float32 arrays of the sample's shape."""

  x0: jax.Array
  noise: jax.Array
  velocity: jax.Array
  v: jax.Array


def expand(time: jax.Array | float, like: jax.Array) -> jax.Array:
  """Appends axes of size 1 to a time of shape (), (B,) or (B, T), so that it multiplies `like` (B, T, H, W, C)."""
  time = jnp.asarray(time)
  lead = like.shape[: time.ndim]
  if len(lead) != time.ndim or any(t not in (1, n) for t, n in zip(time.shape, lead, strict=True)):
    raise ValueError(
      f"time of shape {time.shape} does not lead an array of shape {like.shape}; give (), (B,) or (B, T)"
    )
  return time.reshape(time.shape + (1,) * (like.ndim - time.ndim))


@dataclasses.dataclass(frozen=True)
class Process:
  """A schedule, the quantity that the network predicts, and the weight of its squared error; made by `make`.

  Frozen and hashable, so that it may be a static argument or live in a closure under jit. Times are float32 in [0, 1]
  of shape (), (B,) or (B, T) against arrays (B, T, H, W, C); all results are float32.

  Attributes:
    name: what `make` calls it.
    prediction: the quantity that the network's output is.
    schedule: "straight", "cosine" or "scaled_linear".
    ramp: weight the loss by 0.9 (1 - t) + 0.1 (the ramp of Dreamer 4, whose signal level is 1 - t); else by 1.
  """

  name: str
  prediction: Prediction
  schedule: str = "straight"
  ramp: bool = False

  def coefficients(self, time: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Returns a(t) and b(t), in the shape of `time`."""
    return _SCHEDULES[self.schedule](jnp.asarray(time, jnp.float32))

  def snr(self, time: jax.Array | float) -> jax.Array:
    """The signal-to-noise ratio a^2 / b^2: infinite at time 0, exactly 0 at time 1."""
    a, b = self.coefficients(time)
    return jnp.square(a / b)

  def corrupt(self, x0: jax.Array, noise: jax.Array, time: jax.Array | float) -> jax.Array:
    """Returns x_t = a x0 + b eps."""
    a, b = self.coefficients(expand(time, x0))
    return a * x0.astype(jnp.float32) + b * noise.astype(jnp.float32)

  def target(self, x0: jax.Array, noise: jax.Array, time: jax.Array | float) -> jax.Array:
    """Returns what the network should predict for x_t = corrupt(x0, noise, time)."""
    a, b = self.coefficients(expand(time, x0))
    return getattr(_complete(x0.astype(jnp.float32), noise.astype(jnp.float32), a, b), self.prediction)

  def estimate(self, prediction: jax.Array, x_t: jax.Array, time: jax.Array | float) -> Estimate:
    """Converts the network's output at (x_t, time) to all four quantities; see the head of this file."""
    return convert(prediction, self.prediction, x_t, *self.coefficients(expand(time, x_t)))

  def weight(self, time: jax.Array | float) -> jax.Array:
    """The weight of the squared error of `prediction` at `time`, in the shape of `time`."""
    time = jnp.asarray(time, jnp.float32)
    return 0.9 * (1 - time) + 0.1 if self.ramp else jnp.ones_like(time)


def convert(prediction: jax.Array, kind: Prediction, x_t: jax.Array, a: jax.Array, b: jax.Array) -> Estimate:
  """Solves x_t = a x0 + b eps together with a prediction of one `kind` for all four quantities.

  v and velocity determine x0 and eps at every time. A prediction of x0 leaves eps open where b = 0, and one of eps
  leaves x0 open where a = 0; there the open one is taken as 0, its mean. Values and gradients are finite everywhere.
  """
  prediction, x_t = prediction.astype(jnp.float32), x_t.astype(jnp.float32)
  match kind:
    case "x0":
      return _complete(prediction, _quotient(x_t - a * prediction, b), a, b)
    case "noise":
      return _complete(_quotient(x_t - b * prediction, a), prediction, a, b)
    case "v":
      norm = a * a + b * b
      return _complete((a * x_t - b * prediction) / norm, (b * x_t + a * prediction) / norm, a, b)
    case "velocity":
      norm = a + b
      return _complete((x_t - b * prediction) / norm, (x_t + a * prediction) / norm, a, b)
    case _:
      raise ValueError(f"unknown prediction {kind!r}; known: x0, noise, v, velocity")


def make(name: str, *, schedule: str | None = None) -> Process:
  """Makes a process by name.

  Args:
    name: "flow" predicts the velocity of the straight schedule, weight 1. "v" predicts v of a variance-preserving
      schedule with zero terminal signal-to-noise ratio, weight 1. "x" predicts x0 on the straight schedule, weight
      0.9 (1 - t) + 0.1.
    schedule: for "v" only: "cosine" (default), or "scaled_linear" for weights that were trained on Stable
      Diffusion's betas rescaled to zero terminal SNR (DynamiCrafter).

  Raises:
    ConfigError: an unknown name, or a schedule that the process does not have.
  """
  legal = {"flow": ("straight",), "v": ("cosine", "scaled_linear"), "x": ("straight",)}
  if name not in legal:
    raise ConfigError(f"unknown diffusion process {name!r}{nearest(name, legal)}")
  schedule = legal[name][0] if schedule is None else schedule
  if schedule not in legal[name]:
    raise ConfigError(f"diffusion process {name!r} has no schedule {schedule!r}; legal: {', '.join(legal[name])}")
  match name:
    case "flow":
      return Process(name, "velocity", schedule)
    case "v":
      return Process(name, "v", schedule)
    case _:
      return Process(name, "x0", schedule, ramp=True)


def _complete(x0: jax.Array, noise: jax.Array, a: jax.Array, b: jax.Array) -> Estimate:
  return Estimate(x0, noise, noise - x0, a * noise - b * x0)


def _quotient(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  # Both branches stay finite, so that the gradient of the unused one is not NaN.
  determined = denominator > UNDETERMINED
  return jnp.where(determined, numerator / jnp.where(determined, denominator, 1.0), 0.0)


def _straight(time: jax.Array) -> tuple[jax.Array, jax.Array]:
  return 1 - time, time


def _cosine(time: jax.Array) -> tuple[jax.Array, jax.Array]:
  # cos(pi/2) is -4e-8 in float32; the sine of the complement is exactly 0 there.
  return jnp.sin(0.5 * math.pi * (1 - time)), jnp.sin(0.5 * math.pi * time)


def _scaled_linear(time: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Stable Diffusion's schedule in continuous time, rescaled to zero terminal SNR (Lin et al. 2023, algorithm 1).

  The betas beta(s) = (r0 + s (r1 - r0))^2 with r0^2 = 0.00085 and r1^2 = 0.012 over n = 1000 steps have the limit
  A(t) = sqrt(alpha_bar(t)) = exp(-G(t) / 2), where G(t) is n times the integral of beta from 0 to t, that is
  n t (q^2 + q r0 + r0^2) / 3 with q = r0 + t (r1 - r0). (The product over discrete steps differs from it by terms of
  the size of beta.) The rescale shifts A(1) to 0 and keeps A(0) = 1: a = (A(t) - A(1)) / (1 - A(1)), b = sqrt(1 - a^2).
  Written with expm1 of G(t) and of G(1) - G(t) = n (1 - t) (r1^2 + r1 q + q^2) / 3, so that neither end loses digits.
  """
  r0, r1 = math.sqrt(_BETA_START), math.sqrt(_BETA_END)
  total = _BETA_STEPS * (r1 * r1 + r1 * r0 + r0 * r0) / 3
  q = r0 + time * (r1 - r0)
  gone = _BETA_STEPS * time * (q * q + q * r0 + r0 * r0) / 3
  left = _BETA_STEPS * (1 - time) * (r1 * r1 + r1 * q + q * q) / 3
  one_minus_a = -jnp.expm1(-gone / 2) / -math.expm1(-total / 2)
  a = jnp.where(time < 0.5, 1 - one_minus_a, jnp.expm1(left / 2) / math.expm1(total / 2))
  return a, jnp.sqrt(one_minus_a * (1 + a))


_SCHEDULES = {"straight": _straight, "cosine": _cosine, "scaled_linear": _scaled_linear}
