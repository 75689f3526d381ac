"""Names and sizes of SigLIP's and SigLIP 2's vision towers in Hugging Face's layout, alone or within a whole SigLIP.

SigLIP 2's checkpoints of one size are in SigLIP's layout (patches by a convolution), its NaFlex ones in SigLIP 2's
(patches by a product).
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kling_jax.errors import WeightsError
from kling_jax.interop.names import LINEAR, SAME, Entry, patches, prefixed, recipes
from kling_jax.interop.safetensors import Built, Stacked
from kling_jax.models.vit import Blocks, Shape

TOWER = "vision_model."  # before all names of a whole SigLIP; files of the tower alone may lack it
OTHERS = ("text_model.*", "logit_scale", "logit_bias", "*position_ids")
QUERY = "head.probe"


def prefix(names: Collection[str]) -> str | None:
  """What stands before the tower's names; None where there is none."""
  return next((p for p in (TOWER, "") if p + QUERY in names and p + "post_layernorm.weight" in names), None)


def held(names: Collection[str]) -> bool:
  """Whether the tensors hold such a tower with its pooling head."""
  return prefix(names) is not None


def read_config(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Shape:
  """The shape of the tower in a file, from its tensors and, for heads and activation, its config.json.

  Raises:
    WeightsError: no tower with its pooling head, or one that is not built here.
  """
  before = prefix(tensors)
  if before is None:
    raise WeightsError("no vision tower of SigLIP with its pooling head: wants vision_model.head.probe")
  facts = facts.get("vision_config") or facts
  activation = str(facts.get("hidden_act", "gelu_pytorch_tanh"))
  if activation != "gelu_pytorch_tanh":
    raise WeightsError(f"config.json says hidden_act={activation!r}; gelu_pytorch_tanh is built here")
  kernel = tensors[before + "embeddings.patch_embedding.weight"]
  width, places = kernel.shape[0], len(tensors[before + "embeddings.position_embedding.weight"])
  patch, side = round((kernel[0].size / 3) ** 0.5), round(places**0.5)
  heads = int(facts.get("num_attention_heads", 12))
  if side**2 != places or 3 * patch**2 != kernel[0].size or heads < 1 or width % heads:
    raise WeightsError(f"a tower of {places} places, patches of {kernel[0].size} values, {heads} heads over {width}")
  layers = {int(n.removeprefix(before).split(".")[2]) for n in tensors if n.startswith(before + "encoder.layers.")}
  blocks = Blocks(
    width=width, depth=1 + max(layers), heads=heads, mlp="gelu_tanh", epsilon=float(facts.get("layer_norm_eps", 1e-6)),
    hidden=len(tensors[before + "encoder.layers.0.mlp.fc1.bias"]),
  )  # fmt: skip
  resampled = "linear-antialias" if kernel.ndim == 2 else "cubic"
  return Shape(blocks, patch=patch, side=side, pool="attention", kernel=resampled)


def name_map(shape: Shape, names: Collection[str]) -> dict[str, str | Built | Stacked]:
  """Where each parameter of `Vit(shape)` lies in a file with these names."""
  before = prefix(names) or ""
  depth, width = shape.blocks.depth, shape.blocks.width
  flat = shape.kernel == "linear-antialias"
  entries = {
    "patches.kernel": Entry("embeddings.patch_embedding.weight", LINEAR if flat else patches((shape.patch,) * 2, 3)),
    "patches.bias": Entry("embeddings.patch_embedding.bias"),
  }
  for ours, theirs in (("norm", "post_layernorm"), ("pool.norm", "head.layernorm")):
    entries[f"{ours}.scale"], entries[f"{ours}.bias"] = Entry(f"{theirs}.weight"), Entry(f"{theirs}.bias")
  for ours, theirs in (("attention.out", "attention.out_proj"), ("mlp.up", "mlp.fc1"), ("mlp.down", "mlp.fc2")):
    entries[f"pool.{ours}.kernel"] = Entry(f"head.{theirs}.weight", LINEAR)
    entries[f"pool.{ours}.bias"] = Entry(f"head.{theirs}.bias")
  block = "encoder.layers.{}."
  for ours, theirs in (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
    entries[f"blocks.{ours}.scale"] = Entry(f"{block}{theirs}.weight", SAME, depth)
    entries[f"blocks.{ours}.bias"] = Entry(f"{block}{theirs}.bias", SAME, depth)
  parts = {f"attention.{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")}
  for ours, theirs in (parts | {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}).items():
    entries[f"blocks.{ours}.kernel"] = Entry(f"{block}{theirs}.weight", LINEAR, depth)
    entries[f"blocks.{ours}.bias"] = Entry(f"{block}{theirs}.bias", SAME, depth)
  found = recipes(prefixed(entries, theirs=before))
  side = shape.side
  found["positions"] = Built(
    (before + "embeddings.position_embedding.weight",), lambda table: table.reshape(side, side, width)
  )
  found["pool.query"] = Built((before + QUERY,), lambda query: query.reshape(width))
  for third, name in enumerate(("q", "k", "v")):  # one tensor holds all three
    rows = slice(third * width, (third + 1) * width)
    attention = before + "head.attention.in_proj_"
    found[f"pool.attention.{name}.kernel"] = Built((attention + "weight",), lambda array, rows=rows: array[rows].T)
    found[f"pool.attention.{name}.bias"] = Built((attention + "bias",), lambda array, rows=rows: array[rows])
  return found
