"""Models as flat dicts of plain arrays: split once at the edge, merge inside the traced function.

`jax.jit` over `{"blocks.attn.q.kernel": array, ...}` costs about a twentieth of `nnx.jit` per call and is what the
trainer, the checkpoints and the importers hold. The graph definition (a static, hashable value) carries the rest.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

Params = dict[str, jax.Array]


def flatten(state: nnx.State) -> dict[str, Any]:
  """Maps an NNX state to {dotted path: Variable or array}; list indices become digits."""
  return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def unflatten(params: dict[str, Any]) -> nnx.State:
  """The inverse of `flatten`."""
  path = lambda name: tuple(int(part) if part.isdigit() else part for part in name.split("."))
  return nnx.from_flat_state([(path(name), value) for name, value in params.items()])


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
  """Returns the graph definition of `module` and its parameters as a flat dict of plain arrays."""
  graph, state = nnx.split(module)
  return graph, {name: leaf[...] for name, leaf in flatten(state).items()}


def merge(graph: nnx.GraphDef, params: dict[str, Any]) -> Any:
  """Rebuilds the module of `graph` around `params`; cheap enough to sit inside every traced function."""
  return nnx.merge(graph, unflatten(params))


def abstract(
  init: Callable[[], nnx.Module],
) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct], dict[str, tuple[str | None, ...]]]:
  """Describes the module that `init` would build, without making an array.

  Returns:
    Its graph definition, {path: ShapeDtypeStruct}, and {path: logical axis names}. A parameter without an `axes`
    metadata key gets a name of None for each dimension, which every sharding table replicates.
  """
  graph, state = nnx.split(nnx.eval_shape(init))
  leaves = flatten(state)
  shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
  axes = {name: tuple(leaf.get_metadata().get("axes") or (None,) * len(leaf.shape)) for name, leaf in leaves.items()}
  return graph, shapes, axes


def create(init: Callable[[], nnx.Module], shardings: Mapping[str, jax.sharding.Sharding] | None = None) -> Params:
  """Builds the parameters of `init()` inside one jit, each born with its sharding (no full copy on any device)."""
  build = lambda: {name: leaf[...] for name, leaf in flatten(nnx.state(init())).items()}
  return jax.jit(build, out_shardings=shardings)()


def count(params: dict[str, Any]) -> int:
  """The number of scalars in `params` (arrays or ShapeDtypeStructs)."""
  return sum(leaf.size for leaf in params.values())
