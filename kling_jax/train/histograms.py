"""Histograms of parameters and of their gradients, for trackers: a second program beside the step, run now and then."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from kling_jax.errors import ConfigError
from kling_jax.train.metrics import Histograms
from kling_jax.train.state import State, Update
from kling_jax.train.task import Batch

BINS = 64


class Watch:
  """Every `log.histograms` steps: the trained parameters before an update, and the gradients that it is made of.

  It costs a forward and a backward pass beside the step's own, and its program is compiled at the first use. All
  processes of a job run it, one writes.

  Raises:
    ConfigError: no tracker is there to take them.
  """

  def __init__(self, config: ml_collections.ConfigDict, update: Update):
    self._every = config.log.histograms
    if self._every and not (config.log.tensorboard or config.log.wandb):
      raise ConfigError("config key 'log.histograms' needs log.tensorboard or log.wandb, which show them")
    self._program = jax.jit(lambda state, batch: _both(update, state, batch))

  def at(self, step: int, state: State, batch: Batch) -> Histograms:
    """{"parameters/PATH" and "gradients/PATH": (counts, edges)} of the update that follows `step`; {} between them."""
    if not self._every or step % self._every:
      return {}
    found = jax.device_get(self._program(state, batch))
    return {name: (np.asarray(counts), np.asarray(edges, np.float64)) for name, (counts, edges) in found.items()}


def _both(update: Update, state: State, batch: Batch) -> dict[str, Any]:
  _, gradient = update.loss_and_gradient(state, batch)
  trained = {path: state["params"][path] for path in update.trained}
  both = {f"parameters/{path}": value for path, value in trained.items()}
  both |= {f"gradients/{path}": value for path, value in gradient.items()}
  return {name: histogram(value) for name, value in both.items()}


def histogram(value: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(counts int32 (BINS,), edges float32 (BINS + 1,)) over equal bins from the least to the largest value.

  What is not finite is left out of both; equal values stand in one bin of a width of their own.
  """
  value = value.astype(jnp.float32).ravel()
  finite = jnp.isfinite(value)
  low = jnp.min(value, initial=jnp.inf, where=finite)
  high = jnp.max(value, initial=-jnp.inf, where=finite)
  low, high = jnp.where(low > high, 0.0, low), jnp.where(low > high, 0.0, high)
  width = jnp.where(high > low, high - low, jnp.maximum(jnp.abs(high) * 1e-3, 1e-12))
  place = jnp.clip(((value - low) / width * BINS).astype(jnp.int32), 0, BINS - 1)
  counts = jnp.zeros(BINS, jnp.int32).at[jnp.where(finite, place, 0)].add(finite.astype(jnp.int32))
  return counts, low + width * jnp.arange(BINS + 1) / BINS
