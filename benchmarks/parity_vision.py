"""Parity of vision networks with transformers and torchvision: CLIP, SigLIP, SigLIP 2, DINOv2, VideoMAE, RAFT-small.

See parity.py, which runs these cases.
"""

import functools
import itertools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import agreement
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kling_jax.interop import clip, raft, safetensors, vision
from kling_jax.measure import laion
from kling_jax.models import vit
from kling_jax.models.clip_image import ClipImageTower
from kling_jax.nn import params as params_lib

SIDE, PATCH = 112, 14
LARGE = {
  "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": SIDE,
  "patch_size": PATCH,
}  # fmt: skip
SMALL = {
  "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
  "patch_size": 7,
}  # fmt: skip
DINO = ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


# ---- references ------------------------------------------------------------------------------------------------------


def randomised(model: Any, seed: int = 0) -> Any:
  """The model with every parameter drawn anew, norms and scales too, at sizes that keep activations of order one."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
      table = any(word in name for word in ("position", "token", "probe", "class_embedding"))
      if parameter.ndim > 1 and not table:
        parameter.copy_(noise * fan_in**-0.5)
      elif ("norm" in name and name.endswith("weight")) or "lambda" in name:
        parameter.copy_(1 + 0.2 * noise)
      else:
        parameter.copy_(0.5 * noise if table else 0.1 * noise)
      parameter.copy_(parameter.to(torch.bfloat16))  # so that the fixtures need half of the bytes
  return model.eval()


def saved(model: Any, folder: str) -> dict[str, Any]:
  """Writes the model as its library does; its config.json."""
  import json

  model.save_pretrained(folder)
  return json.loads((pathlib.Path(folder) / "config.json").read_text())


def asked(model: Any, **inputs: Any) -> Any:
  """The model's answer without gradients."""
  import torch

  with torch.no_grad():
    return model(**inputs)


def channels_first(images_BHWC: np.ndarray) -> Any:
  import torch

  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(images_BHWC, -1, -3)))


def drawn(*sizes: int, seed: int = 1) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(sizes).astype(np.float32)


# ---- our side --------------------------------------------------------------------------------------------------------


class Ours:
  """A loaded network as two compiled functions of the same inputs: in float32, and all of it in bfloat16."""

  def __init__(self, graph: nnx.GraphDef, params: dict, call: Callable[..., Any] | None = None):
    self.params = {name: jnp.asarray(value) for name, value in params.items()}
    call = call or (lambda model, *inputs: model(*inputs))
    self.run = jax.jit(lambda params, *inputs: call(params_lib.merge(graph, params), *inputs))

  def __call__(self, *inputs: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(self.run(self.params, *inputs))]

  def in_bfloat16(self, images: np.ndarray, *others: Any) -> list[np.ndarray]:
    return self(jnp.asarray(images, jnp.bfloat16), *others)


def row(
  part: str, reference: str, pairs: list[tuple[Any, Any]], low: list[tuple[Any, Any]], note: str, **others: Any
) -> dict:
  """A row of the table from pairs (ours, theirs) in float32 and in bfloat16."""
  return {
    "part": part, "reference": reference, "note": note, **others,
    "max_rel_error": max(agreement.relative_error(ours, theirs) for ours, theirs in pairs),
    "cosine_bf16": min((agreement.cosine(ours, theirs) for ours, theirs in low), default=None),
  }  # fmt: skip


def tower(name: str, seed: int = 0, **changes: Any) -> Any:
  """A model of transformers by its class's stem: tower("SiglipVision", ...) with random weights."""
  import transformers

  config = getattr(transformers, f"{name}Config")(**changes)
  return randomised(getattr(transformers, f"{name}Model")(config), seed)


def compared(
  name: str, changes: dict[str, Any], sizes: list[tuple[int, int]], part: str, note: str, **call: Any
) -> dict:
  """A tower that gives pooled and patch features, on batches of two pictures of several sizes; timed on the first."""
  model = tower(name, **changes)
  with tempfile.TemporaryDirectory() as folder:
    saved(model, folder)
    loaded = vision.load(folder)
  ours = Ours(loaded.graph, loaded.params)
  pairs, low, times = [], [], {}
  for rows, columns in sizes:
    images = drawn(2, rows * PATCH, columns * PATCH, 3)
    inputs = {"pixel_values": channels_first(images)} | call
    answer = asked(model, **inputs)
    skipped = 1 + loaded.shape.registers if loaded.shape.pool == "class" else 0
    theirs = [answer.pooler_output.numpy(), answer.last_hidden_state[:, skipped:].numpy()]
    pairs += zip(ours(images), theirs, strict=True)
    low += zip(ours.in_bfloat16(images), theirs, strict=True)
    times = times or agreement.times(functools.partial(ours, images), functools.partial(asked, model, **inputs))
  return row(part, f"transformers {name}Model", pairs, low, note, **times)


# ---- cases -----------------------------------------------------------------------------------------------------------


def clip_vision() -> dict:
  """CLIP's image tower with its projection, and LAION's head on the unit vectors."""
  import torch
  import transformers

  config = transformers.CLIPVisionConfig(**LARGE, projection_dim=48, hidden_act="quick_gelu")
  model = randomised(transformers.CLIPVisionModelWithProjection(config))
  torch.manual_seed(3)
  sizes = (48, 64, 16, 8, 4, 1)  # five layers, as in LAION's predictor
  head = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
  layers = {
    f"layers.{2 * k}.{name}": value.detach().numpy()
    for k, layer in enumerate(head)
    for name, value in layer.named_parameters()
  }
  images = drawn(2, SIDE, SIDE, 3)
  with tempfile.TemporaryDirectory() as folder:
    saved(model, folder)
    safetensors.write(pathlib.Path(folder) / "head", layers)
    (pathlib.Path(folder) / "head" / "model.safetensors").rename(pathlib.Path(folder) / "head.safetensors")
    tensors = safetensors.Tensors(folder)
    shape, recipes = clip.tower(tensors)
    graph, shapes, _ = params_lib.abstract(lambda: ClipImageTower(shape, rngs=nnx.Rngs(0)))
    loaded, _ = safetensors.load_into(shapes, folder, recipes, allow_unexpected=clip.OTHERS)
    weight_D, bias = laion.head(tensors)
  ours = Ours(graph, loaded)
  inputs = {"pixel_values": channels_first(images)}
  theirs = asked(model, **inputs).image_embeds
  with torch.no_grad():
    rating = head(theirs / theirs.norm(dim=-1, keepdim=True))[:, 0].numpy()
  vectors = ours(images)[0]
  rated = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True) @ weight_D + bias
  return row(
    "CLIP image tower, LAION head", "transformers CLIPVisionModelWithProjection; torch.nn.Linear x 5",
    [(vectors, theirs.numpy()), (rated, rating)], [(ours.in_bfloat16(images)[0], theirs.numpy())],
    "12 layers, width 384, 64 patches; the head as one affine map",
    **agreement.times(lambda: ours(images), lambda: asked(model, **inputs)),
  )  # fmt: skip


def siglip() -> dict:
  return compared(
    "SiglipVision", LARGE, [(8, 8), (5, 11)], "SigLIP, SigLIP 2 of one size",
    "12 layers, width 384; 8 x 8 patches, and 5 x 11 with resampled positions", interpolate_pos_encoding=True,
  )  # fmt: skip


def siglip2_naflex() -> dict:
  """Three pictures of three sizes in a batch that is filled up to 64 patches."""
  grids, length = [(8, 8), (5, 11), (9, 3)], 64
  model = tower("Siglip2Vision", **{k: v for k, v in LARGE.items() if k != "image_size"}, num_patches=64)
  inputs, patches, places, real = naflex(grids, length, PATCH, 64)
  with tempfile.TemporaryDirectory() as folder:
    saved(model, folder)
    loaded = vision.load(folder, "siglip")
  ours = Ours(loaded.graph, loaded.params, lambda model, *inputs: model.packed(*inputs))
  answer = asked(model, **inputs)
  theirs = [answer.pooler_output.numpy(), answer.last_hidden_state.numpy()[real]]
  seen = lambda features: [features[0], features[1][real]]
  return row(
    "SigLIP 2 NaFlex", "transformers Siglip2VisionModel",
    list(zip(seen(ours(patches, places, real)), theirs, strict=True)),
    list(zip(seen(ours.in_bfloat16(patches, places, real)), theirs, strict=True)),
    "12 layers, width 384; 64, 55 and 27 patches in one masked batch",
    **agreement.times(lambda: ours(patches, places, real), lambda: asked(model, **inputs)),
  )  # fmt: skip


def naflex(grids: list[tuple[int, int]], length: int, patch: int, table: int) -> tuple[dict, Any, Any, Any]:
  """(the reference's inputs, patches, places, real) of random pictures of these grids."""
  import torch

  side = round(table**0.5)
  blocks = vit.Blocks(width=1, depth=1, heads=1, hidden=1)
  shape = vit.Shape(blocks, patch=patch, side=side, pool="attention", kernel="linear-antialias")
  places, real = vit.places(shape, grids, length)
  patches = drawn(len(grids), length, 3 * patch**2)
  inputs = {
    "pixel_values": torch.from_numpy(patches), "pixel_attention_mask": torch.from_numpy(real.astype(np.int32)),
    "spatial_shapes": torch.tensor(grids),
  }  # fmt: skip
  return inputs, patches, places, real


def dinov2() -> dict:
  changes = {name: LARGE[name] for name in DINO}
  note = "12 layers, width 384; 8 x 8 patches, and 5 x 11 with resampled positions"
  return compared("Dinov2", changes, [(8, 8), (5, 11)], "DINOv2", note)


def dinov2_registers() -> dict:
  changes = {name: LARGE[name] for name in DINO} | {"use_swiglu_ffn": True}
  note = "12 layers, width 384, SwiGLU, 4 registers; 8 x 8, 5 x 11 and 17 x 12 patches (antialiased positions)"
  return compared("Dinov2WithRegisters", changes, [(8, 8), (5, 11), (17, 12)], "DINOv2 with registers", note)


def video_mae() -> dict:
  """Fine-tuned (norm after the mean), pretrained (norm before it) and the bare encoder."""
  import torch
  import transformers

  sizes = LARGE | {"image_size": 56, "num_frames": 8, "num_hidden_layers": 6}
  video = drawn(2, 8, 56, 56, 3)
  inputs = {"pixel_values": channels_first(video)}
  pairs, low, times = [], [], {}
  for pooled in (True, False):
    config = transformers.VideoMAEConfig(**sizes, use_mean_pooling=pooled)
    model = randomised(transformers.VideoMAEForVideoClassification(config))
    with tempfile.TemporaryDirectory() as folder:
      saved(model, folder)
      loaded = vision.load(folder, "video_mae")
    tokens = Ours(loaded.graph, loaded.params, lambda model, video: model.tokens(video))
    ours = Ours(loaded.graph, loaded.params)
    last = asked(model.videomae, **inputs).last_hidden_state
    with torch.no_grad():
      mean = model.fc_norm(last.mean(1)) if pooled else last.mean(1)
    pairs += [(tokens(video)[0], last.numpy()), (ours(video)[0], mean.numpy())]
    low += [(ours.in_bfloat16(video)[0], mean.numpy())]
    theirs = functools.partial(asked, model.videomae, **inputs)
    times = times or agreement.times(functools.partial(tokens, video), theirs)
  note = "6 layers, width 384; tokens and mean features, fine-tuned and pretrained forms; 8 frames of 56"
  return row("VideoMAE", "transformers VideoMAEForVideoClassification", pairs, low, note, **times)


RAFT_SEED = 4


def raft_reference() -> tuple[Any, dict[str, np.ndarray]]:
  """torchvision's raft_small with drawn weights, and these."""
  import torch
  from torchvision.models.optical_flow import raft_small

  model = raft_small().eval()
  shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
  weights = agreement.drawn(shapes, RAFT_SEED)
  model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
  return model, weights


def raft_pictures(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """A smooth random picture, and the same moved by a few pixels, in [-1, 1]."""
  rng = np.random.default_rng(2)
  rough = rng.uniform(-1, 1, (1, height // 8 + 4, width // 8 + 4, 3)).astype(np.float32)
  large = np.asarray(jax.image.resize(rough, (1, height + 32, width + 32, 3), "cubic"))
  return large[:, 16:-16, 16:-16], large[:, 13:-19, 18:-14]


def raft_small() -> dict:
  model, weights = raft_reference()
  with tempfile.TemporaryDirectory() as folder:
    safetensors.write(folder, weights)
    graph, params, _ = raft.load(folder)
  ours = Ours(graph, params)
  pairs, low, times = [], [], {}
  for size in ((256, 448), (136, 200)):
    first, second = raft_pictures(*size)
    inputs = {"image1": channels_first(first), "image2": channels_first(second)}
    theirs = np.moveaxis(asked(model, **inputs)[-1].numpy(), 1, -1)
    pairs.append((ours(first, second)[0], theirs))
    low.append((ours(jnp.asarray(first, jnp.bfloat16), jnp.asarray(second, jnp.bfloat16))[0], theirs))
    times = times or agreement.times(functools.partial(ours, first, second), functools.partial(asked, model, **inputs))
  note = "the whole network, 12 rounds; 256 x 448, and 136 x 200 (odd levels)"
  return row("RAFT-small", "torchvision raft_small", pairs, low, note, **times)


CASES: dict[str, Callable[[], dict]] = {
  "clip_vision": clip_vision,
  "siglip": siglip,
  "siglip2_naflex": siglip2_naflex,
  "dinov2": dinov2,
  "dinov2_registers": dinov2_registers,
  "video_mae": video_mae,
  "raft": raft_small,
}


# ---- fixtures of the test suite --------------------------------------------------------------------------------------


def fixture(model: Any, inputs: dict[str, np.ndarray], outputs: dict[str, Any]) -> agreement.Fixture:
  """The saved form of a model of transformers, with what it made of the inputs."""
  import ml_dtypes

  with tempfile.TemporaryDirectory() as folder:
    config = saved(model, folder)
    tensors = safetensors.Tensors(folder)
    weights = {name: np.array(array).astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
  unstable = ("transformers_version", "_name_or_path")
  config = {key: value for key, value in config.items() if key not in unstable}
  return agreement.Fixture(config, weights, inputs, {name: value.numpy() for name, value in outputs.items()})


def small_tower(name: str, changes: dict[str, Any], sizes: list[tuple[int, int]], **call: Any) -> agreement.Fixture:
  model = tower(name, **changes)
  inputs, outputs = {}, {}
  for number, (rows, columns) in enumerate(sizes):
    images = drawn(2, rows * 7, columns * 7, 3, seed=number)
    answer = asked(model, pixel_values=channels_first(images), **call)
    inputs[f"images{number}"] = images
    outputs[f"pooled{number}"], outputs[f"tokens{number}"] = answer.pooler_output, answer.last_hidden_state
  return fixture(model, inputs, outputs)


def small_naflex() -> agreement.Fixture:
  grids = [(4, 4), (2, 6), (3, 3)]
  sizes = {name: value for name, value in SMALL.items() if name != "image_size"}
  model = tower("Siglip2Vision", **sizes, num_patches=16)
  inputs, patches, _, _ = naflex(grids, 16, 7, 16)
  answer = asked(model, **inputs)
  arrays = {"patches": patches, "grids": np.array(grids)}
  return fixture(model, arrays, {"pooled": answer.pooler_output, "tokens": answer.last_hidden_state})


def small_video_mae(pooled: bool) -> agreement.Fixture:
  import torch
  import transformers

  config = transformers.VideoMAEConfig(**SMALL | {"image_size": 14}, num_frames=4, use_mean_pooling=pooled)
  model = randomised(transformers.VideoMAEForVideoClassification(config))
  video = drawn(2, 4, 14, 14, 3)
  last = asked(model.videomae, pixel_values=channels_first(video)).last_hidden_state
  with torch.no_grad():
    features = model.fc_norm(last.mean(1)) if pooled else last.mean(1)
  return fixture(model, {"video": video}, {"tokens": last, "features": features})


def small_clip() -> agreement.Fixture:
  import transformers

  sizes = SMALL | {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1}  # in OpenAI's proportions
  config = transformers.CLIPVisionConfig(**sizes, projection_dim=8, hidden_act="quick_gelu")
  model = randomised(transformers.CLIPVisionModelWithProjection(config))
  images = drawn(2, 28, 28, 3)
  return fixture(model, {"images": images}, {"vectors": asked(model, pixel_values=channels_first(images)).image_embeds})


def small_raft() -> agreement.Fixture:
  """Three rounds on pictures with odd levels; the weights are drawn by name (agreement.drawn)."""
  model, weights = raft_reference()
  first, second = (picture.astype(np.float16) for picture in raft_pictures(128, 136))
  inputs = {f"image{k}": channels_first(picture.astype(np.float32)) for k, picture in enumerate((first, second), 1)}
  flow = np.moveaxis(asked(model, **inputs, num_flow_updates=3)[-1].numpy(), 1, -1)[:, ::4, ::4]
  config = {"shapes": {name: list(value.shape) for name, value in weights.items()}, "seed": RAFT_SEED, "rounds": 3}
  return agreement.Fixture(config, {}, {"first": first, "second": second}, {"flow": flow})


FIXTURES: dict[str, Callable[[], agreement.Fixture]] = {
  "clip_vision": small_clip,
  "siglip": lambda: small_tower("SiglipVision", SMALL, [(4, 4), (3, 6)], interpolate_pos_encoding=True),
  "siglip2_naflex": small_naflex,
  "dinov2": lambda: small_tower("Dinov2", {name: SMALL[name] for name in DINO}, [(4, 4), (3, 6)]),
  "dinov2_registers": lambda: small_tower(
    "Dinov2WithRegisters", {name: SMALL[name] for name in DINO} | {"use_swiglu_ffn": True}, [(4, 4), (3, 6)]
  ),
  "video_mae_tuned": lambda: small_video_mae(True),
  "video_mae": lambda: small_video_mae(False),
  "raft": small_raft,
}
