"""TSA's networks: backbones beside their references, cross-gating beside its formula, branches, masks, rows apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import parity_fixture
import pytest
from flax import nnx
from scipy.special import erf

from kling_jax.errors import ConfigError, WeightsError
from kling_jax.interop import convnext as convnext_names
from kling_jax.interop import safetensors
from kling_jax.interop import video_swin as swin_names
from kling_jax.models import convnext, tsa, video_swin
from kling_jax.nn import conv
from kling_jax.nn import params as params_lib

CONVNEXT = convnext.Shape((1, 2), (8, 16), classes=0)
SWIN = video_swin.Shape(8, (2, 2), (2, 4), window=(2, 3, 3))
GATED = dataclasses.replace(SWIN, fragments=(3, 3), gated=(True, False))
SMALL = tsa.Shape(
  features=3, width=6, label=(5,), head=(4,), static=(7,),
  swin=dataclasses.replace(GATED, depths=(2,), heads=(2,), gated=(True,)),
  convnext=dataclasses.replace(CONVNEXT, depths=(1,), widths=(8,), classes=9),
)  # fmt: skip


def loaded(build, names, shape, folder):
  graph, shapes, _ = params_lib.abstract(build)
  recipes = names.recipes(safetensors.Tensors(folder), shape)
  return params_lib.merge(graph, safetensors.load_into(shapes, folder, recipes)[0])


def error(ours, theirs):
  return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()


def test_convnext_is_transformers(tmp_path):
  case = parity_fixture.load("convnext", tmp_path)
  build = lambda: convnext.ConvNeXt(CONVNEXT, rngs=nnx.Rngs(params=jax.random.key(0)))
  model = loaded(build, convnext_names, CONVNEXT, tmp_path)
  assert error(model(case.inputs["images"]), case.outputs["pooled"]) < 1e-4  # the last norm's epsilon is 1e-12 there


def test_convnext_by_timms_names_is_the_same(tmp_path):
  theirs = parity_fixture.load("convnext", tmp_path)
  turns = (
    ("embeddings.patch_embeddings", "stem.0"), ("embeddings.layernorm", "stem.1"), ("encoder.", ""),
    ("downsampling_layer", "downsample"), ("layers.", "blocks."), ("dwconv", "conv_dw"), ("pwconv", "mlp.fc"),
    (".layernorm", ".norm"), ("layer_scale_parameter", "gamma"),
  )  # fmt: skip
  renamed = {}
  for name, array in theirs.weights.items():
    new = name.replace("layernorm.", "head.norm.") if name.startswith("layernorm") else name
    for old, word in turns:
      new = new.replace(old, word)
    renamed[new] = array
  first, second = convnext_names.recipes(theirs.weights, CONVNEXT), convnext_names.recipes(renamed, CONVNEXT)
  for path, recipe in first.items():
    made = recipe.build(*(theirs.weights[name] for name in recipe.names))
    assert np.array_equal(made, second[path].build(*(renamed[name] for name in second[path].names))), path
  with pytest.raises(WeightsError, match="no ConvNeXt"):
    convnext_names.recipes({"x": np.zeros(1)}, CONVNEXT)


@pytest.mark.parametrize(("part", "shape"), [("video_swin", SWIN), ("video_swin_fragments", GATED)])
def test_video_swin_is_the_reference(part, shape, tmp_path):
  """At a size that neither patches nor windows divide, so that maps are padded, and with shifted windows."""
  case = parity_fixture.load(part, tmp_path)
  build = lambda: video_swin.VideoSwin(shape, rngs=nnx.Rngs(params=jax.random.key(0)))
  model = loaded(build, swin_names, shape, tmp_path)
  assert error(model(case.inputs["videos"]), case.outputs["map"]) < 1e-5


def test_windows_in_groups_change_nothing(tmp_path, monkeypatch):
  case = parity_fixture.load("video_swin_fragments", tmp_path)
  build = lambda: video_swin.VideoSwin(GATED, rngs=nnx.Rngs(params=jax.random.key(0)))
  model = loaded(build, swin_names, GATED, tmp_path)
  monkeypatch.setattr(video_swin, "SCORES", 500)
  assert video_swin._groups(12, 648) == 12  # a window at a time
  assert error(model(case.inputs["videos"]), case.outputs["map"]) < 1e-5


def test_windows_give_back_what_they_took_and_shifted_parts_stay_apart():
  places = video_swin.geometry((3, 7, 8), (2, 3, 3), (), True)
  x = jnp.arange(2 * 3 * 7 * 8, dtype=jnp.float32).reshape(2, 3, 7, 8, 1)
  windows = places.to_windows(x)
  assert np.array_equal(places.from_windows(windows), x)
  moved = video_swin.partition(
    video_swin.roll(np.mgrid[0:4, 0:9, 0:9].transpose(1, 2, 3, 0)[None], (1, 1, 1), -1), (2, 3, 3)
  )[0]
  for place, region in zip(moved, places.regions_WN, strict=True):  # one region: the window is a box of the map
    for number in np.unique(region):
      inside = place[region == number]
      assert len(inside) == np.prod(np.ptp(inside, axis=0) + 1)


@pytest.mark.parametrize("shape", [(1, 9, 8, 5), (2, 4, 3, 2)])
def test_depthwise_convolution_is_the_grouped_one(shape):
  x, kernel = (
    np.random.default_rng(0).standard_normal(shape),
    np.random.default_rng(1).standard_normal((7, 7, shape[-1])),
  )
  x, kernel = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
  assert error(conv.conv_depthwise(x, kernel), np.asarray(conv.conv_depthwise_plain(x, kernel))) < 1e-6


@pytest.fixture(scope="module")
def model() -> tsa.TSA:
  graph, _, _ = params_lib.abstract(lambda: tsa.TSA(SMALL, rngs=nnx.Rngs(params=jax.random.key(3))))
  return params_lib.merge(graph, params_lib.create(lambda: tsa.TSA(SMALL, rngs=nnx.Rngs(params=jax.random.key(3)))))


def test_cross_gating_is_its_formula():
  block = tsa.CrossGating(5, rngs=nnx.Rngs(params=jax.random.key(1)))
  rng = np.random.default_rng(2)
  for layer in (block.label, block.feature, block.gate, block.out):
    layer.bias[...] = jnp.asarray(rng.standard_normal(5), jnp.float32)
  numbers = lambda layer: (np.asarray(layer.kernel[...], np.float64), np.asarray(layer.bias[...], np.float64))
  a, b, c, d = (numbers(layer) for layer in (block.label, block.feature, block.gate, block.out))
  label, y = rng.standard_normal((2, 5)), rng.standard_normal((2, 5))
  y1 = y @ b[0] + b[1]
  u = (label @ a[0] + a[1]) @ c[0] + c[1]
  gate = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
  wanted = (y1 * gate) @ d[0] + d[1] + y1
  assert error(block(jnp.asarray(label, jnp.float32), jnp.asarray(y, jnp.float32)), wanted) < 1e-5


def test_fusion_and_head_are_their_formulas(model):
  """[w_d, w_s] = W_f [y'_d ; y'_s] + b_f without softmax; the score head ends bare."""
  rng = np.random.default_rng(4)
  vectors = {name: jnp.asarray(rng.standard_normal((2, 6)), jnp.float32) for name in tsa.BRANCHES}
  dynamic, static = (
    np.asarray(model.gates[n](vectors["label"], vectors[n]), np.float64) for n in ("dynamic", "static")
  )
  weights = np.concatenate([dynamic, static], -1) @ np.asarray(model.weights.kernel[...]) + np.asarray(
    model.weights.bias[...]
  )
  z = weights[:, :1] * dynamic + weights[:, 1:] * static
  first, last = model.head.layers
  h = z @ np.asarray(first.kernel[...]) + np.asarray(first.bias[...])
  h = 0.5 * h * (1 + erf(h / np.sqrt(2)))
  wanted = (h @ np.asarray(last.kernel[...]) + np.asarray(last.bias[...]))[:, 0]
  assert error(model.fused(vectors), wanted) < 1e-5


def inputs(rows: int):
  rng = np.random.default_rng(5)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return draw(rows, 2, 4, 24, 24, 3), draw(rows, 16, 16, 3), draw(rows, 3)


@pytest.mark.parametrize(
  ("branches", "fusion"),
  [
    (("dynamic",), "gate"),
    (("dynamic", "static"), "gate"),
    (tsa.BRANCHES, "concat"),
    (tsa.BRANCHES, "gate"),
    (("label",), "gate"),
  ],
)
def test_branches_that_are_off_have_no_weights_and_are_not_read(branches, fusion):
  shape = dataclasses.replace(SMALL, branches=branches, fusion=fusion)
  graph, shapes, _ = params_lib.abstract(lambda: tsa.TSA(shape, rngs=nnx.Rngs(params=jax.random.key(0))))
  held = {name.split(".")[0] for name in shapes}
  assert ("swin" in held, "convnext" in held, "label_mlp" in held) == tuple(name in branches for name in tsa.BRANCHES)
  assert ("gates" in held) == (fusion == "gate" and len(branches) == 3)
  off = [None if name not in branches else value for name, value in zip(tsa.BRANCHES, inputs(2), strict=True)]
  answer = jax.eval_shape(lambda p, *x: params_lib.merge(graph, p)(*x), shapes, *off)
  assert answer.shape == (2,) and answer.dtype == jnp.float32


def test_rows_do_not_meet_and_missing_features_are_learnt_values(model):
  fragments, image, features = inputs(2)
  features = features.at[1, 0].set(jnp.nan)
  whole = model(fragments, image, features)
  assert np.isfinite(np.asarray(whole)).all()
  alone = model(fragments[1:], image[1:], features[1:])
  assert error(alone, np.asarray(whole[1:])) < 1e-5
  told = model(fragments[1:], image[1:], features[1:].at[0, 0].set(model.null[0]))
  assert np.array_equal(alone, told)


def test_the_papers_size():
  _, shapes, _ = params_lib.abstract(lambda: tsa.TSA(tsa.preset("tiny"), rngs=nnx.Rngs(params=jax.random.key(0))))
  assert 59e6 < params_lib.count(shapes) < 60e6
  assert shapes["swin.stages.0.pairs.even.attention.relative"].shape == (1, 2535, 3)
  assert shapes["label_mlp.layers.0.kernel"].shape == (15, 64) and shapes["head.layers.3.kernel"].shape == (64, 1)


def test_wrong_shapes_are_config_errors():
  with pytest.raises(ConfigError, match="no branch"):
    tsa.Shape(branches=("dynamc",))
  with pytest.raises(ConfigError, match="at least one"):
    tsa.Shape(branches=())
  with pytest.raises(ConfigError, match="even depths"):
    video_swin.Shape(8, (1,), (2,))
  with pytest.raises(ConfigError, match="does not exist"):
    tsa.preset("small")
