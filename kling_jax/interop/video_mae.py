"""Names and sizes of VideoMAE's encoder in Hugging Face's layout: pretrained, fine-tuned, or the encoder alone."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kling_jax.errors import WeightsError
from kling_jax.interop.names import LINEAR, SAME, Entry, patches, recipes
from kling_jax.interop.safetensors import Built, Stacked
from kling_jax.models.video_mae import Shape
from kling_jax.models.vit import Blocks

PREFIXES = ("videomae.", "")
OTHERS = ("decoder.*", "encoder_to_decoder.*", "mask_token", "position_embeddings", "classifier.*")
PATCHES = "embeddings.patch_embeddings.projection."
# Where the norm lies: of fine-tuned weights behind the mean, of pretrained ones before it, or nowhere.
NORMS = {"mean": "fc_norm.", "tokens": "layernorm."}


def prefix(names: Collection[str]) -> str | None:
  """What stands before the encoder's names; None where they are of another model."""
  return next(
    (p for p in PREFIXES if p + PATCHES + "weight" in names and f"{p}encoder.layer.0.layernorm_before.weight" in names),
    None,
  )


def held(names: Collection[str]) -> bool:
  """Whether the tensors are of a VideoMAE."""
  return prefix(names) is not None


def read_config(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Shape:
  """The shape of the encoder in a file, from its tensors and, for heads and sizes of videos, its config.json.

  Raises:
    WeightsError: no VideoMAE, or one that is not built here.
  """
  before = prefix(tensors)
  if before is None or tensors[before + PATCHES + "weight"].ndim != 5:
    raise WeightsError("no VideoMAE: wants embeddings.patch_embeddings.projection.weight, a convolution over tubes")
  activation = str(facts.get("hidden_act", "gelu"))
  if activation != "gelu":
    raise WeightsError(f"config.json says hidden_act={activation!r}; gelu is built here")
  width, colours, tube, patch, _ = tensors[before + PATCHES + "weight"].shape
  frames, image = int(facts.get("num_frames", 16)), int(facts.get("image_size", 224))
  heads = int(facts.get("num_attention_heads", 12))
  if colours != 3 or heads < 1 or width % heads or frames % tube or image % patch:
    raise WeightsError(
      f"a VideoMAE of {heads} heads over {width}, {frames} frames of {image}, tubes of {tube} x {patch}"
    )
  layers = {int(n.removeprefix(before).split(".")[2]) for n in tensors if n.startswith(before + "encoder.layer.")}
  norm = next((kind for kind in NORMS if _norm(kind, before) + "weight" in tensors), "none")
  blocks = Blocks(
    width=width, depth=1 + max(layers), heads=heads, epsilon=float(facts.get("layer_norm_eps", 1e-12)),
    hidden=len(tensors[before + "encoder.layer.0.intermediate.dense.bias"]),
  )  # fmt: skip
  return Shape(blocks, patch=patch, tube=tube, frames=frames, image=image, norm=norm)


def _norm(kind: str, before: str) -> str:
  return NORMS[kind] if kind == "mean" else before + NORMS[kind]


def name_map(shape: Shape, names: Collection[str]) -> dict[str, str | Built | Stacked]:
  """Where each parameter of `VideoMae(shape)` lies in a file with these names."""
  before = prefix(names) or ""
  depth = shape.blocks.depth
  block = before + "encoder.layer.{}."
  entries = {
    "patches.project.kernel": Entry(before + PATCHES + "weight", patches((shape.tube, shape.patch, shape.patch), 3)),
    "patches.project.bias": Entry(before + PATCHES + "bias"),
  }
  if shape.norm != "none":
    theirs = _norm(shape.norm, before)
    entries["norm.scale"], entries["norm.bias"] = Entry(theirs + "weight"), Entry(theirs + "bias")
  for ours, theirs in (("attention_norm", "layernorm_before"), ("mlp_norm", "layernorm_after")):
    entries[f"blocks.{ours}.scale"] = Entry(f"{block}{theirs}.weight", SAME, depth)
    entries[f"blocks.{ours}.bias"] = Entry(f"{block}{theirs}.bias", SAME, depth)
  dense = {"attention.out": "attention.output.dense", "mlp.up": "intermediate.dense", "mlp.down": "output.dense"}
  for ours, theirs in dense.items():
    entries[f"blocks.{ours}.kernel"] = Entry(f"{block}{theirs}.weight", LINEAR, depth)
    entries[f"blocks.{ours}.bias"] = Entry(f"{block}{theirs}.bias", SAME, depth)
  attention = block + "attention.attention."
  for ours, theirs in zip("qkv", ("query", "key", "value"), strict=True):
    entries[f"blocks.attention.{ours}.kernel"] = Entry(f"{attention}{theirs}.weight", LINEAR, depth)
  for ours in "qv":
    entries[f"blocks.attention.{ours}.bias"] = Entry(f"{attention}{ours}_bias", SAME, depth)
  found = recipes(entries)
  # Keys have no bias.
  keys = entries["blocks.attention.k.kernel"].names
  found["blocks.attention.k.bias"] = Stacked(keys, lambda weight: np.zeros_like(weight[:, 0]))
  return found
