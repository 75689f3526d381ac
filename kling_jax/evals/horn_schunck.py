"""Dense optical flow of Horn and Schunck (1981) in JAX, coarse to fine, many pairs of frames in one program.

Minimises sum (Ix u + Iy v + It)^2 + alpha^2 (|grad u|^2 + |grad v|^2) by the paper's iteration,

  u <- u_mean - Ix (Ix u_mean + Iy v_mean + It) / (alpha^2 + Ix^2 + Iy^2)   and likewise for v,

with the paper's weights for the mean (1/6 next, 1/12 diagonal). Motions of more than about a pixel are found on a
pyramid: the second picture is warped by the flow so far and linearised anew (Meinhardt-Llopis et al., IPOL 2013).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

ALPHA = 15.0  # levels of 255; larger is smoother
ITERATIONS = 40  # of each linearisation
WARPS = 4  # linearisations a level of the pyramid
PAIRS = 8  # a call of the compiled program
LEAST_SIDE = 12  # pixels, of the coarsest level
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def luma(frames_THWC: np.ndarray) -> np.ndarray:
  """Luma of uint8 RGB, float32 (..., H, W) in levels of 255."""
  return frames_THWC.astype(np.float32) @ LUMA


@functools.partial(jax.jit, static_argnames=("iterations", "warps"))
def flow(
  first_BHW: jax.Array, second_BHW: jax.Array, alpha: float = ALPHA, iterations: int = ITERATIONS, warps: int = WARPS
) -> jax.Array:
  """Where each pixel of the first pictures is found in the second ones.

  Args:
    first_BHW, second_BHW: float32 luma in levels of 255.

  Returns:
    float32 (B, H, W, 2): columns to the right and rows down, in pixels.
  """
  pyramid = [(first_BHW, second_BHW)]
  while min(pyramid[-1][0].shape[1:]) >= 2 * LEAST_SIDE:
    first, second = pyramid[-1]
    pyramid.append((_half(first), _half(second)))
  flow_BHWC = jnp.zeros((*pyramid[-1][0].shape, 2), jnp.float32)
  for first, second in reversed(pyramid):
    if flow_BHWC.shape[:3] != first.shape:
      scale = jnp.array([first.shape[2] / flow_BHWC.shape[2], first.shape[1] / flow_BHWC.shape[1]], jnp.float32)
      flow_BHWC = jax.image.resize(flow_BHWC, (*first.shape, 2), "linear") * scale
    step = functools.partial(_linearised, first, second, alpha, iterations)
    flow_BHWC = jax.lax.fori_loop(0, warps, lambda _, flow, step=step: step(flow), flow_BHWC)
  return flow_BHWC


def flows(frames_THWC: np.ndarray) -> np.ndarray:
  """The flow from each frame of uint8 RGB to the next, float32 (T - 1, H, W, 2) in pixels."""
  grey = luma(frames_THWC)
  return between(grey[:-1], grey[1:])


def between(first_NHW: np.ndarray, second_NHW: np.ndarray) -> np.ndarray:
  """`flow` of any number of pairs, `PAIRS` at a time: memory is bounded, and one program a frame size serves all."""
  found = []
  for start in range(0, len(first_NHW), PAIRS):
    first, second = first_NHW[start : start + PAIRS], second_NHW[start : start + PAIRS]
    rest = [(0, PAIRS - len(first)), (0, 0), (0, 0)]
    found.append(np.asarray(flow(np.pad(first, rest), np.pad(second, rest)))[: len(first)])
  return np.concatenate(found)


def _linearised(first: jax.Array, second: jax.Array, alpha: float, iterations: int, flow_BHWC: jax.Array) -> jax.Array:
  """Horn and Schunck's iteration around a flow."""
  warped = warp(second, flow_BHWC)
  mean = (first + warped) / 2
  inside = _inside(flow_BHWC)
  iy, ix = (slope * inside for slope in jnp.gradient(mean, axis=(1, 2)))
  it = (warped - first) * inside - ix * flow_BHWC[..., 0] - iy * flow_BHWC[..., 1]
  weight = 1 / (alpha**2 + ix * ix + iy * iy)

  def body(_, flow):
    u, v = _mean(flow[..., 0]), _mean(flow[..., 1])
    residual = (ix * u + iy * v + it) * weight
    return jnp.stack([u - ix * residual, v - iy * residual], -1)

  return jax.lax.fori_loop(0, iterations, body, flow_BHWC)


def _inside(flow_BHWC: jax.Array) -> jax.Array:
  """1 where the flow leads to a place within the frame, 0 elsewhere: there only smoothness counts."""
  height, width = flow_BHWC.shape[1:3]
  y, x = jnp.mgrid[0:height, 0:width].astype(jnp.float32)
  x, y = x + flow_BHWC[..., 0], y + flow_BHWC[..., 1]
  return ((x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)).astype(jnp.float32)


def _mean(x_BHW: jax.Array) -> jax.Array:
  """The mean of the eight neighbours with Horn and Schunck's weights, edges repeated."""
  p = jnp.pad(x_BHW, ((0, 0), (1, 1), (1, 1)), mode="edge")
  sides = p[:, :-2, 1:-1] + p[:, 2:, 1:-1] + p[:, 1:-1, :-2] + p[:, 1:-1, 2:]
  corners = p[:, :-2, :-2] + p[:, :-2, 2:] + p[:, 2:, :-2] + p[:, 2:, 2:]
  return sides / 6 + corners / 12


def _half(x_BHW: jax.Array) -> jax.Array:
  batch, height, width = x_BHW.shape
  return jax.image.resize(x_BHW, (batch, (height + 1) // 2, (width + 1) // 2), "linear")


def warp(pictures_BHW: jax.Array, flow_BHWC: jax.Array) -> jax.Array:
  """Pictures read at x + flow, bilinear, edges repeated."""

  def one(picture, flow):
    y, x = jnp.mgrid[0 : picture.shape[0], 0 : picture.shape[1]].astype(jnp.float32)
    return jax.scipy.ndimage.map_coordinates(picture, [y + flow[..., 1], x + flow[..., 0]], order=1, mode="nearest")

  return jax.vmap(one)(pictures_BHW, flow_BHWC)
