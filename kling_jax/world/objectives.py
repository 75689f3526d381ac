"""What a world model is trained for: states like text features, texts that come true, and one clip of a walk."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kling_jax.world import sequence
from kling_jax.world.sequence import Walk


def pooled(text_BLD: jax.Array, mask_BL: jax.Array, slots: int) -> jax.Array:
  """Text features averaged over `slots` equal parts of each real text, (B, slots, D).

  Part q of n tokens spans [q n / slots, (q + 1) n / slots), widened to whole tokens; with n = slots it is the text.
  """
  count_B = mask_BL.sum(-1)
  q, place_L = jnp.arange(slots), jnp.arange(mask_BL.shape[1])
  start_BQ = q * count_B[:, None] // slots
  end_BQ = -(-(q + 1) * count_B[:, None] // slots)
  inside_BQL = (place_L >= start_BQ[..., None]) & (place_L < end_BQ[..., None])
  weight_BQL = inside_BQL / jnp.maximum(inside_BQL.sum(-1, keepdims=True), 1)
  return jnp.einsum("bql,bld->bqd", weight_BQL, text_BLD.astype(jnp.float32))


def align(state_BQD: jax.Array, text_BLD: jax.Array, mask_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean squared error of states to text features (B,), and their mean cosine (B,) (Owl-1, equation 7).

  As many states as text places are compared place by place, padding left out; else with the text `pooled`.
  """
  state_BQD = state_BQD.astype(jnp.float32)
  if state_BQD.shape[1] == text_BLD.shape[1]:
    target_BQD, counted_BQ = text_BLD.astype(jnp.float32), mask_BL.astype(jnp.float32)
  else:
    target_BQD = pooled(text_BLD, mask_BL, state_BQD.shape[1])
    counted_BQ = jnp.ones(state_BQD.shape[:2])
  norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), -1) + 1e-12)
  cosine_BQ = jnp.sum(state_BQD * target_BQD, -1) / (norm(state_BQD) * norm(target_BQD))
  mean = lambda x_BQ: jnp.sum(x_BQ * counted_BQ, -1) / jnp.maximum(counted_BQ.sum(-1), 1)
  return mean(jnp.mean(jnp.square(state_BQD - target_BQD), -1)), mean(cosine_BQ)


def next_token(logits_BOLV: jax.Array, walk: Walk) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of the dynamics (B,), mean over their tokens and closing marks, and the share that is right (B,)."""
  tokens_BOL, counted_BOL = sequence.targets(walk)
  loss_BOL = optax.softmax_cross_entropy_with_integer_labels(logits_BOLV, tokens_BOL)
  right_BOL = jnp.argmax(logits_BOLV, -1) == tokens_BOL
  mean = lambda x_BOL: jnp.sum(x_BOL * counted_BOL, (1, 2)) / jnp.maximum(counted_BOL.sum((1, 2)), 1)
  return mean(loss_BOL), mean(right_BOL)


def next_token_by_clip(
  logits_of: Callable[[jax.Array], jax.Array], hidden_BOLD: jax.Array, walk: Walk
) -> tuple[jax.Array, jax.Array]:
  """`next_token` of logits_of(hidden), one clip at a time and once more backward: the logits of one clip in memory.

  With a large vocabulary those of a whole walk are the largest array of a training step.
  """
  tokens_BOL, counted_BOL = sequence.targets(walk)

  @jax.checkpoint
  def clip(sums: tuple[jax.Array, jax.Array], part: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
    hidden_BLD, tokens_BL, counted_BL = part
    logits_BLV = logits_of(hidden_BLD)
    loss_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, tokens_BL)
    right_BL = jnp.argmax(logits_BLV, -1) == tokens_BL
    total = lambda x_BL: jnp.sum(x_BL * counted_BL, 1)
    return (sums[0] + total(loss_BL), sums[1] + total(right_BL)), None

  zero_B = jnp.zeros(tokens_BOL.shape[0], jnp.float32)
  parts = jax.tree.map(lambda x_BO: jnp.moveaxis(x_BO, 1, 0), (hidden_BOLD, tokens_BOL, counted_BOL))
  (loss_B, right_B), _ = jax.lax.scan(clip, (zero_B, zero_B), parts)
  count_B = jnp.maximum(counted_BOL.sum((1, 2)), 1)
  return loss_B / count_B, right_B / count_B


def of_clip(x_BO: jax.Array, clip_B: jax.Array) -> jax.Array:
  """Of (B, O, ...) each row's clip: (B, ...)."""
  return jax.vmap(lambda row, clip: jax.lax.dynamic_index_in_dim(row, clip, keepdims=False))(x_BO, clip_B)


def with_clip(x_BO: jax.Array, clip_B: jax.Array, value_B: jax.Array) -> jax.Array:
  """(B, O, ...) with each row's clip replaced."""
  return jax.vmap(lambda row, clip, value: jax.lax.dynamic_update_index_in_dim(row, value, clip, 0))(
    x_BO, clip_B, value_B
  )
