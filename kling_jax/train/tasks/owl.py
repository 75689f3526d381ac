"""Task `owl`: the stages of Owl-1 (arXiv 2412.09600, section 3), and two against drift that the paper does not have.

  align         states like the features of the Video DiT's trained, frozen text encoder; language model only
  generate      denoising of one clip of a walk from its state and context; gradients reach the language model
  world         denoising + loss.text * next-token loss of the dynamics
  self_rollout  the same, after the model has filmed the clips just before by itself, without gradient

The language model reads all clips of a walk in one pass; one clip a row, drawn at random, is filmed.
"""

import dataclasses
import fnmatch
import functools
import json
import math
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from kling_jax import stores
from kling_jax.data import dense_captions, memory_world, mixture, tokens, walks
from kling_jax.data.tokens import ByteTokenizer, TextTokenizer, WordTokenizer
from kling_jax.diffusion import loss as loss_lib
from kling_jax.diffusion import process as process_lib
from kling_jax.diffusion import time as time_lib
from kling_jax.diffusion.guidance import Guidance
from kling_jax.errors import ConfigError, nearest
from kling_jax.models import flops, language_model, latents, video_dit
from kling_jax.models import owl as owl_lib
from kling_jax.models.owl import ClipConditions, Owl, OwlConfig
from kling_jax.models.video_vae import VideoVAE, VideoVAEConfig
from kling_jax.nn import params as params_lib
from kling_jax.nn import rng
from kling_jax.nn.params import Params
from kling_jax.train import sharding
from kling_jax.train.sharding import Extent
from kling_jax.train.task import Batch, Task
from kling_jax.train.warm_start import Pretrained
from kling_jax.world import film, objectives, sequence
from kling_jax.world.film import Camera
from kling_jax.world.history import HistoryPolicy
from kling_jax.world.layout import Layout
from kling_jax.world.rollout import World, Writer

STAGES = ("align", "generate", "world", "self_rollout")  # in this order
DYNAMICS = {"data.dynamics": ("dense", "caption"), "data.target": ("next", "current")}
TOKENS = ("bytes", memory_world.WORLD)
NEW = ("dit.state.*", "dit.blocks.state_attn.*", "dit.fps.*", "codec.*")  # what a base Video DiT does not have


class OwlTask(Task):
  """See configs/owl.py for the keys."""

  reference = "owl"

  def __init__(self, config: ml_collections.ConfigDict):
    c = config
    choices = {"stage": STAGES, **DYNAMICS, "codec.name": ("haar", "vae"), "lm.tokens": TOKENS}
    for key, legal in choices.items():
      value = functools.reduce(lambda group, part: group[part], key.split("."), c)
      if value not in legal:
        raise ConfigError(f"config key {key!r} = {value!r} is unknown{nearest(value, legal)}")
    self.process = process_lib.make(c.diffusion.process)
    self.owl = _owl_config(c)
    self.layout = Layout(
      frame=self.owl.frame_tokens(c.data.height, c.data.width),
      prompt=c.data.prompt_tokens,
      dynamics=c.data.dynamics_tokens,
      queries=c.state.queries,
      key_frames=c.data.key_frames,
      mutual=c.state.mutual,
    )
    self.owl = dataclasses.replace(self.owl, places=self.layout.clip if c.lm.places else 0)
    self.policy = HistoryPolicy(c.history.window, c.history.states)
    self._check_sizes(c)
    super().__init__(config)

  def _check_sizes(self, c: ml_collections.ConfigDict) -> None:
    self.layout.key_frame_indices(c.data.frames)
    latent_frames = self.geometry_of(c).latent_shape(c.data.frames, c.data.height, c.data.width)[0]
    if not 1 <= c.context.frames <= latent_frames:
      raise ConfigError(f"config key 'context.frames' = {c.context.frames}; a clip has {latent_frames}: give 1 to that")
    if not 0 <= c.context.noise <= 1 or not 0 <= c.sample.context_noise <= c.context.noise:
      raise ConfigError(
        f"config keys 'context.noise' = {c.context.noise} and 'sample.context_noise' = {c.sample.context_noise} must "
        "lie in [0, 1], the second not above the first: the network knows no more noise than it was trained on"
      )
    if c.sample.history_form != "vanilla" and c.sample.history_level > c.context.noise:
      raise ConfigError(
        f"config key 'sample.history_level' = {c.sample.history_level}: trained up to context.noise = {c.context.noise}"
      )
    longest = max(c.data.prompt_tokens, c.data.dynamics_tokens)
    if longest > c.text.tokens:
      raise ConfigError(f"config key 'text.tokens' = {c.text.tokens} is below the longest text, {longest}")
    self.check_length(c.data.clips, c.lm.context, "config key 'data.clips'")
    most = 1 if c.stage == "self_rollout" else c.data.clips
    if not 1 <= c.loss.clips <= most:
      raise ConfigError(f"config key 'loss.clips' = {c.loss.clips} in stage {c.stage!r}; legal: 1 to {most}")
    if c.stage == "self_rollout" and not 1 <= c.own.clips < c.data.clips:
      raise ConfigError(
        f"config key 'own.clips' = {c.own.clips} of {c.data.clips} clips a row; legal: 1 to {c.data.clips - 1}"
      )

  def check_length(self, clips: int, context: int, what: str) -> None:
    """Refuses more clips than the language model has positions for.

    Raises:
      ConfigError: names the largest legal number.
    """
    most = (context - self.layout.prefix) // self.layout.clip
    if not 1 <= clips <= most:
      raise ConfigError(
        f"{what} = {clips}: {self.layout.prefix} positions and {self.layout.clip} a clip make "
        f"{self.layout.length(max(clips, 0))}, the language model knows {context} (lm.context); legal: 1 to {most}"
      )

  # ---- model -------------------------------------------------------------------------------------------------------

  def init(self, rngs: nnx.Rngs) -> Owl:
    codec = VideoVAE.preset(self.config.codec.preset, rngs=rngs) if self.config.codec.name == "vae" else None
    return Owl(self.owl, codec=codec, rngs=rngs)

  def trainable(self, path: str) -> bool:
    listed = lambda patterns: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
    return listed(self.config.trainable) and not listed(self.config.frozen)

  def lr_scale(self, path: str) -> float:
    part = path.partition(".")[0]
    return float(self.config.lr_scale[{"lora": "lm", "lm": "lm", "video": "video"}.get(part, "state")])

  def pretrained(self) -> dict[str, str | Pretrained]:
    c = self.config
    if c.init_from:
      check_stage(pathlib.Path(stores.here(c.init_from)), c.stage)
      return {}
    if c.video.weights and c.lm.tokens != "bytes":
      raise ConfigError(
        f"config keys 'lm.tokens' = {c.lm.tokens!r} and 'video.weights': that text encoder was trained on bytes, and "
        "both read the same tokens; leave 'video.weights' away, or set lm.tokens = 'bytes'"
      )
    if not c.video.weights and c.stage == "align":
      raise ConfigError(
        "config key 'video.weights' is not set: stage align copies a text encoder that was trained, so it needs the "
        "work directory of a video_dit run (kling train --config configs/video_dit.py ...)"
      )
    found: dict[str, str | Pretrained] = {}
    if c.video.weights:
      found["video."] = Pretrained(c.video.weights, NEW)
    if c.codec.name == "vae":
      if not c.codec.weights:
        raise ConfigError("config key 'codec.weights' is not set: the vae needs a work directory or safetensors folder")
      found["video.codec."] = c.codec.weights
    return found

  @staticmethod
  def geometry_of(c: ml_collections.ConfigDict) -> latents.Codec | VideoVAEConfig:
    """What is known of the codec without weights: temporal, spatial, channels, `latent_shape`."""
    if c.codec.name == "vae":
      return VideoVAE.geometry(c.codec.preset)
    return latents.make(c.codec.name, spatial=c.codec.spatial, channels=c.codec.channels)

  def codec(self, model: Owl) -> latents.Codec:
    """The codec: the VAE inside `model`, or the wavelet that has no weights."""
    return cast(latents.Codec, model.video.codec if self.config.codec.name == "vae" else self.geometry_of(self.config))

  @property
  def latent_shape(self) -> tuple[int, int, int, int]:
    d = self.config.data
    return self.geometry_of(self.config).latent_shape(d.frames, d.height, d.width)

  def extents(self) -> list[Extent]:
    c, dit = self.config, self.owl.dit
    frames, height, width, _ = self.latent_shape
    video = math.prod(dit.grid(frames + c.context.frames, height, width))
    return [
      Extent("heads", "heads of the Video DiT", dit.heads),
      Extent("heads", "key heads of the language model", self.owl.lm.kv_heads),
      Extent("tokens", "tokens of a clip and its context", video),
      Extent("tokens", "places of a walk", self.layout.length(c.data.clips)),
      *sharding.rows(c.data.batch, c.optimizer.accumulate),
    ]

  def camera(self, **changes: Any) -> Camera:
    """How clips are filmed by default; `changes` replaces fields of `Camera`, or guidance scales by `state` ..."""
    c, s = self.config, self.config.sample
    values = {"state": s.state, "history": s.history, "form": s.history_form, "level": s.history_level,
              "rescale": s.rescale}  # fmt: skip
    values |= {name: changes.pop(name) for name in tuple(values) if changes.get(name) is not None}
    camera = Camera(
      c.data.frames, c.data.height, c.data.width, s.steps, s.method, c.diffusion.shift,
      Guidance(values["state"], values["state"], values["history"], rescale=values["rescale"], history=values["form"],
               level=values["level"]),
      s.context_noise,
    )  # fmt: skip
    camera = dataclasses.replace(camera, **{name: value for name, value in changes.items() if value is not None})
    levels = {"context_noise": camera.context_noise}
    if camera.guidance.history != "vanilla":
      levels["history_level"] = camera.guidance.level
    for name, level in levels.items():
      if not 0 <= level <= c.context.noise:
        raise ConfigError(f"{name} {level}: this model was trained on contexts with noise of 0 to {c.context.noise}")
    return camera

  def world(self, camera: Camera, **writing: float) -> World:
    """Everything that rolls out; `writing` replaces temperature, top_p and repetition of the config."""
    s = self.config.sample
    defaults = {name: s[name] for name in ("temperature", "top_p", "repetition")}
    chosen = defaults | {name: value for name, value in writing.items() if value is not None}
    return World(
      graph=self.graph, layout=self.layout, policy=self.policy, process=self.process, codec_of=self.codec,
      camera=camera, writer=Writer(tokens.BOS, tokens.EOS, tokens.PAD, **chosen),
      context_frames=self.config.context.frames, dtype=self.dtype,
    )  # fmt: skip

  # ---- data --------------------------------------------------------------------------------------------------------

  def tokenizer(self, places: int) -> TextTokenizer:
    """What cuts texts into tokens, for texts of `places` places, marks included."""
    return ByteTokenizer(places) if self.config.lm.tokens == "bytes" else WordTokenizer(places, memory_world.WORDS)

  @functools.cached_property
  def sources(self) -> mixture.Mixture:
    return mixture.Mixture.open(self.config.data.sources, self.config.data.weights, self.config.data.memory_gib)

  def batches(self, split: str, process_index: int, process_count: int, multiple_of: int) -> walks.Walks:
    d = self.config.data
    return walks.Walks(
      self.sources,
      clips=d.clips, frames=d.frames, height=d.height, width=d.width, fps=d.fps, batch=d.batch,
      seed=self.config.seed,
      split=split,
      validation_fraction=d.validation_fraction,
      captions=dense_captions.read(d.captions) if d.captions else None,
      shots=dense_captions.read_shots(d.shots) if d.shots else None,
      prompt_tokenizer=self.tokenizer(d.prompt_tokens),
      dynamics_tokenizer=self.tokenizer(d.dynamics_tokens),
      process_index=process_index,
      process_count=process_count,
      multiple_of=multiple_of,
    )  # fmt: skip

  def validation_rows(self, process_index: int, process_count: int, multiple_of: int) -> list[Batch]:
    split = self.batches("validation", process_index, process_count, multiple_of)
    return split.fixed_rows(self.config.validation.rows)

  def batch_spec(self, bucket: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
    del bucket  # clips have one size
    d = self.config.data
    array = lambda *shape, dtype: jax.ShapeDtypeStruct((d.batch, *shape), dtype)
    texts = {"prompt": (d.prompt_tokens,), "dynamics": (d.clips, d.dynamics_tokens)}
    return {
      "frames": array(d.clips, d.frames, d.height, d.width, 3, dtype=jnp.uint8),
      "image": array(d.height, d.width, 3, dtype=jnp.uint8),
      "cut": array(d.clips, dtype=jnp.bool),
      "fps": array(d.clips, dtype=jnp.float32),
      "index": array(dtype=jnp.uint32),
      **{name: array(*shape, dtype=jnp.int32) for name, shape in texts.items()},
      **{f"{name}_mask": array(*shape, dtype=jnp.bool) for name, shape in texts.items()},
    }

  def step_cost(self, batch: Batch) -> tuple[int, float]:
    rows, clips = batch["frames"].shape[:2]
    c, shape = self.config, self.latent_shape
    places, video = self.layout.length(clips), math.prod(self.owl.dit.grid(*shape[:3]))
    cost = language_model.forward_flops(self.owl.lm, places, predicted=clips * self.layout.dynamics)
    if c.stage == "align":
      return rows * places, 3.0 * rows * cost
    cost += c.loss.clips * flops.video_dit_forward(
      self.owl.dit, *shape[:3], self.layout.dynamics, context_frames=c.context.frames, state_len=self.owl.slots
    )
    return rows * (places + c.loss.clips * video), 3.0 * rows * cost

  def walk(self, batch: Batch) -> sequence.Walk:
    """The language model's part of a batch: d_{t-1} before clip t, as `data.dynamics` and `data.target` say."""
    c = self.config.data
    text_BOL, mask_BOL = batch["dynamics"], batch["dynamics_mask"]
    if c.dynamics == "caption":  # the one caption for every clip (Owl-1, equation 6)
      text_BOL, mask_BOL = _caption(batch["prompt"], batch["prompt_mask"], text_BOL.shape)
    if c.target == "current":  # d_t tells clip t, so that clip 0 is filmed without a text
      empty_L = jnp.arange(text_BOL.shape[2])
      first_L = jnp.where(empty_L == 0, tokens.BOS, jnp.where(empty_L == 1, tokens.EOS, tokens.PAD))
      later = lambda x_BOL, first_L: jnp.roll(x_BOL, 1, axis=1).at[:, 0].set(first_L)
      text_BOL, mask_BOL = later(text_BOL, first_L), later(mask_BOL, empty_L < 2)
    shown = self.layout.key_frame_indices(c.frames)
    return sequence.Walk(
      batch["image"], batch["prompt"], batch["prompt_mask"], text_BOL, mask_BOL, batch["frames"][:, :, shown]
    )

  # ---- loss --------------------------------------------------------------------------------------------------------

  def losses(self, params: Params, batch: Batch, keys_B: jax.Array, train: bool) -> tuple[jax.Array, dict[str, Any]]:
    c = self.config
    model: Owl = params_lib.merge(self.graph, owl_lib.adapted(params))
    clip_B = self._chosen_clip(batch, keys_B, train)
    before_BTHWC = None
    if c.stage == "self_rollout" and train:
      batch, before_BTHWC = self.own_past(model, batch, keys_B, clip_B)
    walk, wanted = self.walk(batch), batch["frames_wanted"] if "frames_wanted" in batch else batch["frames"]
    writes = c.stage in ("world", "self_rollout")
    reading = sequence.read(model, self.layout, self.policy, walk, dtype=self.dtype, logits=False)
    if c.stage == "align":
      return self._align(model, reading, walk)
    film_B = self._film(model, {**batch, "frames_wanted": wanted}, walk, reading, keys_B, clip_B, before_BTHWC, train)
    metrics = {"film": jnp.mean(film_B)}
    if not writes:
      return film_B, metrics
    text_B, right_B = objectives.next_token_by_clip(model.lm.logits, reading.hidden_BOLD, walk)
    metrics |= {"text": jnp.mean(text_B), "text_accuracy": jnp.mean(right_B)}
    return film_B + c.loss.text * text_B, metrics

  def _film(
    self, model: Owl, batch: Batch, walk: sequence.Walk, reading: sequence.Reading, keys_B: jax.Array,
    clip_B: jax.Array, before_BTHWC: jax.Array | None, train: bool,
  ) -> jax.Array:  # fmt: skip
    """Denoising loss (B,) of clip `clip_B` of each row and, for loss.clips above 1, of others spread evenly from it."""
    rows, clips = batch["frames"].shape[:2]
    number, state_BOQD = self.config.loss.clips, reading.state_BOQD
    if number > 1:  # each row once for each of its clips
      batch, walk, state_BOQD, keys_B, clip_B = jax.tree.map(
        lambda x: jnp.repeat(x, number, axis=0), (dict(batch), walk, state_BOQD, keys_B, clip_B)
      )
      place_B = jnp.tile(jnp.arange(number), rows)
      clip_B = (clip_B + place_B * clips // number) % clips
      keys_B = jax.vmap(jax.random.fold_in)(keys_B, place_B)
      batch["index"] = batch["index"] * number + place_B
    given = self.conditions(model, batch, walk, state_BOQD, clip_B, before_BTHWC)
    x0_BTHWC = self._encode(model, objectives.of_clip(batch["frames_wanted"], clip_B))
    return self._denoising(model, x0_BTHWC, given, batch, keys_B, train).reshape(rows, number).mean(1)

  def _chosen_clip(self, batch: Batch, keys_B: jax.Array, train: bool) -> jax.Array:
    """Which clip of each row is filmed: drawn, or by the row's number in a validation table."""
    clips = batch["frames"].shape[1]
    first = self.config.own.clips if self.config.stage == "self_rollout" else 0
    if not train:
      return first + (batch["index"] % (clips - first)).astype(jnp.int32)
    draw = jax.vmap(lambda key: jax.random.randint(key, (), first, clips))
    return draw(rng.stream(keys_B, "clip"))

  def _align(self, model: Owl, reading: sequence.Reading, walk: sequence.Walk) -> tuple[jax.Array, dict[str, Any]]:
    assert model.video.text is not None
    rows, clips = walk.dynamics_BOL.shape[:2]
    merged = lambda x_BO: x_BO.reshape(rows * clips, *x_BO.shape[2:])
    mask_NL = merged(walk.dynamics_mask_BOL)
    text_NLD = jax.lax.stop_gradient(model.video.text(merged(walk.dynamics_BOL), mask_NL, dtype=self.dtype))
    loss_N, cosine_N = objectives.align(merged(reading.state_BOQD), text_NLD, mask_NL)
    return loss_N.reshape(rows, clips).mean(1), {"cosine": jnp.mean(cosine_N)}

  def _encode(self, model: Owl, frames_BTHWC: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(self.codec(model).encode(frames_BTHWC.astype(jnp.float32) / 127.5 - 1))

  def conditions(
    self, model: Owl, batch: Batch, walk: sequence.Walk, state_BOQD: jax.Array, clip_B: jax.Array,
    before_BTHWC: jax.Array | None = None,
  ) -> ClipConditions:  # fmt: skip
    """What clip `clip_B` of each row is filmed under, its context clean; `before_BTHWC` stands in for the true one."""
    frames = self.config.context.frames
    picked = functools.partial(objectives.of_clip, clip_B=clip_B)
    text_BLD, mask_BL = model.encode_dynamics(picked(walk.dynamics_BOL), picked(walk.dynamics_mask_BOL), self.dtype)
    context_BTHWC, known_BT = film.image_context(self.codec(model), batch["image"], frames)
    if before_BTHWC is None:
      before = objectives.of_clip(batch["frames"], jnp.maximum(clip_B - 1, 0))
      before_BTHWC = self._encode(model, before)[:, -frames:]
    first_B = clip_B == 0
    context_BTHWC = jnp.where(first_B[:, None, None, None, None], context_BTHWC, before_BTHWC)
    cut_B = picked(batch["cut"]) & ~first_B
    return ClipConditions(
      state_BQD=picked(state_BOQD), text_BLD=text_BLD, text_mask_BL=mask_BL, fps_B=picked(batch["fps"]),
      context_BTHWC=jax.lax.stop_gradient(context_BTHWC), context_time_B=jnp.zeros(clip_B.shape),
      context_mask_BT=jnp.where(first_B[:, None], known_BT, True) & ~cut_B[:, None],
    )  # fmt: skip

  def _denoising(
    self, model: Owl, x0_BTHWC: jax.Array, given: ClipConditions, batch: Batch, keys_B: jax.Array, train: bool
  ) -> jax.Array:
    c = self.config
    level_B = jnp.full(keys_B.shape, c.sample.context_noise, jnp.float32)
    if train:
      uniform = jax.vmap(lambda key: jax.random.uniform(key, ()))
      level_B = c.context.noise * uniform(rng.stream(keys_B, "context_level"))
      shape = x0_BTHWC.shape[1:2] if c.diffusion.per_frame else ()
      time = time_lib.sample(rng.stream(keys_B, "time"), c.diffusion.time, shape=shape, shift=c.diffusion.shift)
    else:
      time = time_lib.stratified(batch["index"], c.diffusion.time, shift=c.diffusion.shift)
    given = film.with_context_noise(self.process, given, level_B, keys_B)
    if train:
      flip = lambda name, p: rng.bernoulli(rng.stream(keys_B, f"drop_{name}"), p)
      both_B = flip("both", c.drop.both)
      state_B, context_B = both_B | flip("state", c.drop.state), both_B | flip("context", c.drop.context)
      given = model.drop(given, state_B, both_B | flip("text", c.drop.text), context_B)
    noise_BTHWC = rng.normal(rng.stream(keys_B, "noise"), x0_BTHWC.shape[1:])
    x_t_BTHWC = self.process.corrupt(x0_BTHWC, noise_BTHWC, time)
    prediction_BTHWC = model.predict(x_t_BTHWC.astype(self.dtype), time, given)
    target_BTHWC = self.process.target(x0_BTHWC, noise_BTHWC, time)
    return loss_lib.mse_per_sample(prediction_BTHWC, target_BTHWC, self.process.weight(time))

  def own_past(
    self, model: Owl, batch: Batch, keys_B: jax.Array, clip_B: jax.Array
  ) -> tuple[Batch, jax.Array]:  # fmt: skip
    """A batch in which the model has filmed the `own.clips` clips before `clip_B` itself, and its last latents.

    `frames_wanted` keeps the true frames. No gradient goes through the films.
    """
    frozen: Owl = nnx.merge(*jax.tree.map(jax.lax.stop_gradient, nnx.split(model)))
    camera = self.camera(steps=self.config.own.steps, state=1.0, history=1.0, form="vanilla", rescale=0.0)
    own, before_BTHWC = {**batch, "frames_wanted": batch["frames"]}, None
    for ahead in range(self.config.own.clips, 0, -1):
      number_B, walk = clip_B - ahead, self.walk(own)
      reading = sequence.read(frozen, self.layout, self.policy, walk, dtype=self.dtype, logits=False)
      given = self.conditions(frozen, own, walk, reading.state_BOQD, number_B, before_BTHWC)
      keys = rng.stream(keys_B, f"own_{ahead}")
      latents_BTHWC = film.film(frozen, self.process, camera, given, keys, self.latent_shape[0])
      filmed = film.pixels(self.codec(frozen), latents_BTHWC)
      own = {**own, "frames": objectives.with_clip(own["frames"], number_B, filmed)}
      before_BTHWC = latents_BTHWC[:, -self.config.context.frames :]
    assert before_BTHWC is not None
    return jax.lax.stop_gradient(own), jax.lax.stop_gradient(before_BTHWC)


def check_stage(source: pathlib.Path, stage: str) -> None:
  """Refuses to start a stage from a later one's work directory.

  Raises:
    ConfigError: names both stages.
  """
  path = source / "config.json"
  if not path.is_file():
    return
  before = json.loads(path.read_text(encoding="utf-8"))
  if before.get("task") != "owl":
    raise ConfigError(
      f"init_from {source} trained the task {before.get('task')!r}; a base Video DiT goes into video.weights"
    )
  if STAGES.index(before["stage"]) > STAGES.index(stage):
    raise ConfigError(
      f"init_from {source} is of stage {before['stage']!r}, which comes after {stage!r}; in order: {' '.join(STAGES)}"
    )


def _caption(prompt_BL: jax.Array, mask_BL: jax.Array, shape: tuple[int, int, int]) -> tuple[jax.Array, jax.Array]:
  """The prompt as the dynamics of every clip (B, O, L); a longer one is cut, and closed."""
  rows, clips, length = shape
  short = max(length - prompt_BL.shape[1], 0)
  tokens_BL = jnp.pad(prompt_BL, ((0, 0), (0, short)), constant_values=tokens.PAD)[:, :length]
  mask_BL = jnp.pad(mask_BL, ((0, 0), (0, short)))[:, :length]
  tokens_BL = tokens_BL.at[:, -1].set(jnp.where(mask_BL[:, -1], tokens.EOS, tokens.PAD))
  every = lambda x_BL: jnp.broadcast_to(x_BL[:, None], (rows, clips, length))
  return every(tokens_BL), every(mask_BL)


def _vocabulary(c: ml_collections.ConfigDict) -> dict[str, int]:
  """The number of tokens, where it is not that of the language model's preset."""
  return {"vocabulary": tokens.SPECIAL + len(memory_world.WORDS)} if c.lm.tokens == memory_world.WORLD else {}


def _owl_config(c: ml_collections.ConfigDict) -> OwlConfig:
  dit = dataclasses.replace(
    video_dit.preset(c.video.size),
    latent_channels=c.codec.channels,
    text_width=c.text.width,
    conditions=tuple(c.video.conditions),
    fps=True,
    remat=c.video.remat,
  )
  return OwlConfig(
    lm=language_model.preset(c.lm.size, remat=c.lm.remat, **_vocabulary(c)),
    dit=dit,
    queries=c.state.queries,
    injection=c.state.injection,
    slots=c.state.slots,
    text_depth=c.text.depth,
    text_tokens=c.text.tokens,
    patch=c.lm.patch,
    lora_rank=c.lm.lora_rank,
    lora=tuple(c.lm.lora),
  )


TASK = OwlTask
