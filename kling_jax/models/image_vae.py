"""The image VAE of Stable Diffusion (Rombach et al. 2022, diffusers' AutoencoderKL): pictures to latents and back.

Plain residual blocks with group norms; each frame of a video goes through on its own.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.errors import ConfigError
from kling_jax.nn.attention import attention
from kling_jax.nn.conv import FrameConv
from kling_jax.nn.linear import Linear

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class ImageVAEConfig:
  """Shape of an ImageVAE.

  Attributes:
    widths: channels of each stage; between two stages rows and columns halve.
    blocks: residual blocks a stage of the encoder; the decoder has one more.
    channels: of a latent.
    groups: of the norms.
    scale, shift: a latent is (mean - shift) * scale.
    quant: whether there are 1 x 1 convolutions around the latents.
  """

  widths: tuple[int, ...]
  blocks: int = 2
  channels: int = 4
  groups: int = 32
  scale: float = 0.18215
  shift: float = 0.0
  quant: bool = True

  def __post_init__(self) -> None:
    if any(width % self.groups for width in self.widths):
      raise ConfigError(f"image vae: {self.groups} groups do not divide widths {self.widths}")

  @property
  def temporal(self) -> int:
    return 1

  @property
  def spatial(self) -> int:
    """Pixels in a latent row or column."""
    return 2 ** (len(self.widths) - 1)

  def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(t, h, w, c) of the latents; ConfigError where the size does not divide."""
    if frames < 1 or height % self.spatial or width % self.spatial or not height or not width:
      raise ConfigError(f"frames of {height} x {width} do not divide; the image vae takes multiples of {self.spatial}")
    return frames, height // self.spatial, width // self.spatial, self.channels


class GroupNorm(nnx.Module):
  """Group norm over rows, columns and the channels of a group, in float32."""

  def __init__(self, channels: int, groups: int):
    self.groups = groups
    self.scale = nnx.Param(jnp.ones(channels, jnp.float32), axes=(None,))
    self.bias = nnx.Param(jnp.zeros(channels, jnp.float32), axes=(None,))

  def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
    grouped = x_BTHWC.astype(jnp.float32).reshape(*x_BTHWC.shape[:4], self.groups, -1)
    centred = grouped - jnp.mean(grouped, axis=(2, 3, 5), keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=(2, 3, 5), keepdims=True) + EPSILON)
    return (normal.reshape(x_BTHWC.shape) * self.scale[...] + self.bias[...]).astype(x_BTHWC.dtype)


class ResidualBlock(nnx.Module):
  """shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))."""

  def __init__(self, channels_in: int, channels_out: int, groups: int, *, rngs: nnx.Rngs):
    self.norm1 = GroupNorm(channels_in, groups)
    self.conv1 = FrameConv(channels_in, channels_out, rngs=rngs)
    self.norm2 = GroupNorm(channels_out, groups)
    self.conv2 = FrameConv(channels_out, channels_out, rngs=rngs)
    fits = channels_in == channels_out
    self.shortcut = None if fits else FrameConv(channels_in, channels_out, 1, rngs=rngs)

  def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
    h_BTHWC = self.conv1(jax.nn.silu(self.norm1(x_BTHWC)))
    h_BTHWC = self.conv2(jax.nn.silu(self.norm2(h_BTHWC)))
    return (x_BTHWC if self.shortcut is None else self.shortcut(x_BTHWC)) + h_BTHWC


class FrameAttention(nnx.Module):
  """Self-attention of one head among the pixels of each frame."""

  def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
    self.norm = GroupNorm(channels, groups)
    linear = lambda: Linear(channels, channels, axes=(None, None), rngs=rngs)
    self.q, self.k, self.v, self.out = linear(), linear(), linear(), linear()

  def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
    B, T, H, W, C = x_BTHWC.shape
    h_BNC = self.norm(x_BTHWC).reshape(B * T, H * W, C)
    q, k, v = (part(h_BNC)[:, :, None] for part in (self.q, self.k, self.v))
    return x_BTHWC + self.out(attention(q, k, v)[:, :, 0]).reshape(x_BTHWC.shape)


class Downsample(nnx.Module):
  """Halves rows and columns; the zeros that this needs stand below and at the right."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv = FrameConv(channels, channels, stride=2, padding=((0, 1), (0, 1)), rngs=rngs)

  def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
    return self.conv(x_BTHWC)


class Upsample(nnx.Module):
  """Doubles rows and columns by repetition, then convolves."""

  def __init__(self, channels: int, *, rngs: nnx.Rngs):
    self.conv = FrameConv(channels, channels, rngs=rngs)

  def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
    return self.conv(jnp.repeat(jnp.repeat(x_BTHWC, 2, axis=2), 2, axis=3))


class Coder(nnx.Module):
  """What encoder and decoder are: a first convolution, a chain of blocks, and norm, SiLU, last convolution."""

  def __init__(
    self, ends: tuple[int, int], blocks: Sequence[nnx.Module], widths: tuple[int, int], groups: int, *, rngs: nnx.Rngs
  ):
    self.stem = FrameConv(ends[0], widths[0], rngs=rngs)
    self.blocks = nnx.List(blocks)
    self.norm = GroupNorm(widths[1], groups)
    self.head = FrameConv(widths[1], ends[1], rngs=rngs)

  def __call__(self, x_BTHWC: jax.Array) -> jax.Array:
    x_BTHWC = self.stem(x_BTHWC)
    for block in self.blocks:
      x_BTHWC = block(x_BTHWC)
    return self.head(jax.nn.silu(self.norm(x_BTHWC)))


class ImageVAE(nnx.Module):
  """Frames to latents and back, each on its own; a codec of `models.latents` with temporal 1.

  Attributes:
    config: its shape.
    temporal, spatial, channels: frames in a latent frame (1), pixels in a latent row, channels of a latent.
  """

  def __init__(self, config: ImageVAEConfig, *, rngs: nnx.Rngs):
    """Draws the weights from the stream `params`."""
    self.config = config
    self.temporal, self.spatial, self.channels = config.temporal, config.spatial, config.channels
    groups, top = config.groups, config.widths[-1]
    residual = lambda i, o: ResidualBlock(i, o, groups, rngs=rngs)
    middle = lambda: [residual(top, top), FrameAttention(top, groups, rngs=rngs), residual(top, top)]
    down: list[nnx.Module] = []
    width = config.widths[0]
    for stage, wide in enumerate(config.widths):
      for _ in range(config.blocks):
        down.append(residual(width, wide))
        width = wide
      if stage < len(config.widths) - 1:
        down.append(Downsample(width, rngs=rngs))
    ends = 3, 2 * config.channels
    self.encoder = Coder(ends, [*down, *middle()], (config.widths[0], top), groups, rngs=rngs)
    up: list[nnx.Module] = []
    for stage, wide in enumerate(reversed(config.widths)):
      for _ in range(config.blocks + 1):
        up.append(residual(width, wide))
        width = wide
      if stage < len(config.widths) - 1:
        up.append(Upsample(width, rngs=rngs))
    self.decoder = Coder((config.channels, 3), [*middle(), *up], (top, config.widths[0]), groups, rngs=rngs)
    pointwise = lambda channels: FrameConv(channels, channels, 1, rngs=rngs) if config.quant else None
    self.quant, self.post_quant = pointwise(2 * config.channels), pointwise(config.channels)

  def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """See `ImageVAEConfig.latent_shape`."""
    return self.config.latent_shape(frames, height, width)

  def encode_moments(self, frames_BTHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log variance of the posterior, float32, before scale and shift; frames in [-1, 1]."""
    self.latent_shape(*frames_BTHWC.shape[1:4])
    h_BTHWC = self.encoder(frames_BTHWC)
    h_BTHWC = h_BTHWC if self.quant is None else self.quant(h_BTHWC)
    mean_BTHWC, log_variance_BTHWC = jnp.split(h_BTHWC.astype(jnp.float32), 2, axis=-1)
    return mean_BTHWC, jnp.clip(log_variance_BTHWC, -30, 20)

  def encode(self, frames_BTHWC: jax.Array) -> jax.Array:
    """Latents (B, T, H / spatial, W / spatial, C), float32: the posterior's mode, scaled. A frame at a time."""
    call = lambda frame: (self.encode_moments(frame[:, None])[0][:, 0] - self.config.shift) * self.config.scale
    return jnp.moveaxis(jax.lax.map(call, jnp.moveaxis(frames_BTHWC, 1, 0)), 0, 1)

  def decode(self, latents_BTHWC: jax.Array) -> jax.Array:
    """Frames about in [-1, 1], float32, not clipped; a frame at a time, computed in the dtype of the latents."""

    def call(latent: jax.Array) -> jax.Array:
      raw = (latent.astype(jnp.float32) / self.config.scale + self.config.shift).astype(latent.dtype)[:, None]
      return self.decoder(raw if self.post_quant is None else self.post_quant(raw))[:, 0].astype(jnp.float32)

    return jnp.moveaxis(jax.lax.map(call, jnp.moveaxis(latents_BTHWC, 1, 0)), 0, 1)
