"""Parts of a model as folders of safetensors with a config.json: under our names, or under diffusers'."""

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kling_jax import files, progress
from kling_jax.errors import ConfigError, WeightsError
from kling_jax.interop import detect, safetensors, wan_dit, wan_vae
from kling_jax.interop.names import Entry, outward

DTYPES = ("keep", "float32", "bfloat16")
BLOCK = 2**24


def sha256(path: pathlib.Path) -> str:
  """Of a file's bytes."""
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while block := file.read(BLOCK):
      digest.update(block)
  return digest.hexdigest()


def origin(found: detect.Foreign) -> dict[str, Any]:
  """Where weights came from, for the folder and the checkpoint that they are written to."""
  held = sorted({place.file for place in found.tensors.places.values()})
  return {
    "path": str(found.tensors.source), "naming": found.naming, "fingerprint": safetensors.fingerprint(found.tensors),
    "sha256": {file.name: sha256(file) for file in progress.track(held, "hash")},
  }  # fmt: skip


class Cast:
  """An array in another type, not in memory until `np.asarray` asks for it, and refused where it is not finite."""

  def __init__(self, name: str, source: Any, dtype: Any):
    self._name, self._source = name, source
    self.dtype, self.shape, self.size = np.dtype(dtype), tuple(source.shape), source.size

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    values = np.asarray(self._source).astype(dtype or self.dtype, copy=False)
    if not safetensors.finite(values):
      raise WeightsError(f"{self._name} has values that are not finite; take other weights")
    return values


def inward(found: detect.Foreign, folder: str | os.PathLike[str], dtype: str = "keep") -> dict[str, Any]:
  """Writes what was found under our names into `folder`; a shard at a time is in memory.

  Args:
    found: the weights.
    folder: made where it is missing.
    dtype: keep, float32 or bfloat16.

  Returns:
    The summary: kind, parameters, ignored tensors, origin.

  Raises:
    WeightsError: tensors are missing, unknown, of another shape or not finite. What was in `folder` stays then.
  """
  if dtype not in DTYPES:
    raise ConfigError(f"dtype {dtype!r} is unknown; there are {', '.join(DTYPES)}")
  _, shapes, _ = detect.described(found)
  where, taken = found.tensors.source, detect.taken(found)
  ours = [name for name in shapes if name not in found.name_map]
  for fault, names in (
    ("lack", sorted(taken - set(found.tensors))),
    ("lack", [name for name in ours if not detect.matches(name, found.ours)]),
    ("hold the unknown", sorted(set(found.tensors) - taken - set(found.ignored))),
  ):
    if names:
      raise WeightsError(f"{where}: the weights of this {found.kind} {fault} {', '.join(names[:8])}; copy them again")
  arrays: dict[str, Any] = {}
  for path, recipe in found.name_map.items():
    recipe = safetensors.Built((recipe,), np.asarray) if isinstance(recipe, str) else recipe
    array = safetensors.gathered(recipe, found.tensors)
    if path in shapes and tuple(array.shape) != tuple(shapes[path].shape):
      raise WeightsError(f"{where}: {path} is {array.shape} in the file, {shapes[path].shape} by the rest of it")
    if not jax.dtypes.issubdtype(array.dtype, np.floating):
      raise WeightsError(f"{where}: {path} is {array.dtype}; weights are floats")
    arrays[path] = Cast(f"{where}: {path}", array, array.dtype if dtype == "keep" else dtype)
  for array in progress.track(list(arrays.values()), "check"):  # before the first byte is written
    np.asarray(array)
  source = origin(found)
  safetensors.write(folder, arrays, metadata={"kind": found.kind, "fingerprint": source["fingerprint"]})
  config = detect.own_json(found.kind, found.config, source)
  files.write_json(pathlib.Path(folder) / "config.json", config)
  return {
    "kind": found.kind, "folder": str(folder), "parameters": sum(array.size for array in arrays.values()),
    "tensors": len(arrays), "at_start": ours, "ignored": list(found.ignored), "source": source,
  }  # fmt: skip


def write_ours(
  folder: pathlib.Path, kind: str, config: Any, params: Mapping[str, Any], source: Mapping[str, Any]
) -> None:
  """Writes parameters under our names, with the config.json that `detect.recognise` reads."""
  safetensors.write(folder, params, metadata={"kind": kind})
  files.write_json(folder / "config.json", detect.own_json(kind, config, source))


def write_diffusers(folder: pathlib.Path, kind: str, config: Any, params: Mapping[str, Any]) -> list[str]:
  """Writes a video_dit or video_vae under diffusers' names; returns the parameters that diffusers has no place for.

  Raises:
    WeightsError: another kind, or a transformer that is not of Wan's form.
  """
  entries: Mapping[str, Entry]
  if kind == "video_dit":
    entries, facts = wan_dit.entries(config), wan_dit.config_json(config)
  elif kind == "video_vae":
    entries = wan_vae.entries(config)
    facts = wan_vae.config_json(config, *(np.asarray(params[name]) for name in (wan_vae.MEAN, wan_vae.LOG_STD)))
  else:
    raise WeightsError(f"diffusers' names are known for video_dit and video_vae here, not for {kind}")
  lost = [path for path in entries if path not in params]
  if lost:
    raise WeightsError(f"the {kind} lacks {', '.join(lost[:8])}, which Wan's form has; export it under our names")
  safetensors.write(folder, outward(params, entries), metadata={"format": "pt"}, stem="diffusion_pytorch_model")
  files.write_json(folder / "config.json", facts)
  known = {*entries, wan_vae.MEAN, wan_vae.LOG_STD}
  return [path for path in params if path not in known]
