"""LoRA files of Wan-shaped transformers: ours, PEFT's and diffusers', and those of other trainers (down, up, alpha).

A file holds A (rank, in) and B (out, rank) for single layers; ours, as `nn.lora` wants them, stacks layers: A (S, in,
rank) and B (S, rank, out). Ranks may differ from layer to layer and layers may lack: what is filled with zeros then
changes nothing.
"""

import collections
import dataclasses
import fnmatch
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kling_jax import files
from kling_jax.errors import UsageError, WeightsError, nearest
from kling_jax.interop import safetensors, wan_dit
from kling_jax.models.video_dit import VideoDiTConfig
from kling_jax.nn.lora import A, B, merge_lora
from kling_jax.nn.params import Params

PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.", "model.")  # may follow one another
FLAT = ("lora_unet_", "lora_transformer_")  # of trainers that write "_" for "."
DOWN = re.compile(r"(.+?)\.(?:lora_A|lora_down)(?:\.[A-Za-z0-9_]+)?\.weight")
UP = re.compile(r"(.+?)\.(?:lora_B|lora_up)(?:\.[A-Za-z0-9_]+)?\.weight")
ALPHA = re.compile(r"(.+?)\.alpha")
KIND = "kling_jax.lora"


@dataclasses.dataclass
class Pair:
  """Of one layer: down (rank, in), up (out, rank), and alpha where the file has it (the scale is alpha / rank)."""

  down: np.ndarray | None = None
  up: np.ndarray | None = None
  alpha: float | None = None


def read(
  source: str | os.PathLike[str], config: VideoDiTConfig, *, ignore: Sequence[str] = ()
) -> tuple[Params, dict[str, Any]]:
  """The adapters in a file or folder, for `nn.lora.merge_lora` with scale 1: alpha / rank is in B.

  Args:
    source: safetensors; adapter_config.json (PEFT) beside it says lora_alpha where the file does not.
    config: of the transformer that they are for.
    ignore: patterns of tensors that may be left out, such as "*.diff_b".

  Returns:
    {path.lora_a, path.lora_b} with paths of `VideoDiT`, float32; and facts: naming, rank, layers, ignored.

  Raises:
    WeightsError: tensors that belong to no dense layer of this transformer or of another shape, half a pair, or
      values that are not finite.
  """
  source = pathlib.Path(source)
  tensors = safetensors.Tensors(source)
  if tensors.metadata.get("kind") == KIND:
    return _read_ours(tensors, config)
  places = _places(config)
  pairs: dict[str, Pair] = collections.defaultdict(Pair)
  strange, ignored = [], []
  for name in tensors:
    module, part = _parse(name)
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
      ignored.append(name)
    elif module is None or module not in places:
      strange.append(name)
    elif part == "alpha":
      pairs[module].alpha = float(np.asarray(tensors[name], np.float32).reshape(-1)[0])
    else:
      setattr(pairs[module], part, np.asarray(tensors[name], np.float32))
  if strange or not pairs:
    shown = ", ".join(strange[:8]) or "nothing"
    close = nearest((_parse(strange[0])[0] or strange[0]) if strange else "", places)
    raise WeightsError(
      f"{source}: {len(strange)} tensors are of no dense layer of this transformer ({config.depth} blocks): "
      f"{shown}{close}. Adapters for image inputs, and differences of whole weights (diff, diff_b), are not built here"
    )
  default = _default_alpha(source, tensors.metadata)
  lora = _stack(source, config, pairs, places, default)
  ranks = [len(pair.down) for pair in pairs.values() if pair.down is not None]
  return lora, {"layers": len(pairs), "rank": max(ranks), "ignored": ignored}


def _parse(name: str) -> tuple[str | None, str]:
  """(module, part: down, up or alpha) of a tensor's name; None for anything else."""
  for part, form in (("down", DOWN), ("up", UP), ("alpha", ALPHA)):
    match = form.fullmatch(name)
    if match:
      module = match[1]
      for prefix in PREFIXES:
        module = module.removeprefix(prefix)
      for prefix in FLAT:
        module = module.removeprefix(prefix)
      return module, part
  return None, ""


def _places(config: VideoDiTConfig) -> dict[str, tuple[str, int | None]]:
  """{foreign module, by any naming: (our path without ".kernel", layer)}."""
  found: dict[str, tuple[str, int | None]] = {}
  for naming in (wan_dit.DIFFUSERS, wan_dit.ORIGINAL):
    for path, entry in wan_dit.linears(config, naming).items():
      for layer, name in enumerate(entry.names):
        place = path, None if entry.layers is None else layer
        found[name] = found[name.replace(".", "_")] = place
  return found


def _default_alpha(source: pathlib.Path, metadata: Mapping[str, str]) -> float | None:
  """lora_alpha of PEFT's adapter_config.json, or of the header that diffusers writes; None where neither says."""
  path = (source if source.is_dir() else source.parent) / "adapter_config.json"
  try:
    if path.is_file():
      facts = json.loads(path.read_text(encoding="utf-8"))
      return None if facts.get("lora_alpha") is None else float(facts["lora_alpha"])
    facts = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    alpha = next((value for key, value in facts.items() if key.split(".")[-1] == "lora_alpha"), None)
    return None if alpha is None else float(alpha)
  except (ValueError, TypeError, AttributeError, RecursionError) as error:
    raise WeightsError(f"{source}: its LoRA config is damaged ({error}); copy it again") from error


def _stack(
  source: pathlib.Path, config: VideoDiTConfig, pairs: Mapping[str, Pair], places: Mapping[str, Any],
  default_alpha: float | None,
) -> Params:  # fmt: skip
  """The pairs as stacked adapters."""
  sizes = _sizes(config)
  lora: Params = {}
  ranks: dict[str, int] = collections.defaultdict(int)
  for module, pair in pairs.items():
    path = places[module][0]
    if pair.down is None or pair.up is None:
      raise WeightsError(f"{source}: {module} has only half of its pair; copy the file again")
    rank, shape = len(pair.down), sizes[path]
    if pair.down.shape != (rank, shape[0]) or pair.up.shape != (shape[1], rank):
      raise WeightsError(
        f"{source}: {module} has A {pair.down.shape} and B {pair.up.shape}; this transformer's layer maps {shape[0]} "
        f"to {shape[1]}: take the adapter of a model of this size"
      )
    ranks[path] = max(ranks[path], rank)
  for path, rank in ranks.items():
    stacked = path.startswith("blocks.")
    layers = config.depth if stacked else 1
    a, b = np.zeros((layers, sizes[path][0], rank), np.float32), np.zeros((layers, rank, sizes[path][1]), np.float32)
    for module, pair in pairs.items():
      ours, layer = places[module]
      if ours == path and pair.down is not None and pair.up is not None:
        alpha = pair.alpha if pair.alpha is not None else default_alpha
        own = len(pair.down)
        a[layer or 0, :, :own] = pair.down.T
        b[layer or 0, :own] = pair.up.T * np.float32(1.0 if alpha is None else alpha / own)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
      raise WeightsError(f"{source}: the adapters of {path} have values that are not finite; take other weights")
    name = f"{path}.kernel"
    lora[name + A], lora[name + B] = (a, b) if stacked else (a[0], b[0])  # type: ignore[assignment]
  return lora


def _sizes(config: VideoDiTConfig) -> dict[str, tuple[int, int]]:
  """{our path without ".kernel": (in, out)} of the dense layers."""
  width, outputs = config.width, int(np.prod(config.patch)) * config.latent_channels
  sizes = {
    "text.into": (config.text_width, width), "text.out": (width, width), "time.into": (256, width),
    "time.out": (width, width), "modulation.out": (width, 6 * width), "head.project": (width, outputs),
    "blocks.mlp.up": (width, config.mlp_width), "blocks.mlp.down": (config.mlp_width, width),
  }  # fmt: skip
  return {path: sizes.get(path, (width, width)) for path in wan_dit.linears(config, wan_dit.DIFFUSERS)}


def _read_ours(tensors: safetensors.Tensors, config: VideoDiTConfig) -> tuple[Params, dict[str, Any]]:
  sizes = _sizes(config)
  lora: Params = {}
  for name in tensors:
    path, array = name.removesuffix(A).removesuffix(B), np.array(tensors[name], np.float32)
    layers = (config.depth,) if path.startswith("blocks.") else ()
    size = sizes.get(path.removesuffix(".kernel"))
    axis = -2 if name.endswith(A) else -1
    other = name.removesuffix(A) + B if name.endswith(A) else name.removesuffix(B) + A
    fits = size is not None and array.ndim == len(layers) + 2 and array.shape[: len(layers)] == layers
    if not fits or array.shape[axis] != size[0 if axis == -2 else 1] or other not in tensors:  # type: ignore[index]
      raise WeightsError(
        f"{tensors.source}: {name} {array.shape} does not fit this transformer, or has only half a pair"
      )
    if not np.isfinite(array).all():
      raise WeightsError(f"{tensors.source}: {name} has values that are not finite; take other weights")
    lora[name] = array  # type: ignore[assignment]
  rank = max(array.shape[-1] for name, array in lora.items() if name.endswith(A))
  return lora, {"layers": len(lora) // 2, "rank": rank, "ignored": []}


def save(path: str | os.PathLike[str], lora: Params, *, scale: float = 1.0, dtype: Any = np.float32) -> None:
  """Writes adapters under our names, as one small file; `scale` goes into B."""
  tensors = {
    name: (np.asarray(value, np.float32) * (scale if name.endswith(B) else 1.0)).astype(dtype)
    for name, value in lora.items()
  }
  _write(path, tensors, {"kind": KIND})


def export(path: str | os.PathLike[str], lora: Params, config: VideoDiTConfig, *, scale: float = 1.0) -> None:
  """Writes adapters as diffusers loads them (`load_lora_weights`): PEFT's lora_A and lora_B, a pair a layer.

  Raises:
    WeightsError: an adapter of a layer that diffusers' transformer has not.
  """
  entries = wan_dit.linears(config, wan_dit.DIFFUSERS)
  tensors = {}
  for name in [name.removesuffix(A) for name in lora if name.endswith(A)]:
    entry = entries.get(name.removesuffix(".kernel"))
    if entry is None:
      raise WeightsError(f"the adapter of {name} has no place in {wan_dit.CLASS}; save it under our names")
    stack = lambda value, entry=entry: np.asarray(value, np.float32)[None if entry.layers is None else slice(None)]
    for module, a, b in zip(entry.names, stack(lora[name + A]), scale * stack(lora[name + B]), strict=True):
      tensors[f"transformer.{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
      tensors[f"transformer.{module}.lora_B.weight"] = np.ascontiguousarray(b.T).astype(np.float32)
  _write(path, tensors, {"format": "pt"})


def _write(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
  import safetensors.numpy as library

  with files.whole(path) as temporary:
    library.save_file(dict(tensors), temporary, metadata=metadata)


def parse(text: str) -> tuple[str, float]:
  """(file, scale) of "FILE" or "FILE=SCALE".

  Raises:
    UsageError: the scale is no number.
  """
  file, equals, scale = text.rpartition("=")
  if not equals or pathlib.Path(text).exists():
    return text, 1.0
  try:
    return file, float(scale)
  except ValueError as error:
    raise UsageError(f"LoRA {text!r} is neither FILE nor FILE=SCALE, e.g. style.safetensors=0.8") from error


def merge(params: Params, adapters: Sequence[tuple[Params, float]], prefix: str = "dit.") -> Params:
  """`params` with each (adapters, scale) added to its kernels, which stay where they are on a mesh.

  `prefix` stands before the transformer's paths.
  """
  for lora, scale in adapters:
    added = {prefix + name: value for name, value in lora.items()}
    kernels = {path: params[path] for path in {name.removesuffix(A).removesuffix(B) for name in added}}
    where = {path: kernel.sharding for path, kernel in kernels.items()}
    params = params | jax.jit(merge_lora, out_shardings=where)(kernels, added, scale=scale)
  return params
