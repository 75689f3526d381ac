"""Times of training samples: one independent draw per typed key, whatever the batch split, accumulation or mesh.

Time runs from 0 (data) to 1 (noise). There is no stratified draw: it would tie the times of a batch together.
"""

import jax
import jax.numpy as jnp

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
