"""RAFT-small (Teed and Deng, ECCV 2020): dense optical flow by a recurrent search in all-pairs correlations.

Features of both pictures at an eighth of their size give a correlation of every place with every other, averaged at
four scales. A GRU looks up a 7 x 7 window around where each place is thought to have gone, twelve times, and moves it.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.errors import DataError
from kling_jax.nn import resample
from kling_jax.nn.conv import FrameConv

LEVELS, RADIUS = 4, 3
HIDDEN, CONTEXT = 96, 64
STRIDE = 8  # pixels of a place
LEAST_SIDE = STRIDE * 2**LEVELS  # pixels; the coarsest correlations still have two places a side
ROUNDS = 12


class Conv(nnx.Module):
  """A convolution of (B, H, W, C), its instance norm (mean and deviation of each channel of a picture) and its ReLU."""

  def __init__(
    self,
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    norm: bool = False,
    relu: bool = True,
    rngs: nnx.Rngs,
  ):
    self.norm, self.relu = norm, relu
    self.conv = FrameConv(inputs, outputs, kernel, stride=stride, padding=((kernel // 2,) * 2,) * 2, rngs=rngs)

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    x_BHWC = self.conv(x_BHWC[:, None])[:, 0]
    if self.norm:
      x32 = x_BHWC.astype(jnp.float32)
      centred = x32 - x32.mean((1, 2), keepdims=True)
      inverse = jax.lax.rsqrt(jnp.square(centred).mean((1, 2), keepdims=True) + 1e-5)
      x_BHWC = (centred * inverse).astype(x_BHWC.dtype)
    return jax.nn.relu(x_BHWC) if self.relu else x_BHWC


class Bottleneck(nnx.Module):
  """relu(shortcut(x) + narrow, 3 x 3, wide)."""

  def __init__(self, inputs: int, outputs: int, stride: int, norm: bool, *, rngs: nnx.Rngs):
    narrow = outputs // 4
    self.into = Conv(inputs, narrow, 1, norm=norm, rngs=rngs)
    self.middle = Conv(narrow, narrow, 3, stride=stride, norm=norm, rngs=rngs)
    self.out = Conv(narrow, outputs, 1, norm=norm, rngs=rngs)
    same = stride == 1
    self.shortcut = None if same else Conv(inputs, outputs, 1, stride=stride, norm=norm, relu=False, rngs=rngs)

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    past = x_BHWC if self.shortcut is None else self.shortcut(x_BHWC)
    return jax.nn.relu(past + self.out(self.middle(self.into(x_BHWC))))


class Encoder(nnx.Module):
  """Pictures to features at an eighth of their size."""

  def __init__(self, outputs: int, norm: bool, *, rngs: nnx.Rngs):
    self.stem = Conv(3, 32, 7, stride=2, norm=norm, rngs=rngs)
    sizes = ((32, 32, 1), (32, 64, 2), (64, 96, 2))
    self.blocks = nnx.List(
      [
        Bottleneck(a, b, stride, norm, rngs=rngs)
        for first, last, step in sizes
        for a, b, stride in ((first, last, step), (last, last, 1))
      ]
    )
    self.out = Conv(96, outputs, 1, relu=False, rngs=rngs)

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    x_BHWC = self.stem(x_BHWC)
    for block in self.blocks:
      x_BHWC = block(x_BHWC)
    return self.out(x_BHWC)


class Update(nnx.Module):
  """One round: correlations and flow to motion features, a convolutional GRU, the step of the flow."""

  def __init__(self, *, rngs: nnx.Rngs):
    taps = LEVELS * (2 * RADIUS + 1) ** 2
    self.correlations = Conv(taps, 96, 1, rngs=rngs)
    self.flow_into, self.flow_out = Conv(2, 64, 7, rngs=rngs), Conv(64, 32, 3, rngs=rngs)
    self.motion = Conv(128, 80, 3, rngs=rngs)
    seen = HIDDEN + CONTEXT + 82
    self.gate, self.reset, self.candidate = (Conv(seen, HIDDEN, 3, relu=False, rngs=rngs) for _ in range(3))
    self.head_into, self.head_out = Conv(HIDDEN, 128, 3, rngs=rngs), Conv(128, 2, 3, relu=False, rngs=rngs)

  def __call__(
    self, hidden_BHWC: jax.Array, context_BHWC: jax.Array, looked_BHWC: jax.Array, flow_BHWC: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """(the new hidden state, the step of the flow)."""
    moved = jnp.concatenate([self.correlations(looked_BHWC), self.flow_out(self.flow_into(flow_BHWC))], -1)
    told = jnp.concatenate([context_BHWC, self.motion(moved), flow_BHWC], -1)
    both = jnp.concatenate([hidden_BHWC, told], -1)
    gate, reset = jax.nn.sigmoid(self.gate(both)), jax.nn.sigmoid(self.reset(both))
    candidate = jnp.tanh(self.candidate(jnp.concatenate([reset * hidden_BHWC, told], -1)))
    hidden_BHWC = (1 - gate) * hidden_BHWC + gate * candidate
    return hidden_BHWC, self.head_out(self.head_into(hidden_BHWC))


class Raft(nnx.Module):
  """Pairs of pictures to flow."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.features = Encoder(128, norm=True, rngs=rngs)
    self.context = Encoder(HIDDEN + CONTEXT, norm=False, rngs=rngs)
    self.update = Update(rngs=rngs)

  def __call__(self, first_BHWC: jax.Array, second_BHWC: jax.Array, rounds: int = ROUNDS) -> jax.Array:
    """Where each pixel of the first pictures is found in the second ones.

    Args:
      first_BHWC, second_BHWC: RGB in [-1, 1]; sides are multiples of 8, at least 128.
      rounds: of the search.

    Returns:
      (B, H, W, 2), columns to the right and rows down, in pixels.

    Raises:
      DataError: sides that it cannot take.
    """
    batch, height, width, _ = first_BHWC.shape
    if height % STRIDE or width % STRIDE or min(height, width) < LEAST_SIDE:
      raise DataError(f"RAFT takes sides of multiples of {STRIDE}, at least {LEAST_SIDE}; got {height} x {width}")
    features = self.features(jnp.concatenate([first_BHWC, second_BHWC]))
    pyramid = correlations(features[:batch], features[batch:])
    context = self.context(first_BHWC)
    hidden, told = jnp.tanh(context[..., :HIDDEN]), jax.nn.relu(context[..., HIDDEN:])
    rows, columns = height // STRIDE, width // STRIDE
    start = jnp.stack(jnp.meshgrid(jnp.arange(columns), jnp.arange(rows)), -1).astype(features.dtype)

    def round_(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
      hidden, flow = carry
      hidden, step = self.update(hidden, told, look_up(pyramid, start + flow), flow)
      return (hidden, flow + step), None

    flow = jnp.zeros((batch, rows, columns, 2), features.dtype)
    (_, flow), _ = jax.lax.scan(round_, (hidden, flow), None, length=rounds)
    large = [resample.matrix(size, STRIDE * size, "linear-corners") for size in (rows, columns)]
    return STRIDE * jnp.einsum("ih,jw,bhwc->bijc", *large, flow, precision="highest")


def correlations(first_BHWC: jax.Array, second_BHWC: jax.Array) -> list[jax.Array]:
  """Products of every place of the first features with every place of the second, over sqrt(C), at `LEVELS` scales.

  Returns:
    [(B, N, H, W), (B, N, H // 2, W // 2), ...], N = H W places of the first.
  """
  batch, _, _, channels = first_BHWC.shape
  asked = first_BHWC.reshape(batch, -1, channels)
  level = jnp.einsum("bnc,bhwc->bnhw", asked, second_BHWC) / math.sqrt(channels)
  pyramid = [level]
  for _ in range(LEVELS - 1):
    rows, columns = (size // 2 for size in level.shape[2:])
    halves = level[:, :, : 2 * rows, : 2 * columns].reshape(batch, -1, rows, 2, columns, 2)
    level = halves.mean((3, 5))
    pyramid.append(level)
  return pyramid


def look_up(pyramid: list[jax.Array], place_BHWC: jax.Array) -> jax.Array:
  """The correlations in a window around each place, between grid points by bilinear weights, zero outside.

  A bilinear sample at p weighs grid point g by max(0, 1 - |p - g|) in both directions, so a window is two products
  with small matrices: no gathers, which accelerators like less.

  Args:
    pyramid: see `correlations`.
    place_BHWC: (B, H, W, 2), columns and rows at the finest level.

  Returns:
    (B, H, W, LEVELS * 7 * 7), in the order (level, column, row).
  """
  batch, height, width, _ = place_BHWC.shape
  place_BN2 = place_BHWC.reshape(batch, height * width, 2)
  offsets = jnp.arange(-RADIUS, RADIUS + 1, dtype=place_BHWC.dtype)
  found = []
  for number, level in enumerate(pyramid):
    window = place_BN2[..., None] / 2**number + offsets  # (B, N, 2, 7)
    hat = lambda places, size: jnp.maximum(1 - jnp.abs(places[..., None] - jnp.arange(size, dtype=places.dtype)), 0)
    across, down = hat(window[:, :, 0], level.shape[3]), hat(window[:, :, 1], level.shape[2])
    rows = jnp.einsum("bnyh,bnhw->bnyw", down, level)  # rows first: XLA's CPU is slower the other way
    found.append(jnp.einsum("bnyw,bnxw->bnxy", rows, across).reshape(batch, height, width, -1))
  return jnp.concatenate(found, -1)
