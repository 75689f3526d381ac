"""Rollouts: the cache against one pass over everything, overrides, forks, cuts, one program for every clip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import owl_model
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from owl_model import CAMERA, CONFIG, FREE, LAYOUT, POLICY, ROWS, action, quick_jit, same

from kling_jax.diffusion import guidance as guidance_lib
from kling_jax.diffusion import sampler as sampler_lib
from kling_jax.diffusion.guidance import Guidance
from kling_jax.errors import ConfigError
from kling_jax.nn import params as params_lib
from kling_jax.nn import rng
from kling_jax.world import film, sequence
from kling_jax.world.rollout import Clip, Writer, fork

CLIPS = 20


@pytest.fixture(scope="module")
def roller() -> owl_model.Roller:
  return owl_model.Roller()


@pytest.fixture(scope="module")
def rollout(roller):
  """Twenty clips: written greedily, given in one row, given in both, with cuts."""
  asked = [FREE] * CLIPS
  asked[3], asked[4] = action(["up", None]), action(["left", "go"], cut=(True, False))
  asked[11] = action([None, "stop"], cut=(True, True))
  return roller.run(asked)


@pytest.fixture(scope="module")
def whole(rollout):
  """The same twenty clips read in one pass without a cache, the history being a mask of pairs."""
  model = lambda weights: params_lib.merge(owl_model.described()[0], weights)
  read = lambda weights, walk: sequence.read(model(weights), LAYOUT, POLICY, walk, dtype=jnp.float32)
  walk = owl_model.walk_of(rollout[0])
  return walk, jax.tree.map(np.asarray, quick_jit(read)(owl_model.weights(), walk))


def test_cached_states_are_those_of_one_pass_over_everything(rollout, whole) -> None:
  cached = np.stack([clip.state_BQD for clip in rollout[0]], 1)
  np.testing.assert_allclose(cached, whole[1].state_BOQD, atol=1e-5)
  assert np.abs(np.diff(cached, axis=1)).max(axis=(2, 3)).min() > 1e-2  # no two clips have the same state


def test_the_cached_text_is_the_greedy_choice_of_one_pass(rollout, whole) -> None:
  walk, reading = whole
  tokens, counted = sequence.targets(walk)
  given_BO = np.zeros((ROWS, CLIPS), bool)
  given_BO[[0, 0, 1, 1], [3, 4, 4, 11]] = True
  logits = np.array(reading.logits_BOLV)
  logits[..., [0, 1]] = -np.inf  # never padding, never an opening mark
  free = counted & ~given_BO[:, :, None]
  free[..., -1] &= tokens[..., -1] != 2  # a closing mark in the last place is forced
  assert free.sum() > 100
  np.testing.assert_array_equal(logits.argmax(-1)[free], tokens[free])


def test_logits_token_by_token_are_those_of_training(rollout, whole) -> None:
  """Every place of every part goes through the cache alone; dynamics are compared, and all else is in their past."""
  walk, reading = whole
  world, clips = owl_model.world(), 6
  weights = owl_model.weights()
  embedded = quick_jit(
    lambda w: sequence.embed(params_lib.merge(world.graph, w), LAYOUT, walk, jnp.float32)
  )(weights)  # fmt: skip
  real = np.asarray(sequence.real(LAYOUT, walk))

  @quick_jit
  def read_one(weights, cache, x_B1D, real_B1, clip, first):
    model = params_lib.merge(world.graph, weights)
    hidden, cache = world._read(model, cache, x_B1D, clip, first, real_B1)
    return model.lm.logits(hidden[:, 0]), cache

  cache = rollout[1][0].cache
  for clip in range(clips):
    cache = POLICY.make_room(LAYOUT, cache, jnp.int32(clip))
    for first in range(LAYOUT.clip):
      place = LAYOUT.prefix + clip * LAYOUT.clip + first
      x, seen = embedded[:, place : place + 1], real[:, place : place + 1]
      logits, cache = read_one(weights, cache, x, seen, jnp.int32(clip), jnp.int32(first))
      if first < LAYOUT.dynamics - 1:
        shown = real[:, place]
        np.testing.assert_allclose(
          np.asarray(logits)[shown], reading.logits_BOLV[:, clip, first][shown], atol=1e-5
        )  # fmt: skip


def test_queries_that_see_one_another_are_cached_alike() -> None:
  """The language model alone, with vectors of places, on pictures of noise, beyond the window."""
  config = dataclasses.replace(CONFIG, places=LAYOUT.clip)
  world, values = owl_model.world(config, layout=dataclasses.replace(LAYOUT, mutual=True)), owl_model.weights(config)
  frames = np.random.default_rng(4).integers(0, 256, (6, ROWS, owl_model.FRAMES, 16, 16, 3), np.uint8)
  state = quick_jit(world.begin)(values, owl_model.IMAGE, *owl_model.PROMPTS, owl_model.FPS, owl_model.KEYS)

  @quick_jit
  def clip(weights, state, asked, frames):
    model = params_lib.merge(world.graph, weights)
    cache = world.policy.make_room(world.layout, state.cache, state.clip)
    tokens, mask, states, cache = world.think(model, cache, state, asked)
    cache = world.look(model, cache, state.clip, frames)
    after = dataclasses.replace(state, cache=cache, clip=state.clip + 1)
    return Clip(frames, tokens, mask, states), after

  clips = []
  for shown in frames:
    made, state = clip(values, state, action(["up", None]), shown)
    clips.append(made)

  @quick_jit
  def whole(weights, walk):
    model = params_lib.merge(world.graph, weights)
    return sequence.read(model, world.layout, POLICY, walk, dtype=jnp.float32, logits=False).state_BOQD

  cached = np.stack([made.state_BQD for made in clips], 1)
  np.testing.assert_allclose(cached, whole(values, owl_model.walk_of(clips)), atol=1e-5)


def test_any_number_of_clips_is_one_program_and_one_size_of_memory(roller, rollout) -> None:
  assert roller.step._cache_size() == 1
  shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) for state in rollout[1]]
  assert all(other == shapes[0] for other in shapes[1:])
  assert int(rollout[1][-1].clip) == CLIPS


def test_overriding_dynamics_changes_what_follows_and_nothing_before(roller, rollout) -> None:
  clips, states = rollout
  other, _ = roller.run([action(["jump", None])], states[7])
  assert not np.array_equal(other[0].frames_BTHWC[0], clips[7].frames_BTHWC[0])
  np.testing.assert_array_equal(other[0].frames_BTHWC[1], clips[7].frames_BTHWC[1])  # the row that was not asked
  again, _ = roller.run([FREE] * 3)
  for number in range(3):
    same(again[number], clips[number])


def test_a_text_that_is_given_leads_where_the_same_text_written_leads(roller, rollout) -> None:
  clips, states = rollout
  written = clips[8]
  asked = dataclasses.replace(
    FREE,
    dynamics_BL=written.dynamics_BL,
    dynamics_mask_BL=written.dynamics_mask_BL,
    given_B=np.ones(ROWS, bool),
  )
  clip, after = roller.step(roller.weights, states[8], asked)
  same(clip, written)
  same(after.cache.real_BL, states[9].cache.real_BL)
  np.testing.assert_array_equal(after.context_BTHWC, states[9].context_BTHWC)


def test_proposals_are_what_the_step_writes(roller, rollout) -> None:
  clips, states = rollout
  tokens, mask = quick_jit(roller.world.propose)(roller.weights, states[5])
  np.testing.assert_array_equal(np.where(mask, tokens, 0), clips[5].dynamics_BL)


def test_forks_with_the_same_keys_have_the_same_future_and_others_do_not(roller, rollout) -> None:
  clips, states = rollout
  for number, clip in enumerate(roller.run([FREE, FREE], states[5])[0]):
    same(clip, clips[5 + number])
  left, right = (roller.run([FREE], fork(states[5], branch))[0][0] for branch in (1, 2))
  assert not np.array_equal(left.frames_BTHWC, right.frames_BTHWC)
  same(left, roller.run([FREE], fork(states[5], 1))[0][0])


def test_a_cut_films_without_the_clip_before(roller, rollout) -> None:
  state = rollout[1][6]
  moved = dataclasses.replace(state, context_BTHWC=state.context_BTHWC + 1)
  run = lambda state, cut: roller.step(roller.weights, state, action(["a", "a"], cut=(cut, cut)))[0]
  same(run(state, True), run(moved, True))
  assert not np.array_equal(run(state, False).frames_BTHWC, run(moved, False).frames_BTHWC)
  same(run(state, True).state_BQD, run(state, False).state_BQD)  # the state remembers across the cut


def test_rows_do_not_know_of_one_another(roller, rollout) -> None:
  state = rollout[1][2]
  swap = lambda leaf: leaf[::-1] if leaf.ndim and leaf.shape[0] == ROWS else leaf
  turned = jax.tree.map(swap, dataclasses.replace(state, cache=None))
  cache = jax.tree.map(lambda leaf: leaf[:, ::-1] if leaf.ndim == 5 else swap(leaf), state.cache)
  clip, _ = roller.step(roller.weights, dataclasses.replace(turned, cache=cache), FREE)
  np.testing.assert_allclose(clip.state_BQD[::-1], rollout[0][2].state_BQD, atol=1e-5)
  np.testing.assert_array_equal(clip.dynamics_BL[::-1], rollout[0][2].dynamics_BL)


# ---- filming -------------------------------------------------------------------------------------------------------


def test_the_context_cache_and_stacked_branches_change_nothing() -> None:
  """Against the sampler around plain calls: the context beside the clip, one branch after the other."""
  guidance = Guidance(text=2, scores=2, image=2.5, history="fractional", level=0.4)
  camera = dataclasses.replace(CAMERA, guidance=guidance)
  draw = np.random.default_rng(1)
  normal = lambda *shape: jnp.asarray(draw.standard_normal((ROWS, *shape)), jnp.float32)
  conditions = film.ClipConditions(
    state_BQD=normal(CONFIG.slots, 16), text_BLD=normal(4, 16), text_mask_BL=jnp.ones((ROWS, 4), bool),
    fps_B=jnp.asarray(owl_model.FPS), context_BTHWC=normal(2, 4, 4, 4), context_time_B=jnp.zeros(ROWS),
    context_mask_BT=jnp.array([[True, True], [False, True]]),
  )  # fmt: skip
  process, keys_B = owl_model.world().process, owl_model.KEYS

  def fast(weights):
    return film.film(params_lib.merge(owl_model.described()[0], weights), process, camera, conditions, keys_B, 2)

  def plain(weights):
    model = params_lib.merge(owl_model.described()[0], weights)
    parts = {
      branch: film.branch_conditions(model, process, camera, conditions, branch, keys_B)
      for branch in guidance_lib.branches(guidance)
    }
    called = lambda x, time, branch: model.predict(x, jnp.full((ROWS,), time), parts[branch])
    noise = rng.normal(rng.stream(keys_B, "noise"), (2, 4, 4, 4))
    predict = guidance_lib.guided(called, guidance)
    return sampler_lib.sample(predict, noise, sampler_lib.times(camera.steps), process, camera.method)

  ours, theirs = (np.asarray(quick_jit(way)(owl_model.weights())) for way in (fast, plain))
  np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


# ---- writing -------------------------------------------------------------------------------------------------------

numbers = st.lists(st.floats(-4, 4, width=32), min_size=6, max_size=6, unique=True)


@settings(max_examples=30)
@given(logits=numbers, top_p=st.floats(0.05, 1.0))
def test_nucleus_sampling_draws_from_the_smallest_set_with_that_probability(logits, top_p) -> None:
  writer = Writer(opening=0, closing=1, padding=2, temperature=0.7, top_p=top_p)
  keys = jax.random.split(jax.random.key(0), 64)
  rows = jnp.tile(jnp.asarray(logits, jnp.float32), (64, 1))
  drawn = set(np.asarray(writer.choose(rows, jnp.zeros(rows.shape, bool), keys)).tolist())
  p = np.exp(np.array(logits) / 0.7)
  p[[0, 2]] = 0
  p /= p.sum()
  order = np.argsort(-p)
  smallest = min(int(np.searchsorted(np.cumsum(p[order]), top_p + 1e-5)) + 1, 4)  # float32 may see one more
  assert p[list(drawn)].min() >= p[order[smallest - 1]] * (1 - 1e-5)  # alike in float32: either one


def test_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
  writer = Writer(opening=0, closing=1, padding=2, repetition=2.0)
  choose = lambda logits, said: int(
    writer.choose(jnp.array([logits]), jnp.array([said]), jax.random.split(jax.random.key(0), 1))[0]
  )
  said = [False, False, False, True, False]
  assert choose([9.0, -9.0, 9.0, 1.9, 1.0], said) == 4
  assert choose([9.0, -9.0, 9.0, 2.1, 1.0], said) == 3
  assert choose([9.0, -9.0, 9.0, -1.0, -1.9], said) == 4


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"temperature": -1.0}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
    ({"repetition": 0.5}, "repetition penalty"),
  ],
)
def test_settings_of_a_writer_that_cannot_be(change, message) -> None:
  with pytest.raises(ConfigError, match=message):
    Writer(0, 1, 2, **change)
