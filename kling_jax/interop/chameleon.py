"""Names and sizes of Chameleon in Hugging Face's layout: decoder and picture tokenizer."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kling_jax.errors import WeightsError
from kling_jax.interop import llama
from kling_jax.interop.names import CONV2D, POINTWISE, Entry, prefixed
from kling_jax.interop.safetensors import Built
from kling_jax.models.chameleon import ChameleonConfig
from kling_jax.models.vq_image import VQImageConfig

ROOT = "model.vqmodel."
CODEBOOK = f"{ROOT}quantize.embedding.weight"
# Names of picture tokens spell their code in letters: IMGIMGBAZ is code 10.
PICTURE, LETTERS = "IMGIMG", {chr(ord("A") + digit): str(digit) for digit in range(10)}


def held(names: Collection[str]) -> bool:
  """Whether the tensors are of a Chameleon."""
  return CODEBOOK in names


def read_config(tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> ChameleonConfig:
  """The sizes of both parts.

  Raises:
    WeightsError: see `llama.read_config`; a tokenizer of another form; picture tokens that are no run of numbers.
  """
  decoder = {name: tensors[name] for name in tensors if not name.startswith(ROOT)}
  shape = llama.read_config(decoder, facts, kinds=("chameleon",))
  said = facts.get("vq_config") or {}
  if said.get("attn_resolutions") or said.get("double_latent") or said.get("attn_type", "vanilla") != "vanilla":
    raise WeightsError("vq_config: attn_resolutions, double_latent or attn_type of another form than Chameleon's")
  stages = {int(name.split(".")[4]) for name in tensors if name.startswith(f"{ROOT}encoder.down.")}
  blocks = {int(name.split(".")[6]) for name in tensors if name.startswith(f"{ROOT}encoder.down.0.block.")}
  first = lambda stage: tensors[f"{ROOT}encoder.down.{stage}.block.0.conv1.weight"].shape[0]
  codes, code_width = tensors[CODEBOOK].shape
  pictures = VQImageConfig(
    widths=tuple(first(stage) for stage in sorted(stages)),
    blocks=len(blocks),
    channels=tensors[f"{ROOT}encoder.conv_out.weight"].shape[0],
    code_width=code_width,
    codes=codes,
  )
  order = code_order(facts, codes)
  language = dataclasses.replace(
    shape, norm_after=bool(facts.get("swin_norm")), frame_codes=codes, first_code=int(order[0])
  )
  return ChameleonConfig(language, pictures)


def code_order(facts: Mapping[str, Any], codes: int) -> np.ndarray:
  """The first picture token, then for each of the tokens from there on the code that it stands for: (1 + codes,).

  Raises:
    WeightsError: no vocabulary_map, or tokens of pictures that are not one run of numbers.
  """
  known = facts.get("vocabulary_map") or {}
  code_of = {
    token: int("".join(LETTERS.get(letter, letter) for letter in name[len(PICTURE) : -1]))
    for name, token in known.items()
    if name.startswith(PICTURE)
  }
  tokens = sorted(code_of)
  run = list(range(tokens[0], tokens[0] + codes)) if tokens else []
  if tokens != run or sorted(code_of.values()) != list(range(codes)):
    raise WeightsError(
      f"config.json's vocabulary_map names {len(tokens)} picture tokens; wanted are {codes} in one run, a code each"
    )
  return np.array([tokens[0], *(code_of[token] for token in tokens)])


def entries(config: ChameleonConfig) -> dict[str, Entry]:
  """Where each parameter of `Chameleon(config)` lies, but for the codebook (`codebook`)."""
  found = prefixed(llama.entries(config.language, "model."), "language.")
  ours, theirs = "pictures.encoder.", f"{ROOT}encoder."

  def norm(name: str, foreign: str) -> None:
    found[f"{name}.scale"], found[f"{name}.bias"] = Entry(f"{foreign}.weight"), Entry(f"{foreign}.bias")

  def conv(name: str, foreign: str) -> None:
    found[f"{name}.kernel"], found[f"{name}.bias"] = Entry(f"{foreign}.weight", CONV2D), Entry(f"{foreign}.bias")

  def residual(number: int, foreign: str, width: int, wide: int) -> None:
    for part in ("norm1", "norm2"):
      norm(f"{ours}blocks.{number}.{part}", f"{foreign}.{part}")
    for part in ("conv1", "conv2"):
      conv(f"{ours}blocks.{number}.{part}", f"{foreign}.{part}")
    if width != wide:
      conv(f"{ours}blocks.{number}.shortcut", f"{foreign}.nin_shortcut")

  conv(f"{ours}stem", f"{theirs}conv_in")
  number, width = 0, config.pictures.widths[0]
  for stage, wide in enumerate(config.pictures.widths):
    for block in range(config.pictures.blocks):
      residual(number, f"{theirs}down.{stage}.block.{block}", width, wide)
      number, width = number + 1, wide
    if stage < len(config.pictures.widths) - 1:
      conv(f"{ours}blocks.{number}.conv", f"{theirs}down.{stage}.downsample.conv")
      number += 1
  residual(number, f"{theirs}mid.block_1", width, width)
  norm(f"{ours}blocks.{number + 1}.norm", f"{theirs}mid.attn_1.norm")
  for part, foreign in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "proj_out")):
    attention = f"{theirs}mid.attn_1.{foreign}"
    found[f"{ours}blocks.{number + 1}.{part}.kernel"] = Entry(f"{attention}.weight", POINTWISE)
    found[f"{ours}blocks.{number + 1}.{part}.bias"] = Entry(f"{attention}.bias")
  residual(number + 2, f"{theirs}mid.block_2", width, width)
  norm(f"{ours}norm", f"{theirs}norm_out")
  conv(f"{ours}head", f"{theirs}conv_out")
  conv("pictures.quant", f"{ROOT}quant_conv")
  return found


def codebook(config: ChameleonConfig, facts: Mapping[str, Any]) -> dict[str, Built]:
  """The codebook in the order of the picture tokens, so that code c is the token first_code + c."""
  order = code_order(facts, config.pictures.codes)[1:]
  return {"pictures.codebook": Built((CODEBOOK,), lambda array: array[order])}


def unused(names: Collection[str], config: ChameleonConfig) -> list[str]:
  """Tensors that are no surprise: the way back from codes, of which there is no more."""
  return [name for name in names if name.startswith(f"{ROOT}post_quant_conv.")] + llama.unused(names, config.language)
