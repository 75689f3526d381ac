"""Names and sizes of Stable Diffusion's image VAE (diffusers' AutoencoderKL); also with the attention names of 2022."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kling_jax.errors import WeightsError
from kling_jax.interop.names import CONV2D, LINEAR, POINTWISE, SAME, Entry
from kling_jax.models.image_vae import ImageVAEConfig

CLASS = "AutoencoderKL"
RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "shortcut": "conv_shortcut"}
ATTENTION = {"q": ("to_q", "query"), "k": ("to_k", "key"), "v": ("to_v", "value"), "out": ("to_out.0", "proj_attn")}


def held(names: Collection[str]) -> bool:
  """Whether the tensors are of an AutoencoderKL."""
  return "decoder.up_blocks.0.resnets.0.norm1.weight" in names and "encoder.conv_in.weight" in names


def entries(config: ImageVAEConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Entry]:
  """Where each parameter of `ImageVAE(config)` lies; `tensors` says how its attention is called."""
  old = "decoder.mid_block.attentions.0.query.weight" in tensors
  found: dict[str, Entry] = {}

  def norm(ours: str, theirs: str) -> None:
    found[f"{ours}.scale"] = Entry(f"{theirs}.weight")
    found[f"{ours}.bias"] = Entry(f"{theirs}.bias")

  def conv(ours: str, theirs: str) -> None:
    found[f"{ours}.kernel"] = Entry(f"{theirs}.weight", CONV2D)
    found[f"{ours}.bias"] = Entry(f"{theirs}.bias", SAME)

  def residual(ours: str, theirs: str, widths: tuple[int, int]) -> None:
    for part, name in RESIDUAL.items():
      if part.startswith("norm"):
        norm(f"{ours}.{part}", f"{theirs}.{name}")
      elif part != "shortcut" or widths[0] != widths[1]:
        conv(f"{ours}.{part}", f"{theirs}.{name}")

  def middle(coder: str, first: int, width: int) -> None:
    theirs = f"{coder}.mid_block"
    residual(f"{coder}.blocks.{first}", f"{theirs}.resnets.0", (width, width))
    ours, attention = f"{coder}.blocks.{first + 1}", f"{theirs}.attentions.0"
    norm(f"{ours}.norm", f"{attention}.group_norm")
    for part, names in ATTENTION.items():
      name = f"{attention}.{names[old]}.weight"
      flat = name not in tensors or tensors[name].ndim == 2
      found[f"{ours}.{part}.kernel"] = Entry(name, LINEAR if flat else POINTWISE)
      found[f"{ours}.{part}.bias"] = Entry(f"{attention}.{names[old]}.bias")
    residual(f"{coder}.blocks.{first + 2}", f"{theirs}.resnets.1", (width, width))

  for coder in ("encoder", "decoder"):
    for ours, theirs in (("stem", "conv_in"), ("head", "conv_out")):
      conv(f"{coder}.{ours}", f"{coder}.{theirs}")
    norm(f"{coder}.norm", f"{coder}.conv_norm_out")
  for ours in ("quant", "post_quant") if config.quant else ():
    conv(ours, f"{ours}_conv")

  number, width, last = 0, config.widths[0], len(config.widths) - 1
  for stage, wide in enumerate(config.widths):
    for block in range(config.blocks):
      residual(f"encoder.blocks.{number}", f"encoder.down_blocks.{stage}.resnets.{block}", (width, wide))
      number, width = number + 1, wide
    if stage < last:
      conv(f"encoder.blocks.{number}.conv", f"encoder.down_blocks.{stage}.downsamplers.0.conv")
      number += 1
  middle("encoder", number, width)
  middle("decoder", 0, width)
  number = 3
  for stage, wide in enumerate(reversed(config.widths)):
    for block in range(config.blocks + 1):
      residual(f"decoder.blocks.{number}", f"decoder.up_blocks.{stage}.resnets.{block}", (width, wide))
      number, width = number + 1, wide
    if stage < last:
      conv(f"decoder.blocks.{number}.conv", f"decoder.up_blocks.{stage}.upsamplers.0.conv")
      number += 1
  return found


def read_config(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> ImageVAEConfig:
  """The shape of the VAE in a file, from its tensors and, for norms and scale, its config.json.

  Raises:
    WeightsError: a shape that is not Stable Diffusion's.
  """
  stages = {int(name.split(".")[2]) for name in tensors if name.startswith("encoder.down_blocks.")}
  first = lambda stage: f"encoder.down_blocks.{stage}.resnets.0.conv1.weight"
  if any("attentions" in name for name in tensors if ".down_blocks." in name or ".up_blocks." in name):
    raise WeightsError("an AutoencoderKL with attention outside of its middle; Stable Diffusion's form is built here")
  blocks = {int(name.split(".")[4]) for name in tensors if name.startswith("encoder.down_blocks.0.resnets.")}
  return ImageVAEConfig(
    widths=tuple(tensors[first(stage)].shape[0] for stage in sorted(stages)),
    blocks=len(blocks),
    channels=tensors["decoder.conv_in.weight"].shape[1],
    groups=int(facts.get("norm_num_groups", 32)),
    scale=float(facts.get("scaling_factor") or 0.18215),
    shift=float(facts.get("shift_factor") or 0.0),
    quant="quant_conv.weight" in tensors,
  )
