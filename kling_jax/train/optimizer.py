"""Learning-rate schedules and AdamW over flat parameter dicts."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from kling_jax.errors import ConfigError, nearest

SCHEDULES = ("constant", "wsd", "cosine")


def schedule(config: ml_collections.ConfigDict, steps: int, lr: jax.Array | float | None = None) -> optax.Schedule:
  """Learning rate by update count, after a linear warm-up of `config.warmup` updates to `lr` (`config.lr` if omitted).

  constant: stays at the peak (read any horizon from one run with the EMA weights).
  wsd: stable, then peak * (1 - sqrt(progress)) over the last `config.decay` share (Haegele et al. 2024).
  cosine: half a cosine to zero.

  Raises:
    ConfigError: unknown schedule name.
  """
  if config.schedule not in SCHEDULES:
    raise ConfigError(f"config key 'optimizer.schedule' = {config.schedule!r} is unknown"
                      f"{nearest(config.schedule, SCHEDULES)}")  # fmt: skip
  warmup = min(config.warmup, steps)
  rest = max(steps - warmup, 1)
  decay = max(round(config.decay * steps), 1)
  peak = config.lr if lr is None else lr

  def rate(count: jax.Array) -> jax.Array:
    count = jnp.asarray(count, jnp.float32)
    ramp = jnp.minimum((count + 1) / max(warmup, 1), 1.0)
    if config.schedule == "cosine":
      shape = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((count - warmup) / rest, 0, 1)))
    elif config.schedule == "wsd":
      shape = 1 - jnp.sqrt(jnp.clip((count - (steps - decay)) / decay, 0, 1))
    else:
      shape = jnp.ones_like(count)
    return peak * ramp * shape

  return rate


def make(
  config: ml_collections.ConfigDict,
  steps: int,
  lr_scale: Callable[[str], float],
  lr: jax.Array | float | None = None,
) -> optax.GradientTransformation:
  """AdamW with a per-parameter learning-rate multiplier; clipping is done by the step, which reports the norm.

  `lr` is the peak learning rate (`config.lr` if omitted).

  Weight decay is decoupled and acts on parameters of two or more dimensions beyond the stacked layers' own, that is
  on kernels, and neither on norms nor on biases nor on tables.
  """

  def decayed(params: Mapping[str, Any]) -> dict[str, bool]:
    return {name: name.endswith("kernel") for name in params}

  def scale_each(updates: Mapping[str, jax.Array], *_: Any) -> dict[str, jax.Array]:
    return {name: update * lr_scale(name) for name, update in updates.items()}

  parts = [
    optax.scale_by_adam(b1=config.b1, b2=config.b2),
    optax.add_decayed_weights(config.weight_decay, mask=decayed) if config.weight_decay else optax.identity(),
    optax.stateless(scale_each),
    optax.scale_by_learning_rate(schedule(config, steps, lr)),
  ]
  return optax.chain(*parts)
