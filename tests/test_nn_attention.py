"""The attention function: both roads against a plain NumPy statement, masks by what may matter, memory by measure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kling_jax.errors import ConfigError
from kling_jax.nn import attention as module
from kling_jax.nn import lowering
from kling_jax.nn.attention import Mask, attention


def _draw(batch, n, length, heads, groups, size):
  """Queries, keys, values, and a gradient to send back."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  keys = (batch, length, groups, size)
  return draw(batch, n, heads, size), draw(*keys), draw(*keys), draw(batch, n, heads, size)


def _numpy_attention(q, k, v, mask: Mask):
  """Loops and no batching: one softmax for each query that sees anything."""
  batch, n, heads, size = q.shape
  out = np.zeros(q.shape)
  for b, i, h in np.ndindex(batch, n, heads):
    seen = np.ones(k.shape[1], bool) if mask.keys_BL is None else np.array(mask.keys_BL[b])
    for key in range(k.shape[1]):
      if mask.length is not None and key >= mask.length:
        seen[key] = False
      if mask.block is not None and (key - mask.start) // mask.block > (mask.offset + i - mask.start) // mask.block:
        seen[key] = False
    group = h * k.shape[2] // heads
    if seen.any():
      scores = k[b, seen, group].astype(np.float64) @ q[b, i, h] / np.sqrt(size)
      p = np.exp(scores - scores.max())
      out[b, i, h] = p @ v[b, seen, group] / p.sum()
  return out


MASKS = {
  "none": (lambda n, length: Mask(), 20, 20),
  "padding": (lambda n, length: Mask(keys_BL=np.arange(length) < np.array([[5], [0]])), 9, 13),
  "causal": (lambda n, length: Mask(block=1), 17, 17),
  "blocks": (lambda n, length: Mask(block=4), 18, 18),
  "blocks after context": (lambda n, length: Mask(block=4, start=6), 18, 18),
  "cache": (lambda n, length: Mask(block=3, offset=7, start=7, length=13), 6, 20),
  "all": (lambda n, length: Mask(np.arange(length) % 3 > np.array([[0], [1]]), 3, 4, 4, 15), 11, 19),
}


@pytest.mark.parametrize("road", ["reference", "blockwise"])
@pytest.mark.parametrize("name", MASKS)
def test_each_road_and_mask_is_the_definition(name, road):
  make, n, length = MASKS[name]
  q, k, v, _ = _draw(2, n, length, 4, 2, 8)
  mask = make(n, length)
  expected = _numpy_attention(q, k, v, mask)
  np.testing.assert_allclose(jax.jit(lambda *a: attention(*a, mask=mask, road=road))(q, k, v), expected, atol=2e-6)


@pytest.mark.parametrize("name", ["none", "all"])
def test_roads_agree_in_gradients_across_several_blocks_of_odd_length(name, monkeypatch):
  monkeypatch.setattr(module, "BLOCK", 32)
  n, length = 75, 83
  q, k, v, g = _draw(2, n, length, 4, 2, 8)
  mask = MASKS[name][0](n, length) if name == "none" else Mask(np.arange(83) % 5 > np.array([[1], [3]]), 8, 5, 5, 80)

  def run(road):
    loss = lambda *args: jnp.sum(g * attention(*args, mask=mask, road=road))
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

  (loss_a, grads_a), (loss_b, grads_b) = run("reference"), run("blockwise")
  np.testing.assert_allclose(loss_a, loss_b, rtol=1e-5)
  for a, b in zip(grads_a, grads_b, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_queries_that_see_nothing_are_zero_with_zero_gradients_on_both_roads():
  q, k, v, g = _draw(1, 8, 8, 1, 1, 8)
  mask = Mask(keys_BL=np.zeros((1, 8), bool))
  for road in ("reference", "blockwise"):
    loss = lambda *args: jnp.sum(g * attention(*args, mask=mask, road=road))  # noqa: B023
    for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q * 1e3, k * 1e3, v)):
      np.testing.assert_array_equal(leaf, 0.0)


def test_bfloat16_is_float32_attention_up_to_its_rounding():
  q, k, v, _ = _draw(1, 40, 40, 2, 2, 16)
  for road in ("reference", "blockwise"):
    half = jax.jit(lambda *args: attention(*args, road=road))(*(x.astype(jnp.bfloat16) for x in (q, k, v)))  # noqa: B023
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), _numpy_attention(q, k, v, Mask()), atol=0.03)


def test_forward_mode_derivative_matches_reverse_mode():
  q, k, v, g = _draw(1, 20, 20, 2, 2, 8)
  loss = lambda q, road: jnp.sum(g * attention(q, k, v, mask=Mask(block=4), road=road))
  slope = np.vdot(jax.jit(jax.grad(lambda q: loss(q, "reference")))(q), g)
  forward = lambda q, g: jax.jvp(lambda q: loss(q, "blockwise"), (q,), (g,))[1]
  with lowering.forward_mode():
    np.testing.assert_allclose(jax.jit(forward)(q, g), slope, atol=1e-5)
  with pytest.raises(TypeError, match="custom_vjp"):
    jax.jit(lambda q, g: forward(q, g)).lower(q, g)  # a new function: `forward` is traced, and keeps its form


@pytest.mark.parametrize("road", ["reference", "blockwise"])
def test_a_saved_attention_is_kept_once_and_on_the_blockwise_road_not_repeated(road):
  x = jax.ShapeDtypeStruct((1, 20, 2, 8), jnp.float32)

  def gradient(policy):
    run = jax.checkpoint(lambda q: jnp.sin(attention(q, q, q, road=road)).sum(), policy=policy)
    kept = jax.tree.leaves(jax.eval_shape(lambda q: jax.vjp(run, q)[1], x))
    return str(jax.make_jaxpr(jax.grad(run))(x)).count(" = exp "), sum(leaf.size for leaf in kept)

  nothing, names = jax.checkpoint_policies.nothing_saveable, jax.checkpoint_policies.save_only_these_names("attention")
  (exps, size), (exps_named, size_named) = gradient(nothing), gradient(names)
  padded = 32 if road == "blockwise" else 20
  logsumexp = 2 * padded if road == "blockwise" else 0
  assert size_named - size == 2 * padded * 8 + logsumexp
  assert exps_named == exps - (road == "blockwise")


def _temp_bytes(n: int, road: str) -> int:
  x, keys = jax.ShapeDtypeStruct((1, n, 1, 32), jnp.float32), jax.ShapeDtypeStruct((1, n), bool)
  loss = lambda q, k, v, keys: jnp.sum(attention(q, k, v, mask=Mask(keys, n // 8), road=road))
  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, keys).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_linearly_on_the_blockwise_road_and_quadratically_on_the_reference():
  growth = {road: _temp_bytes(8192, road) / _temp_bytes(2048, road) for road in ("reference", "blockwise")}
  assert 12 < growth["reference"] < 20  # 4 times the tokens
  assert growth["blockwise"] < 5


def test_auto_takes_the_blockwise_road_only_for_large_problems_on_cpu():
  def exponentials(n):  # the reference takes all scores' exponential in one array
    x = jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32)
    return f"f32[1,1,{n},{n}] = exp" in str(jax.make_jaxpr(lambda q: attention(q, q, q))(x))

  assert exponentials(256) and not exponentials(512)
  with lowering.target("tpu"):
    assert exponentials(2048)


def test_wrong_roads_and_heads_are_named():
  q, k, v, _ = _draw(1, 4, 4, 4, 3, 8)
  with pytest.raises(ConfigError, match="did you mean 'blockwise'"):
    attention(q, q, q, road="blockwize")
  with pytest.raises(ConfigError, match="4 query heads do not divide into 3"):
    attention(q, k, v)
