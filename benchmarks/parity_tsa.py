"""Parity of TSA's backbones: ConvNeXt with transformers, Video Swin with a reference written here from its papers.

See parity.py, which runs these cases.
"""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from kling_jax.interop import convnext as convnext_names
from kling_jax.interop import safetensors as safetensors_lib
from kling_jax.interop import video_swin as swin_names
from kling_jax.models import convnext, video_swin
from kling_jax.nn import params as params_lib

SMALL_CONVNEXT = convnext.Shape((1, 2), (8, 16), classes=0)
SMALL_SWIN = video_swin.Shape(8, (2, 2), (2, 4), window=(2, 3, 3))
SMALL_GATED = video_swin.Shape(8, (2, 2), (2, 4), window=(2, 3, 3), fragments=(3, 3), gated=(True, False))


# ---- references ------------------------------------------------------------------------------------------------------


def convnext_reference(shape: convnext.Shape) -> Any:
  """transformers' ConvNextModel."""
  import transformers

  config = transformers.ConvNextConfig(
    num_channels=3, hidden_sizes=list(shape.widths), depths=list(shape.depths), num_stages=len(shape.widths)
  )
  return transformers.ConvNextModel(config).eval()


def swin_shapes(shape: video_swin.Shape) -> dict[str, tuple[int, ...]]:
  """Names and shapes of the published weights."""
  found: dict[str, tuple[int, ...]] = {
    "patch_embed.proj.weight": (shape.width, 3, *shape.patch), "patch_embed.proj.bias": (shape.width,),
    "patch_embed.norm.weight": (shape.width,), "patch_embed.norm.bias": (shape.width,),
    "norm.weight": (shape.channels,), "norm.bias": (shape.channels,),
  }  # fmt: skip
  entries = int(np.prod([2 * side - 1 for side in shape.window]))
  for s, depth in enumerate(shape.depths):
    width = shape.width * 2**s
    for b in range(depth):
      block = f"layers.{s}.blocks.{b}."
      for name, rows, columns in (
        ("attn.qkv", 3 * width, width), ("attn.proj", width, width), ("mlp.fc1", 4 * width, width),
        ("mlp.fc2", width, 4 * width),
      ):  # fmt: skip
        found[f"{block}{name}.weight"], found[f"{block}{name}.bias"] = (rows, columns), (rows,)
      for name in ("norm1", "norm2"):
        found[f"{block}{name}.weight"], found[f"{block}{name}.bias"] = (width,), (width,)
      found[f"{block}attn.relative_position_bias_table"] = (entries, shape.heads[s])
      if shape.gated and shape.gated[s]:
        found[f"{block}attn.fragment_position_bias_table"] = (entries, shape.heads[s])
    if s < len(shape.depths) - 1:
      found[f"layers.{s}.downsample.reduction.weight"] = (2 * width, 4 * width)
      found[f"layers.{s}.downsample.norm.weight"] = found[f"layers.{s}.downsample.norm.bias"] = (4 * width,)
  return found


def swin_reference(weights: dict[str, np.ndarray], shape: video_swin.Shape, video: np.ndarray) -> np.ndarray:
  """Video Swin of (B, 3, T, H, W), token by token from the definition: no windows are cut out and no map is rolled.

  Tokens attend to one another where they share a window of the shifted grid, and the shift around the ends is masked:
  by -100 between tokens whose distance in the map is not the one in the window. The gate's d is the L1 distance of the
  tokens' cells.
  """
  import torch

  w = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
  norm = lambda x, name: torch.nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)
  linear = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))
  with torch.no_grad():
    x = torch.nn.functional.conv3d(
      torch.from_numpy(video), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=shape.patch
    ).permute(0, 2, 3, 4, 1)
    x = norm(x, "patch_embed.norm")
    for s, depth in enumerate(shape.depths):
      gated = bool(shape.gated) and shape.gated[s]
      for b in range(depth):
        block = f"layers.{s}.blocks.{b}."
        x = x + _attention(norm(x, f"{block}norm1"), w, f"{block}attn", shape, shape.heads[s], b % 2 == 1, gated)
        x = x + linear(torch.nn.functional.gelu(linear(norm(x, f"{block}norm2"), f"{block}mlp.fc1")), f"{block}mlp.fc2")
      if s < len(shape.depths) - 1:
        x = torch.nn.functional.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        x = torch.cat([x[:, :, 0::2, 0::2], x[:, :, 1::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 1::2]], -1)
        x = norm(x, f"layers.{s}.downsample.norm") @ w[f"layers.{s}.downsample.reduction.weight"].T
    return norm(x, "norm").numpy()


def _attention(x: Any, w: dict, name: str, shape: video_swin.Shape, heads: int, odd: bool, gated: bool) -> Any:
  import torch

  size = x.shape[1:4]
  window = [min(a, b) for a, b in zip(shape.window, size, strict=True)]
  shift = [a // 2 if odd and n > a else 0 for a, n in zip(shape.window, size, strict=True)]
  padded = [-(-n // a) * a for n, a in zip(size, window, strict=True)]
  x = torch.nn.functional.pad(
    x, (0, 0, *(p for n, m in zip(size[::-1], padded[::-1], strict=True) for p in (0, m - n)))
  )
  places = np.stack(np.meshgrid(*(np.arange(n) for n in padded), indexing="ij"), -1).reshape(-1, 3)
  moved = (places - shift) % padded  # where a token stands after the shift
  which, inside = moved // window, moved % window
  together = (which[:, None] == which[None]).all(-1)
  step = inside[:, None] - inside[None]
  wrapped = (places[:, None] - places[None] != step).any(-1)
  spans = [2 * a - 1 for a in shape.window]
  index = np.ravel_multi_index(
    tuple(np.moveaxis((step + np.array(shape.window) - 1) * together[..., None], -1, 0)), spans
  )
  bias = w[f"{name}.relative_position_bias_table"][index]
  if gated:
    cells = np.stack([places[:, axis] * count // padded[axis] for axis, count in enumerate(shape.fragments, 1)], -1)
    d = torch.from_numpy(np.abs(cells[:, None] - cells[None]).sum(-1)).float()[..., None]
    bias = d * bias + (1 - d) * w[f"{name}.fragment_position_bias_table"][index]
  bias = bias + torch.from_numpy(np.where(wrapped, -100.0, 0.0)).float()[..., None]
  bias = bias.masked_fill(torch.from_numpy(~together)[..., None], float("-inf")).permute(2, 0, 1)
  tokens = x.reshape(x.shape[0], -1, x.shape[-1])
  qkv = (tokens @ w[f"{name}.qkv.weight"].T + w[f"{name}.qkv.bias"]).reshape(*tokens.shape[:2], 3, heads, -1)
  q, k, v = qkv.permute(2, 0, 3, 1, 4)
  scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias
  o = (scores.softmax(-1) @ v).transpose(1, 2).reshape(tokens.shape)
  o = o @ w[f"{name}.proj.weight"].T + w[f"{name}.proj.bias"]
  T, H, W = size
  return o.reshape(x.shape[0], *padded, -1)[:, :T, :H, :W]


# ---- ours ------------------------------------------------------------------------------------------------------------


def ours(build: Callable[[], nnx.Module], names: Any, shape: Any, weights: dict[str, np.ndarray]) -> tuple[Any, Any]:
  """(graph, parameters) of our network, loaded through its names from a file."""
  graph, shapes, _ = params_lib.abstract(build)
  with tempfile.TemporaryDirectory() as folder:
    safetensors.numpy.save_file(weights, pathlib.Path(folder) / "model.safetensors")
    recipes = names.recipes(safetensors_lib.Tensors(folder), shape)
    loaded, _ = safetensors_lib.load_into(shapes, folder, recipes)
  return graph, loaded


def build_swin(shape: video_swin.Shape) -> nnx.Module:
  return video_swin.VideoSwin(shape, rngs=nnx.Rngs(params=jax.random.key(0)))


def build_convnext(shape: convnext.Shape) -> nnx.Module:
  return convnext.ConvNeXt(shape, rngs=nnx.Rngs(params=jax.random.key(0)))


def _row(part: str, reference: str, note: str, run: Any, params: Any, inputs: np.ndarray, theirs: Any) -> dict:
  """The row of one network; `theirs()` gives what `run(params, inputs)` should."""
  call = jax.jit(run)
  found = call(params, jnp.asarray(inputs))
  half = call(params, jnp.asarray(inputs, jnp.bfloat16))
  wanted = theirs()
  return {
    "part": part, "reference": reference, "note": note,
    "max_rel_error": agreement.relative_error(found, wanted),
    "cosine_bf16": agreement.cosine(np.asarray(half, np.float32), wanted),
    **agreement.times(lambda: call(params, inputs).block_until_ready(), theirs),
  }  # fmt: skip


def convnext_case() -> dict:
  """ConvNeXt-T at an odd size."""
  import torch

  shape = convnext.Shape((3, 3, 9, 3), (96, 192, 384, 768), classes=0)
  model = convnext_reference(shape)
  held = agreement.drawn({name: tuple(value.shape) for name, value in model.state_dict().items()}, 1)
  model.load_state_dict({name: torch.from_numpy(array) for name, array in held.items()})
  graph, params = ours(lambda: build_convnext(shape), convnext_names, shape, held)
  images = np.random.default_rng(2).standard_normal((2, 230, 224, 3), np.float32)

  def theirs() -> np.ndarray:
    with torch.no_grad():
      return model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).pooler_output.numpy()

  run = lambda p, x: params_lib.merge(graph, p)(x)
  note = "ConvNeXt-T, 2 x 230 x 224, pooled vector"
  return _row("convnext", "transformers.ConvNextModel", note, run, params, images, theirs)


def swin_case(part: str, shape: video_swin.Shape, size: tuple[int, ...], note: str) -> dict:
  """Video Swin against the reference above."""
  held = agreement.drawn(swin_shapes(shape), 3)
  graph, params = ours(lambda: build_swin(shape), swin_names, shape, held)
  videos = np.random.default_rng(4).standard_normal((1, *size, 3), np.float32)
  theirs = lambda: swin_reference(held, shape, videos.transpose(0, 4, 1, 2, 3).copy())
  run = lambda p, x: params_lib.merge(graph, p)(x)
  return _row(part, "PyTorch, from the paper", note, run, params, videos, theirs)


_MIDDLE = {"width": 48, "depths": (2, 4, 2), "heads": (3, 6, 12), "window": (4, 7, 7)}
CASES: dict[str, Callable[[], dict]] = {
  "convnext": convnext_case,
  "video_swin": lambda: swin_case(
    "video_swin", video_swin.Shape(**_MIDDLE), (16, 76, 84), "48 wide, 8 blocks, 16 x 76 x 84: padded windows"
  ),
  "video_swin_fragments": lambda: swin_case(
    "video_swin_fragments",
    video_swin.Shape(**_MIDDLE, fragments=(7, 7), gated=(True, True, False)),
    (16, 112, 112),
    "the same with gates, d not clipped, 7 x 7 fragments of 16 pixels",
  ),
}


# ---- fixtures --------------------------------------------------------------------------------------------------------


def _lists(shapes: dict[str, tuple[int, ...]]) -> dict[str, list[int]]:
  return {name: list(shape) for name, shape in shapes.items()}


def convnext_fixture() -> agreement.Fixture:
  import torch

  model = convnext_reference(SMALL_CONVNEXT)
  shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
  model.load_state_dict({name: torch.from_numpy(array) for name, array in agreement.drawn(shapes, 5).items()})
  images = np.random.default_rng(6).standard_normal((2, 33, 40, 3), np.float32)
  with torch.no_grad():
    pooled = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).pooler_output.numpy()
  return agreement.Fixture({"shapes": _lists(shapes), "seed": 5}, {}, {"images": images}, {"pooled": pooled})


def swin_fixture(shape: video_swin.Shape, seed: int) -> agreement.Fixture:
  shapes = swin_shapes(shape)
  videos = np.random.default_rng(seed).standard_normal((1, 6, 28, 36, 3), np.float32)
  found = swin_reference(agreement.drawn(shapes, seed), shape, videos.transpose(0, 4, 1, 2, 3).copy())
  return agreement.Fixture({"shapes": _lists(shapes), "seed": seed}, {}, {"videos": videos}, {"map": found})


FIXTURES: dict[str, Callable[[], agreement.Fixture]] = {
  "convnext": convnext_fixture,
  "video_swin": lambda: swin_fixture(SMALL_SWIN, 7),
  "video_swin_fragments": lambda: swin_fixture(SMALL_GATED, 8),
}
