"""The procedural world: determinism, geometry against the script, true scores against rendered motion."""

import itertools
import pickle
import re

import numpy as np
import pytest

from kling_jax.data import worlds
from kling_jax.data.source import ClipSource
from kling_jax.errors import ConfigError


def plain(**changes) -> worlds.Script:
  """A still, sharp scene of one red circle, changed by `changes`."""
  thing = worlds.Thing("circle", "red", 0.15, (0.1, -0.05), (0.2, 0.0), "moves quickly to the right")
  script = worlds.Script((thing,), "black", "gradient", 4.0, 0.5, 1.0, "is still", (0.0, 0.0), 0.0, None, 0.0)
  return worlds.dataclasses.replace(script, **changes)


def redness(frames_THWC: np.ndarray) -> np.ndarray:
  frames = frames_THWC.astype(float)
  return np.clip(frames[..., 0] - frames[..., 1] - 60, 0, None)


def middle_of_mass(frame_HWC: np.ndarray) -> np.ndarray:
  weight = redness(frame_HWC)
  rows, columns = np.indices(weight.shape)
  size = max(weight.shape)
  y = ((rows + 0.5) * weight).sum() / weight.sum() - weight.shape[0] / 2
  x = ((columns + 0.5) * weight).sum() / weight.sum() - weight.shape[1] / 2
  return np.array([x, y]) / size


def test_a_clip_is_a_pure_function_of_name_seed_and_index():
  few, many = worlds.WorldSource(count=4, seed=3), worlds.WorldSource(count=400, seed=3)
  worlds.script.cache_clear()
  backwards = {i: many.script(i) for i in (3, 2, 1, 0)}
  worlds.script.cache_clear()
  assert all(few.script(i) == backwards[i] for i in range(4))
  assert few.script(0) != worlds.WorldSource(count=4, seed=4).script(0)
  assert len({many.script(i) for i in range(400)}) == 400


GOLDEN_SCORES = {"motion": 0.010732, "aesthetic": 3.538411, "clarity": 0.272727}
GOLDEN_PICTURE = [[99, 103, 101, 99], [99, 103, 100, 99], [99, 103, 101, 99], [99, 104, 101, 99]]


def test_the_world_never_changes_under_its_version():
  """Captions and scores of shapes-v1 as first released, and a coarse picture (tolerant of other processors' sines)."""
  source = worlds.WorldSource("shapes-v1", 8, 0)
  info = source.info(1)
  assert info.clip_id == "shapes-v1-0-1"
  assert info.caption == ("a black circle moves quickly down over a checkered pink background; the camera is still")
  assert {name: round(score.value, 6) for name, score in info.scores.items()} == GOLDEN_SCORES
  picture = source.frames(2, np.array([0.5]), 4, 4)[0, ..., 0]
  np.testing.assert_allclose(picture.astype(int), GOLDEN_PICTURE, atol=1)


def test_is_a_picklable_clip_source():
  source = worlds.WorldSource(count=5, seed=1)
  assert isinstance(source, ClipSource)
  again = pickle.loads(pickle.dumps(source))
  times = np.array([0.0, 0.7])
  np.testing.assert_array_equal(again.frames(4, times, 20, 24), source.frames(4, times, 20, 24))
  assert again.fingerprint == source.fingerprint != worlds.WorldSource(count=5, seed=2).fingerprint
  info = source.info(0)
  assert info.num_frames / info.fps == pytest.approx(info.duration_s)


def test_any_index_beyond_the_count_is_an_index_error():
  with pytest.raises(IndexError):
    worlds.WorldSource(count=2).info(2)


def test_unknown_world_and_empty_count_are_config_errors():
  with pytest.raises(ConfigError, match="shapes-v1"):
    worlds.WorldSource("shape-v1")
  with pytest.raises(ConfigError, match="at least 1"):
    worlds.WorldSource(count=0)


def test_frames_do_not_depend_on_which_other_times_are_asked():
  source = worlds.WorldSource(count=6, seed=5)
  times = np.linspace(0, 2.4, 40)
  for index in range(6):
    together = source.frames(index, times, 48, 64)
    alone = np.concatenate([source.frames(index, times[i : i + 1], 48, 64) for i in range(40)])
    assert np.abs(together.astype(int) - alone).max() <= 1  # matrix products may round differently by batch


@pytest.mark.parametrize("pan", [(0.0, 0.0), (0.15, 0.0), (0.0, -0.1)])
@pytest.mark.parametrize("zoom", [0.0, 0.3])
def test_things_are_drawn_where_the_script_says(pan, zoom):
  clip = plain(pan=pan, zoom=zoom)
  thing = clip.things[0]
  for t in (0.6, 1.25, 1.9):
    s = t - worlds.DURATION_S / 2
    expected = np.exp(zoom * s) * (np.array(thing.middle) + (np.array(thing.velocity) - pan) * s)
    found = middle_of_mass(worlds.render(clip, np.array([t]), 128, 128)[0])
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("shape", worlds.SHAPES)
def test_shapes_cover_their_stated_area(shape):
  thing = worlds.Thing(shape, "white", 0.2, (0.0, 0.0), (0.0, 0.0), "stays still")
  frame = worlds.render(plain(things=(thing,), contrast=0.0), np.array([1.0]), 200, 200)[0, ..., 1]
  black, white = (round(255 * worlds.COLOURS[c][1]) for c in ("black", "white"))
  area = ((frame.astype(float) - black) / (white - black)).mean()
  assert area == pytest.approx(worlds._AREAS[shape] * 0.04, rel=5e-3)


def test_a_small_frame_is_the_area_mean_of_a_large_one():
  source = worlds.WorldSource(count=12, seed=0)
  for index in range(12):
    small = source.frames(index, np.array([1.0]), 32, 32)[0].astype(float)
    large = source.frames(index, np.array([1.0]), 128, 128)[0].astype(float)
    mean = large.reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert np.sqrt(((small - mean) ** 2).mean()) < 6  # anti-aliased: one would see tens without


def test_a_wide_frame_is_the_central_crop_of_the_square_one():
  source = worlds.WorldSource(count=3, seed=2)
  sharp = next(i for i in range(3) if source.script(i).blur == 0)
  square, wide = (source.frames(sharp, np.array([1.0]), h, 64)[0] for h in (64, 36))
  np.testing.assert_array_equal(square[14:50], wide)


def test_the_caption_states_what_the_script_holds():
  source = worlds.WorldSource(count=300, seed=0)
  for index in range(300):
    clip = source.script(index)
    caption = clip.caption
    for thing in clip.things:
      assert f" {thing.colour} {thing.shape} {thing.manner}" in f" {caption}"
      vx, vy = np.sign(thing.velocity)
      stated = re.search(r"right|left|up|down|still", thing.manner).group()
      assert {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}[stated] == (vx, vy)
    assert f"{clip.texture} {clip.background} background" in caption
    assert ("pillar" in caption) == (clip.pillar is not None)
    assert ("zooms in" in caption, "zooms out" in caption) == (clip.zoom > 0, clip.zoom < 0)
    assert ("pans left" in caption, "pans right" in caption) == (clip.pan[0] < 0, clip.pan[0] > 0)
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)


def test_true_motion_of_a_pure_pan_and_of_a_pure_zoom_are_closed_forms():
  nothing = dict(things=(), texture="rippled")
  assert worlds.true_motion(plain(pan=(-0.2, 0.0), **nothing)) == pytest.approx(0.2 / np.sqrt(2))
  assert worlds.true_motion(plain(pan=(-0.2, 0.0), **nothing), 72, 128) == pytest.approx(0.2 / np.hypot(1, 9 / 16))
  x, y = np.meshgrid(np.linspace(-0.5, 0.5, 801), np.linspace(-0.3, 0.3, 801))
  expected = 0.4 * np.hypot(x, y).mean() / np.hypot(1, 0.6)
  assert worlds.true_motion(plain(zoom=-0.4, **nothing), 60, 100) == pytest.approx(expected, rel=2e-3)


def test_true_motion_of_one_thing_before_a_still_camera_is_its_area_times_its_speed():
  motion = worlds.true_motion(plain())
  assert motion == pytest.approx(np.pi * 0.15**2 * 0.2 / np.sqrt(2), rel=0.02)  # it leaves the frame by a little
  assert worlds.true_motion(plain(things=())) == 0.0


def test_clarity_falls_with_blur_and_pictures_agree():
  def sharpness(blur: float) -> float:
    frame = worlds.render(plain(texture="checkered", blur=blur), np.array([1.0]), 96, 96)[0].astype(float)
    return float(np.abs(np.diff(frame, axis=0)).max())

  scores = [worlds.true_scores(plain(blur=blur))["clarity"].value for blur in (0.0, 0.004, 0.008, 0.016)]
  assert scores[0] == 1.0 and all(a > b for a, b in itertools.pairwise(scores))
  assert all(sharpness(a) > sharpness(b) for a, b in ((0.0, 0.004), (0.004, 0.008), (0.008, 0.016)))


def test_scores_name_their_scorer():
  assert {(s.scorer, s.version) for s in worlds.WorldSource(count=1).info(0).scores.values()} == {("shapes-v1", "1")}
