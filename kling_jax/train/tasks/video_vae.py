"""Task `video_vae`: the causal video VAE learns to give its input back through few latents."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from kling_jax.data import mixture, pipeline
from kling_jax.errors import ConfigError
from kling_jax.models import video_vae
from kling_jax.nn import params as params_lib
from kling_jax.nn import rng
from kling_jax.nn.params import Params
from kling_jax.train import sharding
from kling_jax.train.sharding import Extent
from kling_jax.train.task import Batch, Task

MOMENTS = "normalisation."
MOMENTS_LR = 10.0  # the moments follow the latents, so they must be faster than what moves the latents
MOMENTS_WEIGHT = 1e-2  # Adam cancels it; it only keeps their gradient below the clipping of the global norm


class VideoVAETask(Task):
  """See configs/vae.py for the keys.

  Loss of one clip, x in [-1, 1] and y its reconstruction, means over elements:
    L1(x - y) + pyramid * sum over bands L1(band(x - y)) + kl * KL(posterior | standard normal)
  """

  reference = "vae"

  def __init__(self, config: ml_collections.ConfigDict):
    self.shape = video_vae.preset(config.model.preset)
    for bucket in config.data.buckets:
      self.shape.latent_shape(*bucket)
      if min(bucket[1:]) < 2**config.loss.levels:
        raise ConfigError(f"config key 'loss.levels' = {config.loss.levels} halves {bucket[1:]} pixels away")
    super().__init__(config)

  def init(self, rngs: nnx.Rngs) -> video_vae.VideoVAE:
    return video_vae.VideoVAE(self.shape, rngs=rngs)

  def lr_scale(self, path: str) -> float:
    return MOMENTS_LR if path.startswith(MOMENTS) else 1.0

  def extents(self) -> list[Extent]:
    return sharding.rows(self.config.data.batch, self.config.optimizer.accumulate)

  # ---- data --------------------------------------------------------------------------------------------------------

  @functools.cached_property
  def sources(self) -> mixture.Mixture:
    return mixture.Mixture.open(self.config.data.sources, self.config.data.weights)

  def batches(self, split: str, process_index: int, process_count: int, multiple_of: int) -> pipeline.Batches:
    c = self.config.data
    return pipeline.Batches(
      self.sources,
      buckets=c.buckets,
      fps=c.fps,
      batch=c.batch,
      seed=self.config.seed,
      split=split,
      validation_fraction=c.validation_fraction,
      process_index=process_index,
      process_count=process_count,
      multiple_of=multiple_of,
    )

  def validation_rows(self, process_index: int, process_count: int, multiple_of: int) -> list[Batch]:
    split = self.batches("validation", process_index, process_count, multiple_of)
    return split.fixed_rows(self.config.validation.rows)

  def batch_spec(self, bucket: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    c = self.config.data
    array = lambda *shape, dtype: jax.ShapeDtypeStruct((c.batch, *shape), dtype)
    spec = {"frames": array(*c.buckets[bucket], 3, dtype=jnp.uint8), "index": array(dtype=jnp.uint32)}
    scores = {"scores": array(0, dtype=jnp.float32), "scores_known": array(0, dtype=jnp.bool)}
    return spec | scores | {"fps": array(dtype=jnp.float32)}

  def step_cost(self, batch: Batch) -> tuple[int, float]:
    rows, frames, height, width, _ = batch["frames"].shape
    t, h, w, _ = self.shape.latent_shape(frames, height, width)
    return rows * t * h * w, 3.0 * rows * sum(video_vae.forward_flops(self.shape, frames, height, width))

  # ---- loss --------------------------------------------------------------------------------------------------------

  def losses(self, params: Params, batch: Batch, keys_B: jax.Array, train: bool) -> tuple[jax.Array, dict[str, Any]]:
    model: video_vae.VideoVAE = params_lib.merge(self.graph, params)
    c = self.config.loss
    x_BTHWC = to_unit(batch["frames"])
    mean_BTHWC, log_variance_BTHWC, _ = model.encode_moments(x_BTHWC.astype(self.dtype))
    raw_BTHWC = mean_BTHWC
    if train:
      noise_BTHWC = rng.normal(rng.stream(keys_B, "noise"), mean_BTHWC.shape[1:])
      raw_BTHWC = mean_BTHWC + jnp.exp(0.5 * log_variance_BTHWC) * noise_BTHWC
    y_BTHWC, _ = model.decode_raw(raw_BTHWC.astype(self.dtype))

    error_BTHWC = y_BTHWC - x_BTHWC
    bands = laplacian(error_BTHWC, c.levels)
    kl_B = kl_per_sample(mean_BTHWC, log_variance_BTHWC)
    loss_B = mean_of_rows(jnp.abs(error_BTHWC)) + c.kl * kl_B
    loss_B = loss_B + c.pyramid * sum(mean_of_rows(jnp.abs(band)) for band in bands)
    metrics = {"psnr": jnp.mean(psnr(error_BTHWC)), "kl": jnp.mean(kl_B)}
    moments_B = moments_loss(model.normalisation, mean_BTHWC)
    # A gradient without a value: the moments learn, the loss stays what its name says.
    return loss_B + MOMENTS_WEIGHT * (moments_B - jax.lax.stop_gradient(moments_B)), metrics

  # ---- reconstructions -----------------------------------------------------------------------------------------------

  def samples(self, params: Params, batch: Batch, key: jax.Array) -> np.ndarray:
    """Each clip (left) beside its reconstruction (right)."""
    del key
    return np.concatenate([np.asarray(batch["frames"]), np.asarray(self._reconstruct(params, batch["frames"]))], axis=3)

  @functools.cached_property
  def _reconstruct(self) -> Callable[..., jax.Array]:
    @jax.jit
    def run(params: Params, frames: jax.Array) -> jax.Array:
      model: video_vae.VideoVAE = params_lib.merge(self.graph, params)
      latents_BTHWC = model.encode(to_unit(frames).astype(self.dtype))
      pixels = jnp.clip((model.decode(latents_BTHWC.astype(self.dtype)) + 1) * 127.5, 0, 255)
      return jnp.round(pixels).astype(jnp.uint8)

    return run


def to_unit(frames: jax.Array) -> jax.Array:
  """uint8 pixels as float32 in [-1, 1]."""
  return frames.astype(jnp.float32) / 127.5 - 1


def mean_of_rows(x: jax.Array) -> jax.Array:
  """Mean over all axes but the first."""
  return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def kl_per_sample(mean_BTHWC: jax.Array, log_variance_BTHWC: jax.Array) -> jax.Array:
  """KL(N(mean, variance) | N(0, 1)) in nats per latent element, mean over a row: (B,)."""
  square = jnp.square(mean_BTHWC) + jnp.exp(log_variance_BTHWC)
  return mean_of_rows(0.5 * (square - 1 - log_variance_BTHWC))


def psnr(error_BTHWC: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio of each row in dB, for values in [-1, 1] (peak 2): (B,)."""
  return 10 * jnp.log10(4 / jnp.maximum(mean_of_rows(jnp.square(error_BTHWC)), 1e-10))


def laplacian(x_BTHWC: jax.Array, levels: int) -> list[jax.Array]:
  """Bands of each frame, finest first: what halving (mean of 2 x 2) and doubling (repetition) lose, level by level.

  The last of `levels` + 1 is what remains. Odd sizes leave out their last row or column when halved.
  """
  bands = []
  for _ in range(levels):
    B, T, H, W, C = x_BTHWC.shape
    x_BTHWC = x_BTHWC[:, :, : H // 2 * 2, : W // 2 * 2]
    cells = x_BTHWC.reshape(B, T, H // 2, 2, W // 2, 2, C)
    half = jnp.mean(cells, axis=(3, 5))
    bands.append((cells - half[:, :, :, None, :, None]).reshape(x_BTHWC.shape))
    x_BTHWC = half
  return [*bands, x_BTHWC]


def moments_loss(normalisation: video_vae.Normalisation, mean_BTHWC: jax.Array) -> jax.Array:
  """Negative log likelihood (B,) of the latents under the normalisation's normal; its minimum is at their moments."""
  unit_BTHWC = normalisation.apply(jax.lax.stop_gradient(mean_BTHWC))
  return mean_of_rows(0.5 * jnp.square(unit_BTHWC) + normalisation.log_std[...])


TASK = VideoVAETask
