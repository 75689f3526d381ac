"""What a folder of foreign weights holds: told from the names of its tensors and its config.json, else refused."""

import dataclasses
import fnmatch
import json
import os
import pathlib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from kling_jax.errors import ConfigError, WeightsError
from kling_jax.interop import chameleon, clip_text, llama, qwen3_vl, sd_vae, t5, wan_dit, wan_vae
from kling_jax.interop.names import Entries, prefixed, recipes
from kling_jax.interop.safetensors import Built, Stacked, Tensors
from kling_jax.models.chameleon import Chameleon, ChameleonConfig
from kling_jax.models.clip_text import ClipTextConfig, ClipTextEncoder
from kling_jax.models.image_vae import ImageVAE, ImageVAEConfig
from kling_jax.models.language_model import LanguageModel
from kling_jax.models.language_model import Shape as LanguageShape
from kling_jax.models.qwen_vl import QwenVL, QwenVLConfig
from kling_jax.models.t5 import T5Config, T5Encoder
from kling_jax.models.video_dit import VideoDiT, VideoDiTConfig
from kling_jax.models.video_vae import VideoVAE, VideoVAEConfig
from kling_jax.nn import params as params_lib

# Prefixes that other programs put before all names of a transformer.
WRAPPERS = ("model.diffusion_model.", "diffusion_model.", "model.", "module.")
CONFIG_BYTES = 2**20
Recipe = str | Built | Stacked
OWN = "kling_jax"  # the key of config.json that says that names and shapes are ours
CLASSES: dict[str, tuple[type, Callable[..., nnx.Module]]] = {
  "video_dit": (VideoDiTConfig, VideoDiT),
  "video_vae": (VideoVAEConfig, VideoVAE),
  "image_vae": (ImageVAEConfig, ImageVAE),
  "t5": (T5Config, T5Encoder),
  "clip_text": (ClipTextConfig, ClipTextEncoder),
  "language_model": (LanguageShape, LanguageModel),
  "chameleon": (ChameleonConfig, Chameleon),
  "qwen_vl": (QwenVLConfig, QwenVL),
}


@dataclasses.dataclass(frozen=True)
class Foreign:
  """A model in a layout that is not ours.

  Attributes:
    kind: video_dit, video_vae, image_vae, t5, clip_text, language_model, chameleon or qwen_vl: the name of our class's
      file.
    naming: whose names they are.
    config: the shape, of our class.
    init: builds our class, for its shapes.
    name_map: for `safetensors.load_into`.
    ignored: tensors that ours does not take and that are no surprise.
    ours: patterns of our parameters that no foreign file has; they start as no-ops.
    tensors: the file or folder, its headers read.
    facts: config.json, {} where there is none.
  """

  kind: str
  naming: str
  config: Any
  init: Callable[[], nnx.Module]
  name_map: dict[str, Recipe]
  ignored: list[str]
  ours: tuple[str, ...]
  tensors: Tensors
  facts: dict[str, Any]


def recognise(source: str | os.PathLike[str]) -> Foreign | None:
  """What stands in the file or folder `source`; None where its names are of nothing that is known here.

  Raises:
    WeightsError: damaged files, or a known model in a form that is not built here.
  """
  source = pathlib.Path(source)
  tensors = Tensors(source)
  facts = read_facts(source if source.is_dir() else source.parent)
  try:
    return _recognise(tensors, facts)
  except (KeyError, ValueError, IndexError, TypeError, ConfigError) as error:
    raise WeightsError(f"{source} begins like a model that is known here, but lacks parts of it ({error!r})") from error
  except WeightsError as error:
    raise WeightsError(f"{source}: {error}") from error


def wanted(source: str | os.PathLike[str], *kinds: str) -> Foreign:
  """`recognise`, where anything else than these kinds is an error that says what was found."""
  found = recognise(source)
  if found is None or found.kind not in kinds:
    what = "no model that is known here" if found is None else f"a {found.kind} ({found.naming} names)"
    raise WeightsError(f"{source} holds {what}; wanted: {', '.join(kinds)}")
  return found


def described(found: Foreign) -> tuple[nnx.GraphDef, dict[str, jax.ShapeDtypeStruct], dict[str, Any]]:
  """Graph, shapes and axes of our class for these weights."""
  return params_lib.abstract(found.init)


def taken(found: Foreign) -> set[str]:
  """The tensors that our class takes."""
  parts = [(recipe,) if isinstance(recipe, str) else recipe.names for recipe in found.name_map.values()]
  return {name for names in parts for name in names}


def matches(name: str, patterns: Iterable[str]) -> bool:
  """Whether any pattern (fnmatch) fits."""
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def folder_of(found: Foreign) -> pathlib.Path:
  """The folder that the weights lie in."""
  source = found.tensors.source
  return source if source.is_dir() else source.parent


def read_facts(folder: pathlib.Path) -> dict[str, Any]:
  """config.json of a folder; {} where there is none.

  Raises:
    WeightsError: it is damaged, or no object.
  """
  path = folder / "config.json"
  if not path.is_file():
    return {}
  try:
    if path.stat().st_size > CONFIG_BYTES:
      raise ValueError(f"it has {path.stat().st_size} bytes")
    facts = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(facts, dict):
      raise ValueError("it is no object")
  except (ValueError, RecursionError) as error:
    raise WeightsError(f"{path} is no config ({error}); copy it again") from error
  return facts


class _Stripped(Mapping[str, np.ndarray]):
  """Tensors whose names lost a prefix that all of them had."""

  def __init__(self, tensors: Tensors, prefix: str):
    self._tensors, self._prefix = tensors, prefix

  def __getitem__(self, name: str) -> np.ndarray:
    return self._tensors[self._prefix + name]

  def __iter__(self) -> Iterator[str]:
    return (name.removeprefix(self._prefix) for name in self._tensors)

  def __contains__(self, name: object) -> bool:
    return f"{self._prefix}{name}" in self._tensors.places

  def __len__(self) -> int:
    return len(self._tensors)


def _recognise(tensors: Tensors, facts: dict[str, Any]) -> Foreign | None:
  for prefix in ("", *WRAPPERS):
    if all(name.startswith(prefix) for name in tensors):
      found = _under(prefix, _Stripped(tensors, prefix), tensors, facts)
      if found is not None:
        return found
  return None


def _under(prefix: str, names: _Stripped, tensors: Tensors, facts: dict[str, Any]) -> Foreign | None:
  """The model whose names all begin with `prefix`."""

  own = facts.get(OWN)
  if not prefix and own is not None:
    return _of_ours(tensors, facts, own)

  def build(
    kind: str, naming: str, config: Any, init: Callable[..., nnx.Module], entries: Entries,
    extra: Mapping[str, Recipe] = {}, ignored: Iterable[str] = (), ours: tuple[str, ...] = (),
  ) -> Foreign:  # fmt: skip
    name_map = {**recipes(prefixed(entries, theirs=prefix)), **extra}
    unused = sorted(prefix + name for name in ignored)
    return Foreign(kind, naming, config, lambda: init(config, rngs=nnx.Rngs(0)), name_map, unused, ours, tensors, facts)

  naming = wan_dit.naming_of(names)
  if naming is not None:
    dit = wan_dit.read_config(names, facts)
    return build("video_dit", naming, dit, VideoDiT, wan_dit.entries(dit, naming), ours=wan_dit.OURS)
  naming = wan_vae.naming_of(names)
  if naming is not None:
    vae = wan_vae.read_config(names, facts)
    return build("video_vae", naming, vae, VideoVAE, wan_vae.entries(vae, naming), wan_vae.moments(vae, facts))
  if sd_vae.held(names):
    image = sd_vae.read_config(names, facts)
    return build("image_vae", "diffusers", image, ImageVAE, sd_vae.entries(image, names))
  if t5.held(names):
    text = t5.read_config(names, facts)
    return build("t5", "transformers", text, T5Encoder, t5.entries(text, names), ignored=t5.unused(names, text))
  if clip_text.held(names):
    clip = clip_text.read_config(names, facts)
    return build("clip_text", "transformers", clip, ClipTextEncoder, clip_text.entries(clip),
                 ignored=clip_text.unused(names))  # fmt: skip
  if prefix:  # decoders have names of their own before their layers
    return None
  if chameleon.held(names):
    both = chameleon.read_config(names, facts)
    return build("chameleon", "transformers", both, Chameleon, chameleon.entries(both),
                 chameleon.codebook(both, facts), chameleon.unused(names, both))  # fmt: skip
  if qwen3_vl.tower_of(names) is not None:
    qwen = qwen3_vl.read_config(names, facts)
    return build("qwen_vl", "transformers", qwen, QwenVL, qwen3_vl.entries(qwen, names),
                 qwen3_vl.joined(qwen, names), llama.unused(names, qwen.language))  # fmt: skip
  root = llama.prefix_of(names)
  if root is not None:
    decoder = llama.read_config(names, facts)
    return build("language_model", "transformers", decoder, LanguageModel, llama.entries(decoder, root),
                 ignored=llama.unused(names, decoder))  # fmt: skip
  return None


# ---- our own layout --------------------------------------------------------------------------------------------------


def own_json(kind: str, config: Any, source: Mapping[str, Any]) -> dict[str, Any]:
  """config.json of weights under our own names.

  Args:
    kind, config: see `Foreign`.
    source: where they came from: path, fingerprint, sha256 of the files, ...
  """
  return {OWN: {"kind": kind, "config": dataclasses.asdict(config), "source": dict(source)}}


def _of_ours(tensors: Tensors, facts: dict[str, Any], own: Any) -> Foreign:
  if not isinstance(own, dict) or own.get("kind") not in CLASSES:
    raise ValueError(f"{OWN!r} in config.json names no kind of weights; there are {', '.join(CLASSES)}")
  kind = own["kind"]
  shape, init = CLASSES[kind]
  config = _rebuilt(shape, own["config"])
  identity: dict[str, Recipe] = {name: name for name in tensors}
  absent = wan_dit.OURS if kind == "video_dit" else ()
  ours = tuple(pattern for pattern in absent if not any(fnmatch.fnmatchcase(name, pattern) for name in tensors))
  return Foreign(kind, OWN, config, lambda: init(config, rngs=nnx.Rngs(0)), identity, [], ours, tensors, facts)


def _rebuilt(shape: Any, values: Mapping[str, Any]) -> Any:
  """A config from what `dataclasses.asdict` and JSON made of it: lists were tuples, objects were configs."""
  kinds = typing.get_type_hints(shape)
  read = lambda name, value: (
    tuple(value) if isinstance(value, list) else _rebuilt(kinds[name], value) if isinstance(value, dict) else value
  )
  return shape(**{name: read(name, value) for name, value in values.items()})
