"""Text encoders: one call from tokens to vectors, and the byte-level one that needs no weights and trains along."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kling_jax.errors import ConfigError
from kling_jax.nn.attention import Mask
from kling_jax.nn.mlp import GeluMLP
from kling_jax.nn.multihead import MultiHeadAttention
from kling_jax.nn.norm import RMSNorm
from kling_jax.nn.rotary import angles_1d
from kling_jax.nn.weights import used

BYTES = 259  # 256 bytes and pad, begin, end: what data/tokens.py writes


class TextEncoder(Protocol):
  """What a Video DiT wants of its text encoder; a byte-level or a T5-class one fills it alike.

  Attributes:
    width: size D of the vectors.
  """

  width: int

  def __call__(self, tokens_BL: jax.Array, mask_BL: jax.Array, *, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Vectors text_BLD in `dtype`; zero where `mask_BL` is False. `dtype` is also that of the computation."""
    ...


class Layer(nnx.Module):
  """Pre-norm transformer layer: x + attention(norm(x)), then x + MLP(norm(x)); bidirectional."""

  def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(width)
    self.attention = MultiHeadAttention(width, heads, qk_norm="head", tokens="text", rngs=rngs)
    self.mlp_norm = RMSNorm(width)
    self.mlp = GeluMLP(width, 4 * width, tokens="text", rngs=rngs)

  def __call__(self, x_BLD: jax.Array, mask: Mask, angles: jax.Array) -> jax.Array:
    x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), mask=mask, angles=angles)
    return x_BLD + self.mlp(self.mlp_norm(x_BLD))


class ByteTextEncoder(nnx.Module):
  """Transformer over bytes, trained with the model that reads it.

  Positions are rotary; layers are stacked and scanned. Vectors come out normalised (RMS 1 at the start), as T5's do.
  """

  def __init__(self, width: int, depth: int, max_length: int, *, heads: int | None = None, rngs: nnx.Rngs):
    """Draws the weights.

    Args:
      width: size D of the vectors, inside and out.
      depth: layers, at least 1.
      max_length: longest text that it is trained on; longer ones are refused, for it would not know such positions.
      heads: attention heads, width / heads being even (rotary pairs); heads of 64 where None.
      rngs: the stream `params`.

    Raises:
      ConfigError: no such shape.
    """
    heads = max(1, width // 64) if heads is None else heads
    if width % (2 * heads):
      legal = [count for count in range(1, width + 1) if width % (2 * count) == 0]
      raise ConfigError(
        f"text encoder: {heads} heads do not cut width {width} into even parts; "
        f"legal heads: {', '.join(map(str, legal)) or 'none, make the width even'}"
      )
    if depth < 1:
      raise ConfigError(f"text encoder: depth is {depth}; give 1 or more")
    self.width, self.heads, self.max_length = width, heads, max_length
    table = jax.random.normal(rngs.params(), (BYTES, width), jnp.float32)  # unit variance, as T5's
    self.table = nnx.Param(table, axes=(None, "text"))

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
    def stack(rngs: nnx.Rngs) -> Layer:
      return Layer(width, heads, rngs=rngs)

    self.layers = stack(rngs)
    self.norm = RMSNorm(width)

  def __call__(self, tokens_BL: jax.Array, mask_BL: jax.Array, *, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Encodes a batch; see `TextEncoder`.

    Args:
      tokens_BL: int32, in [0, 259), L at most `max_length`.
      mask_BL: bool, True where a token stands. What stands elsewhere has no influence.
      dtype: of the computation and the result.

    Raises:
      ConfigError: the text is longer than what the encoder was built for.
    """
    length = tokens_BL.shape[1]
    if length > self.max_length:
      raise ConfigError(f"text of {length} tokens for a text encoder of at most {self.max_length}; set them alike")
    x_BLD = used(self.table[...], (None, "text"), jnp.float32)[tokens_BL].astype(dtype)
    mask = Mask(keys_BL=mask_BL)
    angles = angles_1d(jnp.arange(length), self.width // self.heads)
    graph, stacked = nnx.split(self.layers)
    step = lambda x_BLD, layer: (nnx.merge(graph, layer)(x_BLD, mask, angles), None)
    x_BLD, _ = jax.lax.scan(step, x_BLD, stacked)
    return jnp.where(mask_BL[..., None], self.norm(x_BLD), 0)


def forward_flops(width: int, depth: int, length: int) -> float:
  """Matrix-product FLOPs of encoding one text of `length` tokens: projections and MLP, scores and their use."""
  products = 4 * width**2 + 8 * width**2
  return depth * (2.0 * length * products + 4.0 * length**2 * width)
