"""Attention shared by the devices of a mesh is attention on one device; what it sends is what it must."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from kling_jax.errors import ConfigError, MeshError
from kling_jax.nn import context, lowering, partition
from kling_jax.nn.attention import attention
from kling_jax.nn.mask import Mask
from kling_jax.train.attention import Choice, attend

RULES = {"batch": ("replica", "fsdp"), "tokens": ("context",), "heads": ("tensor",)}
SELF, CROSS = ("tokens", "tokens"), ("tokens", "text")
ROWS, N, HEADS, SIZE = 2, 48, 8, 8

KEYS = np.arange(N) < np.array([[41], [7]])
CLIPS = (np.stack([np.arange(N) // 12, np.arange(N) // 24]).astype(np.int32),) * 2
MASKS = {
  "full": Mask(),
  "padded": Mask(keys_BL=KEYS),
  "blocks": Mask(block=4),
  "blocks after context": Mask(block=6, start=9),
  "packed": Mask(segments=CLIPS),
  "all": Mask(keys_BL=KEYS, block=6, length=np.int32(45), segments=CLIPS),
}
MESHES = {
  "2": {"context": 2},
  "8": {"context": 8},
  "4 x tensor 2": {"context": 4, "tensor": 2},
  "2 x fsdp 2 x tensor 2": {"fsdp": 2, "context": 2, "tensor": 2},
}


def _mesh(replica=1, fsdp=1, context=1, tensor=1) -> Mesh:
  shape = (replica, fsdp, context, tensor)
  devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
  return Mesh(devices, ("replica", "fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 4)


def _draw(keys=N, groups=HEADS, dtype=np.float32):
  rng = np.random.default_rng(0)
  queries, asked = (ROWS, N, HEADS, SIZE), (ROWS, keys, groups, SIZE)
  return tuple(rng.standard_normal(shape).astype(dtype) for shape in (queries, asked, asked, queries))


def _loss(q, k, v, g, mask, tokens, road):
  o = attention(q, k, v, mask=mask, road=road, tokens=tokens)
  return jnp.sum(g.astype(jnp.float32) * o), o


def _shared(mask, mesh, choice, tokens=SELF, loss=_loss):
  """(q, k, v, g) -> ((dq, dk, dv), o), worked out by the devices of `mesh` together; always a new function."""

  def run(*arrays):
    with partition.placing(lambda x, axes: x, attend(mesh, RULES, choice)):
      return jax.grad(loss, (0, 1, 2), has_aux=True)(*arrays, mask, tokens, "auto")

  return jax.jit(run)


@functools.cache
def _alone(name, keys=N, groups=HEADS):
  run = jax.jit(lambda *arrays: jax.grad(_loss, (0, 1, 2), has_aux=True)(*arrays, MASKS[name], SELF, "reference"))
  return run(*_draw(keys, groups))


def _close(got, expected, atol=1e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=atol)


FEW = [("all", "ring", "8"), ("blocks after context", "ring", "2"), ("full", "ulysses", "8")]
MANY = [(name, way, mesh) for name in MASKS for way in ("ring", "ulysses") for mesh in list(MESHES)[1:]]


@pytest.mark.parametrize(
  "name, way, mesh",
  FEW + [pytest.param(*case, marks=pytest.mark.drill) for case in MANY if case not in FEW],
)
def test_ring_and_ulysses_are_attention_on_one_device(name, way, mesh):
  got = _shared(MASKS[name], _mesh(**MESHES[mesh]), Choice(context=way))(*_draw())
  _close(got, _alone(name))


def _collectives(text: str) -> list[tuple[str, str]]:
  """(kind, shape on a device) of every collective of a compiled program."""
  kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
  found = re.findall(rf" = \(?(\w+\[[\d,]*\]).*? ({kinds})(?:-start)?\(", text)
  return [(kind, shape) for shape, kind in found]


@pytest.fixture(scope="module")
def ring():
  mesh = _mesh(context=4, tensor=2)
  return _shared(MASKS["all"], mesh, Choice("blockwise", "ring")).lower(*_draw()).compile()


@pytest.fixture(scope="module")
def ulysses():
  mesh = _mesh(context=4, tensor=2)
  return _shared(MASKS["all"], mesh, Choice("blockwise", "ulysses")).lower(*_draw()).compile()


def test_under_tensor_too(ring, ulysses):
  for program in (ring, ulysses):
    _close(program(*_draw()), _alone("all"))


def test_each_hop_of_the_ring_moves_the_part_of_one_device(ring):
  """Forward: k and v in the loop. Backward: k and v, and gradients, before, in and after it. Nothing else is sent."""
  part = f"f32[{ROWS},{N // 4},{HEADS // 2},{SIZE}]"
  assert _collectives(ring.as_text()) == [("collective-permute", part)] * (2 + 2 + 4 + 2)


def test_ulysses_is_four_all_to_alls_forward_and_four_back(ulysses):
  part = f"f32[{ROWS},{N // 4},{HEADS // 8},{SIZE}]"  # of each of the four that the device sends
  assert _collectives(ulysses.as_text()) == [("all-to-all", part)] * 8
  forward = _shared(MASKS["all"], _mesh(context=4, tensor=2), Choice(context="ulysses"))
  text = str(jax.make_jaxpr(forward)(*_draw()))
  assert text.count("all_to_all[") == 8


def test_a_mesh_without_context_sends_nothing_on_the_blockwise_road():
  """XLA's own partitioner gathers the operands of the loops over heads on every device."""
  program = _shared(MASKS["all"], _mesh(fsdp=2, tensor=4), Choice("blockwise")).lower(*_draw()).compile()
  assert _collectives(program.as_text()) == []
  _close(program(*_draw()), _alone("all"))


@pytest.mark.parametrize("groups", [pytest.param(1, marks=pytest.mark.drill), 2])
def test_grouped_heads_under_tensor_and_context(groups):
  mesh = _mesh(context=4, tensor=2)
  _close(_shared(MASKS["padded"], mesh, Choice())(*_draw(groups=groups)), _alone("padded", groups=groups))


def test_queries_in_parts_ask_the_whole_text():
  text = Mask(keys_BL=np.arange(13) < np.array([[9], [0]]))
  mesh, arrays = _mesh(fsdp=2, context=2, tensor=2), _draw(keys=13)
  program = _shared(text, mesh, Choice(), tokens=CROSS).lower(*arrays).compile()
  alone = jax.jit(lambda *arrays: jax.grad(_loss, (0, 1, 2), has_aux=True)(*arrays, text, CROSS, "reference"))
  _close(program(*arrays), alone(*arrays))
  assert {kind for kind, _ in _collectives(program.as_text())} == {"all-reduce"}  # of the text's gradients


@pytest.mark.parametrize("ways", [2, pytest.param(4, marks=pytest.mark.drill)])
def test_ring_around_the_tpu_kernel(ways):
  with lowering.interpreted():
    got = _shared(MASKS["all"], _mesh(context=ways), Choice("splash", "ring", (128,) * 6))(*_draw())
  _close(got, _alone("all"))


@pytest.mark.drill
def test_bfloat16_is_float32_up_to_its_rounding():
  """Parts of a row are rounded before they are merged: twice the tolerance of one device."""
  arrays = _draw(dtype=jnp.bfloat16)
  exact = jax.grad(_loss, (0, 1, 2), has_aux=True)(
    *(x.astype(np.float32) for x in arrays), MASKS["blocks"], SELF, "reference"
  )
  got = _shared(MASKS["blocks"], _mesh(context=4), Choice(context="ring"))(*arrays)
  assert got[1].dtype == jnp.bfloat16
  _close(got, exact, 0.06)


def test_a_saved_attention_is_not_repeated_on_the_mesh_and_forward_mode_goes_around():
  mesh = _mesh(context=2)

  def exponentials(policy):
    kept = jax.checkpoint(_loss, policy=policy, static_argnums=(4, 5, 6))
    return str(jax.make_jaxpr(_shared(Mask(), mesh, Choice("blockwise", "ring"), loss=kept))(*_draw())).count(" = exp ")

  names = jax.checkpoint_policies.save_only_these_names("attention")
  assert exponentials(names) < exponentials(jax.checkpoint_policies.nothing_saveable)

  def forward(q, k, v, g):
    with partition.placing(lambda x, axes: x, attend(mesh, RULES, Choice("blockwise", "ring"))):
      return jax.jvp(lambda q: _loss(q, k, v, g, Mask(), SELF, "auto")[0], (q,), (g,))[1]

  with lowering.forward_mode():
    slope = jax.jit(forward)(*_draw())
  np.testing.assert_allclose(slope, np.vdot(_alone("full")[0][0], _draw()[3]), rtol=1e-5)


WAN = {"tokens": 75_600, "heads": 40, "groups": 40, "item_bytes": 2}  # 14b at 720p, 81 frames


def test_the_ring_is_taken_where_its_hops_hide_or_heads_do_not_divide():
  choose = functools.partial(context.choose, "auto")
  assert choose(**WAN, ways=8) == "ulysses"  # on CPU nothing hides
  assert choose(**WAN, ways=16) == "ring"  # 40 heads
  with lowering.target("tpu", "v5p"):
    # A hop has n FLOPs a byte to hide behind: all of it from 5100 tokens a device on.
    assert choose(**WAN, ways=8) == "ring"
    assert choose(**WAN, ways=8, causal=True) == "ulysses"  # the first device would wait for the last
    assert choose(**WAN | {"tokens": 16_384}, ways=8) == "ulysses"
  with lowering.target("tpu", "tpu7x"):
    assert choose(**WAN, ways=8) == "ulysses"  # more FLOPs a byte of link: 25,600 tokens


def test_what_does_not_divide_is_refused_with_the_legal_sizes():
  assert context.sizes(48, 6, 8) == [1, 2, 3, 4, 6, 8]
  assert context.sizes(48, 6, 8, "ulysses") == [1, 2, 3, 6]
  with pytest.raises(MeshError, match=r"'ulysses' on 4 devices does not divide 6 heads.*legal sizes: 1, 2, 3, 6"):
    context.choose("ulysses", tokens=48, heads=6, groups=6, item_bytes=2, ways=4)
  with pytest.raises(MeshError, match=r"context=8 does not divide 44 tokens; legal sizes of context: 1, 2, 4"):
    _shared(Mask(), _mesh(context=8), Choice()).lower(*(x[:, :44] for x in _draw()))
  with pytest.raises(ConfigError, match="road 'reference' gives no logsumexp"):
    _shared(Mask(), _mesh(context=8), Choice("reference", "ring")).lower(*_draw())
  with pytest.raises(ConfigError, match="'attention.context' = 'ulises' is unknown; did you mean 'ulysses'"):
    Choice.of(ml_collections.ConfigDict({"attention": {"road": "auto", "context": "ulises", "splash_blocks": ()}}))


@pytest.mark.parametrize("rows", [1, ROWS])
def test_a_mask_of_pairs_is_cut_with_its_rows_and_not_over_tokens(rows):
  """One for all rows, or one a row; it is refused where tokens lie on several devices."""
  pairs_BNL = np.random.default_rng(1).random((rows, N, N)) < 0.3
  mask, (q, k, v, _) = Mask(pairs_BNL=jnp.asarray(pairs_BNL)), _draw()

  def run(q, k, v, mesh):
    with partition.placing(lambda x, axes: x, attend(mesh, RULES, Choice())):
      return attention(q, k, v, mask=mask, tokens=SELF)

  scores = np.einsum("bnke,blke->bknl", q, k) / np.sqrt(SIZE)
  p = np.where(pairs_BNL[:, None], np.exp(scores), 0)
  expected = np.einsum("bknl,blke->bnke", p / np.maximum(p.sum(-1, keepdims=True), 1e-30), v)
  cut = jax.jit(functools.partial(run, mesh=_mesh(fsdp=2, tensor=2)))
  np.testing.assert_allclose(cut(q, k, v), expected, atol=1e-5)
  with pytest.raises(MeshError, match="set context to 1"):
    run(q, k, v, _mesh(context=2))
