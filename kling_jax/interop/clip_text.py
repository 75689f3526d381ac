"""Names and sizes of CLIP's text tower in Hugging Face's layout, alone or within a whole CLIP."""

import fnmatch
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kling_jax.errors import WeightsError
from kling_jax.interop.names import LINEAR, SAME, Entry
from kling_jax.models.clip_text import ACTIVATIONS, ClipTextConfig

TOWER = "text_model."
# Of a whole CLIP and of old files: what the tower does not take.
OTHERS = ("vision_model.*", "visual_projection.*", "logit_scale", "*position_ids")
PROJECTION = "text_projection.weight"


def entries(config: ClipTextConfig) -> dict[str, Entry]:
  """Where each parameter of `ClipTextEncoder(config)` lies."""
  block = TOWER + "encoder.layers.{}."
  found = {
    "table": Entry(TOWER + "embeddings.token_embedding.weight"),
    "positions": Entry(TOWER + "embeddings.position_embedding.weight"),
    "norm.scale": Entry(TOWER + "final_layer_norm.weight"),
    "norm.bias": Entry(TOWER + "final_layer_norm.bias"),
  }
  for ours, theirs in (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
    found[f"blocks.{ours}.scale"] = Entry(f"{block}{theirs}.weight", SAME, config.depth)
    found[f"blocks.{ours}.bias"] = Entry(f"{block}{theirs}.bias", SAME, config.depth)
  parts = {f"attention.{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")}
  for ours, theirs in (parts | {"up": "mlp.fc1", "down": "mlp.fc2"}).items():
    found[f"blocks.{ours}.kernel"] = Entry(f"{block}{theirs}.weight", LINEAR, config.depth)
    found[f"blocks.{ours}.bias"] = Entry(f"{block}{theirs}.bias", SAME, config.depth)
  if config.projection:
    found["projection.kernel"] = Entry(PROJECTION, LINEAR)
  return found


def held(names: Collection[str]) -> bool:
  """Whether the tensors hold a text tower."""
  return TOWER + "embeddings.token_embedding.weight" in names


def unused(names: Collection[str]) -> list[str]:
  """The tensors that the tower does not take and that are no surprise."""
  return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in OTHERS)]


def read_config(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> ClipTextConfig:
  """The shape of the tower in a file, from its tensors and, for heads and activation, its config.json.

  Raises:
    WeightsError: an activation that is not built here.
  """
  facts = facts.get("text_config") or facts
  vocabulary, width = tensors[TOWER + "embeddings.token_embedding.weight"].shape
  activation = str(facts.get("hidden_act", "quick_gelu"))
  if activation not in ACTIVATIONS:
    raise WeightsError(f"config.json says hidden_act={activation!r}; built here: {', '.join(ACTIVATIONS)}")
  if facts.get("layer_norm_eps", 1e-5) != 1e-5:
    raise WeightsError(f"config.json says layer_norm_eps={facts['layer_norm_eps']}; 1e-5 is built here")
  return ClipTextConfig(
    vocabulary=vocabulary, width=width, length=len(tensors[TOWER + "embeddings.position_embedding.weight"]),
    depth=1 + max(int(name.split(".")[3]) for name in tensors if name.startswith(TOWER + "encoder.layers.")),
    heads=int(facts.get("num_attention_heads") or max(1, width // 64)),
    mlp_width=tensors[TOWER + "encoder.layers.0.mlp.fc1.weight"].shape[0],
    projection=tensors[PROJECTION].shape[0] if PROJECTION in tensors else None,
    activation=activation,
  )  # fmt: skip
