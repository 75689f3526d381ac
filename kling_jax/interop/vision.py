"""A vision network from a folder of foreign weights: which kind it is, its shape, its parameters."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

from flax import nnx

from kling_jax.errors import WeightsError
from kling_jax.interop import detect, dinov2, safetensors, siglip, video_mae
from kling_jax.models.video_mae import VideoMae
from kling_jax.models.vit import Vit
from kling_jax.nn import params as params_lib

KINDS: dict[str, tuple[Any, Callable[..., nnx.Module]]] = {
  "siglip": (siglip, Vit),
  "dinov2": (dinov2, Vit),
  "video_mae": (video_mae, VideoMae),
}


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A network with its weights.

  Attributes:
    kind: of `KINDS`.
    shape: `models.vit.Shape` or `models.video_mae.Shape`.
    graph, params: for `nn.params.merge` inside a traced function.
    report: what was loaded.
    fingerprint: of the weights.
  """

  kind: str
  shape: Any
  graph: nnx.GraphDef
  params: params_lib.Params
  report: safetensors.Report
  fingerprint: str


def load(source: str | os.PathLike[str], *kinds: str) -> Loaded:
  """Loads what stands in `source`, one of `kinds` (all of `KINDS` where none is given), in float32.

  Args:
    source: a folder with config.json and safetensors as Hugging Face lays them out, or such a file beside its config.

  Raises:
    WeightsError: damaged files, none of these networks, or one that is not built here.
  """
  source = pathlib.Path(source)
  kinds = kinds or tuple(KINDS)
  tensors = safetensors.Tensors(source)
  kind = next((kind for kind in kinds if KINDS[kind][0].held(tensors)), None)
  if kind is None:
    raise WeightsError(f"{source} holds no {' or '.join(kinds)} in Hugging Face's layout; its tensors have other names")
  names, module = KINDS[kind]
  facts = detect.read_facts(source if source.is_dir() else source.parent)
  try:
    shape = names.read_config(tensors, facts)
  except WeightsError as error:
    raise WeightsError(f"{source}: {error}") from error
  except (KeyError, IndexError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
    raise WeightsError(f"{source} begins like a {kind}, but lacks parts of it ({error!r})") from error
  graph, shapes, _ = params_lib.abstract(lambda: module(shape, rngs=nnx.Rngs(0)))
  recipes = names.name_map(shape, tensors)
  params, report = safetensors.load_into(shapes, source, recipes, allow_unexpected=names.OTHERS)
  return Loaded(kind, shape, graph, params, report, safetensors.fingerprint(tensors))
