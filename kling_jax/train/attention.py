"""How the devices of a mesh share attention: a `jax.shard_map` around the kernels, chosen for each call."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kling_jax.errors import ConfigError, MeshError, nearest
from kling_jax.nn import attention, context, partition, splash
from kling_jax.nn.mask import Mask


@dataclasses.dataclass(frozen=True)
class Choice:
  """The config keys `attention.*`.

  Attributes:
    road: which kernel computes attention where a call does not say so: `nn.attention.ROADS`.
    context: how tokens that lie on several devices attend to one another: `nn.context.WAYS`.
    splash_blocks: the largest blocks of the TPU kernel, in the order of `nn.splash.Blocks`; () for its table.
  """

  road: str = "auto"
  context: str = "auto"
  splash_blocks: tuple[int, ...] = ()

  def __post_init__(self):
    for key, value, known in (("road", self.road, attention.ROADS), ("context", self.context, context.WAYS)):
      if value not in known:
        raise ConfigError(f"config key 'attention.{key}' = {value!r} is unknown{nearest(value, known)}")
    if self.splash_blocks:
      splash.blocks(self.splash_blocks)

  @classmethod
  def of(cls, config: ml_collections.ConfigDict) -> "Choice":
    """The choice of a task's config; ConfigError names a wrong key."""
    return cls(**config.attention)


def attend(mesh: Mesh, rules: Mapping[str, tuple[str, ...]], choice: Choice) -> partition.Attend:
  """Returns what `partition.placing` takes as `attend`.

  Rows and heads are cut as `rules` say ({activation axis: mesh axes}), so that each device computes its own; where a
  size does not divide, each computes all. Tokens are cut over one mesh axis:

    queries and keys cut alike (self-attention)   ring or Ulysses, `nn.context.choose`
    queries cut, keys not (a text, a cache)       each device's queries against all keys
    neither                                       nothing to do

  Raises (the function that is returned):
    ConfigError, MeshError: a road or a way that cannot do what is asked; tokens that do not divide.
  """
  blocks = choice.splash_blocks or None

  def place(
    q_BNKE: jax.Array, k_BLGE: jax.Array, v_BLGE: jax.Array, mask: Mask, road: str, tokens: partition.Tokens
  ) -> jax.Array:
    road = choice.road if road == "auto" else road
    local = lambda q, k, v, mask: attention.on_one_device(q, k, v, mask, road, blocks)
    if mesh.size == 1:
      return local(q_BNKE, k_BLGE, v_BLGE, mask)
    rows = _cut(mesh, rules.get("batch", ()), q_BNKE.shape[0])
    heads = _cut(mesh, rules.get(partition.of(tokens[0] or "tokens", "heads"), ()), q_BNKE.shape[2])
    if k_BLGE.shape[2] % _ways(mesh, heads):
      k_BLGE, v_BLGE = (jnp.repeat(x, q_BNKE.shape[2] // x.shape[2], axis=2) for x in (k_BLGE, v_BLGE))
    axes = rules.get(tokens[0] or "", ())
    axis = axes[0] if _ways(mesh, axes) > 1 else ""
    if axis and mask.pairs_BNL is not None:
      raise MeshError(f"mesh axis {axis}={mesh.shape[axis]} cuts tokens whose mask is one of pairs; set {axis} to 1")
    way = "alone" if not axis else _way(mesh, choice, axis, _ways(mesh, heads), q_BNKE, k_BLGE, mask, tokens)
    if way == "ring":
      body: context.Local = functools.partial(context.ring, axis=axis, part=_kernel(road, blocks))
    elif way == "alone":
      body = local
    else:
      body = functools.partial(getattr(context, way), axis=axis, local=local)
    # An axis that no array is cut along costs a sum of gradients over it, even where its size is 1; so name those.
    named = {*(rows or ()), *(heads or ()), axis}
    rows = (*(rows or ()), *(name for name in mesh.axis_names if mesh.shape[name] == 1 and name not in named))
    arrays, rebuild = _split(mask)
    queries, keys = P(rows, axis or None, heads), P(rows, axis if way in ("ring", "ulysses") else None, heads)
    segments = P(rows, None if way == "ulysses" else axis or None)
    cut = {"keys_BL": P(rows), "q_BN": segments, "k_BL": P(rows)}
    cut["pairs_BNL"] = P(rows if arrays.get("pairs_BNL", q_BNKE).shape[0] > 1 else None)
    shared = jax.shard_map(
      lambda q, k, v, arrays: body(q, k, v, rebuild(arrays)),
      mesh=mesh,
      in_specs=(
        queries,
        keys,
        keys,
        {name: cut.get(name, P()) for name in arrays},
      ),
      out_specs=queries,
      check_vma=False,  # Pallas kernels do not say along which axes their results vary
    )
    return shared(q_BNKE, k_BLGE, v_BLGE, arrays)

  return place


def _way(
  mesh: Mesh,
  choice: Choice,
  axis: str,
  heads_ways: int,
  q_BNKE: jax.Array,
  k_BLGE: jax.Array,
  mask: Mask,
  tokens: partition.Tokens,
) -> str:
  """How queries that are cut over `axis` meet their keys: "ring", "ulysses" or "whole"."""
  queries, ways = q_BNKE.shape[1], mesh.shape[axis]
  if queries % ways:
    legal = ", ".join(map(str, context.sizes(queries, q_BNKE.shape[2] // heads_ways, mesh.size)))
    raise MeshError(f"mesh axis {axis}={ways} does not divide {queries} tokens; legal sizes of {axis}: {legal}")
  if tokens[0] != tokens[1] or k_BLGE.shape[1] != queries:
    return "whole"
  return context.choose(
    choice.context,
    tokens=queries,
    heads=q_BNKE.shape[2] // heads_ways,
    groups=k_BLGE.shape[2] // heads_ways,
    item_bytes=q_BNKE.dtype.itemsize,
    ways=ways,
    causal=mask.block is not None,
  )


def _kernel(road: str, blocks: tuple[int, ...] | None) -> attention.Kernel:
  """The kernel that a ring is built around."""
  obstacle = splash.obstacle()
  if road == "auto":
    road = "blockwise" if obstacle else "splash"
  if road == "splash" and obstacle:
    raise ConfigError(f"attention road 'splash' cannot do this: {obstacle}")
  if road not in ("blockwise", "splash"):
    raise ConfigError(
      f"attention road {road!r} gives no logsumexp to build a ring around; take splash (TPU) or blockwise, or a "
      "size of context that divides the heads of a device, for Ulysses"
    )
  return attention.kernel(road, blocks)


def _ways(mesh: Mesh, axes: tuple[str, ...] | None) -> int:
  return math.prod(mesh.shape[axis] for axis in axes or ())


def _cut(mesh: Mesh, axes: tuple[str, ...], size: int) -> tuple[str, ...] | None:
  return axes if axes and size % _ways(mesh, axes) == 0 else None


def _split(mask: Mask) -> tuple[dict[str, Any], Any]:
  """The arrays of a mask by name, and the function that puts them back; its Python numbers stay known while tracing."""
  q_BN, k_BL = mask.segments or (None, None)
  values = {"keys_BL": mask.keys_BL, "q_BN": q_BN, "k_BL": k_BL, "pairs_BNL": mask.pairs_BNL}
  values |= {name: getattr(mask, name) for name in ("offset", "start", "length")}
  arrays = {name: value for name, value in values.items() if isinstance(value, jax.Array | np.ndarray)}

  def rebuild(arrays: dict[str, Any]) -> Mask:
    changes = {name: arrays[name] for name in ("keys_BL", "pairs_BNL", "offset", "start", "length") if name in arrays}
    segments = (arrays["q_BN"], arrays["k_BL"]) if mask.segments is not None else None
    return dataclasses.replace(mask, **changes, segments=segments)

  return arrays, rebuild
