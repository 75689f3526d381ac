"""A rollout as pure steps on a value: read the state, film the clip, look at it, write what happens next.

`World.step` is one function for the first clip and the hundredth: it compiles once. Everything that a rollout knows is
its `RolloutState`; whoever keeps an old one has rewound, whoever steps twice from one has forked. Dynamics are written
by the language model row by row, or given; both go through the same pass into the cache, so that a text that was given
and the same text predicted lead to the same bits.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kling_jax.diffusion.process import Process
from kling_jax.errors import ConfigError
from kling_jax.models.language_model import Cache
from kling_jax.models.latents import Codec
from kling_jax.models.owl import ClipConditions, Owl
from kling_jax.nn import params as params_lib
from kling_jax.nn import rng
from kling_jax.nn.params import Params
from kling_jax.world import film, sequence
from kling_jax.world.film import Camera
from kling_jax.world.history import HistoryPolicy
from kling_jax.world.layout import Layout


@dataclasses.dataclass(frozen=True)
class Writer:
  """How dynamics are written.

  Attributes:
    opening, closing, padding: the marks of a text.
    temperature: of sampling; 0 takes the likeliest token.
    top_p: sample among the likeliest tokens that hold this much probability together (Holtzman et al. 2020).
    repetition: logits of tokens that stand in the dynamics so far are divided by it where positive, multiplied where
      negative (Keskar et al. 2019); 1 switches it off. Of use for vocabularies of words, not of bytes.
  """

  opening: int
  closing: int
  padding: int
  temperature: float = 0.0
  top_p: float = 1.0
  repetition: float = 1.0

  def __post_init__(self):
    if not (math.isfinite(self.temperature) and self.temperature >= 0):
      raise ConfigError(f"temperature must be 0 (the likeliest) or above, not {self.temperature}")
    if not 0 < self.top_p <= 1:
      raise ConfigError(f"top_p must lie in (0, 1], not {self.top_p}; 1 switches it off")
    if not (math.isfinite(self.repetition) and self.repetition >= 1):
      raise ConfigError(f"the repetition penalty must be 1 (off) or above, not {self.repetition}")

  def choose(self, logits_BV: jax.Array, said_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """The next tokens (B,); never an opening mark or padding."""
    penal_BV = jnp.where(logits_BV > 0, logits_BV / self.repetition, logits_BV * self.repetition)
    logits_BV = jnp.where(said_BV, penal_BV, logits_BV)
    logits_BV = logits_BV.at[:, jnp.array([self.opening, self.padding])].set(-jnp.inf)
    if self.temperature == 0:
      return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = logits_BV / self.temperature
    if self.top_p < 1:
      order_BV = jnp.argsort(-logits_BV, axis=-1)
      sorted_BV = jax.nn.softmax(jnp.take_along_axis(logits_BV, order_BV, -1))
      likelier_BV = jnp.cumsum(sorted_BV, -1) - sorted_BV  # probability of the tokens before each
      rank_BV = jnp.argsort(order_BV, axis=-1)
      kept_BV = jnp.take_along_axis(likelier_BV < self.top_p, rank_BV, -1)
      logits_BV = jnp.where(kept_BV, logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RolloutState:
  """All that a rollout of B rows knows after some clips.

  Attributes:
    cache: of the language model.
    context_BTHWC, context_mask_BT: last latents, clean, and which are there.
    said_BV: bool, tokens that stand in the dynamics so far.
    clip: int32 (), number of the next clip.
    keys_B: typed keys; clip t draws from their folds with t.
    fps_B: frames per second.
  """

  cache: Cache
  context_BTHWC: jax.Array
  context_mask_BT: jax.Array
  said_BV: jax.Array
  clip: jax.Array
  keys_B: jax.Array
  fps_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Action:
  """What is asked of the next clip, row by row.

  Attributes:
    dynamics_BL, dynamics_mask_BL: tokens of a text with its marks.
    given_B: whether the text is to be used; elsewhere the language model writes one.
    cut_B: whether a new scene begins: the Video DiT then sees nothing of the clip before, only the state.
  """

  dynamics_BL: jax.Array
  dynamics_mask_BL: jax.Array
  given_B: jax.Array
  cut_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clip:
  """What a step gives: uint8 frames, the dynamics that led to them, and the state they were filmed from."""

  frames_BTHWC: jax.Array
  dynamics_BL: jax.Array
  dynamics_mask_BL: jax.Array
  state_BQD: jax.Array


@dataclasses.dataclass(frozen=True)
class World:
  """A world model ready to roll out; its methods are pure functions of parameters and values, to be jitted.

  Attributes:
    graph: of `Owl`, with adapters already in the parameters.
    layout, policy: the sequence and what of it is seen.
    process: what the Video DiT was trained on.
    codec_of: the codec, given the model.
    camera, writer: how clips are filmed and dynamics written.
    context_frames: latent frames of the clip before that the Video DiT sees.
    dtype: of the computation.
  """

  graph: nnx.GraphDef
  layout: Layout
  policy: HistoryPolicy
  process: Process
  codec_of: Callable[[Owl], Codec]
  camera: Camera
  writer: Writer
  context_frames: int = 1
  dtype: DTypeLike = jnp.float32

  def begin(
    self, params: Params, image_BHWC: jax.Array, prompt_BL: jax.Array, prompt_mask_BL: jax.Array, fps_B: jax.Array,
    keys_B: jax.Array,
  ) -> RolloutState:  # fmt: skip
    """The state before the first clip: image (uint8) and prompt are read."""
    model: Owl = params_lib.merge(self.graph, params)
    rows, layout = image_BHWC.shape[0], self.layout
    prefix_BLD = jnp.concatenate(sequence.embed_prefix(model, image_BHWC, prompt_BL, self.dtype), axis=1)
    real_BL = jnp.concatenate([jnp.ones((rows, layout.frame), bool), prompt_mask_BL], axis=1)
    cache = model.lm.init_cache(rows, self.policy.room(layout), self.dtype)
    _, cache = reading(model.lm(prefix_BLD, real_BL=real_BL, cache=cache))
    context_BTHWC, mask_BT = film.image_context(self.codec_of(model), image_BHWC, self.context_frames)
    return RolloutState(
      cache=self.policy.after_prefix(layout, cache),
      context_BTHWC=context_BTHWC,
      context_mask_BT=mask_BT,
      said_BV=jnp.zeros((rows, model.config.lm.vocabulary), bool),
      clip=jnp.zeros((), jnp.int32),
      keys_B=keys_B,
      fps_B=fps_B,
    )

  def propose(self, params: Params, state: RolloutState) -> tuple[jax.Array, jax.Array]:
    """The dynamics (tokens, mask) (B, L) that the next `step` will write where none are given."""
    model: Owl = params_lib.merge(self.graph, params)
    cache = self.policy.make_room(self.layout, state.cache, state.clip)
    return self._write(model, cache, state, jnp.zeros(state.fps_B.shape, bool))

  def step(self, params: Params, state: RolloutState, action: Action) -> tuple[Clip, RolloutState]:
    """One clip, and the state after it."""
    model: Owl = params_lib.merge(self.graph, params)
    rows = state.fps_B.shape[0]
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, state.clip))(state.keys_B)
    cache = self.policy.make_room(self.layout, state.cache, state.clip)
    tokens_BL, mask_BL, state_BQD, cache = self.think(model, cache, state, action)

    codec = self.codec_of(model)
    text_BLD, text_mask_BL = model.encode_dynamics(tokens_BL, mask_BL, self.dtype)
    given = ClipConditions(
      state_BQD=state_BQD,
      text_BLD=text_BLD,
      text_mask_BL=text_mask_BL,
      fps_B=state.fps_B,
      context_BTHWC=state.context_BTHWC,
      context_time_B=jnp.zeros(rows),
      context_mask_BT=state.context_mask_BT & ~action.cut_B[:, None],
    )
    camera = self.camera
    latent_frames = codec.latent_shape(camera.frames, camera.height, camera.width)[0]
    latents_BTHWC = film.film(model, self.process, camera, given, keys_B, latent_frames)
    frames_BTHWC = film.pixels(codec, latents_BTHWC)

    cache = self.look(model, cache, state.clip, frames_BTHWC)
    heard_BV = jnp.zeros_like(state.said_BV).at[jnp.arange(rows)[:, None], tokens_BL].max(mask_BL)
    after = dataclasses.replace(
      state,
      cache=cache,
      context_BTHWC=latents_BTHWC[:, -self.context_frames :],
      context_mask_BT=jnp.ones_like(state.context_mask_BT),
      said_BV=state.said_BV | heard_BV,
      clip=state.clip + 1,
    )
    return Clip(frames_BTHWC, tokens_BL, mask_BL, state_BQD), after

  def think(
    self, model: Owl, cache: Cache, state: RolloutState, action: Action
  ) -> tuple[jax.Array, jax.Array, jax.Array, Cache]:
    """Dynamics (tokens, mask), from the model or from the caller, and the state that they lead to."""
    written_BL, written_mask_BL = self._write(model, cache, state, action.given_B)
    tokens_BL = jnp.where(action.given_B[:, None], action.dynamics_BL, written_BL)
    mask_BL = jnp.where(action.given_B[:, None], action.dynamics_mask_BL, written_mask_BL)
    _, cache = self._read(model, cache, model.lm.embed_text(tokens_BL, dtype=self.dtype), state.clip, 0, mask_BL)
    queries_BQD, layout = model.query_tokens(tokens_BL.shape[0], self.dtype), self.layout
    hidden_BQD, cache = self._read(model, cache, queries_BQD, state.clip, layout.dynamics, mutual=layout.mutual)
    return tokens_BL, mask_BL, model.head(hidden_BQD), cache

  def look(self, model: Owl, cache: Cache, clip: jax.Array, frames_BTHWC: jax.Array) -> Cache:
    """The cache after the language model has seen the key frames of a clip."""
    shown_BTHWC = frames_BTHWC[:, self.layout.key_frame_indices(frames_BTHWC.shape[1])]
    observed_BLD = model.embed_frames(shown_BTHWC, self.dtype)
    return self._read(model, cache, observed_BLD, clip, self.layout.dynamics + self.layout.queries)[1]

  def _read(self, model: Owl, cache: Cache, x_BLD, clip, first: jax.Array | int, real_BL=None, mutual: bool = False):
    """Reads a part of a clip that begins at its place `first` into the cache."""
    count = x_BLD.shape[1]
    positions = self.layout.positions(clip, first, count)
    pairs = jnp.ones((1, count, cache.room), bool) if mutual else None
    x_BLD = model.at_places(x_BLD, first)
    return reading(model.lm(x_BLD, positions=positions, real_BL=real_BL, pairs_BNL=pairs, cache=cache))

  def _write(self, model: Owl, cache: Cache, state: RolloutState, skip_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Writes dynamics token by token until all rows have closed theirs; rows of `skip_B` get none."""
    rows, length, writer = skip_B.shape[0], self.layout.dynamics, self.writer
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, state.clip))(rng.stream(state.keys_B, "dynamics"))
    tokens_BL = jnp.full((rows, length), writer.padding, jnp.int32).at[:, 0].set(writer.opening)
    mask_BL = jnp.zeros((rows, length), bool).at[:, 0].set(True)

    def goes_on(carry) -> jax.Array:
      place, _, _, _, done_B, _ = carry
      return (place < length - 1) & ~jnp.all(done_B)

    def write(carry):
      place, tokens_BL, mask_BL, said_BV, done_B, cache = carry
      token_B1 = jax.lax.dynamic_slice_in_dim(tokens_BL, place, 1, axis=1)
      real_B1 = jax.lax.dynamic_slice_in_dim(mask_BL, place, 1, axis=1)
      x_B1D = model.lm.embed_text(token_B1, dtype=self.dtype)
      hidden_B1D, cache = self._read(model, cache, x_B1D, state.clip, place, real_B1)
      own_B = jax.vmap(lambda key: jax.random.fold_in(key, place))(keys_B)
      next_B = writer.choose(model.lm.logits(hidden_B1D[:, 0]), said_BV, own_B)
      next_B = jnp.where(place == length - 2, writer.closing, next_B)  # the last place is the closing mark's
      next_B = jnp.where(done_B, writer.padding, next_B)
      tokens_BL = jax.lax.dynamic_update_slice_in_dim(tokens_BL, next_B[:, None], place + 1, axis=1)
      mask_BL = jax.lax.dynamic_update_slice_in_dim(mask_BL, ~done_B[:, None], place + 1, axis=1)
      said_BV = said_BV.at[jnp.arange(rows), next_B].max(~done_B)
      return place + 1, tokens_BL, mask_BL, said_BV, done_B | (next_B == writer.closing), cache

    start = (jnp.zeros((), jnp.int32), tokens_BL, mask_BL, state.said_BV, skip_B, cache)
    _, tokens_BL, mask_BL, _, _, _ = jax.lax.while_loop(goes_on, write, start)
    return tokens_BL, mask_BL


def reading(output: tuple[jax.Array, Cache | None]) -> tuple[jax.Array, Cache]:
  """(hidden vectors, cache) of a language model that was given a cache."""
  hidden_BLD, cache = output
  assert cache is not None
  return hidden_BLD, cache


def fork(state: RolloutState, branch: int) -> RolloutState:
  """The same moment with other dice: what follows is drawn from the keys' folds with `branch`."""
  return dataclasses.replace(state, keys_B=jax.vmap(lambda key: jax.random.fold_in(key, branch))(state.keys_B))
