"""The one attention function and its roads: a plain reference, blockwise for CPU, splash for TPU, cuDNN for GPU."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kling_jax.errors import ConfigError, nearest
from kling_jax.nn import blockwise, cudnn, lowering, partition, splash
from kling_jax.nn.mask import Mask, Seen

ROADS = ("auto", "reference", "blockwise", "splash", "cudnn")
# "auto" leaves the reference from this many scores a head on. On CPU, up to 1024 tokens the reference and blockwise
# take the same time within the noise of a shared machine; from 512 on, the scores that the reference keeps for its
# backward pass are larger than everything else in a small model's layer.
MANY_SCORES = 512 * 512
EVERYTHING = Mask()


def attention(
  q_BNKE: jax.Array,
  k_BLKE: jax.Array,
  v_BLKE: jax.Array,
  *,
  mask: Mask = EVERYTHING,
  road: str = "auto",
  tokens: partition.Tokens = (None, None),
) -> jax.Array:
  """softmax(q k^T / sqrt(E)) v over the keys that `mask` shows, in float32 inside and the dtype of q outside.

  Args:
    q_BNKE: queries.
    k_BLKE, v_BLKE: keys and values; their number of heads may be a divisor of that of the queries (grouped heads).
    road: "reference" (all scores at once), "blockwise" (a few rows of scores at a time, in the products that XLA's
      CPU runs fastest), "splash" (TPU), "cudnn" (GPU), or "auto": the reference for small problems, and for large
      ones the road of the platform that is traced for, blockwise where that road cannot do what is asked.
    tokens: logical names of the tokens that ask and of those that are asked: a trainer may cut them over devices.

  Returns:
    (B, N, K, E). Rows of queries without a visible key are zero. Under a trainer's `partition.placing` the work is
    shared among devices as the trainer says.

  Raises:
    ConfigError: an unknown road, a road that cannot do what is asked, or heads that do not divide.
  """
  if road not in ROADS:
    raise ConfigError(f"attention road {road!r} does not exist{nearest(road, ROADS)}")
  heads, groups = q_BNKE.shape[2], k_BLKE.shape[2]
  if heads % groups:
    raise ConfigError(f"{heads} query heads do not divide into {groups} key heads; choose a divisor of {heads}")
  place = partition.attend()
  if place is not None:
    return place(q_BNKE, k_BLKE, v_BLKE, mask, road, tokens)
  return on_one_device(q_BNKE, k_BLKE, v_BLKE, mask, road)


def on_one_device(
  q_BNKE: jax.Array,
  k_BLKE: jax.Array,
  v_BLKE: jax.Array,
  mask: Mask,
  road: str = "auto",
  splash_blocks: tuple[int, ...] | None = None,
) -> jax.Array:
  """`attention` without a placement: what each device does on its own part."""
  road = choose(road, q_BNKE, k_BLKE, mask)
  if road == "cudnn":
    return checkpoint_name(cudnn.attention(q_BNKE, k_BLKE, v_BLKE, mask), "attention")
  q_BNKE = scaled(q_BNKE)
  if road == "reference":
    return checkpoint_name(_reference(q_BNKE, k_BLKE, v_BLKE, mask), "attention")
  seen = mask.seen(q_BNKE.shape[1], k_BLKE.shape[1])
  part = kernel(road, splash_blocks)
  if lowering.in_forward_mode():
    return part.forward(q_BNKE, k_BLKE, v_BLKE, seen)[0]
  return _attend(part, q_BNKE, k_BLKE, v_BLKE, seen)


def choose(road: str, q_BNKE: jax.Array, k_BLKE: jax.Array, mask: Mask) -> str:
  """The road to take: "auto" resolved, a named one checked.

  Raises:
    ConfigError: the named road cannot do what is asked; says what it can.
  """
  if road != "auto":
    obstacle = _obstacle(road, q_BNKE, k_BLKE, mask)
    if obstacle:
      raise ConfigError(f"attention road {road!r} cannot do this: {obstacle}")
    return road
  if mask.pairs_BNL is not None or q_BNKE.shape[1] * k_BLKE.shape[1] < MANY_SCORES:
    return "reference"
  own = {"tpu": "splash", "gpu": "cudnn"}.get(lowering.platform(), "blockwise")
  return "blockwise" if _obstacle(own, q_BNKE, k_BLKE, mask) else own


def _obstacle(road: str, q_BNKE: jax.Array, k_BLKE: jax.Array, mask: Mask) -> str | None:
  if mask.pairs_BNL is not None and road != "reference":
    return "a mask of pairs; only the reference takes one"
  if road == "splash":
    return splash.obstacle()
  return cudnn.obstacle(q_BNKE, k_BLKE, mask) if road == "cudnn" else None


def scaled(q_BNKE: jax.Array) -> jax.Array:
  """Queries divided by sqrt(E), as the kernels want them."""
  return q_BNKE * jnp.asarray(1 / math.sqrt(q_BNKE.shape[-1]), q_BNKE.dtype)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


_product = functools.partial(jax.custom_vjp, nondiff_argnums=(0,))(_einsum)


def _product_backward(equation, residuals, g):
  """The kernels' rule: the float32 gradient is rounded to the operands' dtype, or its products would be float32."""
  a, b = residuals
  left, right, result = re.split(",|->", equation)
  da = _product(f"{result},{right}->{left}", g.astype(b.dtype), b)
  db = _product(f"{result},{left}->{right}", g.astype(a.dtype), a)
  return da.astype(a.dtype), db.astype(b.dtype)


_product.defvjp(lambda equation, a, b: (_product(equation, a, b), (a, b)), _product_backward)


def _reference(q_BNKE, k_BLKE, v_BLKE, mask):
  product = _einsum if lowering.in_forward_mode() else _product
  queries, (keys, groups) = q_BNKE.shape[1], k_BLKE.shape[1:3]
  k_BLKE, v_BLKE = (jnp.repeat(x, q_BNKE.shape[2] // groups, axis=2) for x in (k_BLKE, v_BLKE))
  scores_BKNL = product("bnke,blke->bknl", q_BNKE, k_BLKE)
  visible = mask.visible(queries, keys)
  p_BKNL, inverse, _ = blockwise.softmax(scores_BKNL, None if visible is None else visible[:, None])
  p_BKNL = (p_BKNL * inverse).astype(v_BLKE.dtype)
  return product("bknl,blke->bnke", p_BKNL, v_BLKE).astype(q_BNKE.dtype)


# ---- kernels: a forward pass that also gives the logsumexp, and a backward pass that is told it --------------------


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A road as its two passes (see `blockwise.forward` and `blockwise.backward`): what ring attention is built of."""

  forward: Callable[..., tuple[jax.Array, jax.Array]]
  backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def kernel(road: str, splash_blocks: tuple[int, ...] | None = None) -> Kernel:
  """The kernel of the road "blockwise" or "splash"."""
  if road == "blockwise":
    return Kernel(blockwise.forward, blockwise.backward)
  sizes = splash.blocks(splash_blocks)
  return Kernel(functools.partial(splash.forward, largest=sizes), functools.partial(splash.backward, largest=sizes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(part: Kernel, q_BNKE: jax.Array, k_BLKE: jax.Array, v_BLKE: jax.Array, seen: Seen) -> jax.Array:
  return part.forward(q_BNKE, k_BLKE, v_BLKE, seen)[0]


def _attend_forward(part, q_BNKE, k_BLKE, v_BLKE, seen):
  o_BNKE, lse_BKN = named(*part.forward(q_BNKE, k_BLKE, v_BLKE, seen))
  return o_BNKE, (q_BNKE, k_BLKE, v_BLKE, seen, o_BNKE, lse_BKN)


def _attend_backward(part, residuals, do_BNKE):
  gradients = part.backward(*residuals, do_BNKE)
  return *(gradient.astype(x.dtype) for gradient, x in zip(gradients, residuals[:3], strict=True)), None


_attend.defvjp(_attend_forward, _attend_backward)


def named(o_BNKE: jax.Array, lse_BKN: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Output and logsumexp under the name "attention".

  Named where they arise and not after the road: a remat policy that saves "attention" then keeps all that the
  backward pass needs of the kernel, and repeats none of it.
  """
  return checkpoint_name(o_BNKE, "attention"), checkpoint_name(lse_BKN, "attention")
