"""Names and sizes of Llama's and Qwen3's text decoders in Hugging Face's layout.

Their rotary pairs are halves of a head (x[i], x[i + E/2]); ours are neighbours, so heads of queries and keys are
reordered on the way in, and back on the way out. Scores of attention do not change by it.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kling_jax.errors import WeightsError
from kling_jax.interop.names import LINEAR, SAME, Entry, Form
from kling_jax.models.language_model import Llama3Rope, Shape

PREFIXES = ("model.language_model.", "language_model.", "model.", "")  # before "layers.0."
KINDS = ("llama", "qwen3")
HEAD = "lm_head.weight"


def halves(heads: int) -> Form:
  """Vectors of `heads` heads (..., heads * E) or (..., E), or kernels (out, in) as (in, out): halves to neighbours."""

  def turned(array: np.ndarray, cut: tuple[int, ...]) -> np.ndarray:
    last = array.shape[-1]
    parts = array.reshape(*array.shape[:-1], heads, *(size or last // heads // 2 for size in cut))
    return parts.swapaxes(-1, -2).reshape(array.shape)

  read = lambda array: turned(array, (2, 0))
  write = lambda array: turned(array, (0, 2))
  return Form(read, write)


def rotated_kernel(heads: int) -> Form:
  """A projection (out, in) of queries or keys."""
  form = halves(heads)
  return Form(lambda array: form.read(array.T), lambda array: form.write(array).T)


def prefix_of(names: Collection[str]) -> str | None:
  """What stands before "layers.0."; None where no decoder of this naming is there."""
  return next((prefix for prefix in PREFIXES if f"{prefix}layers.0.self_attn.q_proj.weight" in names), None)


def entries(shape: Shape, prefix: str) -> dict[str, Entry]:
  """Where each parameter of `LanguageModel(shape)` lies."""
  layer, depth = prefix + "layers.{}.", shape.depth
  found = {"table": Entry(f"{prefix}embed_tokens.weight"), "norm.scale": Entry(f"{prefix}norm.weight")}
  if not shape.tied:
    found["head.kernel"] = Entry(HEAD, LINEAR)
  for ours, theirs in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
    found[f"layers.{ours}.scale"] = Entry(f"{layer}{theirs}.weight", SAME, depth)
  for ours, theirs, heads in (("q", "q", shape.heads), ("k", "k", shape.kv_heads), ("v", "v", 0), ("out", "o", 0)):
    kernel, vector = (rotated_kernel(heads), halves(heads)) if heads else (LINEAR, SAME)
    found[f"layers.attention.{ours}.kernel"] = Entry(f"{layer}self_attn.{theirs}_proj.weight", kernel, depth)
    if shape.attention_bias:
      found[f"layers.attention.{ours}.bias"] = Entry(f"{layer}self_attn.{theirs}_proj.bias", vector, depth)
  for part in ("gate", "up", "down"):
    found[f"layers.mlp.{part}.kernel"] = Entry(f"{layer}mlp.{part}_proj.weight", LINEAR, depth)
    if shape.mlp_bias:
      found[f"layers.mlp.{part}.bias"] = Entry(f"{layer}mlp.{part}_proj.bias", SAME, depth)
  for part in ("q_norm", "k_norm") if shape.qk_norm != "none" else ():
    found[f"layers.attention.{part}.scale"] = Entry(f"{layer}self_attn.{part}.weight", halves(1), depth)
    if shape.qk_norm == "head_layer":
      found[f"layers.attention.{part}.bias"] = Entry(f"{layer}self_attn.{part}.bias", halves(1), depth)
  return found


def unused(names: Collection[str], shape: Shape) -> list[str]:
  """Tensors that are no surprise: a tied head that was written all the same, tables of rotary frequencies."""
  tied = [HEAD] if shape.tied and HEAD in names else []
  return tied + [name for name in names if name.endswith("rotary_emb.inv_freq")]


def read_config(
  tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any], tied: bool | None = None, kinds: Collection[str] = KINDS
) -> Shape:
  """The shape of the decoder in a file, from its tensors and config.json.

  Args:
    tensors: names and shapes.
    facts: config.json, or its text_config.
    tied: whether the head is the table; by default as `facts` or the tensors say.
    kinds: legal values of model_type.

  Raises:
    WeightsError: config.json is missing or says what is not built here, or tensors of other sizes.
  """
  prefix = prefix_of(tensors)
  if prefix is None:
    raise WeightsError("no decoder: wants tensors named model.layers.0.self_attn.q_proj.weight, ...")
  kind = facts.get("model_type")
  if kind not in kinds:
    raise WeightsError(
      f"config.json says model_type={kind!r}; decoders of {', '.join(kinds)} are built here (others with the same "
      "names compute something else)"
    )
  for key, legal in (("hidden_act", "silu"), ("sliding_window", None), ("use_sliding_window", False)):
    if facts.get(key, legal) != legal and not (key == "sliding_window" and not facts.get("use_sliding_window", True)):
      raise WeightsError(f"config.json says {key}={facts[key]!r}; {legal!r} is built here")
  layer = f"{prefix}layers.0."
  size = lambda name: tensors[prefix + name].shape
  vocabulary, width = size("embed_tokens.weight")
  heads = int(facts["num_attention_heads"])
  kv_heads = int(facts.get("num_key_value_heads") or heads)
  head_size = int(facts.get("head_dim") or width // heads)
  attention = f"{layer}self_attn."
  bias = {part: f"{attention}{part}_proj.bias" in tensors for part in "qkvo"}
  if len(set(bias.values())) > 1:
    raise WeightsError("biases at some projections of attention and not at others (Qwen2); all or none are built here")
  norm = tensors.get(f"{attention}q_norm.weight")
  depth = 1 + max(int(name[len(prefix) :].split(".")[1]) for name in tensors if name.startswith(f"{prefix}layers."))
  said = facts.get("tie_word_embeddings", False) if tied is None else tied
  shape = Shape(
    width=width, depth=depth, heads=heads, kv_heads=kv_heads, head_size=head_size,
    mlp_width=tensors[f"{layer}mlp.gate_proj.weight"].shape[0], vocabulary=vocabulary, tied=bool(said),
    qk_norm="none" if norm is None else "head" if norm.ndim == 1 else "head_layer",
    epsilon=float(facts.get("rms_norm_eps", 1e-6)), attention_bias=bias["q"],
    mlp_bias=f"{layer}mlp.gate_proj.bias" in tensors, **rope(facts, head_size),
  )  # fmt: skip
  for name, count in (("q", heads), ("k", kv_heads)):
    held = tensors[f"{attention}{name}_proj.weight"].shape[0]
    if held != count * head_size:
      raise WeightsError(f"{name}_proj gives {held} values, config.json says {count} heads of {head_size}")
  for key, held in (("hidden_size", width), ("num_hidden_layers", depth), ("vocab_size", vocabulary)):
    if facts.get(key, held) != held:
      raise WeightsError(f"config.json says {key}={facts[key]}, the tensors say {held}")
  return shape


def rope(facts: Mapping[str, Any], head_size: int) -> dict[str, Any]:
  """The rotary fields of a `Shape`, from both ways in which config.json says them (transformers 4 and 5).

  Raises:
    WeightsError: a kind of scaling that is not built here.
  """
  said = {**(facts.get("rope_scaling") or {}), **(facts.get("rope_parameters") or {})}
  base = float(said.get("rope_theta", facts.get("rope_theta", 10_000.0)))
  kind = said.get("rope_type", said.get("type", "default"))
  if float(said.get("partial_rotary_factor", facts.get("partial_rotary_factor", 1.0))) != 1.0:
    raise WeightsError("config.json says partial_rotary_factor; heads are rotated whole here")
  fields: dict[str, Any] = {"rope_base": base}
  if kind == "llama3":
    fields["rope_stretch"] = Llama3Rope(
      float(said["factor"]), float(said["low_freq_factor"]), float(said["high_freq_factor"]),
      int(said["original_max_position_embeddings"]),
    )  # fmt: skip
  elif kind not in ("default", "mrope"):
    raise WeightsError(f"config.json says rope_type={kind!r}; default and llama3 are built here")
  if "mrope_section" in said:
    fields["rope_sections"] = tuple(said["mrope_section"])
    if sum(fields["rope_sections"]) != head_size // 2:
      raise WeightsError(f"mrope_section {said['mrope_section']} does not sum to {head_size // 2}")
  return fields
