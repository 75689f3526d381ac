"""Qwen3-VL's vision tower: pictures and videos of any size become tokens of the language model, with a deep stack.

A ViT over patches of two frames. Positions are learnt for a square grid and stretched to the picture's, and rotary in
row and column. Frames see only themselves. 2 x 2 neighbours become one token; what some inner layers know is merged in
the same way and goes to the first layers of the language model (the deep stack).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kling_jax.errors import ConfigError
from kling_jax.nn.embed import PatchEmbedding
from kling_jax.nn.linear import Linear
from kling_jax.nn.mlp import GeluMLP
from kling_jax.nn.multihead import MultiHeadAttention
from kling_jax.nn.norm import LayerNorm
from kling_jax.nn.rotary import angles_1d


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
  """Shape of a tower.

  Attributes:
    width, depth, heads, mlp_width: of the ViT.
    out_width: of the tokens, the width of the language model.
    side: rows and columns of the learnt positions.
    deep: layers whose tokens go to the deep stack, ascending.
    patch: pixels of a patch's side. frames: in a patch. merge: patches of a token's side.
  """

  width: int
  depth: int
  heads: int
  mlp_width: int
  out_width: int
  side: int = 48
  deep: tuple[int, ...] = ()
  patch: int = 16
  frames: int = 2
  merge: int = 2

  def __post_init__(self):
    if self.width % self.heads or (self.width // self.heads) % 4:
      raise ConfigError(f"vision tower: heads={self.heads} must cut width={self.width} into multiples of 4")
    if list(self.deep) != sorted(set(self.deep)) or any(not 0 <= layer < self.depth for layer in self.deep):
      raise ConfigError(f"vision tower: deep={self.deep} must be ascending layers of {self.depth}")

  def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Patches in (frame, row, column); ConfigError where a size does not divide."""
    cell = self.patch * self.merge
    if frames % self.frames or height % cell or width % cell or not frames * height * width:
      raise ConfigError(
        f"{frames} frames of {height} x {width}: the tower takes multiples of {self.frames} frames and {cell} pixels; "
        "show a picture as equal frames"
      )
    return frames // self.frames, height // self.patch, width // self.patch


class VisionLayer(nnx.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)), with biases."""

  def __init__(self, config: QwenVisionConfig, *, rngs: nnx.Rngs):
    self.attention_norm = LayerNorm(config.width)
    self.attention = MultiHeadAttention(config.width, config.heads, qk_norm="none", rngs=rngs)
    self.mlp_norm = LayerNorm(config.width)
    self.mlp = GeluMLP(config.width, config.mlp_width, rngs=rngs)

  def __call__(self, x_BND: jax.Array, angles: jax.Array) -> jax.Array:
    x_BND = x_BND + self.attention(self.attention_norm(x_BND), angles=angles)
    return x_BND + self.mlp(self.mlp_norm(x_BND))


class Merger(nnx.Module):
  """merge x merge neighbours to one token: norm, Linear, GELU, Linear. The norm stands before or after joining them."""

  def __init__(self, config: QwenVisionConfig, joined_norm: bool, *, rngs: nnx.Rngs):
    self.merge, self.joined_norm = config.merge, joined_norm
    inner = config.width * config.merge**2
    self.norm = LayerNorm(inner if joined_norm else config.width)
    self.up = Linear(inner, inner, axes=("embed", "mlp"), rngs=rngs)
    self.down = Linear(inner, config.out_width, axes=("mlp", "embed"), rngs=rngs)

  def __call__(self, x_BND: jax.Array, rows: int, columns: int) -> jax.Array:
    x_BND = x_BND if self.joined_norm else self.norm(x_BND)
    batch, _, width = x_BND.shape
    m = self.merge
    cells = x_BND.reshape(batch, rows // m, m, columns // m, m, width).transpose(0, 1, 3, 2, 4, 5)
    x_BND = cells.reshape(batch, -1, m * m * width)
    x_BND = self.norm(x_BND) if self.joined_norm else x_BND
    return self.down(jax.nn.gelu(self.up(x_BND), approximate=False))


class QwenVision(nnx.Module):
  """See the module's first lines; layers are stacked and scanned between those of the deep stack."""

  def __init__(self, config: QwenVisionConfig, *, rngs: nnx.Rngs):
    self.config = config
    size = (config.frames, config.patch, config.patch)
    self.patches = PatchEmbedding(size, 3, config.width, rngs=rngs)
    table = jax.random.normal(rngs.params(), (config.side**2, config.width), jnp.float32) * 0.02
    self.positions = nnx.Param(table, axes=(None, "embed"))

    @nnx.split_rngs(splits=config.depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
    def stack(rngs: nnx.Rngs) -> VisionLayer:
      return VisionLayer(config, rngs=rngs)

    self.layers = stack(rngs)
    self.merger = Merger(config, False, rngs=rngs)
    self.deep = nnx.List([Merger(config, True, rngs=rngs) for _ in config.deep])

  def __call__(self, frames_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens (B, N, D) in the order frame, row, column, and the deep stack (S, B, N, D).

    Args:
      frames_BTHWC: RGB in [-1, 1], float32 or bfloat16: the dtype that it computes in. A picture is equal frames.
    """
    config = self.config
    batch = frames_BTHWC.shape[0]
    frames, rows, columns = config.grid(*frames_BTHWC.shape[1:4])
    x_BND = self.patches(frames_BTHWC).reshape(batch * frames, rows * columns, config.width)
    x_BND = x_BND + self._positions(rows, columns).astype(x_BND.dtype)
    angles = self._angles(rows, columns)
    graph, stacked = nnx.split(self.layers)
    step = lambda x_BND, layer: (nnx.merge(graph, layer)(x_BND, angles), None)
    deep, start = [], 0
    for merger, last in [*zip(self.deep, config.deep, strict=True), (None, config.depth - 1)]:
      if start <= last:
        part = jax.tree.map(lambda leaf: leaf[start : last + 1], stacked)  # noqa: B023 (used at once)
        x_BND, _ = jax.lax.scan(step, x_BND, part)
        start = last + 1
      if merger is not None:
        deep.append(merger(x_BND, rows, columns))
    whole = lambda tokens: tokens.reshape(batch, -1, config.out_width)
    tokens_BND = whole(self.merger(x_BND, rows, columns))
    empty = jnp.zeros((0, *tokens_BND.shape), tokens_BND.dtype)
    return tokens_BND, jnp.stack([whole(tokens) for tokens in deep]) if deep else empty

  def _positions(self, rows: int, columns: int) -> jax.Array:
    """The learnt positions stretched to a grid, corners on corners: (rows * columns, D)."""
    side = self.config.side
    table = self.positions[...].reshape(side, side, -1)
    wide = jnp.einsum("rs,std,ct->rcd", _stretch(rows, side), table, _stretch(columns, side))
    return wide.reshape(rows * columns, -1)

  def _angles(self, rows: int, columns: int) -> jax.Array:
    """Rotary angles (rows * columns, head / 2): half of a head turns with the row, the other with the column."""
    half = self.config.width // self.config.heads // 2
    row, column = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    return jnp.concatenate([angles_1d(row.ravel(), half), angles_1d(column.ravel(), half)], axis=-1)


def _stretch(length: int, side: int) -> np.ndarray:
  """Weights (length, side) of linear interpolation between `side` points, ends on ends; a single point is the first."""
  place = np.linspace(0, side - 1, length)
  low = np.minimum(place.astype(int), side - 1)
  high = np.minimum(low + 1, side - 1)
  weights = np.zeros((length, side), np.float32)
  np.add.at(weights, (np.arange(length), low), 1 - (place - low))
  np.add.at(weights, (np.arange(length), high), place - low)
  return weights
