"""Owl-1 (arXiv 2412.09600): a language model that reads a world and says its state, and a Video DiT that films it.

The state is not carried: it is what the language model says at Q learned query tokens, after everything that stands
before them. How it reaches the Video DiT:

  add      a cross-attention stream of its own beside the text's, zero at the start (PAN, arXiv 2511.09057)
  replace  in place of the text (the paper); a resampler makes as many tokens as the text had
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.errors import ConfigError, nearest
from kling_jax.models import language_model
from kling_jax.models.language_model import LanguageModel
from kling_jax.models.text_to_video import TextToVideo
from kling_jax.models.video_dit import VideoDiTConfig
from kling_jax.nn import lora as lora_lib
from kling_jax.nn import params as params_lib
from kling_jax.nn.embed import TokenProjection, patchify
from kling_jax.nn.mlp import GeluMLP
from kling_jax.nn.multihead import KVCache, MultiHeadAttention
from kling_jax.nn.norm import RMSNorm
from kling_jax.nn.params import Params
from kling_jax.nn.weights import used

INJECTIONS = ("add", "replace")
LORA_SCALE = 2.0  # alpha / rank
Branch = frozenset[str]


@dataclasses.dataclass(frozen=True)
class OwlConfig:
  """Shape of a world model.

  Attributes:
    lm: of the language model; its `patch_width` is set here.
    dit: of the Video DiT; its `state_width` is set here. States are as wide as its text.
    queries: Q, state tokens that the language model reads out for a clip.
    injection: "add" or "replace", see the head of this file.
    slots: state tokens that the Video DiT is given; other than `queries`, a resampler makes them.
    text_depth, text_tokens: layers of the byte encoder of the Video DiT's text, and the longest text.
    patch: pixels (each way) of a frame patch that is one token of the language model.
    places: places of a clip in the sequence that have a learned vector, added to what stands there; 0 for none.
    lora_rank, lora: rank of the adapters and the projections of the language model that have them; 0 and () for none.
  """

  lm: language_model.Shape
  dit: VideoDiTConfig
  queries: int
  injection: str = "add"
  slots: int = 0
  text_depth: int = 1
  text_tokens: int = 96
  patch: int = 8
  places: int = 0
  lora_rank: int = 0
  lora: tuple[str, ...] = ()

  def __post_init__(self):
    if self.injection not in INJECTIONS:
      raise ConfigError(f"state injection {self.injection!r} does not exist{nearest(self.injection, INJECTIONS)}")
    if self.queries < 1:
      raise ConfigError(f"a world model needs at least 1 state query, not {self.queries}")
    state_width = self.dit.text_width if self.injection == "add" else None
    set_ = lambda name, value: object.__setattr__(self, name, value)
    set_("lm", dataclasses.replace(self.lm, patch_width=3 * self.patch**2))
    set_("dit", dataclasses.replace(self.dit, state_width=state_width))
    set_("slots", self.slots or self.queries)

  def frame_tokens(self, height: int, width: int) -> int:
    """Tokens of one frame; ConfigError where patches do not fit."""
    if height % self.patch or width % self.patch:
      raise ConfigError(
        f"frames of {height} x {width} do not divide into patches of {self.patch} pixels; legal: multiples of it"
      )
    return (height // self.patch) * (width // self.patch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClipConditions:
  """What one clip is filmed under; B rows.

  Attributes:
    state_BQD: the state, or null states.
    text_BLD, text_mask_BL: the encoded dynamics that lead to the clip; what "replace" does not use.
    fps_B: frames per second.
    context_BTHWC, context_time_B, context_mask_BT: last latents of what was before, the noise level that they have,
      and which are there; a row of False is a scene cut.
  """

  state_BQD: jax.Array
  text_BLD: jax.Array
  text_mask_BL: jax.Array
  fps_B: jax.Array
  context_BTHWC: jax.Array
  context_time_B: jax.Array
  context_mask_BT: jax.Array


class Resampler(nnx.Module):
  """Learned slots ask the state tokens: one pre-norm layer of cross-attention and MLP, (B, Q, D) to (B, slots, D)."""

  def __init__(self, width: int, slots: int, *, rngs: nnx.Rngs):
    self.slots = nnx.Param(jax.random.normal(rngs.params(), (slots, width), jnp.float32) * 0.02, axes=(None, "embed"))
    self.norm = RMSNorm(width)
    self.attention = MultiHeadAttention(width, max(1, width // 64), qk_norm="head", tokens="text", rngs=rngs)
    self.mlp_norm = RMSNorm(width)
    self.mlp = GeluMLP(width, 4 * width, tokens="text", rngs=rngs)

  def __call__(self, x_BQD: jax.Array) -> jax.Array:
    slots_QD = used(self.slots[...], (None, "embed"), x_BQD.dtype)
    slots_BQD = jnp.broadcast_to(slots_QD, (x_BQD.shape[0], *slots_QD.shape))
    slots_BQD = slots_BQD + self.attention(slots_BQD, self.norm(x_BQD))
    return slots_BQD + self.mlp(self.mlp_norm(slots_BQD))


class StateHead(nnx.Module):
  """The connector: hidden vectors at the queries to state tokens of the text's width, normalised as text is."""

  def __init__(self, config: OwlConfig, *, rngs: nnx.Rngs):
    resampled = config.slots != config.queries
    self.resampler = Resampler(config.lm.width, config.slots, rngs=rngs) if resampled else None
    self.project = TokenProjection(config.lm.width, config.dit.text_width, rngs=rngs)
    self.norm = RMSNorm(config.dit.text_width)

  def __call__(self, hidden_BQD: jax.Array) -> jax.Array:
    if self.resampler is not None:
      hidden_BQD = self.resampler(hidden_BQD)
    return self.norm(self.project(hidden_BQD))


class Owl(nnx.Module):
  """Language model, state queries and head, and text-to-video model as one tree of parameters.

  `lora.*` holds adapters of the language model by the names of its kernels; `adapted` puts them in.
  """

  def __init__(self, config: OwlConfig, *, codec: nnx.Module | None = None, rngs: nnx.Rngs):
    """Builds the parts; `codec` is one with weights, None for the wavelet."""
    self.config = config
    self.lm = LanguageModel(config.lm, rngs=rngs)
    vectors = lambda count: jax.random.normal(rngs.params(), (count, config.lm.width), jnp.float32) * 0.02
    self.queries = nnx.Param(vectors(config.queries), axes=(None, "embed"))
    self.places = nnx.Param(vectors(config.places), axes=(None, "embed")) if config.places else None
    self.head = StateHead(config, rngs=rngs)
    self.null_state = nnx.Param(jnp.zeros((config.slots, config.dit.text_width)), axes=(None, "text"))
    self.video = TextToVideo(
      config.dit, text_depth=config.text_depth, text_tokens=config.text_tokens, codec=codec, rngs=rngs
    )
    self.lora = _adapters(self.lm, config, rngs) if config.lora_rank else None

  # ---- the language model's side -------------------------------------------------------------------------------------

  def embed_frames(self, frames_BTHWC: jax.Array, dtype) -> jax.Array:
    """Frames uint8 (B, T, H, W, 3) as tokens (B, T * tokens of a frame, D) of the language model."""
    patch = (1, self.config.patch, self.config.patch)
    return self.lm.embed_frames(patchify(frames_BTHWC.astype(jnp.float32) / 127.5 - 1, patch), dtype=dtype)

  def query_tokens(self, rows: int, dtype) -> jax.Array:
    """The state queries as tokens (rows, Q, D); the same ones for every clip."""
    queries_QD = used(self.queries[...], (None, "embed"), dtype)
    return jnp.broadcast_to(queries_QD, (rows, *queries_QD.shape))

  def at_places(self, x_BLD: jax.Array, first: jax.Array | int = 0) -> jax.Array:
    """Embeddings (..., L, D) that stand in a clip from its place `first` on, with the vectors of their places."""
    if self.places is None:
      return x_BLD
    places_LD = used(self.places[...], (None, "embed"), x_BLD.dtype)
    return x_BLD + jax.lax.dynamic_slice_in_dim(places_LD, first, x_BLD.shape[-2])

  # ---- the Video DiT's side ------------------------------------------------------------------------------------------

  def encode_dynamics(self, tokens_BL: jax.Array, mask_BL: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """(text_BLD, mask_BL) that the Video DiT hears of the dynamics; the null text where it has no encoder for them."""
    if self.video.text is None or self.config.injection == "replace":
      rows = tokens_BL.shape[0]
      nothing = jnp.zeros((rows, 1, self.config.dit.text_width), dtype), jnp.ones((rows, 1), bool)
      return self.video.drop_text(*nothing, jnp.ones(rows, bool))
    return self.video.text(tokens_BL, mask_BL, dtype=dtype), mask_BL

  def drop(self, given: ClipConditions, state_B: jax.Array, text_B: jax.Array, context_B: jax.Array) -> ClipConditions:
    """Conditions with the learned null state, the learned null text and no context in the rows (B,) that say so."""
    null_QD = used(self.null_state[...], (None, "text"), jnp.float32)
    state_BQD = jnp.where(state_B[:, None, None], null_QD, given.state_BQD.astype(jnp.float32))
    text_BLD, mask_BL = self.video.drop_text(given.text_BLD, given.text_mask_BL, text_B)
    return dataclasses.replace(
      given,
      state_BQD=state_BQD.astype(given.state_BQD.dtype),
      text_BLD=text_BLD,
      text_mask_BL=mask_BL,
      context_mask_BT=given.context_mask_BT & ~context_B[:, None],
    )

  def predict(self, x_BTHWC: jax.Array, time: jax.Array, given: ClipConditions, cache: KVCache | None = None):
    """The Video DiT's prediction for a noisy clip; with the cache of `remember`, without computing the context again.

    The context is a causal block of its own: it does not see the clip, so that it is the same at every step of the
    sampler. Float32, in the shape of `x`.
    """
    dtype, frames = x_BTHWC.dtype, x_BTHWC.shape[1]
    shared: dict[str, Any] = self._told(given, dtype) | {
      "causal_frames": frames,
      "context_mask_BT": given.context_mask_BT,
    }
    if cache is not None:
      return self.video.dit(x_BTHWC, time, **shared, cache=cache)[0]
    context_BTHWC = given.context_BTHWC.astype(dtype)
    return self.video.dit(x_BTHWC, time, **shared, context_BTHWC=context_BTHWC, context_time=given.context_time_B)

  def remember(self, given: ClipConditions, frames: int, dtype) -> KVCache:
    """Keys and values of the context, with room for a clip of `frames` latent frames."""
    context_BTHWC = given.context_BTHWC.astype(dtype)
    rows, held, height, width, _ = context_BTHWC.shape
    cache = self.video.dit.init_cache(rows, held + frames, height, width, dtype)
    return self.video.dit(
      context_BTHWC,
      given.context_time_B,
      **self._told(given, dtype),
      context_mask_BT=given.context_mask_BT,
      cache=cache,
    )[1]

  def _told(self, given: ClipConditions, dtype) -> dict[str, Any]:
    fps_B = given.fps_B if self.config.dit.fps else None
    if self.config.injection == "replace":
      return {"text_BLD": given.state_BQD.astype(dtype), "fps_B": fps_B}
    return {
      "text_BLD": given.text_BLD.astype(dtype),
      "text_mask_BL": given.text_mask_BL,
      "state_BQD": given.state_BQD.astype(dtype),
      "fps_B": fps_B,
    }


def adapted(params: Params) -> Params:
  """The parameters with the adapters `lora.*` added to the language model's kernels; differentiable in both."""
  lora = {name.removeprefix("lora."): value for name, value in params.items() if name.startswith("lora.")}
  if not lora:
    return params
  base = {name.removeprefix("lm."): value for name, value in params.items() if name.startswith("lm.")}
  merged = lora_lib.merge_lora(base, lora, scale=LORA_SCALE)
  return params | {f"lm.{name}": value for name, value in merged.items()}


def _adapters(lm: LanguageModel, config: OwlConfig, rngs: nnx.Rngs) -> nnx.Dict:
  """LoRA parameters as a tree that mirrors the language model's, with the axes of its kernels."""
  leaves = params_lib.flatten(nnx.state(lm))
  pattern = language_model.lora_pattern(config.lora)
  tree: dict = {}
  for name, value in lora_lib.init_lora(leaves, config.lora_rank, pattern, key=rngs.params()).items():
    kernel, _, part = name.rpartition(".")
    *stack, inputs, outputs = leaves[kernel].get_metadata()["axes"]
    axes = (*stack, inputs, None) if part == "lora_a" else (*stack, None, outputs)
    *folders, leaf = name.split(".")
    place = tree
    for folder in folders:
      place = place.setdefault(folder, {})
    place[leaf] = nnx.Param(value, axes=axes)
  return _as_modules(tree)


def _as_modules(tree: dict) -> nnx.Dict:
  return nnx.Dict({name: _as_modules(leaf) if isinstance(leaf, dict) else leaf for name, leaf in tree.items()})
