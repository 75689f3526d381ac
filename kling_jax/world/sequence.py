"""The sequence that the language model of a world reads: one layout, for training in one pass and for rollouts.

  image | prompt | dynamics, queries, observation of clip 0 | dynamics, queries, observation of clip 1 | ...

Owl-1's sequence (arXiv 2412.09600, equations 6 and 9), cut before each dynamics: d_{t-1} stands before s_t, so that
all clips are alike and clip 0 has dynamics too. Every part has a fixed number of places and stands at fixed positions;
where a text is shorter, its places are padding that nobody sees. A text is [open, tokens, close], as tokenizers write
it. Outputs are read at the queries (the state) and, one place before each, for the tokens of the dynamics and their
closing mark; the opening mark is given, and observations are not predicted.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kling_jax.errors import ConfigError
from kling_jax.models.owl import Owl
from kling_jax.world.history import HistoryPolicy
from kling_jax.world.layout import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walk:
  """The language model's part of a video of O clips; B rows.

  Attributes:
    image_BHWC: uint8 frame before the first clip.
    prompt_BL, prompt_mask_BL: tokens of the prompt and which are real.
    dynamics_BOL, dynamics_mask_BOL: tokens of the text that leads to each clip.
    key_frames_BOTHWC: uint8 key frames of each clip.
  """

  image_BHWC: jax.Array
  prompt_BL: jax.Array
  prompt_mask_BL: jax.Array
  dynamics_BOL: jax.Array
  dynamics_mask_BOL: jax.Array
  key_frames_BOTHWC: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reading:
  """What the language model says of a walk.

  Attributes:
    state_BOQD: states of all clips, after the state head.
    hidden_BOLD: what the logits are made of.
    logits_BOLV: logits of the dynamics' places 1 .. L - 1; None where they were not asked for.
  """

  state_BOQD: jax.Array
  hidden_BOLD: jax.Array
  logits_BOLV: jax.Array | None


def read(model: Owl, layout: Layout, policy: HistoryPolicy, walk: Walk, *, dtype, logits: bool = True) -> Reading:
  """The whole sequence in one pass: what training does, and what a rollout with its cache must agree with."""
  rows, clips = walk.dynamics_BOL.shape[:2]
  hidden_BLD, _ = model.lm(
    embed(model, layout, walk, dtype),
    positions=jnp.arange(layout.length(clips)),
    real_BL=real(layout, walk),
    pairs_BNL=policy.pairs(layout, clips),
  )
  blocks_BOLD = hidden_BLD[:, layout.prefix :].reshape(rows, clips, layout.clip, -1)
  text, states = layout.dynamics, layout.dynamics + layout.queries
  asked_NQD = blocks_BOLD[:, :, text:states].reshape(rows * clips, layout.queries, -1)
  state_BOQD = model.head(asked_NQD).reshape(rows, clips, model.config.slots, -1)
  hidden_BOLD = blocks_BOLD[:, :, : text - 1]
  return Reading(state_BOQD, hidden_BOLD, model.lm.logits(hidden_BOLD) if logits else None)


def embed(model: Owl, layout: Layout, walk: Walk, dtype) -> jax.Array:
  """The embeddings (B, N, D) of a whole sequence.

  Raises:
    ConfigError: texts or frames of another size than the layout's.
  """
  rows, clips, length = walk.dynamics_BOL.shape
  sizes = {"prompt": walk.prompt_BL.shape[1], "dynamics": length, "key_frames": walk.key_frames_BOTHWC.shape[2]}
  for name, size in sizes.items():
    if size != getattr(layout, name):
      raise ConfigError(f"sequence: {name} of {size} where the layout has {getattr(layout, name)}")
  dynamics_NLD = model.lm.embed_text(walk.dynamics_BOL.reshape(rows * clips, length), dtype=dtype)
  frames = walk.key_frames_BOTHWC
  observed_NLD = model.embed_frames(frames.reshape(rows * clips, *frames.shape[2:]), dtype)
  parts = [dynamics_NLD, model.query_tokens(rows * clips, dtype), observed_NLD]
  blocks_BLD = model.at_places(jnp.concatenate(parts, axis=1)).reshape(rows, clips * layout.clip, -1)
  return jnp.concatenate([*embed_prefix(model, walk.image_BHWC, walk.prompt_BL, dtype), blocks_BLD], axis=1)


def embed_prefix(model: Owl, image_BHWC: jax.Array, prompt_BL: jax.Array, dtype) -> list[jax.Array]:
  """The embeddings of image and prompt, which stand before the first clip."""
  return [model.embed_frames(image_BHWC[:, None], dtype), model.lm.embed_text(prompt_BL, dtype=dtype)]


def real(layout: Layout, walk: Walk) -> jax.Array:
  """bool (B, N), False at the padding of texts."""
  rows, clips = walk.dynamics_BOL.shape[:2]
  seen = jnp.ones((rows, clips, layout.queries + layout.observation), bool)
  blocks_BL = jnp.concatenate([walk.dynamics_mask_BOL, seen], axis=2).reshape(rows, -1)
  return jnp.concatenate([jnp.ones((rows, layout.frame), bool), walk.prompt_mask_BL, blocks_BL], axis=1)


def targets(walk: Walk) -> tuple[jax.Array, jax.Array]:
  """Tokens (B, O, L - 1) that `Reading.logits_BOLV` should predict, and where they count: all but the opening mark."""
  return walk.dynamics_BOL[..., 1:], walk.dynamics_mask_BOL[..., 1:]
