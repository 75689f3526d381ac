"""memory-v1: stories against the rules that the guide states, pictures against the truth that is told about them."""

import itertools
import pickle
import re

import numpy as np
import pytest

from kling_jax.data import memory_world, memory_world_frames
from kling_jax.data.memory_world import Action, Room, State, Thing
from kling_jax.data.memory_world_frames import MemoryWorld, render, truth, walk_frames
from kling_jax.data.named import COLOURS
from kling_jax.data.open import open_source
from kling_jax.data.source import ClipSource
from kling_jax.data.tokens import WordTokenizer
from kling_jax.errors import ConfigError, DataError, UsageError

STORIES = [memory_world.story(11, index, 24) for index in range(60)]


def test_a_longer_story_continues_a_shorter_one_and_seeds_differ():
  assert memory_world.story(3, 5, 40).states[:13] == memory_world.story(3, 5, 12).states
  assert memory_world.story(3, 5, 12) != memory_world.story(4, 5, 12)
  assert len({story.states[0] for story in STORIES}) == len(STORIES)


def test_the_words_are_those_of_its_sentences_and_scenes():
  said = [text for story in STORIES for text in (*story.sentences, *map(memory_world.scene, story.states))]
  assert {word for text in said for word in re.findall(r"\w+|,", text)} == set(memory_world.WORDS)
  assert len(memory_world.WORDS) == len(set(memory_world.WORDS))
  tokenizer = WordTokenizer(26, memory_world.WORDS)
  tokens_BL, mask_BL = tokenizer(said)
  assert [tokenizer.decode(row) for row in tokens_BL] == said
  assert (mask_BL.sum(1) == [tokenizer.count(text) + 2 for text in said]).all()


GOLDEN = [
  "the camera pans left", "nothing moves", "the camera pans back right", "the black circle leaves to the right",
  "the white square moves right", "the black circle comes back from the right",
]  # fmt: skip
GOLDEN_PICTURE = [[115, 115, 184, 15], [115, 115, 184, 15], [231, 238, 226, 230], [241, 242, 230, 231]]


def test_the_world_never_changes_under_its_version():
  """Sentences and a coarse picture of memory-v1 as first released (tolerant of other processors' sines)."""
  story = memory_world.story(0, 0, 6)
  assert list(story.sentences) == GOLDEN
  assert memory_world.scene(story.states[0]) == (
    "a black circle top right, a white square bottom, a grey wall top, in a pink room"
  )
  picture = walk_frames(story, np.array([0.0]), 16, 16)[0, 4:12:2, 6:14:2, 0]
  np.testing.assert_allclose(picture.astype(int), GOLDEN_PICTURE, atol=1)


def bound(sentences: list[str]) -> str | None:
  """What must come after these sentences, as a pattern: the rules in words, without the simulator."""
  last = sentences[-1] if sentences else ""
  before = sentences[-2] if len(sentences) > 1 else ""
  if found := re.fullmatch(r"(.*) hides behind the wall", last):
    return f"{found[1]} comes out on the (left|right)"
  if re.fullmatch(r"the camera pans (left|right)", last):
    return "nothing moves"
  if found := re.fullmatch(r"the camera pans (left|right)", before):
    return f"the camera pans back {'right' if found[1] == 'left' else 'left'}"
  if found := re.fullmatch(r"cut to an? \w+ room with an? (.*) on the (left|right)", last):
    return f"the {found[1]} crosses to the {'right' if found[2] == 'left' else 'left'}"
  if before.startswith("cut to"):
    return "cut back to the first room"
  if found := re.fullmatch(r"(.*) leaves to the (left|right)", before):
    return f"{found[1]} comes back from the {found[2]}"
  return None


def test_what_is_determined_follows_from_the_sentences_before():
  counts = {True: 0, False: 0}
  for story in STORIES:
    for clip, (said, determined) in enumerate(zip(story.sentences, story.determined, strict=True)):
      expected = bound(list(story.sentences[:clip]))
      assert (expected is not None) == determined, (clip, story.sentences)
      assert expected is None or re.fullmatch(expected, said)
      counts[determined] += 1
  assert 0.3 < counts[True] / sum(counts.values()) < 0.6


def test_things_keep_to_their_cells():
  for story in STORIES:
    for state in story.states:
      for room in state.rooms:
        cells = [(thing.column, thing.row) for thing in room.things]
        assert len(set(cells)) == len(cells)
        assert all(abs(column) <= memory_world.LIMIT and row in (0, 1) for column, row in cells)
        names = [thing.colour for thing in room.things]
        assert len(set(names)) == len(names)


def test_every_kind_of_event_happens_and_unseen_things_do_not_change():
  kinds = {action.kind for story in STORIES for action in story.actions}
  assert kinds == {"still", "out", "return", "cross", "pan back", "cut back", *memory_world.SHARES}
  for story in STORIES:
    for before, action, after in zip(story.states, story.actions, story.states[1:], strict=False):
      for thing in before.rooms[0].things:
        seen = before.room == 0 and before.shown.visible(thing)
        if not seen and not (action.slot == thing.slot and action.kind in ("out", "return")):
          assert after.rooms[0].thing(thing.slot) == thing


def test_sentences_and_events_are_one_to_one():
  for state in itertools.chain.from_iterable(story.states for story in STORIES[:12]):
    actions = [*memory_world.legal(state), *memory_world.other_rooms(state)]
    said = [memory_world.sentence(state, action) for action in actions]
    assert len(set(said)) == len(said)
    assert max(map(len, said)) <= 57  # what a text encoder has to hold
    for text, action in zip(said[:20] + said[-3:], actions[:20] + actions[-3:], strict=True):
      assert memory_world.parse(state, f" {text.capitalize()}. ") == action
      assert memory_world.apply(state, action).clip == state.clip + 1


def test_what_the_world_does_not_allow_is_an_error_with_the_nearest_sentence():
  state = memory_world.beginning(0, 0)
  with pytest.raises(DataError, match="did you mean 'the white square moves right'"):
    memory_world.parse(state, "the white squire moves right")
  with pytest.raises(DataError, match="possible here: nothing moves"):
    memory_world.apply(state, Action("cut back"))


def test_a_given_sentence_changes_the_future_and_nothing_before():
  story = STORIES[0]
  clip = story.determined.index(True)
  given = next(
    text for action in memory_world.legal(story.states[clip])
    if action.kind in ("move", "still") and (text := memory_world.sentence(story.states[clip], action))
    != story.sentences[clip]
  )  # fmt: skip
  told = memory_world.told(11, 0, 24, {clip: given})
  assert told.states[: clip + 1] == story.states[: clip + 1] and told.sentences[clip] == given
  assert told.states[clip + 1] != story.states[clip + 1] and not told.determined[clip]
  with pytest.raises(DataError, match="cannot show"):
    memory_world.told(11, 0, 24, {clip: "the sun rises"})


# -------------------------------------------------------------------------------------------------------- pictures


def like(frame_HWC: np.ndarray, colour: str) -> np.ndarray:
  """How much of each pixel has a colour that nothing else in the picture is near; (H, W) in [0, 1]."""
  distance = np.abs(frame_HWC / 255.0 - np.array(COLOURS[colour])).max(-1)
  return np.clip(1 - distance / 0.25, 0, 1)


def one(shape: str, colour: str, column: int, row: int, wall: int | None = None, view: int = 0) -> State:
  return State((Room("cyan", wall, (Thing(0, shape, colour, column, row),), view),))


@pytest.mark.parametrize(("height", "width"), [(96, 96), (72, 128)])
def test_things_are_drawn_where_the_truth_says(height, width):
  before, after = one("square", "red", -1, 0), one("square", "red", 0, 0)
  progress = np.array([0.0, 0.4, 1.0])
  told = truth(before, after, progress, height, width)
  for frame, xy in zip(render(before, after, progress, height, width), told.xy_TNC[:, 0], strict=True):
    weight = like(frame, "red")
    rows, columns = np.indices(weight.shape) + 0.5
    found = [(columns * weight).sum() / weight.sum() - width / 2, (rows * weight).sum() / weight.sum() - height / 2]
    np.testing.assert_allclose(np.array(found) / max(height, width), xy, atol=3e-3)


@pytest.mark.parametrize(
  ("before", "after"),
  [
    (one("square", "red", 1, 0), one("square", "red", 2, 0)),  # leaves
    (one("square", "red", 1, 1, wall=1), one("square", "red", 0, 1, wall=1)),  # hides
    (one("square", "red", 1, 1, wall=1), one("square", "red", 1, 1, wall=1, view=-1)),  # the camera pans away
  ],
)
def test_the_visible_share_is_the_share_of_pixels(before, after):
  progress = np.linspace(0, 1, 6)
  told = truth(before, after, progress, 270, 270).visible_TN[:, 0]
  whole = 4 * memory_world_frames.RADIUS**2 * 270**2
  shares = [like(frame, "red").sum() / whole for frame in render(before, after, progress, 270, 270)]
  np.testing.assert_allclose(shares, told, atol=0.03)
  assert told[0] == pytest.approx(1) and told[-1] == 0 and shares[-1] == 0


def test_clips_join_without_a_jump_except_at_cuts():
  for story in STORIES[:6]:
    for clip in range(23):
      end = render(*story.states[clip : clip + 2], np.ones(1), 32, 32)
      start = render(*story.states[clip + 1 : clip + 3], np.zeros(1), 32, 32)
      assert np.array_equal(end, start) != story.cuts[clip + 1]


def test_a_walk_is_its_clips_and_its_first_picture():
  story, times = STORIES[1], np.array([0.0, 0.25, 1.0, 1.5, 3.0])
  frames = walk_frames(story, times, 24, 32)
  states = story.states
  np.testing.assert_array_equal(frames[0], render(states[0], states[0], np.zeros(1), 24, 32)[0])
  np.testing.assert_array_equal(frames[1:3], render(states[0], states[1], np.array([0.25, 1.0]), 24, 32))
  np.testing.assert_array_equal(frames[4], render(states[2], states[3], np.ones(1), 24, 32)[0])


def test_small_and_wide_frames_show_the_same_scene():
  story = STORIES[2]
  small, large, wide = (walk_frames(story, np.array([0.5]), h, w)[0] for h, w in ((32, 32), (128, 128), (18, 32)))
  mean = large.astype(float).reshape(32, 4, 32, 4, 3).mean((1, 3))
  assert np.sqrt(((small - mean) ** 2).mean()) < 5
  np.testing.assert_array_equal(small[7:25], wide)


def test_true_motion_of_a_pan_and_of_a_move_are_closed_forms():
  still, moved = one("square", "red", -1, 0), one("square", "red", 0, 0)
  pan = one("square", "red", -1, 0, view=1)
  assert memory_world_frames.true_motion(still, pan, 90, 90) == pytest.approx(1 / np.sqrt(2))
  area = 4 * memory_world_frames.RADIUS**2
  assert memory_world_frames.true_motion(still, moved, 90, 90) == pytest.approx(area / 3 / np.sqrt(2))
  assert memory_world_frames.true_motion(still, still) == 0


# ---------------------------------------------------------------------------------------------------------- source


def test_is_a_picklable_clip_source_of_walks():
  source = open_source("worlds:memory-v1?count=3&seed=2&clips=5")
  assert isinstance(source, MemoryWorld) and isinstance(source, ClipSource) and len(source) == 15
  infos = [source.info(index) for index in range(15)]
  assert [info.index for info in infos[:6]] == [0, 1, 2, 3, 4, 0]
  assert len({info.video_id for info in infos}) == 3 and len({info.clip_id for info in infos}) == 15
  assert all(info.cut_before for info in infos[::5])
  assert infos[7].caption.endswith(f"; {source.dynamics(7)}")
  again = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(again.frames(7, np.array([0.5]), 16, 16), source.frames(7, np.array([0.5]), 16, 16))
  assert again.fingerprint == source.fingerprint != MemoryWorld(3, 2, 6).fingerprint
  with pytest.raises(IndexError):
    source.info(15)


def test_wrong_options_are_named():
  with pytest.raises(UsageError, match="did you mean 'clips'"):
    open_source("worlds:memory-v1?clip=3")
  with pytest.raises(ConfigError, match="did you mean 'memory-v1'"):
    open_source("worlds:memory-v2")
  with pytest.raises(ConfigError, match="at least 1 walk"):
    open_source("worlds:memory-v1?count=0")
