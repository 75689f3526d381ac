"""Attention a few rows of scores at a time, in the products that XLA's CPU runs fastest: memory linear in tokens."""

import jax
import jax.numpy as jnp

from kling_jax.nn.mask import Seen

BLOCK = 256  # rows of one blockwise product; 256 to 1024 are within 2 % of each other on CPU
HIDDEN = -1e30  # a masked score: finite, so that a row without any visible key stays free of NaN


def softmax(scores: jax.Array, seen: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns unnormalised probabilities, 1 / their sum, and log(sum(exp(scores))); 0, 0, HIDDEN where none is seen."""
  if seen is not None:
    scores = jnp.where(seen, scores, HIDDEN)
  top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  p = jnp.exp(scores - top)
  total = jnp.sum(p, axis=-1, keepdims=True)
  some = top > HIDDEN / 2
  return p, jnp.where(some, 1 / total, 0.0), jnp.where(some, top + jnp.log(total), HIDDEN)


def forward(q_BNKE: jax.Array, k_BLGE: jax.Array, v_BLGE: jax.Array, seen: Seen) -> tuple[jax.Array, jax.Array]:
  """Softmax of whole rows, one head and one block of queries at a time.

  Args:
    q_BNKE: queries, already divided by sqrt(E).
    k_BLGE, v_BLGE: keys and values of G heads, a divisor of K.

  Returns:
    The attention (B, N, K, E) in the dtype of q, and the rows' logsumexp (B, K, N) in float32, HIDDEN where a query
    sees nothing.
  """
  batch, queries, heads, size = q_BNKE.shape
  keys = k_BLGE.shape[1]
  n, m = _padded(queries), _padded(keys)
  block = _block_size(queries)
  q, k, v = _by_head(q_BNKE, n, heads), _by_head(k_BLGE, m, heads), _by_head(v_BLGE, m, heads)
  seen = seen.pad(queries, keys, n, m)
  limits = None if seen.limit_N is None else seen.limit_N.reshape(-1, block)
  q_ids, k_ids = (None if ids is None else jnp.repeat(ids, heads, axis=0) for ids in (seen.q_BN, seen.k_BL))

  def head(args):
    q_NE, kT_EL, v_LE, q_ids_N, k_ids_L = args

    def rows(block_args):
      q, limit, q_ids = block_args
      p, inverse, lse = softmax(_product(q, kT_EL), _visible(limit, q_ids, k_ids_L, 0, m))
      return (_product(p.astype(v_LE.dtype), v_LE) * inverse).astype(q.dtype), lse[:, 0]

    q_ids_N = None if q_ids_N is None else q_ids_N.reshape(-1, block)
    o, lse = jax.lax.map(rows, (q_NE.reshape(-1, block, size), limits, q_ids_N))
    return o.reshape(n, size), lse.reshape(n)

  o, lse = jax.lax.map(head, (q, k.swapaxes(1, 2), v, q_ids, k_ids))
  return _by_token(o, batch, queries), lse.reshape(batch, heads, n)[:, :, :queries]


def backward(
  q_BNKE: jax.Array,
  k_BLGE: jax.Array,
  v_BLGE: jax.Array,
  seen: Seen,
  o_BNKE: jax.Array,
  lse_BKN: jax.Array,
  do_BNKE: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of q, k and v in float32, one block of keys at a time, in transposed scores (keys x queries).

  With p = exp(k q^T - lse): dv = p do, ds = p (v do^T - sum(do o)), dk = ds q, dq^T = sum of k^T ds over the blocks.
  q^T, k^T and do^T are made before the loops, so that every product inside is a plain (m, k) x (k, n).

  `o` and `lse` may be those of a longer row of keys, of which these are a part: what comes back is then this part's
  share of the gradients.
  """
  batch, queries, heads, size = q_BNKE.shape
  keys, groups = k_BLGE.shape[1:3]
  n, m = _padded(queries), _padded(keys)
  block = _block_size(keys)
  q, k, v = _by_head(q_BNKE, n, heads), _by_head(k_BLGE, m, heads), _by_head(v_BLGE, m, heads)
  do, seen = _by_head(do_BNKE, n, heads), seen.pad(queries, keys, n, m)
  delta_BKN = jnp.einsum("bnke,bnke->bkn", do_BNKE.astype(jnp.float32), o_BNKE.astype(jnp.float32))
  # A row that sees nothing has scores HIDDEN everywhere: against a logsumexp of 0 its probabilities vanish.
  lse_BKN = jnp.where(lse_BKN > HIDDEN / 2, lse_BKN, 0.0)
  delta, lse = (jnp.pad(x, ((0, 0), (0, 0), (0, n - queries))).reshape(-1, n) for x in (delta_BKN, lse_BKN))
  firsts = jnp.arange(0, m, block, dtype=jnp.int32)
  k_blocks, v_blocks = (x.reshape(-1, m // block, block, size) for x in (k, v))
  q_ids, k_ids = (None if ids is None else jnp.repeat(ids, heads, axis=0) for ids in (seen.q_BN, seen.k_BL))
  k_ids = None if k_ids is None else k_ids.reshape(-1, m // block, block)

  def head(args):
    q_NE, qT_EN, do_NE, doT_EN, lse_N, delta_N, q_ids_N, blocks = args

    def columns(dqT_EN, block_args):
      (k, kT, v, k_ids), first = block_args
      scores = _product(k, qT_EN)
      visible = _visible(seen.limit_N, q_ids_N, k_ids, first, block)
      if visible is not None:
        scores = jnp.where(visible.T, scores, HIDDEN)
      p = jnp.exp(scores - lse_N)
      ds = (p * (_product(v, doT_EN) - delta_N)).astype(q_NE.dtype)
      dv = _product(p.astype(do_NE.dtype), do_NE)
      return dqT_EN + _product(kT, ds), (_product(ds, q_NE), dv)

    dqT_EN, (dk, dv) = jax.lax.scan(columns, jnp.zeros(qT_EN.shape, jnp.float32), (blocks, firsts))
    # Without the barrier XLA folds the transpose into the product of a single block, in a form that its CPU backend
    # compiles and then cannot run in bfloat16 (DotThunk, jax 0.10.2).
    return jax.lax.optimization_barrier(dqT_EN).T, dk.reshape(m, size), dv.reshape(m, size)

  blocks = (k_blocks, k_blocks.swapaxes(2, 3), v_blocks, k_ids)
  dq, dk, dv = jax.lax.map(head, (q, q.swapaxes(1, 2), do, do.swapaxes(1, 2), lse, delta, q_ids, blocks))
  grouped = lambda x: x.reshape(batch, keys, groups, heads // groups, size).sum(axis=3)
  return _by_token(dq, batch, queries), *(grouped(_by_token(x, batch, keys)) for x in (dk, dv))


def _visible(
  limit_N: jax.Array | None, q_ids_N: jax.Array | None, k_ids_L: jax.Array | None, first: jax.Array | int, keys: int
) -> jax.Array | None:
  """Visibility (N, L) of the keys [first, first + keys); None if all are visible."""
  visible = None if q_ids_N is None or k_ids_L is None else q_ids_N[:, None] == k_ids_L
  if limit_N is not None:
    reach = first + jnp.arange(keys, dtype=jnp.int32) < limit_N[:, None]
    visible = reach if visible is None else visible & reach
  return visible


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _block_size(length: int) -> int:
  """Near-equal blocks of at most BLOCK rows, in whole SIMD widths, so that odd lengths pad little.

  The padded length has the same block size: ceil(length / BLOCK) blocks before and after.
  """
  return -(-length // (-(-length // BLOCK) * 16)) * 16


def _padded(length: int) -> int:
  return -(-length // _block_size(length)) * _block_size(length)


def _by_head(x_BNKE: jax.Array, length: int, heads: int) -> jax.Array:
  """(B * heads, length, E): one row of tokens a head, grouped heads repeated, tokens padded with zeros."""
  batch, tokens, groups, size = x_BNKE.shape
  x = jnp.pad(x_BNKE, ((0, 0), (0, length - tokens), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
  return jnp.repeat(x, heads // groups, axis=1).reshape(batch * heads, length, size)


def _by_token(x_GNE: jax.Array, batch: int, tokens: int) -> jax.Array:
  """The inverse of `_by_head`, without the padding."""
  return x_GNE.reshape(batch, -1, *x_GNE.shape[1:])[:, :, :tokens].transpose(0, 2, 1, 3)
