"""Attention through JAX's splash kernel for TPU, with masks as a few numbers that may be computed on the device."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from kling_jax.errors import ConfigError
from kling_jax.nn import lowering
from kling_jax.nn.blockwise import HIDDEN
from kling_jax.nn.mask import Seen

LANES = 128  # every block is a multiple of it


class Blocks(NamedTuple):
  """The largest blocks that the kernels may use, each a multiple of 128; real ones are fitted to the lengths.

  `q` queries and `kv` keys are brought into fast memory together, `kv_compute` keys enter one product; the same for
  the backward pass.
  """

  q: int
  kv: int
  kv_compute: int
  q_back: int
  kv_back: int
  kv_compute_back: int


# The largest of 512, 1024 and 2048 with which forward and backward pass compile for head sizes 64, 128 and 256 (at 2048
# the kernels of v4, v5e and v5p pass the 16 MiB of fast memory that the compiler gives them): `python
# benchmarks/tpu_compile.py`. MaxDiffusion's configs for Wan use 2048 to 3024 on v6e and 2048 on v7x. None was timed
# here: there is no TPU.
BLOCKS = {
  "v4": Blocks(1024, 1024, 512, 1024, 1024, 512),
  "v5e": Blocks(1024, 1024, 512, 1024, 1024, 512),
  "v5p": Blocks(1024, 1024, 512, 1024, 1024, 512),
  "v6e": Blocks(2048, 2048, 1024, 2048, 2048, 1024),
  "tpu7x": Blocks(2048, 2048, 1024, 2048, 2048, 1024),
}
UNKNOWN = Blocks(512, 512, 512, 512, 512, 512)  # compiles on all of them


def blocks(override: tuple[int, ...] | None = None) -> Blocks:
  """The blocks of the TPU generation traced for, or the six of `override`; ConfigError if they are none."""
  if override is None:
    return BLOCKS.get(lowering.generation() or "", UNKNOWN)
  if len(override) != 6 or any(size < LANES or size % LANES for size in override):
    raise ConfigError(f"splash blocks {override}: give {', '.join(Blocks._fields)}, each a multiple of {LANES}")
  return Blocks(*override)


def obstacle() -> str | None:
  """Why this road cannot be taken, or None; says what would help."""
  if lowering.in_forward_mode():
    return "it has no forward derivative"
  if lowering.platform() != "tpu" and not lowering.interpret():
    return f"it is a TPU kernel, and this is traced for {lowering.platform()} (lowering.interpreted() checks it)"
  return None


def forward(
  q_BNKE: jax.Array, k_BLGE: jax.Array, v_BLGE: jax.Array, seen: Seen, largest: Blocks
) -> tuple[jax.Array, jax.Array]:
  """See `blockwise.forward`: the same arguments, results and treatment of queries that see nothing."""
  layout = _Layout(q_BNKE.shape[1], k_BLGE.shape[1], largest)
  seen = seen.pad(layout.queries, layout.keys, layout.n, layout.m)
  sizes = layout.block_sizes
  splash = kernel.SplashAttentionKernel(
    _mask_info(seen, layout, sizes.block_q, sizes.block_kv),
    None,
    None,
    block_sizes=sizes,
    is_mqa=False,
    save_residuals=True,
    mask_value=kernel.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=None,
    mask_function=_mask_function(seen),
    interpret=lowering.interpret(),
  )
  q, k, v = _by_head(q_BNKE, layout.n), _by_head(k_BLGE, layout.m), _by_head(v_BLGE, layout.m)
  o_BKNE, (lse_BKN,) = jax.vmap(splash)(q, k, v, _segments(seen))
  # The kernel gives the mean of masked values, or 0 / 0, to a query that sees nothing, and a logsumexp near -1e38.
  o_BKNE, lse_BKN = o_BKNE[:, :, : layout.queries], lse_BKN[:, :, : layout.queries]
  some = lse_BKN > HIDDEN
  return jnp.where(some[..., None], o_BKNE, 0).swapaxes(1, 2), jnp.where(some, lse_BKN, HIDDEN)


def backward(
  q_BNKE: jax.Array,
  k_BLGE: jax.Array,
  v_BLGE: jax.Array,
  seen: Seen,
  o_BNKE: jax.Array,
  lse_BKN: jax.Array,
  do_BNKE: jax.Array,
  largest: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `blockwise.backward`, except that gradients come back in the dtypes of q, k and v, as the kernel has them."""
  layout = _Layout(q_BNKE.shape[1], k_BLGE.shape[1], largest)
  seen = seen.pad(layout.queries, layout.keys, layout.n, layout.m)
  sizes = layout.block_sizes
  dq_info = _mask_info(seen, layout, layout.q_back, layout.kv_back)
  dkv_info = _mask_info(seen, layout, layout.q_back, layout.kv_back, of_keys=True)
  function, interpret = _mask_function(seen), lowering.interpret()

  def row(q, k, v, segments, o, lse, do):
    # JAX's own rule would take o and logsumexp of these keys alone; a part of a longer row needs those of the whole.
    residuals = (q, k, v, segments, None, o, lse, dq_info, dkv_info)
    settings = (False, kernel.DEFAULT_MASK_VALUE, False, sizes, None, function, None, interpret)
    return kernel._splash_attention_bwd(*settings, residuals, do)[3:6]

  lse_BKN = jnp.pad(jnp.where(lse_BKN > HIDDEN / 2, lse_BKN, 0.0), ((0, 0), (0, 0), (0, layout.n - layout.queries)))
  dq, dk, dv = jax.vmap(row)(
    _by_head(q_BNKE, layout.n),
    _by_head(k_BLGE, layout.m),
    _by_head(v_BLGE, layout.m),
    _segments(seen),
    _by_head(o_BNKE, layout.n),
    lse_BKN,
    _by_head(do_BNKE, layout.n),
  )
  by_token = lambda x, tokens: x[:, :, :tokens].swapaxes(1, 2)
  return by_token(dq, layout.queries), by_token(dk, layout.keys), by_token(dv, layout.keys)


class _Layout:
  """Padded lengths `n` of the queries and `m` of the keys, and the blocks that divide them."""

  def __init__(self, queries: int, keys: int, largest: Blocks):
    self.queries, self.keys = queries, keys
    self.n, block_q = _fit(queries, largest.q, largest.q_back)
    self.m, block_kv = _fit(keys, largest.kv, min(largest.kv_compute, largest.kv_compute_back))
    self.q_back, self.kv_back = _divisor(block_q, largest.q_back), _divisor(block_kv, largest.kv_back)
    self.block_sizes = kernel.BlockSizes(
      block_q=block_q,
      block_kv=block_kv,
      block_kv_compute=_divisor(block_kv, largest.kv_compute),
      block_q_dkv=self.q_back,
      block_kv_dkv=self.kv_back,
      block_kv_dkv_compute=_divisor(self.kv_back, largest.kv_compute_back),
      block_q_dq=self.q_back,
      block_kv_dq=self.kv_back,
    )


def _divisor(size: int, most: int) -> int:
  """The largest multiple of 128 that divides `size` and is at most `most`."""
  return max(part for part in range(LANES, min(size, most) + 1, LANES) if size % part == 0)


def _fit(length: int, block: int, compute: int) -> tuple[int, int]:
  """Returns (padded length, block size): little padding, against blocks whose products are small.

  A product over 128 keys is taken to cost twice what its arithmetic does, one over 1024 an eighth more; that is a
  guess, which only has to keep 128 apart from 1024.
  """

  def cost(size: int) -> tuple[float, int]:
    return math.ceil(length / size) * size * (1 + LANES / _divisor(size, compute)), -size

  size = min(range(LANES, min(block, math.ceil(length / LANES) * LANES) + 1, LANES), key=cost)
  return math.ceil(length / size) * size, size


def _by_head(x_BNKE: jax.Array, length: int) -> jax.Array:
  """(B, K, length, E), padded with zeros."""
  return jnp.pad(x_BNKE, ((0, 0), (0, length - x_BNKE.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)


def _segments(seen: Seen) -> kernel.SegmentIds | None:
  return None if seen.q_BN is None or seen.k_BL is None else kernel.SegmentIds(seen.q_BN, seen.k_BL)


def _within(limit: jax.Array, key: jax.Array) -> jax.Array:
  return key < limit


def _mask_function(seen: Seen):
  return None if seen.limit_N is None else _within


def _mask_info(seen: Seen, layout: _Layout, block_q: int, block_kv: int, of_keys: bool = False) -> MaskInfo:
  """Which blocks the kernel visits, worked out from `limit_N` (also a traced one) instead of an N x L mask.

  The kernel hands `q_sequence`, meant for the places of the queries, to the mask function together with the places of
  the keys. It holds the limits here, so that one function serves every mask.

  A hidden block names the block of data that is in fast memory already (or is wanted next), so that nothing is
  fetched for it: `of_keys`, for the kernel that walks the queries of each block of keys, else of keys.
  """
  if seen.limit_N is None:
    return MaskInfo(None, None, None, None, None)
  rows, columns = layout.n // block_q, layout.m // block_kv
  reach = jnp.max(seen.limit_N.reshape(rows, block_q), axis=1)[:, None]
  visible = reach > jnp.arange(columns) * block_kv
  if of_keys:
    order = jnp.arange(rows)[:, None]
    data_next = jnp.where(visible, order, jnp.argmax(visible, axis=0))
  else:
    order = jnp.arange(columns)
    data_next = jnp.where(visible, order, jnp.maximum(jnp.sum(visible, axis=1, keepdims=True) - 1, 0))
  small = np.int8 if max(rows, columns) <= 127 else np.int16  # scalar memory is scarce
  return MaskInfo(
    data_next=data_next.astype(small)[None],
    mask_next=None,
    block_mask=jnp.where(visible, 2, 0).astype(np.int8)[None],
    partial_mask_blocks=None,
    q_sequence=seen.limit_N,  # type: ignore[arg-type]  # annotated for NumPy, taken as it comes
  )
