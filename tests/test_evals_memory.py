"""What memory-v1 is for: action-following, re-appearance and probes against rollouts whose faults are known."""

import dataclasses
import itertools

import numpy as np
import pytest

from kling_jax.data import memory_world
from kling_jax.data.memory_world_frames import render, truth
from kling_jax.errors import DataError
from kling_jax.evals import following, probes, reappearance

STEPS, SIZE = 3, 32
END = np.arange(1, STEPS + 1) / STEPS


def film(states, size: int = SIZE) -> np.ndarray:
  """The clips that lead from each state to the next, (O, T, H, W, 3)."""
  return np.stack([render(a, b, END, size, size) for a, b in itertools.pairwise(states)])


def noisy(frames: np.ndarray, deviation: float) -> np.ndarray:
  noise = np.random.default_rng(0).normal(0, deviation, frames.shape)
  return np.clip(frames + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("deviation", [0.0, 25.0])
def test_the_world_s_own_films_follow_every_sentence(deviation):
  for index in range(3):
    story = memory_world.story(21, index, 12)
    verdicts, states = following.judge(noisy(film(story.states), deviation), story.states[0], story.sentences)
    assert following.share(verdicts) == 1.0 and states == list(story.states)
    assert all(verdict.choices > 1 and verdict.margin > 0 for verdict in verdicts)
    assert max(verdict.error for verdict in verdicts) < deviation + 1


def test_what_is_shown_in_place_of_what_was_asked_is_named_and_followed_up():
  story = memory_world.story(21, 1, 8)
  state = story.states[0]
  other = next(a for a in memory_world.legal(state) if a.kind == "move" and a != story.actions[0])
  told = memory_world.told(21, 1, 8, {0: memory_world.sentence(state, other)})
  asked = (story.sentences[0], *told.sentences[1:-1], "the moon rises")
  verdicts, states = following.judge(film(told.states), state, asked)
  assert [verdict.followed for verdict in verdicts] == [False] + [True] * 6 + [False]
  assert verdicts[0].shown == told.sentences[0] and verdicts[-1].shown == told.sentences[-1]
  assert states == list(told.states)
  with pytest.raises(DataError, match="give one a clip"):
    following.judge(film(told.states), state, asked[:3])


def test_frames_without_content_follow_hardly_anything():
  story = memory_world.story(21, 2, 12)
  grey = np.full((12, STEPS, SIZE, SIZE, 3), 128, np.uint8)
  verdicts, _ = following.judge(grey, story.states[0], story.sentences)
  assert following.share(verdicts) < 0.5


STORIES = [memory_world.story(31, index, 24) for index in range(4)]


def test_the_world_s_own_things_return_as_they_went():
  for size in (32, 64):
    for story in STORIES[:2]:
      found = reappearance.reappearance(film(story.states, size), story.states)
      assert (found.colour, found.shape, found.both) == (1, 1, 1) and found.error == 0 and found.count >= 3


def test_returns_are_of_things_that_were_seen_before():
  for story in STORIES:
    found = reappearance.returns(story.states)
    assert found
    for clip, slot in found:
      assert story.actions[clip].kind in ("return", "out", "pan back", "cut back", "pan")
      visible = [s.room == 0 and any(t.slot == slot for t in s.shown.seen()) for s in story.states]
      assert visible[clip + 1] and not visible[clip] and any(visible[:clip])
    assert not set(found) & set(reappearance.stayed(story.states))


def forgetful(story, **changes) -> np.ndarray:
  """The film of a world that forgets: each thing that returns is another one."""
  frames, states = film(story.states), list(story.states)
  for clip, slot in reappearance.returns(story.states):
    room = states[clip + 1].shown
    thing = room.thing(slot)
    shape = "square" if thing.shape != "square" else "circle"
    colour = next(c for c in memory_world.THING_COLOURS if c not in {t.colour for t in room.things})
    made = dataclasses.replace(thing, **{k: {"shape": shape, "colour": colour}[k] for k in changes})
    states[clip + 1] = wrong = dataclasses.replace(
      states[clip + 1], rooms=(room.with_thing(made), *states[clip + 1].rooms[1:])
    )
    frames[clip, -1] = render(wrong, wrong, np.ones(1), SIZE, SIZE)[0]
  return frames


def test_a_world_that_forgets_colours_or_shapes_is_found_out():
  for story in STORIES:
    colours = reappearance.reappearance(forgetful(story, colour=True), story.states)
    shapes = reappearance.reappearance(forgetful(story, shape=True), story.states)
    assert colours.colour == 0 and colours.shape == 1 and shapes.colour == 1 and shapes.shape == 0
    assert colours.error > 0 and shapes.error > 0
    stayed = reappearance.stayed(story.states)
    assert reappearance.reappearance(film(story.states), story.states, stayed).both == 1
  nothing = reappearance.reappearance(film(STORIES[0].states)[:2], STORIES[0].states[:3], [])
  assert nothing.count == 0 and np.isnan(nothing.colour)


def test_an_empty_place_is_the_room_and_noise_does_not_hide_a_thing():
  state = STORIES[0].states[0]
  thing = next(t for t in state.shown.things if state.shown.visible(t))
  gone = dataclasses.replace(state, rooms=(dataclasses.replace(state.shown, things=()),))
  empty = render(gone, gone, np.ones(1), SIZE, SIZE)[0]
  assert reappearance.look(empty, state, thing).colour == "room"
  there = noisy(render(state, state, np.ones(1), SIZE, SIZE), 20)[0]
  found = reappearance.look(there, state, thing)
  assert (found.colour, found.shape) == (thing.colour, thing.shape)


# ------------------------------------------------------------------------------------------------------------ probes

RNG = np.random.default_rng(1)
WORLDS = np.repeat(np.arange(20), 12)


def test_no_world_is_on_two_sides():
  masks = probes.parts(WORLDS, seed=3)
  assert np.array_equal(np.sum(masks, 0), np.ones(len(WORLDS))) and all(mask.any() for mask in masks)
  for world in range(20):
    assert sum(mask[world == WORLDS].any() for mask in masks) == 1
  with pytest.raises(DataError, match="at least 5 worlds"):
    probes.parts(WORLDS[:24])


def test_a_linear_readout_finds_what_is_linear_and_nothing_in_noise():
  states = RNG.normal(size=(240, 6))
  target = states @ RNG.normal(size=(6, 2)) + 0.3
  visible = RNG.random(240) < 0.5
  found = probes.ridge(states, target, WORLDS, visible)
  assert found.value > 0.99 and found.hidden > 0.99 and found.chance < 0.1 and 0 < found.hidden_rows < found.rows
  assert probes.ridge(RNG.normal(size=(240, 6)), target, WORLDS, visible).value < 0.1
  classes = (target[:, 0] > 0.3).astype(int) + 4
  assert probes.logistic(states, classes, WORLDS, visible).value > 0.9
  assert probes.logistic(RNG.normal(size=(240, 6)), classes, WORLDS, visible).value < 0.75


def test_ridge_is_scikit_learn_s_closed_form():
  """The normal equations on centred targets, solved directly."""
  states, target = RNG.normal(size=(240, 5)), RNG.normal(size=(240, 1))
  fit, choose, report = probes.parts(WORLDS)
  x = (states - states[fit].mean(0)) / states[fit].std(0)
  y = target - target[fit].mean(0)
  errors = {}
  for penalty in probes.PENALTIES:
    weights = np.linalg.solve(x[fit].T @ x[fit] + penalty * np.eye(5), x[fit].T @ y[fit])
    left = np.square(y - x @ weights)
    errors[penalty] = left[choose].sum(), 1 - left[report].sum() / np.square(y[report] - y[report].mean(0)).sum()
  expected = min(errors.values())[1]
  found = probes.ridge(states, target, WORLDS, np.ones(240, bool))
  assert found.value == pytest.approx(expected) and np.isnan(found.hidden) and found.hidden_rows == 0


def test_a_state_that_remembers_is_told_from_one_that_only_sees():
  """States by hand: for each colour its column, row and shape, of all things or of those in the picture."""
  truths, worlds, seeing, knowing = [], [], [], []
  for index in range(120):
    story = memory_world.story(41, index, 5)
    for before, after in itertools.pairwise(story.states):
      true = truth(before, after, np.array([0.0, 1.0]))
      truths.append(true)
      worlds.append(index)
      known = np.zeros((2, len(memory_world.THING_COLOURS), 9 + 1 + 3))
      for slot in np.flatnonzero(true.exists_TN[-1, :3]):
        column, row = true.cell_TNC[-1, slot]
        facts = np.zeros(13)
        facts[[column + 4, 10 + true.shape_TN[-1, slot]]], facts[9] = 1, 2 * row - 1
        known[: 1 + (true.visible_TN[-1, slot] > 0.5), true.colour_TN[-1, slot]] = facts
      knowing.append(known[0].ravel())
      seeing.append(known[1].ravel())
  knows, sees = (probes.memory_probe(np.array(x), truths, np.array(worlds)) for x in (knowing, seeing))
  for name, least in (("column", 0.9), ("shape", 0.8)):
    assert knows[name].visible > least and knows[name].hidden > least
    assert sees[name].visible > least - 0.15 and sees[name].hidden < knows[name].hidden - 0.2
  assert knows["place"].value > 0.5 > 0.25 > sees["place"].value and knows["place"].chance < 0
  assert sees["shape"].hidden < sees["shape"].hidden_chance + 0.3
