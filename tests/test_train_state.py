"""The update: accumulation, EMA, clipping, guard and schedules against closed forms on a linear model."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from kling_jax.errors import ConfigError, MeshError
from kling_jax.nn import params as params_lib
from kling_jax.nn import rng
from kling_jax.train import optimizer, sharding
from kling_jax.train.defaults import trainer
from kling_jax.train.state import Update, ema_decay, watch
from kling_jax.train.task import Task, digests

WIDTH, ROWS = 8, 8


class Linear(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.kernel = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, WIDTH)), axes=("embed", "mlp"))
    self.bias = nnx.Param(jnp.zeros(WIDTH), axes=("mlp",))


class Regression(Task):
  """y = x W + b + noise drawn per sample: enough randomness to notice a key that depends on the batch split."""

  def init(self, rngs: nnx.Rngs) -> Linear:
    return Linear(rngs)

  def batches(self, *_: Any) -> Any:
    raise AssertionError("not used")

  def losses(self, params, batch, keys_B, train):
    noise_BD = rng.normal(rng.stream(keys_B, "noise"), (WIDTH,))
    error_BD = batch["x"] @ params["kernel"] + params["bias"] + 0.1 * noise_BD - batch["y"]
    return jnp.mean(error_BD**2, axis=1), {}

  def step_cost(self, batch):
    return 0, 0.0


def config(**changes: Any) -> ml_collections.ConfigDict:
  c = trainer()
  c.task, c.steps = "regression", 100
  c.optimizer.warmup = 0
  for key, value in changes.items():
    c.update_from_flattened_dict({key.replace("__", "."): value})
  return c


def batch(scale: float = 1.0) -> dict[str, np.ndarray]:
  draw = np.random.default_rng(0)
  return {
    "x": draw.normal(size=(ROWS, WIDTH)).astype(np.float32),
    "y": scale * draw.normal(size=(ROWS, WIDTH)).astype(np.float32),
    "index": np.arange(ROWS, dtype=np.uint32),
  }


def start(c: ml_collections.ConfigDict, mesh=None, **kinds: Any):
  mesh = mesh or sharding.make_mesh({"replica": 1, "fsdp": 1, "context": 1, "tensor": 1}, jax.devices()[:1])
  task = type("Task", (Regression,), kinds)(c)
  update = Update(task, mesh)
  params = params_lib.create(lambda: task.init(nnx.Rngs(params=jax.random.key(1))), update.parameter_shardings)
  return update, update.fresh(params)


def run(update: Update, state: Any, rows: dict[str, np.ndarray], steps: int = 1) -> Any:
  for _ in range(steps):
    state, metrics = update.step(state, sharding.put_batch(update.mesh, rows))
  return state, jax.device_get(metrics)


def test_accumulated_micro_batches_equal_one_batch() -> None:
  whole, metrics = run(*start(config()), batch(), 3)
  for parts in (2, 4, 8):
    split, split_metrics = run(*start(config(optimizer__accumulate=parts)), batch(), 3)
    np.testing.assert_allclose(split_metrics["loss"], metrics["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), split["params"], whole["params"])


@pytest.mark.parametrize("axis", ["replica", "fsdp", "tensor"])
def test_each_mesh_axis_changes_nothing(axis: str) -> None:
  plain, metrics = run(*start(config()), batch(), 3)
  sizes = {"replica": 1, "fsdp": 1, "context": 1, "tensor": 1} | {axis: 8}
  spread, spread_metrics = run(*start(config(), sharding.make_mesh(sizes)), batch(), 3)
  np.testing.assert_allclose(spread_metrics["loss"], metrics["loss"], rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), spread["params"], plain["params"])
  if axis != "replica":
    assert spread["opt"][0].mu["kernel"].sharding.spec == spread["params"]["kernel"].sharding.spec
    assert len({str(shard.index) for shard in spread["ema"]["kernel"].addressable_shards}) == 8


def test_ema_follows_its_formula() -> None:
  update, state = start(config(ema__decay=0.9))
  average = {name: np.asarray(value) for name, value in state["params"].items()}
  for n in range(5):
    state, _ = run(update, state, batch())
    decay = min(0.9, (1 + n) / (10 + n))
    average = {name: decay * value + (1 - decay) * np.asarray(state["params"][name]) for name, value in average.items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), dict(state["ema"]), average)
  assert float(ema_decay(0.999, jnp.asarray(10**6))) == pytest.approx(0.999)


def test_adamw_step_is_the_textbook_one() -> None:
  c = config(optimizer__lr=0.01, optimizer__weight_decay=0.1, optimizer__clip=0.0)
  update, state = start(c)
  before = {name: np.asarray(value, np.float64) for name, value in state["params"].items()}
  keys = rng.sample_keys(state["key"], 0, jnp.arange(ROWS))
  gradient = jax.grad(lambda p: update.task.loss(p, batch(), keys)[0])(state["params"])
  state, _ = run(update, state, batch())
  for name, g in gradient.items():
    g = np.asarray(g, np.float64)
    step = g / (np.abs(g) + 1e-8)  # first Adam step: both moments are bias-corrected to g and g^2
    decay = 0.1 * before[name] if name == "kernel" else 0.0
    np.testing.assert_allclose(state["params"][name], before[name] - 0.01 * (step + decay), rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_gradient_that_adam_sees() -> None:
  _, tight = run(*start(config(optimizer__clip=1e-3)), batch(100.0))
  state, loose = run(*start(config(optimizer__clip=1e-3)), batch(100.0))
  assert tight["grad_norm"] == loose["grad_norm"] > 1.0
  moments = np.concatenate([np.ravel(value) for value in jax.tree.leaves(state["opt"][0].mu)]) / 0.1
  assert np.linalg.norm(moments) == pytest.approx(1e-3, rel=1e-3)


def test_non_finite_update_is_skipped_and_counted() -> None:
  update, state = start(config())
  state, _ = run(update, state, batch())
  before = jax.device_get({"params": state["params"], "ema": state["ema"], "opt": state["opt"]})
  poisoned = batch()
  poisoned["y"][3, 3] = np.nan
  state, metrics = run(update, state, poisoned)
  after = jax.device_get({"params": state["params"], "ema": state["ema"], "opt": state["opt"]})
  jax.tree.map(np.testing.assert_array_equal, after, before)
  assert (int(metrics["skipped"]), int(state["step"]), int(state["guard"]["updates"])) == (1, 2, 1)
  state, metrics = run(update, state, batch())
  assert np.isfinite(metrics["loss"]) and int(metrics["streak"]) == 0 and int(metrics["skipped"]) == 1


def test_spike_guard_refuses_a_spike_and_follows_a_lasting_change() -> None:
  c = config(guard__after=50).guard
  guard = {"mean": jnp.zeros(()), "variance": jnp.zeros(())} | dict.fromkeys(
    ("updates", "skipped", "streak"), jnp.zeros((), jnp.int32)
  )
  draw = np.random.default_rng(0)
  step = jax.jit(lambda guard, loss: watch(guard, loss, jnp.ones(()), c))
  for _ in range(200):
    accept, guard = step(guard, jnp.asarray(1 + 0.01 * draw.normal(), jnp.float32))
    assert accept
  accept, guard = step(guard, jnp.asarray(2.0))
  assert not accept and int(guard["skipped"]) == 1
  accepted = [bool(step_guard[0]) for step_guard in _follow(step, guard, 2.0, 40)]
  assert accepted[-1], "a new level of the loss must be accepted in the end"


def _follow(step, guard, level: float, times: int):
  for _ in range(times):
    accept, guard = step(guard, jnp.asarray(level))
    yield accept, guard


@pytest.mark.parametrize(
  ("name", "count", "expected"),
  [
    ("constant", 0, 0.1), ("constant", 9, 1.0), ("constant", 99, 1.0),
    ("wsd", 79, 1.0), ("wsd", 85, 1 - (5 / 20) ** 0.5), ("wsd", 100, 0.0),
    ("cosine", 10, 1.0), ("cosine", 55, 0.5), ("cosine", 100, 0.0),
  ],
)  # fmt: skip
def test_schedules(name: str, count: int, expected: float) -> None:
  c = config(optimizer__schedule=name, optimizer__warmup=10, optimizer__lr=2.0).optimizer
  assert float(optimizer.schedule(c, 100)(count)) == pytest.approx(2 * expected, abs=1e-6)


def test_frozen_parameters_have_no_optimiser_state_and_stay() -> None:
  update, state = start(config(), trainable=lambda self, path: path == "kernel")
  bias = np.asarray(state["params"]["bias"])
  assert set(state["opt"][0].mu) == set(state["ema"]) == {"kernel"}
  state, _ = run(update, state, batch(), 2)
  np.testing.assert_array_equal(state["params"]["bias"], bias)
  assert set(update.averaged(state)) == {"kernel", "bias"}


def test_learning_rate_multiplier() -> None:
  update, state = start(config(), lr_scale=lambda self, path: 0.0 if path == "bias" else 1.0)
  bias, kernel = (np.asarray(state["params"][name]) for name in ("bias", "kernel"))
  state, _ = run(update, state, batch(), 2)
  np.testing.assert_array_equal(state["params"]["bias"], bias)
  assert np.abs(np.asarray(state["params"]["kernel"]) - kernel).max() > 0


def test_step_does_not_transfer_and_frees_the_old_state() -> None:
  update, state = start(config())
  rows = sharding.put_batch(update.mesh, batch())
  old = state["params"]["kernel"]
  with jax.transfer_guard("disallow"):
    state, _ = update.step(state, rows)
  assert old.is_deleted()


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ({"replica": 3, "fsdp": -1, "context": 1, "tensor": 1}, "does not divide 8 devices"),
    ({"replica": 2, "fsdp": 2, "context": 1, "tensor": 1}, "needs 4 devices, there are 8"),
    ({"replica": -1, "fsdp": -1, "context": 1, "tensor": 1}, "at most one is -1"),
  ],
)
def test_meshes_that_cannot_be_are_refused(sizes: dict[str, int], message: str) -> None:
  with pytest.raises(MeshError, match=message):
    sharding.make_mesh(sizes)


def test_mesh_that_does_not_divide_a_parameter_names_the_legal_sizes() -> None:
  mesh = sharding.make_mesh({"replica": 1, "fsdp": 8, "context": 1, "tensor": 1})
  shapes = {"kernel": jax.ShapeDtypeStruct((12, 3), jnp.float32)}
  with pytest.raises(MeshError, match=r"fsdp=8 does not divide kernel .* legal sizes of fsdp: 1, 2, 3, 4, 6$"):
    sharding.parameter_shardings(mesh, shapes, {"kernel": ("embed", None)})


def test_unknown_schedule() -> None:
  with pytest.raises(ConfigError, match="did you mean 'cosine'"):
    optimizer.schedule(config(optimizer__schedule="cosin").optimizer, 10)


def test_runs_that_differ_in_learning_rate_share_one_program() -> None:
  programs = []
  for lr in (1e-3, 3e-2):
    update, state = start(config(optimizer__lr=lr))
    rows = sharding.put_batch(update.mesh, batch())
    programs.append(update.program.lower(state, rows, update.lr).as_text())
    assert float(update.step(state, rows)[1]["lr"]) == pytest.approx(lr)
  assert programs[0] == programs[1]


def test_the_fixed_table_is_the_same_under_every_seed() -> None:
  found = []
  for seed in (0, 5):
    update, _ = start(config(seed=seed))
    weights = {"kernel": jnp.ones((WIDTH, WIDTH)), "bias": jnp.zeros(WIDTH)}
    found.append(np.asarray(update.evaluate(weights, sharding.put_batch(update.mesh, batch()))))
    table_id = update.task.table_id(digests(batch()))
  np.testing.assert_array_equal(*found)
  assert table_id == start(config(seed=0))[0].task.table_id(digests(batch()))
