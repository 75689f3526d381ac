"""Wan's transformer and VAE, T5, CLIP's text tower, Stable Diffusion's VAE: what PyTorch made of the same weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity_fixture
import pytest
import safetensors.numpy

from kling_jax.errors import WeightsError
from kling_jax.interop import detect, names, wan_dit, wan_vae
from kling_jax.interop import safetensors as weights
from kling_jax.models import t5
from kling_jax.nn import params as params_lib

BOUND = 1e-4


def error(ours, theirs):
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


def cosine(ours, theirs):
  ours, theirs = (np.asarray(value, np.float64).ravel() for value in (ours, theirs))
  return ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)


def load(folder):
  """(what was found, graph, parameters) of a foreign folder."""
  found = detect.recognise(folder)
  graph, shapes, _ = params_lib.abstract(found.init)
  params, report = weights.load_into(
    shapes, folder, found.name_map, allow_missing=found.ours, allow_unexpected=found.ignored
  )
  assert not report.missing and report.unexpected == found.ignored
  return found, graph, {name: jnp.asarray(array) for name, array in params.items()}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
  parts = ("wan_dit", "wan_vae", "t5", "umt5", "clip_text", "sd_vae")
  return {part: parity_fixture.load(part, tmp_path_factory.mktemp(part)) for part in parts}


def test_wan_transformer(references):
  reference = references["wan_dit"]
  found, graph, params = load(reference.folder)
  assert (found.kind, found.naming) == ("video_dit", "diffusers")
  assert (found.config.width, found.config.depth, found.config.heads, found.config.patch) == (32, 2, 2, (1, 2, 2))
  run = jax.jit(lambda params, x, time, text: params_lib.merge(graph, params)(x, time, text))
  given = reference.inputs
  y = run(params, given["x"], given["time"], given["text"])
  assert error(y, reference.outputs["y"]) < BOUND
  low = run(params, given["x"].astype(jnp.bfloat16), given["time"], given["text"])
  assert cosine(low, reference.outputs["y"]) > 0.999
  padded_is_seen = np.where(given["text"] == 0, 1.0, given["text"])
  assert error(run(params, given["x"], given["time"], padded_is_seen), reference.outputs["y"]) > 1e-3


def test_wan_vae_in_chunks(references):
  """That chunks and the whole agree is shown in test_models_video_vae, and live by `make parity`."""
  reference = references["wan_vae"]
  found, graph, params = load(reference.folder)
  assert (found.config.base, found.config.multipliers, found.config.halve_time) == (4, (1, 2, 2), (False, True))
  vae = params_lib.merge(graph, params)
  latents = reference.outputs["latents"]
  assert error(jax.jit(vae.encode)(reference.inputs["frames"]), latents) < BOUND
  decoded = jax.jit(vae.decode)(latents)
  assert error(np.clip(decoded, -1, 1), reference.outputs["decoded"]) < BOUND


@pytest.mark.parametrize("part", ["t5", "umt5"])
def test_t5_encoders(references, part):
  reference = references[part]
  found, graph, params = load(reference.folder)
  assert found.kind == "t5" and found.config.table_a_layer == (part == "umt5")
  encoder = params_lib.merge(graph, params)
  tokens, mask, text = reference.inputs["tokens"], reference.inputs["mask"], reference.outputs["text"]
  assert error(jax.jit(encoder)(tokens, mask), text) < BOUND
  assert cosine(jax.jit(lambda t, m: encoder(t, m, dtype=jnp.bfloat16))(tokens, mask), text) > 0.999
  short = jax.jit(encoder)(np.where(mask, tokens, 7)[:1, :20], mask[:1, :20])  # padding: other tokens, another length
  assert error(short[:, :11], text[:1, :11]) < BOUND and not np.asarray(short[:, 11:]).any()


def test_distances_fall_into_buckets():
  """By the definition, in exact arithmetic: half of the buckets a sign, half of those single, then logarithmic."""
  distances = np.arange(-200, 201)
  found = t5.bucket(distances, 32, 128)
  for distance, place in zip(distances, found, strict=True):
    size, base = abs(int(distance)), 16 if distance > 0 else 0
    inner = size if size < 8 else next((k for k in range(8, 15) if size**8 < 8**8 * 16 ** (k + 1 - 8)), 15)
    assert place == base + inner, distance


def test_clip_text_tower(references):
  reference = references["clip_text"]
  _, graph, params = load(reference.folder)
  tower = params_lib.merge(graph, params)
  tokens, mask = reference.inputs["tokens"], reference.inputs["mask"]
  text = jax.jit(tower)(tokens, mask)
  assert error(text, reference.outputs["text"]) < BOUND
  assert error(tower.pooled(text, mask), reference.outputs["pooled"]) < BOUND


def test_stable_diffusion_vae(references):
  reference = references["sd_vae"]
  found, graph, params = load(reference.folder)
  vae = params_lib.merge(graph, params)
  frames, latents = reference.inputs["frames"], reference.outputs["latents"]
  assert found.config.latent_shape(*frames.shape[1:4]) == latents.shape[1:]
  assert error(jax.jit(vae.encode)(frames), latents) < BOUND
  assert error(jax.jit(vae.decode)(latents), reference.outputs["decoded"]) < BOUND


# ---- names -----------------------------------------------------------------------------------------------------------


def released(reference, part):
  """The fixture's tensors under the names of Wan's own release, through our own map of names."""
  module = {"wan_dit": wan_dit, "wan_vae": wan_vae}[part]
  config = detect.recognise(reference.folder).config
  theirs, ours = (module.entries(config, naming) for naming in ("diffusers", "original"))
  assert theirs.keys() == ours.keys()
  pairs = [pair for path in theirs for pair in zip(theirs[path].names, ours[path].names, strict=True)]
  assert len({new for _, new in pairs}) == len(pairs) == len(reference.weights)
  return {new: reference.weights[old] for old, new in pairs}


@pytest.mark.parametrize("part", ["wan_dit", "wan_vae"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_names_of_wans_release_give_the_same_parameters(references, part, prefix, tmp_path):
  reference = references[part]
  tensors = released(reference, part)
  assert ("blocks.0.norm3.weight" if part == "wan_dit" else "encoder.middle.1.to_qkv.bias") in tensors
  safetensors.numpy.save_file({prefix + name: array for name, array in tensors.items()}, tmp_path / "w.safetensors")
  facts = {"num_heads": 2} if part == "wan_dit" else reference.config
  (tmp_path / "config.json").write_text(json.dumps(facts))
  found, graph, params = load(tmp_path)
  _, expected_graph, expected = load(reference.folder)
  assert found.naming == "original" and graph == expected_graph
  for name, array in expected.items():
    np.testing.assert_array_equal(params[name], array)


@pytest.mark.parametrize("part", ["wan_dit", "wan_vae"])
@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_out_and_in_again_is_exact(references, part, naming, tmp_path):
  reference = references[part]
  found, _, params = load(reference.folder)
  module = {"wan_dit": wan_dit, "wan_vae": wan_vae}[part]
  outward = names.outward(params, module.entries(found.config, naming))
  weights.write(tmp_path, outward, shard_bytes=20_000)
  if naming == "diffusers":
    assert set(outward) == set(reference.weights)
    for name, array in weights.Tensors(tmp_path).items():
      assert array.dtype == reference.weights[name].dtype
      np.testing.assert_array_equal(array, reference.weights[name])
  facts = (
    wan_dit.config_json(found.config)
    if part == "wan_dit"
    else wan_vae.config_json(found.config, params[wan_vae.MEAN], params[wan_vae.LOG_STD])
  )
  (tmp_path / "config.json").write_text(json.dumps(facts))
  again, _, back = load(tmp_path)
  assert again.config == found.config
  for name, array in params.items():
    np.testing.assert_array_equal(back[name], array)


def test_relatives_that_are_not_built_are_refused(references, tmp_path):
  def refused(tensors, config, match):
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=match):
      detect.recognise(tmp_path)

  dit, vae, text = (references[part] for part in ("wan_dit", "wan_vae", "umt5"))
  image = {"blocks.0.attn2.add_k_proj.weight": np.zeros((2, 2), np.float32)}
  refused({**dit.weights, **image}, dit.config, "image cross-attention")
  refused(vae.weights, {**vae.config, "is_residual": True}, r"Wan 2\.2")
  refused(vae.weights, {**vae.config, "latents_mean": [1.0, "x", 2.0]}, "latents_mean")
  refused(text.weights, {**text.config, "feed_forward_proj": "relu"}, "gated-gelu")
  lost = {name: array for name, array in dit.weights.items() if "time_proj" not in name and "text_embedder" not in name}
  refused(lost, dit.config, "lacks parts")
  refused(dit.weights, [], "is no object")
  safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
  (tmp_path / "config.json").unlink()
  assert detect.recognise(tmp_path) is None
  with pytest.raises(WeightsError, match="no model that is known here; wanted: t5"):
    detect.wanted(tmp_path, "t5")
  with pytest.raises(WeightsError, match=r"a video_dit \(diffusers names\); wanted: t5"):
    detect.wanted(dit.folder, "t5")
