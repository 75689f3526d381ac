"""Times of training samples: one independent draw per typed key, whatever the batch split, accumulation or mesh.

Time runs from 0 (data) to 1 (noise). Training has no stratified draw: it would tie the times of a batch together. The
fixed rows of a validation table have one (`stratified`): nothing is drawn there, and the loss depends on time more than
on anything else.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kling_jax.errors import ConfigError, nearest

_NAMES = ("uniform", "logit_normal")


def sample(
  keys_B: jax.Array,
  name: str,
  *,
  shape: tuple[int, ...] = (),
  shift: float = 1.0,
  mean: float = 0.0,
  std: float = 1.0,
) -> jax.Array:
  """Draws training times in [0, 1], float32 (B, *shape); row b depends on keys_B[b] alone.

  Args:
    keys_B: typed keys, one a sample (nn/rng.py).
    name: "uniform", or "logit_normal": sigmoid(mean + std n) for a standard normal n (Esser et al. 2024, section 3.1).
    shape: further axes, e.g. (T,) for an independent time for each latent frame.
    shift: moves mass towards noise, see `shift_time`; 1 leaves the draw as it is.
    mean, std: of the logit-normal draw.

  Raises:
    ConfigError: unknown name, or a shift or std that is not positive.
  """
  if name not in _NAMES:
    raise ConfigError(f"unknown time sampling {name!r}{nearest(name, _NAMES)}")
  if not std > 0:
    raise ConfigError(f"std of logit-normal times must be positive, not {std}")
  if name == "uniform":
    # (0, 1], not [0, 1): pure noise is a point that samplers visit, clean data is one that teaches nothing.
    time = 1 - jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32))(keys_B)
  else:
    time = jax.nn.sigmoid(mean + std * jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys_B))
  return shift_time(time, shift)


def place(index_B: ArrayLike) -> jax.Array:
  """A point of (0, 1) for each row number, float32 (B,): frac(row * golden ratio + 1/2), a Weyl sequence.

  Any run of consecutive rows is spread evenly, so that the mean of a function over n rows misses its integral by
  O(log n / n) and not by O(1 / sqrt(n)). In 32-bit integers, hence the same on every device.
  """
  golden = jnp.asarray(index_B, jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(0x80000000)
  return (golden >> 8).astype(jnp.float32) * 2.0**-24 + 2.0**-25


def stratified(index_B: ArrayLike, name: str, *, shift: float = 1.0, mean: float = 0.0, std: float = 1.0) -> jax.Array:
  """The time of each row of a fixed table, float32 (B,): the quantiles of `sample`'s distribution at `place`."""
  if name not in _NAMES:
    raise ConfigError(f"unknown time sampling {name!r}{nearest(name, _NAMES)}")
  u_B = place(index_B)
  time_B = u_B if name == "uniform" else jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(u_B))
  return shift_time(time_B, shift)


def shift_time(time: jax.Array | float, shift: float) -> jax.Array:
  """Returns s t / (1 + (s - 1) t): noise-to-signal odds t / (1 - t) multiplied by s (Esser et al. 2024, section 5.3.2).

  Keeps 0 and 1, rises strictly, and composes: shifting by s and then by r is shifting by r s. More tokens need a larger
  shift, because the same noise hides less of a larger picture.
  """
  if not shift > 0:
    raise ConfigError(f"time shift must be positive, not {shift}; 1 leaves times as they are, above 1 favours noise")
  time = jnp.asarray(time, jnp.float32)
  # Equal to s t / (1 + (s - 1) t), and exactly 1 at time 1 for every shift.
  return shift * time / (shift * time + (1 - time))
