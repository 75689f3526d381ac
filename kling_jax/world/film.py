"""Filming one clip: the sampler around the Video DiT, with the context read once for all its steps and branches."""

import dataclasses

import jax
import jax.numpy as jnp

from kling_jax.diffusion import guidance as guidance_lib
from kling_jax.diffusion import sampler as sampler_lib
from kling_jax.diffusion.guidance import Guidance
from kling_jax.diffusion.process import Process
from kling_jax.errors import ConfigError
from kling_jax.models.latents import Codec
from kling_jax.models.owl import Branch, ClipConditions, Owl
from kling_jax.nn import rng

AS_TRAINED = Guidance()


@dataclasses.dataclass(frozen=True)
class Camera:
  """How clips are filmed; hashable.

  Attributes:
    frames, height, width: of a clip in pixels.
    steps, method, shift: of the sampler.
    guidance: `text` is the scale of state and text together, `image` that of the context, `scores` equals `text`.
    context_noise: level in [0, 1] of the noise that is put on the context, and of which the network is told.
  """

  frames: int
  height: int
  width: int
  steps: int
  method: str = "euler"
  shift: float = 1.0
  guidance: Guidance = AS_TRAINED
  context_noise: float = 0.0


def film(model: Owl, process: Process, camera: Camera, given: ClipConditions, keys_B: jax.Array, latent_frames: int):
  """Samples the latents (B, t, h, w, c) of one clip, float32; row b is a function of its conditions and keys_B[b].

  Args:
    given: conditions with a *clean* context.
    latent_frames: t of the clip.
  """
  branches = guidance_lib.branches(camera.guidance)
  parts = [branch_conditions(model, process, camera, given, branch, keys_B) for branch in branches]
  stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
  dtype = given.state_BQD.dtype
  cache = model.remember(stacked, latent_frames, dtype)

  def predict_many(x_BTHWC: jax.Array, time: jax.Array, wanted) -> list[jax.Array]:
    copies = len(wanted)
    rows = slice(0, copies * x_BTHWC.shape[0])  # the fullest branch comes first, and is the only one asked for alone
    held = jax.tree.map(lambda leaf: leaf[:, rows], (cache.k_SBLKE, cache.v_SBLKE))
    part = jax.tree.map(lambda leaf: leaf[rows], stacked)
    x_BTHWC = jnp.concatenate([x_BTHWC.astype(dtype)] * copies)
    own = dataclasses.replace(cache, k_SBLKE=held[0], v_SBLKE=held[1])
    return jnp.split(model.predict(x_BTHWC, jnp.full(x_BTHWC.shape[:1], time), part, own), copies)

  predict = guidance_lib.guided(
    lambda x, time, drop: predict_many(x, time, (drop,))[0], camera.guidance, predict_many=predict_many
  )
  shape = (latent_frames, *given.context_BTHWC.shape[2:])
  noise_BTHWC = rng.normal(rng.stream(keys_B, "noise"), shape)
  return sampler_lib.sample(predict, noise_BTHWC, sampler_lib.times(camera.steps, camera.shift), process, camera.method)


def branch_conditions(
  model: Owl, process: Process, camera: Camera, given: ClipConditions, branch: Branch, keys_B: jax.Array
) -> ClipConditions:
  """The conditions of one branch of guidance: what it drops is null, and the context has the branch's noise."""
  level = camera.guidance.level if "detail" in branch else camera.context_noise
  rows = keys_B.shape[0]
  given = with_context_noise(process, given, jnp.full((rows,), level, jnp.float32), keys_B)
  said = lambda name: jnp.full((rows,), name in branch)
  return model.drop(given, said("text"), said("text"), said("image"))


def with_context_noise(
  process: Process, given: ClipConditions, level_B: jax.Array, keys_B: jax.Array
) -> ClipConditions:
  """Conditions whose clean context has noise of a level a row, of which the network is told."""
  context_BTHWC = given.context_BTHWC
  noise_BTHWC = rng.normal(rng.stream(keys_B, "context_noise"), context_BTHWC.shape[1:])
  noisy_BTHWC = process.corrupt(context_BTHWC, noise_BTHWC, level_B).astype(context_BTHWC.dtype)
  return dataclasses.replace(given, context_BTHWC=noisy_BTHWC, context_time_B=level_B)


def image_context(codec: Codec, image_BHWC: jax.Array, frames: int) -> tuple[jax.Array, jax.Array]:
  """(latents (B, frames, h, w, c), which are there) before a first clip: the image alone, in the last place."""
  latent_BTHWC = codec.encode(image_BHWC[:, None].astype(jnp.float32) / 127.5 - 1)
  rows = image_BHWC.shape[0]
  context_BTHWC = jnp.pad(latent_BTHWC, ((0, 0), (frames - 1, 0), (0, 0), (0, 0), (0, 0)))
  return context_BTHWC, jnp.broadcast_to(jnp.arange(frames) == frames - 1, (rows, frames))


def pixels(codec: Codec, latents_BTHWC: jax.Array) -> jax.Array:
  """Latents as uint8 frames (B, T, H, W, 3)."""
  return jnp.round(jnp.clip((codec.decode(latents_BTHWC) + 1) * 127.5, 0, 255)).astype(jnp.uint8)


def first_frame(
  model: Owl, process: Process, camera: Camera, codec: Codec, tokens_BL: jax.Array, mask_BL: jax.Array,
  fps_B: jax.Array, keys_B: jax.Array,
) -> jax.Array:  # fmt: skip
  """Samples one latent frame (B, 1, h, w, c) from a text alone: the Video DiT's bucket of single images.

  The guidance scale is the camera's of state and text.

  Raises:
    ConfigError: the Video DiT has no text encoder of its own.
  """
  if model.video.text is None:
    raise ConfigError("this world model has no text encoder for a first frame; give --image")
  rows = keys_B.shape[0]
  dtype = jnp.float32
  text_BLD = model.video.text(tokens_BL, mask_BL, dtype=dtype)
  shape = codec.latent_shape(1, camera.height, camera.width)

  def predict(x_BTHWC: jax.Array, time: jax.Array, branch: Branch) -> jax.Array:
    heard = model.video.drop_text(text_BLD, mask_BL, jnp.full((rows,), "text" in branch))
    told = fps_B if model.config.dit.fps else None
    return model.video.dit(x_BTHWC, jnp.full((rows,), time), heard[0], text_mask_BL=heard[1], fps_B=told)

  guidance = Guidance(camera.guidance.text, rescale=camera.guidance.rescale)
  noise_BTHWC = rng.normal(rng.stream(keys_B, "noise"), shape)
  times = sampler_lib.times(camera.steps, camera.shift)
  return sampler_lib.sample(guidance_lib.guided(predict, guidance), noise_BTHWC, times, process, camera.method)
