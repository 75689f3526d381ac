"""The attention function: every road against a plain NumPy statement, masks by what may matter, memory by measure."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kling_jax.errors import ConfigError
from kling_jax.nn import blockwise, lowering
from kling_jax.nn.attention import attention, on_one_device
from kling_jax.nn.mask import Mask


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
      if mask.segments is not None and mask.segments[0][b, i] != mask.segments[1][b, key]:
        seen[key] = False
    group = h * k.shape[2] // heads
    if seen.any():
      scores = k[b, seen, group].astype(np.float64) @ q[b, i, h] / np.sqrt(size)
      p = np.exp(scores - scores.max())
      out[b, i, h] = p @ v[b, seen, group] / p.sum()
  return out


PACKED = (np.array([[3] * 6 + [0] * 9 + [7] * 3, [1] * 18], np.int32),) * 2
MASKS = {
  "none": (Mask(), 20, 20),
  "padding": (Mask(keys_BL=np.arange(13) < np.array([[5], [0]])), 9, 13),
  "causal": (Mask(block=1), 17, 17),
  "blocks": (Mask(block=4), 18, 18),
  "blocks after context": (Mask(block=4, start=6), 18, 18),
  "cache": (Mask(block=3, offset=7, start=7, length=13), 6, 20),
  "packed": (Mask(segments=PACKED), 18, 18),
  "packed, padded blocks": (Mask(np.arange(18) < np.array([[17], [11]]), 3, segments=PACKED), 18, 18),
  "all": (Mask(np.arange(19) % 3 > np.array([[0], [1]]), 3, 4, 4, 15), 11, 19),
}
ROADS = ("reference", "blockwise", "splash")


def _traced_for(road):
  """Splash kernels run in Pallas' interpreter here."""
  return lowering.interpreted() if road == "splash" else contextlib.nullcontext()


FEW = [(name, road) for name in MASKS for road in ("reference", "blockwise")] + [("none", "splash"), ("all", "splash")]
MANY = [pytest.param(name, "splash", marks=pytest.mark.drill) for name in MASKS if name not in ("none", "all")]


@pytest.mark.parametrize("name, road", FEW + MANY)
def test_each_road_and_mask_is_the_definition(name, road):
  mask, n, length = MASKS[name]
  q, k, v, _ = _draw(2, n, length, 4, 2, 8)
  with _traced_for(road):
    o = jax.jit(lambda *args: attention(*args, mask=mask, road=road))(q, k, v)
  np.testing.assert_allclose(o, _numpy_attention(q, k, v, mask), atol=2e-6)


ODD = {
  "none": (Mask(), 75, 83),
  "padded text": (Mask(np.arange(83) < np.array([[50], [7]])), 75, 83),
  "all": (
    Mask(np.arange(83)[None] % 5 > 0, 8, 5, 5, 80, (np.arange(75)[None] // 40, np.arange(83)[None] // 45)),
    75,
    83,
  ),
}


def _gradients(road, mask, arrays, splash_blocks=None):
  q, k, v, g = arrays

  def loss(q, k, v):
    o = on_one_device(q, k, v, mask, road, splash_blocks)
    return jnp.sum(g.astype(jnp.float32) * o), o

  with _traced_for(road):
    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)


@pytest.mark.parametrize("name", ["none", "all", pytest.param("padded text", marks=pytest.mark.drill)])
def test_blockwise_agrees_in_gradients_across_several_blocks_of_odd_length(name, monkeypatch):
  monkeypatch.setattr(blockwise, "BLOCK", 32)
  mask, n, length = ODD[name]
  mask = _for_rows(mask, 2)
  arrays = _draw(2, n, length, 4, 2, 8)
  _assert_close(_gradients("blockwise", mask, arrays), _gradients("reference", mask, arrays), 1e-5)


def _for_rows(mask, rows):
  return jax.tree.map(lambda x: np.repeat(x, rows, axis=0) if np.shape(x)[:1] == (1,) else x, mask)


def _assert_close(got, expected, atol):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol)


LONG = {
  "full": (Mask(), 300, 300),
  "padded text": (Mask(np.arange(150) < np.array([[130], [0]])), 300, 150),
  "packed blocks": (
    Mask(np.arange(300) < np.array([[290], [141]]), 60, segments=(np.arange(600).reshape(2, 300) // 120,) * 2),
    300,
    300,
  ),
  "cache": (Mask(block=50, offset=150, start=150, length=250), 100, 400),
}


@pytest.mark.parametrize(
  "name", ["padded text", "packed blocks", *(pytest.param(name, marks=pytest.mark.drill) for name in ("full", "cache"))]
)
def test_splash_agrees_in_gradients_across_several_blocks_and_grouped_heads(name):
  mask, n, length = LONG[name]
  arrays = _draw(2, n, length, 4, 2, 16)
  _assert_close(_gradients("splash", mask, arrays, (128,) * 6), _gradients("reference", mask, arrays), 1e-5)


def test_splash_takes_the_place_of_the_queries_while_it_runs():
  q, k, v, _ = _draw(1, 64, 300, 2, 2, 16)
  cached = lambda road: lambda held: attention(q, k, v, mask=Mask(None, 32, held, held, held + 64), road=road)
  with lowering.interpreted():
    splash = jax.jit(cached("splash"))
    for held in (0, 130, 236):
      np.testing.assert_allclose(splash(held), jax.jit(cached("reference"))(held), atol=2e-6)


def test_queries_that_see_nothing_are_zero_with_zero_gradients_on_every_road():
  q, k, v, g = _draw(1, 8, 8, 1, 1, 8)
  mask = Mask(keys_BL=np.zeros((1, 8), bool))
  for road in ROADS:
    for leaf in jax.tree.leaves(_gradients(road, mask, (q * 1e3, k * 1e3, v, g))):
      np.testing.assert_array_equal(leaf, 0.0)


def test_bfloat16_is_float32_attention_up_to_its_rounding():
  """Rounded inputs, probabilities and output: 2^-8 of values up to about 3, in sums of gradients a little more."""
  arrays = _draw(1, 150, 150, 2, 2, 16)
  half = tuple(x.astype(jnp.bfloat16) for x in arrays)
  expected = _gradients("reference", Mask(block=50), tuple(x.astype(jnp.float32) for x in half))
  for road in ROADS:
    gradients, o = _gradients(road, Mask(block=50), half)
    assert o.dtype == gradients[0].dtype == jnp.bfloat16
    _assert_close((gradients, o), expected, 0.03)


def test_forward_mode_derivative_matches_reverse_mode():
  q, k, v, g = _draw(1, 20, 20, 2, 2, 8)
  loss = lambda q, road: jnp.sum(g * attention(q, k, v, mask=Mask(block=4), road=road))
  slope = np.vdot(jax.jit(jax.grad(lambda q: loss(q, "reference")))(q), g)
  forward = lambda q, g: jax.jvp(lambda q: loss(q, "blockwise"), (q,), (g,))[1]
  with lowering.forward_mode():
    np.testing.assert_allclose(jax.jit(forward)(q, g), slope, atol=1e-5)
  with pytest.raises(TypeError, match="custom_vjp"):
    jax.jit(lambda q, g: forward(q, g)).lower(q, g)  # a new function: `forward` is traced, and keeps its form


@pytest.mark.parametrize("road", ROADS)
def test_a_saved_attention_is_kept_once_and_by_the_kernels_not_repeated(road):
  x = jax.ShapeDtypeStruct((1, 20, 2, 8), jnp.float32)

  def gradient(policy):
    run = jax.checkpoint(lambda q: jnp.sin(attention(q, q, q, road=road)).sum(), policy=policy)
    kept = jax.tree.leaves(jax.eval_shape(lambda q: jax.vjp(run, q)[1], x))
    program = str(jax.make_jaxpr(jax.grad(run))(x))
    forwards = program.count("name=splash_mha_fwd") if road == "splash" else program.count(" = exp ")
    return forwards, sum(leaf.size for leaf in kept)

  nothing, names = jax.checkpoint_policies.nothing_saveable, jax.checkpoint_policies.save_only_these_names("attention")
  with _traced_for(road):
    (forwards, size), (forwards_named, size_named) = gradient(nothing), gradient(names)
  logsumexp = 0 if road == "reference" else 2 * 20
  assert size_named - size == 2 * 20 * 8 + logsumexp
  assert forwards > 0 and forwards_named == forwards - (road != "reference")


def _temp_bytes(n: int, road: str) -> int:
  x, keys = jax.ShapeDtypeStruct((1, n, 1, 32), jnp.float32), jax.ShapeDtypeStruct((1, n), bool)
  loss = lambda q, k, v, keys: jnp.sum(attention(q, k, v, mask=Mask(keys, n // 8), road=road))
  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x, keys).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_linearly_on_the_blockwise_road_and_quadratically_on_the_reference():
  lengths = (2048, 4096, 8192)
  used = {road: [_temp_bytes(n, road) for n in lengths] for road in ("reference", "blockwise")}
  for road, sizes in used.items():
    print(road, [f"{n}: {size / 2**20:.1f} MiB" for n, size in zip(lengths, sizes, strict=True)])
  for fewer, more in zip(used["reference"], used["reference"][1:], strict=False):
    assert 3.5 < more / fewer < 4.5  # twice the tokens
  for fewer, more in zip(used["blockwise"], used["blockwise"][1:], strict=False):
    assert more / fewer < 2.1


def test_auto_takes_the_road_of_the_platform_for_large_problems():
  def road(n, dtype=jnp.bfloat16, mask=Mask()):
    x = jax.ShapeDtypeStruct((1, n, 1, 8), dtype)
    program = str(jax.make_jaxpr(lambda q: attention(q, q, q, mask=mask))(x))
    if f"f32[1,1,{n},{n}] = exp" in program:  # all scores in one array
      return "reference"
    return next((name for name in ("splash", "dot_product_attention_fwd") if name in program), "blockwise")

  assert (road(256), road(512)) == ("reference", "blockwise")
  with lowering.target("tpu", "v5p"):
    assert (road(256), road(2048), road(2048, jnp.float32)) == ("reference", "splash", "splash")
    with lowering.forward_mode():
      assert road(2048) == "blockwise"
  with lowering.target("gpu"):
    assert road(256) == "reference"
    assert road(2048, jnp.float32) == "blockwise"  # what cuDNN cannot do
    assert road(2048, mask=Mask(segments=(np.zeros((1, 2048), np.int32),) * 2)) == "blockwise"


def test_wrong_roads_and_heads_are_named():
  q, k, v, _ = _draw(1, 4, 4, 4, 3, 8)
  with pytest.raises(ConfigError, match="did you mean 'blockwise'"):
    attention(q, q, q, road="blockwize")
  with pytest.raises(ConfigError, match="4 query heads do not divide into 3"):
    attention(q, k, v)
  with pytest.raises(ConfigError, match="'splash' cannot do this: it is a TPU kernel, and this is traced for cpu"):
    attention(q, q, q, road="splash")
  with pytest.raises(ConfigError, match="'cudnn' cannot do this: it is a GPU library, and this is traced for cpu"):
    attention(q, q, q, road="cudnn")
  with lowering.forward_mode(), lowering.target("tpu"), pytest.raises(ConfigError, match="no forward derivative"):
    attention(q, q, q, road="splash")
  with lowering.interpreted(), pytest.raises(ConfigError, match="give q, kv, kv_compute, q_back.* multiple of 128"):
    on_one_device(q, q, q, Mask(), "splash", (128, 128, 64, 128, 128, 128))
