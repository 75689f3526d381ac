"""The captioner: parts as lines, pictures among videos, writing as it was taught, weights out and `kling caption`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kling_jax import config as config_lib
from kling_jax.curation import caption
from kling_jax.curation.caption_local import Local
from kling_jax.data import caption_lines, films, tokens
from kling_jax.data.worlds import WorldSource
from kling_jax.errors import ConfigError, WeightsError
from kling_jax.evals import captions
from kling_jax.interop import safetensors
from kling_jax.models import captioner
from kling_jax.models.captioner import Captioner, Shape
from kling_jax.nn import params as params_lib
from kling_jax.train import loop, task
from kling_jax.train.tasks.captioner import CARD, CaptionerTask, as_still, export, files

SHAPE = Shape(tower_width=64, tower_depth=1, patch=8, frames=2, size=32, fps=1.0, max_text=160)


@pytest.fixture(scope="module")
def job() -> CaptionerTask:
  made = task.make(config_lib.load("configs/captioner.py:runlocal", ["--config.data.stills=0.5"]))
  assert isinstance(made, CaptionerTask)
  return made


def drawn(shapes):
  """Weights of about the sizes that they start with, without compiling anything."""
  random = np.random.default_rng(0)
  size = lambda leaf: 0.3 * leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.1
  draw = lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * size(leaf), jnp.float32)
  return {name: draw(leaf) + name.endswith("scale") for name, leaf in shapes.items()}


@pytest.fixture(scope="module")
def weights():
  graph, shapes, _ = params_lib.abstract(lambda: Captioner(SHAPE, rngs=nnx.Rngs(params=jax.random.key(1))))
  return graph, drawn(shapes)


def test_parts_are_lines_and_come_back():
  parts = WorldSource("shapes-v1", 3, 0).info(1).parts
  text = caption_lines.text_of(parts)
  assert caption_lines.parts_of(text) == parts and text.count("\n") == 4  # camera is the fifth of six
  assert set(caption_lines.parts_of(caption_lines.still_text(text))) == {"subject", "environment"}
  assert caption_lines.text_of({}, "one\n caption") == "one caption"
  assert (captioner.PAD, captioner.BOS, captioner.EOS) == (tokens.PAD, tokens.BOS, tokens.EOS)


def test_parts_say_what_the_caption_says():
  """Every word of a part stands in the world's own caption, which is older than the parts."""
  source = WorldSource("shapes-v1", 60, 3)
  for index in range(len(source)):
    info = source.info(index)
    caption = set(info.caption.replace(",", " ").replace(";", " ").split())
    for said in info.parts.values():
      words = set(said.replace(",", " ").split()) - {"a", "an", "the", "in", "front"}
      assert words <= caption, words - caption


def test_a_share_of_the_rows_are_pictures_and_which_depends_on_seed_step_and_row(job):
  batches = job.batches("train", 0, 1, 1)
  read = lambda row: caption_lines.parts_of(tokens.ByteTokenizer(job.shape.max_text).decode(row))
  still, moving = 0, 0
  for step in range(6):
    batch = batches[step]
    again = dict(batches.iterate(step, stop=step + 1))[step]
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
    for frames, row in zip(batch["frames"], batch["tokens"], strict=True):
      if np.array_equal(frames[0], frames[-1]) and "camera" not in read(row):
        still += 1
        assert set(read(row)) == {"subject", "environment"}
      else:
        moving += 1
        assert "action" in read(row)
  assert still and moving and still + moving == 48
  one = as_still(batch, 2)
  assert np.array_equal(one["frames"][1], batch["frames"][1]) and np.array_equal(one["tokens"][1], batch["tokens"][1])


def test_loss_counts_the_text_and_its_end_alone(job):
  batch = job.batches("train", 0, 1, 1)[0]
  params = drawn(job.shapes)
  loss_B, metrics = jax.jit(lambda p, b: job.losses(p, b, jax.random.split(jax.random.key(0), 8), True))(params, batch)
  model = params_lib.merge(job.graph, params)
  logits = np.asarray(jax.jit(model.logits)(batch["frames"] / np.float32(127.5) - 1, batch["tokens"][:, :-1]), float)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  for row, (wanted, p) in enumerate(zip(batch["tokens"][:, 1:], log_p, strict=True)):
    length = int(np.argmax(wanted == tokens.EOS)) + 1
    assert float(loss_B[row]) == pytest.approx(-p[np.arange(length), wanted[:length]].mean(), rel=1e-4)
  assert 0 <= float(metrics["byte_accuracy"]) <= 1


def test_writing_takes_the_likeliest_byte_of_the_whole_pass(weights):
  """The bytes written one by one through the cache are those that one pass over them finds likeliest."""
  graph, params = weights
  frames = np.random.default_rng(0).uniform(-1, 1, (2, 2, 32, 32, 3)).astype(np.float32)
  model = params_lib.merge(graph, params)
  written_BL = np.asarray(jax.jit(model.write)(frames))
  likeliest_BL = np.asarray(jnp.argmax(jax.jit(model.logits)(frames, written_BL[:, :-1]), -1))
  for written, likeliest in zip(written_BL, likeliest_BL, strict=True):
    ended = np.flatnonzero(written == tokens.EOS)
    length = ended[0] if len(ended) else SHAPE.max_text - 1
    assert written[0] == tokens.BOS and np.array_equal(written[1 : length + 1], likeliest[:length])
    assert not written[length + 1 :].any()


def test_kling_caption_asks_weights_that_lie_in_a_folder(weights, tmp_path):
  folder = tmp_path / "weights"
  safetensors.write(folder, weights[1])
  files.write_json(folder / CARD, dataclasses.asdict(SHAPE))
  clips = tmp_path / "clips"
  films.render_films(clips, count=1, seconds=2.0, size=(48, 64), seed=2)
  (clips / "captions.csv").unlink()
  summary = caption.run(clips, caption.Options(captioners=[f"local:{folder}", "facts"]), tmp_path / "captions.jsonl")
  assert sum(summary.captioned.values()) == 1 and not summary.failed
  local = Local(folder)
  frames = np.zeros((1, 2, 32, 32, 3), np.uint8)
  assert local.write(frames) == local.write(frames)
  for broken, match in ((tmp_path, "holds no captioner"), (folder, "wants exactly the sizes")):
    (folder / CARD).write_text('{"patch": 8}')
    with pytest.raises((WeightsError, ConfigError), match=match):
      Local(broken)


def test_fields_are_right_or_wrong_one_by_one():
  true = {
    "subject": "a red circle, a blue square", "action": "the circle moves slowly up, the square stays still",
    "environment": "a dotted green background, a grey pillar in front", "camera": "the camera pans left quickly",
  }  # fmt: skip
  assert captions.field_accuracy([true], [true]) == dict.fromkeys(captions.fields(true), 1.0)
  wrong = true | {"subject": "a blue circle, a red square", "camera": "the camera pans left"}
  accuracy = captions.field_accuracy([wrong, true], [true, true])
  assert accuracy == dict.fromkeys(accuracy, 1.0) | {"objects": 0.5, "camera": 0.5}
  assert captions.field_accuracy([{}], [true])["motion"] == 0
  other = true | {"action": "the circle moves up, the square stays still"}
  assert captions.field_accuracy([other], [true])["motion"] == 0
  assert captions.commonest([true, true, wrong])["objects"] == pytest.approx(2 / 3)


def test_sizes_that_do_not_fit_are_named():
  for changes, match in (({"size": 40}, "multiple of 2 patches"), ({"frames": 3}, "even"), ({"tower_width": 96}, "64")):
    with pytest.raises(ConfigError, match=match):
      dataclasses.replace(SHAPE, **changes)
  with pytest.raises(ConfigError, match="data.stills"):
    task.make(config_lib.load("configs/captioner.py:runlocal,stills=2.0", []))


@pytest.mark.drill
def test_it_learns_to_tell_four_clips_apart(tmp_path):
  """Through the trainer, the export and the captioner: each of four clips gets its own caption, word for word."""
  c = config_lib.load("configs/captioner.py:runlocal,stills=0", [
    "--config.steps=260", "--config.data.sources=('worlds:shapes-v1?count=4&seed=5',)", "--config.ema.decay=0.9",
    "--config.data.validation_fraction=0.0", "--config.validation.every=0", "--config.checkpoint.every=0",
  ])  # fmt: skip
  assert loop.run(c, tmp_path / "run").metrics["byte_accuracy"] > 0.99
  export(str(tmp_path / "run"), str(tmp_path / "weights"))
  local, source = Local(tmp_path / "weights"), WorldSource("shapes-v1", 4, 5)
  for index in range(4):
    assert local.caption(source, index).parts.items() >= source.info(index).parts.items()
