"""LAION's aesthetic predictor: a linear function of CLIP's normalised image vector, where its weights are given.

Its published head is five linear layers without activations between them, which are one affine map; here they are
multiplied out. Wanted are safetensors of CLIP ViT-L/14's image tower as OpenAI trained it and of the head as
`layers.0.weight`, ...: one file that holds both, or a folder with two files.
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kling_jax.errors import WeightsError
from kling_jax.interop import clip, safetensors
from kling_jax.measure.clip import Scorer
from kling_jax.measure.sample import Sample
from kling_jax.models.clip_image import DEVIATION, MEAN, ClipImageTower
from kling_jax.nn import params as params_lib
from kling_jax.nn import resample

NAME = "laion"
VERSION = "2"  # of how frames are prepared; the weights' hash follows it
FRAMES = 3  # of a clip: first, middle and last place


def scorer(source: str | os.PathLike[str]) -> Scorer:
  """The scorer of the condition `aesthetic`, about 1 to 10: mean over three frames.

  Its version ends in a hash of the weights' files, so that clips scored with other weights are told apart.

  Raises:
    WeightsError: no weights there, or not of CLIP's image tower with a linear head for its vectors.
  """
  rate, version = predictor(source)

  def measure(sample: Sample) -> dict[str, float]:
    places = sample.places
    picks = np.unique(np.linspace(0, len(places) - 1, min(FRAMES, len(places))).round().astype(int))
    return {"aesthetic": float(rate(sample.frames_THWC[[places[k] for k in picks]]).mean())}

  return Scorer(NAME, version, ("aesthetic",), measure)


def predictor(source: str | os.PathLike[str]) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
  """(uint8 RGB frames (B, H, W, 3) -> ratings (B,), the version); see `scorer`."""
  tensors = safetensors.Tensors(source)
  shape, recipes = clip.tower(tensors)
  weight_D, bias = head(tensors)
  if len(weight_D) != shape.projection:
    raise WeightsError(f"{source}: the head is for vectors of {len(weight_D)}, the tower gives {shape.projection}")
  graph, shapes, _ = params_lib.abstract(lambda: ClipImageTower(shape, rngs=nnx.Rngs(0)))
  loaded, _ = safetensors.load_into(shapes, source, recipes, allow_unexpected=clip.OTHERS)
  loaded = jax.device_put(loaded)

  @jax.jit
  def rated(params: params_lib.Params, images_BHWC: jax.Array) -> jax.Array:
    vectors = params_lib.merge(graph, params)(images_BHWC)
    vectors = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors @ jnp.asarray(weight_D, jnp.float32) + np.float32(bias)

  def rate(frames_BHWC: np.ndarray) -> np.ndarray:
    images = np.stack([prepared(frame, shape.image) for frame in frames_BHWC])
    return np.asarray(rated(loaded, images))

  return rate, f"{VERSION}-{_hash(pathlib.Path(source))}"


def head(tensors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, float]:
  """The layers `layers.<number>.weight` and `.bias` as one affine map: (weight (D,), bias), in float64.

  Raises:
    WeightsError: there are none, they do not fit one another, or the last one gives more than one number.
  """
  found = (re.fullmatch(r"layers\.(\d+)\.weight", name) for name in tensors)
  numbers = sorted(int(match[1]) for match in found if match)
  if not numbers:
    raise WeightsError("no aesthetic head: wants tensors layers.0.weight, layers.0.bias, ... beside CLIP's")
  inputs = tensors[f"layers.{numbers[0]}.weight"].shape[1]
  weight, bias = np.eye(inputs), np.zeros(inputs)
  for number in numbers:
    layer = np.asarray(tensors[f"layers.{number}.weight"], np.float64)
    if layer.shape[1] != len(weight):
      raise WeightsError(f"layers.{number}.weight takes {layer.shape[1]} values, the layer before gives {len(weight)}")
    weight = layer @ weight
    bias = layer @ bias + np.asarray(tensors[f"layers.{number}.bias"], np.float64)
  if len(weight) != 1:
    raise WeightsError(f"the aesthetic head gives {len(weight)} numbers; wants one")
  return weight[0], float(bias[0])


def prepared(frame_HWC: np.ndarray, side: int) -> np.ndarray:
  """A uint8 frame as CLIP's own preprocessing gives it, float32 less MEAN over DEVIATION.

  Shorter side to `side` by Pillow's bicubic kernel, columns first, rounded to levels after each direction; then the
  middle square, placed as torchvision does.
  """
  height, width = frame_HWC.shape[:2]
  longer = int(side * max(height, width) / min(height, width))
  size = (side, longer) if height <= width else (longer, side)
  picture = frame_HWC.astype(np.float32)
  for axis in (1, 0):
    if picture.shape[axis] != size[axis]:
      weights = resample.matrix(picture.shape[axis], size[axis], "cubic-antialias")
      picture = np.moveaxis(np.tensordot(weights, picture, (1, axis)), 0, axis)
      picture = np.floor(np.clip(picture, 0, 255) + 0.5)
  top, left = (round((length - side) / 2) for length in size)
  square = picture[top : top + side, left : left + side] / 255
  return ((square - np.asarray(MEAN)) / np.asarray(DEVIATION)).astype(np.float32)


def _hash(source: pathlib.Path) -> str:
  """12 hex digits of the content of the weights' files."""
  digest = hashlib.sha256()
  for path in [source] if source.is_file() else sorted(source.glob("*.safetensors")):
    with path.open("rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").digest())
  return digest.hexdigest()[:12]
