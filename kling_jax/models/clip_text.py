"""CLIP's text tower (Radford et al. 2021): tokens to vectors, causal, and one vector of the whole text."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from kling_jax.errors import ConfigError, nearest
from kling_jax.nn.attention import Mask
from kling_jax.nn.linear import Linear, normal
from kling_jax.nn.multihead import MultiHeadAttention
from kling_jax.nn.norm import LayerNorm
from kling_jax.nn.weights import used

EPSILON = 1e-5
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI's weights
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # LAION's
}


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
  """Shape of a tower.

  Attributes:
    vocabulary, length: tokens that the table knows, and places that have a position.
    width, depth, heads, mlp_width: of the transformer.
    projection: size of the vector of the whole text; None where the file has no projection.
    activation: "quick_gelu" or "gelu".
  """

  vocabulary: int
  length: int
  width: int
  depth: int
  heads: int
  mlp_width: int
  projection: int | None
  activation: str = "quick_gelu"

  def __post_init__(self) -> None:
    if self.activation not in ACTIVATIONS:
      raise ConfigError(
        f"clip text: activation {self.activation!r} is unknown{nearest(self.activation, ACTIVATIONS)}; "
        f"known: {', '.join(ACTIVATIONS)}"
      )


class Block(nnx.Module):
  """x + attention(norm(x)), then x + MLP(norm(x))."""

  def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
    width = config.width
    self.activation = config.activation
    self.attention_norm = LayerNorm(width, epsilon=EPSILON)
    self.attention = MultiHeadAttention(width, config.heads, qk_norm="none", tokens="text", rngs=rngs)
    self.mlp_norm = LayerNorm(width, epsilon=EPSILON)
    self.up = Linear(width, config.mlp_width, axes=("embed", "text"), rngs=rngs)
    self.down = Linear(config.mlp_width, width, axes=("text", "embed"), rngs=rngs)

  def __call__(self, x_BLD: jax.Array, mask: Mask) -> jax.Array:
    x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), mask=mask)
    return x_BLD + self.down(ACTIVATIONS[self.activation](self.up(self.mlp_norm(x_BLD))))


class ClipTextEncoder(nnx.Module):
  """Blocks are stacked and scanned. Fills the protocol `models.text_encoder.TextEncoder`."""

  def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs):
    """Draws the weights from the stream `params`."""
    self.config, self.width = config, config.width
    draw = lambda rows, std: std * jax.random.normal(rngs.params(), (rows, config.width), jnp.float32)
    self.table = nnx.Param(draw(config.vocabulary, 0.02), axes=(None, "text"))
    self.positions = nnx.Param(draw(config.length, 0.01), axes=(None, "text"))

    @nnx.split_rngs(splits=config.depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
    def stack(rngs: nnx.Rngs) -> Block:
      return Block(config, rngs=rngs)

    self.blocks = stack(rngs)
    self.norm = LayerNorm(config.width, epsilon=EPSILON)
    self.projection = (
      Linear(config.width, config.projection, axes=("text", None), use_bias=False, init=normal(config.width**-0.5),
             rngs=rngs)
      if config.projection
      else None
    )  # fmt: skip

  def __call__(self, tokens_BL: jax.Array, mask_BL: jax.Array, *, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Vectors (B, L, D) behind the last norm, in `dtype`, which is also that of the computation; zero off the mask.

    Raises:
      ConfigError: more tokens than the tower has positions.
    """
    length = tokens_BL.shape[1]
    if length > self.config.length:
      raise ConfigError(f"text of {length} tokens for a CLIP with {self.config.length} positions; set them alike")
    x_BLD = used(self.table[...], (None, "text"), jnp.float32)[tokens_BL]
    x_BLD = (x_BLD + used(self.positions[...], (None, "text"), jnp.float32)[:length]).astype(dtype)
    mask = Mask(block=1, keys_BL=mask_BL)
    graph, stacked = nnx.split(self.blocks)
    x_BLD, _ = jax.lax.scan(lambda x, block: (nnx.merge(graph, block)(x, mask), None), x_BLD, stacked)
    return jnp.where(mask_BL[..., None], self.norm(x_BLD), 0)

  def pooled(self, text_BLD: jax.Array, mask_BL: jax.Array) -> jax.Array:
    """The vector (B, projection) of each text: its end token's, projected where there is a projection."""
    last_B = jnp.sum(mask_BL, axis=1) - 1
    end_BD = jnp.take_along_axis(text_BLD, last_B[:, None, None], axis=1)[:, 0]
    return end_BD if self.projection is None else self.projection(end_BD)
