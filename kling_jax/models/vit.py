"""Vision transformers over the patches of a picture: SigLIP's and DINOv2's, one class; blocks that VideoMAE shares.

Pre-norm blocks with biases; x + s1 * attention(norm(x)), then x + s2 * MLP(norm(x)), with learned scales s where
there are any (DINOv2's layer scale). Positions are a learned square table, resampled for pictures of another size.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kling_jax.nn import resample
from kling_jax.nn.embed import patchify
from kling_jax.nn.linear import Linear
from kling_jax.nn.mask import Mask
from kling_jax.nn.multihead import MultiHeadAttention
from kling_jax.nn.norm import LayerNorm
from kling_jax.nn.weights import used


@dataclasses.dataclass(frozen=True)
class Blocks:
  """A stack of transformer blocks.

  Attributes:
    width, depth, heads, hidden: of the tokens, the blocks, each attention, each MLP.
    mlp: "gelu" (by the error function), "gelu_tanh", or "swiglu" (down(silu(a) * b), a and b halves of one product).
    layer_scale: whether each branch has a learned scale.
    epsilon: of the norms.
  """

  width: int
  depth: int
  heads: int
  hidden: int
  mlp: str = "gelu"
  layer_scale: bool = False
  epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Shape:
  """A whole tower.

  Attributes:
    blocks: its transformer.
    patch: pixels of a patch's side.
    side: patches of a side of the position table.
    pool: "attention" (SigLIP: a learned query asks all patches) or "class" (DINOv2: a token of its own).
    registers: tokens beside the class token that belong to no place (DINOv2 with registers).
    kernel: how positions are brought to another grid; see `nn.resample`.
  """

  blocks: Blocks
  patch: int
  side: int
  pool: str
  registers: int = 0
  kernel: str = "cubic"


class Features(NamedTuple):
  """What a tower sees: one vector a picture (B, D), and one a patch (B, N, D), in rows."""

  pooled_BD: jax.Array
  patches_BND: jax.Array


class Mlp(nnx.Module):
  """down(activation(up(x))) with biases."""

  def __init__(self, width: int, hidden: int, kind: str, *, rngs: nnx.Rngs):
    self.kind = kind
    self.up = Linear(width, hidden * (2 if kind == "swiglu" else 1), axes=("embed", "mlp"), rngs=rngs)
    self.down = Linear(hidden, width, axes=("mlp", "embed"), rngs=rngs)

  def __call__(self, x_BND: jax.Array) -> jax.Array:
    h_BNF = self.up(x_BND)
    if self.kind == "swiglu":
      gate_BNF, h_BNF = jnp.split(h_BNF, 2, axis=-1)
      return self.down(jax.nn.silu(gate_BNF) * h_BNF)
    return self.down(jax.nn.gelu(h_BNF, approximate=self.kind == "gelu_tanh"))


class Block(nnx.Module):
  """Attention and MLP, each behind a norm and beside a way past it."""

  def __init__(self, shape: Blocks, *, rngs: nnx.Rngs):
    width = shape.width
    self.attention_norm = LayerNorm(width, epsilon=shape.epsilon)
    self.attention = MultiHeadAttention(width, shape.heads, qk_norm="none", rngs=rngs)
    self.mlp_norm = LayerNorm(width, epsilon=shape.epsilon)
    self.mlp = Mlp(width, shape.hidden, shape.mlp, rngs=rngs)
    scale = lambda: nnx.Param(jnp.ones(width, jnp.float32), axes=("embed",)) if shape.layer_scale else None
    self.attention_scale, self.mlp_scale = scale(), scale()

  def __call__(self, x_BND: jax.Array, mask: Mask) -> jax.Array:
    x_BND = x_BND + _scaled(self.attention(self.attention_norm(x_BND), mask=mask), self.attention_scale)
    return x_BND + _scaled(self.mlp(self.mlp_norm(x_BND)), self.mlp_scale)


def _scaled(x_BND: jax.Array, scale: nnx.Param | None) -> jax.Array:
  return x_BND if scale is None else x_BND * used(scale[...], ("embed",), x_BND.dtype)


def stack(shape: Blocks, rngs: nnx.Rngs) -> Block:
  """The blocks, each parameter with a leading axis of layers."""

  @nnx.split_rngs(splits=shape.depth)
  @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
  def build(rngs: nnx.Rngs) -> Block:
    return Block(shape, rngs=rngs)

  return build(rngs)


def run(blocks: Block, x_BND: jax.Array, mask: Mask = Mask()) -> jax.Array:
  """Tokens through all blocks of a `stack`."""
  graph, stacked = nnx.split(blocks)
  return jax.lax.scan(lambda x, block: (nnx.merge(graph, block)(x, mask), None), x_BND, stacked)[0]


class Pool(nnx.Module):
  """A learned query asks the patches; the answer goes through an MLP beside a way past it (SigLIP)."""

  def __init__(self, shape: Blocks, *, rngs: nnx.Rngs):
    draw = jax.random.normal(rngs.params(), (shape.width,), jnp.float32)
    self.query = nnx.Param(draw, axes=("embed",))
    self.attention = MultiHeadAttention(shape.width, shape.heads, qk_norm="none", rngs=rngs)
    self.norm = LayerNorm(shape.width, epsilon=shape.epsilon)
    self.mlp = Mlp(shape.width, shape.hidden, shape.mlp, rngs=rngs)

  def __call__(self, x_BND: jax.Array, mask: Mask) -> jax.Array:
    query = used(self.query[...], ("embed",), x_BND.dtype)
    asked_B1D = jnp.broadcast_to(query, (x_BND.shape[0], 1, x_BND.shape[2]))
    x_B1D = self.attention(asked_B1D, x_BND, mask=mask)
    return (x_B1D + self.mlp(self.norm(x_B1D)))[:, 0]


class Vit(nnx.Module):
  """Pictures to `Features`, in the dtype of the pictures."""

  def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
    self.shape = shape
    width = shape.blocks.width
    draw = lambda *sizes: nnx.Param(
      jax.random.normal(rngs.params(), sizes, jnp.float32) * width**-0.5, axes=(None,) * (len(sizes) - 1) + ("embed",)
    )
    self.patches = Linear(3 * shape.patch**2, width, axes=(None, "embed"), rngs=rngs)
    self.positions = draw(shape.side, shape.side, width)
    # The class token's place is part of it.
    self.first = draw(1 + shape.registers, width) if shape.pool == "class" else None
    self.blocks = stack(shape.blocks, rngs)
    self.norm = LayerNorm(width, epsilon=shape.blocks.epsilon)
    self.pool = Pool(shape.blocks, rngs=rngs) if shape.pool == "attention" else None

  def __call__(self, images_BHWC: jax.Array) -> Features:
    """Pictures of any one size.

    Args:
      images_BHWC: RGB, normalised as the tower was trained; sides are cut to multiples of the patch.
    """
    patch = self.shape.patch
    rows, columns = (size // patch for size in images_BHWC.shape[1:3])
    cut = images_BHWC[:, None, : rows * patch, : columns * patch]
    table = used(self.positions[...], (None, None, "embed"), jnp.float32)
    place_ND = resample.grid(table, (rows, columns), self.shape.kernel).reshape(rows * columns, -1)
    return self._seen(patchify(cut, (1, patch, patch)), place_ND, Mask())

  def packed(self, patches_BNP: jax.Array, places_BNM: jax.Array, real_BN: jax.Array) -> Features:
    """Pictures of several sizes in one batch, each row filled up with anything (SigLIP 2's NaFlex).

    Args:
      patches_BNP: the pixels of each patch in the order (row, column, colour).
      places_BNM: weights of the table's M positions in each patch's; see `places`.
      real_BN: True where a patch stands; what stands elsewhere has no influence, and its features mean nothing.
    """
    table = used(self.positions[...], (None, None, "embed"), jnp.float32)
    place_BND = jnp.einsum("bnm,md->bnd", places_BNM, table.reshape(-1, table.shape[-1]), precision="highest")
    return self._seen(patches_BNP, place_BND, Mask(keys_BL=real_BN))

  def _seen(self, patches_BNP: jax.Array, place_ND: jax.Array, mask: Mask) -> Features:
    x_BND = self.patches(patches_BNP)
    x_BND = x_BND + place_ND.astype(x_BND.dtype)
    count = 0
    if self.first is not None:
      first_RD = used(self.first[...], (None, "embed"), x_BND.dtype)
      count = len(first_RD)
      x_BND = jnp.concatenate([jnp.broadcast_to(first_RD, (len(x_BND), *first_RD.shape)), x_BND], axis=1)
      if mask.keys_BL is not None:
        mask = Mask(keys_BL=jnp.pad(mask.keys_BL, ((0, 0), (count, 0)), constant_values=True))
    x_BND = self.norm(run(self.blocks, x_BND, mask))
    pooled_BD = x_BND[:, 0] if self.pool is None else self.pool(x_BND, mask)
    return Features(pooled_BD, x_BND[:, count:])


def places(shape: Shape, grids: Sequence[tuple[int, int]], length: int) -> tuple[np.ndarray, np.ndarray]:
  """What `Vit.packed` wants beside the patches of pictures of `grids` (rows, columns) patches, filled up to `length`.

  Returns:
    (places_BNM float32, real_BN bool).

  Raises:
    ValueError: a picture has more patches than `length`.
  """
  places_BNM = np.zeros((len(grids), length, shape.side**2), np.float32)
  real_BN = np.zeros((len(grids), length), bool)
  for number, (rows, columns) in enumerate(grids):
    if rows * columns > length:
      raise ValueError(f"a picture of {rows} x {columns} patches in a row of {length}")
    down, across = (resample.matrix(shape.side, count, shape.kernel) for count in (rows, columns))
    places_BNM[number, : rows * columns] = np.kron(down, across)
    real_BN[number, : rows * columns] = True
  return places_BNM, real_BN
