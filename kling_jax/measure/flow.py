"""Dense optical flow in JAX: pyramidal Lucas-Kanade, many pairs of frames at once, one compiled program a frame size.

At each level of a pyramid and each of a few rounds the second picture is warped by the flow so far, and the rest is
solved for by least squares in a window around every pixel (Lucas and Kanade, 1981; Bouguet's pyramid, 2001):

  (sum w [Ix^2  Ix Iy; Ix Iy  Iy^2] + epsilon) d = -sum w [Ix It; Iy It]

The flow is then averaged with the windows' texture as weight, so that flat parts take it from their surroundings.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kling_jax.measure import camera, motion
from kling_jax.measure.sample import Sample

NAME, VERSION = "lucas-kanade", "1"
CAMERA_NAME = "lucas-kanade+similarity"
CONDITIONS = ("flow_motion",)
LEVELS, ROUNDS = 4, 4
SIGMA = 2.5  # pixels: Gaussian window of the least squares
EPSILON = 1.0  # squared levels a pixel; keeps flat windows still
MOST_STEP = 2.0  # pixels a round


@jax.jit
def flow(first_BHW: jax.Array, second_BHW: jax.Array) -> jax.Array:
  """Where each pixel of the first pictures is found in the second ones.

  Args:
    first_BHW, second_BHW: float32 luma in levels of 255, contrast evened out (`motion.prepare`); sides of at least 16.

  Returns:
    float32 (B, H, W, 2): columns to the right and rows down, in pixels. Displacements of up to about an eighth of the
    shorter side are found.
  """
  pyramid = [(first_BHW, second_BHW)]
  while len(pyramid) < LEVELS and min(pyramid[-1][0].shape[1:]) >= 24:
    first, second = pyramid[-1]
    pyramid.append((_half(_blur(first, 1.0)), _half(_blur(second, 1.0))))
  flow_BHWC = jnp.zeros((*pyramid[-1][0].shape, 2), jnp.float32)
  for first, second in reversed(pyramid):
    if flow_BHWC.shape[:3] != first.shape:
      scale = jnp.array([first.shape[2] / flow_BHWC.shape[2], first.shape[1] / flow_BHWC.shape[1]], jnp.float32)
      flow_BHWC = jax.image.resize(flow_BHWC, (*first.shape, 2), "linear") * scale
    flow_BHWC = jax.lax.fori_loop(0, ROUNDS, functools.partial(_round, first, second), flow_BHWC)
  return flow_BHWC


def _round(first_BHW: jax.Array, second_BHW: jax.Array, _: int, flow_BHWC: jax.Array) -> jax.Array:
  """One least-squares step and the averaging."""
  warped_BHW = jax.vmap(_warp)(second_BHW, flow_BHWC)
  mean = (first_BHW + warped_BHW) / 2  # gradients of the mean are those of both: errors of second order cancel
  dx, dy = _difference(mean, 2), _difference(mean, 1)
  dt = warped_BHW - first_BHW
  products = jnp.stack([dx * dx, dx * dy, dy * dy, dx * dt, dy * dt])
  xx, xy, yy, xt, yt = _blur(products, SIGMA)
  xx, yy = xx + EPSILON, yy + EPSILON
  determinant = xx * yy - xy * xy
  step = jnp.stack([xy * yt - yy * xt, xy * xt - xx * yt], -1) / determinant[..., None]
  flow_BHWC = flow_BHWC + jnp.clip(step, -MOST_STEP, MOST_STEP)
  # The smaller eigenvalue tells how well both components are known.
  trust = (xx + yy) / 2 - jnp.sqrt(jnp.square(xx - yy) / 4 + xy * xy)
  weighted = _blur(jnp.concatenate([flow_BHWC * trust[..., None], trust[..., None]], -1).transpose(3, 0, 1, 2), 1.5)
  return jnp.stack([weighted[0], weighted[1]], -1) / weighted[2][..., None]


def _blur(x: jax.Array, sigma: float) -> jax.Array:
  """Gaussian over the last two dimensions, edges repeated: products with banded matrices, as accelerators like it."""
  rows, columns = (_gaussian(size, sigma) for size in x.shape[-2:])
  return jnp.einsum("hi,...iw,jw->...hj", rows, x, columns, precision="highest")


def _gaussian(size: int, sigma: float) -> np.ndarray:
  """(size, size) matrix of a Gaussian blur with repeated edges, cut at 2.5 deviations."""
  reach = int(np.ceil(2.5 * sigma))
  window = np.exp(-np.square(np.arange(-reach, reach + 1)) / (2 * sigma**2))
  matrix = np.zeros((size, size), np.float32)
  for shift, weight in zip(range(-reach, reach + 1), window / window.sum(), strict=True):
    np.add.at(matrix, (np.arange(size), np.clip(np.arange(size) + shift, 0, size - 1)), weight)
  return matrix


def _difference(x: jax.Array, axis: int) -> jax.Array:
  """Central differences, edges repeated."""
  pad = [(0, 0)] * x.ndim
  pad[axis] = (1, 1)
  padded, size = jnp.pad(x, pad, mode="edge"), x.shape[axis]
  return (jax.lax.slice_in_dim(padded, 2, 2 + size, axis=axis) - jax.lax.slice_in_dim(padded, 0, size, axis=axis)) / 2


def _half(x_BHW: jax.Array) -> jax.Array:
  batch, height, width = x_BHW.shape
  return jax.image.resize(x_BHW, (batch, (height + 1) // 2, (width + 1) // 2), "linear", antialias=False)


def _warp(picture_HW: jax.Array, flow_HWC: jax.Array) -> jax.Array:
  height, width = picture_HW.shape
  y, x = jnp.mgrid[0:height, 0:width].astype(jnp.float32)
  places = [y + flow_HWC[..., 1], x + flow_HWC[..., 0]]
  return jax.scipy.ndimage.map_coordinates(picture_HW, places, order=1, mode="nearest")


def flows(sample: Sample) -> dict[tuple[int, int], motion.Flow]:
  """`Sample.flows` by this flow: all pairs of the clip in one call, padded to 24 so that clips share the program."""
  steps = list(sample.steps)
  if not steps:
    return {}
  small = {i: motion.prepare(sample.frames_THWC[i]) for step in steps for i in step}
  count = max(24, len(steps))
  first, second = (
    np.stack([small[step[end]].grey_HW for step in steps + steps[:1] * (count - len(steps))]).astype(np.float32)
    for end in (0, 1)
  )
  found = np.asarray(flow(first, second))
  gaps = [float(sample.times_s[j] - sample.times_s[i]) for i, j in steps]
  return {
    step: motion.Flow(found[k], small[step[0]].trust_HW, gap)
    for k, (step, gap) in enumerate(zip(steps, gaps, strict=True))
  }


def flow_motion(sample: Sample) -> dict[str, float]:
  """flow_motion: mean speed in frame diagonals per second, as `motion`, by this flow."""
  found = flows(sample)
  speed = motion.mean_speed([found[pair] for pair in sample.pairs])
  return {} if speed is None else {"flow_motion": speed}


def camera_motion(sample: Sample) -> dict[str, float]:
  """The camera's scores (`measure.camera`) by this flow."""
  return camera.of_flows(sample, flows(sample))
