"""Names of ConvNeXt's weights, in Hugging Face's and in timm's naming, as what `models.convnext` is made of."""

from collections.abc import Mapping

import numpy as np

from kling_jax.errors import WeightsError
from kling_jax.interop.safetensors import Built
from kling_jax.models.convnext import Shape

_HUGGING_FACE = {
  "patch": "embeddings.patch_embeddings", "patch_norm": "embeddings.layernorm",
  "merge_norm": "encoder.stages.{s}.downsampling_layer.0", "merge": "encoder.stages.{s}.downsampling_layer.1",
  "block": "encoder.stages.{s}.layers.{b}.", "depthwise": "dwconv", "norm": "layernorm", "up": "pwconv1",
  "down": "pwconv2", "scale": "layer_scale_parameter", "last": "layernorm", "classifier": "classifier",
}  # fmt: skip
_TIMM = {
  "patch": "stem.0", "patch_norm": "stem.1", "merge_norm": "stages.{s}.downsample.0",
  "merge": "stages.{s}.downsample.1", "block": "stages.{s}.blocks.{b}.", "depthwise": "conv_dw", "norm": "norm",
  "up": "mlp.fc1", "down": "mlp.fc2", "scale": "gamma", "last": "head.norm", "classifier": "head.fc",
}  # fmt: skip


def recipes(tensors: Mapping[str, np.ndarray], shape: Shape) -> dict[str, Built]:
  """For each parameter of a network of this shape the foreign tensors that it is made of; the naming is found out.

  Raises:
    WeightsError: neither naming.
  """
  for names in (_HUGGING_FACE, _TIMM):
    ends = f"{names['patch']}.weight"
    found = next((name for name in tensors if name == ends or name.endswith("." + ends)), None)
    if found:
      return _recipes(found.removesuffix(ends), names, shape)
  raise WeightsError(f"no ConvNeXt: wants {_HUGGING_FACE['patch']}.weight (Hugging Face) or stem.0.weight (timm)")


def _recipes(prefix: str, names: Mapping[str, str], shape: Shape) -> dict[str, Built]:
  one = lambda name, build=_same: Built((prefix + name,), build)
  table = {
    "patch.kernel": one(f"{names['patch']}.weight", _patches),
    "patch.bias": one(f"{names['patch']}.bias"),
    "patch_norm.scale": one(f"{names['patch_norm']}.weight"),
    "patch_norm.bias": one(f"{names['patch_norm']}.bias"),
  }
  # Hugging Face's bare model has `layernorm` where one with a classifier has `convnext.layernorm`.
  table["norm.scale"], table["norm.bias"] = one(f"{names['last']}.weight"), one(f"{names['last']}.bias")
  if shape.classes:
    head = names["classifier"] if names is _HUGGING_FACE else prefix + names["classifier"]
    table["classifier.kernel"] = Built((f"{head}.weight",), _turned)
    table["classifier.bias"] = Built((f"{head}.bias",), _same)
  for s, depth in enumerate(shape.depths):
    ours = f"stages.{s}."
    if s:
      norm, merge = names["merge_norm"].format(s=s), names["merge"].format(s=s)
      table[f"{ours}norm.scale"], table[f"{ours}norm.bias"] = one(f"{norm}.weight"), one(f"{norm}.bias")
      table[f"{ours}merge.kernel"] = one(f"{merge}.weight", _patches)
      table[f"{ours}merge.bias"] = one(f"{merge}.bias")
    stacked = lambda name, build=_same, s=s, depth=depth: Built(
      tuple(prefix + names["block"].format(s=s, b=b) + name for b in range(depth)),
      lambda *arrays: np.stack([build(array) for array in arrays]),
    )
    ours += "blocks."
    table[f"{ours}depthwise"] = stacked(f"{names['depthwise']}.weight", lambda w: w[:, 0].transpose(1, 2, 0))
    table[f"{ours}depthwise_bias"] = stacked(f"{names['depthwise']}.bias")
    table[f"{ours}norm.scale"] = stacked(f"{names['norm']}.weight")
    table[f"{ours}norm.bias"] = stacked(f"{names['norm']}.bias")
    for part in ("up", "down"):
      table[f"{ours}{part}.kernel"] = stacked(f"{names[part]}.weight", _turned)
      table[f"{ours}{part}.bias"] = stacked(f"{names[part]}.bias")
    table[f"{ours}scale"] = stacked(names["scale"])
  return table


def _same(array: np.ndarray) -> np.ndarray:
  return array


def _turned(weight: np.ndarray) -> np.ndarray:
  return weight.T


def _patches(weight: np.ndarray) -> np.ndarray:
  """A convolution (out, channel, row, column) as a product with patches in the order row, column, channel."""
  return weight.transpose(2, 3, 1, 0).reshape(-1, len(weight))
