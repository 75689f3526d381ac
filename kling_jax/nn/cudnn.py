"""Attention through cuDNN's flash kernel for GPU, kept on its fast path: no mask arrays, only numbers of keys."""

import jax
import jax.numpy as jnp

from kling_jax.errors import ConfigError
from kling_jax.nn import lowering
from kling_jax.nn.mask import Mask

MOST_BLOCKS = 64  # causal blocks, each a call of its own


def obstacle(q_BNKE: jax.Array, k_BLKE: jax.Array, mask: Mask) -> str | None:
  """Why this road cannot do what is asked, or None; says what it can."""
  size, dtype = q_BNKE.shape[-1], q_BNKE.dtype
  # As `jax.nn.dot_product_attention` has it: heads up to 256 wide from Hopper on.
  hopper = jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) >= 9
  if lowering.platform() != "gpu":
    return f"it is a GPU library, and this is traced for {lowering.platform()}"
  if lowering.in_forward_mode():
    return "it has no forward derivative"
  if dtype not in (jnp.bfloat16, jnp.float16):
    return f"it computes in bfloat16 and float16, not in {dtype}; set precision=bfloat16"
  if size % 8 or size > (256 if hopper else 128):
    return f"a head of {size}; it takes multiples of 8 up to 128 (256 from Hopper on)"
  if mask.segments is not None:
    return "packed clips; it takes key padding, a cache's length, and causal blocks"
  if mask.block is None:
    return None
  if not (isinstance(mask.offset, int) and isinstance(mask.start, int)):
    return "causal blocks at places known only while running; offset and start must be Python integers"
  if mask.block > 1:
    blocks = len(_causal_blocks(mask, q_BNKE.shape[1], k_BLKE.shape[1]))
    return f"{blocks} causal blocks; at most {MOST_BLOCKS}, or blocks of one token" if blocks > MOST_BLOCKS else None
  plain = mask.keys_BL is None and mask.length is None and mask.offset == mask.start == 0
  return None if plain else "the ordinary causal mask with padding or a cache; alone it can"


def attention(q_BNKE: jax.Array, k_BLKE: jax.Array, v_BLKE: jax.Array, mask: Mask) -> jax.Array:
  """`nn.attention.attention` for what `obstacle` lets through; queries not yet divided by sqrt(E).

  cuDNN knows the ordinary causal mask but not the block-causal one, and a mask array would take it off its fast path.
  So each causal block is a call of its own, with the keys up to the block's end: the same arithmetic, nothing wasted.
  Hidden keys are moved behind the real ones, whose number cuDNN is told: the order of keys does not matter.
  """
  queries, keys = q_BNKE.shape[1], k_BLKE.shape[1]
  real_BL = mask.keys_BL
  if mask.length is not None:
    filled_BL = jnp.broadcast_to(jnp.arange(keys) < mask.length, (k_BLKE.shape[0], keys))
    real_BL = filled_BL if real_BL is None else real_BL & filled_BL
  if mask.block is None or mask.block == 1:
    return _call(q_BNKE, k_BLKE, v_BLKE, real_BL, causal=mask.block == 1)
  parts = []
  for first, last, limit in _causal_blocks(mask, queries, keys):
    real = None if real_BL is None else real_BL[:, :limit]
    q = q_BNKE[:, first:last]
    parts.append(_call(q, k_BLKE[:, :limit], v_BLKE[:, :limit], real) if limit > 0 else jnp.zeros_like(q))
  return jnp.concatenate(parts, axis=1)


def _causal_blocks(mask: Mask, queries: int, keys: int) -> list[tuple[int, int, int]]:
  """(first query, last query + 1, leading keys they see) of each causal block of a mask at known places."""
  assert mask.block is not None and isinstance(mask.offset, int) and isinstance(mask.start, int)
  blocks, first = [], 0
  while first < queries:
    index = (mask.offset + first - mask.start) // mask.block
    end = mask.start + (index + 1) * mask.block  # a place among the keys
    blocks.append((first, min(queries, end - mask.offset), min(keys, end)))
    first = blocks[-1][1]
  return blocks


def _call(q_BNKE, k_BLKE, v_BLKE, real_BL, causal: bool = False) -> jax.Array:
  queries, keys = q_BNKE.shape[1], k_BLKE.shape[1]
  number_B = None
  if real_BL is not None:
    order_BL = jnp.argsort(~real_BL, axis=1, stable=True)[..., None, None]
    k_BLKE, v_BLKE = (jnp.take_along_axis(x, order_BL, axis=1) for x in (k_BLKE, v_BLKE))
    number_B = jnp.sum(real_BL, axis=1, dtype=jnp.int32)
  elif keys % 2 and not causal:
    number_B = jnp.full((k_BLKE.shape[0],), keys, jnp.int32)
  # JAX refuses odd lengths under differentiation. A causal mask hides the added key from all but the added query.
  even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
  try:
    o_BNKE = jax.nn.dot_product_attention(
      even(q_BNKE),
      even(k_BLKE),
      even(v_BLKE),
      is_causal=causal,
      key_value_seq_lengths=None if number_B is None else jnp.maximum(number_B, 1),
      implementation="cudnn",
    )[:, :queries]
  except (NotImplementedError, RuntimeError) as error:  # the cuDNN or the GPU that is there cannot
    raise ConfigError(f"attention road 'cudnn': {error}; name another road") from error
  return o_BNKE if number_B is None else jnp.where(number_B[:, None, None, None] > 0, o_BNKE, 0)
