"""What a world model has learnt, on walks of memory-v1 that it never saw: texts, actions, memory, drift, motion.

Two passes. *Reading*: the true walks go through the language model once; its next sentences are compared with the true
ones, and linear probes look for things in its states. *Filming*: rollouts under the true sentences, whose true film is
known, from the states as they are, from the learned null state, and from those of other walks ("shuffled"): what gets
worse is what the states were good for.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kling_jax.data import memory_world
from kling_jax.data.memory_world import Story
from kling_jax.data.memory_world_frames import CLIP_S, Truth, truth, walk_frames
from kling_jax.errors import UsageError
from kling_jax.evals import drift, following, motion, probes, reappearance, seams
from kling_jax.generate.rollout import Model
from kling_jax.models.language_model import Cache
from kling_jax.models.owl import Owl
from kling_jax.nn import params as params_lib
from kling_jax.nn import rng
from kling_jax.world import sequence
from kling_jax.world.rollout import Action, RolloutState, World

STATES = ("true", "null", "shuffled")
DRIFTS = ("luma", "saturation", "sharpness", "histogram")  # curves that are compared with the true film's
LATE = 4  # clips at the end of a rollout, whose mean stands for the last one


@dataclasses.dataclass(frozen=True)
class Options:
  """On what a model is measured.

  Attributes:
    readings: walks of the reading pass, as long as the model's training rows.
    walks, clips: of the filming pass.
    seed: of the worlds; not that of the training data.
    states: of STATES, what clips are filmed from.
  """

  readings: int = 128
  walks: int = 16
  clips: int = 20
  seed: int = 1
  states: tuple[str, ...] = STATES


@dataclasses.dataclass(frozen=True)
class Altered(World):
  """A world whose clips are filmed from another state; `which` counts in STATES and may be traced.

  "null" is the learned null state, "shuffled" the state of the next row.
  """

  which: jax.Array | int = 0

  def think(
    self, model: Owl, cache: Cache, state: RolloutState, action: Action
  ) -> tuple[jax.Array, jax.Array, jax.Array, Cache]:
    """As of `World`, with the other state."""
    tokens_BL, mask_BL, state_BQD, cache = super().think(model, cache, state, action)
    null_BQD = jnp.broadcast_to(model.null_state[...], state_BQD.shape).astype(state_BQD.dtype)
    return tokens_BL, mask_BL, jnp.stack([state_BQD, null_BQD, jnp.roll(state_BQD, 1, axis=0)])[self.which], cache


def measure(model: Model, options: Options = Options()) -> dict[str, Any]:
  """Everything of a model, JSON-ready: `text`, `probe`, `film` by the state that it was filmed from, `data`.

  Raises:
    UsageError: fewer walks than probes and shuffling need, or clips that are not those of memory-v1.
  """
  begun, config = time.perf_counter(), model.config
  if options.walks < 2 or options.readings < 5:
    raise UsageError(f"{options.walks} walks and {options.readings} readings; give at least 2 and 5")
  if abs(model.clip_seconds - CLIP_S) > 1e-6:
    raise UsageError(f"clips of {model.clip_seconds:g} s; those of memory-v1 last {CLIP_S:g}")
  stories = [memory_world.story(options.seed, n, config.data.clips) for n in range(options.readings)]
  found: dict[str, Any] = {"options": dataclasses.asdict(options), "model": model.name, "stage": config.stage}
  found |= read(model, stories)
  stories = [memory_world.story(options.seed, n, options.clips) for n in range(options.walks)]
  batch = batch_of(model, stories)
  found["data"] = motions(batch["frames"], stories, model.fps)
  made = films(model, batch, options.states)
  found["film"] = {state: pictures(made[state], batch["frames"], stories, model.fps) for state in options.states}
  return found | {"seconds": round(time.perf_counter() - begun, 1)}


def batch_of(model: Model, stories: Sequence[Story]) -> dict[str, np.ndarray]:
  """The walks as the task's batches have them."""
  d = model.config.data
  clips = len(stories[0].actions)
  moments_s = np.arange(1, clips * d.frames + 1) / d.frames * CLIP_S
  shape = (clips, d.frames, d.height, d.width, 3)
  films = [walk_frames(story, moments_s, d.height, d.width).reshape(shape) for story in stories]
  prompt, prompt_mask = model.tokens([memory_world.scene(story.states[0]) for story in stories], d.prompt_tokens)
  said, said_mask = model.tokens([text for story in stories for text in story.sentences], d.dynamics_tokens)
  folded = (len(stories), clips, d.dynamics_tokens)
  return {
    "frames": np.stack(films),
    "image": np.stack([walk_frames(story, np.zeros(1), d.height, d.width)[0] for story in stories]),
    "cut": np.array([story.cuts for story in stories]) & (np.arange(clips) > 0),
    "fps": np.full((len(stories), clips), model.fps, np.float32),
    "index": np.arange(len(stories), dtype=np.uint32),
    "prompt": prompt, "prompt_mask": prompt_mask,
    "dynamics": said.reshape(folded), "dynamics_mask": said_mask.reshape(folded),
  }  # fmt: skip


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(model: Model, stories: Sequence[Story], rows: int = 16) -> dict[str, Any]:
  """`text`: the share of sentences written right from the true past, word for word (greedily), apart for those that
  follow from it and those that are drawn; `probe`: readouts of the states, and of shuffled ones.
  """
  d, job = model.config.data, model.task

  @jax.jit
  def one_pass(params, batch):
    network: Owl = params_lib.merge(job.graph, params)
    walk = job.walk(batch)
    reading = sequence.read(network, job.layout, job.policy, walk, dtype=job.dtype)
    wanted_BOL, counted_BOL = sequence.targets(walk)
    assert reading.logits_BOLV is not None
    hit_BOL = jnp.argmax(reading.logits_BOLV, -1) == wanted_BOL
    return jnp.all(hit_BOL | ~counted_BOL, -1), reading.state_BOQD

  rights, states, truths = [], [], list[Truth]()
  for start in range(0, len(stories), rows):
    chunk = list(stories[start : start + rows])
    whole = chunk + chunk[:1] * (rows - len(chunk))  # one program: the last rows are padded
    right_BO, state_BOQD = jax.device_get(one_pass(model.params, batch_of(model, whole)))
    rights.append(right_BO[: len(chunk)])
    states.append(state_BOQD[: len(chunk)].astype(np.float32).reshape(len(chunk), d.clips, -1))
    progress_T = np.arange(1, d.frames + 1) / d.frames
    for story in chunk:
      truths += [truth(*pair, progress_T, d.height, d.width) for pair in itertools.pairwise(story.states)]
  right_BO = np.concatenate(rights)
  bound_BO = np.array([story.determined for story in stories])
  states_ND = np.concatenate(states).reshape(-1, states[0].shape[-1])
  worlds_N = np.repeat(np.arange(len(stories)), d.clips)
  shuffled_N = np.random.Generator(np.random.PCG64(0)).permutation(len(states_ND))
  text = {
    "determined": _mean(right_BO[bound_BO]), "drawn": _mean(right_BO[~bound_BO]),
    "determined_sentences": int(bound_BO.sum()), "kinds": _by_kind(stories, right_BO, bound_BO),
  }  # fmt: skip
  return {
    "text": text,
    "probe": {
      name: {kind: dataclasses.asdict(score) for kind, score in probes.memory_probe(x_ND, truths, worlds_N).items()}
      for name, x_ND in (("true", states_ND), ("shuffled", states_ND[shuffled_N]))
    },
  }


def _by_kind(stories: Sequence[Story], right_BO: np.ndarray, bound_BO: np.ndarray) -> dict[str, float | None]:
  """The share of determined sentences that are right, by the kind of event."""
  found: dict[str, list[bool]] = {}
  for story, right_O, bound_O in zip(stories, right_BO, bound_BO, strict=True):
    for action, right, bound in zip(story.actions, right_O, bound_O, strict=True):
      if bound:
        found.setdefault(action.kind, []).append(bool(right))
  return {kind: _mean(values) for kind, values in sorted(found.items())}


# ---- filming ---------------------------------------------------------------------------------------------------------


def films(model: Model, batch: dict[str, np.ndarray], states: Sequence[str]) -> dict[str, np.ndarray]:
  """{state: rollouts under the true sentences and cuts, all rows at once, uint8 (B, O, T, H, W, 3)}."""
  world, job = model.world, model.task
  fields = {field.name: getattr(world, field.name) for field in dataclasses.fields(World)}
  begin = jax.jit(world.begin)
  step = jax.jit(lambda params, now, asked, which: Altered(**fields, which=which).step(params, now, asked))
  walk = jax.jit(job.walk)(batch)
  rows, clips = batch["frames"].shape[:2]
  keys_B = rng.sample_keys(jax.random.key(0), 0, batch["index"])
  found = {}
  for state in states:
    now = begin(model.params, batch["image"], batch["prompt"], batch["prompt_mask"], batch["fps"][:, 0], keys_B)
    made = []
    for clip in range(clips):
      said, real = walk.dynamics_BOL[:, clip], walk.dynamics_mask_BOL[:, clip]
      asked = Action(said, real, jnp.ones(rows, bool), jnp.asarray(batch["cut"][:, clip]))
      filmed, now = step(model.params, now, asked, STATES.index(state))
      made.append(np.asarray(filmed.frames_BTHWC))
    found[state] = np.stack(made, 1)
  return found


def motions(films_BOTHWC: np.ndarray, stories: Sequence[Story], fps: float) -> dict[str, float]:
  """`seam_ratio` and `dynamic_degree`, of clips: what needs no truth."""
  cuts = np.array([story.cuts for story in stories])
  clips = list(films_BOTHWC.reshape(-1, *films_BOTHWC.shape[2:]))
  return {"seam_ratio": seams.seams(films_BOTHWC, cuts).ratio, "dynamic_degree": motion.dynamic_degree(clips, fps)}


def pictures(films_BOTHWC: np.ndarray, true_BOTHWC: np.ndarray, stories: Sequence[Story], fps: float) -> dict[str, Any]:
  """The metrics of films whose true films are known.

  `following`: share of clips that show their event; `chance`: of guessing it. `reappearance`: of things that were away;
  `stayed`: of those that were not. `rmse`: distance to the true film in levels of 255, and of the last clips.
  `drift`: how far the statistics of the last clips are from the true film's. And `motions`.
  """
  verdicts, back, stayed = [], [], []
  for film_OTHWC, story in zip(films_BOTHWC, stories, strict=True):
    verdicts += following.judge(film_OTHWC, story.states[0], story.sentences)[0]
    back.append(reappearance.reappearance(film_OTHWC, story.states))
    stayed.append(reappearance.reappearance(film_OTHWC, story.states, reappearance.stayed(story.states)))
  error_BO = np.square(films_BOTHWC.astype(np.float32) - true_BOTHWC).mean((2, 3, 4, 5))
  curves = [(drift.curves(a), drift.curves(b)) for a, b in zip(films_BOTHWC, true_BOTHWC, strict=True)]
  return {
    "following": following.share(verdicts),
    "chance": _mean([1 / verdict.choices for verdict in verdicts]),
    "reappearance": _pooled(back),
    "stayed": _pooled(stayed),
    "rmse": float(np.sqrt(error_BO.mean())),
    "rmse_late": float(np.sqrt(error_BO[:, -LATE:].mean())),
    "drift": {name: _mean([abs((a[name] - b[name])[-LATE:].mean()) for a, b in curves]) for name in DRIFTS},
    **motions(films_BOTHWC, stories, fps),
  }


def _pooled(parts: Sequence[reappearance.Reappearance]) -> dict[str, float | int | None]:
  """Shares over the things of all walks."""
  parts = [part for part in parts if part.count]
  weights = [part.count for part in parts]
  mean = lambda name: float(np.average([getattr(part, name) for part in parts], weights=weights)) if parts else None
  return {**{name: mean(name) for name in ("colour", "shape", "both", "error")}, "count": int(sum(weights))}


def _mean(values: Any) -> float | None:
  return float(np.mean(values)) if len(values) else None
