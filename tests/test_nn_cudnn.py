"""The cuDNN road as far as it shows without a GPU: what is lowered for CUDA, and its arithmetic by XLA's kernel."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from kling_jax.errors import ConfigError
from kling_jax.nn import cudnn, lowering
from kling_jax.nn.attention import attention
from kling_jax.nn.mask import Mask

N, TEXT, HEADS, SIZE = 24, 13, 4, 16
MASKS = {
  "full": (Mask(), N),
  "text": (Mask(keys_BL=(np.arange(TEXT) % 3 > 0) & np.array([[True], [False]])), TEXT),  # row 1 has no words
  "causal": (Mask(block=1), N),
  "blocks": (Mask(block=5), N),
  "blocks after context, padded": (Mask(np.arange(N) < np.array([[20], [9]]), 4, start=6), N),
  "cache": (Mask(block=8, offset=12, start=12, length=np.int32(33)), 40),
}


def _draw(keys, dtype=jnp.bfloat16):
  rng = np.random.default_rng(0)
  shapes = (2, N, HEADS, SIZE), (2, keys, 2, SIZE), (2, keys, 2, SIZE), (2, N, HEADS, SIZE)
  return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def _gradients(mask, q, k, v, g, road):
  def loss(q, k, v):
    o = attention(q, k, v, mask=mask, road=road)
    return jnp.sum((g * o).astype(jnp.float32)), o

  return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)


@pytest.mark.parametrize("name", MASKS)
def test_calls_are_the_fused_kernel_and_carry_no_mask_array(name, monkeypatch):
  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # of no library: none is loaded
  mask, keys = MASKS[name]
  with lowering.target("gpu"):
    traced = jax.jit(functools.partial(_gradients, mask, road="cudnn")).trace(*_draw(keys))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  calls = re.findall(r"@__cudnn\$(\w+)\((.*?)\)", text)
  forward, backward = "fmhaSoftmax", "fmhaSoftmaxBackward"  # with a mask array they would be ...ScaleBias...
  assert {kind for kind, _ in calls} == {forward, backward}
  told = {"full": {0}, "causal": {0}, "blocks": {0, 2}}.get(name, {2})  # numbers of queries and of keys, or neither
  assert {len(operands.split(",")) - (3 if kind == forward else 6) for kind, operands in calls} == told
  kinds = {"full": {"NO_MASK"}, "causal": {"CAUSAL"}, "blocks": {"NO_MASK", "PADDING"}}  # odd blocks are padded
  assert set(re.findall(r"mask_type\\22: \\22(\w+)", text)) == kinds.get(name, {"PADDING"})


SLOW = [pytest.param(name, marks=pytest.mark.drill) for name in ("full", "causal", "blocks", "cache")]


@pytest.mark.parametrize("name", ["text", "blocks after context, padded", *SLOW])
def test_blocks_lengths_and_moved_keys_are_the_mask(name, monkeypatch):
  """The calls as they are, answered by XLA's implementation of the same function instead of the library's."""
  call = jax.nn.dot_product_attention
  by_xla = lambda *args, implementation, **how: call(*args, implementation="xla", **how)
  monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
  mask, keys = MASKS[name]
  arrays = _draw(keys, jnp.float32)
  expected = jax.jit(functools.partial(_gradients, mask, road="reference"))(*arrays)
  monkeypatch.setattr(cudnn, "obstacle", lambda *args: None)  # float32, to see more than bfloat16's three digits
  got = jax.jit(functools.partial(_gradients, mask, road="cudnn"))(*arrays)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_it_cannot_do_is_named():
  q, k, v, _ = _draw(N)
  attend = functools.partial(attention, road="cudnn")
  with lowering.target("gpu"):
    with pytest.raises(ConfigError, match="bfloat16 and float16, not in float32"):
      attend(*(x.astype(jnp.float32) for x in (q, k, v)))
    with pytest.raises(ConfigError, match="a head of 12; it takes multiples of 8"):
      attend(*(x[..., :12] for x in (q, k, v)))
    with pytest.raises(ConfigError, match="packed clips; it takes key padding"):
      attend(q, k, v, mask=Mask(segments=(np.zeros((2, N), np.int32),) * 2))
    with pytest.raises(ConfigError, match="only while running; offset and start"):
      jax.eval_shape(lambda at: attend(q, k, v, mask=Mask(block=4, offset=at)), 3)
    with pytest.raises(ConfigError, match="ordinary causal mask with padding"):
      attend(q, k, v, mask=Mask(block=1, offset=3))
    with pytest.raises(ConfigError, match="100 causal blocks; at most 64"):
      attend(*(jnp.zeros((1, 200, 2, 16), jnp.bfloat16),) * 3, mask=Mask(block=2))
    with pytest.raises(ConfigError, match="cuDNN is not detected"):
      attend(q, k, v)
