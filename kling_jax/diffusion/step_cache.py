"""Step cache: network calls in which what the blocks added at an earlier call stands for the blocks.

MagCache (Ma et al. 2025, arXiv 2506.09045): let r_k be what all blocks together add to the tokens at network call k.
From call to call it hardly turns, and its length shrinks by ratios

  m_k = mean over tokens of |r_k| / |r_(k-1)|

that depend on the model and the sampler and hardly on the prompt, so that one dense run measures them (calibration).
Where r_j was computed last, using it again at call k > j is wrong by about |1 - m_(j+1) ... m_k|. `schedule` adds these
errors up and computes anew before their sum reaches a threshold. Which calls are computed is thus known before anything
runs: no decision depends on data, and every device and every row of a batch does the same.

Embeddings and head run at every call on the present input and time, so that a skipped call is not a repeated one.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FIRST = 0.2  # part of the calls, from the start on, that is always computed (MagCache's retention ratio)
MOST = 4  # skipped calls in a row


class Memory(NamedTuple):
  """What one network call leaves to the next.

  Attributes:
    added_BND: what the blocks added when they were last computed, in the dtype of the tokens.
    call: number of the next call.
    ratio_CB: m of the calls so far and each row; against the last computed call, and 1 where nothing was computed.
  """

  added_BND: jax.Array
  call: jax.Array
  ratio_CB: jax.Array


def start(shape: tuple[int, int, int], dtype: jnp.dtype, calls: int) -> Memory:
  """The memory before the first of `calls` calls on tokens of `shape` (B, N, D)."""
  return Memory(jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32), jnp.ones((calls, shape[0])))


def around(
  blocks: Callable[[jax.Array], jax.Array], x_BND: jax.Array, memory: Memory, compute_C: jax.Array
) -> tuple[jax.Array, Memory]:
  """The tokens after the blocks: computed at calls where `compute_C`, else `x` and what they added before.

  The first call must be a computed one.
  """

  def run() -> tuple[jax.Array, jax.Array, jax.Array]:
    y_BND = blocks(x_BND)
    added_BND = y_BND - x_BND
    now_BN, before_BN = (jnp.linalg.norm(r.astype(jnp.float32), axis=-1) for r in (added_BND, memory.added_BND))
    ratio_B = jnp.mean(jnp.where(before_BN > 0, now_BN / jnp.where(before_BN > 0, before_BN, 1.0), 1.0), axis=-1)
    return y_BND, added_BND, ratio_B

  def stand_in() -> tuple[jax.Array, jax.Array, jax.Array]:
    return x_BND + memory.added_BND, memory.added_BND, jnp.ones(x_BND.shape[0])

  y_BND, added_BND, ratio_B = jax.lax.cond(compute_C[memory.call], run, stand_in)
  return y_BND, Memory(added_BND, memory.call + 1, memory.ratio_CB.at[memory.call].set(ratio_B))


def schedule(ratio_C: Sequence[float] | np.ndarray, threshold: float) -> np.ndarray:
  """Which calls to compute, bool (C,), from the ratios of a dense run.

  The first fifth is computed, and then every call before which the errors |1 - product of ratios since the last
  computed call|, summed over the calls skipped since, would reach `threshold`; also each call after MOST skipped ones.
  A threshold of 0 computes all.
  """
  compute_C = np.ones(len(ratio_C), bool)
  product, error, skipped = 1.0, 0.0, 0
  for call in range(max(1, math.ceil(FIRST * len(ratio_C))), len(ratio_C)):
    product *= float(ratio_C[call])
    error += abs(1 - product)
    if error < threshold and skipped < MOST:
      compute_C[call] = False
      skipped += 1
    else:
      product, error, skipped = 1.0, 0.0, 0
  return compute_C
