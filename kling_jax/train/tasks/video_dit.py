"""Task `video_dit`: diffusion training of the text-to-video model on clips with captions and scores."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kling_jax.data import conditions as conditions_lib
from kling_jax.data import mixture, pipeline
from kling_jax.data.tokens import ByteTokenizer
from kling_jax.diffusion import guidance as guidance_lib
from kling_jax.diffusion import loss as loss_lib
from kling_jax.diffusion import process as process_lib
from kling_jax.diffusion import sampler as sampler_lib
from kling_jax.diffusion import step_cache
from kling_jax.diffusion import time as time_lib
from kling_jax.errors import ConfigError, DataError, nearest
from kling_jax.models import flops, latents, video_dit
from kling_jax.models.text_to_video import Conditions, TextToVideo
from kling_jax.models.video_vae import VideoVAE, VideoVAEConfig
from kling_jax.nn import lora as lora_lib
from kling_jax.nn import params as params_lib
from kling_jax.nn import quantized, rng
from kling_jax.nn.params import Params
from kling_jax.train import attention, encoders, sharding
from kling_jax.train.sharding import Extent
from kling_jax.train.task import Batch, Task

TOLD = ("adaln", "caption")  # ways in which the model learns the scores


# Trained under LoRA: the adapters, the text side of our own, and parts of the transformer that Wan has not.
BESIDE = ("lora.", "null_text", "text.", "dit.conditions.", "dit.fps.", "dit.state.", "dit.blocks.state_attn.")


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How to sample; hashable, one compiled sampler each.

  Attributes:
    frames, height, width: of the video in pixels.
    steps, method, shift: of the sampler.
    guidance: scales for text, scores and image.
    quantize: of the blocks' products, `nn.quantized.MODES`.
  """

  frames: int
  height: int
  width: int
  steps: int
  method: str
  shift: float
  guidance: guidance_lib.Guidance
  quantize: str


class VideoDiTTask(Task):
  """See configs/video_dit.py for the keys."""

  reference = "video_dit"

  def __init__(self, config: ml_collections.ConfigDict):
    self.process = process_lib.make(config.diffusion.process)
    self.dit = _dit_config(config)
    if config.text.encoder not in ("bytes", "cached"):
      raise ConfigError(f"config key 'text.encoder' = {config.text.encoder!r} is unknown"
                        f"{nearest(config.text.encoder, ('bytes', 'cached'))}")  # fmt: skip
    if config.model.told not in TOLD:
      raise ConfigError(f"config key 'model.told' = {config.model.told!r} is unknown{nearest(config.model.told, TOLD)}")
    if config.model.told == "caption" and config.text.encoder == "cached":
      raise ConfigError("config key 'model.told' = 'caption' needs text.encoder = 'bytes': caches hold bare captions")
    quantized.check(config.model.quantize)
    super().__init__(config)

  # ---- model -------------------------------------------------------------------------------------------------------

  def init(self, rngs: nnx.Rngs) -> TextToVideo:
    c = self.config
    return TextToVideo(
      self.dit,
      text_depth=c.text.depth if c.text.encoder == "bytes" else 0,
      text_tokens=c.text.tokens,
      text_padding=c.text.padding,
      codec=VideoVAE.preset(c.codec.preset, rngs=rngs) if c.codec.name == "vae" else None,
      lora=(c.lora.rank, c.lora.match) if c.lora.rank else None,
      rngs=rngs,
    )

  def trainable(self, path: str) -> bool:
    """All but the codec; under LoRA the adapters, and what starts as a no-op beside the transformer."""
    if self.config.lora.rank:
      return path.startswith(BESIDE)
    return not path.startswith("codec.")

  def whole(self, params: Params) -> TextToVideo:
    """The model with its adapters, where it has some, in the transformer's kernels."""
    lora = lora_lib.of(params, "lora.")
    if lora:
      params = lora_lib.merge_lora(params, {f"dit.{name}": value for name, value in lora.items()})
    return params_lib.merge(self.graph, params)

  def pretrained(self) -> dict[str, str]:
    c = self.config.codec
    if c.name != "vae":
      return {}
    if not c.weights:
      raise ConfigError("config key 'codec.weights' is not set: the vae needs a work directory or safetensors folder")
    return {"codec.": c.weights}

  @property
  def geometry(self) -> latents.Codec | VideoVAEConfig:
    """What is known of the codec without weights: temporal, spatial, channels, `latent_shape`."""
    c = self.config.codec
    if c.name == "vae":
      return VideoVAE.geometry(c.preset)
    return latents.make(c.name, spatial=c.spatial, channels=c.channels)

  def codec(self, model: TextToVideo) -> latents.Codec:
    """The codec: the VAE inside `model`, or the wavelet that has no weights."""
    return cast(latents.Codec, model.codec if self.config.codec.name == "vae" else self.geometry)

  def extents(self) -> list[Extent]:
    c = self.config
    found = [Extent("heads", "heads of the Video DiT", self.dit.heads)]
    for bucket in c.data.buckets:
      tokens = math.prod(self.dit.grid(*self.geometry.latent_shape(*bucket)[:3]))
      found.append(Extent("tokens", f"tokens of bucket {'x'.join(map(str, bucket))}", tokens))
    return found + sharding.rows(c.data.batch, c.optimizer.accumulate)

  # ---- data --------------------------------------------------------------------------------------------------------

  @functools.cached_property
  def sources(self) -> mixture.Mixture:
    return mixture.Mixture.open(self.config.data.sources, self.config.data.weights, self.config.data.memory_gib)

  @functools.cached_property
  def percentiles(self) -> conditions_lib.Percentiles:
    """What raw scores mean: fitted on the training sources, or read beside them."""
    return conditions_lib.for_sources(self.sources, self.config.model.conditions)

  def batches(self, split: str, process_index: int, process_count: int, multiple_of: int) -> pipeline.Batches:
    c = self.config
    written = functools.partial(self.percentiles.caption_of, room=c.text.tokens - 2)  # between begin and end
    sources = self._validated() if split == "validation" and c.data.validation_sources else self.sources
    return pipeline.Batches(
      sources,
      buckets=c.data.buckets,
      fps=c.data.fps,
      batch=c.data.batch,
      seed=c.seed,
      split=split,
      validation_fraction=c.data.validation_fraction,
      tokenizer=ByteTokenizer(c.text.tokens) if c.text.encoder == "bytes" else None,
      percentiles=self.percentiles,
      caption=written if c.model.told == "caption" else None,
      latents=encoders.latent_caches(c, sources.folders) if c.data.cached_latents else (),
      texts=encoders.text_caches(c, sources.folders) if c.text.encoder == "cached" else (),
      text_length=c.text.tokens,
      process_index=process_index,
      process_count=process_count,
      multiple_of=multiple_of,
    )

  def _validated(self) -> mixture.Mixture:
    """The sources of the validation table, where they are others; DataError where a video of it is trained on."""
    data = self.config.data
    sources = mixture.Mixture.open(data.validation_sources)
    videos, shown = ({mixture.video_of(info) for info in one.infos()} for one in (self.sources, sources))
    trained = videos - mixture.held_out(videos, data.validation_fraction)
    both = sorted(trained & mixture.held_out(shown, data.validation_fraction))
    if both:
      raise DataError(
        f"data.validation_sources: {len(both)} held-out videos are trained on in data.sources, first {both[0]!r}: sets "
        "of few videos hold out others each; raise data.validation_fraction, or use more videos"
      )
    return sources

  def validation_rows(self, process_index: int, process_count: int, multiple_of: int) -> list[Batch]:
    split = self.batches("validation", process_index, process_count, multiple_of)
    return split.fixed_rows(self.config.validation.rows)

  def constants(self) -> dict[str, Any]:
    return {"conditions": self.percentiles.to_json()}

  def batch_spec(self, bucket: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    c, bucket_frames = self.config, tuple(self.config.data.buckets[bucket])
    array = lambda *shape, dtype: jax.ShapeDtypeStruct((c.data.batch, *shape), dtype)
    length, scores = c.text.tokens, len(c.model.conditions)
    spec = {"frames": array(*bucket_frames, 3, dtype=jnp.uint8)}
    if c.data.cached_latents:
      spec = {"latents": array(*self.geometry.latent_shape(*bucket_frames), dtype=jnp.bfloat16)}
    if c.text.encoder == "bytes":
      spec |= {"tokens": array(length, dtype=jnp.int32), "tokens_mask": array(length, dtype=jnp.bool)}
    else:
      spec |= {"text": array(length, c.text.width, dtype=jnp.bfloat16), "text_mask": array(length, dtype=jnp.bool)}
    spec |= {"scores": array(scores, dtype=jnp.float32), "scores_known": array(scores, dtype=jnp.bool)}
    return spec | {"fps": array(dtype=jnp.float32), "index": array(dtype=jnp.uint32)}

  def step_cost(self, batch: Batch) -> tuple[int, float]:
    rows, shape = self._latent_shape(batch)
    tokens = rows * math.prod(self.dit.grid(*shape[:3]))
    forward = flops.video_dit_forward(self.dit, *shape[:3], self.config.text.tokens)
    return tokens, 3.0 * rows * forward

  def _latent_shape(self, batch: Batch) -> tuple[int, tuple[int, int, int, int]]:
    if "latents" in batch:
      return batch["latents"].shape[0], tuple(batch["latents"].shape[1:])
    rows, frames, height, width, _ = batch["frames"].shape
    return rows, self.geometry.latent_shape(frames, height, width)

  # ---- loss --------------------------------------------------------------------------------------------------------

  def losses(self, params: Params, batch: Batch, keys_B: jax.Array, train: bool) -> tuple[jax.Array, dict[str, Any]]:
    c = self.config
    model = self.whole(params)
    x0_BTHWC = self.encode(model, batch)
    conditions = self._conditions(model, batch)
    if train:
      time_B = time_lib.sample(rng.stream(keys_B, "time"), c.diffusion.time, shift=c.diffusion.shift)
    else:
      time_B = time_lib.stratified(batch["index"], c.diffusion.time, shift=c.diffusion.shift)
    noise_BTHWC = rng.normal(rng.stream(keys_B, "noise"), x0_BTHWC.shape[1:])
    counted_BT = None
    if train:
      conditions = model.drop(conditions, self._dropped(keys_B))
    if train and c.history.probability:
      known_BT = self._known(keys_B, x0_BTHWC.shape[1])
      conditions = dataclasses.replace(conditions, clean_BTHWC=x0_BTHWC, known_BT=known_BT)
      counted_BT = ~known_BT

    x_t_BTHWC = self.process.corrupt(x0_BTHWC, noise_BTHWC, time_B)
    with quantized.products(c.model.quantize):
      prediction_BTHWC = model(x_t_BTHWC.astype(self.dtype), time_B, conditions)
    target_BTHWC = self.process.target(x0_BTHWC, noise_BTHWC, time_B)
    weight_B = self.process.weight(time_B)
    return loss_lib.mse_per_sample(prediction_BTHWC, target_BTHWC, weight_B, counted_BT), {}

  def encode(self, model: TextToVideo, batch: Batch) -> jax.Array:
    """Latents (B, T, H, W, C) float32 of a batch: cached, or from frames uint8 through the codec."""
    if "latents" in batch:
      return batch["latents"].astype(jnp.float32)
    pixels = batch["frames"].astype(jnp.float32) / 127.5 - 1
    return jax.lax.stop_gradient(self.codec(model).encode(pixels))

  def _conditions(self, model: TextToVideo, batch: Batch) -> Conditions:
    text_BLD, mask_BL = model.encode_text(batch, self.dtype)
    told = slice(len(self.dit.conditions))  # none where the caption tells them
    return Conditions(text_BLD, mask_BL, batch["scores"][:, told], batch["scores_known"][:, told])

  def _dropped(self, keys_B: jax.Array) -> dict[str, jax.Array]:
    drop = self.config.drop
    scores = [rng.bernoulli(rng.stream(keys_B, f"drop_{name}"), drop.scores) for name in self.dit.conditions]
    text_B = rng.bernoulli(rng.stream(keys_B, "drop_text"), drop.text)
    return {"text": text_B} | ({"scores": jnp.stack(scores, 1)} if scores else {})

  def _known(self, keys_B: jax.Array, frames: int) -> jax.Array:
    """Which latent frames are given clean: none, or the first 1 to `history.frames` (B, T)."""
    history = self.config.history
    most = min(history.frames, frames - 1)
    if most < 1:
      return jnp.zeros((keys_B.shape[0], frames), bool)
    given_B = rng.bernoulli(rng.stream(keys_B, "history"), history.probability)
    count_B = jax.vmap(lambda key: jax.random.randint(key, (), 1, most + 1))(rng.stream(keys_B, "history_frames"))
    return given_B[:, None] & (jnp.arange(frames)[None] < count_B[:, None])

  # ---- sampling ----------------------------------------------------------------------------------------------------

  def recipe(self, frames: int, height: int, width: int, **changes: Any) -> Recipe:
    """The config's sampling settings for one size, with `changes`: steps, method, shift, quantize, guidance scales."""
    c = self.config.sample
    values = {"steps": c.steps, "method": c.method, "shift": self.config.diffusion.shift}
    values["quantize"] = self.config.model.quantize
    values |= {key: changes.pop(key) for key in tuple(values) if changes.get(key) is not None}
    quantized.check(values["quantize"])
    scales = {"text": c.text, "scores": c.scores, "image": c.image, "rescale": c.rescale}
    scales |= {key: value for key, value in changes.items() if value is not None}
    return Recipe(frames, height, width, guidance=guidance_lib.Guidance(**scales), **values)

  def sampler(
    self, recipe: Recipe, negative: bool = False, *, mesh: Mesh | None = None, cached: bool = False
  ) -> Callable[..., Any]:
    """The jitted sampler of one recipe.

    Args:
      recipe: size, steps and guidance.
      negative: the batch carries `negative_tokens` and `negative_tokens_mask` (or `negative_text`, `..._mask`), which
        stand in for a dropped text.
      mesh: what the network's calls are shared out on: their rows, all guidance branches of all videos, must be a
        multiple of `sharding.batch_ways(mesh)`, and the videos alone need not be. None: where the arguments lie.
      cached: the sampler is told which network calls to compute and measures how the step cache's residuals change.

    Returns:
      (params, batch, keys_B) -> frames uint8 (B, T, H, W, 3). The batch holds text and scores as in training, and
      optionally `known_frames` uint8 (B, T, H, W, 3) with `known` bool (B, t) over latent frames. Row b depends on
      keys_B[b] alone. With `cached`, (params, batch, keys_B, compute_C) -> (frames, ratio_CB): see
      `diffusion.step_cache`, C being `self.calls(recipe)`.
    """
    if cached and recipe.guidance.interval != (0.0, 1.0):
      raise ConfigError("a step cache holds every branch of the guidance, and an interval leaves some out; drop either")
    return jax.jit(functools.partial(self._sample, recipe, negative, mesh))

  def calls(self, recipe: Recipe) -> int:
    """Network calls (of all branches at once) that a recipe makes."""
    return sampler_lib.calls(recipe.steps, recipe.method)

  def _sample(
    self, recipe: Recipe, negative: bool, mesh: Mesh | None, params: Params, batch: Batch, keys_B: jax.Array,
    compute_C: jax.Array | None = None,
  ) -> Any:  # fmt: skip
    model = self.whole(params)
    codec = self.codec(model)
    shape = codec.latent_shape(recipe.frames, recipe.height, recipe.width)
    given = self._conditions(model, batch)
    if "known_frames" in batch:
      clean_BTHWC = codec.encode(batch["known_frames"].astype(jnp.float32) / 127.5 - 1)
      given = dataclasses.replace(given, clean_BTHWC=clean_BTHWC, known_BT=batch["known"])
    branches = guidance_lib.branches(recipe.guidance)
    instead = self._negative(model, batch) if negative else None
    stacked = _stack([_without(model, given, branch, instead) for branch in branches])

    def network(x_BTHWC: jax.Array, time: jax.Array, copies: int, memory: Any) -> tuple[list[jax.Array], Any]:
      """`copies` predictions of each row, of all branches or of the full one; rows of one video stand together."""
      x_BTHWC = jnp.repeat(x_BTHWC.astype(self.dtype), copies, axis=0)
      conditions = stacked if copies == len(branches) else given
      around = None if compute_C is None else lambda blocks, x: step_cache.around(blocks, x, memory, compute_C)
      with (
        contextlib.nullcontext()
        if mesh is None
        else sharding.activations(mesh, choice=attention.Choice.of(self.config))
      ):
        y = model(x_BTHWC, jnp.full((x_BTHWC.shape[0],), time), conditions, around)
      y_BTHWC, memory = (y, memory) if around is None else y
      y = y_BTHWC.reshape(-1, copies, *y_BTHWC.shape[1:])
      return [y[:, copy] for copy in range(copies)], memory

    def predict(x_BTHWC: jax.Array, time: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
      left = [memory]  # where the network's call is made inside of `guided`

      def many(x: jax.Array, time: jax.Array, wanted: Any) -> list[jax.Array]:
        predictions, left[0] = network(x, time, len(wanted), memory)
        return predictions

      one = lambda x, time, drop: many(x, time, (drop,))[0]
      guided = guidance_lib.guided(one, recipe.guidance, predict_many=many)(x_BTHWC, time)
      return guided, memory if compute_C is None else left[0]

    noise_BTHWC = rng.normal(rng.stream(keys_B, "noise"), shape)
    times = sampler_lib.times(recipe.steps, recipe.shift)
    memory: Any = ()
    if compute_C is not None:
      tokens = len(branches) * noise_BTHWC.shape[0], math.prod(self.dit.grid(*shape[:3])), self.dit.width
      memory = step_cache.start(tokens, self.dtype, self.calls(recipe))
    x0_BTHWC, memory = sampler_lib.sample_remembering(predict, noise_BTHWC, times, self.process, recipe.method, memory)
    if given.known_BT is not None and given.clean_BTHWC is not None:
      x0_BTHWC = jnp.where(given.known_BT[:, :, None, None, None], given.clean_BTHWC, x0_BTHWC)
    pixels = jnp.round(jnp.clip((codec.decode(x0_BTHWC) + 1) * 127.5, 0, 255)).astype(jnp.uint8)
    if compute_C is None:
      return pixels
    return pixels, memory.ratio_CB.reshape(-1, noise_BTHWC.shape[0], len(branches)).mean(-1)

  def _negative(self, model: TextToVideo, batch: Batch) -> tuple[jax.Array, jax.Array]:
    prefix = "negative_"
    return model.encode_text(
      {name.removeprefix(prefix): value for name, value in batch.items() if name.startswith(prefix)}, self.dtype
    )

  def samples(self, params: Params, batch: Batch, key: jax.Array) -> np.ndarray:
    frames, height, width = self.config.data.buckets[0]
    batch = {name: value for name, value in batch.items() if name not in ("frames", "latents")}
    keys_B = rng.sample_keys(key, 0, jnp.arange(batch["scores"].shape[0]))
    return np.asarray(self._cached_sampler(frames, height, width)(params, batch, keys_B))

  @functools.lru_cache(maxsize=4)  # noqa: B019  a task lives as long as its run
  def _cached_sampler(self, frames: int, height: int, width: int) -> Callable[..., jax.Array]:
    return self.sampler(self.recipe(frames, height, width))


def _dit_config(config: ml_collections.ConfigDict) -> video_dit.VideoDiTConfig:
  return dataclasses.replace(
    video_dit.preset(config.model.size),
    latent_channels=config.codec.channels,
    text_width=config.text.width,
    conditions=tuple(config.model.conditions) if config.model.told == "adaln" else (),
    remat=config.model.remat,
  )


def _without(
  model: TextToVideo, given: Conditions, branch: frozenset[str], instead: tuple[jax.Array, jax.Array] | None
) -> Conditions:
  """`given` without the conditions that `branch` drops; a negative text stands in for a dropped one."""
  everyone = jnp.ones(given.scores_BM.shape[0], bool)
  dropped = {name: everyone for name in branch if not (name == "text" and instead is not None)}
  conditions = model.drop(given, dropped)
  if "text" in branch and instead is not None:
    conditions = dataclasses.replace(conditions, text_BLD=instead[0], text_mask_BL=instead[1])
  return conditions


def _stack(parts: list[Conditions]) -> Conditions:
  """One row a video and part, those of a video together: cut over devices, a video's rows then stay on one."""
  together = lambda *leaves: jnp.stack(leaves, 1).reshape(len(leaves) * len(leaves[0]), *leaves[0].shape[1:])
  return jax.tree.map(together, *parts)


TASK = VideoDiTTask
