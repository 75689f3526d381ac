"""The VAE task: its loss in closed form, rows that do not know each other, moments that learn beside, and learning."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kling_jax import config as config_lib
from kling_jax import errors
from kling_jax.models import video_vae
from kling_jax.nn import params, rng
from kling_jax.train import task
from kling_jax.train.tasks import video_vae as vae_task

ROOT = pathlib.Path(__file__).parents[1]


def make(**changes):
  config = config_lib.load(str(ROOT / "configs" / "vae.py") + ":runlocal")
  config.data.sources, config.data.buckets, config.data.batch = ("worlds:shapes-v1?count=8&seed=0",), ((5, 16, 16),), 4
  config.update_from_flattened_dict(changes)
  return task.make(config)


@pytest.fixture(scope="module")
def job():
  return make()


@pytest.fixture(scope="module")
def weights(job):
  return params.create(lambda: job.init(nnx.Rngs(params=jax.random.key(0))))


@pytest.fixture(scope="module")
def batch(job):
  return job.batches("train", 0, 1, 1)[0]


# ---- closed forms ----------------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error():
  np.testing.assert_allclose(vae_task.psnr(jnp.full((2, 3, 4, 4, 3), 0.2)), 20.0, rtol=1e-5)  # 20 log10(2 / 0.2)


def test_kl_equals_its_integral():
  mean, log_variance = 0.7, -1.3
  x = np.linspace(-12, 12, 200_001)
  p = np.exp(-((x - mean) ** 2) / (2 * np.exp(log_variance))) / np.sqrt(2 * np.pi * np.exp(log_variance))
  log_ratio = -((x - mean) ** 2) / (2 * np.exp(log_variance)) - log_variance / 2 + x**2 / 2
  expected = np.sum(p * log_ratio) * (x[1] - x[0])
  row = lambda value: jnp.full((1, 1, 2, 2, 3), value)
  np.testing.assert_allclose(vae_task.kl_per_sample(row(mean), row(log_variance)), expected, rtol=1e-5)


def test_pyramid_loses_nothing_and_its_bands_are_orthogonal():
  x = jax.random.normal(jax.random.key(0), (1, 2, 16, 24, 3))
  bands = vae_task.laplacian(x, 3)
  assert [band.shape[2:4] for band in bands] == [(16, 24), (8, 12), (4, 6), (2, 3)]
  rebuilt = bands[-1]
  for band in reversed(bands[:-1]):
    rebuilt = rebuilt.repeat(2, 2).repeat(2, 3) + band
  np.testing.assert_allclose(rebuilt, x, atol=1e-5)
  np.testing.assert_allclose(sum(jnp.mean(band**2) for band in bands), jnp.mean(x**2), rtol=1e-5)


def test_moments_are_where_their_loss_is_least():
  latents = 3 * jax.random.normal(jax.random.key(0), (4, 2, 4, 4, 2)) + jnp.array([5.0, -1.0])
  axes = (0, 1, 2, 3)
  at_moments = video_vae.Normalisation(latents.mean(axes), latents.std(axes))
  graph, state = nnx.split(at_moments)
  gradient = jax.grad(lambda state: vae_task.moments_loss(nnx.merge(graph, state), latents).mean())(state)
  for leaf in jax.tree.leaves(gradient):
    np.testing.assert_allclose(leaf, 0, atol=1e-5)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_rows_depend_on_their_own_frames_and_keys_alone(job, weights, batch):
  losses = jax.jit(functools.partial(job.losses, train=True))
  keys_B = rng.sample_keys(jax.random.key(0), 0, jnp.arange(4))
  whole_B, _ = losses(weights, batch, keys_B)
  order = np.array([2, 0, 3, 1])
  permuted_B, _ = losses(weights, {name: value[order] for name, value in batch.items()}, keys_B[order])
  np.testing.assert_allclose(permuted_B, whole_B[order], rtol=1e-5)


def test_validation_is_without_noise_and_is_the_stated_sum(job, weights, batch):
  losses = jax.jit(functools.partial(job.losses, train=False))
  one_B, metrics = losses(weights, batch, rng.sample_keys(jax.random.key(0), 0, jnp.arange(4)))
  other_B, _ = losses(weights, batch, rng.sample_keys(jax.random.key(1), 5, jnp.arange(4)))
  np.testing.assert_array_equal(one_B, other_B)

  model = params.merge(job.graph, weights)
  x = np.asarray(batch["frames"], np.float32) / 127.5 - 1
  mean, log_variance, _ = jax.jit(model.encode_moments)(x)
  error = jax.jit(model.decode_raw)(mean)[0] - x
  expected_B = [float(jnp.mean(jnp.abs(row))) for row in error]
  for row in range(4):
    expected_B[row] += sum(float(jnp.mean(jnp.abs(band))) for band in vae_task.laplacian(error[row : row + 1], 3))
  kl_B = vae_task.kl_per_sample(mean, log_variance)
  np.testing.assert_allclose(one_B, np.array(expected_B) + 1e-6 * np.asarray(kl_B), rtol=1e-4)
  np.testing.assert_allclose(metrics["psnr"], jnp.mean(vae_task.psnr(error)), rtol=1e-4)


def test_it_learns_and_its_latents_come_out_normalised(job, weights, batch):
  """A minute's run in small: one batch, 60 updates."""
  optimizer = optax.chain(
    optax.scale_by_adam(b2=0.99),
    optax.stateless(lambda updates, _: {name: -2e-3 * job.lr_scale(name) * leaf for name, leaf in updates.items()}),
  )

  @jax.jit
  def update(weights, state, step):
    keys_B = rng.sample_keys(jax.random.key(0), step, jnp.arange(4))
    (loss, metrics), gradient = jax.value_and_grad(job.loss, has_aux=True)(weights, batch, keys_B)
    updates, state = optimizer.update(gradient, state, weights)
    return optax.apply_updates(weights, updates), state, loss, metrics["psnr"]

  state, losses, decibels = optimizer.init(weights), [], []
  for step in range(60):
    weights, state, loss, psnr = update(weights, state, step)
    losses.append(float(loss))
    decibels.append(float(psnr))
  assert np.mean(losses[-5:]) < 0.5 * losses[0]
  assert np.mean(decibels[-5:]) > decibels[0] + 6
  model = params.merge(job.graph, weights)
  latents = jax.jit(model.encode_chunk)(np.asarray(batch["frames"], np.float32) / 127.5 - 1)[0]
  assert np.abs(np.mean(latents)) < 0.5 and 0.4 < np.std(latents) < 2.5


# ---- around it -------------------------------------------------------------------------------------------------------


def test_samples_are_clips_beside_their_reconstructions(job, weights, batch):
  pictures = job.samples(weights, batch, jax.random.key(0))
  assert pictures.dtype == np.uint8 and pictures.shape == (4, 5, 16, 32, 3)
  np.testing.assert_array_equal(pictures[:, :, :, :16], batch["frames"])


def test_cost_is_three_forwards(job, batch):
  tokens, flops = job.step_cost(batch)
  assert tokens == 4 * 2 * 2 * 2
  assert flops == 3 * 4 * sum(video_vae.forward_flops(job.shape, 5, 16, 16))


def test_sizes_that_do_not_fit_are_refused_at_start():
  with pytest.raises(errors.ConfigError, match="nearest size is 5 x 16 x 16"):
    make(**{"data.buckets": ((6, 16, 16),)})
  with pytest.raises(errors.ConfigError, match=r"loss\.levels"):
    make(**{"loss.levels": 5})


@pytest.mark.drill
def test_the_trainer_runs_it(tmp_path):
  from kling_jax.train import loop, metrics

  config = config_lib.load(str(ROOT / "configs" / "vae.py") + ":runlocal")
  config.validation.samples = 2
  assert loop.run(config, tmp_path).finished
  rows = [row for row in metrics.read(tmp_path / "metrics.jsonl") if "val_loss" in row]
  assert rows[-1]["val_loss"] < rows[0]["val_loss"]
  assert (tmp_path / "samples" / "00000060.mp4").stat().st_size > 0
