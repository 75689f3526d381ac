"""A decoder-only language model that takes embeddings of text and of frames: Llama, Qwen3, Qwen3-VL and Chameleon.

One class by configuration: RMSNorm, SwiGLU, rotary positions, grouped heads, an optional norm of queries and keys, an
explicit cache. Rotary pairs are neighbours (x[2i], x[2i+1]); importers reorder the heads of weights that pair halves.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from kling_jax.errors import ConfigError, nearest
from kling_jax.models.video_dit import remat_policy
from kling_jax.nn.linear import Linear, normal
from kling_jax.nn.mask import Mask
from kling_jax.nn.mlp import SwiGLU
from kling_jax.nn.multihead import QK_NORMS, KVCache, MultiHeadAttention
from kling_jax.nn.norm import RMSNorm
from kling_jax.nn.partition import constrain
from kling_jax.nn.rotary import angles_1d
from kling_jax.nn.weights import used

BYTES = 259  # 256 bytes and pad, begin, end: what data/tokens.py writes
PROJECTIONS = {name: rf"attention\.{name}" for name in ("q", "k", "v", "out")} | {
  name: rf"mlp\.{name}" for name in ("gate", "up", "down")
}


class Llama3Rope(NamedTuple):
  """Llama 3.1's stretching of rotary frequencies: low ones divided by `factor`, high ones kept, a ramp between.

  Attributes:
    factor: divisor of the frequencies whose wavelength passes original_length / low.
    low, high: turns within `original_length` tokens where the ramp begins and ends.
    original_length: tokens of the pretraining.
  """

  factor: float
  low: float
  high: float
  original_length: int


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes and variants of a language model.

  Attributes:
    width, depth, heads, kv_heads, head_size, mlp_width: of the decoder.
    vocabulary: tokens, those of frames included.
    tied: whether the table of tokens is the output head too.
    qk_norm: norm of queries and keys: "none" (Llama), "head" (Qwen3), "head_layer" (Chameleon).
    epsilon: of the RMS norms, and of qk_norm "head"; that of "head_layer" is 1e-5, as published.
    attention_bias, mlp_bias: whether the projections have biases.
    norm_after: norms stand behind attention and MLP instead of before them (Chameleon 30B).
    rope_base: theta of the rotary positions.
    rope_sections: frequencies given to (time, row, column) where a token has three positions, interleaved as in
      Qwen3-VL; they sum to head_size / 2. None: one position a token.
    rope_stretch: Llama 3.1's stretching, the numbers of a `Llama3Rope`; None for none.
    frame_codes, first_code: frames may come as so many VQ codes; code c is the token first_code + c. 0: not so.
    patch_width: frames may come as patch vectors of this size, through a Linear. 0: not so.
    remat: what the backward pass finds saved of each block (see `VideoDiTConfig.remat`).
  """

  width: int
  depth: int
  heads: int
  kv_heads: int
  head_size: int
  mlp_width: int
  vocabulary: int
  tied: bool = False
  qk_norm: str = "none"
  epsilon: float = 1e-6
  attention_bias: bool = False
  mlp_bias: bool = False
  norm_after: bool = False
  rope_base: float = 10_000.0
  rope_sections: tuple[int, int, int] | None = None
  rope_stretch: tuple[float, float, float, int] | None = None
  frame_codes: int = 0
  first_code: int = 0
  patch_width: int = 0
  remat: str = "none"

  def __post_init__(self):
    if self.heads % self.kv_heads:
      raise ConfigError(f"language model: kv_heads={self.kv_heads} must divide heads={self.heads}")
    if self.head_size % 2:
      raise ConfigError(f"language model: head_size={self.head_size} must be even, for rotary pairs")
    if self.qk_norm not in QK_NORMS:
      raise ConfigError(f"language model: qk_norm={self.qk_norm!r} does not exist{nearest(self.qk_norm, QK_NORMS)}")
    if self.rope_sections is not None and sum(self.rope_sections) != self.head_size // 2:
      raise ConfigError(f"language model: rope_sections={self.rope_sections} must sum to {self.head_size // 2}")
    if self.frame_codes and not 0 <= self.first_code <= self.vocabulary - self.frame_codes:
      raise ConfigError(
        f"language model: codes {self.first_code}..{self.first_code + self.frame_codes - 1} of frames lie outside "
        f"the vocabulary of {self.vocabulary}"
      )
    remat_policy(self.remat)


PRESETS = {
  "nano": Shape(64, 4, 2, 2, 32, 192, BYTES, tied=True, qk_norm="head"),
  "tiny": Shape(128, 4, 4, 2, 32, 384, BYTES, tied=True, qk_norm="head"),
  "small": Shape(512, 12, 8, 4, 64, 1536, BYTES, tied=True, qk_norm="head"),
  "chameleon-7b": Shape(
    4096, 32, 32, 32, 128, 11008, 65536, qk_norm="head_layer", epsilon=1e-5, frame_codes=8192, first_code=4
  ),
  "qwen3-vl-2b": Shape(
    2048, 28, 16, 8, 128, 6144, 151936, tied=True, qk_norm="head", rope_base=5e6, rope_sections=(24, 20, 20)
  ),
  "qwen3-vl-8b": Shape(
    4096, 36, 32, 8, 128, 12288, 151936, qk_norm="head", rope_base=5e6, rope_sections=(24, 20, 20)
  ),
}  # fmt: skip


def preset(size: str, **changes) -> Shape:
  """The named shape, with the given fields changed; ConfigError with the nearest name where there is none."""
  if size not in PRESETS:
    raise ConfigError(f"language model {size!r} does not exist{nearest(size, PRESETS)}")
  return dataclasses.replace(PRESETS[size], **changes)


def lora_pattern(projections: tuple[str, ...]) -> str:
  """The pattern for `nn.lora.init_lora` that takes these projections of every layer, of q, k, v, out, gate, up, down.

  Raises:
    ConfigError: an unknown projection, or none.
  """
  for name in projections:
    if name not in PROJECTIONS:
      raise ConfigError(f"LoRA projection {name!r} does not exist{nearest(name, PROJECTIONS)}")
  if not projections:
    raise ConfigError(f"LoRA wants at least one projection of {', '.join(PROJECTIONS)}")
  return rf"layers\.({'|'.join(PROJECTIONS[name] for name in projections)})\.kernel$"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What the model has read: keys and values with room for L tokens, and which of them are padding; a value.

  Attributes:
    kv: keys (rotated) and values of all layers, and how many places are filled.
    real_BL: bool, False at filled places that held padding; True at places not yet filled.
  """

  kv: KVCache
  real_BL: jax.Array

  @property
  def length(self) -> jax.Array:
    """int32 (), places filled."""
    return self.kv.length

  @property
  def room(self) -> int:
    """Places in all."""
    return self.real_BL.shape[1]


HEAD_LAYER_EPSILON = 1e-5


class Layer(nnx.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)); with `norm_after`, the norms stand behind attention and MLP."""

  def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
    self.norm_after = shape.norm_after
    self.attention_norm = RMSNorm(shape.width, epsilon=shape.epsilon)
    self.attention = MultiHeadAttention(
      shape.width,
      shape.heads,
      kv_heads=shape.kv_heads,
      head_size=shape.head_size,
      qk_norm=shape.qk_norm,
      epsilon=HEAD_LAYER_EPSILON if shape.qk_norm == "head_layer" else shape.epsilon,
      use_bias=shape.attention_bias,
      rngs=rngs,
    )
    self.mlp_norm = RMSNorm(shape.width, epsilon=shape.epsilon)
    self.mlp = SwiGLU(shape.width, shape.mlp_width, use_bias=shape.mlp_bias, rngs=rngs)

  def __call__(self, x_BLD: jax.Array, mask: Mask, angles: jax.Array, past: tuple[jax.Array, jax.Array] | None):
    """Returns the tokens after this layer, and where `past` keys and values are given, the new ones."""
    q, k, v = self.attention.qkv(x_BLD if self.norm_after else self.attention_norm(x_BLD), angles=angles)
    new = None
    if past is not None:
      new = (k, v)
      write = lambda room, fresh: jax.lax.dynamic_update_slice_in_dim(room, fresh.astype(room.dtype), mask.offset, 1)
      k, v = (write(*pair).astype(q.dtype) for pair in zip(past, new, strict=True))
    y_BLD = self.attention.attend(q, k, v, mask)
    x_BLD = x_BLD + (self.attention_norm(y_BLD) if self.norm_after else y_BLD)
    y_BLD = self.mlp(x_BLD if self.norm_after else self.mlp_norm(x_BLD))
    x_BLD = x_BLD + (self.mlp_norm(y_BLD) if self.norm_after else y_BLD)
    return constrain(x_BLD, ("batch", "tokens", "embed")), new


class LanguageModel(nnx.Module):
  """Predicts the next token from embeddings; float32 parameters, layers stacked and scanned."""

  def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
    self.shape = shape
    table = jax.random.normal(rngs.params(), (shape.vocabulary, shape.width), jnp.float32) * 0.02
    self.table = nnx.Param(table, axes=("vocabulary", "embed"))
    project = lambda: Linear(shape.patch_width, shape.width, axes=("conv_in", "embed"), init=normal(0.02), rngs=rngs)
    self.patches = project() if shape.patch_width else None

    @nnx.split_rngs(splits=shape.depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
    def stack(rngs: nnx.Rngs) -> Layer:
      return Layer(shape, rngs=rngs)

    self.layers = stack(rngs)
    self.norm = RMSNorm(shape.width, epsilon=shape.epsilon)
    sizes, axes = (shape.width, shape.vocabulary), ("embed", "vocabulary")
    self.head = None if shape.tied else Linear(*sizes, axes=axes, use_bias=False, init=normal(0.02), rngs=rngs)

  # ---- embeddings in ------------------------------------------------------------------------------------------------

  def embed_text(self, tokens_BL: jax.Array, *, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Embeddings (B, L, D) of tokens in [0, vocabulary), in `dtype`, which is that of all that follows."""
    return used(self.table[...], ("vocabulary", "embed"), dtype)[tokens_BL]

  def embed_frames(self, frames: jax.Array, *, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Embeddings (B, N, D) of frames.

    Args:
      frames: integer VQ codes (B, N) in [0, frame_codes), or patch vectors (B, N, patch_width).
      dtype: of the embeddings.

    Raises:
      ConfigError: a kind of frames that the shape does not have.
    """
    if jnp.issubdtype(frames.dtype, jnp.integer):
      if not self.shape.frame_codes:
        raise ConfigError("frames come as VQ codes to a language model without them; set frame_codes in its shape")
      return self.embed_text(self.shape.first_code + frames, dtype=dtype)
    if self.patches is None:
      raise ConfigError("frames come as patches to a language model without them; set patch_width in its shape")
    if frames.shape[-1] != self.shape.patch_width:
      raise ConfigError(
        f"patches of {frames.shape[-1]} values for a language model of patch_width={self.shape.patch_width}"
      )
    return self.patches(frames.astype(dtype))

  # ---- the decoder --------------------------------------------------------------------------------------------------

  def __call__(
    self,
    x_BLD: jax.Array,
    *,
    positions: jax.Array | None = None,
    real_BL: jax.Array | None = None,
    pairs_BNL: jax.Array | None = None,
    cache: Cache | None = None,
    added_SBLD: jax.Array | None = None,
    scan: bool = True,
  ) -> tuple[jax.Array, Cache | None]:
    """Runs the decoder over embeddings.

    Args:
      x_BLD: embeddings, float32 or bfloat16: the dtype that it computes in.
      positions: int (L,) or (B, L), or (3, B, L) for (time, row, column) of a shape with `rope_sections`; by default
        0, 1, 2, ..., going on where the cache ends.
      real_BL: True at the given tokens that are no padding; None where all are. A cache remembers it.
      pairs_BNL: bool, B or 1 rows: which of the L keys each of the given tokens sees, in place of the causal rule.
        Keys are the tokens themselves, or with a cache all its places in order; what is not yet filled is never seen.
      cache: what was read before (`init_cache`); the given tokens come after it.
      added_SBLD: vectors to be added to the tokens after each of the first S layers (Qwen3-VL's deep-stack).
      scan: False unrolls the layers, for reading costs off the compiled program.

    Returns:
      Hidden vectors (B, L, D) after the last norm, in the dtype of `x`, and the cache with the tokens appended (None
      without one). Where the tokens pass the room of the cache, the hidden vectors are NaN.

    Raises:
      ConfigError: inputs that do not fit the shape or one another.
    """
    self._check(x_BLD, positions, real_BL, pairs_BNL, cache, added_SBLD)
    batch, length = x_BLD.shape[:2]
    held = 0 if cache is None else cache.length
    seen_BL = None
    if cache is not None:
      given_BL = jnp.ones((batch, length), bool) if real_BL is None else real_BL
      seen_BL = jax.lax.dynamic_update_slice_in_dim(cache.real_BL, given_BL, held, axis=1)
    mask = Mask(
      keys_BL=real_BL if seen_BL is None else seen_BL,
      block=1 if pairs_BNL is None else None,
      offset=held,
      length=None if cache is None else held + length,
      pairs_BNL=pairs_BNL,
    )
    if positions is None:
      positions = held + jnp.arange(length)
    angles = rope_angles(self.shape, positions)
    x_BLD = constrain(x_BLD, ("batch", "tokens", "embed"))
    x_BLD, new = self._run_layers(x_BLD, mask, angles, None if cache is None else cache.kv, added_SBLD, scan)
    x_BLD = self.norm(x_BLD)
    if cache is None or seen_BL is None:
      return x_BLD, None
    return jnp.where(held + length <= cache.room, x_BLD, jnp.nan), Cache(cache.kv.append(*new), seen_BL)

  def logits(self, hidden_BLD: jax.Array) -> jax.Array:
    """Logits (..., vocabulary) of the next token, float32."""
    if self.head is not None:
      return self.head(hidden_BLD).astype(jnp.float32)
    table = used(self.table[...], ("vocabulary", "embed"), hidden_BLD.dtype)
    return jnp.einsum("...d,vd->...v", hidden_BLD, table, preferred_element_type=jnp.float32)

  def init_cache(self, batch: int, room: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """An empty cache for `room` tokens; `dtype` is that of the embeddings."""
    shape = self.shape
    kv = KVCache.empty(shape.depth, batch, room, shape.kv_heads, shape.head_size, dtype)
    return Cache(kv, jnp.ones((batch, room), bool))

  def _run_layers(self, x_BLD, mask: Mask, angles, kv: KVCache | None, added_SBLD, scan: bool):
    graph, stacked = nnx.split(self.layers)

    def layer(x_BLD, layer_inputs):
      weights, past, added_BLD = layer_inputs
      x_BLD, new = nnx.merge(graph, weights)(checkpoint_name(x_BLD, "block"), mask, angles, past)
      return (x_BLD if added_BLD is None else x_BLD + added_BLD.astype(x_BLD.dtype)), new

    recompute, policy = remat_policy(self.shape.remat)
    if recompute:
      layer = jax.checkpoint(layer, policy=policy, prevent_cse=not scan)
    inputs = (stacked, None if kv is None else (kv.k_SBLKE, kv.v_SBLKE))
    first = 0 if added_SBLD is None else added_SBLD.shape[0]
    news = []
    for start, end, added in ((0, first, added_SBLD), (first, self.shape.depth, None)):
      if start == end:
        continue
      part = (*jax.tree.map(lambda leaf: leaf[start:end], inputs), added)  # noqa: B023 (used at once)
      if scan:
        x_BLD, new = jax.lax.scan(layer, x_BLD, part)
        news.append(new)
        continue
      for index in range(end - start):
        x_BLD, new = layer(x_BLD, jax.tree.map(lambda leaf: leaf[index], part))  # noqa: B023 (used at once)
        news.append(jax.tree.map(lambda leaf: leaf[None], new))
    return x_BLD, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *news)

  def _check(self, x_BLD, positions, real_BL, pairs_BNL, cache, added_SBLD):
    shape = self.shape
    if x_BLD.ndim != 3 or x_BLD.shape[-1] != shape.width:
      raise ConfigError(f"embeddings {x_BLD.shape} are not (B, L, width={shape.width})")
    batch, length = x_BLD.shape[:2]
    if positions is not None:
      legal = [(length,), (batch, length)] + ([(3, batch, length)] if shape.rope_sections else [])
      if positions.shape not in legal:
        raise ConfigError(f"positions {positions.shape} are none of {', '.join(map(str, legal))}")
    if real_BL is not None and real_BL.shape != (batch, length):
      raise ConfigError(f"real_BL {real_BL.shape} is not (B, L)=({batch}, {length})")
    keys = length if cache is None else cache.room
    if cache is not None and (cache.real_BL.shape[0] != batch or length > keys):
      raise ConfigError(
        f"{length} tokens of {batch} rows for a cache of {cache.real_BL.shape[0]} rows with room for {keys}"
      )
    if pairs_BNL is not None and pairs_BNL.shape not in ((batch, length, keys), (1, length, keys)):
      raise ConfigError(f"pairs_BNL {pairs_BNL.shape} is not (B or 1, N, L)=({batch}, {length}, {keys})")
    if added_SBLD is not None and (added_SBLD.shape[1:] != x_BLD.shape or added_SBLD.shape[0] > shape.depth):
      raise ConfigError(f"added_SBLD {added_SBLD.shape} is not (up to {shape.depth} layers, B, L, D)={x_BLD.shape}")


def rope_angles(shape: Shape, positions: jax.Array) -> jax.Array:
  """Rotary angles (..., head_size/2) of positions (...) or, for `rope_sections`, (3, ...): time, row, column.

  Frequency i belongs to the row where i % 3 == 1 and to the column where i % 3 == 2, as far as their sections go, and
  else to the time, so that all three have high and low ones (Qwen3-VL).
  """
  angles = angles_1d(positions, shape.head_size, shape.rope_base)
  if shape.rope_stretch is not None:
    angles = angles * _stretch(Llama3Rope(*shape.rope_stretch), shape.head_size, shape.rope_base)
  if shape.rope_sections is None or positions.ndim < 3:
    return angles
  index = jnp.arange(shape.head_size // 2)
  chosen = angles[0]
  for axis in (1, 2):
    own = (index % 3 == axis) & (index < 3 * shape.rope_sections[axis])
    chosen = jnp.where(own, angles[axis], chosen)
  return chosen


def _stretch(how: Llama3Rope, size: int, base: float) -> jax.Array:
  """What each frequency is multiplied with."""
  turns = how.original_length * base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size) / (2 * math.pi)
  ramp = jnp.clip((turns - how.low) / (how.high - how.low), 0.0, 1.0)
  return (1 - ramp) / how.factor + ramp


def forward_flops(shape: Shape, length: int, *, predicted: int | None = None) -> float:
  """Matrix-product FLOPs of one row of `length` tokens, `predicted` (all) of which get logits.

  Scores are counted as causal: half of the square.
  """
  inner = shape.head_size * (2 * shape.heads + 2 * shape.kv_heads)
  products = shape.depth * (shape.width * inner + 3 * shape.width * shape.mlp_width)
  scores = shape.depth * 2.0 * length**2 * shape.heads * shape.head_size
  return (
    2.0 * length * products
    + scores
    + 2.0 * shape.width * shape.vocabulary * (length if predicted is None else predicted)
  )
