"""T5 v1.1's and umT5's encoder (Raffel et al. 2020, Chung et al. 2023): text for Wan 2.1 and its kin.

Pre-norm layers without biases, gated GELU (tanh form), RMS norms, attention without a scale whose scores get a learned
bias by relative distance. T5 has one such table, in its first layer, for all; umT5 has one a layer.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from kling_jax.errors import ConfigError
from kling_jax.nn.linear import Linear, normal
from kling_jax.nn.norm import RMSNorm
from kling_jax.nn.weights import used

FAR = -1e9  # added to the scores of keys that are padding


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Shape of an encoder.

  Attributes:
    vocabulary: tokens that the table knows.
    width, depth, heads, head_size, mlp_width: of the transformer; heads * head_size need not be width.
    table_a_layer: whether each layer has a table of distances (umT5), or the first one's serves all (T5).
    buckets, most: distances are sorted into that many buckets, all beyond `most` into the last.
  """

  vocabulary: int
  width: int
  depth: int
  heads: int
  head_size: int
  mlp_width: int
  table_a_layer: bool
  buckets: int = 32
  most: int = 128

  def __post_init__(self) -> None:
    if self.buckets % 4 or self.most <= self.buckets // 4:
      raise ConfigError(f"t5: {self.buckets} buckets for distances up to {self.most}; 32 and 128 are usual")


def bucket(distances: np.ndarray, buckets: int, most: int) -> np.ndarray:
  """The bucket of each distance (key's place less query's): a half for each sign, small ones alone, then by logarithm.

  The logarithm is taken in float32, as where the weights were trained: its rounding decides at the edges.
  """
  half, size = buckets // 2, np.abs(distances)
  exact = half // 2
  ratio = np.log(np.maximum(size, 1).astype(np.float32) / exact) / np.float32(np.log(most / exact))
  coarse = np.minimum(exact + (ratio * (half - exact)).astype(np.int64), half - 1)
  return np.where(distances > 0, half, 0) + np.where(size < exact, size, coarse)


class Attention(nnx.Module):
  """Self-attention whose scores, unscaled, get a bias."""

  def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
    self.heads, inner = config.heads, config.heads * config.head_size
    # Scores are not divided by sqrt(E): queries start smaller by it instead, as in T5's own initialisation.
    query = normal((config.width * config.head_size) ** -0.5)
    linear = lambda size_in, size_out, axes, init: Linear(
      size_in, size_out, axes=axes, use_bias=False, init=init, rngs=rngs
    )
    self.q = linear(config.width, inner, ("embed", "text"), query)
    self.k = linear(config.width, inner, ("embed", "text"), normal(config.width**-0.5))
    self.v = linear(config.width, inner, ("embed", "text"), normal(config.width**-0.5))
    self.out = linear(inner, config.width, ("text", "embed"), normal(inner**-0.5))

  def __call__(self, x_BLD: jax.Array, bias_BKLL: jax.Array) -> jax.Array:
    q_BLKE, k_BLKE, v_BLKE = (
      part(x_BLD).reshape(*x_BLD.shape[:2], self.heads, -1) for part in (self.q, self.k, self.v)
    )
    scores_BKLL = jnp.einsum("bqke,blke->bkql", q_BLKE, k_BLKE, preferred_element_type=jnp.float32) + bias_BKLL
    p_BKLL = jax.nn.softmax(scores_BKLL, axis=-1).astype(x_BLD.dtype)
    o_BLKE = jnp.einsum("bkql,blke->bqke", p_BKLL, v_BLKE)
    return self.out(o_BLKE.reshape(*x_BLD.shape[:2], -1))


class GatedMLP(nnx.Module):
  """down(gelu(gate(x)) * up(x))."""

  def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
    width, hidden = config.width, config.mlp_width
    self.gate = Linear(width, hidden, axes=("embed", "text"), use_bias=False, init=normal(width**-0.5), rngs=rngs)
    self.up = Linear(width, hidden, axes=("embed", "text"), use_bias=False, init=normal(width**-0.5), rngs=rngs)
    self.down = Linear(hidden, width, axes=("text", "embed"), use_bias=False, init=normal(hidden**-0.5), rngs=rngs)

  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    return self.down(jax.nn.gelu(self.gate(x_BLD), approximate=True) * self.up(x_BLD))


class Layer(nnx.Module):
  """x + attention(norm(x)), then x + MLP(norm(x)), with this layer's table of distances where it has one."""

  def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(config.width)
    self.attention = Attention(config, rngs=rngs)
    self.mlp_norm = RMSNorm(config.width)
    self.mlp = GatedMLP(config, rngs=rngs)
    table = lambda: nnx.Param(jnp.zeros((config.buckets, config.heads), jnp.float32), axes=(None, None))
    self.distances = table() if config.table_a_layer else None

  def __call__(self, x_BLD: jax.Array, bias_BKLL: jax.Array, bucket_LL: np.ndarray) -> jax.Array:
    if self.distances is not None:
      bias_BKLL = bias_BKLL + spread(self.distances[...], bucket_LL)
    x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), bias_BKLL)
    return x_BLD + self.mlp(self.mlp_norm(x_BLD))


def spread(table: jax.Array, bucket_LL: np.ndarray) -> jax.Array:
  """The bias (1, K, L, L) of a table (buckets, K); float32."""
  return used(table, (None, None), jnp.float32)[bucket_LL].transpose(2, 0, 1)[None]


class T5Encoder(nnx.Module):
  """Tokens to vectors; layers are stacked and scanned. Fills the protocol `models.text_encoder.TextEncoder`."""

  def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
    """Draws the weights from the stream `params`."""
    self.config, self.width = config, config.width
    table = jax.random.normal(rngs.params(), (config.vocabulary, config.width), jnp.float32)
    self.table = nnx.Param(table, axes=(None, "text"))
    shared = lambda: nnx.Param(jnp.zeros((config.buckets, config.heads), jnp.float32), axes=(None, None))
    self.distances = None if config.table_a_layer else shared()

    @nnx.split_rngs(splits=config.depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
    def stack(rngs: nnx.Rngs) -> Layer:
      return Layer(config, rngs=rngs)

    self.layers = stack(rngs)
    self.norm = RMSNorm(config.width)

  def __call__(self, tokens_BL: jax.Array, mask_BL: jax.Array, *, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Vectors (B, L, D) in `dtype`, which is also that of the computation; zero where `mask_BL` is False.

    Args:
      tokens_BL: int32, below `config.vocabulary`.
      mask_BL: bool, True where a token stands. What stands elsewhere has no influence.
    """
    x_BLD = used(self.table[...], (None, "text"), jnp.float32)[tokens_BL].astype(dtype)
    place_L = np.arange(tokens_BL.shape[1])
    bucket_LL = bucket(place_L[None, :] - place_L[:, None], self.config.buckets, self.config.most)
    bias_BKLL = jnp.where(mask_BL, 0.0, FAR)[:, None, None, :]
    if self.distances is not None:
      bias_BKLL = bias_BKLL + spread(self.distances[...], bucket_LL)
    graph, stacked = nnx.split(self.layers)
    step = lambda x_BLD, layer: (nnx.merge(graph, layer)(x_BLD, bias_BKLL, bucket_LL), None)
    x_BLD, _ = jax.lax.scan(step, x_BLD, stacked)
    return jnp.where(mask_BL[..., None], self.norm(x_BLD), 0)
