"""Names of Video Swin's weights, as published for Kinetics and by FAST-VQA and Koala-36M (with fragment tables)."""

from collections.abc import Mapping

import numpy as np

from kling_jax.errors import WeightsError
from kling_jax.interop.safetensors import Built
from kling_jax.models.video_swin import Shape

PATCH = "patch_embed.proj.weight"
# Buffers that follow from the window's size, and heads over other classes.
OTHERS = ("*relative_position_index", "*attn_mask", "cls_head.*", "vqa_head.*", "*_head.*")
_BLOCK = {
  "norm1": "norm1", "attention.qkv": "attn.qkv", "attention.out": "attn.proj", "norm2": "norm2", "up": "mlp.fc1",
  "down": "mlp.fc2",
}  # fmt: skip


def recipes(tensors: Mapping[str, np.ndarray], shape: Shape) -> dict[str, Built]:
  """For each parameter of a network of this shape the foreign tensors that it is made of.

  A prefix before `patch_embed` (backbone., fragments_backbone.) is found out. Gates of a shape are wanted in the file:
  weights trained on Kinetics have none, and start them as copies of the relative tables, as FAST-VQA does.

  Raises:
    WeightsError: no Video Swin.
  """
  found = next((name for name in tensors if name == PATCH or name.endswith("." + PATCH)), None)
  if found is None:
    raise WeightsError(f"no Video Swin: wants a tensor {PATCH}, with or without a prefix")
  prefix = found.removesuffix(PATCH)
  one = lambda name, build=_same: Built((prefix + name,), build)
  table = {
    "patch.kernel": one(PATCH, lambda w: w.transpose(2, 3, 4, 1, 0).reshape(-1, len(w))),
    "patch.bias": one("patch_embed.proj.bias"),
    "patch_norm.scale": one("patch_embed.norm.weight"),
    "patch_norm.bias": one("patch_embed.norm.bias"),
    "norm.scale": one("norm.weight"),
    "norm.bias": one("norm.bias"),
  }
  for s, depth in enumerate(shape.depths):
    for first, half in enumerate(("even", "odd")):
      stacked = lambda name, build=_same, s=s, depth=depth, first=first: Built(
        tuple(f"{prefix}layers.{s}.blocks.{b}.{name}" for b in range(first, depth, 2)),
        lambda *arrays: np.stack([build(array) for array in arrays]),
      )
      ours = f"stages.{s}.pairs.{half}."
      for name, theirs in _BLOCK.items():
        norm = name.startswith("norm")
        table[f"{ours}{name}.{'scale' if norm else 'kernel'}"] = stacked(f"{theirs}.weight", _same if norm else _turned)
        table[f"{ours}{name}.bias"] = stacked(f"{theirs}.bias")
      relative = "attn.relative_position_bias_table"
      table[f"{ours}attention.relative"] = stacked(relative)
      if shape.gated and shape.gated[s]:
        held = f"{prefix}layers.{s}.blocks.0.attn.fragment_position_bias_table" in tensors
        table[f"{ours}attention.fragment"] = stacked("attn.fragment_position_bias_table" if held else relative)
    if s < len(shape.depths) - 1:
      merge = f"layers.{s}.downsample."
      table[f"stages.{s}.merge.kernel"] = one(f"{merge}reduction.weight", _turned)
      table[f"stages.{s}.merge_norm.scale"] = one(f"{merge}norm.weight")
      table[f"stages.{s}.merge_norm.bias"] = one(f"{merge}norm.bias")
  return table


def _same(array: np.ndarray) -> np.ndarray:
  return array


def _turned(weight: np.ndarray) -> np.ndarray:
  return weight.T
