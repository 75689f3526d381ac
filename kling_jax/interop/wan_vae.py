"""Names and sizes of Wan 2.1's video VAE: as diffusers stores it, and as its authors released it."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kling_jax.errors import WeightsError
from kling_jax.interop.names import CONV2D, CONV3D, SAME, Entry, per_channel
from kling_jax.interop.safetensors import Built, Stacked
from kling_jax.interop.wan_dit import DIFFUSERS, ORIGINAL
from kling_jax.models.video_vae import WAN_MEAN, WAN_STD, VideoVAEConfig

CLASS = "AutoencoderKLWan"
MEAN, LOG_STD = "normalisation.mean", "normalisation.log_std"
# Of a residual block, of its attention, and of a coder's ends: {ours: (diffusers, original)}.
RESIDUAL = {
  "norm1": ("norm1", "residual.0"), "conv1": ("conv1", "residual.2"), "norm2": ("norm2", "residual.3"),
  "conv2": ("conv2", "residual.6"), "shortcut": ("conv_shortcut", "shortcut"),
}  # fmt: skip
ENDS = {"stem": ("conv_in", "conv1"), "norm": ("norm_out", "head.0"), "head": ("conv_out", "head.2")}
QUANT = {"quant": ("quant_conv", "conv1"), "post_quant": ("post_quant_conv", "conv2")}
VOLUME, FRAME = per_channel(3), per_channel(2)  # how the file writes the scale of a norm over (C, T, H, W) or (C, H, W)


def entries(config: VideoVAEConfig, naming: str = DIFFUSERS) -> dict[str, Entry]:
  """Where each parameter of `VideoVAE(config)` lies, save the moments of its latents."""
  which = (DIFFUSERS, ORIGINAL).index(naming)
  found: dict[str, Entry] = {}

  def conv(ours: str, theirs: str, frames: bool = False) -> None:
    found[f"{ours}.kernel"] = Entry(f"{theirs}.weight", CONV2D if frames else CONV3D)
    found[f"{ours}.bias"] = Entry(f"{theirs}.bias", SAME)

  def residual(ours: str, theirs: str, widths: tuple[int, int]) -> None:
    for part, names in RESIDUAL.items():
      if part.startswith("norm"):
        found[f"{ours}.{part}.scale"] = Entry(f"{theirs}.{names[which]}.gamma", VOLUME)
      elif part != "shortcut" or widths[0] != widths[1]:
        conv(f"{ours}.{part}", f"{theirs}.{names[which]}")

  def resample(ours: str, theirs: str, time: bool) -> None:
    conv(f"{ours}.frame", f"{theirs}.resample.1", frames=True)
    if time:
      conv(f"{ours}.time", f"{theirs}.time_conv")

  def middle(coder: str, first: int, width: int) -> None:
    theirs = f"{coder}.{('mid_block', 'middle')[which]}"
    blocks = ("resnets.0", "attentions.0", "resnets.1") if naming == DIFFUSERS else ("0", "1", "2")
    residual(f"{coder}.blocks.{first}", f"{theirs}.{blocks[0]}", (width, width))
    ours, attention = f"{coder}.blocks.{first + 1}", f"{theirs}.{blocks[1]}"
    found[f"{ours}.norm.scale"] = Entry(f"{attention}.norm.gamma", FRAME)
    conv(f"{ours}.qkv", f"{attention}.to_qkv", frames=True)
    conv(f"{ours}.out", f"{attention}.proj", frames=True)
    residual(f"{coder}.blocks.{first + 2}", f"{theirs}.{blocks[2]}", (width, width))

  for ours, names in QUANT.items():
    conv(ours, names[which])
  for coder in ("encoder", "decoder"):
    for ours, names in ENDS.items():
      if ours == "norm":
        found[f"{coder}.norm.scale"] = Entry(f"{coder}.{names[which]}.gamma", VOLUME)
      else:
        conv(f"{coder}.{ours}", f"{coder}.{names[which]}")

  number, width, last = 0, config.base, len(config.multipliers) - 1
  for stage, multiplier in enumerate(config.multipliers):
    down = f"encoder.{('down_blocks', 'downsamples')[which]}"
    for _ in range(config.blocks):
      residual(f"encoder.blocks.{number}", f"{down}.{number}", (width, config.base * multiplier))
      number, width = number + 1, config.base * multiplier
    if stage < last:
      resample(f"encoder.blocks.{number}", f"{down}.{number}", config.halve_time[stage])
      number += 1
  middle("encoder", number, width)

  middle("decoder", 0, width)
  number = 0
  for stage, multiplier in enumerate(reversed(config.multipliers)):
    up = f"decoder.up_blocks.{stage}" if naming == DIFFUSERS else "decoder.upsamples"
    for block in range(config.blocks + 1):
      theirs = f"{up}.resnets.{block}" if naming == DIFFUSERS else f"{up}.{number}"
      residual(f"decoder.blocks.{3 + number}", theirs, (width, config.base * multiplier))
      number, width = number + 1, config.base * multiplier
    if stage < last:
      theirs = f"{up}.upsamplers.0" if naming == DIFFUSERS else f"{up}.{number}"
      resample(f"decoder.blocks.{3 + number}", theirs, config.halve_time[-1 - stage])
      number, width = number + 1, width // 2
  return found


def naming_of(names: Collection[str]) -> str | None:
  """Which naming the tensors follow; None where they are of no Wan VAE."""
  for naming, some in ((DIFFUSERS, "decoder.up_blocks.0.resnets.0.norm1.gamma"), (ORIGINAL, "decoder.head.0.gamma")):
    if some in names:
      return naming
  return None


def read_config(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> VideoVAEConfig:
  """The shape of the VAE in a file, from its tensors alone.

  Raises:
    WeightsError: a relative that is not built here (Wan 2.2's, with residual resampling), or a strange shape.
  """
  naming = naming_of(tensors)
  if naming is None:
    raise WeightsError("no VAE of Wan 2.1: its norms are called gamma, and there are none")
  if facts.get("is_residual") or facts.get("patch_size") or any(".downsampler." in name for name in tensors):
    raise WeightsError("a VAE of Wan 2.2, whose resampling has shortcuts of its own; Wan 2.1's is built here")
  down = "encoder.down_blocks" if naming == DIFFUSERS else "encoder.downsamples"
  conv1 = "conv1" if naming == DIFFUSERS else "residual.2"
  numbers = sorted({int(name.split(".")[2]) for name in tensors if name.startswith(f"{down}.")})
  widths: list[int] = []
  halve_time: list[bool] = []
  blocks = 0
  for number in numbers:
    if f"{down}.{number}.resample.1.weight" in tensors:
      halve_time.append(f"{down}.{number}.time_conv.weight" in tensors)
    elif len(widths) == len(halve_time):
      widths.append(tensors[f"{down}.{number}.{conv1}.weight"].shape[0])
    blocks += f"{down}.{number}.resample.1.weight" not in tensors
  base = tensors[f"encoder.{ENDS['stem'][naming == ORIGINAL]}.weight"].shape[0]
  if not widths or any(width % base for width in widths) or blocks % len(widths):
    raise WeightsError(f"a VAE with stages of {widths} channels, {blocks} blocks and {base} at first; not Wan's form")
  return VideoVAEConfig(
    base=base, multipliers=tuple(width // base for width in widths), blocks=blocks // len(widths),
    halve_time=tuple(halve_time), channels=tensors[f"{QUANT['post_quant'][naming == ORIGINAL]}.weight"].shape[0],
    remat=base >= 96,
  )  # fmt: skip


def moments(config: VideoVAEConfig, facts: Mapping[str, Any]) -> dict[str, str | Built | Stacked]:
  """Recipes of the moments of the latents: config.json holds them, or they are Wan's own.

  Raises:
    WeightsError: neither is the case, or they are not one positive number a channel.
  """
  mean, std = facts.get("latents_mean"), facts.get("latents_std")
  if mean is None and config.channels == len(WAN_MEAN):
    mean, std = WAN_MEAN, WAN_STD
  try:
    mean64, std64 = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    good = mean64.shape == std64.shape == (config.channels,) and np.isfinite(mean64).all() and (std64 > 0).all()
  except (TypeError, ValueError):
    good = False
  if not good:
    raise WeightsError(f"config.json lacks latents_mean and latents_std, {config.channels} numbers each")
  return {
    MEAN: Built((), lambda: mean64.astype(np.float32)),
    LOG_STD: Built((), lambda: np.log(std64).astype(np.float32)),
  }


def config_json(config: VideoVAEConfig, mean: np.ndarray, log_std: np.ndarray) -> dict[str, Any]:
  """config.json as diffusers reads it; the deviations in float64, so that their logarithm comes back exactly."""
  return {
    "_class_name": CLASS, "_diffusers_version": "0.33.0", "base_dim": config.base, "z_dim": config.channels,
    "dim_mult": list(config.multipliers), "num_res_blocks": config.blocks, "attn_scales": [], "dropout": 0.0,
    "temperal_downsample": list(config.halve_time), "latents_mean": [float(value) for value in mean],
    "latents_std": [math.exp(float(value)) for value in log_std],
  }  # fmt: skip
