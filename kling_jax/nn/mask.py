"""Which keys a query sees, in a few numbers: padding, packed clips, block-causality, and the filled part of a cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

_HIDDEN_ID = -(2**31)  # the segment of a hidden key, which no query is in


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["keys_BL", "segments", "offset", "start", "length", "pairs_BNL"],
  meta_fields=["block"],
)
@dataclasses.dataclass(frozen=True)
class Mask:
  """Which keys a query sees, in a few numbers (an N x L array only where it must be). The default hides nothing.

  With p = offset + n the place of query n among the keys, query n sees key l where all of these hold:

      keys_BL[b, l]                                        (padding)
      segments[0][b, n] == segments[1][b, l]               (packing: both belong to the same clip)
      l < start + ((p - start) // block + 1) * block       (block-causal: its own block and all before it)
      l < length                                           (the filled part of a cache)
      pairs_BNL[b, n, l]                                   (anything else)

  A query that sees no key at all gets zeros. Blocks are counted through packed clips, so under a causal block each
  clip must begin where a block does.

  Attributes:
    keys_BL: True at real keys; None where all are.
    block: tokens in one causal block; None for no causality, 1 for the ordinary causal mask.
    offset: the place of the first query among the keys (what a cache held before); may be traced.
    start: where block counting starts; tokens before it (context) form blocks that end at it; may be traced.
    length: filled keys; None where all are; may be traced.
    segments: int32 numbers, not negative, of the clips that the queries (B, N) and the keys (B, L) belong to; None
      where a row holds one clip.
    pairs_BNL: bool, any rule that numbers cannot say, spelt out for each row (or one for all: B = 1); None for none.
      Only the plain reference takes it, so it costs memory of N x L a head.
  """

  keys_BL: jax.Array | None = None
  block: int | None = None
  offset: int | jax.Array = 0
  start: int | jax.Array = 0
  length: int | jax.Array | None = None
  segments: tuple[jax.Array, jax.Array] | None = None
  pairs_BNL: jax.Array | None = None

  def limits(self, queries: int, keys: int) -> jax.Array | None:
    """For each query the number of leading keys it may see, int32 (N,); None where that is all of them."""
    if self.block is None and self.length is None:
      return None
    limit_N = jnp.full((queries,), keys if self.length is None else self.length, jnp.int32)
    if self.block is None:
      return limit_N
    place_N = self.offset + jnp.arange(queries, dtype=jnp.int32) - self.start
    return jnp.minimum(limit_N, self.start + (place_N // self.block + 1) * self.block)

  def visible(self, queries: int, keys: int) -> jax.Array | None:
    """The mask spelt out, bool (B or 1, N or 1, L): for the plain reference alone. None where all is visible."""
    parts = []
    if self.keys_BL is not None:
      parts.append(self.keys_BL[:, None])
    if self.segments is not None:
      parts.append(self.segments[0][:, :, None] == self.segments[1][:, None])
    if self.pairs_BNL is not None:
      parts.append(self.pairs_BNL)
    limit_N = self.limits(queries, keys)
    if limit_N is not None:
      parts.append((jnp.arange(keys, dtype=jnp.int32) < limit_N[:, None])[None])
    return functools.reduce(jnp.logical_and, parts) if parts else None

  def seen(self, queries: int, keys: int) -> "Seen":
    """The mask as kernels take it: without pairs, with which no kernel is chosen."""
    q_BN, k_BL = self.segments or (None, None)
    if self.keys_BL is not None:
      if k_BL is None:
        q_BN = jnp.zeros((self.keys_BL.shape[0], queries), jnp.int32)
        k_BL = jnp.zeros(self.keys_BL.shape, jnp.int32)
      k_BL = jnp.where(self.keys_BL, k_BL, _HIDDEN_ID)
    return Seen(self.limits(queries, keys), q_BN, k_BL)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
  """A `Mask` resolved for given lengths: query n sees key l where l < limit_N[n] and q_BN[b, n] == k_BL[b, l].

  Attributes:
    limit_N: leading keys that each query may see; None for all.
    q_BN, k_BL: segment numbers, padding being a segment of its own; both None for one segment.
  """

  limit_N: jax.Array | None
  q_BN: jax.Array | None
  k_BL: jax.Array | None

  def pad(self, queries: int, keys: int, queries_to: int, keys_to: int) -> "Seen":
    """The same for longer, padded lengths: padded keys are hidden, and what padded queries see is of no interest."""
    longer = lambda x, length, fill: jnp.pad(
      x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])], constant_values=fill
    )
    limit_N, q_BN, k_BL = self.limit_N, self.q_BN, self.k_BL
    if keys_to > keys and k_BL is None and limit_N is None:
      limit_N = jnp.full((queries,), keys, jnp.int32)  # a mask's own limits never pass the end of the keys
    return Seen(
      None if limit_N is None else longer(limit_N, queries_to, 0),
      None if q_BN is None else longer(q_BN, queries_to, 0),
      None if k_BL is None else longer(k_BL, keys_to, _HIDDEN_ID),
    )

  def shard(self, first: jax.Array | int, length: int) -> "Seen":
    """What is seen of the `length` keys from `first` on, as if they were all there are."""
    return Seen(
      None if self.limit_N is None else jnp.clip(self.limit_N - first, 0, length),
      self.q_BN,
      None if self.k_BL is None else jax.lax.dynamic_slice_in_dim(self.k_BL, first, length, axis=1),
    )
