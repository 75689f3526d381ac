"""Names and sizes of DINOv2's vision transformers in Hugging Face's layout, with and without registers."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kling_jax.errors import WeightsError
from kling_jax.interop.names import LINEAR, SAME, Entry, patches, prefixed, recipes
from kling_jax.interop.safetensors import Built, Stacked
from kling_jax.models.vit import Blocks, Shape

PREFIXES = ("", "dinov2.", "dinov2_with_registers.")
OTHERS = ("*embeddings.mask_token", "classifier.*")
CLASS, TABLE, REGISTERS = "embeddings.cls_token", "embeddings.position_embeddings", "embeddings.register_tokens"


def prefix(names: Collection[str]) -> str | None:
  """What stands before all names; None where they are of another model."""
  return next((p for p in PREFIXES if p + CLASS in names and f"{p}encoder.layer.0.layer_scale1.lambda1" in names), None)


def held(names: Collection[str]) -> bool:
  """Whether the tensors are of a DINOv2."""
  return prefix(names) is not None


def read_config(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Shape:
  """The shape of the network in a file, from its tensors and, for its heads, its config.json (else heads of 64).

  Raises:
    WeightsError: no DINOv2, or one that is not built here.
  """
  before = prefix(tensors)
  if before is None:
    raise WeightsError("no DINOv2: wants embeddings.cls_token and encoder.layer.0.layer_scale1.lambda1")
  activation = str(facts.get("hidden_act", "gelu"))
  if activation != "gelu":
    raise WeightsError(f"config.json says hidden_act={activation!r}; gelu is built here")
  places, width = tensors[before + TABLE].shape[1:]
  kernel = tensors[before + "embeddings.patch_embeddings.projection.weight"]
  side, heads = round((places - 1) ** 0.5), int(facts.get("num_attention_heads", width // 64))
  if side**2 != places - 1 or kernel.shape[1] != 3 or kernel.shape[2] != kernel.shape[3] or heads < 1 or width % heads:
    raise WeightsError(f"a DINOv2 of {places - 1} places, patches of {kernel.shape[1:]}, {heads} heads over {width}")
  layers = {int(n.removeprefix(before).split(".")[2]) for n in tensors if n.startswith(before + "encoder.layer.")}
  gated = before + "encoder.layer.0.mlp.weights_in.weight" in tensors
  up = tensors[f"{before}encoder.layer.0.mlp.{'weights_in' if gated else 'fc1'}.bias"]
  blocks = Blocks(
    width=width, depth=1 + max(layers), heads=heads, hidden=len(up) // 2 if gated else len(up),
    mlp="swiglu" if gated else "gelu", layer_scale=True, epsilon=float(facts.get("layer_norm_eps", 1e-6)),
  )  # fmt: skip
  registers = tensors[before + REGISTERS].shape[1] if before + REGISTERS in tensors else 0
  # Those with registers were trained with antialiased positions.
  resampled = "cubic-antialias" if registers else "cubic"
  return Shape(blocks, patch=kernel.shape[2], side=side, pool="class", registers=registers, kernel=resampled)


def name_map(shape: Shape, names: Collection[str]) -> dict[str, str | Built | Stacked]:
  """Where each parameter of `Vit(shape)` lies in a file with these names."""
  before = prefix(names) or ""
  depth, width, side = shape.blocks.depth, shape.blocks.width, shape.side
  projection = "embeddings.patch_embeddings.projection."
  entries = {
    "patches.kernel": Entry(projection + "weight", patches((shape.patch,) * 2, 3)),
    "patches.bias": Entry(projection + "bias"),
    "norm.scale": Entry("layernorm.weight"),
    "norm.bias": Entry("layernorm.bias"),
  }
  block = "encoder.layer.{}."
  for number, branch in enumerate(("attention", "mlp"), 1):
    entries[f"blocks.{branch}_norm.scale"] = Entry(f"{block}norm{number}.weight", SAME, depth)
    entries[f"blocks.{branch}_norm.bias"] = Entry(f"{block}norm{number}.bias", SAME, depth)
    entries[f"blocks.{branch}_scale"] = Entry(f"{block}layer_scale{number}.lambda1", SAME, depth)
  parts = {
    f"attention.{ours}": f"attention.attention.{theirs}"
    for ours, theirs in zip("qkv", ("query", "key", "value"), strict=True)
  }
  parts["attention.out"] = "attention.output.dense"
  gated = shape.blocks.mlp == "swiglu"
  parts["mlp.up"], parts["mlp.down"] = ("mlp.weights_in", "mlp.weights_out") if gated else ("mlp.fc1", "mlp.fc2")
  for ours, theirs in parts.items():
    entries[f"blocks.{ours}.kernel"] = Entry(f"{block}{theirs}.weight", LINEAR, depth)
    entries[f"blocks.{ours}.bias"] = Entry(f"{block}{theirs}.bias", SAME, depth)
  found = recipes(prefixed(entries, theirs=before))
  found["positions"] = Built((before + TABLE,), lambda table: table[0, 1:].reshape(side, side, width))
  own = [CLASS, TABLE] + [REGISTERS] * (shape.registers > 0)
  found["first"] = Built(tuple(before + name for name in own), _first)
  return found


def _first(token: np.ndarray, table: np.ndarray, *registers: np.ndarray) -> np.ndarray:
  """The class token with its place, then the registers, which have none."""
  rows = [token[0].astype(np.float32) + table[0, :1], *(array[0] for array in registers)]
  return np.concatenate(rows, dtype=np.float32)
