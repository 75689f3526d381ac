"""Latents: the interface of every video codec, and one that needs no weights (a truncated 3-D Haar wavelet)."""

import dataclasses
import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np

from kling_jax.errors import ConfigError, nearest


@typing.runtime_checkable
class Codec(typing.Protocol):
  """Frames to latents and back; what models, caches and samplers know of an encoder.

  Time is causal: the first frame stands alone, each further latent frame covers `temporal` frames, so that T = 1 +
  temporal k frames become 1 + k latent frames and a single image becomes one.

  Attributes:
    temporal, spatial: frames and pixels (each way) of one latent cell.
    channels: of the latents.
  """

  @property
  def temporal(self) -> int: ...
  @property
  def spatial(self) -> int: ...
  @property
  def channels(self) -> int: ...

  def encode(self, frames_BTHWC: jax.Array) -> jax.Array:
    """Maps RGB frames (B, 1 + temporal k, H, W, 3), float in [-1, 1], to latents (B, 1 + k, h, w, channels), float32.

    Each latent channel has about zero mean and unit variance over natural footage.
    """
    ...

  def decode(self, latents_BTHWC: jax.Array) -> jax.Array:
    """Maps latents to RGB frames, float32; values may leave [-1, 1] and are clipped by whoever writes pixels."""
    ...

  def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns (t, h, w, channels) for a video of that size; raises ConfigError where it does not divide."""
    ...


def make(name: str, **options: typing.Any) -> Codec:
  """Makes a codec that needs no weights by its name in a config: "haar", with the fields of `HaarCodec` as options.

  A trained autoencoder is not made from a name alone; models/video_vae.py builds it around its weights.

  Raises:
    ConfigError: unknown name or option, or sizes that the codec does not have.
  """
  if name != "haar":
    raise ConfigError(
      f"no codec {name!r} can be made without weights{nearest(name, ['haar'])} (a trained VAE: models/video_vae.py)"
    )
  fields = [field.name for field in dataclasses.fields(HaarCodec)]
  for option in options:
    if option not in fields:
      raise ConfigError(f"codec 'haar' has no option {option!r}{nearest(option, fields)}")
  return HaarCodec(**options)


@dataclasses.dataclass(frozen=True)
class HaarCodec:
  """An orthonormal 3-D Haar wavelet over blocks of temporal x spatial x spatial pixels, the strongest part kept.

  One matrix W with orthonormal rows, (channels, 3 temporal spatial^2), maps a block to its latent, and the transpose
  maps back: z = (W block) / scale, block = W^T (scale z). With all channels kept decode(encode(x)) = x; with fewer it
  is the orthogonal projection on what is kept.

  * W is a Kronecker product of four orthonormal matrices: colour (the 3-point cosine transform of RGB: luma, red minus
    blue, magenta minus green, which on natural footage are nearly its principal axes), time, rows, columns
    (full Haar trees: 1 mean, then 1, 2, 4 ... details of halving support).
  * Channels are ordered by falling expected energy `_RMS`; equal ones stay together, in the order of the product.
  * scale^2 is the expected root mean square of the coefficient times its mean over the kept ones: latents have about
    unit variance as a whole, and half of the spectrum's slope is left (the mean of a block about 2.5, the finest kept
    detail below 1). Diffusion then settles coarse content at high noise and details at low noise, as in pixels; with
    every channel at unit variance all of them emerge at once, and small models learn neither (docs/decisions.md).
  * The first frame is repeated `temporal` times to make its block, so that every channel means the same in every latent
    frame (temporal details are 0 there), and decoded as the mean over its block.

  Attributes:
    temporal: 1, 2 or 4 frames.
    spatial: 2, 4 or 8 pixels.
    channels: 1 to 3 temporal spatial^2.

  The defaults are the recommendation for small demos (docs/guide/diffusion.md holds the measured table).
  """

  temporal: int = 4
  spatial: int = 4
  channels: int = 16

  def __post_init__(self) -> None:
    for name, legal in (("temporal", (1, 2, 4)), ("spatial", (2, 4, 8))):
      if getattr(self, name) not in legal:
        raise ConfigError(f"codec 'haar': {name} must be one of {legal}, not {getattr(self, name)}")
    full = 3 * self.temporal * self.spatial**2
    if not 1 <= self.channels <= full:
      raise ConfigError(
        f"codec 'haar' with temporal {self.temporal}, spatial {self.spatial}: channels must lie in 1..{full}, "
        f"not {self.channels}"
      )

  @property
  def name(self) -> str:
    """Names the sizes; with a hash of `analysis` it identifies the latents in a cache."""
    return f"haar-t{self.temporal}s{self.spatial}c{self.channels}"

  @property
  def analysis(self) -> np.ndarray:
    """The matrix of `encode`, diag(1 / scale) W: float32 (channels, 3 temporal spatial^2), pixels in order CTHW."""
    basis, scale = self._kept()
    return (basis / scale[:, None]).astype(np.float32)

  @property
  def synthesis(self) -> np.ndarray:
    """The matrix of `decode`, W^T diag(scale): float32 (3 temporal spatial^2, channels)."""
    basis, scale = self._kept()
    return (basis * scale[:, None]).T.astype(np.float32)

  def _kept(self) -> tuple[np.ndarray, np.ndarray]:
    """The kept basis vectors as rows, and what each coefficient is divided by."""
    basis, rms = (array[: self.channels] for array in _basis(self.temporal, self.spatial))
    return basis, np.sqrt(rms * rms.mean())

  def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """See `Codec.latent_shape`."""
    k = (frames - 1) // self.temporal
    if frames != 1 + self.temporal * k or k < 0:
      nearest_sizes = f"{1 + self.temporal * max(k, 0)} or {1 + self.temporal * (max(k, 0) + 1)}"
      raise ConfigError(f"codec {self.name} takes 1 + {self.temporal} k frames, not {frames}; nearest: {nearest_sizes}")
    for axis, size in (("height", height), ("width", width)):
      if size < self.spatial or size % self.spatial:
        raise ConfigError(f"codec {self.name} takes a {axis} that is a multiple of {self.spatial} pixels, not {size}")
    return 1 + k, height // self.spatial, width // self.spatial, self.channels

  def encode(self, frames_BTHWC: jax.Array) -> jax.Array:
    """See `Codec.encode`. Raises TypeError for integer frames: scale them to [-1, 1] first."""
    if not jnp.issubdtype(frames_BTHWC.dtype, jnp.floating):
      raise TypeError(f"encode takes float frames in [-1, 1], not {frames_BTHWC.dtype}")
    batch, frames, height, width, _ = frames_BTHWC.shape
    t, h, w, _ = self.latent_shape(frames, height, width)
    repeated = jnp.repeat(frames_BTHWC[:, :1], self.temporal - 1, axis=1)
    x = jnp.concatenate([repeated, frames_BTHWC], axis=1).astype(jnp.float32)
    x = x.reshape(batch, t, self.temporal, h, self.spatial, w, self.spatial, 3)
    blocks = x.transpose(0, 1, 3, 5, 7, 2, 4, 6).reshape(batch, t, h, w, -1)
    return jnp.matmul(blocks, self.analysis.T, precision=jax.lax.Precision.HIGHEST)

  def decode(self, latents_BTHWC: jax.Array) -> jax.Array:
    """See `Codec.decode`."""
    batch, t, h, w, channels = latents_BTHWC.shape
    if channels != self.channels:
      raise ValueError(f"codec {self.name} decodes {self.channels} channels, not {channels}")
    latents_BTHWC = latents_BTHWC.astype(jnp.float32)
    blocks = jnp.matmul(latents_BTHWC, self.synthesis.T, precision=jax.lax.Precision.HIGHEST)
    x = blocks.reshape(batch, t, h, w, 3, self.temporal, self.spatial, self.spatial).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(batch, t, self.temporal, h * self.spatial, w * self.spatial, 3)
    later = x[:, 1:].reshape(batch, (t - 1) * self.temporal, *x.shape[3:])
    return jnp.concatenate([x[:, 0].mean(1, keepdims=True), later], axis=1)


def haar(size: int) -> np.ndarray:
  """The orthonormal Haar tree (size, size): the mean, then details of support size, size / 2 (twice), ... 2."""
  if size == 1:
    return np.ones((1, 1))
  means = np.kron(haar(size // 2), [1.0, 1.0])
  details = np.kron(np.eye(size // 2), [1.0, -1.0])
  return np.concatenate([means, details]) / np.sqrt(2)


def colour() -> np.ndarray:
  """The 3-point orthonormal cosine transform of RGB."""
  return np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


def levels(size: int) -> np.ndarray:
  """For each row of `haar(size)` its level: 0 the mean, 1 the detail of full support, ... log2(size) of support 2."""
  return np.array([0] + [level for level in range(1, size.bit_length()) for _ in range(2 ** (level - 1))])


def _energy(temporal: int, spatial: int) -> np.ndarray:
  """Expected squares (3, levels of time, of rows, of columns) for a block size, out of those of the largest block.

  Two neighbouring means m1, m2 of the smaller block are one mean (m1 + m2) / sqrt(2) and one detail
  (m1 - m2) / sqrt(2) of the larger, so the mean square of the smaller block's means is exactly the mean of these two.
  """
  energy = np.square(np.array(_RMS)).reshape(3, 3, 4, 4)
  for axis, size in ((1, temporal), (2, spatial), (3, spatial)):
    while energy.shape[axis] > size.bit_length():
      means, full_support, finer = np.split(energy, [1, 2], axis)
      energy = np.concatenate([(means + full_support) / 2, finer], axis)
  return energy


@functools.cache
def _basis(temporal: int, spatial: int) -> tuple[np.ndarray, np.ndarray]:
  """All basis vectors of a block as rows (n, n), by falling expected energy, and their expected rms (n,); float64."""
  time, space = haar(temporal), haar(spatial)
  rows = functools.reduce(np.kron, (colour(), time, space, space))
  energy = _energy(temporal, spatial)[np.ix_(np.arange(3), levels(temporal), levels(spatial), levels(spatial))]
  rms = np.sqrt(energy).reshape(-1)
  order = np.argsort(-rms, kind="stable")
  return rows[order], rms[order]


# Root mean square of the coefficients of 4 x 8 x 8 blocks of frames in [-1, 1], by colour (3), level of time (3), of
# rows (4) and of columns (4): mean, details of support 8, 4, 2. Measured on 45 videos of real footage (films, phones,
# drones, animation), two clips each, at 64 and 128 pixels and 8 and 16 frames a second. This command prints it:
# python benchmarks/codec_psnr.py --videos DIR --fit
# fmt: off
_RMS = (
  # luma, mean over time
  12.2, 2.374, 1.222, 0.6003, 2.406, 1.096, 0.6272, 0.3378,
  1.247, 0.6396, 0.4083, 0.2376, 0.6233, 0.3523, 0.2459, 0.1558,
  # luma, detail of 4 frames
  1.223, 0.5923, 0.3422, 0.1794, 0.4734, 0.3312, 0.2227, 0.1313,
  0.2686, 0.2043, 0.1487, 0.09497, 0.145, 0.1172, 0.09088, 0.06242,
  # luma, details of 2 frames
  0.7377, 0.3711, 0.2339, 0.1308, 0.2917, 0.2217, 0.1587, 0.09942,
  0.175, 0.1401, 0.1094, 0.07336, 0.09871, 0.08312, 0.068, 0.04918,
  # red minus blue, mean over time
  3.758, 0.558, 0.2738, 0.1239, 0.5884, 0.2575, 0.1419, 0.07385,
  0.275, 0.1412, 0.08907, 0.0492, 0.1238, 0.07336, 0.04993, 0.02993,
  # red minus blue, detail of 4 frames
  0.2352, 0.1163, 0.06437, 0.03131, 0.09908, 0.06597, 0.04313, 0.023,
  0.05476, 0.0396, 0.02755, 0.01593, 0.02711, 0.02095, 0.01527, 0.009492,
  # red minus blue, details of 2 frames
  0.1326, 0.07054, 0.04045, 0.02042, 0.06046, 0.04246, 0.02843, 0.01553,
  0.03438, 0.0261, 0.01877, 0.01126, 0.01738, 0.01403, 0.01074, 0.007005,
  # magenta minus green, mean over time
  1.591, 0.2865, 0.1378, 0.06076, 0.3064, 0.1586, 0.08813, 0.04516,
  0.1532, 0.09117, 0.05922, 0.03181, 0.06644, 0.04593, 0.0316, 0.01985,
  # magenta minus green, detail of 4 frames
  0.0845, 0.04828, 0.0287, 0.01479, 0.04511, 0.03272, 0.02189, 0.01208,
  0.02802, 0.02187, 0.01528, 0.009279, 0.01525, 0.0123, 0.009412, 0.006034,
  # magenta minus green, details of 2 frames
  0.04478, 0.02718, 0.01736, 0.009698, 0.02581, 0.01981, 0.01347, 0.007971,
  0.01636, 0.01317, 0.009974, 0.006274, 0.00927, 0.007782, 0.006254, 0.004379,
)
# fmt: on
