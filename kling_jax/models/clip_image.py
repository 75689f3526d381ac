"""CLIP's image tower (Radford et al. 2021): a ViT from a picture to a vector; for scorers that stand on CLIP.

Pre-norm blocks with biases everywhere, QuickGELU x sigmoid(1.702 x) as in OpenAI's weights, a class token in front,
learned positions, LayerNorm before and after the blocks, and a projection of the class token.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.nn.linear import Linear
from kling_jax.nn.multihead import MultiHeadAttention
from kling_jax.nn.norm import LayerNorm

HEAD_SIZE = 64  # of all of OpenAI's towers
EPSILON = 1e-5
MEAN = (0.48145466, 0.4578275, 0.40821073)  # of R, G, B in 0..1, as CLIP was trained
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class Shape:
  """The sizes of a tower: ViT-L/14 is Shape(1024, 24, 14, 224, 768)."""

  width: int
  depth: int
  patch: int
  image: int  # pixels of a side
  projection: int


class Block(nnx.Module):
  """x + attention(norm(x)), then x + MLP(norm(x))."""

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    self.attention_norm = LayerNorm(width, epsilon=EPSILON)
    self.attention = MultiHeadAttention(width, width // HEAD_SIZE, qk_norm="none", rngs=rngs)
    self.mlp_norm = LayerNorm(width, epsilon=EPSILON)
    self.up = Linear(width, 4 * width, axes=("embed", "mlp"), rngs=rngs)
    self.down = Linear(4 * width, width, axes=("mlp", "embed"), rngs=rngs)

  def __call__(self, x_BND: jax.Array) -> jax.Array:
    x_BND = x_BND + self.attention(self.attention_norm(x_BND))
    h_BNF = self.up(self.mlp_norm(x_BND))
    return x_BND + self.down(h_BNF * jax.nn.sigmoid(1.702 * h_BNF))


class ClipImageTower(nnx.Module):
  """Pictures to vectors; blocks are stacked and scanned."""

  def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
    self.shape = shape
    count = (shape.image // shape.patch) ** 2 + 1
    draw = lambda *sizes: jax.random.normal(rngs.params(), sizes, jnp.float32) * shape.width**-0.5
    self.patches = Linear(3 * shape.patch**2, shape.width, axes=(None, "embed"), use_bias=False, rngs=rngs)
    self.class_token = nnx.Param(draw(shape.width), axes=("embed",))
    self.positions = nnx.Param(draw(count, shape.width), axes=(None, "embed"))
    self.norm_before = LayerNorm(shape.width, epsilon=EPSILON)

    @nnx.split_rngs(splits=shape.depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
    def stack(rngs: nnx.Rngs) -> Block:
      return Block(shape.width, rngs=rngs)

    self.blocks = stack(rngs)
    self.norm_after = LayerNorm(shape.width, epsilon=EPSILON)
    self.projection = Linear(shape.width, shape.projection, axes=("embed", None), use_bias=False, rngs=rngs)

  def __call__(self, images_BHWC: jax.Array) -> jax.Array:
    """Vectors (B, projection), not normalised.

    Args:
      images_BHWC: float32 RGB of `shape.image` pixels a side, less MEAN, over DEVIATION.
    """
    batch, patch = images_BHWC.shape[0], self.shape.patch
    side = self.shape.image // patch
    tiles = images_BHWC[:, : side * patch, : side * patch].reshape(batch, side, patch, side, patch, 3)
    # A patch's values in the order of a convolution's kernel: channel, row, column.
    x_BND = self.patches(tiles.transpose(0, 1, 3, 5, 2, 4).reshape(batch, side * side, -1))
    first = jnp.broadcast_to(self.class_token[...], (batch, 1, self.shape.width))
    x_BND = self.norm_before(jnp.concatenate([first, x_BND], axis=1) + self.positions[...])
    graph, stacked = nnx.split(self.blocks)
    x_BND, _ = jax.lax.scan(lambda x, block: (nnx.merge(graph, block)(x), None), x_BND, stacked)
    return self.projection(self.norm_after(x_BND[:, 0]))
