"""Koala-36M's Training Suitability Assessment network: fragments, a picture and sub-metrics of a clip to one number.

Up to three branches give a vector of one width each (400): dynamic, Video Swin over a mosaic of fragments; static,
ConvNeXt over a frame; label, an MLP over named sub-metrics. The label gates the other two (weighted cross-gating
blocks), a weighted sum of both goes through the score head. Section 3.2 of the paper's brief has the shapes; the head
ends in a GELU there, here in its input, which training by order does not see and calibration wants.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.errors import ConfigError, nearest
from kling_jax.models import convnext as convnext_lib
from kling_jax.models import video_swin
from kling_jax.nn import rng
from kling_jax.nn.linear import Linear

BRANCHES = ("dynamic", "static", "label")
FUSIONS = ("gate", "concat")


@dataclasses.dataclass(frozen=True)
class Shape:
  """The sizes of a network.

  Attributes:
    branches: which there are, of `BRANCHES`.
    fusion: gate (WCGB and weighted sum; wants the label and another), or concat (vectors side by side).
    features: number of sub-metrics.
    width: of the branches' vectors.
    label, head, static: hidden widths of the label's MLP, the score head, and the static branch's head.
    swin, convnext: presets of the backbones, or their shapes.
    drop, dynamic_drop: dropout of the MLPs and before the dynamic branch's head.
  """

  branches: tuple[str, ...] = BRANCHES
  fusion: str = "gate"
  features: int = 15
  width: int = 400
  label: tuple[int, ...] = (64, 128, 256)
  head: tuple[int, ...] = (512, 256, 64)
  static: tuple[int, ...] = (512,)
  swin: video_swin.Shape = video_swin.PRESETS["tiny-fragments"]
  convnext: convnext_lib.Shape = convnext_lib.PRESETS["tiny"]
  drop: float = 0.1
  dynamic_drop: float = 0.5

  def __post_init__(self) -> None:
    for name in self.branches:
      if name not in BRANCHES:
        raise ConfigError(f"TSA has no branch {name!r}{nearest(name, BRANCHES)}")
    if not self.branches or len(set(self.branches)) != len(self.branches):
      raise ConfigError(f"TSA of branches {self.branches}: wants each once, at least one of {', '.join(BRANCHES)}")
    if self.fusion not in FUSIONS:
      raise ConfigError(f"TSA has no fusion {self.fusion!r}{nearest(self.fusion, FUSIONS)}")
    if "label" in self.branches and self.features < 1:
      raise ConfigError("the label branch wants at least one feature; or leave the branch out")

  @property
  def gated(self) -> bool:
    """Whether cross-gating is there to be done: the label and something to gate."""
    return self.fusion == "gate" and "label" in self.branches and len(self.branches) > 1


PRESETS = {
  "tiny": Shape(),
  "xs": Shape(
    width=48,
    label=(32, 64),
    head=(64, 32),
    static=(),
    swin=video_swin.PRESETS["xs"],
    convnext=convnext_lib.PRESETS["xs"],
    dynamic_drop=0.2,
  ),
}


def preset(name: str) -> Shape:
  """The sizes by name: tiny (the paper's, 59 M parameters), xs.

  Raises:
    ConfigError: there is none of that name.
  """
  if name not in PRESETS:
    raise ConfigError(f"TSA {name!r} does not exist{nearest(name, PRESETS)}")
  return PRESETS[name]


def _dropped(x_BD: jax.Array, rate: float, keys_B: jax.Array | None, name: str) -> jax.Array:
  """Dropout of each row by its own key; the identity without keys."""
  if keys_B is None or rate == 0:
    return x_BD
  kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BD.shape[1:]))(rng.stream(keys_B, name))
  return jnp.where(kept, x_BD / (1 - rate), 0).astype(x_BD.dtype)


class MLP(nnx.Module):
  """Linear layers, each followed by GELU (exact), with dropout between; `last` leaves the final one bare."""

  def __init__(self, widths: Sequence[int], drop: float, *, last: bool = True, name: str, rngs: nnx.Rngs):
    self.drop, self.last, self.name = drop, last, name
    linear = lambda i, o: Linear(i, o, axes=(None, None), rngs=rngs)
    self.layers = nnx.List([linear(i, o) for i, o in itertools.pairwise(widths)])

  def __call__(self, x_BD: jax.Array, keys_B: jax.Array | None) -> jax.Array:
    for number, layer in enumerate(self.layers):
      if number:
        x_BD = _dropped(x_BD, self.drop, keys_B, f"{self.name}{number}")
      x_BD = layer(x_BD)
      if self.last or number < len(self.layers) - 1:
        x_BD = jax.nn.gelu(x_BD, approximate=False)
    return x_BD


class CrossGating(nnx.Module):
  """Weighted cross-gating block: y' = W_d (y1 * gelu(W_c (W_a l + b_a) + b_c)) + b_d + y1 with y1 = W_b y + b_b.

  GELU in its tanh form, as in the released code.
  """

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    linear = lambda: Linear(width, width, axes=(None, None), rngs=rngs)
    self.label, self.feature, self.gate, self.out = linear(), linear(), linear(), linear()

  def __call__(self, label_BD: jax.Array, y_BD: jax.Array) -> jax.Array:
    y_BD = self.feature(y_BD)
    gate_BD = jax.nn.gelu(self.gate(self.label(label_BD)), approximate=True)
    return self.out(y_BD * gate_BD) + y_BD


class TSA(nnx.Module):
  """Inputs of a clip to its raw score; what a raw score means, calibration says (`measure.vtss`)."""

  def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
    self.shape = shape
    width = shape.width
    if "dynamic" in shape.branches:
      self.swin = video_swin.VideoSwin(shape.swin, rngs=rngs)
      self.dynamic_head = Linear(shape.swin.channels, width, axes=("embed", None), rngs=rngs)
    if "static" in shape.branches:
      self.convnext = convnext_lib.ConvNeXt(shape.convnext, rngs=rngs)
      entry = shape.convnext.classes or shape.convnext.widths[-1]
      self.static_head = MLP((entry, *shape.static, width), shape.drop, name="static", rngs=rngs)
    if "label" in shape.branches:
      self.null = nnx.Param(jnp.full(shape.features, 0.5, jnp.float32), axes=(None,))  # of a missing sub-metric
      self.label_mlp = MLP((shape.features, *shape.label, width), shape.drop, name="label", rngs=rngs)
    visual = [name for name in shape.branches if name != "label"]
    if shape.gated:
      self.gates = nnx.Dict({name: CrossGating(width, rngs=rngs) for name in visual})
      self.weights = Linear(len(visual) * width, len(visual), axes=(None, None), rngs=rngs)
    entry = width if shape.gated else width * len(shape.branches)
    self.head = MLP((entry, *shape.head, 1), shape.drop, last=False, name="head", rngs=rngs)

  def __call__(
    self,
    fragments_BQTHWC: jax.Array | None = None,
    image_BHWC: jax.Array | None = None,
    features_BM: jax.Array | None = None,
    keys_B: jax.Array | None = None,
    dtype: jnp.dtype | type = jnp.float32,
  ) -> jax.Array:
    """Raw scores (B,), float32; what a branch that is switched off would read is not looked at.

    Args:
      fragments_BQTHWC: normalised RGB, Q mosaics a clip; their vectors are averaged.
      image_BHWC: normalised RGB. features_BM: sub-metrics in 0..1, NaN where missing.
      keys_B: typed keys of the rows in training; None: no dropout.
      dtype: of the computation.
    """
    vectors = {}
    if "dynamic" in self.shape.branches and fragments_BQTHWC is not None:
      vectors["dynamic"] = self.dynamic(fragments_BQTHWC.astype(dtype), keys_B)
    if "static" in self.shape.branches and image_BHWC is not None:
      vectors["static"] = self.static_head(self.convnext(image_BHWC.astype(dtype)), keys_B)
    if "label" in self.shape.branches and features_BM is not None:
      vectors["label"] = self.label(features_BM, keys_B, dtype)
    return self.fused(vectors, keys_B)

  def dynamic(self, fragments_BQTHWC: jax.Array, keys_B: jax.Array | None) -> jax.Array:
    """The dynamic branch's vectors (B, width): dropout, mean over places and mosaics, head."""
    B, Q = fragments_BQTHWC.shape[:2]
    keys_R = None if keys_B is None else jnp.repeat(keys_B, Q)
    map_RTHWC = self.swin(fragments_BQTHWC.reshape(B * Q, *fragments_BQTHWC.shape[2:]), keys_R)
    pooled_BD = jnp.mean(map_RTHWC, axis=(1, 2, 3)).reshape(B, Q, -1).mean(1)
    return self.dynamic_head(_dropped(pooled_BD, self.shape.dynamic_drop, keys_B, "dynamic"))

  def label(self, features_BM: jax.Array, keys_B: jax.Array | None, dtype: jnp.dtype | type) -> jax.Array:
    """The label branch's vectors; a missing sub-metric (NaN) is a learned value."""
    known_BM = jnp.where(jnp.isnan(features_BM), self.null[...], features_BM)
    return self.label_mlp(known_BM.astype(dtype), keys_B)

  def fused(self, vectors: dict[str, jax.Array], keys_B: jax.Array | None = None) -> jax.Array:
    """Vectors of the branches to the raw score (B,)."""
    if self.shape.gated:
      gated = {name: self.gates[name](vectors["label"], vectors[name]) for name in self.gates}
      weights_BW = self.weights(jnp.concatenate([gated[name] for name in gated], axis=-1))
      fused_BD = sum(weights_BW[:, i : i + 1] * gated[name] for i, name in enumerate(gated))
    else:
      fused_BD = jnp.concatenate([vectors[name] for name in self.shape.branches], axis=-1)
    return self.head(jnp.asarray(fused_BD), keys_B)[:, 0].astype(jnp.float32)


def products(shape: Shape, frames: int, rows: int, columns: int, image: int) -> float:
  """Multiplications of one forward pass over one mosaic and one picture: kernels, depthwise taps and attention."""
  total = 0.0
  if "dynamic" in shape.branches:
    swin = shape.swin
    size = [-(-side // patch) for side, patch in zip((frames, rows, columns), swin.patch, strict=True)]
    total += math.prod(size) * 3 * math.prod(swin.patch) * swin.width
    for stage, depth in enumerate(swin.depths):
      width, tokens = swin.width * 2**stage, math.prod(size)
      seen = math.prod(min(side, window) for side, window in zip(size, swin.window, strict=True))
      total += depth * tokens * width * (12 * width + 2 * seen)
      if stage < len(swin.depths) - 1:
        size[1:] = [-(-side // 2) for side in size[1:]]
        total += math.prod(size) * 8 * width * width
  if "static" in shape.branches:
    net = shape.convnext
    for stage, (depth, width) in enumerate(zip(net.depths, net.widths, strict=True)):
      places = (image // 2 ** (stage + 2)) ** 2
      total += places * (4 * net.widths[stage - 1] * width if stage else 48 * width)
      total += depth * places * width * (8 * width + net.kernel**2)
  return total + 10 * shape.width**2
