"""Video Swin Transformer (Liu et al. 2022), with FAST-VQA's gated relative position bias as an option; channels last.

Patches of 2 x 4 x 4, stages of attention within windows of frames, rows and columns, every second block with windows
shifted by half their size, and between stages 2 x 2 neighbours merged. The gate: where a frame is a mosaic of
fragments from far-apart places, B = d B_relative + (1 - d) B_fragment, with d(i, j) the L1 distance of the fragments'
cells. As in the code of FAST-VQA, d is not clipped to 0 and 1; its paper draws a binary gate.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kling_jax.errors import ConfigError, nearest
from kling_jax.nn import lowering, rng
from kling_jax.nn.linear import Linear, normal
from kling_jax.nn.norm import LayerNorm
from kling_jax.nn.weights import used

EPSILON = 1e-5
STD = 0.02  # of initial kernels and tables
MASKED = -100.0  # what the published weights were trained with between parts of a shifted window
SCORES = 4 * 2**20  # of attention at a time on CPU: more leave its caches

Size = tuple[int, ...]  # frames, rows, columns


@dataclasses.dataclass(frozen=True)
class Shape:
  """The sizes of a network.

  Attributes:
    width: channels of the first stage; doubled from stage to stage.
    depths, heads: blocks (even) and heads of each stage.
    window: frames, rows and columns of tokens that attend to one another; less where a map is smaller.
    fragments: rows and columns of the mosaic; () for whole frames, without gates.
    gated: whether a stage's blocks have the gate.
    drop_path: of the last block in training; linear from 0.
  """

  width: int
  depths: tuple[int, ...]
  heads: tuple[int, ...]
  window: Size = (8, 7, 7)
  fragments: tuple[int, ...] = ()
  gated: tuple[bool, ...] = ()
  drop_path: float = 0.1
  patch: Size = (2, 4, 4)

  def __post_init__(self) -> None:
    if any(depth % 2 for depth in self.depths) or len(self.depths) != len(self.heads):
      raise ConfigError(f"Video Swin of depths {self.depths} and heads {self.heads}: wants as many, and even depths")
    if bool(self.fragments) != any(self.gated) or (self.gated and len(self.gated) != len(self.depths)):
      raise ConfigError(f"Video Swin of fragments {self.fragments} and gates {self.gated}: gates want a mosaic's cells")

  @property
  def channels(self) -> int:
    """Of the last stage."""
    return self.width * 2 ** (len(self.depths) - 1)


PRESETS = {
  "tiny": Shape(96, (2, 2, 6, 2), (3, 6, 12, 24)),  # Kinetics
  "tiny-fragments": Shape(
    96, (2, 2, 6, 2), (3, 6, 12, 24), fragments=(7, 7), gated=(True, True, True, False)
  ),  # FAST-VQA and Koala-36M's TSA
  "xs": Shape(24, (2, 2), (2, 4), window=(4, 8, 8), fragments=(4, 4), gated=(True, False)),
}


def preset(name: str) -> Shape:
  """The sizes by name: tiny (28 M parameters), tiny-fragments, xs.

  Raises:
    ConfigError: there is none of that name.
  """
  if name not in PRESETS:
    raise ConfigError(f"Video Swin {name!r} does not exist{nearest(name, PRESETS)}")
  return PRESETS[name]


class Attention(nnx.Module):
  """Attention within windows, with a bias by relative position, gated by fragments where `gated`."""

  def __init__(self, width: int, heads: int, window: Size, gated: bool, *, rngs: nnx.Rngs):
    self.heads, self.window = heads, window
    entries = math.prod(2 * side - 1 for side in window)
    table = lambda: nnx.Param(normal(STD)(rngs.params(), (entries, heads), jnp.float32), axes=(None, None))
    self.relative = table()
    self.fragment = table() if gated else None
    self.qkv = Linear(width, 3 * width, axes=("embed", None), init=normal(STD), rngs=rngs)
    self.out = Linear(width, width, axes=(None, "embed"), init=normal(STD), rngs=rngs)

  def __call__(self, x_BWND: jax.Array, geometry: "Geometry") -> jax.Array:
    """(B, windows, tokens, D) of one geometry to the same."""
    B, W, N, D = x_BWND.shape
    qkv = self.qkv(x_BWND).reshape(B, W, N, 3, self.heads, D // self.heads)
    q, k, v = (qkv[..., i, :, :] for i in range(3))
    q = q * jnp.asarray((D // self.heads) ** -0.5, q.dtype)
    index = self._index(geometry.window)
    look = lambda table: used(table, (None, None), jnp.float32)[index].transpose(2, 0, 1)  # (K, N, N)
    relative_KNN = look(self.relative[...])
    fragment_KNN = None if self.fragment is None else look(self.fragment[...])

    def attend(part: tuple[jax.Array, ...]) -> jax.Array:
      """One group of windows: q, k, v (B, G, N, K, E), cells (G, N, 2), regions (G, N)."""
      q, k, v, cells, regions = part
      scores = jnp.einsum("bgnke,bglke->bgknl", q, k, preferred_element_type=jnp.float32)
      if fragment_KNN is None:
        scores = scores + relative_KNN
      else:
        d_GNN = jnp.sum(jnp.abs(cells[:, :, None] - cells[:, None]), axis=-1).astype(jnp.float32)[:, None]
        scores = scores + (d_GNN * relative_KNN + (1 - d_GNN) * fragment_KNN)
      if geometry.shifted:
        apart_GNN = regions[:, :, None] != regions[:, None]
        scores = scores + jnp.where(apart_GNN, MASKED, 0.0)[:, None]
      weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
      return jnp.einsum("bgknl,bglke->bgnke", weights, v)

    parts = (q, k, v), (jnp.asarray(geometry.cells_WNC), jnp.asarray(geometry.regions_WN))
    o = _in_groups(attend, *parts, _groups(W, B * self.heads * N * N))
    return self.out(o.reshape(B, W, N, D))

  def _index(self, window: Size) -> np.ndarray:
    """(N, N) rows of the tables; of a window that is smaller than the tables', the part of theirs."""
    places = np.stack(np.meshgrid(*(np.arange(side) for side in window), indexing="ij"), -1).reshape(-1, 3)
    steps = places[:, None] - places[None] + np.array(self.window) - 1
    spans = [2 * side - 1 for side in self.window]
    return (steps[..., 0] * spans[1] + steps[..., 1]) * spans[2] + steps[..., 2]


def _groups(windows: int, scores: int) -> int:
  """Into how many groups windows of `scores` scores each go: on CPU such that a group's stay in its caches."""
  if lowering.platform() != "cpu":
    return 1
  wanted = max(1, windows * scores // SCORES)
  return next(count for count in range(min(wanted, windows), windows + 1) if windows % count == 0)


def _in_groups(attend, by_row, by_window, groups: int) -> jax.Array:
  """`attend` over groups of windows: axis 1 of the arrays `by_row`, axis 0 of those `by_window`."""
  if groups == 1:
    return attend((*by_row, *by_window))
  W = by_window[0].shape[0]
  rows = [jnp.moveaxis(x.reshape(x.shape[0], groups, W // groups, *x.shape[2:]), 1, 0) for x in by_row]
  windows = [x.reshape(groups, W // groups, *x.shape[1:]) for x in by_window]
  o = jax.lax.map(attend, (*rows, *windows))
  return jnp.moveaxis(o, 0, 1).reshape(o.shape[1], W, *o.shape[3:])


@dataclasses.dataclass(frozen=True, eq=False)
class Geometry:
  """How a map of tokens goes into windows; all of it is known before anything is traced.

  Attributes:
    size: of the map; padded: the same, up to whole windows. window, shift: as used.
    cells_WNC: int32, row and column of the mosaic's cell of each token of each window.
    regions_WN: int32, which part of the map a token belongs to; parts that a shift brings together stay apart.
  """

  size: Size
  padded: Size
  window: Size
  shift: Size
  cells_WNC: np.ndarray
  regions_WN: np.ndarray

  @property
  def shifted(self) -> bool:
    return any(self.shift)

  def to_windows(self, x: jax.Array) -> jax.Array:
    """(B, T, H, W, C) to (B, windows, tokens, C); zeros fill what the map lacks."""
    x = jnp.pad(x, ((0, 0), *((0, p - s) for p, s in zip(self.padded, self.size, strict=True)), (0, 0)))
    return partition(roll(x, self.shift, -1), self.window)

  def from_windows(self, x: jax.Array) -> jax.Array:
    """The inverse of `to_windows`."""
    B, _, _, C = x.shape
    counts = [p // w for p, w in zip(self.padded, self.window, strict=True)]
    x = x.reshape(B, *counts, *self.window, C).transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(B, *self.padded, C)
    T, H, W = self.size
    return roll(x, self.shift, 1)[:, :T, :H, :W]


def partition(x, window: tuple[int, ...]):
  """(B, T, H, W, C) to (B, windows, tokens, C), for NumPy and JAX alike."""
  B, T, H, W, C = x.shape
  t, h, w = window
  x = x.reshape(B, T // t, t, H // h, h, W // w, w, C).transpose(0, 1, 3, 5, 2, 4, 6, 7)
  return x.reshape(B, -1, t * h * w, C)


def roll(x, shift: tuple[int, ...], sign: int):
  """The map moved by `sign` times the shift, around its ends."""
  if not any(shift):
    return x
  return (np if isinstance(x, np.ndarray) else jnp).roll(x, [sign * step for step in shift], axis=(1, 2, 3))


@functools.lru_cache(maxsize=64)
def geometry(size: Size, window: Size, fragments: tuple[int, ...], odd: bool) -> Geometry:
  """The windows of a map.

  Args:
    size: frames, rows, columns of tokens. window: wanted; a side that the map does not exceed is the map's, unshifted.
    fragments: of the mosaic; (). odd: whether the block shifts.
  """
  used_window = tuple(min(w, s) for w, s in zip(window, size, strict=True))
  shift = tuple(w // 2 if odd and s > w else 0 for w, s in zip(window, size, strict=True))
  padded = tuple(-(-s // w) * w for s, w in zip(size, used_window, strict=True))
  cells = np.zeros((1, *padded, 2), np.int32)
  if fragments:
    rows, columns = (np.arange(side) * count // side for side, count in zip(padded[1:], fragments, strict=True))
    cells[..., 0], cells[..., 1] = rows[:, None], columns
  # Nine (or 27) boxes: along each side what no window of the shift mixes, and its last two parts.
  regions = np.zeros((1, *padded, 1), np.int32)
  slices = [
    (slice(0, -w), slice(-w, -s), slice(-s, None)) if s else (slice(None),)
    for w, s in zip(used_window, shift, strict=True)
  ]
  for number, box in enumerate(itertools.product(*slices)):
    regions[0, box[0], box[1], box[2]] = number
  cells_WNC = partition(roll(cells, shift, -1), used_window)[0]
  return Geometry(size, padded, used_window, shift, cells_WNC, partition(regions, used_window)[0, ..., 0])


class Block(nnx.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)), each left out for a row now and then in training (drop path)."""

  def __init__(self, width: int, heads: int, shape: Shape, gated: bool, odd: bool, *, rngs: nnx.Rngs):
    self.shape, self.odd = shape, odd
    self.norm1 = LayerNorm(width, epsilon=EPSILON)
    self.attention = Attention(width, heads, shape.window, gated, rngs=rngs)
    self.norm2 = LayerNorm(width, epsilon=EPSILON)
    self.up = Linear(width, 4 * width, axes=("embed", "mlp"), init=normal(STD), rngs=rngs)
    self.down = Linear(4 * width, width, axes=("mlp", "embed"), init=normal(STD), rngs=rngs)

  def __call__(self, x_BTHWC: jax.Array, kept: tuple[jax.Array, jax.Array] | None) -> jax.Array:
    """`kept` scales the two branches of each row, (B,) each; None: 1."""
    T, H, W = x_BTHWC.shape[1:4]
    places = geometry((T, H, W), self.shape.window, self.shape.fragments, self.odd)
    h_BTHWC = places.from_windows(self.attention(places.to_windows(self.norm1(x_BTHWC)), places))
    x_BTHWC = x_BTHWC + _scaled(h_BTHWC, kept and kept[0])
    h_BTHWC = self.down(jax.nn.gelu(self.up(self.norm2(x_BTHWC)), approximate=False))
    return x_BTHWC + _scaled(h_BTHWC, kept and kept[1])


def _scaled(h_BTHWC: jax.Array, kept_B: jax.Array | None) -> jax.Array:
  return h_BTHWC if kept_B is None else h_BTHWC * kept_B.astype(h_BTHWC.dtype)[:, None, None, None, None]


class Pair(nnx.Module):
  """A block and one with shifted windows: what a stage is a stack of."""

  def __init__(self, width: int, heads: int, shape: Shape, gated: bool, *, rngs: nnx.Rngs):
    self.even = Block(width, heads, shape, gated, False, rngs=rngs)
    self.odd = Block(width, heads, shape, gated, True, rngs=rngs)


class Stage(nnx.Module):
  """Pairs of blocks, stacked and scanned; then, but for the last stage, a merge of 2 x 2 neighbours."""

  def __init__(self, number: int, shape: Shape, *, rngs: nnx.Rngs):
    width, heads = shape.width * 2**number, shape.heads[number]
    gated = bool(shape.gated) and shape.gated[number]

    @nnx.split_rngs(splits=shape.depths[number] // 2)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
    def stack(rngs: nnx.Rngs) -> Pair:
      return Pair(width, heads, shape, gated, rngs=rngs)

    self.pairs = stack(rngs)
    last = number == len(shape.depths) - 1
    self.merge_norm = None if last else LayerNorm(4 * width, epsilon=EPSILON)
    self.merge = (
      None if last else Linear(4 * width, 2 * width, axes=(None, "embed"), use_bias=False, init=normal(STD), rngs=rngs)
    )

  def __call__(self, x_BTHWC: jax.Array, kept_P4B: jax.Array | None) -> jax.Array:
    """`kept_P4B`: of each pair's four branches, see `Block`."""
    graph, stacked = nnx.split(self.pairs)

    def step(x: jax.Array, inputs) -> tuple[jax.Array, None]:
      pair, kept = inputs
      block = nnx.merge(graph, pair)
      x = block.even(x, None if kept is None else (kept[0], kept[1]))
      return block.odd(x, None if kept is None else (kept[2], kept[3])), None

    x_BTHWC, _ = jax.lax.scan(step, x_BTHWC, (stacked, kept_P4B))
    if self.merge is None or self.merge_norm is None:
      return x_BTHWC
    H, W = x_BTHWC.shape[2:4]
    x_BTHWC = jnp.pad(x_BTHWC, ((0, 0), (0, 0), (0, H % 2), (0, W % 2), (0, 0)))
    corners = [x_BTHWC[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return self.merge(self.merge_norm(jnp.concatenate(corners, axis=-1)))


class VideoSwin(nnx.Module):
  """Videos to a feature map of the last stage."""

  def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
    self.shape = shape
    self.patch = Linear(3 * math.prod(shape.patch), shape.width, axes=(None, "embed"), init=normal(STD), rngs=rngs)
    self.patch_norm = LayerNorm(shape.width, epsilon=EPSILON)
    self.stages = nnx.List([Stage(number, shape, rngs=rngs) for number in range(len(shape.depths))])
    self.norm = LayerNorm(shape.channels, epsilon=EPSILON)

  def __call__(self, frames_BTHWC: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
    """(B, T / 2, H / 4 / 2^(stages - 1), .., C).

    Args:
      frames_BTHWC: normalised RGB; zeros fill the last patches.
      keys_B: typed keys of the rows in training, for drop path; None: nothing is dropped.
    """
    pads = [(0, -side % patch) for side, patch in zip(frames_BTHWC.shape[1:4], self.shape.patch, strict=True)]
    x_BTHWC = jnp.pad(frames_BTHWC, ((0, 0), *pads, (0, 0)))
    B, T, H, W, C = x_BTHWC.shape
    t, h, w = self.shape.patch
    x_BTHWC = x_BTHWC.reshape(B, T // t, t, H // h, h, W // w, w, C).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    x_BTHWC = self.patch_norm(self.patch(x_BTHWC.reshape(B, T // t, H // h, W // w, -1)))
    kept_L2B = None if keys_B is None else kept_branches(keys_B, sum(self.shape.depths), self.shape.drop_path)
    first = 0
    for stage, depth in zip(self.stages, self.shape.depths, strict=True):
      kept = None if kept_L2B is None else kept_L2B[first : first + depth].reshape(depth // 2, 4, B)
      x_BTHWC = stage(x_BTHWC, kept)
      first += depth
    return self.norm(x_BTHWC)


def kept_branches(keys_B: jax.Array, blocks: int, rate: float) -> jax.Array:
  """(blocks, 2, B): 0 for a branch that is left out, 1 / (1 - rate of the block) else; rates rise linearly from 0."""
  rates_L = np.linspace(0, rate, blocks, dtype=np.float32)[:, None]
  draws_BL2 = jax.vmap(lambda key: jax.random.uniform(key, (blocks, 2)))(rng.stream(keys_B, "path"))
  return jnp.moveaxis((draws_BL2 >= rates_L) / (1 - rates_L), 0, -1)
