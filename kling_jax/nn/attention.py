"""The one attention function: a plain reference, and a blockwise road whose memory grows linearly with the tokens."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kling_jax.errors import ConfigError, nearest
from kling_jax.nn import lowering

ROADS = ("auto", "reference", "blockwise")
# On CPU "auto" leaves the reference from this many scores a head on. Up to 1024 tokens both roads take the same time
# within the noise of a shared machine; from 512 on, the scores that the reference keeps for its backward pass are
# larger than everything else in a small model's layer.
BLOCKWISE_SCORES = 512 * 512
BLOCK = 256  # rows of one blockwise product; 256 to 1024 are within 2 % of each other on CPU
_HIDDEN = -1e30  # a masked score: finite, so that a row without any visible key stays free of NaN


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["keys_BL", "offset", "start", "length"], meta_fields=["block"]
)
@dataclasses.dataclass(frozen=True)
class Mask:
  """Which keys a query sees, in a few numbers (never as an N x L array). The default hides nothing.

  With p = offset + n the place of query n among the keys, query n sees key l where all of these hold:
    keys_BL[b, l]                                        (padding)
    l < start + ((p - start) // block + 1) * block       (block-causal: its own block and all before it)
    l < length                                           (the filled part of a cache)

  A query that sees no key at all gets zeros.

  Attributes:
    keys_BL: True at real keys; None where all are.
    block: tokens in one causal block; None for no causality, 1 for the ordinary causal mask.
    offset: the place of the first query among the keys (what a cache held before); may be traced.
    start: where block counting starts; tokens before it (context) form blocks that end at it; may be traced.
    length: filled keys; None where all are; may be traced.
  """

  keys_BL: jax.Array | None = None
  block: int | None = None
  offset: int | jax.Array = 0
  start: int | jax.Array = 0
  length: int | jax.Array | None = None

  def limits(self, queries: int, keys: int) -> jax.Array | None:
    """For each query the number of leading keys it may see, int32 (N,); None where that is all of them."""
    if self.block is None and self.length is None:
      return None
    limit_N = jnp.full((queries,), keys if self.length is None else self.length, jnp.int32)
    if self.block is None:
      return limit_N
    place_N = self.offset + jnp.arange(queries, dtype=jnp.int32) - self.start
    return jnp.minimum(limit_N, self.start + (place_N // self.block + 1) * self.block)


EVERYTHING = Mask()


def attention(
  q_BNKE: jax.Array, k_BLKE: jax.Array, v_BLKE: jax.Array, *, mask: Mask = EVERYTHING, road: str = "auto"
) -> jax.Array:
  """softmax(q k^T / sqrt(E)) v over the keys that `mask` shows, in float32 inside and the dtype of q outside.

  Args:
    q_BNKE: queries.
    k_BLKE, v_BLKE: keys and values; their number of heads may be a divisor of that of the queries (grouped heads).
    road: "reference" (all scores at once), "blockwise" (a few rows of scores at a time, in the products that XLA's
      CPU runs fastest), or "auto": the reference for small problems, blockwise for large ones on CPU.

  Returns:
    (B, N, K, E). Rows of queries without a visible key are zero.

  Raises:
    ConfigError: an unknown road, or heads that do not divide.
  """
  if road not in ROADS:
    raise ConfigError(f"attention road {road!r} does not exist{nearest(road, ROADS)}")
  heads, groups = q_BNKE.shape[2], k_BLKE.shape[2]
  if heads % groups:
    raise ConfigError(f"{heads} query heads do not divide into {groups} key heads; choose a divisor of {heads}")
  if heads != groups:
    k_BLKE, v_BLKE = (jnp.repeat(x, heads // groups, axis=2) for x in (k_BLKE, v_BLKE))
  if road == "auto":
    large = q_BNKE.shape[1] * k_BLKE.shape[1] >= BLOCKWISE_SCORES
    road = "blockwise" if large and lowering.platform() == "cpu" else "reference"
  q_BNKE = q_BNKE * jnp.asarray(1 / math.sqrt(q_BNKE.shape[-1]), q_BNKE.dtype)
  if road == "blockwise":
    return _blockwise(q_BNKE, k_BLKE, v_BLKE, mask)
  return checkpoint_name(_reference(q_BNKE, k_BLKE, v_BLKE, mask), "attention")


def _visible(keys_L: jax.Array | None, limit_N: jax.Array | None, first: jax.Array | int, keys: int):
  """Visibility (N or 1, L or 1) of keys [first, first + keys) for queries with these limits; None if all are."""
  seen = None if keys_L is None else keys_L[..., None, :]
  if limit_N is not None:
    reach_NL = first + jnp.arange(keys, dtype=jnp.int32) < limit_N[:, None]
    seen = reach_NL if seen is None else seen & reach_NL
  return seen


def _softmax(scores: jax.Array, seen: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns unnormalised probabilities, 1 / their sum, and log(sum(exp(scores))); zeros where nothing is seen."""
  if seen is not None:
    scores = jnp.where(seen, scores, _HIDDEN)
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  p = jnp.exp(scores - top)
  total = jnp.sum(p, axis=-1, keepdims=True)
  some = top > _HIDDEN / 2
  return p, jnp.where(some, 1 / total, 0.0), jnp.where(some, top + jnp.log(total), 0.0)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


# ---- reference ---------------------------------------------------------------------------------------------------


def _reference(q_BNKE, k_BLKE, v_BLKE, mask):
  queries, keys = q_BNKE.shape[1], k_BLKE.shape[1]
  scores_BKNL = jnp.einsum("bnke,blke->bknl", q_BNKE, k_BLKE, preferred_element_type=jnp.float32)
  keys_BKL = None if mask.keys_BL is None else mask.keys_BL[:, None]
  p_BKNL, inverse, _ = _softmax(scores_BKNL, _visible(keys_BKL, mask.limits(queries, keys), 0, keys))
  p_BKNL = (p_BKNL * inverse).astype(v_BLKE.dtype)
  return jnp.einsum("bknl,blke->bnke", p_BKNL, v_BLKE, preferred_element_type=jnp.float32).astype(q_BNKE.dtype)


# ---- blockwise: one head at a time (G = B*K), a block of rows of scores at a time --------------------------------


def _block_size(length: int) -> int:
  """Near-equal blocks of at most BLOCK rows, in whole SIMD widths, so that odd lengths pad little.

  The padded length has the same block size: ceil(length / BLOCK) blocks before and after.
  """
  return -(-length // (-(-length // BLOCK) * 16)) * 16


def _padded(length: int) -> int:
  return -(-length // _block_size(length)) * _block_size(length)


def _pad(x: jax.Array, axis: int, length: int) -> jax.Array:
  return jnp.pad(x, [(0, length - x.shape[i] if i == axis else 0) for i in range(x.ndim)])


def _blockwise(q_BNKE, k_BLKE, v_BLKE, mask):
  batch, queries, heads, size = q_BNKE.shape
  keys = k_BLKE.shape[1]
  n, m = _padded(queries), _padded(keys)
  by_head = lambda x, length: _pad(x, 1, length).transpose(0, 2, 1, 3).reshape(batch * heads, length, size)
  limit_N, keys_GL = mask.limits(queries, keys), mask.keys_BL
  if m > keys and keys_GL is None and limit_N is None:
    limit_N = jnp.full((queries,), keys, jnp.int32)  # hides the padding; a mask's own limits do so already
  if keys_GL is not None:
    keys_GL = jnp.repeat(_pad(keys_GL, 1, m), heads, axis=0)
  if limit_N is not None:
    limit_N = _pad(limit_N, 0, n)
  core = (lambda *args: _forward(*args)[0]) if lowering.in_forward_mode() else _attend
  o_GNE = core(by_head(q_BNKE, n), by_head(k_BLKE, m), by_head(v_BLKE, m), keys_GL, limit_N)
  return o_GNE.reshape(batch, heads, n, size)[:, :, :queries].transpose(0, 2, 1, 3)


def _forward(q_GNE, k_GLE, v_GLE, keys_GL, limit_N):
  """Softmax of whole rows, one block of queries at a time. Returns o (G, N, E) and the rows' logsumexp (G, N)."""
  _, n, size = q_GNE.shape
  keys, block = k_GLE.shape[1], _block_size(n)
  limits = None if limit_N is None else limit_N.reshape(-1, block)

  def head(args):
    q_NE, kT_EL, v_LE, keys_L = args

    def rows(block_args):
      q, limit = block_args
      p, inverse, lse = _softmax(_product(q, kT_EL), _visible(keys_L, limit, 0, keys))
      return (_product(p.astype(v_LE.dtype), v_LE) * inverse).astype(q.dtype), lse[:, 0]

    o, lse = jax.lax.map(rows, (q_NE.reshape(-1, block, size), limits))
    return o.reshape(n, size), lse.reshape(n)

  return jax.lax.map(head, (q_GNE, k_GLE.swapaxes(1, 2), v_GLE, keys_GL))


def _backward(residuals, do_GNE):
  """Gradients, one block of keys at a time, in transposed scores (keys x queries).

  With p = exp(k q^T - lse): dv = p do, ds = p (v do^T - sum(do o)), dk = ds q, dq^T = sum of k^T ds over the blocks.
  q^T, k^T and do^T are made before the loops, so that every product inside is a plain (m, k) x (k, n).
  """
  q_GNE, k_GLE, v_GLE, keys_GL, limit_N, o_GNE, lse_GN = residuals
  heads, keys, size = k_GLE.shape
  block = _block_size(keys)
  firsts = jnp.arange(0, keys, block, dtype=jnp.int32)
  delta_GN = jnp.sum(do_GNE.astype(jnp.float32) * o_GNE.astype(jnp.float32), axis=-1)
  k_blocks, v_blocks = (x.reshape(heads, -1, block, size) for x in (k_GLE, v_GLE))
  seen_blocks = None if keys_GL is None else keys_GL.reshape(heads, -1, block)

  def head(args):
    q_NE, qT_EN, do_NE, doT_EN, lse_N, delta_N, blocks = args

    def columns(dqT_EN, block_args):
      (k, kT, v, keys_L), first = block_args
      scores = _product(k, qT_EN)
      seen = _visible(keys_L, limit_N, first, block)
      if seen is not None:
        scores = jnp.where(seen.T, scores, _HIDDEN)
      p = jnp.exp(scores - lse_N)
      ds = (p * (_product(v, doT_EN) - delta_N)).astype(q_NE.dtype)
      dv = _product(p.astype(do_NE.dtype), do_NE)
      return dqT_EN + _product(kT, ds), (_product(ds, q_NE), dv)

    dqT_EN, (dk, dv) = jax.lax.scan(columns, jnp.zeros(qT_EN.shape, jnp.float32), (blocks, firsts))
    return dqT_EN.T, dk.reshape(keys, size), dv.reshape(keys, size)

  blocks = (k_blocks, k_blocks.swapaxes(2, 3), v_blocks, seen_blocks)
  return jax.lax.map(head, (q_GNE, q_GNE.swapaxes(1, 2), do_GNE, do_GNE.swapaxes(1, 2), lse_GN, delta_GN, blocks))


@jax.custom_vjp
def _attend(q_GNE, k_GLE, v_GLE, keys_GL, limit_N):
  return _forward(q_GNE, k_GLE, v_GLE, keys_GL, limit_N)[0]


def _attend_forward(q_GNE, k_GLE, v_GLE, keys_GL, limit_N):
  o_GNE, lse_GN = _forward(q_GNE, k_GLE, v_GLE, keys_GL, limit_N)
  # Named here and not after the road: a remat policy that saves "attention" then keeps all that the backward pass
  # needs of this function, and repeats none of it.
  o_GNE, lse_GN = checkpoint_name(o_GNE, "attention"), checkpoint_name(lse_GN, "attention")
  return o_GNE, (q_GNE, k_GLE, v_GLE, keys_GL, limit_N, o_GNE, lse_GN)


def _attend_backward(residuals, do_GNE):
  dq, dk, dv = _backward(residuals, do_GNE)
  q_GNE, k_GLE, v_GLE = residuals[:3]
  return dq.astype(q_GNE.dtype), dk.astype(k_GLE.dtype), dv.astype(v_GLE.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)
