"""Names of CLIP's image tower in published safetensors, in Hugging Face's and in OpenCLIP's naming, and its sizes."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from kling_jax.errors import WeightsError
from kling_jax.interop.safetensors import Built
from kling_jax.models.clip_image import HEAD_SIZE, Shape

HUGGING_FACE, OPEN_CLIP = "vision_model.", "visual."
# Of files with the whole CLIP, and of aesthetic predictors: what the tower does not take.
OTHERS = (
  "*position_ids", "text_model.*", "text_projection*", "logit_*", "transformer.*", "token_embedding.*", "ln_final.*",
  "positional_embedding", "attn_mask", "layers.*",
)  # fmt: skip


def tower(tensors: Mapping[str, np.ndarray]) -> tuple[Shape, dict[str, Built]]:
  """The sizes of the tower that a file holds, and for each of its parameters what it is made of.

  Raises:
    WeightsError: no CLIP image tower by either naming, or one whose heads are not of 64.
  """
  for names in (_hugging_face, _open_clip):
    depth = _depth(tensors, names)
    if depth:
      break
  else:
    raise WeightsError(
      "no image tower of CLIP: wants tensors named vision_model.encoder.layers.0... (Hugging Face) or "
      "visual.transformer.resblocks.0... (OpenCLIP)"
    )
  recipes = names(depth)
  lost = [name for recipe in recipes.values() for name in recipe.names if name not in tensors]
  if lost:
    raise WeightsError(f"the image tower of CLIP lacks {len(lost)} tensors, first {lost[0]}")
  kernel = recipes["patches.kernel"].build(*(tensors[name] for name in recipes["patches.kernel"].names))
  patch = round((kernel.shape[0] / 3) ** 0.5)
  positions = tensors[recipes["positions"].names[0]]
  project = recipes["projection.kernel"]
  shape = Shape(
    width=kernel.shape[1],
    depth=depth,
    patch=patch,
    image=round((len(positions) - 1) ** 0.5) * patch,
    projection=project.build(*(tensors[name] for name in project.names)).shape[1],
  )
  if shape.width % HEAD_SIZE:
    raise WeightsError(f"a tower of width {shape.width}; heads are of {HEAD_SIZE} here, as in ViT-B and ViT-L")
  return shape, recipes


def _depth(tensors: Iterable[str], names: Callable[[int], dict[str, Built]]) -> int:
  """How many blocks there are by this naming."""
  held, depth = set(tensors), 0
  while names(depth + 1)["blocks.attention_norm.scale"].names[depth] in held:
    depth += 1
  return depth


def _kernel(weight: np.ndarray) -> np.ndarray:
  return weight.T


def _flat(weight: np.ndarray) -> np.ndarray:
  """A convolution (out, channel, row, column) as a product with flattened patches."""
  return weight.reshape(len(weight), -1).T


def _same(array: np.ndarray) -> np.ndarray:
  return array


def _third(number: int, build: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
  return lambda array: build(np.split(array, 3)[number])


def _one(name: str, build: Callable[..., np.ndarray] = _same) -> Built:
  return Built((name,), build)


def _stacked(pattern: str, depth: int, build: Callable[[np.ndarray], np.ndarray] = _same) -> Built:
  """The same tensor of all blocks, one above the other; `pattern` holds {} for the block's number."""
  return Built(tuple(pattern.format(k) for k in range(depth)), lambda *arrays: np.stack([build(a) for a in arrays]))


def _hugging_face(depth: int) -> dict[str, Built]:
  block = HUGGING_FACE + "encoder.layers.{}."
  recipes = {
    "class_token": _one(HUGGING_FACE + "embeddings.class_embedding"),
    "positions": _one(HUGGING_FACE + "embeddings.position_embedding.weight"),
    "patches.kernel": _one(HUGGING_FACE + "embeddings.patch_embedding.weight", _flat),
    "projection.kernel": _one("visual_projection.weight", _kernel),
  }
  for ours, theirs in (("norm_before", "pre_layrnorm"), ("norm_after", "post_layernorm")):  # spelt so
    recipes[f"{ours}.scale"] = _one(f"{HUGGING_FACE}{theirs}.weight")
    recipes[f"{ours}.bias"] = _one(f"{HUGGING_FACE}{theirs}.bias")
  for ours, theirs in (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2")):
    recipes[f"blocks.{ours}.scale"] = _stacked(block + theirs + ".weight", depth)
    recipes[f"blocks.{ours}.bias"] = _stacked(block + theirs + ".bias", depth)
  parts = {f"attention.{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")}
  for ours, theirs in (parts | {"up": "mlp.fc1", "down": "mlp.fc2"}).items():
    recipes[f"blocks.{ours}.kernel"] = _stacked(block + theirs + ".weight", depth, _kernel)
    recipes[f"blocks.{ours}.bias"] = _stacked(block + theirs + ".bias", depth)
  return recipes


def _open_clip(depth: int) -> dict[str, Built]:
  block = OPEN_CLIP + "transformer.resblocks.{}."
  recipes = {
    "class_token": _one(OPEN_CLIP + "class_embedding"),
    "positions": _one(OPEN_CLIP + "positional_embedding"),
    "patches.kernel": _one(OPEN_CLIP + "conv1.weight", _flat),
    "projection.kernel": _one(OPEN_CLIP + "proj"),
  }
  for ours, theirs in (("norm_before", "ln_pre"), ("norm_after", "ln_post")):
    recipes[f"{ours}.scale"] = _one(f"{OPEN_CLIP}{theirs}.weight")
    recipes[f"{ours}.bias"] = _one(f"{OPEN_CLIP}{theirs}.bias")
  for ours, theirs in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
    recipes[f"blocks.{ours}.scale"] = _stacked(block + theirs + ".weight", depth)
    recipes[f"blocks.{ours}.bias"] = _stacked(block + theirs + ".bias", depth)
  for third, name in enumerate(("q", "k", "v")):  # one tensor holds all three
    recipes[f"blocks.attention.{name}.kernel"] = _stacked(block + "attn.in_proj_weight", depth, _third(third, _kernel))
    recipes[f"blocks.attention.{name}.bias"] = _stacked(block + "attn.in_proj_bias", depth, _third(third, _same))
  for ours, theirs in (("attention.out", "attn.out_proj"), ("up", "mlp.c_fc"), ("down", "mlp.c_proj")):
    recipes[f"blocks.{ours}.kernel"] = _stacked(block + theirs + ".weight", depth, _kernel)
    recipes[f"blocks.{ours}.bias"] = _stacked(block + theirs + ".bias", depth)
  return recipes
