"""The small layers: products, norms, rotary positions, modulation, embeddings, LoRA, each against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_jax.errors import ConfigError, WeightsError
from kling_jax.nn import embed, linear, lora, lowering, norm, params, partition, rotary
from kling_jax.nn.mlp import GeluMLP, SwiGLU
from kling_jax.nn.modulation import ModulationMLP, ModulationTable, add_gated, modulate
from kling_jax.nn.multihead import MultiHeadAttention

AXES = ("embed", "mlp")


def _normal(seed, *shape):
  """NumPy draws: nothing to compile, and what is done to them afterwards in NumPy is an independent statement."""
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _run(module, *args):
  """Calls a module in one compiled program, and returns NumPy arrays."""
  graph, weights = params.split(module)
  return jax.tree.map(np.asarray, jax.jit(lambda weights, args: params.merge(graph, weights)(*args))(weights, args))


def test_product_with_its_own_gradient_rule_is_the_plain_one():
  x, w, b, g = _normal(0, 2, 3, 5), _normal(1, 5, 4), _normal(3, 4), _normal(2, 2, 3, 4)
  run = lambda: jax.jit(jax.value_and_grad(lambda x, w, b: jnp.sum(g * linear.affine(x, w, b, AXES)), (0, 1, 2)))(
    x, w, b
  )
  (ours, ours_gradients) = run()
  with lowering.forward_mode():
    (plain, plain_gradients) = run()
    jax.eval_shape(lambda x: jax.jvp(lambda x: linear.affine(x, w, b, AXES), (x,), (x,)), x)
  np.testing.assert_allclose(ours, plain, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours_gradients, plain_gradients)


def test_the_barrier_is_for_cpu_alone():
  total = lambda w: linear.affine(_normal(0, 3, 5), w, None, AXES).sum()
  program = lambda: str(jax.make_jaxpr(jax.grad(total))(_normal(1, 5, 4)))
  assert "optimization_barrier" in program()
  with lowering.target("tpu"):
    assert "optimization_barrier" not in program()


def test_master_weights_stay_float32_and_get_float32_gradients_under_bfloat16():
  layer = linear.Linear(6, 4, axes=("embed", "mlp"), rngs=nnx.Rngs(0))
  graph, weights = params.split(layer)
  x = _normal(0, 3, 6).astype(jnp.bfloat16)
  assert jax.eval_shape(params.merge(graph, weights), x).dtype == jnp.bfloat16
  grads = jax.jit(jax.grad(lambda w: params.merge(graph, w)(x).astype(jnp.float32).sum()))(weights)
  assert {leaf.dtype for leaf in grads.values()} == {jnp.dtype("float32")}
  np.testing.assert_allclose(grads["kernel"], np.tile(np.array(x, np.float32).sum(0)[:, None], (1, 4)), rtol=2e-2)


def test_norms_have_the_moments_they_promise():
  x = 3 + 5 * _normal(0, 7, 64)
  y = np.asarray(jax.jit(norm.layer_norm)(x))
  np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
  np.testing.assert_allclose(y.std(-1), 1, atol=1e-5)
  rms = _run(norm.RMSNorm(64), x)
  np.testing.assert_allclose(np.square(rms).mean(-1), 1, atol=1e-5)
  np.testing.assert_allclose(_run(norm.RMSNorm(64), x * 100), rms, atol=1e-5)  # scale invariance
  np.testing.assert_allclose(_run(norm.LayerNorm(64), x), y, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40).map(lambda half: 2 * half))
def test_a_head_is_shared_out_whole_among_the_axes(size):
  frame, row, column = rotary.axis_sizes(size)
  assert frame + row + column == size and row == column and frame >= row
  assert frame % 2 == row % 2 == 0
  assert (frame, row, column) == (size - 4 * (size // 6), 2 * (size // 6), 2 * (size // 6))  # Wan 2.1


def test_rotation_multiplies_complex_pairs_by_their_phase():
  x, angles = _normal(0, 1, 6, 2, 16), np.asarray(jax.jit(lambda: rotary.angles_3d(1, 2, 3, 16))())
  turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
  y = np.asarray(jax.jit(rotary.rotate)(x, angles))
  np.testing.assert_allclose(y[..., ::2] + 1j * y[..., 1::2], turned, atol=1e-6)
  # Token (0, 1, 2): phases of row 1 and column 2 at the lowest frequency pair of their parts (4 pairs, 2, 2).
  np.testing.assert_allclose(angles[5][[0, 4, 6]], [0, 1, 2])


def test_products_of_rotated_vectors_depend_on_relative_position_only():
  q, k = _normal(0, 24), _normal(1, 24)
  grid = (5, 4, 4)

  @jax.jit
  def rotated(x, start):
    everywhere = jnp.broadcast_to(x, (1, 80, 1, 24))
    return rotary.rotate(everywhere, rotary.angles_3d(*grid, 24, first_frame=start)).reshape(*grid, 24)

  turn = lambda x, start: np.asarray(rotated(x, start))
  q_at, k_at = turn(q, 0), turn(k, 0)
  here = q_at[1, 0, 2] @ k_at[3, 1, 1]
  np.testing.assert_allclose(q_at[2, 2, 3] @ k_at[4, 3, 2], here, rtol=1e-4)  # both moved by (1, 2, 1)
  np.testing.assert_allclose(turn(q, 7)[1, 0, 2] @ turn(k, 7)[3, 1, 1], here, rtol=1e-4)
  assert abs(q_at[1, 0, 2] @ k_at[3, 1, 2] - here) > 1e-3  # another distance is another product
  np.testing.assert_allclose(turn(q, 1)[:-1], q_at[1:], atol=1e-5)  # positions continue where a cache ends


def test_sinusoid_is_cosines_then_sines_of_falling_frequency():
  value = np.array([0.0, 1.0, 777.0])
  rate = 10_000.0 ** (-np.arange(128) / 128)
  expected = np.concatenate([np.cos(value[:, None] * rate), np.sin(value[:, None] * rate)], axis=1)
  np.testing.assert_allclose(jax.jit(embed.sinusoid)(value), expected, atol=1e-4)


def test_scores_start_as_no_op_and_unknown_ones_cannot_poison():
  layer = embed.ScoreEmbedding(8, rngs=nnx.Rngs(0))
  value, known = np.array([500.0, np.nan], np.float32), np.array([True, False])
  np.testing.assert_array_equal(_run(layer, value, known), 0)
  graph, weights = params.split(layer)
  weights = {name: np.asarray(leaf) + 0.1 for name, leaf in weights.items()}
  embedded = _run(params.merge(graph, weights), value, known)
  np.testing.assert_allclose(embedded[1], weights["null"])
  assert np.abs(embedded[0] - embedded[1]).max() > 0.1
  grads = jax.jit(jax.grad(lambda w: params.merge(graph, w)(value, known).sum()))(weights)
  assert all(np.isfinite(leaf).all() for leaf in grads.values())


@settings(max_examples=15, deadline=None)
@given(*[st.integers(1, 3)] * 6, st.integers(1, 4))
def test_patches_go_and_come_back(pt, ph, pw, frames, rows, columns, channels):
  x = _normal(0, 2, frames * pt, rows * ph, columns * pw, channels)
  patches = embed.patchify(x, (pt, ph, pw))  # reshapes and transposes alone, so NumPy arrays will do
  np.testing.assert_array_equal(embed.unpatchify(patches, (pt, ph, pw), (frames, rows, columns)), x)
  np.testing.assert_array_equal(patches[0, -1], x[0, -pt:, -ph:, -pw:].reshape(-1))  # the last patch, as (t, h, w, c)


def test_modulation_of_a_frame_reaches_its_own_tokens_alone():
  x, rows = _normal(0, 2, 12, 8), _normal(1, 2, 3, 6, 8)
  shift, scale, gate, *_ = _run(ModulationTable(8, 6), rows)
  np.testing.assert_array_equal(gate, rows[:, :, 2])
  y, z, normal = jax.jit(lambda: (modulate(x, shift, scale), add_gated(x, x, gate), norm.layer_norm(x)))()
  y, z, normal = np.asarray(y), np.asarray(z), np.asarray(normal)
  for frame in range(3):
    tokens, row = slice(4 * frame, 4 * frame + 4), slice(frame, frame + 1)
    np.testing.assert_allclose(y[:, tokens], normal[:, tokens] * (1 + scale[:, row]) + shift[:, row], atol=1e-6)
    np.testing.assert_allclose(z[:, tokens], x[:, tokens] * (1 + gate[:, row]), atol=1e-6)
  np.testing.assert_array_equal(_run(ModulationMLP(8, 6, rngs=nnx.Rngs(0)), x[:, :1]), 0)  # AdaLN-zero


def test_feed_forward_formulas():
  x = _normal(0, 2, 3, 8)
  gelu, glu = GeluMLP(8, 16, rngs=nnx.Rngs(0)), SwiGLU(8, 16, rngs=nnx.Rngs(0))
  h = x @ np.asarray(gelu.up.kernel[...])
  tanh = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
  np.testing.assert_allclose(_run(gelu, x), tanh @ np.asarray(gelu.down.kernel[...]), atol=1e-5)
  gate, up = x @ np.asarray(glu.gate.kernel[...]), x @ np.asarray(glu.up.kernel[...])
  silu = gate / (1 + np.exp(-gate))
  np.testing.assert_allclose(_run(glu, x), (silu * up) @ np.asarray(glu.down.kernel[...]), atol=1e-5)


@pytest.mark.parametrize("qk_norm", ["full", "head", "none"])
def test_queries_are_normed_where_the_option_says(qk_norm):
  layer = MultiHeadAttention(16, 4, kv_heads=2, context_width=6, qk_norm=qk_norm, rngs=nnx.Rngs(0))
  q, k, v = map(np.asarray, jax.jit(layer.qkv)(10 * _normal(0, 2, 5, 16), 10 * _normal(1, 2, 7, 6)))
  assert q.shape == (2, 5, 4, 4) and k.shape == v.shape == (2, 7, 2, 4)
  square = {axes: np.square(q).mean(axes) for axes in ((2, 3), (3,))}
  full, head = (np.allclose(square[axes], 1, atol=1e-3) for axes in ((2, 3), (3,)))
  assert (full, head) == {"full": (True, False), "head": (True, True), "none": (False, False)}[qk_norm]
  assert jax.eval_shape(layer, _normal(0, 2, 5, 16), _normal(1, 2, 7, 6)).shape == (2, 5, 16)


def test_lora_is_the_identity_at_first_then_a_low_rank_change_on_stacked_kernels_too():
  base = {"blocks.q.kernel": _normal(0, 3, 8, 6), "head.kernel": _normal(1, 8, 6), "head.bias": _normal(2, 6)}
  adapters = lora.init_lora(base, 2, r"kernel$", key=jax.random.key(0))
  assert sorted(adapters) == sorted(f"{k}.lora_{x}" for k in ("blocks.q.kernel", "head.kernel") for x in "ab")
  merge = jax.jit(lambda adapters: lora.merge_lora(base, adapters, scale=0.5))
  for name, leaf in merge(adapters).items():
    np.testing.assert_array_equal(leaf, base[name])
  adapters = {name: np.asarray(leaf) + 1 for name, leaf in adapters.items()}
  merged = jax.tree.map(np.asarray, merge(adapters))
  assert sorted(merged) == sorted(base)
  for layer in range(3):
    change = merged["blocks.q.kernel"][layer] - base["blocks.q.kernel"][layer]
    a, b = (adapters[f"blocks.q.kernel.lora_{x}"][layer] for x in "ab")
    np.testing.assert_allclose(change, 0.5 * a @ b, atol=1e-5)
    assert np.linalg.matrix_rank(change, tol=1e-4) <= 2
  only_q = lora.init_lora(base, 1, r"\.q\.", key=jax.random.key(0))
  assert sorted(only_q) == ["blocks.q.kernel.lora_a", "blocks.q.kernel.lora_b"]


def test_lora_mistakes_are_named():
  base = {"q.kernel": jnp.zeros((4, 4))}
  with pytest.raises(ConfigError, match=r"matches no kernel; kernels are like 'q\.kernel'"):
    lora.init_lora(base, 2, "nothing", key=jax.random.key(0))
  with pytest.raises(ConfigError, match=r"choose 1\.\.4"):
    lora.init_lora(base, 5, "q", key=jax.random.key(0))
  with pytest.raises(WeightsError, match=r"'k\.kernel', which the model does not have"):
    lora.merge_lora(base, {"k.kernel.lora_a": jnp.zeros((4, 1)), "k.kernel.lora_b": jnp.zeros((1, 4))})


def test_the_trainer_places_activations_by_their_names():
  seen = []
  with partition.placing(lambda x, axes: (seen.append((x.shape, axes)), x)[1]):
    jax.eval_shape(lambda x: MultiHeadAttention(16, 4, kv_heads=2, rngs=nnx.Rngs(0))(x), _normal(0, 2, 5, 16))
    jax.eval_shape(lambda x: GeluMLP(16, 32, rngs=nnx.Rngs(0))(x), _normal(0, 2, 5, 16))
  assert seen == [
    ((2, 5, 4, 4), ("batch", "tokens", "heads", "head")),
    ((2, 5, 2, 4), ("batch", "tokens", "heads", "head")),
    ((2, 5, 2, 4), ("batch", "tokens", "heads", "head")),
    ((2, 5, 32), ("batch", "tokens", "mlp")),
  ]
