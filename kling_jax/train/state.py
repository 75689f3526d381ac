"""The training state and its one pure update: gradients, guard, AdamW, EMA."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kling_jax.errors import ConfigError, nearest
from kling_jax.nn import rng
from kling_jax.nn.params import Params
from kling_jax.train import attention, optimizer, sharding
from kling_jax.train.task import PRECISIONS, Batch, Task

State = dict[str, Any]
GUARD_MEMORY = 0.98  # of the running mean and variance of the loss


class Update:
  """The jitted pieces of training one task on one mesh.

  The state is a plain dict: `params` (all of them), `ema` (the trained ones), `opt`, `step` (updates tried, which is
  also the data position), `key`, `guard`. Gradients and optimiser state exist for trained parameters only.

  The learning rate is an argument of the compiled step and not a constant in it: runs that differ in it share one
  program, which matters in sweeps, where compiling costs more than training.
  """

  def __init__(self, task: Task, mesh: Mesh):
    config = task.config
    self.task, self.mesh, self.config = task, mesh, config
    self.trained = [path for path in task.shapes if task.trainable(path)]
    if not self.trained:
      raise ConfigError(f"task {config.task!r} trains no parameter under this config")
    sharding.check(mesh.shape, task.shapes, task.axes, task.extents())
    self.attention = attention.Choice.of(config)
    self.gradient = _gradient_dtype(config)
    self.parameter_shardings = sharding.parameter_shardings(mesh, task.shapes, task.axes)
    self.abstract = jax.eval_shape(lambda: self._fresh(_zeros(task.shapes)))
    self.shardings = sharding.like_parameters(mesh, self.abstract, self.parameter_shardings)
    self.working = self.shardings["opt"]  # where the update needs the optimiser's state
    if config.optimizer.offload:
      self.shardings["opt"] = sharding.on_host(mesh, self.abstract["opt"], self.working)
    rows = sharding.batch_sharding(mesh)
    everywhere = NamedSharding(mesh, P())
    self.program = jax.jit(
      self._step,
      donate_argnums=0,
      in_shardings=(self.shardings, rows, everywhere),
      out_shardings=(self.shardings, everywhere),
    )
    self.evaluate = jax.jit(self._evaluate, in_shardings=(self.parameter_shardings, rows), out_shardings=everywhere)

  @functools.cached_property
  def lr(self) -> jax.Array:
    return jax.device_put(np.float32(self.config.optimizer.lr), NamedSharding(self.mesh, P()))

  def step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    """One update; consumes `state`."""
    return self.program(state, batch, self.lr)

  def fresh(self, params: Params) -> State:
    """The state before the first update, around (and consuming) `params`."""
    return jax.jit(self._fresh, donate_argnums=0, out_shardings=self.shardings)(params)

  def averaged(self, state: State) -> Params:
    """All parameters, the trained ones as their EMA; what validation and sampling use."""
    return {**state["params"], **state["ema"]}

  def _fresh(self, params: Params) -> State:
    trained = {path: params[path] for path in self.trained}
    zero = jnp.zeros((), jnp.float32)
    count = jnp.zeros((), jnp.int32)
    return {
      "params": params,
      "ema": jax.tree.map(jnp.copy, trained),
      "opt": self._tx(self.config.optimizer.lr).init(trained),
      "step": count,
      "key": jax.random.key(self.config.seed),
      "guard": {"mean": zero, "variance": zero, "updates": count, "skipped": count, "streak": count},
    }

  def _tx(self, lr: jax.Array | float) -> optax.GradientTransformation:
    return optimizer.make(self.config.optimizer, self.config.steps, self.task.lr_scale, lr)

  def loss_and_gradient(self, state: State, batch: Batch) -> tuple[tuple[jax.Array, dict[str, Any]], Params]:
    """((loss, metrics), {path: gradient of a trained parameter}) of the update that `state` is about to make."""
    with sharding.activations(self.mesh, self.gradient, self.attention):
      keys_B = rng.sample_keys(state["key"], state["step"], batch["index"])
      trained = {path: state["params"][path] for path in self.trained}
      frozen = {path: value for path, value in state["params"].items() if path not in trained}
      loss_of = lambda trained, rows, keys: self.task.loss({**trained, **frozen}, rows, keys)
      return accumulated(loss_of, self.config.optimizer.accumulate)(trained, batch, keys_B)

  def _step(self, state: State, batch: Batch, lr: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    (loss, metrics), gradient = self.loss_and_gradient(state, batch)
    trained = {path: state["params"][path] for path in self.trained}
    frozen = {path: value for path, value in state["params"].items() if path not in trained}

    norm = optax.tree.norm(gradient)
    clip = self.config.optimizer.clip
    scale = jnp.minimum(1.0, clip / jnp.maximum(norm, 1e-12)) if clip else 1.0
    gradient = jax.tree.map(lambda g: g * scale, gradient)
    accept, guard = watch(state["guard"], loss, norm, self.config.guard)

    held = jax.device_put(state["opt"], self.working) if self.config.optimizer.offload else state["opt"]
    updates, opt = self._tx(lr).update(gradient, held, trained)
    new = optax.apply_updates(trained, updates)
    decay = ema_decay(self.config.ema.decay, state["guard"]["updates"])
    ema = jax.tree.map(lambda average, value: average + (1 - decay) * (value - average), state["ema"], new)
    keep = lambda fresh, old: jax.tree.map(lambda a, b: jnp.where(accept, a, b), fresh, old)
    rate = optimizer.schedule(self.config.optimizer, self.config.steps, lr)
    metrics = {**metrics, "loss": loss, "grad_norm": norm, "lr": rate(state["guard"]["updates"])}
    metrics |= {"skipped": guard["skipped"], "streak": guard["streak"]}
    return {
      "params": {**frozen, **keep(new, trained)},
      "ema": keep(ema, state["ema"]),
      "opt": keep(opt, held),
      "step": state["step"] + 1,
      "key": state["key"],
      "guard": guard,
    }, metrics

  def _evaluate(self, params: Params, batch: Batch) -> jax.Array:
    """Loss of each row (B,) at the time and noise that the row number fixes, whatever the run's seed."""
    with sharding.activations(self.mesh, choice=self.attention):
      keys_B = rng.sample_keys(jax.random.key(0), 0, batch["index"])
      return self.task.losses(params, batch, keys_B, train=False)[0]


def accumulated(loss_of: Callable[..., Any], parts: int) -> Callable[..., Any]:
  """value_and_grad of `loss_of(params, rows, keys) -> (loss, metrics)`, averaged over `parts` equal micro-batches.

  Micro-batch m holds the rows r with r % parts == m, so that rows which lie on one device stay there.
  """
  gradient = jax.value_and_grad(loss_of, has_aux=True)
  if parts == 1:
    return gradient

  def micro(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

  def run(params: Params, batch: Batch, keys_B: jax.Array) -> Any:
    def body(total: Any, rows: Any) -> tuple[Any, None]:
      return jax.tree.map(jnp.add, total, gradient(params, *rows)), None

    slices = jax.tree.map(micro, (batch, keys_B))
    shapes = jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], slices))
    total, _ = jax.lax.scan(body, _zeros(shapes), slices)
    return jax.tree.map(lambda x: x / parts, total)

  return run


def _gradient_dtype(config: ml_collections.ConfigDict) -> Any:
  name = config.optimizer.gradient
  if name not in PRECISIONS:
    raise ConfigError(f"config key 'optimizer.gradient' = {name!r} is unknown{nearest(name, PRECISIONS)}")
  if name != "float32" and config.precision == "float32":
    raise ConfigError(f"config key 'optimizer.gradient' = {name!r} needs precision = 'bfloat16'; or leave it")
  return PRECISIONS[name]


def ema_decay(decay: float, updates: jax.Array) -> jax.Array:
  """min(decay, (1 + n) / (10 + n)): young averages forget their start, long runs use `decay`."""
  n = updates.astype(jnp.float32)
  return jnp.minimum(decay, (1 + n) / (10 + n))


def watch(
  guard: Mapping[str, jax.Array], loss: jax.Array, norm: jax.Array, config: ml_collections.ConfigDict
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Decides whether an update is applied, and advances the running loss statistics.

  An update is refused when its loss or gradient norm is not finite, or when its loss lies `spike_sigmas` running
  standard deviations above the running mean. A spike enters the statistics clipped to that bound, so that a lasting
  change of level is followed instead of being refused for ever.

  Returns:
    (accept, new guard state).
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  bound = guard["mean"] + config.spike_sigmas * jnp.sqrt(guard["variance"])
  armed = (guard["updates"] >= config.after) & (config.spike_sigmas > 0)
  accept = finite & ~(armed & (loss > bound))
  seen = jnp.where(armed, jnp.minimum(loss, bound), loss)
  # The plain average over the first updates, then an exponential one.
  memory = jnp.minimum(GUARD_MEMORY, guard["updates"] / (guard["updates"] + 1.0))
  mean = memory * guard["mean"] + (1 - memory) * seen
  variance = memory * (guard["variance"] + (1 - memory) * (seen - guard["mean"]) ** 2)
  refused = (~accept).astype(jnp.int32)
  return accept, {
    "mean": jnp.where(finite, mean, guard["mean"]),
    "variance": jnp.where(finite, variance, guard["variance"]),
    "updates": guard["updates"] + 1 - refused,
    "skipped": guard["skipped"] + refused,
    "streak": (guard["streak"] + 1) * refused,
  }


def _zeros(tree: Any) -> Any:
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
