"""Convolutions: the tap form is XLA's 3-D convolution; chunks with a cache are the whole; the future has no say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kling_jax.nn import conv, params


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
  ("kernel", "stride", "padding"),
  [
    ((3, 3, 3), (1, 1, 1), conv.same(3)),
    ((3, 1, 1), (2, 1, 1), conv.same(1)),
    ((2, 3, 3), (2, 2, 2), ((0, 1), (0, 1))),
    ((1, 1, 1), (1, 1, 1), conv.same(1)),
    ((1, 1, 1), (2, 2, 2), conv.same(1)),
  ],
)
def test_taps_equal_the_native_convolution_forward_and_backward(kernel, stride, padding):
  x, w = normal(0, 2, 5, 6, 4, 3), normal(1, *kernel, 3, 5)
  outputs, gradients = [], []
  for function in (conv.conv_taps, conv.conv_plain):
    apply = lambda x, w, function=function: function(x, w, stride, padding)
    outputs.append(apply(x, w))
    weight = normal(2, *outputs[0].shape)  # a plain sum would not see permuted outputs
    gradients.append(jax.grad(lambda x, w, apply=apply, weight=weight: jnp.sum(weight * apply(x, w)), (0, 1))(x, w))
  np.testing.assert_allclose(*outputs, atol=2e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *gradients)


@pytest.mark.parametrize(("chunks", "taps"), [([1, 1, 1, 1], 3), ([1, 4], 3), ([3, 1], 2), ([2, 2], 1)])
def test_chunks_with_a_cache_equal_the_whole(chunks, taps):
  layer = conv.CausalConv3d(2, 3, (taps, 3, 3), rngs=nnx.Rngs(0))
  x = normal(1, 1, sum(chunks), 4, 4, 2)
  whole, _ = layer(x)
  cache, parts, start = None, [], 0
  for length in chunks:
    part, cache = layer(x[:, start : start + length], cache)
    parts.append(part)
    start += length
    assert cache.shape == (1, taps - 1, 4, 4, 2)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


def test_no_output_sees_the_future():
  layer = conv.CausalConv3d(2, 2, rngs=nnx.Rngs(0))
  x = normal(1, 1, 4, 3, 3, 2)
  reach = jax.jacobian(lambda x: layer(x)[0].sum((0, 2, 3, 4)))(x)  # (T out, B, T in, ...)
  seen = np.abs(reach).sum((1, 3, 4, 5)) > 0
  np.testing.assert_array_equal(seen, np.tril(np.ones((4, 4), bool)) & ~np.tril(np.ones((4, 4), bool), -3))


def test_frames_are_convolved_on_their_own():
  layer = conv.FrameConv(2, 3, stride=2, padding=((0, 1), (0, 1)), rngs=nnx.Rngs(0))
  x = normal(1, 2, 3, 6, 4, 2)
  assert layer(x).shape == (2, 3, 3, 2, 3)
  np.testing.assert_allclose(layer(x)[1, 2], layer(x[1:, 2:])[0, 0], atol=1e-6)
  expected = conv.conv_plain(x, layer.kernel[...][None], (1, 2, 2), ((0, 1), (0, 1)))
  np.testing.assert_allclose(layer(x), expected, atol=1e-5)


def test_compute_follows_the_input_and_weights_carry_axes():
  layer = conv.CausalConv3d(2, 4, rngs=nnx.Rngs(0))
  y, cache = layer(jnp.ones((1, 2, 3, 3, 2), jnp.bfloat16))
  assert y.dtype == cache.dtype == jnp.bfloat16 and layer.kernel.dtype == jnp.float32
  _, shapes, axes = params.abstract(lambda: conv.CausalConv3d(2, 3, rngs=nnx.Rngs(0)))
  assert shapes["kernel"].shape == (3, 3, 3, 2, 3)
  assert axes == {"kernel": (None, None, None, "conv_in", None), "bias": (None,)}
