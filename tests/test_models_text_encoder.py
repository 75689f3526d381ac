"""The byte text encoder: padding has no say, order and bytes do, and it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kling_jax import errors
from kling_jax.data import tokens
from kling_jax.models import text_encoder
from kling_jax.nn import params

DEPTH = 2


def build():
  return text_encoder.ByteTextEncoder(16, DEPTH, 24, heads=2, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def encode():
  graph, weights = params.split(build())

  def call(texts, length=24, dtype=jnp.float32):
    tokens_BL, mask_BL = tokens.ByteTokenizer(length)(texts)
    return np.asarray(run(weights, tokens_BL, mask_BL, dtype), np.float32), mask_BL

  @functools.partial(jax.jit, static_argnums=3)
  def run(weights, tokens_BL, mask_BL, dtype):
    return params.merge(graph, weights)(tokens_BL, mask_BL, dtype=dtype)

  return call


def test_the_vocabulary_is_the_tokenizers():
  assert text_encoder.BYTES == tokens.VOCABULARY


def test_more_padding_changes_nothing_and_padding_is_zero(encode):
  short_BLD, mask_BL = encode(["a cat", "a very fat cat"], 16)
  long_BLD, _ = encode(["a cat", "a very fat cat"], 24)
  np.testing.assert_allclose(long_BLD[:, :16], short_BLD, atol=1e-5)
  assert not short_BLD[~mask_BL].any() and not long_BLD[:, 16:].any()


def test_masked_tokens_have_no_influence():
  encoder = build()
  tokens_BL, mask_BL = tokens.ByteTokenizer(12)(["a cat"])
  garbage_BL = np.where(mask_BL, tokens_BL, 77)
  np.testing.assert_array_equal(encoder(garbage_BL, mask_BL), encoder(tokens_BL, mask_BL))


def test_it_reads_both_ways_and_minds_the_order(encode):
  one, two, anagram = encode(["a cat", "a car", "a act"])[0]
  assert np.abs(one[0] - two[0]).max() > 1e-3  # the first token knows the last byte
  assert np.abs(one.sum(0) - anagram.sum(0)).max() > 1e-3  # same bytes, other order


def test_rows_have_unit_size_and_bfloat16_agrees(encode):
  text_BLD, mask_BL = encode(["a cat"])
  np.testing.assert_allclose(np.square(text_BLD[mask_BL]).mean(-1), 1, rtol=1e-3)
  assert np.abs(encode(["a cat"], dtype=jnp.bfloat16)[0] - text_BLD).max() < 0.1


def test_stacked_layers_equal_a_loop_over_them():
  encoder = build()
  tokens_BL, mask_BL = tokens.ByteTokenizer(12)(["a cat", ""])
  graph, stacked = nnx.split(encoder.layers)
  x_BLD = encoder.table[...][tokens_BL]
  angles = text_encoder.angles_1d(jnp.arange(12), 8)
  for depth in range(DEPTH):
    layer = nnx.merge(graph, jax.tree.map(lambda leaf, depth=depth: leaf[depth], stacked))
    x_BLD = layer(x_BLD, text_encoder.Mask(keys_BL=jnp.asarray(mask_BL)), angles)
  expected_BLD = np.where(mask_BL[..., None], encoder.norm(x_BLD), 0)
  np.testing.assert_allclose(encoder(tokens_BL, mask_BL), expected_BLD, atol=1e-5)
  kernel = encoder.layers.attention.q.kernel[...]
  assert np.abs(kernel[0] - kernel[1]).max() > 0.1  # each layer drew its own weights


def test_it_learns_to_tell_texts_apart():
  graph, weights = params.split(build())
  tokens_BL, mask_BL = tokens.ByteTokenizer(12)(["red", "der", "blue", "eblu"])
  target_B = jnp.array([1.0, -1.0, 1.0, -1.0])
  optimizer = optax.adam(3e-3)

  def loss(weights):
    text_BLD = params.merge(graph, weights)(tokens_BL, mask_BL)
    return jnp.mean((text_BLD[:, 0, 0] - target_B) ** 2)

  @jax.jit
  def step(weights, state):
    value, gradient = jax.value_and_grad(loss)(weights)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(weights, updates), state, value

  state, values = optimizer.init(weights), []
  for _ in range(40):
    weights, state, value = step(weights, state)
    values.append(float(value))
  assert values[-1] < 0.05 * values[0]


def test_every_weight_has_axes_and_a_gradient():
  _, shapes, axes = params.abstract(build)
  assert axes["table"] == (None, "text")
  assert axes["layers.attention.q.kernel"] == ("layers", "embed", "text_heads")
  assert all(len(axes[name]) == len(shape.shape) for name, shape in shapes.items())
  graph, weights = params.split(build())
  tokens_BL, mask_BL = tokens.ByteTokenizer(12)(["a cat"])
  loss = lambda weights: jnp.sum(params.merge(graph, weights)(tokens_BL, mask_BL)[..., :3] ** 3)
  gradient = jax.jit(jax.grad(loss))(weights)
  # The bias of the keys too: they are normalised behind it, so that it does not merely shift a query's scores.
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_flops_are_within_a_percent_of_what_xla_counts():
  graph, shapes, _ = params.abstract(lambda: text_encoder.ByteTextEncoder(512, 1, 64, rngs=nnx.Rngs(0)))
  inputs = jax.ShapeDtypeStruct((1, 64), jnp.int32), jax.ShapeDtypeStruct((1, 64), bool)
  call = jax.jit(lambda weights, *inputs: params.merge(graph, weights)(*inputs))
  cost = call.lower(shapes, *inputs).compile().cost_analysis()
  assert text_encoder.forward_flops(512, 1, 64) == pytest.approx(cost["flops"], rel=0.01)  # it also counts additions


def test_wrong_shapes_are_said():
  with pytest.raises(errors.ConfigError, match="legal heads: 1, 2, 4, 8"):
    text_encoder.ByteTextEncoder(16, 1, 8, heads=3, rngs=nnx.Rngs(0))
  with pytest.raises(errors.ConfigError, match="depth"):
    text_encoder.ByteTextEncoder(16, 0, 8, rngs=nnx.Rngs(0))
  tokens_BL, mask_BL = tokens.ByteTokenizer(25)(["a cat"])
  with pytest.raises(errors.ConfigError, match="25 tokens for a text encoder of at most 24"):
    build()(tokens_BL, mask_BL)
