"""Multi-head attention layers (self and cross) around the attention function, and their explicit key-value cache."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kling_jax.errors import ConfigError
from kling_jax.nn.attention import EVERYTHING, Mask, attention
from kling_jax.nn.linear import Initializer, Linear, xavier
from kling_jax.nn.norm import HeadLayerNorm, RMSNorm
from kling_jax.nn.partition import constrain, of
from kling_jax.nn.rotary import rotate

QK_NORMS = ("full", "head", "head_layer", "none")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of what was seen, for S stacked layers; a value, never changed in place.

  Attributes:
    k_SBLKE, v_SBLKE: room for L tokens a layer; keys are stored with their rotary positions applied.
    length: int32 (), tokens filled so far.
  """

  k_SBLKE: jax.Array
  v_SBLKE: jax.Array
  length: jax.Array

  @classmethod
  def empty(cls, layers: int, batch: int, length: int, heads: int, size: int, dtype) -> "KVCache":
    """Room for `length` tokens, none filled."""
    room = jnp.zeros((layers, batch, length, heads, size), dtype)
    return cls(room, room, jnp.zeros((), jnp.int32))

  def append(self, k_SBNKE: jax.Array, v_SBNKE: jax.Array) -> "KVCache":
    """Returns the cache with N more tokens; the caller sees to it that they fit."""
    write = lambda room, new: jax.lax.dynamic_update_slice_in_dim(room, new.astype(room.dtype), self.length, axis=2)
    return KVCache(write(self.k_SBLKE, k_SBNKE), write(self.v_SBLKE, v_SBNKE), self.length + k_SBNKE.shape[2])


class MultiHeadAttention(nnx.Module):
  """Attention of `heads` heads, as its three steps: `qkv`, then `attend`; calling the layer does both.

  Args:
    width: size of the tokens that ask, and of the answer.
    heads, kv_heads: query heads, and key heads (a divisor; the same number by default).
    head_size: width / heads by default.
    context_width: size of the tokens that are asked; `width` by default.
    qk_norm: norm of queries and keys before rotation: RMS-norm "full" over all heads at once (Wan 2.1) or of each
      "head"; "head_layer", LayerNorm of each head with weights of its own (Chameleon); or "none".
    epsilon: of that norm.
    out_init: initial values of the output projection; zeros make the layer a no-op at the start.
    tokens: logical name of the asking tokens: "tokens" (a trainer may cut them, and heads, over devices) or "text".
  """

  def __init__(
    self,
    width: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    head_size: int | None = None,
    context_width: int | None = None,
    qk_norm: str = "full",
    epsilon: float = 1e-6,
    use_bias: bool = True,
    out_init: Initializer = xavier,
    tokens: str = "tokens",
    rngs: nnx.Rngs,
  ):
    if qk_norm not in QK_NORMS:
      raise ConfigError(f"qk_norm={qk_norm!r}; known: {', '.join(QK_NORMS)}")
    if head_size is None and width % heads:
      raise ConfigError(f"width={width} does not divide into heads={heads}; choose heads that divide it")
    self.heads, self.kv_heads, self.tokens = heads, kv_heads or heads, tokens
    self.head_size = head_size or width // heads
    asked, columns = context_width or width, of(tokens, "heads")
    queries, keys = self.heads * self.head_size, self.kv_heads * self.head_size
    self.q = Linear(width, queries, axes=("embed", columns), use_bias=use_bias, rngs=rngs)
    self.k = Linear(asked, keys, axes=("embed", columns), use_bias=use_bias, rngs=rngs)
    self.v = Linear(asked, keys, axes=("embed", columns), use_bias=use_bias, rngs=rngs)
    self.out = Linear(queries, width, axes=(columns, "embed"), use_bias=use_bias, init=out_init, rngs=rngs)
    self.full_norm = qk_norm == "full"
    norms = {
      "full": lambda heads: RMSNorm(heads * self.head_size, axis=columns, epsilon=epsilon),
      "head": lambda heads: RMSNorm(self.head_size, axis="head", epsilon=epsilon),
      "head_layer": lambda heads: HeadLayerNorm(heads, self.head_size, axis=columns, epsilon=epsilon),
      "none": lambda heads: None,
    }
    self.q_norm, self.k_norm = norms[qk_norm](self.heads), norms[qk_norm](self.kv_heads)

  def qkv(
    self, x_BND: jax.Array, context_BLD: jax.Array | None = None, *, angles: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns q (B,N,K,E), k and v (B,L,K,E) from `x`, or k and v from `context`; rotated by `angles` where given."""
    asked_BLD, tokens = (x_BND, self.tokens) if context_BLD is None else (context_BLD, "text")
    q = self._heads(self.q(x_BND), self.heads, self.q_norm, angles, self.tokens)
    k = self._heads(self.k(asked_BLD), self.kv_heads, self.k_norm, angles, tokens)
    v = self._heads(self.v(asked_BLD), self.kv_heads, None, None, tokens)
    return q, k, v

  def _heads(
    self, x: jax.Array, heads: int, norm: nnx.Module | None, angles: jax.Array | None, tokens: str
  ) -> jax.Array:
    if norm is not None and self.full_norm:
      x = norm(x)
    x_BNKE = x.reshape(*x.shape[:-1], heads, self.head_size)
    if norm is not None and not self.full_norm:
      x_BNKE = norm(x_BNKE)
    if angles is not None:
      x_BNKE = rotate(x_BNKE, angles)
    return checkpoint_name(constrain(x_BNKE, ("batch", tokens, of(self.tokens, "heads"), "head")), "qkv")

  def attend(
    self,
    q_BNKE: jax.Array,
    k_BLKE: jax.Array,
    v_BLKE: jax.Array,
    mask: Mask = EVERYTHING,
    *,
    road: str = "auto",
    asked: str | None = None,
  ) -> jax.Array:
    """Attention, then the output projection: (B, N, D). `asked` names the tokens of the keys if not as the layer's."""
    tokens = (self.tokens, asked or self.tokens)
    o_BNKE = attention(q_BNKE, k_BLKE, v_BLKE, mask=mask, road=road, tokens=tokens)
    return self.out(o_BNKE.reshape(*o_BNKE.shape[:-2], -1))

  def __call__(
    self,
    x_BND: jax.Array,
    context_BLD: jax.Array | None = None,
    *,
    mask: Mask = EVERYTHING,
    angles: jax.Array | None = None,
    road: str = "auto",
  ) -> jax.Array:
    """Self-attention, or cross-attention where `context_BLD` is given."""
    asked = None if context_BLD is None else "text"
    return self.attend(*self.qkv(x_BND, context_BLD, angles=angles), mask, road=road, asked=asked)
