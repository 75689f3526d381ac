"""The language model: causality by gradient, cache = no cache, padding, pairs, rotary positions, frames, LoRA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kling_jax.errors import ConfigError
from kling_jax.models import language_model
from kling_jax.models.language_model import LanguageModel, Llama3Rope, Shape
from kling_jax.nn import params
from kling_jax.nn.attention import Mask, attention
from kling_jax.nn.lora import init_lora, merge_lora

# Every variant at once: sections, QK norm with weights of each head, biases, frames both ways.
SHAPE = Shape(
  24, 3, 4, 2, 12, 40, 30, tied=True, qk_norm="head_layer", attention_bias=True, mlp_bias=True,
  rope_sections=(2, 2, 2), frame_codes=10, first_code=20, patch_width=7,
)  # fmt: skip
BATCH, LENGTH = 2, 9


@functools.cache
def built(shape: Shape = SHAPE):
  """Graph and parameters, every one of them random: at the start biases would be zero and scales one."""
  graph, shapes, _ = params.abstract(lambda: LanguageModel(shape, rngs=nnx.Rngs(params=jax.random.key(0))))
  random = np.random.default_rng(0)
  draw = lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32)
  return graph, {name: draw(leaf) + name.endswith("scale") for name, leaf in shapes.items()}


@functools.partial(jax.jit, static_argnames=("shape", "scan"))
def forward(weights, x_BLD, shape, scan, **inputs):
  return params.merge(built(shape)[0], weights)(x_BLD, scan=scan, **inputs)


def run(x_BLD, shape=SHAPE, scan=True, **inputs):
  return forward(built(shape)[1], x_BLD, shape, scan, **inputs)


def embeddings(length=LENGTH, seed=1):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(BATCH, length, SHAPE.width)), jnp.float32)


def test_a_token_sees_itself_and_what_is_before_it():
  x_BLD = embeddings()
  weight_BLD = embeddings(seed=2)
  gradient = jax.jit(jax.grad(lambda x, place: (run(x)[0] * weight_BLD)[:, place].sum()))
  for place in (0, 4, LENGTH - 1):
    seen_L = np.abs(gradient(x_BLD, place)).sum((0, 2)) > 0
    assert seen_L.tolist() == [n <= place for n in range(LENGTH)]


def test_a_cache_changes_nothing():
  """In pieces of different lengths, with padding, three positions a token, and vectors added after two layers."""
  x_BLD = embeddings()
  real_BL = jnp.arange(LENGTH) != jnp.array([[3], [5]])
  positions = jnp.asarray(np.random.default_rng(3).integers(0, 50, (3, BATCH, LENGTH)))
  added_SBLD = jnp.stack([embeddings(seed=4), embeddings(seed=5)])
  whole_BLD, none = run(x_BLD, positions=positions, real_BL=real_BL, added_SBLD=added_SBLD)
  assert none is None
  cache = params.merge(*built()).init_cache(BATCH, LENGTH + 2)

  def piece(start, end, cache):
    given = {"positions": positions[..., start:end], "real_BL": real_BL[:, start:end]}
    return run(x_BLD[:, start:end], **given, added_SBLD=added_SBLD[:, :, start:end], cache=cache)

  pieces = []
  for start, end in ((0, 4), (4, 5), (5, 9)):
    hidden_BLD, cache = piece(start, end, cache)
    pieces.append(hidden_BLD)
  assert int(cache.length) == LENGTH and cache.room == LENGTH + 2
  np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole_BLD, atol=1e-5)
  assert np.isnan(piece(0, 4, cache)[0]).all(), "four more do not fit"


def test_padding_and_neighbours_in_the_batch_change_nothing():
  """Padding at the left moves all positions, and only differences of positions count."""
  x_BLD = embeddings()
  alone_BLD, _ = run(x_BLD[:1, :5])
  junk_BLD = 1e3 * embeddings(seed=7)
  right_BLD = jnp.concatenate([x_BLD[:1, :5], junk_BLD[:1, 4:8]], 1)
  left_BLD = jnp.concatenate([junk_BLD[1:, 4:8], x_BLD[:1, :5]], 1)
  hidden_BLD, _ = run(
    jnp.concatenate([right_BLD, left_BLD]), real_BL=jnp.stack([jnp.arange(9) < 5, jnp.arange(9) >= 4])
  )
  np.testing.assert_allclose(hidden_BLD[0, :5], alone_BLD[0], atol=1e-5)
  np.testing.assert_allclose(hidden_BLD[1, 4:], alone_BLD[0], atol=1e-5)


def test_pairs_stand_in_for_the_causal_rule():
  x_BLD = embeddings()
  q_BNKE = x_BLD.reshape(BATCH, LENGTH, 2, -1)
  with pytest.raises(ConfigError, match="a mask of pairs; only the reference takes one"):
    attention(q_BNKE, q_BNKE, q_BNKE, mask=Mask(pairs_BNL=jnp.ones((1, LENGTH, LENGTH), bool)), road="blockwise")
  causal_NL = np.tril(np.ones((LENGTH, LENGTH), bool))
  np.testing.assert_allclose(run(x_BLD, pairs_BNL=jnp.asarray(causal_NL[None]))[0], run(x_BLD)[0], atol=1e-5)
  pairs_BNL = windowed()
  gradient = jax.jit(jax.grad(lambda x, place: (run(x, pairs_BNL=pairs_BNL)[0][:, place] ** 3).sum()))
  seen = lambda place: (np.abs(gradient(x_BLD, place)).sum((0, 2)) > 0).tolist()
  assert seen(3) == [True] * 6 + [False] * 3
  assert seen(7) == [True] * 8 + [False]
  assert seen(8) == [True] * 9, "through layers, the last token still hears of the first two"


def windowed():
  """Causal, but that three queries see one another, and that the last token has lost sight of the first two."""
  pairs_NL = np.tril(np.ones((LENGTH, LENGTH), bool))
  pairs_NL[3:6, 3:6] = True
  pairs_NL[8, :2] = False
  return jnp.asarray(np.repeat(pairs_NL[None], BATCH, 0))


@pytest.mark.drill
def test_pairs_in_a_cache_with_free_places_piece_by_piece():
  x_BLD, pairs_BNL = embeddings(), windowed()
  cache = params.merge(*built()).init_cache(BATCH, LENGTH + 2)
  room_BNL = jnp.pad(pairs_BNL, ((0, 0), (0, 0), (0, 2)), constant_values=True)
  first_BLD, cache = run(x_BLD[:, :6], pairs_BNL=room_BNL[:, :6], cache=cache)
  second_BLD, _ = run(x_BLD[:, 6:], pairs_BNL=room_BNL[:, 6:], cache=cache)
  whole_BLD, _ = run(x_BLD, pairs_BNL=pairs_BNL)
  np.testing.assert_allclose(jnp.concatenate([first_BLD, second_BLD], 1), whole_BLD, atol=1e-5)


@pytest.mark.drill
def test_layers_unrolled_or_recomputed_are_the_same_layers():
  x_BLD = embeddings()
  cache = params.merge(*built()).init_cache(BATCH, LENGTH)
  (a_BLD, scanned), (b_BLD, unrolled) = run(x_BLD, cache=cache), run(x_BLD, cache=cache, scan=False)
  np.testing.assert_allclose(a_BLD, b_BLD, atol=1e-5)
  np.testing.assert_allclose(scanned.kv.k_SBLKE, unrolled.kv.k_SBLKE, atol=1e-5)
  recomputed = dataclasses.replace(SHAPE, remat="full")
  slope = lambda shape: jax.jit(jax.grad(lambda x: (run(x, shape=shape)[0] ** 2).sum()))(x_BLD)
  np.testing.assert_allclose(slope(recomputed), slope(SHAPE), atol=1e-4)


def test_rotary_angles_of_rows_columns_and_stretched_positions():
  """Against the formulas spelt out number by number, in float64."""
  size, base, sections = 16, 5e6, (3, 3, 2)
  shape = Shape(8, 1, 1, 1, size, 8, 8, rope_base=base, rope_sections=sections)
  positions = np.array([[[4, 9]], [[7, 1]], [[2, 30]]])
  angles = np.asarray(language_model.rope_angles(shape, jnp.asarray(positions)))
  for place in range(2):
    for i in range(size // 2):
      axis = i % 3 if i % 3 and i < 3 * sections[i % 3] else 0
      assert angles[0, place, i] == pytest.approx(positions[axis, 0, place] * base ** (-2 * i / size), rel=1e-5)
  flat = np.asarray(language_model.rope_angles(shape, jnp.asarray(positions[0])))
  assert flat[0, 1, 1] == pytest.approx(9 * base ** (-2 / size), rel=1e-5)

  stretch = Llama3Rope(factor=8.0, low=1.0, high=4.0, original_length=64)
  shape = Shape(8, 1, 1, 1, size, 8, 8, rope_base=500.0, rope_stretch=stretch)
  angles = np.asarray(language_model.rope_angles(shape, jnp.asarray([1.0])))[0]
  kept, divided = 0, 0
  for i, angle in enumerate(angles):
    frequency = 500.0 ** (-2 * i / size)
    wavelength = 2 * np.pi / frequency
    if wavelength < 64 / 4:
      wanted, kept = frequency, kept + 1
    elif wavelength > 64:
      wanted, divided = frequency / 8, divided + 1
    else:
      smooth = (64 / wavelength - 1) / (4 - 1)
      wanted = (1 - smooth) * frequency / 8 + smooth * frequency
    assert angle == pytest.approx(wanted, rel=1e-5)
  assert kept and divided and kept + divided < size // 2


def test_frames_enter_as_codes_or_as_patches():
  model = params.merge(*built())
  codes_BN = jnp.array([[0, 9]])
  np.testing.assert_array_equal(model.embed_frames(codes_BN), model.embed_text(codes_BN + 20))
  patches = jax.random.normal(jax.random.key(0), (1, 2, 7))
  wanted = patches @ model.patches.kernel[...] + model.patches.bias[...]
  np.testing.assert_allclose(model.embed_frames(patches), wanted, atol=1e-6)
  assert model.embed_frames(patches, dtype=jnp.bfloat16).dtype == jnp.bfloat16
  with pytest.raises(ConfigError, match="patch_width=7"):
    model.embed_frames(jnp.zeros((1, 2, 8)))
  plain = params.merge(*built(language_model.preset("tiny", depth=1)))
  with pytest.raises(ConfigError, match="set frame_codes"):
    plain.embed_frames(codes_BN)
  with pytest.raises(ConfigError, match="set patch_width"):
    plain.embed_frames(patches)


def test_logits_of_a_tied_and_of_an_own_head():
  hidden_BLD = embeddings(length=2)
  model = params.merge(*built())
  np.testing.assert_allclose(model.logits(hidden_BLD), hidden_BLD @ model.table[...].T, rtol=1e-5, atol=1e-5)
  own = params.merge(*built(Shape(24, 1, 2, 2, 12, 8, 11)))
  np.testing.assert_allclose(own.logits(hidden_BLD), hidden_BLD @ own.head.kernel[...], rtol=1e-5, atol=1e-5)
  assert own.logits(hidden_BLD.astype(jnp.bfloat16)).dtype == jnp.float32


def test_presets_have_the_published_numbers_of_parameters():
  """Qwen3-VL's decoders are Qwen3-1.7B (1.72e9) and Qwen3-8B (8.19e9); Chameleon-7B by its own sizes, 7.04e9."""
  for name, published in (("qwen3-vl-2b", 1.72e9), ("qwen3-vl-8b", 8.19e9), ("chameleon-7b", 7.04e9)):
    shape = language_model.preset(name)
    init = lambda shape=shape: LanguageModel(shape, rngs=nnx.Rngs(params=jax.random.key(0)))
    _, shapes, axes = params.abstract(init)
    assert params.count(shapes) == pytest.approx(published, rel=0.005)
    assert all(None not in names for names in axes.values())  # every dimension of every parameter has a name
    # Twice the parameters a token, but for the table that is only looked up, and for the scores.
    table = 0 if shape.tied else shape.vocabulary * shape.width
    assert language_model.forward_flops(shape, 1) == pytest.approx(2 * (params.count(shapes) - table), rel=0.001)


def test_lora_adapts_the_projections_that_are_asked_for():
  _, weights = built()
  adapters = init_lora(weights, 2, language_model.lora_pattern(("q", "down")), key=jax.random.key(0))
  assert {name.removesuffix(".lora_a") for name in adapters if name.endswith("a")} == {
    "layers.attention.q.kernel", "layers.mlp.down.kernel",
  }  # fmt: skip
  merged = merge_lora(weights, {name: leaf + 0.1 for name, leaf in adapters.items()})
  changed = {name for name in weights if not np.array_equal(merged[name], weights[name])}
  assert changed == {"layers.attention.q.kernel", "layers.mlp.down.kernel"}
  with pytest.raises(ConfigError, match="'qq' does not exist"):
    language_model.lora_pattern(("qq",))


def test_wrong_shapes_and_inputs_are_named_before_anything_runs():
  for changes, message in (
    ({"kv_heads": 3}, "kv_heads=3 must divide heads=4"),
    ({"head_size": 7}, "must be even"),
    ({"rope_sections": (1, 1, 1)}, "must sum to 6"),
    ({"first_code": 25}, "outside the vocabulary of 30"),
    ({"qk_norm": "heads"}, "did you mean 'head'"),
  ):
    with pytest.raises(ConfigError, match=message):
      dataclasses.replace(SHAPE, **changes)
  with pytest.raises(ConfigError, match="did you mean 'qwen3-vl-8b'"):
    language_model.preset("qwen3-vl-8")
  x_BLD = embeddings()
  cache = params.merge(*built()).init_cache(BATCH, 4)
  for inputs, message in (
    ({"positions": jnp.zeros((3, LENGTH), int)}, "positions"),
    ({"real_BL": jnp.ones((BATCH, 3), bool)}, "real_BL"),
    ({"pairs_BNL": jnp.ones((BATCH, LENGTH, 4), bool)}, "pairs_BNL"),
    ({"cache": cache}, "room for 4"),
    ({"added_SBLD": jnp.zeros((4, *x_BLD.shape))}, "added_SBLD"),
  ):
    with pytest.raises(ConfigError, match=message):
      run(x_BLD, **inputs)
