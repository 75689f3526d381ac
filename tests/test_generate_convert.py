"""`kling import` and `kling export`: foreign folders become work directories that sample; weights come back exactly."""

import json
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import parity_fixture
import pytest
import safetensors.numpy
from flax import nnx

from kling_jax import cli
from kling_jax import config as config_lib
from kling_jax.data.tokens import FileTokenizer
from kling_jax.errors import ConfigError, DataError, UsageError, WeightsError
from kling_jax.generate import convert, sample
from kling_jax.generate import encode as generate_encode
from kling_jax.interop import outward
from kling_jax.interop import safetensors as weights
from kling_jax.models import video_dit, video_vae
from kling_jax.nn import params as params_lib
from kling_jax.train import encoders, loop, task, warm_start
from kling_jax.train.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]
WORDS = ("a", "red", "circle", "and", "blue", "square")


def tokenizer_json(folder):
  """A tokenizer of six words that ends each text with </s>, as T5's does."""
  tokenizers = pytest.importorskip("tokenizers")
  vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: 3 + number for number, word in enumerate(WORDS)}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
  folder.mkdir(parents=True, exist_ok=True)
  made.save(str(folder / "tokenizer.json"))


def drawn(init, seed):
  """Random parameters of a module, nothing left at a start of zero."""
  _, shapes, _ = params_lib.abstract(init)
  draw = np.random.default_rng(seed)
  return {name: draw.normal(scale=0.3, size=leaf.shape).astype(np.float32) for name, leaf in shapes.items()}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
  """A tiny Wan in diffusers' layout: transformer, vae, text_encoder, tokenizer."""
  folder = tmp_path_factory.mktemp("pipeline")
  shape = video_dit.preset("d16", latent_channels=4, text_width=32, conditions=())
  dit = drawn(lambda: video_dit.VideoDiT(shape, rngs=nnx.Rngs(0)), 0)
  assert outward.write_diffusers(folder / "transformer", "video_dit", shape, dit) == []
  vae = drawn(lambda: video_vae.VideoVAE.preset("xs", rngs=nnx.Rngs(0)), 1)
  outward.write_diffusers(folder / "vae", "video_vae", video_vae.preset("xs"), vae)
  (folder / "text_encoder").mkdir()
  parity_fixture.load("umt5", folder / "text_encoder")
  tokenizer_json(folder / "tokenizer")
  return folder, {f"dit.{name}": array for name, array in dit.items()} | {
    f"codec.{name}": array for name, array in vae.items()
  }


@pytest.fixture(scope="module")
def imported(pipeline, tmp_path_factory):
  """The work directory of the pipeline."""
  folder = tmp_path_factory.mktemp("imported") / "work"
  assert cli.main(["import", str(pipeline[0]), "--out", str(folder), "--config.sample.steps=3"]) == 0
  assert warm_start.workdir.read_config(folder).sample.steps == 3
  return folder


def weights_of(folder):
  """(step, parameters) of a work directory."""
  job = task.make(warm_start.workdir.read_config(folder))
  checkpoints = Checkpoints(folder)
  return checkpoints.latest(), checkpoints.restore_params(checkpoints.latest(), job.shapes)


def assert_same(left, right):
  assert set(left) == set(right)
  for name, array in left.items():
    np.testing.assert_array_equal(np.asarray(array), np.asarray(right[name]), err_msg=name)


def test_a_pipeline_becomes_a_work_directory_that_samples(pipeline, imported):
  step, params = weights_of(imported)
  config = warm_start.workdir.read_config(imported)
  encoder = encoders.text_encoder(config)
  empty, mask = encoders.embed(encoder, [""])
  assert step == 0 and mask.sum() == 1
  np.testing.assert_allclose(params.pop("null_text"), empty[0, :1], rtol=1e-4, atol=1e-6)
  assert_same(params, pipeline[1])
  sources = Checkpoints(imported).meta(0)["constants"]["sources"]
  file = pipeline[0] / "transformer" / "diffusion_pytorch_model.safetensors"
  assert sources["dit"]["sha256"] == {file.name: outward.sha256(file)}
  model = sample.Model(imported)
  settings = sample.Settings(frames=1, height=16, width=16, steps=1)
  red, blue = model([sample.Request("a red circle"), sample.Request("a blue square")], settings)
  assert red.shape == (1, 16, 16, 3) and np.abs(red.astype(int) - blue).max() > 0


@pytest.mark.parametrize("naming", convert.NAMINGS)
def test_out_and_in_again_is_exact(imported, naming, tmp_path, capsys):
  arguments = ["export", "--workdir", str(imported), "--out", str(tmp_path / "out"), "--naming", naming, "--json"]
  assert cli.main(arguments) == 0
  told = json.loads(capsys.readouterr().out)
  assert told["rest"] == ["null_text"] and told["step"] == 0
  facts = json.loads(
    (tmp_path / "out" / ("transformer" if naming == "diffusers" else "dit") / "config.json").read_text()
  )
  assert ("kling_jax" in facts) == (naming == "kling_jax") == ("_class_name" not in facts)
  assert cli.main(["import", str(tmp_path / "out"), "--out", str(tmp_path / "back"), "--json"]) == 0
  (step, before), (step_after, after) = weights_of(imported), weights_of(tmp_path / "back")
  assert step == step_after
  assert_same(before, after)
  configs = [warm_start.workdir.read_config(folder) for folder in (imported, tmp_path / "back")]
  assert config_lib.plain(configs[0]) == config_lib.plain(configs[1])


def test_a_vae_of_ours_goes_out_in_both_namings(tmp_path):
  config = config_lib.load("vae:runlocal")
  job = task.make(config)
  params = drawn(lambda: job.init(nnx.Rngs(0)), 5)
  convert._write_workdir(tmp_path / "work", config, params, job, 7, {})
  for naming in convert.NAMINGS:
    told = convert.export(str(tmp_path / "work"), str(tmp_path / naming), naming=naming)
    assert told["kind"] == "video_vae" and told["step"] == 7
    back, report = warm_start.load(tmp_path / naming, job.shapes, ())
    assert_same(back, params)
    assert report["kind"] == "video_vae"


def test_a_damaged_export_is_refused(imported, tmp_path):
  convert.export(str(imported), str(tmp_path / "out"))
  path = tmp_path / "out" / convert.MODEL
  facts = json.loads(path.read_text())
  for change, match in (
    ({"parts": {"..": "dit."}}, "names the part"), ({"parts": {"dit": "dit."}}, "lacks .* parameters"),
    ({"config": []}, "is damaged"), ({"step": "x"}, "is damaged"),
  ):  # fmt: skip
    path.write_text(json.dumps(facts | change))
    with pytest.raises(WeightsError, match=match):
      convert.import_(str(tmp_path / "out"), str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_one_model_becomes_a_folder_under_our_names(pipeline, dtype, tmp_path):
  done = convert.import_(str(pipeline[0] / "transformer"), str(tmp_path / "dit"), dtype=dtype)
  assert done["kind"] == "video_dit" and done["parameters"] == sum(
    array.size for name, array in pipeline[1].items() if name.startswith("dit.")
  )
  held = weights.Tensors(tmp_path / "dit")
  assert {str(array.dtype) for array in held.values()} == {"float32" if dtype == "keep" else "bfloat16"}
  job = task.make(tiny(model__conditions=("motion",)))
  params, report = warm_start.load(tmp_path / "dit", job.shapes, ())
  assert sorted(report["missing"]) == sorted(
    name for name in job.shapes if name.startswith("dit.conditions.") or name == "null_text"
  )
  expected = {name: array for name, array in pipeline[1].items() if name.startswith("dit.")}
  if dtype == "keep":
    assert_same(params, expected)
  foreign, told = warm_start.load(pipeline[0] / "transformer", job.shapes, ())
  assert_same(foreign, expected)
  assert told["naming"] == "diffusers" and len(str(told["fingerprint"])) == 16


def tiny(**changes):
  """A training config at the size of the pipeline."""
  config = config_lib.load(str(ROOT / "configs" / "video_dit.py") + ":size=d16,res=64")
  config.update_from_flattened_dict({
    "codec.channels": 4, "codec.spatial": 8, "text.encoder": "cached", "text.width": 32, "text.tokens": 8,
    "text.padding": True, "data.buckets": ((5, 16, 16),), "data.batch": 8, "model.conditions": (), "steps": 2,
    "data.validation_fraction": 0.0, "validation.every": 0, "optimizer.warmup": 1,
  } | {key.replace("__", "."): value for key, value in changes.items()})  # fmt: skip
  return config


@pytest.mark.drill
def test_training_goes_on_from_wan_and_umt5(pipeline, tmp_path):
  """Captions through the text encoder into the cache, latents through the VAE, two steps from the foreign weights."""
  from kling_jax.data import encode

  folder, before = pipeline
  films = tmp_path / "films"
  films.mkdir()
  for number in range(8):
    encode.write(films / f"{number}.mp4", [np.full((32, 32, 3), 20 * number + k, np.uint8) for k in range(9)], fps=8)
    (films / f"{number}.txt").write_text(f"a {'red' if number % 2 else 'blue'}  circle &amp; square", encoding="utf-8")
  config = tiny(
    init_from=str(folder / "transformer"), codec__name="vae", codec__preset="xs", codec__weights=str(folder / "vae"),
    text__weights=str(folder / "text_encoder"), data__sources=(str(films),), data__cached_latents=True,
  )  # fmt: skip
  assert "9 encoded" in generate_encode.run(config).splitlines()[1]
  (cache,) = encoders.text_caches(config, [films])
  assert cache.card.encoder == "t5" and cache.card.dtype == "bfloat16" and cache.null().shape == (1, 32)
  info = task.make(config).sources.sources[0].info(0)
  assert cache.get(info.clip_id, info.caption).shape == (6, 32)  # five words and the end: trimmed
  summary = loop.run(config, tmp_path / "run")
  assert summary.finished and np.isfinite(summary.metrics["loss"])
  meta = Checkpoints(tmp_path / "run").meta(2)
  assert [origin["prefix"] for origin in meta["origins"]] == ["", "codec."] and meta["origins"][0]["fingerprint"]
  _, after = weights_of(tmp_path / "run")
  assert_same({k: v for k, v in after.items() if k.startswith("codec.")},
              {k: v for k, v in before.items() if k.startswith("codec.")})  # fmt: skip
  moved = np.abs(np.asarray(after["dit.blocks.mlp.up.kernel"]) - before["dit.blocks.mlp.up.kernel"]).max()
  assert 0 < moved < 0.01


def test_padding_is_seen_as_zeros_where_the_config_says_so(pipeline):
  """With text.padding the network reads the same as from all tokens unmasked, zeros behind the text."""
  job = task.make(tiny())
  params = {
    name: jnp.asarray(pipeline[1].get(name, np.zeros(leaf.shape, np.float32))) for name, leaf in job.shapes.items()
  }
  model = params_lib.merge(job.graph, params)
  draw = np.random.default_rng(0)
  x, text = draw.normal(size=(1, 1, 4, 4, 4)).astype(np.float32), draw.normal(size=(1, 8, 32)).astype(np.float32)
  mask = np.arange(8)[None] < 3
  given = task_conditions(text, mask)
  ours = jax.jit(model)(x, jnp.array([0.5]), given)
  expected = jax.jit(model.dit)(x, jnp.array([0.5]), np.where(mask[..., None], text, 0))
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
  masked = jax.jit(model.dit)(x, jnp.array([0.5]), text, text_mask_BL=jnp.asarray(mask))
  assert np.abs(masked - expected).max() > 1e-3


def task_conditions(text, mask):
  from kling_jax.models.text_to_video import Conditions

  return Conditions(jnp.asarray(text), jnp.asarray(mask), jnp.zeros((1, 0)), jnp.zeros((1, 0), bool))


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_file_tokenizer_cleans_cuts_and_ends_each_text(tmp_path):
  tokenizer_json(tmp_path / "pipeline" / "tokenizer")
  (tmp_path / "pipeline" / "text_encoder").mkdir()
  found = FileTokenizer.find(tmp_path / "pipeline" / "text_encoder", 5)
  found = pickle.loads(pickle.dumps(found))
  tokens, mask = found(["a  red\n circle", "", "a &amp;lt; a a a a a", "a red circle and blue square"])
  np.testing.assert_array_equal(tokens, [[3, 4, 5, 1, 0], [1, 0, 0, 0, 0], [3, 2, 3, 3, 1], [3, 4, 5, 6, 1]])
  np.testing.assert_array_equal(mask.sum(1), [4, 1, 5, 5])


def test_a_sentencepiece_model_is_read(tmp_path):
  pieces = pytest.importorskip("sentencepiece")
  text = tmp_path / "text.txt"
  text.write_text("\n".join(["a red circle", "a blue square", "a red square and a blue circle"] * 20))
  pieces.SentencePieceTrainer.Train(
    input=str(text), model_prefix=str(tmp_path / "spiece"), vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=1,
    unk_id=2, bos_id=-1, minloglevel=2,
  )  # fmt: skip
  model = pieces.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
  tokens, mask = FileTokenizer.find(tmp_path, 12)(["a red circle", ""])
  assert tokens[0][mask[0]].tolist() == [*model.EncodeAsIds("a red circle"), 1] and tokens[1][mask[1]].tolist() == [1]


def test_what_is_no_tokenizer_is_said(tmp_path):
  with pytest.raises(DataError, match="no tokenizer in"):
    FileTokenizer.find(tmp_path, 8)
  for name in ("tokenizer.json", "spiece.model"):
    (tmp_path / name).write_bytes(b"\x80\x04nothing")
    with pytest.raises(DataError, match=f"{name} is no tokenizer"):
      FileTokenizer(str(tmp_path / name), 8)(["a"])


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals_of_import_and_export_are_one_line(pipeline, imported, tmp_path, capsys):
  def refused(arguments, match, code):
    assert cli.main(arguments) == code
    assert match in capsys.readouterr().err

  out = ["--out", str(tmp_path / "new")]
  refused(["import", str(tmp_path / "gone"), *out], "there is no", 2)
  refused(["import", str(pipeline[0] / "vae"), "--out", str(imported)], "is not empty", 2)
  refused(["import", str(pipeline[0] / "vae"), *out, "--config.steps=1"], "takes no --config", 2)
  refused(["export", "--workdir", str(imported), *out, "--naming", "x"], "--naming 'x' is unknown", 2)
  (tmp_path / "strange").mkdir()
  safetensors.numpy.save_file({"cats.dogs": np.zeros(2, np.float32)}, tmp_path / "strange" / "a.safetensors")
  refused(["import", str(tmp_path / "strange"), *out], "its names begin with cats", 1)
  (tmp_path / "pickles").mkdir()
  (tmp_path / "pickles" / "model.pth").write_bytes(pickle.dumps({"a": 1}))
  refused(["import", str(tmp_path / "pickles"), *out], "model.pth, a pickle", 1)
  assert not (tmp_path / "new").exists()
  with pytest.raises(ConfigError, match="dtype 'f4'"):
    convert.import_(str(pipeline[0] / "transformer"), str(tmp_path / "new"), dtype="f4")
  with pytest.raises(UsageError):
    convert.import_(str(tmp_path / "gone"), str(tmp_path / "new"))


class Harmful:
  """A pickle of it would make a file when it is read."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def hostile(kind, tensors, path, trap):
  """Writes a broken form of `tensors` to `path`."""
  if kind == "pickle":
    path.write_bytes(pickle.dumps(Harmful(trap)))
    return
  name = "blocks.0.attn1.to_q.weight"
  changed = dict(tensors)
  if kind == "not finite":
    changed[name] = np.full_like(tensors[name], np.nan)
  if kind == "infinite in bfloat16":
    changed = {key: array.astype(jnp.bfloat16) for key, array in tensors.items()}
    changed[name][0, 0] = np.inf
  if kind == "another type":
    changed[name] = np.zeros(tensors[name].shape, np.int32)
  if kind == "another shape":
    changed[name] = tensors[name][:, :-1].copy()
  if kind == "path parts":
    changed["../../outside"] = changed["blocks.0.../../etc/passwd"] = np.zeros(1, np.float32)
  if kind == "lost":
    del changed["proj_out.bias"]
  safetensors.numpy.save_file(changed, path)
  data = path.read_bytes()
  if kind == "truncated":
    path.write_bytes(data[:-100])
  if kind == "huge header":  # a length that a reader would have to allocate
    path.write_bytes((10**9).to_bytes(8, "little") + data[8:])
  if kind == "huge header in a huge file":
    with path.open("wb") as file:
      file.write((2**30).to_bytes(8, "little") + b'{"a":')
      file.truncate(2**30 + 64)


@pytest.mark.parametrize("kind", [
  "pickle", "not finite", "infinite in bfloat16", "another type", "another shape", "path parts", "lost", "truncated",
  "huge header", "huge header in a huge file",
])  # fmt: skip
def test_hostile_weights_end_as_weights_error_and_leave_nothing(pipeline, kind, tmp_path):
  folder = tmp_path / "in"
  folder.mkdir()
  source = pipeline[0] / "transformer"
  (folder / "config.json").write_text((source / "config.json").read_text())
  hostile(kind, dict(weights.Tensors(source)), folder / "model.safetensors", tmp_path / "ran")
  with pytest.raises(WeightsError, match=r"in\b"):
    convert.import_(str(folder), str(tmp_path / "out"))
  job = task.make(tiny())
  with pytest.raises(WeightsError):
    warm_start.load(folder, job.shapes, ())
  assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
