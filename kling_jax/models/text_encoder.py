"""Text encoders: one call from tokens to vectors, and the byte-level one that needs no weights and trains along."""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
  """Shape of a ByteTextEncoder.

  Attributes:
    width: of the vectors, in and out.
    depth: layers.
    heads: attention heads; width / heads is even (rotary pairs).
    vocabulary: number of distinct tokens.
  """

  width: int = 256
  depth: int = 2
  heads: int = 4
  vocabulary: int = BYTES

  def __post_init__(self) -> None:
    if self.width % (2 * self.heads):
      legal = [heads for heads in range(1, self.width + 1) if self.width % (2 * heads) == 0]
      raise ConfigError(
        f"text encoder: {self.heads} heads do not cut width {self.width} into even parts; "
        f"legal heads: {', '.join(map(str, legal))}"
      )
    if self.depth < 1:
      raise ConfigError(f"text encoder: depth is {self.depth}; give 1 or more")


class Layer(nnx.Module):
  """Pre-norm transformer layer: x + attention(norm(x)), then x + MLP(norm(x)); bidirectional."""

  def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config.width)
    self.attention = MultiHeadAttention(config.width, config.heads, qk_norm="head", rngs=rngs)
    self.mlp_norm = RMSNorm(config.width)
    self.mlp = GeluMLP(config.width, 4 * config.width, rngs=rngs)

  def __call__(self, x_BLD: jax.Array, mask: Mask, angles: jax.Array) -> jax.Array:
    x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), mask=mask, angles=angles)
    return x_BLD + self.mlp(self.mlp_norm(x_BLD))


class ByteTextEncoder(nnx.Module):
  """Transformer over bytes, trained with the model that reads it.

  Positions are rotary, so that longer text than was trained on is no error; layers are stacked and scanned. Rows come
  out normalised (RMS 1 at the start), as T5's do.
  """

  def __init__(self, config: TextEncoderConfig, *, rngs: nnx.Rngs):
    self.config, self.width = config, config.width
    table = jax.random.normal(rngs.params(), (config.vocabulary, config.width), jnp.float32)  # unit variance, as T5's
    self.table = nnx.Param(table, axes=(None, "embed"))

    @nnx.split_rngs(splits=config.depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
    def stack(rngs: nnx.Rngs) -> Layer:
      return Layer(config, rngs=rngs)

    self.layers = stack(rngs)
    self.norm = RMSNorm(config.width)

  def __call__(self, tokens_BL: jax.Array, mask_BL: jax.Array, *, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Encodes a batch; see `TextEncoder`.

    Args:
      tokens_BL: int32, in [0, vocabulary).
      mask_BL: bool, True where a token stands. What stands elsewhere has no influence.
      dtype: of the computation and the result.
    """
    x_BLD = self.table[...].astype(dtype)[tokens_BL]
    mask = Mask(keys_BL=mask_BL)
    angles = angles_1d(jnp.arange(tokens_BL.shape[1]), self.config.width // self.config.heads)
    graph, stacked = nnx.split(self.layers)
    step = lambda x_BLD, layer: (nnx.merge(graph, layer)(x_BLD, mask, angles), None)
    x_BLD, _ = jax.lax.scan(step, x_BLD, stacked)
    return jnp.where(mask_BL[..., None], self.norm(x_BLD), 0)


def forward_flops(config: TextEncoderConfig, length: int) -> float:
  """Matrix-product FLOPs of encoding one text of `length` tokens: projections and MLP, scores and their use."""
  products = 4 * config.width**2 + 8 * config.width**2
  return config.depth * (2.0 * length * products + 4.0 * length**2 * config.width)
