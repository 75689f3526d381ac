"""Names and sizes of T5 v1.1's and umT5's encoders in Hugging Face's layout; a whole T5's decoder is left out."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kling_jax.errors import WeightsError
from kling_jax.interop.names import LINEAR, SAME, Entry
from kling_jax.models.t5 import T5Config

DISTANCES = "SelfAttention.relative_attention_bias.weight"


def entries(config: T5Config, names: Collection[str]) -> dict[str, Entry]:
  """Where each parameter of `T5Encoder(config)` lies; `names` says which of the two tables of tokens is there."""
  block = "encoder.block.{}.layer."
  table = next((name for name in ("shared.weight", "encoder.embed_tokens.weight") if name in names), "shared.weight")
  found = {"table": Entry(table), "norm.scale": Entry("encoder.final_layer_norm.weight")}
  for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
    found[f"layers.attention.{ours}.kernel"] = Entry(f"{block}0.SelfAttention.{theirs}.weight", LINEAR, config.depth)
  for ours, theirs in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
    found[f"layers.mlp.{ours}.kernel"] = Entry(f"{block}1.DenseReluDense.{theirs}.weight", LINEAR, config.depth)
  for number, ours in enumerate(("attention_norm", "mlp_norm")):
    found[f"layers.{ours}.scale"] = Entry(f"{block}{number}.layer_norm.weight", SAME, config.depth)
  if config.table_a_layer:
    found["layers.distances"] = Entry(f"{block}0.{DISTANCES}", SAME, config.depth)
  else:
    found["distances"] = Entry(f"encoder.block.0.layer.0.{DISTANCES}")
  return found


def held(names: Collection[str]) -> bool:
  """Whether the tensors are of a T5."""
  return "encoder.block.0.layer.0.SelfAttention.q.weight" in names


def unused(names: Collection[str], config: T5Config) -> list[str]:
  """The tensors that the encoder does not take and that are no surprise: the decoder, and the second table."""
  taken = {name for entry in entries(config, names).values() for name in entry.names}
  return [
    name for name in names
    if name not in taken and (name.startswith(("decoder.", "lm_head.")) or name == "encoder.embed_tokens.weight")
  ]  # fmt: skip


def read_config(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> T5Config:
  """The shape of the encoder in a file, from its tensors and config.json.

  Raises:
    WeightsError: a T5 of the first version (ReLU, no gate), or no sizes of heads.
  """
  block = "encoder.block.0.layer."
  if f"{block}1.DenseReluDense.wi_0.weight" not in tensors:
    raise WeightsError("a T5 without gated MLPs (version 1.0); version 1.1 and umT5 are built here")
  act = str(facts.get("feed_forward_proj", "gated-gelu"))
  if act != "gated-gelu":
    raise WeightsError(f"config.json says feed_forward_proj={act!r}; gated-gelu is built here")
  depth = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.block."))
  table = tensors[next(iter(name for name in ("shared.weight", "encoder.embed_tokens.weight") if name in tensors))]
  distances = tensors[f"{block}0.{DISTANCES}"]
  inner = tensors[f"{block}0.SelfAttention.q.weight"].shape[0]
  heads = distances.shape[1]
  if inner % heads or facts.get("num_heads", heads) != heads:
    raise WeightsError(
      f"{heads} heads in the table of distances, {facts.get('num_heads')} in config.json, over {inner}"
    )
  return T5Config(
    vocabulary=table.shape[0], width=table.shape[1], depth=depth, heads=heads, head_size=inner // heads,
    mlp_width=tensors[f"{block}1.DenseReluDense.wi_0.weight"].shape[0],
    table_a_layer=depth > 1 and f"encoder.block.1.layer.0.{DISTANCES}" in tensors,
    buckets=distances.shape[0], most=int(facts.get("relative_attention_max_distance", 128)),
  )  # fmt: skip
