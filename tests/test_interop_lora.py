"""LoRA files: PEFT's merged equals PEFT's beside the weights; other names and ranks, several at once, out and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import parity_fixture
import pytest
import safetensors.numpy

from kling_jax import config as config_lib
from kling_jax.errors import UsageError, WeightsError
from kling_jax.generate import convert
from kling_jax.interop import detect, lora, wan_dit
from kling_jax.interop import safetensors as weights
from kling_jax.nn import lora as lora_lib
from kling_jax.nn import params as params_lib
from kling_jax.train import loop, task
from kling_jax.train.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """(config, run, parameters) of the transformer of fixture wan_dit, and the reference of the adapted one."""
  folder = tmp_path_factory.mktemp("wan")
  parity_fixture.load("wan_dit", folder)
  found = detect.recognise(folder)
  graph, shapes, _ = params_lib.abstract(found.init)
  params, _ = weights.load_into(shapes, folder, found.name_map)
  run = jax.jit(lambda params, x, time, text: params_lib.merge(graph, params)(x, time, text))
  adapted = parity_fixture.load("lora", tmp_path_factory.mktemp("lora"))
  return found.config, run, {name: jnp.asarray(array) for name, array in params.items()}, adapted


def write(path, tensors, **facts):
  path.parent.mkdir(exist_ok=True)
  safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path)
  if facts:
    (path.parent / "adapter_config.json").write_text(json.dumps(facts))
  return path


def error(ours, theirs):
  return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
  config, _, _, adapted = base
  folder = tmp_path_factory.mktemp("peft")
  path = write(folder / "adapter_model.safetensors", adapted.weights, **adapted.config)
  return lora.read(path.parent, config)[0]


def test_merged_it_computes_what_peft_computes_beside_the_weights(base, adapters):
  _, run, params, adapted = base
  given, y = adapted.inputs, adapted.outputs["y"]
  call = lambda scale: run(lora.merge(params, [(adapters, scale)], ""), given["x"], given["time"], given["text"])
  assert error(call(1.0), y) < 1e-4 < 1e-2 < error(call(0.5), y)


def other_names(adapted):
  """The same adapter as other trainers write it: lora_down, lora_up and an alpha of each layer."""
  config = detect.VideoDiTConfig(width=32, depth=2, heads=2, mlp_width=48, latent_channels=4, text_width=24)
  ours, theirs = (wan_dit.linears(config, naming) for naming in ("diffusers", "original"))
  rename = {a: b for path in ours for a, b in zip(ours[path].names, theirs[path].names, strict=True)}
  tensors = {}
  for name, array in adapted.weights.items():
    module, _, kind = name.removesuffix(".weight").rpartition(".")
    part = {"lora_A": "lora_down", "lora_B": "lora_up"}[kind]
    tensors[f"{rename[module]}.{part}.weight"] = array
    tensors[f"{rename[module]}.alpha"] = np.float32(adapted.config["lora_alpha"]).reshape(())
  return tensors


@pytest.mark.parametrize("form", ["diffusion_model.", "lora_unet_", "base_model.model.", "transformer.", "default"])
def test_the_same_adapter_in_other_names_is_the_same(base, adapters, form, tmp_path):
  config, _, _, adapted = base
  facts = adapted.config
  if form == "diffusion_model.":
    tensors, facts = {form + name: array for name, array in other_names(adapted).items()}, {}
  elif form == "lora_unet_":
    flat = lambda name: name.rpartition(".lora_") if ".lora_" in name else name.rpartition(".alpha")
    parts = {name: flat(name) for name in other_names(adapted)}
    tensors = {
      form + parts[name][0].replace(".", "_") + "".join(parts[name][1:]): array
      for name, array in other_names(adapted).items()
    }
    facts = {}
  elif form == "default":
    tensors = {name.replace(".weight", ".default.weight"): array for name, array in adapted.weights.items()}
  else:
    tensors = {form + name: array for name, array in adapted.weights.items()}
  read, facts = lora.read(write(tmp_path / "a" / "x.safetensors", tensors, **facts), config)
  assert facts["rank"] == 3 and set(read) == set(adapters)
  for name, array in adapters.items():
    np.testing.assert_allclose(read[name], array, rtol=1e-6)


def test_ranks_may_differ_and_layers_may_lack(base, tmp_path):
  config, _, params, _ = base
  draw = np.random.default_rng(0)
  pair = lambda rank: (draw.normal(size=(rank, 32)).astype("f4"), draw.normal(size=(32, rank)).astype("f4"))
  (a0, b0), (a1, b1) = pair(2), pair(5)
  write(tmp_path / "a" / "x.safetensors", {
    "blocks.0.attn1.to_q.lora_A.weight": a0, "blocks.0.attn1.to_q.lora_B.weight": b0,
    "blocks.1.attn1.to_q.lora_A.weight": a1, "blocks.1.attn1.to_q.lora_B.weight": b1,
    "blocks.1.attn1.to_k.lora_A.weight": a1, "blocks.1.attn1.to_k.lora_B.weight": b1,
  })  # fmt: skip
  read, _ = lora.read(tmp_path / "a", config)
  merged = lora.merge(params, [(read, 0.5), (read, 0.25)], "")
  change = lambda path: np.asarray(merged[path] - params[path])
  expected = 0.75 * np.stack([(b0 @ a0).T, (b1 @ a1).T])
  np.testing.assert_allclose(change("blocks.self_attn.q.kernel"), expected, atol=1e-4)
  np.testing.assert_allclose(change("blocks.self_attn.k.kernel")[1], expected[1], atol=1e-4)
  assert not change("blocks.self_attn.k.kernel")[0].any() and not change("blocks.self_attn.v.kernel").any()


def test_out_and_in_again(base, adapters, tmp_path):
  config, _, params, adapted = base
  lora.save(tmp_path / "ours.safetensors", adapters, scale=0.5)
  assert (tmp_path / "ours.safetensors").stat().st_size < 0.2 * sum(array.nbytes for array in params.values())
  back, _ = lora.read(tmp_path / "ours.safetensors", config)
  for name, array in adapters.items():
    np.testing.assert_array_equal(back[name], array * np.float32(0.5 if name.endswith("b") else 1))
  lora.export(tmp_path / "peft.safetensors", adapters, config)
  tensors = weights.Tensors(tmp_path / "peft.safetensors")
  assert set(tensors) == {f"transformer.{name}" for name in adapted.weights}
  name = "blocks.1.ffn.net.2"
  for part, scale in (("lora_A", 1.0), ("lora_B", 4.5 / 3)):
    np.testing.assert_allclose(
      tensors[f"transformer.{name}.{part}.weight"], scale * adapted.weights[f"{name}.{part}.weight"], rtol=1e-6
    )


def test_files_and_scales_are_parsed(tmp_path):
  assert lora.parse("a/b.safetensors") == ("a/b.safetensors", 1.0)
  assert lora.parse("a=b.safetensors=0.5") == ("a=b.safetensors", 0.5)
  (tmp_path / "x=1").touch()
  assert lora.parse(str(tmp_path / "x=1")) == (str(tmp_path / "x=1"), 1.0)
  with pytest.raises(UsageError, match="FILE=SCALE"):
    lora.parse("a=b")


@pytest.mark.parametrize(("change", "match"), [
  ({"blocks.7.attn1.to_q.lora_A.weight": (3, 32)}, "1 tensors are of no dense layer"),
  ({"blocks.0.attn1.to_q.diff_b": (32,)}, "diff_b"),
  ({"blocks.0.attn2.to_k.lora_A.weight": (3, 32)}, "half of its pair"),
  ({"blocks.0.attn1.to_q.lora_A.weight": (3, 31)}, "maps 32 to 32"),
  ({"../../blocks.0.attn1.to_q.lora_A.weight": (3, 32)}, "no dense layer"),
  ({"blocks.0.attn1.to_q.lora_A.weight": None}, "not finite"),
])  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(base, change, match, tmp_path):
  config, _, _, adapted = base
  values = {name: np.full((3, 32), np.nan) if shape is None else np.ones(shape) for name, shape in change.items()}
  tensors = adapted.weights | {name: array.astype(np.float32) for name, array in values.items()}
  path = write(tmp_path / "a" / "x.safetensors", tensors)
  with pytest.raises(WeightsError, match=match):
    lora.read(path, config)
  if match in ("diff_b", "no dense layer"):
    assert lora.read(path, config, ignore=("*.diff_b", "../*"))[1]["ignored"] == list(change)
  (path.parent / "adapter_config.json").write_text("[]")
  with pytest.raises(WeightsError):
    lora.read(write(path, adapted.weights), config)


# ---- training --------------------------------------------------------------------------------------------------------


def lora_config(**changes):
  config = config_lib.load("video_dit:runlocal")
  config.update_from_flattened_dict(
    {"model.size": "d16", "lora.rank": 2, "steps": 3, "validation.every": 0, "data.batch": 8} | changes
  )
  return config


def test_under_lora_the_adapters_and_what_is_ours_are_trained(tmp_path):
  job = task.make(lora_config())
  adapted = [name for name in job.shapes if name.startswith("lora.")]
  assert "lora.blocks.cross_attn.out.kernel.b" in adapted and len(adapted) == 16
  assert job.axes["lora.blocks.self_attn.q.kernel.a"] == (*job.axes["dit.blocks.self_attn.q.kernel"][:-1], None)
  trained = {name for name in job.shapes if job.trainable(name)}
  assert trained == {
    name for name in job.shapes
    if name.startswith(("lora.", "text.", "dit.conditions.")) or name == "null_text"
  }  # fmt: skip
  draw = np.random.default_rng(0)
  params = {name: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32) for name, leaf in job.shapes.items()}
  lora.save(tmp_path / "a.safetensors", lora_lib.of(params, "lora."))
  read, facts = lora.read(tmp_path / "a.safetensors", job.dit)
  assert facts["rank"] == 2
  merged = lora.merge({name: value for name, value in params.items() if name not in adapted}, [(read, 1.0)])
  whole = params_lib.split(job.whole(params))[1]
  for name, value in merged.items():
    np.testing.assert_allclose(whole[name], value, rtol=1e-6, err_msg=name)
  assert np.abs(whole["dit.blocks.self_attn.q.kernel"] - params["dit.blocks.self_attn.q.kernel"]).max() > 0.1


@pytest.mark.drill
def test_adapters_learn_on_a_frozen_transformer_and_go_out_as_a_file(tmp_path):
  base = loop.run(lora_config(**{"lora.rank": 0}), tmp_path / "base")
  config = lora_config(init_from=str(tmp_path / "base"), **{"optimizer.lr": 1e-2, "steps": 30})
  summary = loop.run(config, tmp_path / "run")
  assert summary.metrics["loss"] < base.metrics["loss"]
  job = task.make(config)
  read = lambda name, shapes: Checkpoints(tmp_path / name).restore_params(Checkpoints(tmp_path / name).latest(), shapes)
  before = read("base", task.make(lora_config(**{"lora.rank": 0})).shapes)
  after = read("run", job.shapes)
  for name, value in before.items():
    if not job.trainable(name):
      np.testing.assert_array_equal(after[name], value)
  assert all(np.abs(after[name]).max() > 0 for name in after if name.endswith("kernel.b"))
  convert.export(str(tmp_path / "run"), str(tmp_path / "out"), naming="diffusers")
  adapters, _ = lora.read(tmp_path / "out" / "lora.safetensors", job.dit)
  merged = lora.merge({name: after[name] for name in before}, [(adapters, 1.0)])
  whole = params_lib.split(job.whole(after))[1]
  np.testing.assert_allclose(whole["dit.blocks.self_attn.v.kernel"], merged["dit.blocks.self_attn.v.kernel"], rtol=1e-5)
  convert.import_(str(tmp_path / "out"), str(tmp_path / "back"))
  for name, value in read("back", job.shapes).items():
    np.testing.assert_array_equal(value, after[name])
