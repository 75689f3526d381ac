"""LoRA as a pure function of flat parameters: kernels gain scale * A @ B; paths and modules stay as they are."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.errors import ConfigError, WeightsError
from kling_jax.nn.params import Params, flatten

A, B = ".lora_a", ".lora_b"


def init_lora(shapes: dict[str, Any], rank: int, match: str, *, key: jax.Array) -> Params:
  """Makes adapters for every kernel whose path matches the regular expression `match` somewhere.

  Args:
    shapes: flat {path: array or ShapeDtypeStruct} of the base model; kernels are (in, out) or stacked (S, in, out).
    rank: inner size r, at most min(in, out).
    match: for example r"attn\\.[qv]\\.kernel$".
    key: a typed key; each path draws from its own fold of it.

  Returns:
    {path + ".lora_a": (..., in, r) normal / sqrt(in), path + ".lora_b": (..., r, out) zeros}: at first the identity.

  Raises:
    ConfigError: nothing matches, or a rank that does not fit.
  """
  paths = sorted(path for path in shapes if path.endswith("kernel") and re.search(match, path))
  if not paths:
    raise ConfigError(f"LoRA pattern {match!r} matches no kernel; kernels are like {_example(shapes)!r}")
  lora: Params = {}
  for index, path in enumerate(paths):
    *stack, inputs, outputs = shapes[path].shape
    if not 0 < rank <= min(inputs, outputs):
      raise ConfigError(f"LoRA rank {rank} does not fit {path} ({inputs}, {outputs}); choose 1..{min(inputs, outputs)}")
    normal = jax.random.normal(jax.random.fold_in(key, index), (*stack, inputs, rank), jnp.float32)
    lora[path + A] = normal / jnp.sqrt(inputs)
    lora[path + B] = jnp.zeros((*stack, rank, outputs), jnp.float32)
  return lora


def merge_lora(params: Params, lora: Params, *, scale: float = 1.0) -> Params:
  """Returns `params` with W + scale * A @ B in place of every adapted kernel W; differentiable in all three.

  Raises:
    WeightsError: an adapter whose kernel is not in `params`.
  """
  merged = dict(params)
  for path in [name.removesuffix(A) for name in lora if name.endswith(A)]:
    if path not in params:
      raise WeightsError(f"LoRA adapter for {path!r}, which the model does not have; its kernels: {_example(params)!r}")
    kernel = params[path]
    merged[path] = kernel + (scale * (lora[path + A] @ lora[path + B])).astype(kernel.dtype)
  return merged


def adapters(module: nnx.Module, rank: int, match: str, *, rngs: nnx.Rngs) -> nnx.Dict:
  """`init_lora` for the kernels of `module` as parameters of a module, nested like their paths: `blocks.q.kernel.a`.

  They lie on a mesh as their kernels do; the rank stays whole.
  """
  leaves = flatten(nnx.state(module))
  lora = init_lora(leaves, rank, match, key=rngs.params())
  tree: dict[str, Any] = {}
  for path in sorted(name.removesuffix(A) for name in lora if name.endswith(A)):
    *stack, inputs, outputs = leaves[path].get_metadata()["axes"]
    node = tree
    for part in path.split("."):
      node = node.setdefault(part, {})
    node["a"] = nnx.Param(lora[path + A], axes=(*stack, inputs, None))
    node["b"] = nnx.Param(lora[path + B], axes=(*stack, None, outputs))
  return _module(tree)


def _module(tree: dict[str, Any]) -> nnx.Dict:
  return nnx.Dict({name: _module(node) if isinstance(node, dict) else node for name, node in tree.items()})


def of(params: Params, prefix: str) -> Params:
  """The adapters among flat parameters, by the paths of their kernels: `prefix` + "q.kernel.a" is "q.kernel.lora_a"."""
  inner = {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
  return {f"{name[:-2]}.lora_{name[-1]}": value for name, value in inner.items()}


def _example(shapes: dict[str, Any]) -> str:
  return next((path for path in sorted(shapes) if path.endswith("kernel")), "")
