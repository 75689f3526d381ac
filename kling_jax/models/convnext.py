"""ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s"): pictures to features, channels last.

Patches of 4 x 4, four stages of blocks x + scale * down(gelu(up(norm(depthwise 7 x 7 (x))))), and between stages a
norm and patches of 2 x 2. GELU in its exact form; every LayerNorm over channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.errors import ConfigError, nearest
from kling_jax.nn.conv import conv_depthwise
from kling_jax.nn.linear import Linear, normal
from kling_jax.nn.norm import LayerNorm
from kling_jax.nn.weights import used

EPSILON = 1e-6
STD = 0.02  # of initial kernels


@dataclasses.dataclass(frozen=True)
class Shape:
  """The sizes of a network.

  Attributes:
    depths, widths: blocks and channels of each stage.
    classes: outputs of the classifier; 0 leaves it out.
    kernel: of the depthwise convolution.
    scale: initial value of the blocks' learned scales.
  """

  depths: tuple[int, ...]
  widths: tuple[int, ...]
  classes: int = 1000
  kernel: int = 7
  scale: float = 1e-6


PRESETS = {
  "tiny": Shape((3, 3, 9, 3), (96, 192, 384, 768)),
  "xs": Shape((1, 1, 2), (16, 32, 64), classes=0, scale=0.1),
}


def preset(name: str) -> Shape:
  """The sizes by name: tiny (ConvNeXt-T, 28.6 M parameters), xs.

  Raises:
    ConfigError: there is none of that name.
  """
  if name not in PRESETS:
    raise ConfigError(f"ConvNeXt {name!r} does not exist{nearest(name, PRESETS)}")
  return PRESETS[name]


class Block(nnx.Module):
  """x + scale * down(gelu(up(norm(depthwise(x)))))."""

  def __init__(self, width: int, kernel: int, scale: float, *, rngs: nnx.Rngs):
    draw = normal(STD)(rngs.params(), (kernel, kernel, width), jnp.float32)
    self.depthwise = nnx.Param(draw, axes=(None, None, None))
    self.depthwise_bias = nnx.Param(jnp.zeros(width, jnp.float32), axes=(None,))
    self.norm = LayerNorm(width, epsilon=EPSILON)
    self.up = Linear(width, 4 * width, axes=("embed", "mlp"), init=normal(STD), rngs=rngs)
    self.down = Linear(4 * width, width, axes=("mlp", "embed"), init=normal(STD), rngs=rngs)
    self.scale = nnx.Param(jnp.full(width, scale, jnp.float32), axes=(None,))

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    kernel = used(self.depthwise[...], (None, None, None), x_BHWC.dtype)
    h_BHWC = conv_depthwise(x_BHWC, kernel) + used(self.depthwise_bias[...], (None,), x_BHWC.dtype)
    h_BHWC = self.down(jax.nn.gelu(self.up(self.norm(h_BHWC)), approximate=False))
    return x_BHWC + used(self.scale[...], (None,), x_BHWC.dtype) * h_BHWC


class Stage(nnx.Module):
  """Smaller patches where there was a stage before, then blocks, stacked and scanned."""

  def __init__(self, before: int | None, width: int, depth: int, shape: Shape, *, rngs: nnx.Rngs):
    self.norm = None if before is None else LayerNorm(before, epsilon=EPSILON)
    self.merge = (
      None if before is None else Linear(4 * before, width, axes=(None, "embed"), init=normal(STD), rngs=rngs)
    )

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
    def stack(rngs: nnx.Rngs) -> Block:
      return Block(width, shape.kernel, shape.scale, rngs=rngs)

    self.blocks = stack(rngs)

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    if self.norm is not None and self.merge is not None:
      x_BHWC = self.merge(patches(self.norm(x_BHWC), 2))
    graph, stacked = nnx.split(self.blocks)
    return jax.lax.scan(lambda x, block: (nnx.merge(graph, block)(x), None), x_BHWC, stacked)[0]


class ConvNeXt(nnx.Module):
  """Pictures to a feature map, its pooled vector, and the classifier's logits."""

  def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
    widths = shape.widths
    self.shape = shape
    self.patch = Linear(3 * 16, widths[0], axes=(None, "embed"), init=normal(STD), rngs=rngs)
    self.patch_norm = LayerNorm(widths[0], epsilon=EPSILON)
    before = (None, *widths[:-1])
    stages = [Stage(b, w, d, shape, rngs=rngs) for b, w, d in zip(before, widths, shape.depths, strict=True)]
    self.stages = nnx.List(stages)
    self.norm = LayerNorm(widths[-1], epsilon=EPSILON)
    self.classifier = (
      Linear(widths[-1], shape.classes, axes=("embed", None), init=normal(STD), rngs=rngs) if shape.classes else None
    )

  def features(self, images_BHWC: jax.Array) -> jax.Array:
    """The last stage's map (B, H / 2^(stages + 1), W / .., C); what fills no patch is cut off."""
    x_BHWC = self.patch_norm(self.patch(patches(images_BHWC, 4)))
    for stage in self.stages:
      x_BHWC = stage(x_BHWC)
    return x_BHWC

  def pooled(self, images_BHWC: jax.Array) -> jax.Array:
    """norm(mean of the map): (B, C)."""
    return self.norm(jnp.mean(self.features(images_BHWC), axis=(1, 2)))

  def __call__(self, images_BHWC: jax.Array) -> jax.Array:
    """Logits (B, classes), or the pooled vector where there is no classifier; pictures are normalised RGB."""
    pooled_BC = self.pooled(images_BHWC)
    return pooled_BC if self.classifier is None else self.classifier(pooled_BC)


def patches(x_BHWC: jax.Array, side: int) -> jax.Array:
  """Squares of `side` pixels as channels, in the order row, column, channel: (B, H / side, W / side, side^2 C)."""
  B, H, W, C = x_BHWC.shape
  rows, columns = H // side, W // side
  x_BHWC = x_BHWC[:, : rows * side, : columns * side].reshape(B, rows, side, columns, side, C)
  return x_BHWC.transpose(0, 1, 3, 2, 4, 5).reshape(B, rows, columns, side * side * C)
