"""CLIP's image tower and LAION's head against PyTorch, in both namings; the scorer that they make."""

import itertools

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from kling_jax import measure
from kling_jax.errors import WeightsError
from kling_jax.interop import clip, safetensors
from kling_jax.measure import laion, motion
from kling_jax.models.clip_image import ClipImageTower, Shape
from kling_jax.nn import params

SHAPE = Shape(width=128, depth=2, patch=8, image=24, projection=6)

# Of `random_tower` on `pictures`, by torch 2.13 in float64: conv2d, nn.MultiheadAttention, functional.layer_norm.
EXPECTED = [
  [-3.35228741, -8.17064014, -0.58316016, -1.79893028, -3.70914018, -1.34425341],
  [-0.7454114, -8.01105406, -0.36768696, -2.38836394, -3.61059354, -0.25536717],
]


def random_tower() -> dict[str, np.ndarray]:
  """A small tower in OpenCLIP's naming; weights from NumPy's generator, so that no file is needed."""
  rng = np.random.default_rng(5)
  draw = lambda *sizes: (rng.normal(size=sizes) * sizes[-1] ** -0.5).astype(np.float32)
  width, count = SHAPE.width, (SHAPE.image // SHAPE.patch) ** 2 + 1
  tensors = {
    "visual.class_embedding": draw(width),
    "visual.positional_embedding": draw(count, width),
    "visual.conv1.weight": draw(width, 3, SHAPE.patch, SHAPE.patch),
    "visual.proj": draw(width, SHAPE.projection),
  }
  norms = ["visual.ln_pre", "visual.ln_post"]
  for k in range(SHAPE.depth):
    block = f"visual.transformer.resblocks.{k}."
    norms += [block + "ln_1", block + "ln_2"]
    shapes = {"attn.in_proj": (3 * width, width), "attn.out_proj": (width, width)}
    shapes |= {"mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
    for name, sizes in shapes.items():
      mark = "_" if name.endswith("in_proj") else "."
      tensors[f"{block}{name}{mark}weight"], tensors[f"{block}{name}{mark}bias"] = draw(*sizes), draw(sizes[0])
  for name in norms:
    tensors[f"{name}.weight"], tensors[f"{name}.bias"] = 1 + 0.1 * draw(width) * width**0.5, draw(width)
  return tensors


def pictures() -> np.ndarray:
  return np.random.default_rng(6).normal(size=(2, SHAPE.image, SHAPE.image, 3)).astype(np.float32)


def in_hugging_face(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The same weights under the names of transformers' CLIPVisionModelWithProjection."""
  words = [
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."), ("visual.ln_pre", "vision_model.pre_layrnorm"),
    ("visual.ln_post", "vision_model.post_layernorm"), (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."),
    ("attn.out_proj", "self_attn.out_proj"), ("c_fc", "fc1"), ("c_proj", "fc2"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
  ]  # fmt: skip
  found = {"visual_projection.weight": np.ascontiguousarray(tensors["visual.proj"].T)}
  for name, array in tensors.items():
    for old, new in words:
      name = name.replace(old, new)
    if "in_proj" in name:
      for part, letter in zip(np.split(array, 3), "qkv", strict=True):
        found[name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part
    elif name != "visual.proj":
      found[name] = array
  return found


def head_layers() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(7)
  sizes = (SHAPE.projection, 5, 4, 1)
  tensors = {}
  for number, (inputs, outputs) in zip((0, 2, 4), itertools.pairwise(sizes), strict=True):
    tensors[f"layers.{number}.weight"] = rng.normal(size=(outputs, inputs)).astype(np.float32)
    tensors[f"layers.{number}.bias"] = rng.normal(size=outputs).astype(np.float32)
  return tensors


@pytest.mark.parametrize("naming", ["open_clip", "hugging_face"])
def test_the_tower_is_pytorchs(naming, tmp_path):
  tensors = random_tower() if naming == "open_clip" else in_hugging_face(random_tower())
  safetensors.write(tmp_path, tensors | {"logit_scale": np.ones(1, np.float32)})
  shape, recipes = clip.tower(safetensors.Tensors(tmp_path))
  assert shape == SHAPE
  graph, shapes, _ = params.abstract(lambda: ClipImageTower(shape, rngs=nnx.Rngs(0)))
  loaded, report = safetensors.load_into(shapes, tmp_path, recipes, allow_unexpected=clip.OTHERS)
  assert not report.missing and report.unexpected == ["logit_scale"]
  np.testing.assert_allclose(params.merge(graph, loaded)(pictures()), EXPECTED, atol=2e-5)


def test_the_scorer_rates_frames_and_names_its_weights(tmp_path):
  tensors = random_tower() | head_layers()
  safetensors.write(tmp_path, tensors)
  scorer = laion.scorer(tmp_path)
  assert scorer.conditions == ("aesthetic",) and scorer.name == "laion"  # as presets know it
  frames = np.random.default_rng(8).integers(0, 256, (9, 40, 56, 3), np.uint8)
  value = measure.score(frames, np.arange(9) / 10, [scorer])["aesthetic"]
  # By hand: the picture as CLIP sees it, the unit vector, layer after layer.
  graph, shapes, _ = params.abstract(lambda: ClipImageTower(SHAPE, rngs=nnx.Rngs(0)))
  loaded, _ = safetensors.load_into(shapes, tmp_path, clip.tower(tensors)[1], allow_unexpected=clip.OTHERS)
  picks = [i for i, _ in motion.frame_pairs(np.arange(9) / 10)]
  picks = [picks[0], picks[round((len(picks) - 1) / 2)], picks[-1]]
  images = np.stack([laion.prepared(frames[i], SHAPE.image) for i in picks])
  x = np.asarray(params.merge(graph, loaded)(images), np.float64)
  x /= np.linalg.norm(x, axis=-1, keepdims=True)
  for number in (0, 2, 4):
    x = x @ tensors[f"layers.{number}.weight"].T + tensors[f"layers.{number}.bias"]
  assert value.value == pytest.approx(x.mean(), abs=1e-4)
  other = tmp_path / "other"
  safetensors.write(other, tensors | {"layers.4.bias": np.ones(1, np.float32)})
  assert laion.predictor(other)[1] != scorer.version == value.version


def test_a_frame_as_clip_sees_it():
  frame = np.zeros((30, 50, 3), np.uint8)
  frame[:, 10:40] = 255
  seen = laion.prepared(frame, 30)  # the middle square, all white
  expected = (1 - np.array([0.48145466, 0.4578275, 0.40821073])) / np.array([0.26862954, 0.26130258, 0.27577711])
  np.testing.assert_allclose(seen, np.broadcast_to(expected, seen.shape), rtol=1e-5)


@pytest.mark.parametrize("height,width,side", [(61, 100, 24), (101, 64, 25), (20, 31, 24)])
def test_a_frame_is_resized_as_pillow_does_for_clip(height, width, side):
  frame = np.random.default_rng(9).integers(0, 256, (height, width, 3), np.uint8)
  longer = int(side * max(height, width) / min(height, width))
  size = (longer, side) if width > height else (side, longer)  # columns, rows
  resized = Image.fromarray(frame).resize(size, Image.BICUBIC)
  left, top = (round((length - side) / 2) for length in size)
  expected = np.asarray(resized)[top : top + side, left : left + side]
  seen = laion.prepared(frame, side) * [0.26862954, 0.26130258, 0.27577711] + [0.48145466, 0.4578275, 0.40821073]
  off = np.abs(seen * 255 - expected)
  assert off.max() < 1.01 and (off > 0.01).mean() < 0.01  # Pillow's weights are rounded to 22 bits


@pytest.mark.parametrize(
  "change,message",
  [
    (lambda t: {n: a for n, a in t.items() if not n.startswith("layers")}, "no aesthetic head"),
    (lambda t: {n: a for n, a in t.items() if n.startswith("layers")}, "no image tower"),
    (lambda t: {n: a for n, a in t.items() if n != "visual.proj"}, "lacks 1 tensors, first visual.proj"),
    (lambda t: t | {"layers.0.weight": np.ones((5, 3), np.float32)}, "vectors of 3"),
    (lambda t: t | {"layers.4.weight": np.ones((1, 3), np.float32)}, "takes 3 values"),
    (lambda t: t | {"visual.ln_pre.extra": np.ones(1, np.float32)}, "unexpected"),
  ],
)
def test_other_weights_are_refused(change, message, tmp_path):
  safetensors.write(tmp_path, change(random_tower() | head_layers()))
  with pytest.raises(WeightsError, match=message):
    laion.scorer(tmp_path)
