"""Names and sizes of Wan 2.1's text-to-video transformer: as diffusers stores it, and as its authors released it."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kling_jax.errors import WeightsError
from kling_jax.interop.names import LINEAR, SAME, TABLE, Entry, Form, patches
from kling_jax.models.video_dit import VideoDiTConfig

DIFFUSERS, ORIGINAL = "diffusers", "original"
CLASS = "WanTransformer3DModel"
# Parameters that Wan has not: they start as no-ops here, and stay at their start when its weights are loaded.
OURS = ("conditions.*", "fps.*", "state.*", "blocks.state_attn.*")
# {ours: (diffusers, original)}, each a module with a weight and a bias.
ENDS = {
  "text.into": ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
  "text.out": ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
  "time.into": ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
  "time.out": ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
  "modulation.out": ("condition_embedder.time_proj", "time_projection.1"),
  "head.project": ("proj_out", "head.head"),
}
ATTENTIONS = {"self_attn": ("attn1", "self_attn"), "cross_attn": ("attn2", "cross_attn")}
PROJECTIONS = {"q": ("to_q", "q"), "k": ("to_k", "k"), "v": ("to_v", "v"), "out": ("to_out.0", "o")}
MLP = {"up": ("ffn.net.0.proj", "ffn.0"), "down": ("ffn.net.2", "ffn.2")}
# The affine norm before cross-attention is the second of a block in diffusers, and called the third by the authors.
CROSS_NORM = ("norm2", "norm3")
TABLES = ("scale_shift_table", "modulation")
HEAD_TABLE = ("scale_shift_table", "head.modulation")


def linears(config: VideoDiTConfig, naming: str) -> dict[str, Entry]:
  """Every dense layer: {our path without ".kernel": entry of its module}; what LoRA may adapt."""
  which = (DIFFUSERS, ORIGINAL).index(naming)
  depth = config.depth
  found = {ours: Entry(names[which], LINEAR) for ours, names in ENDS.items()}
  for attention, blocks in ATTENTIONS.items():
    for ours, names in PROJECTIONS.items():
      found[f"blocks.{attention}.{ours}"] = Entry(f"blocks.{{}}.{blocks[which]}.{names[which]}", LINEAR, depth)
  for ours, names in MLP.items():
    found[f"blocks.mlp.{ours}"] = Entry(f"blocks.{{}}.{names[which]}", LINEAR, depth)
  return found


def entries(config: VideoDiTConfig, naming: str = DIFFUSERS) -> dict[str, Entry]:
  """Where each parameter of `VideoDiT(config)` lies that Wan has, too."""
  which = (DIFFUSERS, ORIGINAL).index(naming)
  found: dict[str, Entry] = {}

  def add(ours: str, theirs: str, form: Form, layers: int | None = None) -> None:
    found[f"{ours}.kernel"] = Entry(f"{theirs}.weight", form, layers)
    found[f"{ours}.bias"] = Entry(f"{theirs}.bias", SAME, layers)

  add("patch.project", "patch_embedding", patches(config.patch, config.latent_channels))
  for ours, module in linears(config, naming).items():
    add(ours, module.name, LINEAR, module.layers)
  for attention, blocks in ATTENTIONS.items():
    for norm in ("q", "k"):
      name = f"blocks.{{}}.{blocks[which]}.norm_{norm}.weight"
      found[f"blocks.{attention}.{norm}_norm.scale"] = Entry(name, SAME, config.depth)
  found["blocks.cross_norm.scale"] = Entry(f"blocks.{{}}.{CROSS_NORM[which]}.weight", SAME, config.depth)
  found["blocks.cross_norm.bias"] = Entry(f"blocks.{{}}.{CROSS_NORM[which]}.bias", SAME, config.depth)
  found["blocks.modulation.table"] = Entry(f"blocks.{{}}.{TABLES[which]}", TABLE, config.depth)
  found["head.modulation.table"] = Entry(HEAD_TABLE[which], TABLE)
  return found


def naming_of(names: Collection[str]) -> str | None:
  """Which naming the tensors follow; None where they are of no Wan transformer."""
  for naming, some in ((DIFFUSERS, "blocks.0.attn1.to_q.weight"), (ORIGINAL, "blocks.0.self_attn.q.weight")):
    if some in names and "patch_embedding.weight" in names:
      return naming
  return None


def read_config(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> VideoDiTConfig:
  """The shape of the transformer in a file, from its tensors and, for the heads, its config.json.

  Raises:
    WeightsError: a relative of the text-to-video model that is not built here, or a file that contradicts itself.
  """
  naming = naming_of(tensors)
  if naming is None:
    raise WeightsError("no transformer of Wan 2.1: there is no patch_embedding.weight with blocks.0.attn1 or self_attn")
  foreign = [name for name in tensors if "k_img" in name or "add_k_proj" in name or "img_emb" in name or "vace" in name]
  if foreign:
    raise WeightsError(f"a Wan model with image cross-attention or control ({foreign[0]}); only text-to-video is built")
  up, text = (name for name in (MLP["up"], ENDS["text.into"]))
  which = (DIFFUSERS, ORIGINAL).index(naming)
  patch = tensors["patch_embedding.weight"].shape
  width, latent_channels = patch[:2]
  depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
  outputs = tensors[f"{ENDS['head.project'][which]}.weight"].shape[0]
  if outputs != int(np.prod(patch[2:])) * latent_channels:
    raise WeightsError(
      f"a Wan model of {latent_channels} channels in and {outputs // int(np.prod(patch[2:]))} out; only text-to-video, "
      "with as many out as in, is built"
    )
  heads = facts.get("num_attention_heads") or facts.get("num_heads") or width // 128  # of every published size
  return VideoDiTConfig(
    width=width, depth=depth, heads=int(heads), mlp_width=tensors[f"blocks.0.{up[which]}.weight"].shape[0],
    patch=(patch[2], patch[3], patch[4]), latent_channels=latent_channels,
    text_width=tensors[f"{text[which]}.weight"].shape[1], conditions=(),
  )  # fmt: skip


def config_json(config: VideoDiTConfig) -> dict[str, Any]:
  """config.json as diffusers reads it."""
  return {
    "_class_name": CLASS, "_diffusers_version": "0.33.0", "patch_size": list(config.patch),
    "num_attention_heads": config.heads, "attention_head_dim": config.head_size, "in_channels": config.latent_channels,
    "out_channels": config.latent_channels, "text_dim": config.text_width, "freq_dim": 256,
    "ffn_dim": config.mlp_width, "num_layers": config.depth, "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "image_dim": None, "added_kv_proj_dim": None,
    "rope_max_seq_len": 1024,
  }  # fmt: skip
