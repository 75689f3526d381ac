"""The picture tokenizer of Chameleon (a VQGAN's encoder): a picture becomes a grid of codes of a codebook."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.errors import ConfigError
from kling_jax.models.image_vae import Coder, Downsample, FrameAttention, ResidualBlock
from kling_jax.nn.conv import FrameConv


@dataclasses.dataclass(frozen=True)
class VQImageConfig:
  """Shape of a VQImage; the defaults are Chameleon's.

  Attributes:
    widths: channels of each stage; between two stages rows and columns halve.
    blocks: residual blocks a stage.
    channels: of what the encoder gives. code_width: of a code's vector. codes: in the codebook.
    groups: of the norms.
  """

  widths: tuple[int, ...] = (128, 128, 256, 256, 512)
  blocks: int = 2
  channels: int = 256
  code_width: int = 256
  codes: int = 8192
  groups: int = 32

  @property
  def spatial(self) -> int:
    """Pixels in a row or column of the grid of codes."""
    return 2 ** (len(self.widths) - 1)


class VQImage(nnx.Module):
  """Pictures to codes; there is no way back in what was published."""

  def __init__(self, config: VQImageConfig, *, rngs: nnx.Rngs):
    self.config = config
    groups, top, width = config.groups, config.widths[-1], config.widths[0]
    blocks: list[nnx.Module] = []
    for stage, wide in enumerate(config.widths):
      for _ in range(config.blocks):
        blocks.append(ResidualBlock(width, wide, groups, rngs=rngs))
        width = wide
      if stage < len(config.widths) - 1:
        blocks.append(Downsample(width, rngs=rngs))
    blocks += [ResidualBlock(top, top, groups, rngs=rngs), FrameAttention(top, groups, rngs=rngs)]
    blocks.append(ResidualBlock(top, top, groups, rngs=rngs))
    self.encoder = Coder((3, config.channels), blocks, (config.widths[0], top), groups, rngs=rngs)
    self.quant = FrameConv(config.channels, config.code_width, 1, rngs=rngs)
    table = jax.random.normal(rngs.params(), (config.codes, config.code_width), jnp.float32)
    self.codebook = nnx.Param(table, axes=(None, None))

  def vectors(self, pictures_BHWC: jax.Array) -> jax.Array:
    """What is looked up in the codebook: (B, H / spatial, W / spatial, code_width).

    Args:
      pictures_BHWC: RGB in [-1, 1], sides that are multiples of `config.spatial`.
    """
    spatial = self.config.spatial
    height, width = pictures_BHWC.shape[1:3]
    if height % spatial or width % spatial:
      raise ConfigError(f"pictures of {height} x {width} do not divide; the tokenizer takes multiples of {spatial}")
    return self.quant(self.encoder(pictures_BHWC[:, None]))[:, 0]

  def __call__(self, pictures_BHWC: jax.Array) -> jax.Array:
    """Codes int32 (B, N) of the nearest vectors, in row-major order; the distances are computed in float32."""
    z = self.vectors(pictures_BHWC).astype(jnp.float32).reshape(pictures_BHWC.shape[0], -1, self.config.code_width)
    book = self.codebook[...]
    product = jnp.einsum("bnc,kc->bnk", z, book, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(jnp.square(book), -1) - 2 * product, axis=-1).astype(jnp.int32)
