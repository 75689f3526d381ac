"""Causal 3-D video VAE of Wan 2.1's structure (Wan team 2025, arXiv:2503.20314): video to latents and back.

The first frame stands alone and every latent frame after it holds `temporal` frames: T = 1 + temporal k frames become
1 + k latent frames, rows and columns shrink by `spatial`. Everything is causal in time, so that a video may go through
whole or in chunks (the first frame, then groups of `temporal`) with the same result: each layer hands on what it has to
remember, and the tree of these memories is the `cache` that calls take and return; None at the start of a video.

Three layers treat the start in a way of their own, all as Wan 2.1's released code does chunk by chunk:
  * a convolution sees zeros before the first frame;
  * a temporal down-sampling passes the first frame by its convolution; later outputs j convolve frames 2j-2 .. 2j;
  * a temporal up-sampling passes the first frame on undoubled, and its convolution never sees that frame: it starts
    behind it, with zeros.

The parts come with kernels of zero (or of identities, where that is their start); `VideoVAE` draws them all.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.errors import ConfigError, nearest
from kling_jax.nn.attention import attention
from kling_jax.nn.conv import CausalConv3d, FrameConv, conv_taps, same
from kling_jax.nn.params import flatten, unflatten

Cache = Any  # a pytree of arrays; None at the start of a video


@dataclasses.dataclass(frozen=True)
class VideoVAEConfig:
  """Shape of a VideoVAE.

  Attributes:
    base: channels at full resolution.
    multipliers: channels of each stage over `base`; between two stages rows and columns halve.
    blocks: residual blocks a stage of the encoder; the decoder has one more.
    halve_time: for each step between stages of the encoder, whether time halves too.
    channels: of a latent.
    remat: recompute each block in the backward pass, for memory.
  """

  base: int
  multipliers: tuple[int, ...] = (1, 2, 4, 4)
  blocks: int = 2
  halve_time: tuple[bool, ...] = (False, True, True)
  channels: int = 16
  remat: bool = False

  def __post_init__(self) -> None:
    if len(self.halve_time) != len(self.multipliers) - 1:
      raise ConfigError(
        f"video vae: {len(self.multipliers)} stages have {len(self.multipliers) - 1} steps between them, "
        f"halve_time names {len(self.halve_time)}"
      )

  @property
  def temporal(self) -> int:
    """Frames in a latent frame."""
    return 2 ** sum(self.halve_time)

  @property
  def spatial(self) -> int:
    """Pixels in a latent row or column."""
    return 2 ** len(self.halve_time)

  def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(t, h, w, c) of the latents of a video.

    Raises:
      ConfigError: the codec has no latents of that size; names the nearest sizes that it has.
    """
    t, s = self.temporal, self.spatial
    if frames < 1 or (frames - 1) % t or height % s or width % s or not height or not width:
      legal = 1 + max(0, round((frames - 1) / t)) * t, max(1, round(height / s)) * s, max(1, round(width / s)) * s
      raise ConfigError(
        f"a video of {frames} x {height} x {width} (frames, height, width) does not divide: the vae takes 1 + {t}k "
        f"frames and multiples of {s} pixels; the nearest size is {' x '.join(map(str, legal))}"
      )
    return 1 + (frames - 1) // t, height // s, width // s, self.channels


START_LOG_VARIANCE = -6.0  # of the posterior
PRESETS = {
  "wan2.1": VideoVAEConfig(base=96, remat=True),
  "small": VideoVAEConfig(base=16, blocks=1),  # trains on two CPU cores
  "xs": VideoVAEConfig(base=8, multipliers=(1, 2, 2, 2), blocks=1, channels=4),  # tests
}
# Moments of Wan 2.1's latents, from its released code: latents are (mean - WAN_MEAN) / WAN_STD.
WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


def preset(name: str) -> VideoVAEConfig:
  """The named shape; raises ConfigError with the nearest name where there is none."""
  if name not in PRESETS:
    raise ConfigError(f"video vae preset {name!r} does not exist{nearest(name, PRESETS)}")
  return PRESETS[name]


class ChannelNorm(nnx.Module):
  """x / |x| * sqrt(C) * scale over the channels of each pixel, in float32 (Wan's RMS_norm)."""

  def __init__(self, channels: int):
    self.scale = nnx.Param(jnp.ones(channels, jnp.float32), axes=(None,))

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x32), axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.maximum(squares, 1e-24))  # |x| >= 1e-12, and no NaN in the gradient of a black pixel
    return (x32 * inverse * x.shape[-1] ** 0.5 * self.scale[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
  """shortcut(x) + conv(silu(norm(conv(silu(norm(x))))))."""

  def __init__(self, channels_in: int, channels_out: int):
    self.norm1 = ChannelNorm(channels_in)
    self.conv1 = CausalConv3d(channels_in, channels_out, rngs=None)
    self.norm2 = ChannelNorm(channels_out)
    self.conv2 = CausalConv3d(channels_out, channels_out, rngs=None)
    fits = channels_in == channels_out
    self.shortcut = None if fits else CausalConv3d(channels_in, channels_out, (1, 1, 1), rngs=None)

  def __call__(self, x_BTHWC: jax.Array, cache: Cache = None) -> tuple[jax.Array, Cache]:
    first, second = cache or (None, None)
    h_BTHWC, first = self.conv1(jax.nn.silu(self.norm1(x_BTHWC)), first)
    h_BTHWC, second = self.conv2(jax.nn.silu(self.norm2(h_BTHWC)), second)
    kept_BTHWC = x_BTHWC if self.shortcut is None else self.shortcut(x_BTHWC)[0]
    return kept_BTHWC + h_BTHWC, (first, second)


class FrameAttention(nnx.Module):
  """Self-attention of one head among the pixels of each frame; adds nothing at the start."""

  def __init__(self, channels: int):
    self.norm = ChannelNorm(channels)
    self.qkv = FrameConv(channels, 3 * channels, 1, rngs=None)
    self.out = FrameConv(channels, channels, 1, rngs=None)

  def __call__(self, x_BTHWC: jax.Array, cache: Cache = None) -> tuple[jax.Array, Cache]:
    B, T, H, W, C = x_BTHWC.shape
    qkv = self.qkv(self.norm(x_BTHWC)).reshape(B * T, H * W, 3, 1, C)
    o_BNKE = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
    return x_BTHWC + self.out(o_BNKE.reshape(B, T, H, W, C)), ()


class Downsample(nnx.Module):
  """Halves rows and columns, and time where `time`; the first frame of a video keeps a time step of its own."""

  def __init__(self, channels: int, time: bool):
    self.frame = FrameConv(channels, channels, stride=2, padding=((0, 1), (0, 1)), rngs=None)
    self.time = CausalConv3d(channels, channels, (3, 1, 1), rngs=None) if time else None
    if self.time is not None:  # starts as a choice of every second frame
      self.time.kernel[...] = jnp.zeros_like(self.time.kernel[...]).at[-1, 0, 0].set(jnp.eye(channels))

  def __call__(self, x_BTHWC: jax.Array, cache: Cache = None) -> tuple[jax.Array, Cache]:
    x_BTHWC = self.frame(x_BTHWC)
    if self.time is None:
      return x_BTHWC, ()
    parts = [x_BTHWC[:, :1]] if cache is None else []
    x_BTHWC = x_BTHWC if cache is None else jnp.concatenate([cache, x_BTHWC], axis=1)
    if x_BTHWC.shape[1] > 1:
      y_BTHWC = conv_taps(x_BTHWC, self.time.kernel[...], (2, 1, 1), same(1))
      parts.append(y_BTHWC + self.time.bias[...].astype(y_BTHWC.dtype))
    return jnp.concatenate(parts, axis=1), x_BTHWC[:, -1:]


class Upsample(nnx.Module):
  """Doubles rows and columns and halves channels, and doubles time where `time` except for a video's first frame."""

  def __init__(self, channels: int, time: bool):
    self.frame = FrameConv(channels, channels // 2, rngs=None)
    self.time = CausalConv3d(channels, 2 * channels, (3, 1, 1), rngs=None) if time else None
    if self.time is not None:  # starts as a repetition of each frame
      both = jnp.concatenate([jnp.eye(channels)] * 2, axis=1)
      self.time.kernel[...] = jnp.zeros_like(self.time.kernel[...]).at[-1, 0, 0].set(both)

  def __call__(self, x_BTHWC: jax.Array, cache: Cache = None) -> tuple[jax.Array, Cache]:
    if self.time is not None:
      x_BTHWC, cache = self._double(self.time, x_BTHWC, cache)
    B, T, H, W, C = x_BTHWC.shape
    x_BTHWC = jnp.broadcast_to(x_BTHWC[:, :, :, None, :, None], (B, T, H, 2, W, 2, C)).reshape(B, T, 2 * H, 2 * W, C)
    return self.frame(x_BTHWC), () if self.time is None else cache

  @staticmethod
  def _double(conv: CausalConv3d, x_BTHWC: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    parts = []
    if cache is None:
      parts, x_BTHWC = [x_BTHWC[:, :1]], x_BTHWC[:, 1:]
      if not x_BTHWC.shape[1]:
        B, _, H, W, C = x_BTHWC.shape
        return parts[0], jnp.zeros((B, 2, H, W, C), x_BTHWC.dtype)
    y_BTHWC, cache = conv(x_BTHWC, cache)  # (.., 2C): the first and the second frame of each pair
    B, T, H, W, C = x_BTHWC.shape
    pairs = jnp.moveaxis(y_BTHWC.reshape(B, T, H, W, 2, C), 4, 2).reshape(B, 2 * T, H, W, C)
    return jnp.concatenate([*parts, pairs], axis=1), cache


class Coder(nnx.Module):
  """What encoder and decoder are: a first convolution, a chain of blocks, and norm, SiLU, last convolution."""

  def __init__(self, ends: tuple[int, int], blocks: list[nnx.Module], widths: tuple[int, int], remat: bool):
    self.stem = CausalConv3d(ends[0], widths[0], rngs=None)
    self.blocks = nnx.List(blocks)
    self.norm = ChannelNorm(widths[1])
    self.head = CausalConv3d(widths[1], ends[1], rngs=None)
    self.remat = remat

  def __call__(self, x_BTHWC: jax.Array, cache: Cache = None) -> tuple[jax.Array, Cache]:
    stem, head, *inner = cache or [None] * (len(self.blocks) + 2)
    x_BTHWC, stem = self.stem(x_BTHWC, stem)
    kept = []
    for block, memory in zip(self.blocks, inner, strict=True):
      call: Callable[..., Any] = jax.checkpoint(block.__call__) if self.remat else block
      x_BTHWC, memory = call(x_BTHWC, memory)
      kept.append(memory)
    y_BTHWC, head = self.head(jax.nn.silu(self.norm(x_BTHWC)), head)
    return y_BTHWC, (stem, head, *kept)


def _middle(channels: int) -> list[nnx.Module]:
  residual = lambda: ResidualBlock(channels, channels)
  return [residual(), FrameAttention(channels), residual()]


def make_encoder(config: VideoVAEConfig) -> Coder:
  """RGB to the two moments of the latents."""
  width = config.base
  blocks: list[nnx.Module] = []
  for stage, multiplier in enumerate(config.multipliers):
    for _ in range(config.blocks):
      blocks.append(ResidualBlock(width, config.base * multiplier))
      width = config.base * multiplier
    if stage < len(config.halve_time):
      blocks.append(Downsample(width, config.halve_time[stage]))
  blocks += _middle(width)
  return Coder((3, 2 * config.channels), blocks, (config.base, width), config.remat)


def make_decoder(config: VideoVAEConfig) -> Coder:
  """Latents to RGB."""
  top = width = config.base * config.multipliers[-1]
  blocks = _middle(width)
  for stage, multiplier in enumerate(reversed(config.multipliers)):
    for _ in range(config.blocks + 1):
      blocks.append(ResidualBlock(width, config.base * multiplier))
      width = config.base * multiplier
    if stage < len(config.halve_time):
      blocks.append(Upsample(width, config.halve_time[-1 - stage]))
      width //= 2
  return Coder((config.channels, 3), blocks, (top, width), config.remat)


class Normalisation(nnx.Module):
  """Per-channel moments that bring latents to mean 0 and variance 1; they belong to the weights."""

  def __init__(self, mean: jax.Array, std: jax.Array):
    self.mean = nnx.Param(mean, axes=(None,))
    self.log_std = nnx.Param(jnp.log(std), axes=(None,))

  def apply(self, raw: jax.Array) -> jax.Array:
    return (raw.astype(jnp.float32) - self.mean[...]) * jnp.exp(-self.log_std[...])

  def undo(self, latents: jax.Array) -> jax.Array:
    return latents.astype(jnp.float32) * jnp.exp(self.log_std[...]) + self.mean[...]


class VideoVAE(nnx.Module):
  """Video to normalised latents and back; computes in the dtype of its input and returns float32.

  Attributes:
    config: its shape.
    temporal, spatial, channels: frames in a latent frame, pixels in a latent row, channels of a latent.
  """

  def __init__(self, config: VideoVAEConfig, *, rngs: nnx.Rngs):
    """Draws the weights from the stream `params` of `rngs`."""
    self.config = config
    self.temporal, self.spatial, self.channels = config.temporal, config.spatial, config.channels
    self.encoder = make_encoder(config)
    self.quant = CausalConv3d(2 * config.channels, 2 * config.channels, (1, 1, 1), rngs=None)
    # A posterior that starts narrow: with its variance at 1 the first thousand steps go to outshouting the noise.
    self.quant.bias[...] = self.quant.bias[...].at[config.channels :].set(START_LOG_VARIANCE)
    self.post_quant = CausalConv3d(config.channels, config.channels, (1, 1, 1), rngs=None)
    self.decoder = make_decoder(config)
    self._draw(rngs.params())
    wan = config == PRESETS["wan2.1"]
    mean = jnp.asarray(WAN_MEAN) if wan else jnp.zeros(config.channels)
    self.normalisation = Normalisation(mean, jnp.asarray(WAN_STD) if wan else jnp.ones(config.channels))

  def _draw(self, key: jax.Array) -> None:
    """Fills the kernels (variance 1 / fan in) from one draw: XLA takes a second to compile each one of a hundred."""
    leaves = {name: leaf.shape for name, leaf in flatten(nnx.state(self)).items() if name.endswith("kernel")}
    shapes = {name: shape for name, shape in leaves.items() if not name.endswith((".time.kernel", ".out.kernel"))}
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes.values()))
    draws = jnp.split(jax.random.normal(key, (ends[-1],), jnp.float32), ends[:-1])
    scaled = {
      name: draw.reshape(shape) / math.sqrt(math.prod(shape[:-1]))
      for (name, shape), draw in zip(shapes.items(), draws, strict=True)
    }
    nnx.update(self, unflatten(scaled))

  @classmethod
  def preset(cls, name: str, *, rngs: nnx.Rngs) -> "VideoVAE":
    """A VAE of the named shape with fresh weights."""
    return cls(preset(name), rngs=rngs)

  @staticmethod
  def geometry(name: str) -> VideoVAEConfig:
    """What is known of the named VAE without its weights: temporal, spatial, channels, `latent_shape`."""
    return preset(name)

  def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """See `VideoVAEConfig.latent_shape`."""
    return self.config.latent_shape(frames, height, width)

  def encode(self, frames_BTHWC: jax.Array) -> jax.Array:
    """Normalised latents (B, 1 + k, H / spatial, W / spatial, C), the posterior's mode.

    Goes through the video in chunks, so that memory does not grow with its length.

    Args:
      frames_BTHWC: in [-1, 1], T = 1 + temporal k.

    Raises:
      ConfigError: the size does not divide.
    """
    self.latent_shape(*frames_BTHWC.shape[1:4])
    return _in_chunks(self.encode_chunk, frames_BTHWC, self.temporal)

  def decode(self, latents_BTHWC: jax.Array) -> jax.Array:
    """Frames (B, 1 + temporal (t - 1), ..) about in [-1, 1], not clipped; in chunks, as `encode`."""
    return _in_chunks(self.decode_chunk, latents_BTHWC, 1)

  def encode_chunk(self, frames_BTHWC: jax.Array, cache: Cache = None) -> tuple[jax.Array, Cache]:
    """`encode` for a part of a video: 1 + temporal k frames at its start, then multiples of `temporal`."""
    mean_BTHWC, _, cache = self.encode_moments(frames_BTHWC, cache)
    return self.normalisation.apply(mean_BTHWC), cache

  def decode_chunk(self, latents_BTHWC: jax.Array, cache: Cache = None) -> tuple[jax.Array, Cache]:
    """`decode` for a part of a video: any number of latent frames; returns its frames and the cache for the next."""
    raw_BTHWC = self.normalisation.undo(latents_BTHWC).astype(latents_BTHWC.dtype)
    return self.decode_raw(raw_BTHWC, cache)

  def encode_moments(self, frames_BTHWC: jax.Array, cache: Cache = None) -> tuple[jax.Array, jax.Array, Cache]:
    """Mean and log variance of the posterior before normalisation, float32, and the cache for the next chunk."""
    h_BTHWC, cache = self.encoder(frames_BTHWC, cache)
    moments_BTHWC = self.quant(h_BTHWC)[0].astype(jnp.float32)
    mean_BTHWC, log_variance_BTHWC = jnp.split(moments_BTHWC, 2, axis=-1)
    return mean_BTHWC, jnp.clip(log_variance_BTHWC, -30, 20), cache

  def decode_raw(self, raw_BTHWC: jax.Array, cache: Cache = None) -> tuple[jax.Array, Cache]:
    """Frames of latents before normalisation, float32, and the cache for the next chunk."""
    frames_BTHWC, cache = self.decoder(self.post_quant(raw_BTHWC)[0], cache)
    return frames_BTHWC.astype(jnp.float32), cache


def _in_chunks(call: Callable[..., tuple[jax.Array, Cache]], x_BTHWC: jax.Array, size: int) -> jax.Array:
  """The first frame, then chunks of `size` frames under one scan."""
  first, cache = call(x_BTHWC[:, :1], None)
  if x_BTHWC.shape[1] == 1:
    return first
  rest = x_BTHWC[:, 1:]
  chunks = jnp.moveaxis(rest.reshape(rest.shape[0], -1, size, *rest.shape[2:]), 1, 0)

  def step(cache: Cache, chunk: jax.Array) -> tuple[Cache, jax.Array]:
    y, cache = call(chunk, cache)
    return cache, y

  _, parts = jax.lax.scan(step, cache, chunks)
  parts = jnp.moveaxis(parts, 0, 1)
  return jnp.concatenate([first, parts.reshape(parts.shape[0], -1, *parts.shape[3:])], axis=1)


def forward_flops(config: VideoVAEConfig, frames: int, height: int, width: int) -> tuple[float, float]:
  """Matrix-product FLOPs of (encoding, decoding) one video whole: convolutions (2 a tap) and attention."""
  t, h, w, z = config.latent_shape(frames, height, width)
  stages = [(frames, height, width)]
  for halved in config.halve_time:
    T, H, W = stages[-1]
    stages.append((1 + (T - 1) // 2 if halved else T, H // 2, W // 2))
  pixels = [float(T * H * W) for T, H, W in stages]
  widths = [config.base * multiplier for multiplier in config.multipliers]
  residual = lambda i, o: 27 * (i * o + o * o) + (i * o if i != o else 0)
  top = widths[-1]
  middle = t * h * w * (2 * residual(top, top) + 4 * top * top + 2 * h * w * top)

  encode = pixels[0] * 27 * 3 * config.base + middle + t * h * w * (27 * top * 2 * z + 4 * z * z)
  decode = t * h * w * (z * z + 27 * z * top) + middle + pixels[0] * 27 * widths[0] * 3
  before = config.base
  for stage, (count, wide) in enumerate(zip(pixels, widths, strict=True)):
    encode += count * (residual(before, wide) + (config.blocks - 1) * residual(wide, wide))
    entering = wide if stage == len(widths) - 1 else widths[stage + 1] // 2
    decode += count * (residual(entering, wide) + config.blocks * residual(wide, wide))
    before = wide
  for stage, halved in enumerate(config.halve_time):
    (T, _, _), (T_after, H_after, W_after) = stages[stage : stage + 2]
    encode += T * H_after * W_after * 9 * widths[stage] ** 2
    decode += pixels[stage] * 9 * widths[stage + 1] * (widths[stage + 1] // 2)
    if halved:
      encode += (T_after - 1) * H_after * W_after * 3 * widths[stage] ** 2
      decode += (T_after - 1) * H_after * W_after * 3 * widths[stage + 1] * 2 * widths[stage + 1]
  return 2.0 * encode, 2.0 * decode
