"""Names and sizes of Qwen3-VL in Hugging Face's layout: vision tower and decoder."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from kling_jax.errors import WeightsError
from kling_jax.interop import llama
from kling_jax.interop.names import LINEAR, SAME, Entry, Form, patches, prefixed
from kling_jax.interop.safetensors import Stacked
from kling_jax.models.qwen_vision import QwenVisionConfig
from kling_jax.models.qwen_vl import QwenVLConfig

TOWERS = ("model.visual.", "visual.")


def tower_of(names: Collection[str]) -> str | None:
  """What stands before the tower's names; None where there is no tower with a deep stack."""
  return next((prefix for prefix in TOWERS if f"{prefix}deepstack_merger_list.0.norm.weight" in names), None)


def read_config(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> QwenVLConfig:
  """The sizes of both parts.

  Raises:
    WeightsError: see `llama.read_config`; a tower of another form.
  """
  if facts.get("model_type") != "qwen3_vl":
    raise WeightsError(f"config.json says model_type={facts.get('model_type')!r}; the dense qwen3_vl is built here")
  tower = tower_of(tensors)
  assert tower is not None
  said = facts["vision_config"]
  if said.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
    raise WeightsError(f"vision_config says hidden_act={said['hidden_act']!r}; gelu_pytorch_tanh is built here")
  width, channels, frames, patch, _ = tensors[f"{tower}patch_embed.proj.weight"].shape
  places = tensors[f"{tower}pos_embed.weight"].shape[0]
  side = round(places**0.5)
  if channels != 3 or side**2 != places:
    raise WeightsError(f"a tower for {channels} channels with {places} positions; 3, and a square are built here")
  depth = 1 + max(int(name[len(tower) :].split(".")[1]) for name in tensors if name.startswith(f"{tower}blocks."))
  merge = int(said.get("spatial_merge_size", 2))
  vision = QwenVisionConfig(
    width=width, depth=depth, heads=int(said["num_heads"]), side=side, deep=tuple(said["deepstack_visual_indexes"]),
    mlp_width=tensors[f"{tower}blocks.0.mlp.linear_fc1.weight"].shape[0], patch=patch, frames=frames, merge=merge,
    out_width=tensors[f"{tower}merger.linear_fc2.weight"].shape[0],
  )  # fmt: skip
  if tensors[f"{tower}merger.linear_fc1.weight"].shape[1] != width * merge**2:
    raise WeightsError(f"vision_config says spatial_merge_size={merge}, which the merger's tensors deny")
  decoder = {name: tensors[name] for name in tensors if not name.startswith(tower)}
  tied = bool(facts.get("tie_word_embeddings", facts["text_config"].get("tie_word_embeddings", False)))
  language = llama.read_config(decoder, facts["text_config"], tied, kinds=("qwen3_vl_text",))
  if language.rope_sections is None:
    raise WeightsError("text_config has no mrope_section")
  tokens = {"picture_token": facts.get("image_token_id", 151655), "video_token": facts.get("video_token_id", 151656)}
  return QwenVLConfig(language, vision, **tokens)


def _third(number: int, form: Form) -> Callable[[np.ndarray], np.ndarray]:
  return lambda array: form.read(np.split(array, 3)[number])


def entries(config: QwenVLConfig, names: Collection[str]) -> dict[str, Entry]:
  """Where each parameter of `QwenVL(config)` lies, but for the joined queries, keys and values (`joined`)."""
  tower, prefix, vision = tower_of(names), llama.prefix_of(names), config.vision
  assert tower is not None and prefix is not None
  found = prefixed(llama.entries(config.language, prefix), "language.")
  size = (vision.frames, vision.patch, vision.patch)
  found["vision.patches.project.kernel"] = Entry(f"{tower}patch_embed.proj.weight", patches(size, 3))
  found["vision.patches.project.bias"] = Entry(f"{tower}patch_embed.proj.bias")
  found["vision.positions"] = Entry(f"{tower}pos_embed.weight")

  def both(ours: str, theirs: str, form: Form = SAME, layers: int | None = None, first: str = "scale") -> None:
    found[f"{ours}.{first}"] = Entry(f"{theirs}.weight", form, layers)
    found[f"{ours}.bias"] = Entry(f"{theirs}.bias", SAME, layers)

  block = tower + "blocks.{}."
  both("vision.layers.attention_norm", f"{block}norm1", layers=vision.depth)
  both("vision.layers.mlp_norm", f"{block}norm2", layers=vision.depth)
  for ours, theirs in (("attention.out", "attn.proj"), ("mlp.up", "mlp.linear_fc1"), ("mlp.down", "mlp.linear_fc2")):
    both(f"vision.layers.{ours}", block + theirs, LINEAR, vision.depth, "kernel")
  mergers = [("merger", "merger")] + [(f"deep.{k}", f"deepstack_merger_list.{k}") for k in range(len(vision.deep))]
  for ours, theirs in mergers:
    both(f"vision.{ours}.norm", f"{tower}{theirs}.norm")
    for part, name in (("up", "linear_fc1"), ("down", "linear_fc2")):
      both(f"vision.{ours}.{part}", f"{tower}{theirs}.{name}", LINEAR, first="kernel")
  return found


def joined(config: QwenVLConfig, names: Collection[str]) -> dict[str, Stacked]:
  """Queries, keys and values of the tower, which one tensor of each layer holds; the first two with rotary heads."""
  tower, heads, depth = tower_of(names), config.vision.heads, config.vision.depth
  found = {}
  for number, part in enumerate("qkv"):
    kernel = LINEAR if part == "v" else llama.rotated_kernel(heads)
    vector = SAME if part == "v" else llama.halves(heads)
    for ours, theirs, form in (("kernel", "weight", kernel), ("bias", "bias", vector)):
      layers = tuple(f"{tower}blocks.{layer}.attn.qkv.{theirs}" for layer in range(depth))
      found[f"vision.layers.attention.{part}.{ours}"] = Stacked(layers, _third(number, form))
  return found
