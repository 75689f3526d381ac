"""Context parallelism: attention over tokens that lie on several devices, as a ring or by exchanging heads for tokens.

The functions that take an `axis` are bodies for `jax.shard_map`: they see the part of one device, and reach the others
along the mesh axis of that name. Which mesh there is, is the trainer's business.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kling_jax.errors import ConfigError, MeshError, nearest
from kling_jax.nn import attention, lowering
from kling_jax.nn.blockwise import HIDDEN
from kling_jax.nn.mask import Mask, Seen

WAYS = ("auto", "ring", "ulysses")

# bf16 FLOPs that a chip can do while one byte crosses one link of its torus in one direction: "How to Scale Your Model"
# (jax-ml.github.io/scaling-book), tables of FLOP/s and of ICI bandwidth per link.
FLOPS_PER_BYTE = {
  "v4": 2.75e14 / 4.5e10,
  "v5e": 1.97e14 / 4.5e10,
  "v5p": 4.59e14 / 9.0e10,
  "v6e": 9.20e14 / 9.0e10,
  "tpu7x": 2.30e15 / 9.0e10,
}


# ---- which of the two ----------------------------------------------------------------------------------------------


def sizes(tokens: int, heads: int, devices: int, asked: str = "auto") -> list[int]:
  """The context sizes, up to `devices`, that self-attention over `tokens` tokens may be spread over.

  Args:
    tokens: video tokens of a row; every size divides them. They are not padded: refuse what does not divide.
    heads: heads of one device, that is, after the tensor axis. Under "ulysses" the size divides them too.
    asked: "auto", "ring" or "ulysses".
  """
  _check(asked)
  fits = lambda size: tokens % size == 0 and (asked != "ulysses" or heads % size == 0)
  return [size for size in range(1, devices + 1) if fits(size)]


def choose(
  asked: str, *, tokens: int, heads: int, groups: int, item_bytes: int, ways: int, causal: bool = False
) -> str:
  """ "ring" or "ulysses" for self-attention over `tokens` tokens on `ways` devices.

  Ulysses needs heads that divide; where they do not, it is the ring. Where they do, the cheaper one under this model
  of one forward pass, in FLOPs of time that a device stands idle, per unit of batch and of head size (r is
  FLOPS_PER_BYTE, and n = tokens / ways):

    ulysses:  r (2 heads + 2 groups) tokens item_bytes / 8
    ring:     (ways - 1) max(0, r 2 groups n item_bytes - 4 n^2 heads)
              + (ways - 1) / ways * 2 tokens n heads        only under a causal mask

  An all-to-all of an array takes a quarter of the time of its all-gather over both directions of a ring of links, and
  nothing hides it: attention waits for it, and its output projection. A hop of the ring sends keys and values over one
  link while the hop before is computed; what is longer remains. Under a causal mask the last device has work at every
  hop and the first at one only, half of the work being waited for; after an exchange of heads all have the same.
  Where no figure is known (CPU, GPU), transfers are taken not to overlap, and Ulysses wins by its bytes.

  Raises:
    ConfigError: an unknown `asked`.
    MeshError: "ulysses" is asked for, and the heads do not divide.
  """
  _check(asked)
  divides = heads % ways == 0 and groups % ways == 0
  if asked == "ulysses" and not divides:
    raise MeshError(
      f"context attention 'ulysses' on {ways} devices does not divide {heads} heads ({groups} of keys) a device; legal "
      f"sizes: {', '.join(map(str, (n for n in range(1, groups + 1) if heads % n == groups % n == 0)))}; or ring"
    )
  if asked != "auto" or not divides:
    return "ring" if asked == "auto" else asked
  balance = FLOPS_PER_BYTE.get(lowering.generation() or "")
  if balance is None:
    return "ulysses"
  n = tokens // ways
  exchange = balance * (2 * heads + 2 * groups) * tokens * item_bytes / 8
  hops = (ways - 1) * max(0.0, balance * 2 * groups * n * item_bytes - 4 * n * n * heads)
  waiting = (ways - 1) / ways * 2 * tokens * n * heads if causal else 0.0
  return "ring" if hops + waiting < exchange else "ulysses"


def _check(asked: str) -> None:
  if asked not in WAYS:
    raise ConfigError(f"context attention {asked!r} does not exist{nearest(asked, WAYS)}")


# ---- bodies --------------------------------------------------------------------------------------------------------

Local = Callable[[jax.Array, jax.Array, jax.Array, Mask], jax.Array]


def whole(q_BNKE: jax.Array, k_BLGE: jax.Array, v_BLGE: jax.Array, mask: Mask, *, axis: str, local: Local) -> jax.Array:
  """This device's queries against all keys: cross-attention to a text that every device holds.

  `mask` counts from the first query of the first device; its segments of queries are those of this device.
  """
  place = mask.offset + jax.lax.axis_index(axis) * q_BNKE.shape[1]
  return local(q_BNKE, k_BLGE, v_BLGE, mask if mask.block is None else dataclasses.replace(mask, offset=place))


def ulysses(q_BNKE: jax.Array, k_BNGE: jax.Array, v_BNGE: jax.Array, mask: Mask, *, axis: str, local: Local):
  """Exchanges heads for tokens, attends over all tokens with a part of the heads, and exchanges back.

  DeepSpeed-Ulysses, arXiv 2309.14509: four all-to-alls forward (q, k, v, output), four backward. `mask` is that of all
  tokens.
  """
  to_heads = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=2, concat_axis=1, tiled=True)
  to_tokens = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=1, concat_axis=2, tiled=True)
  return to_tokens(local(to_heads(q_BNKE), to_heads(k_BNGE), to_heads(v_BNGE), mask))


def ring(
  q_BNKE: jax.Array, k_BNGE: jax.Array, v_BNGE: jax.Array, mask: Mask, *, axis: str, part: attention.Kernel
) -> jax.Array:
  """Sends the keys and values of each device around, and merges what each part of them gives by its logsumexp.

  Ring attention, arXiv 2310.01889. In the backward pass keys and values go around once more, with their gradients.
  `mask` counts from the first query of the first device; its segments of queries are those of this device, its keys
  and segments of keys those of all.
  """
  n = q_BNKE.shape[1]
  place = mask.offset + jax.lax.axis_index(axis) * n
  seen = dataclasses.replace(mask, offset=place).seen(n, n * jax.lax.axis_size(axis))
  arrays = attention.scaled(q_BNKE), k_BNGE, v_BNGE, seen
  if lowering.in_forward_mode():
    return _around(part, axis, *arrays)[0]
  return _ring(part, axis, *arrays)


def _next(axis: str, tree):
  """What the device before sends, while this one sends its own to the device after."""
  ways = jax.lax.axis_size(axis)
  return jax.lax.ppermute(tree, axis, [(i, (i + 1) % ways) for i in range(ways)])


def _shard(seen: Seen, axis: str, hop: jax.Array | int, length: int) -> Seen:
  """What is seen of the keys that are here after `hop` hops."""
  ways = jax.lax.axis_size(axis)
  return seen.shard((jax.lax.axis_index(axis) - hop) % ways * length, length)


def _around(part, axis, q_BNKE, k_BNGE, v_BNGE, seen):
  ways, length = jax.lax.axis_size(axis), k_BNGE.shape[1]

  def visit(o, lse, k, v, hop):
    o_here, lse_here = part.forward(q_BNKE, k, v, _shard(seen, axis, hop, length))
    both = jnp.logaddexp(lse, lse_here)
    weight = lambda lse: jnp.exp(lse - both).swapaxes(1, 2)[..., None]
    return o * weight(lse) + o_here * weight(lse_here), both

  def hop(carry, number):
    o, lse, k, v = carry
    after = _next(axis, (k, v))  # under way while this part is computed
    return (*visit(o, lse, k, v, number), *after), None

  o, lse = jnp.zeros(q_BNKE.shape, jnp.float32), jnp.full((*q_BNKE.shape[:1], *q_BNKE.shape[2:0:-1]), HIDDEN)
  (o, lse, k, v), _ = jax.lax.scan(hop, (o, lse, k_BNGE, v_BNGE), jnp.arange(ways - 1))
  o, lse = visit(o, lse, k, v, ways - 1)
  return o.astype(q_BNKE.dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(part, axis, q_BNKE, k_BNGE, v_BNGE, seen):
  return _around(part, axis, q_BNKE, k_BNGE, v_BNGE, seen)[0]


def _ring_forward(part, axis, q_BNKE, k_BNGE, v_BNGE, seen):
  o_BNKE, lse_BKN = attention.named(*_around(part, axis, q_BNKE, k_BNGE, v_BNGE, seen))
  return o_BNKE, (q_BNKE, k_BNGE, v_BNGE, seen, o_BNKE, lse_BKN)


def _ring_backward(part, axis, residuals, do_BNKE):
  q_BNKE, k_BNGE, v_BNGE, seen, o_BNKE, lse_BKN = residuals
  ways, length = jax.lax.axis_size(axis), k_BNGE.shape[1]

  def visit(k, v, hop):
    gradients = part.backward(q_BNKE, k, v, _shard(seen, axis, hop, length), o_BNKE, lse_BKN, do_BNKE)
    return tuple(x.astype(jnp.float32) for x in gradients)

  def hop(carry, number):
    k, v, dq, dk, dv = carry
    # The gradients follow one hop behind their keys, so that they too are under way while this part is computed.
    after, (dk, dv) = _next(axis, (k, v)), _next(axis, (dk, dv))
    dq_here, dk_here, dv_here = visit(k, v, number)
    return (*after, dq + dq_here, dk + dk_here, dv + dv_here), None

  carry = *_next(axis, (k_BNGE, v_BNGE)), *visit(k_BNGE, v_BNGE, 0)
  (_, _, dq, dk, dv), _ = jax.lax.scan(hop, carry, jnp.arange(1, ways))
  dk, dv = _next(axis, (dk, dv))
  return dq.astype(q_BNKE.dtype), dk.astype(k_BNGE.dtype), dv.astype(v_BNGE.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)
