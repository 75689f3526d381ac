"""SigLIP, DINOv2, VideoMAE, CLIP's image tower and RAFT: what PyTorch made of the same weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity_fixture
import pytest
import safetensors.numpy
from flax import nnx

from kling_jax.errors import DataError, WeightsError
from kling_jax.interop import clip, raft, vision
from kling_jax.interop import safetensors as weights
from kling_jax.models import vit
from kling_jax.models.clip_image import ClipImageTower
from kling_jax.nn import params as params_lib

BOUND = 1e-4
TOWERS = {"siglip": "siglip", "dinov2": "dinov2", "dinov2_registers": "dinov2"}


def error(ours, theirs):
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


def cosine(ours, theirs):
  ours, theirs = (np.asarray(value, np.float64).ravel() for value in (ours, theirs))
  return ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)


def runner(loaded, call=lambda model, *inputs: model(*inputs)):
  run = jax.jit(lambda params, *inputs: call(params_lib.merge(loaded.graph, params), *inputs))
  return lambda *inputs: run(loaded.params, *inputs)


@pytest.mark.parametrize("part", list(TOWERS))
def test_towers_at_their_own_and_at_another_size(part, tmp_path):
  reference = parity_fixture.load(part, tmp_path)
  loaded = vision.load(tmp_path)
  assert loaded.kind == TOWERS[part] and not loaded.report.missing
  skipped = 1 + loaded.shape.registers if loaded.shape.pool == "class" else 0
  run = runner(loaded)
  for number in (0, 1):
    images = reference.inputs[f"images{number}"]
    pooled, tokens = reference.outputs[f"pooled{number}"], reference.outputs[f"tokens{number}"][:, skipped:]
    seen = run(images)
    assert error(seen.pooled_BD, pooled) < BOUND and error(seen.patches_BND, tokens) < BOUND
  low = run(images.astype(jnp.bfloat16))
  assert low.patches_BND.dtype == jnp.bfloat16 and cosine(low.patches_BND, tokens) > 0.995
  wider = np.pad(images, ((0, 0), (0, 3), (0, 6), (0, 0)), constant_values=9)  # less than a patch
  assert error(run(wider).pooled_BD, pooled) < BOUND


def test_pictures_of_several_sizes_in_one_batch(tmp_path):
  reference = parity_fixture.load("siglip2_naflex", tmp_path)
  loaded = vision.load(tmp_path, "siglip")
  places, real = vit.places(loaded.shape, [tuple(grid) for grid in reference.inputs["grids"]], 16)
  run = runner(loaded, lambda model, *inputs: model.packed(*inputs))
  seen = run(reference.inputs["patches"], places, real)
  assert error(seen.pooled_BD, reference.outputs["pooled"]) < BOUND
  assert error(seen.patches_BND[real], reference.outputs["tokens"][real]) < BOUND
  other = np.where(real[..., None], reference.inputs["patches"], 50.0)
  np.testing.assert_array_equal(run(other, places, real).pooled_BD, seen.pooled_BD)  # what fills up is not seen
  with pytest.raises(ValueError, match="20 patches|4 x 5"):
    vit.places(loaded.shape, [(4, 5)], 16)


@pytest.mark.parametrize("part,norm", [("video_mae_tuned", "mean"), ("video_mae", "tokens")])
def test_video_mae(part, norm, tmp_path):
  reference = parity_fixture.load(part, tmp_path)
  loaded = vision.load(tmp_path)
  assert loaded.kind == "video_mae" and loaded.shape.norm == norm
  video = reference.inputs["video"]
  tokens, features = runner(loaded, lambda model, video: (model.tokens(video), model(video)))(video)
  assert error(tokens, reference.outputs["tokens"]) < BOUND
  assert error(features, reference.outputs["features"]) < BOUND
  with pytest.raises(DataError, match="resize"):
    params_lib.merge(loaded.graph, loaded.params)(video[:, :2])


def test_clip_as_transformers_saves_it(tmp_path):
  reference = parity_fixture.load("clip_vision", tmp_path)
  shape, recipes = clip.tower(weights.Tensors(tmp_path))
  graph, shapes, _ = params_lib.abstract(lambda: ClipImageTower(shape, rngs=nnx.Rngs(0)))
  loaded, _ = weights.load_into(shapes, tmp_path, recipes, allow_unexpected=clip.OTHERS)
  vectors = params_lib.merge(graph, loaded)(reference.inputs["images"])
  assert error(vectors, reference.outputs["vectors"]) < BOUND


def test_raft(tmp_path):
  reference = parity_fixture.load("raft", tmp_path)
  graph, params, version = raft.load(tmp_path)
  assert len(version) >= 12
  run = jax.jit(lambda params, a, b: params_lib.merge(graph, params)(a, b, reference.config["rounds"]))
  first, second = (reference.inputs[name].astype(np.float32) for name in ("first", "second"))
  assert error(run(params, first, second)[:, ::4, ::4], reference.outputs["flow"]) < BOUND
  with pytest.raises(DataError, match="multiples of 8"):
    params_lib.merge(graph, params)(first[:, :100], second[:, :100])


def rewritten(folder, part, change=lambda tensors: tensors, **facts):
  """The fixture's folder with other tensors or another config."""
  reference = parity_fixture.load(part, folder)
  safetensors.numpy.save_file(change(dict(reference.weights)), folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps(reference.config | facts))


@pytest.mark.parametrize("part,tensor", [
  ("siglip", "encoder.layers.1.self_attn.k_proj.bias"), ("dinov2", "encoder.layer.1.norm2.weight"),
  ("video_mae", "videomae.encoder.layer.0.attention.attention.q_bias"),
])  # fmt: skip
def test_files_that_lack_a_tensor_are_refused(part, tensor, tmp_path):
  rewritten(tmp_path, part, lambda tensors: {name: array for name, array in tensors.items() if name != tensor})
  with pytest.raises(WeightsError, match="missing"):
    vision.load(tmp_path)


def test_what_is_not_built_here_is_refused(tmp_path):
  for part, facts, message in (
    ("siglip", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("siglip", {"num_attention_heads": 5}, "5 heads over 32"),
    ("dinov2", {"num_attention_heads": 0}, "0 heads over 32"),
    ("dinov2", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ("video_mae", {"num_frames": 5}, "5 frames"),
    ("video_mae", {"image_size": [14, 28]}, "lacks parts"),
  ):
    rewritten(tmp_path, part, **facts)
    with pytest.raises(WeightsError, match=message):
      vision.load(tmp_path)
  rewritten(
    tmp_path, "siglip", lambda tensors: tensors | {"embeddings.patch_embedding.weight": np.ones((), np.float32)}
  )
  with pytest.raises(WeightsError, match="lacks parts"):
    vision.load(tmp_path)
  rewritten(tmp_path, "dinov2", lambda tensors: tensors | {"layernorm.bias": np.full(32, np.nan, np.float32)})
  with pytest.raises(WeightsError, match="not finite"):
    vision.load(tmp_path)
  rewritten(tmp_path, "video_mae")
  with pytest.raises(WeightsError, match="no siglip or dinov2"):
    vision.load(tmp_path, "siglip", "dinov2")
  large = {"mask_predictor.conv.weight": np.zeros((1, 1, 1, 1), np.float32)}
  parity_fixture.load("raft", tmp_path)
  held = safetensors.numpy.load_file(tmp_path / "model.safetensors")
  safetensors.numpy.save_file(held | large, tmp_path / "model.safetensors")
  with pytest.raises(WeightsError, match="RAFT-large"):
    raft.load(tmp_path)
