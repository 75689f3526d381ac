"""The stages of Owl-1: what each trains and leaves alone, what a batch becomes, and what is refused."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import owl_model
import pytest

from kling_jax import config as config_lib
from kling_jax.data import encode, tokens
from kling_jax.errors import ConfigError, DataError
from kling_jax.nn import params as params_lib
from kling_jax.nn import rng
from kling_jax.train import sharding, task
from kling_jax.train.state import Update
from kling_jax.train.tasks.owl import OwlTask, check_stage
from kling_jax.world.sequence import Reading

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
  "data.clips": 3, "data.batch": 2, "data.height": 16, "data.width": 16, "data.dynamics_tokens": 32,
  "data.prompt_tokens": 40, "text.width": 32, "video.size": "d32", "video.conditions": (), "history.window": 1,
  "optimizer.warmup": 0, "own.steps": 2, "data.sources": ("worlds:memory-v1?count=4&seed=0",),
}  # fmt: skip


def config(stage: str = "world", **changes) -> ml_collections.ConfigDict:
  c = config_lib.load(f"{ROOT}/configs/owl.py:runlocal,stage={stage}")
  c.update_from_flattened_dict({**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}})
  return c


def make(stage: str = "world", **changes) -> OwlTask:
  job = task.make(config(stage, **changes))
  assert isinstance(job, OwlTask)
  return job


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
  return make().batches("train", 0, 1, 1)[0]


def weights(job: OwlTask) -> dict[str, np.ndarray]:
  """Every parameter away from its initial value, so that every gate is open and each trained one gets a gradient."""
  draw = np.random.default_rng(0)
  found = {}
  for name, leaf in job.shapes.items():
    noise = draw.standard_normal(leaf.shape).astype(np.float32)
    value = noise / np.sqrt(leaf.shape[-2]) if name.endswith("kernel") else 0.3 * noise + name.endswith("scale")
    found[name] = value.astype(np.float32)
  return found


# Heard only where a draw drops a condition, or where a frame rate is unknown.
UNUSED = ("video.dit.conditions", "video.dit.fps.null", "null_state", "video.null_text")


@pytest.mark.parametrize("stage", ["align", "world"])  # the drill in test_generate_rollout.py goes through all four
def test_a_stage_moves_what_it_trains_and_leaves_the_rest_to_the_bit(stage, batch) -> None:
  job = make(stage, drop__state=0.0, drop__text=0.0, drop__both=0.0)
  mesh = sharding.make_mesh({"replica": 1, "fsdp": 1, "context": 1, "tensor": 1}, jax.devices()[:1])
  update = Update(job, mesh)
  before = weights(job)
  state = update.fresh(jax.tree.map(jnp.asarray, before))
  rows = sharding.put_batch(mesh, batch)
  step = owl_model.quick_jit(update._step)
  for _ in range(2):
    state, numbers = step(state, rows, update.lr)
  assert np.isfinite(float(numbers["loss"])) and float(numbers["skipped"]) == 0
  frozen = ("video.",) if stage == "align" else ("video.text.", "video.codec.")
  for name, value in state["params"].items():
    same = np.array_equal(np.asarray(value), before[name])
    if name.startswith(frozen) or (stage == "align" and name in ("null_state",)):
      assert same and name not in update.trained, name
    elif not name.startswith(UNUSED):
      assert not same, name
  if stage in ("world", "self_rollout"):
    assert {"film", "text", "text_accuracy"} <= set(numbers)


def test_adapters_train_in_place_of_the_language_model() -> None:
  c = config(lm__lora_rank=2, lm__lora=("q", "v"), trainable=("queries", "head.*", "lora.*", "video.dit.*"))
  job = OwlTask(c)
  trained = [path for path in job.shapes if job.trainable(path)]
  assert not any(path.startswith("lm.") for path in trained)
  assert sum(path.startswith("lora.layers.attention.") for path in trained) == 4
  assert job.lr_scale("lora.layers.attention.q.kernel.lora_a") == c.lr_scale.lm
  assert job.lr_scale("queries") == c.lr_scale.state and job.lr_scale("video.dit.x") == c.lr_scale.video


# ---- batches -------------------------------------------------------------------------------------------------------


def test_dynamics_stand_before_the_clip_they_lead_to(batch) -> None:
  decode = lambda rows: [[tokens.ByteTokenizer(32).decode(np.asarray(text)) for text in row] for row in rows]
  texts = decode(batch["dynamics"])
  walk = lambda **changes: owl_model.quick_jit(make(**changes).walk)(batch)
  assert decode(walk().dynamics_BOL) == texts
  current = walk(data__target="current")
  assert decode(current.dynamics_BOL) == [["", *row[:-1]] for row in texts]
  assert np.asarray(current.dynamics_mask_BOL)[:, 0].sum(-1).tolist() == [2, 2]  # an empty text has its two marks
  caption = walk(data__dynamics="caption")
  prompts = [tokens.ByteTokenizer(40).decode(row) for row in batch["prompt"]]
  for text, prompt in zip(decode(caption.dynamics_BOL), prompts, strict=True):
    assert len(set(text)) == 1 and prompt.startswith(text[0]) and len(text[0]) >= 28
  ends = np.asarray(caption.dynamics_BOL)[np.arange(2), 0, np.asarray(caption.dynamics_mask_BOL)[:, 0].sum(-1) - 1]
  assert (ends == tokens.EOS).all()


def test_the_language_model_sees_the_first_and_last_frame_of_each_clip(batch) -> None:
  walk = make().walk(batch)
  np.testing.assert_array_equal(walk.key_frames_BOTHWC, batch["frames"][:, :, [0, 4]])


def test_a_past_of_its_own_replaces_the_clip_before_and_nothing_else(batch) -> None:
  job = make("self_rollout")
  keys = rng.sample_keys(jax.random.key(0), 0, np.arange(2))
  clip = np.array([1, 2])

  def past(weights):
    return job.own_past(params_lib.merge(job.graph, weights), batch, keys, jnp.asarray(clip))

  own, before = owl_model.quick_jit(past)(weights(job))
  same = np.all(np.asarray(own["frames"]) == batch["frames"], axis=(2, 3, 4, 5))
  np.testing.assert_array_equal(same, [[False, True, True], [True, False, True]])
  np.testing.assert_array_equal(own["frames_wanted"], batch["frames"])
  assert before.shape == (2, 1, 4, 4, 16)


def test_conditions_of_a_clip_are_the_image_the_clip_before_or_nothing_at_a_cut(batch) -> None:
  job = make()
  cut = np.zeros((2, 3), bool)
  cut[1, 2] = True
  given = {**batch, "cut": cut}
  states = jnp.zeros((2, 3, 4, 32))

  @owl_model.quick_jit
  def of_clip(weights, number_B):
    model = params_lib.merge(job.graph, weights)
    return job.conditions(model, given, job.walk(given), states, number_B)

  unit = owl_model.quick_jit(lambda frames: job.geometry_of(job.config).encode(frames.astype(jnp.float32) / 127.5 - 1))
  first = of_clip(weights(job), np.array([0, 0]))
  np.testing.assert_allclose(first.context_BTHWC, unit(batch["image"][:, None]), atol=1e-5)
  assert np.asarray(first.context_mask_BT).all()
  later = of_clip(weights(job), np.array([2, 2]))
  np.testing.assert_allclose(later.context_BTHWC, unit(batch["frames"][:, 1])[:, -1:], atol=1e-5)
  assert np.asarray(later.context_mask_BT)[:, 0].tolist() == [True, False]


def test_videos_are_walked_by_their_dense_captions_and_shots(tmp_path) -> None:
  frames = (np.full((16, 16, 3), 4 * k + 20, np.uint8) for k in range(30))
  encode.write(tmp_path / "videos" / "film.mp4", frames, fps=5)
  said = [("dark", 0, 2), ("light", 2, 3.9), ("white", 4, 6)]
  lines = [json.dumps({"file": "film.mp4", "caption": word, "start_s": a, "end_s": b}) for word, a, b in said]
  (tmp_path / "said.jsonl").write_text("\n".join(lines))
  shots = [{"start_frame": a, "end_frame": b, "start_s": a / 5, "end_s": b / 5} for a, b in ((0, 20), (20, 30))]
  (tmp_path / "shots.json").write_text(json.dumps([{"video": "film.mp4", "shots": shots}]))
  job = make(data__sources=(str(tmp_path / "videos"),), data__captions=str(tmp_path / "said.jsonl"), data__clips=6,
             data__shots=str(tmp_path / "shots.json"), data__batch=1, data__validation_fraction=0.0)  # fmt: skip
  rows = job.batches("train", 0, 1, 1)[0]
  assert [job.tokenizer(32).decode(text) for text in rows["dynamics"][0]] == ["dark"] * 2 + ["light"] * 2 + [
    "white"
  ] * 2
  assert rows["cut"][0].tolist() == [False] * 4 + [True, False]
  with pytest.raises(DataError, match=r"nowhere.json' do not exist"):
    make(data__captions=str(tmp_path / "nowhere.json")).batches("train", 0, 1, 1)


@pytest.mark.drill
def test_several_clips_of_a_row_are_filmed_as_one_after_the_other_is(batch) -> None:
  one, three = make(), make(loss__clips=3)
  keys = rng.sample_keys(jax.random.key(0), 0, np.arange(2))
  first, given = jnp.array([1, 2]), {**batch, "frames_wanted": batch["frames"]}

  def film(weights, job, batch, keys, clip):
    model = params_lib.merge(job.graph, weights)
    walk = job.walk(batch)
    states = jax.random.normal(jax.random.key(1), (2, 3, 4, 32))
    return job._film(model, batch, walk, Reading(states, states, None), keys, clip, None, True)

  values = weights(one)
  alone = owl_model.quick_jit(lambda weights, *given: film(weights, one, *given))
  parts = [
    alone(values, {**given, "index": batch["index"] * 3 + k}, jax.vmap(jax.random.fold_in, (0, None))(keys, k),
          (first + k) % 3)
    for k in range(3)
  ]  # fmt: skip
  whole = owl_model.quick_jit(lambda weights, *given: film(weights, three, *given))(values, given, keys, first)
  np.testing.assert_allclose(whole, np.mean(parts, 0), rtol=1e-5)
  assert np.std(parts, axis=0).min() > 1e-3


def test_words_of_the_world_are_read_in_place_of_bytes() -> None:
  job = make(lm__tokens="memory-v1")
  rows = job.batches("train", 0, 1, 1)[0]
  said = job.batches("train", 0, 1, 1).row(*job.batches("train", 0, 1, 1).at(0)).dynamics
  assert [job.tokenizer(32).decode(text) for text in rows["dynamics"][0]] == list(said)
  assert job.shapes["lm.table"].shape[0] == job.tokenizer(32).vocabulary == 48
  with pytest.raises(ConfigError, match="'video.weights': that text encoder was trained on bytes"):
    make(lm__tokens="memory-v1", video__weights="runs/base").pretrained()


# ---- refusals, before anything is compiled -------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"stage": "aling"}, "did you mean 'align'"),
    ({"data.target": "last"}, "'data.target' = 'last' is unknown"),
    ({"lm.context": 150}, r"'data.clips' = 3: .* make 176, the language model knows 150 \(lm.context\); legal: 1 to 2"),
    ({"context.frames": 3}, "'context.frames' = 3; a clip has 2"),
    ({"sample.context_noise": 0.5}, "the second not above the first"),
    ({"sample.history_form": "fractional", "sample.history_level": 0.5}, "trained up to context.noise = 0.1"),
    ({"data.frames": 6}, "1 \\+ 4 k frames, not 6"),
    ({"data.key_frames": 7}, "7 key frames of a clip of 5 frames; at most 5"),
    ({"data.height": 20}, "20 x 16 do not divide into patches of 8"),
    ({"text.tokens": 20}, "'text.tokens' = 20 is below the longest text, 40"),
    ({"stage": "self_rollout", "own.clips": 3}, "'own.clips' = 3 of 3 clips a row; legal: 1 to 2"),
    ({"loss.clips": 4}, "'loss.clips' = 4 in stage 'world'; legal: 1 to 3"),
    ({"stage": "self_rollout", "loss.clips": 2}, "legal: 1 to 1"),
    ({"lm.tokens": "words"}, "'lm.tokens' = 'words' is unknown"),
    ({"state.injection": "plus"}, "state injection 'plus' does not exist"),
  ],
)  # fmt: skip
def test_configs_that_cannot_be(changes, message) -> None:
  c = config()
  c.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=message):
    task.make(c)


def test_stages_go_in_order_and_align_needs_a_trained_encoder(tmp_path) -> None:
  with pytest.raises(ConfigError, match=r"'video.weights' is not set: stage align"):
    make("align").pretrained()
  (tmp_path / "config.json").write_text(json.dumps({"task": "owl", "stage": "world"}))
  check_stage(tmp_path, "world")
  check_stage(tmp_path, "self_rollout")
  with pytest.raises(ConfigError, match="of stage 'world', which comes after 'generate'"):
    check_stage(tmp_path, "generate")
  (tmp_path / "config.json").write_text(json.dumps({"task": "video_dit"}))
  with pytest.raises(ConfigError, match="goes into video.weights"):
    make("generate", init_from=str(tmp_path)).pretrained()


@pytest.mark.parametrize(
  ("preset", "stage"), [("tiny", "self_rollout"), ("small", "generate"), ("owl1", "align"), ("modern", "world")]
)
def test_every_preset_describes_itself_without_memory(preset, stage) -> None:
  c = config_lib.load(f"{ROOT}/configs/owl.py:preset={preset},stage={stage}")
  job = task.make(c)
  assert isinstance(job, OwlTask)
  assert set(job.axes) == set(job.shapes)
  trained = sum(leaf.size for path, leaf in job.shapes.items() if job.trainable(path))
  assert 0 < trained < params_lib.count(job.shapes)
  if preset == "owl1":  # the paper: "approximately 798M" of the language model's side
    assert trained == pytest.approx(798e6, rel=0.05)
