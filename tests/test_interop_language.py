"""Llama, Qwen3, Chameleon, Qwen3-VL: what PyTorch made of the same weights, and configs that are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity_fixture
import pytest

from kling_jax.errors import WeightsError
from kling_jax.interop import chameleon, detect, llama
from kling_jax.interop import safetensors as weights
from kling_jax.interop.names import outward
from kling_jax.models import qwen_vl
from kling_jax.nn import params as params_lib

BOUND = 1e-4


def error(ours, theirs):
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


def load(folder):
  """(what was found, graph, parameters) of a foreign folder."""
  found = detect.recognise(folder)
  graph, shapes, _ = params_lib.abstract(found.init)
  params, report = weights.load_into(shapes, folder, found.name_map, allow_unexpected=found.ignored)
  assert not report.missing and sorted(report.unexpected) == found.ignored
  return found, graph, {name: jnp.asarray(array) for name, array in params.items()}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
  parts = ("llama", "qwen3", "chameleon", "qwen3_vl")
  return {part: parity_fixture.load(part, tmp_path_factory.mktemp(part)) for part in parts}


@pytest.mark.parametrize("part", ["llama", "qwen3"])
def test_text_decoders(references, part):
  """With padding at the left; Llama with biases and stretched positions, Qwen3 with a tied head and normed heads."""
  reference = references[part]
  found, graph, params = load(reference.folder)
  shape = found.config
  assert found.kind == "language_model" and (shape.heads, shape.kv_heads, shape.head_size) == (4, 2, 8)
  assert (shape.tied, shape.qk_norm, shape.attention_bias, shape.mlp_bias, shape.rope_stretch is not None) == (
    (False, "none", True, True, True) if part == "llama" else (True, "head", False, False, False)
  )

  @jax.jit
  def run(params, tokens_BL, real_BL):
    model = params_lib.merge(graph, params)
    return model.logits(model(model.embed_text(tokens_BL), real_BL=real_BL)[0])

  real_BL = reference.inputs["real"]
  logits = np.where(real_BL[..., None], run(params, reference.inputs["tokens"], real_BL), 0)
  assert error(logits, reference.outputs["logits"]) < BOUND
  # Out again under the foreign names, bit for bit.
  out = outward(params, llama.entries(shape, "model."))
  assert set(out) == set(reference.weights) - set(llama.unused(reference.weights, shape))
  for name, tensor in out.items():
    np.testing.assert_array_equal(np.asarray(tensor), reference.weights[name])


def test_chameleon_and_its_picture_tokens(references):
  reference = references["chameleon"]
  found, graph, params = load(reference.folder)
  assert (found.kind, found.config.language.qk_norm, found.config.language.first_code) == ("chameleon", "head_layer", 4)
  codes = found.config.pictures.codes
  known = reference.config["vocabulary_map"]
  assert known["IMGIMGBAZ"] - 4 != 10, "codes that stand in the order of their tokens would prove nothing"

  @jax.jit
  def run(params, pictures, prompt):
    model = params_lib.merge(graph, params)
    hidden, _ = model.language(model.language.embed_text(prompt))
    frames = model.language.embed_frames(model.pictures(pictures)) - model.language.embed_text(
      model.picture_tokens(pictures)
    )
    return model.pictures.vectors(pictures), model.picture_tokens(pictures), model.language.logits(hidden), frames

  vectors, tokens, logits, nothing = run(params, reference.inputs["pictures"], reference.inputs["prompt"])
  assert error(vectors, reference.outputs["vectors"]) < BOUND
  np.testing.assert_array_equal(tokens, reference.outputs["tokens"])
  assert len(np.unique(tokens)) > 2 and not np.any(nothing)
  shown = np.concatenate([logits[..., :4], logits[..., 4 + codes :]], -1)  # the reference hides those of picture tokens
  assert error(shown, reference.outputs["logits"]) < BOUND


def test_qwen3_vl_reads_a_picture_and_a_video(references):
  reference = references["qwen3_vl"]
  found, graph, params = load(reference.folder)
  assert found.kind == "qwen_vl" and found.config.vision.deep == (0,)
  tokens_L = reference.inputs["tokens"]
  positions = qwen_vl.positions(found.config, tokens_L, [(1, 3, 1), (1, 1, 2), (1, 1, 2)])
  np.testing.assert_array_equal(positions, reference.outputs["positions"])

  @jax.jit
  def run(params, tokens_L, positions, picture, video):
    model = params_lib.merge(graph, params)
    (seen, deep), (more, deeper) = model.vision(picture[None]), model.vision(video[None])
    both = jnp.concatenate([seen, more], 1), jnp.concatenate([deep, deeper], 2)
    hidden, _ = model(tokens_L[None], *both, positions[:, None])
    return seen[0], deep[:, 0], model.language.logits(hidden)

  seen, deep, logits = run(params, tokens_L, positions, reference.inputs["picture"], reference.inputs["video"])
  assert error(seen, reference.outputs["seen"]) < BOUND
  assert error(deep, reference.outputs["deep"]) < BOUND
  assert error(logits, reference.outputs["logits"]) < BOUND
  for grids, message in (([(1, 3, 1)], "do not match"), ([(1, 3, 1), *[(1, 1, 2)] * 3], "4 grids, but placeholders")):
    with pytest.raises(qwen_vl.ConfigError, match=message):
      qwen_vl.positions(found.config, tokens_L, grids)


@pytest.mark.parametrize(
  ("part", "changes", "message"),
  [
    ("llama", {"model_type": "mistral"}, "model_type='mistral'"),
    ("llama", {"num_key_value_heads": 4}, "k_proj gives 16 values, config.json says 4 heads of 8"),
    ("llama", {"hidden_size": 17}, "hidden_size=17, the tensors say 16"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window"),
    ("chameleon", {"vocabulary_map": {"IMGIMGAZ": 4}}, "names 1 picture tokens; wanted are 12"),
    ("qwen3_vl", {"model_type": "qwen3_vl_moe"}, "the dense qwen3_vl is built here"),
  ],
)
def test_what_would_compute_something_else_is_refused(references, part, changes, message):
  reference = references[part]
  (reference.folder / "config.json").write_text(json.dumps(reference.config | changes))
  try:
    with pytest.raises(WeightsError, match=message):
      detect.recognise(reference.folder)
  finally:
    (reference.folder / "config.json").write_text(json.dumps(reference.config))


def test_a_folder_of_shards_is_the_same_model(references, tmp_path):
  reference = references["qwen3"]
  _, _, whole = load(reference.folder)
  (tmp_path / "config.json").write_text(json.dumps(reference.config))
  assert len(weights.write(tmp_path, reference.weights, shard_bytes=10_000)) > 3
  _, _, parts = load(tmp_path)
  assert all(np.array_equal(parts[name], whole[name]) for name in whole) and len(parts) == len(whole)
  (tmp_path / "config.json").unlink()
  with pytest.raises(WeightsError, match="model_type=None"):
    detect.recognise(tmp_path)


@pytest.mark.parametrize("part", ["llama", "chameleon", "qwen3_vl"])
def test_under_our_own_names_it_is_the_same_model(references, part, tmp_path):
  found, graph, params = load(references[part].folder)
  weights.write(tmp_path, params)
  (tmp_path / "config.json").write_text(json.dumps(detect.own_json(found.kind, found.config, {})))
  again, same, read = load(tmp_path)
  assert (again.kind, again.config, same) == (found.kind, found.config, graph)
  assert all(np.array_equal(read[name], params[name]) for name in params) and len(read) == len(params)


def test_codes_are_numbered_as_their_tokens_are():
  order = chameleon.code_order({"vocabulary_map": {"IMGIMGCZ": 7, "IMGIMGAZ": 8, "IMGIMGBZ": 9, "x": 1}}, 3)
  assert order.tolist() == [7, 2, 0, 1]
