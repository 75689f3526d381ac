"""Metrics of motion and of joins against motions that are known."""

import numpy as np
import pytest

from kling_jax.data import memory_world
from kling_jax.data.memory_world_frames import walk_frames
from kling_jax.errors import DataError
from kling_jax.evals import horn_schunck, motion, seams, smoothness

SIZE = 48


def texture(shift_x: np.ndarray, shift_y: np.ndarray | float = 0.0) -> np.ndarray:
  """A smooth pattern that has moved to the right by shift_x and down by shift_y pixels; uint8 (T, SIZE, SIZE, 3)."""
  shift_x = np.asarray(shift_x, float)[:, None, None]
  shift_y = np.broadcast_to(shift_y, len(shift_x)).astype(float)[:, None, None]
  y, x = np.mgrid[0:SIZE, 0:SIZE]
  u, v = x - shift_x, y - shift_y
  wave = np.sin(u / 3.1) + np.sin(v / 3.7 + 1) + np.sin((u + v) / 5.3) + np.sin((u - 2 * v) / 8.9)
  return np.rint(np.repeat(127 + 30 * wave[..., None], 3, -1)).astype(np.uint8)


@pytest.mark.parametrize(("dx", "dy"), [(0.0, 0.0), (0.6, -0.3), (3.0, 1.5), (-5.0, 0.0)])
def test_flow_of_a_shifted_picture_is_the_shift(dx, dy):
  found = horn_schunck.flows(texture(np.array([0.0, dx]), np.array([0.0, dy])))[0, 8:-8, 8:-8]
  np.testing.assert_allclose(found.mean((0, 1)), [dx, dy], atol=0.05)
  assert np.abs(found - [dx, dy]).mean() < 0.12


def test_flow_of_a_moving_ramp_is_its_closed_form():
  """A ramp of slope 5 that rises by 10 levels moves by -2: uniform, so smoothness and data agree whatever alpha."""
  ramp = np.broadcast_to(5.0 * np.arange(12, dtype=np.float32), (1, 12, 12))
  for alpha in (1.0, 20.0):
    found = np.asarray(horn_schunck.flow(ramp, ramp + 10, alpha=alpha, iterations=2000, warps=1))
    np.testing.assert_allclose(found[..., 0], -2.0, atol=0.02)
    np.testing.assert_allclose(found[..., 1], 0.0, atol=0.02)


def test_steady_motion_is_smooth_and_a_jolt_at_a_join_is_not():
  steady = texture(np.arange(8) * 1.5).reshape(2, 4, SIZE, SIZE, 3)
  jolted = texture(np.arange(8) * 1.5 + np.where(np.arange(8) >= 4, 4.0, 0.0)).reshape(2, 4, SIZE, SIZE, 3)
  even, odd = (smoothness.transition_smoothness(frames) for frames in (steady, jolted))
  assert even.joins > 0.7 and even.elsewhere > 0.7 and odd.elsewhere == pytest.approx(even.elsewhere, abs=0.1)
  # The jolt of 4 pixels is an acceleration of 4 up and 4 down, in percent of the diagonal.
  assert odd.joins == pytest.approx(np.exp(-100 * 4 / np.hypot(SIZE, SIZE)), abs=0.03)
  assert np.isnan(smoothness.transition_smoothness(jolted, np.array([False, True])).joins)
  still = smoothness.transition_smoothness(np.zeros((2, 4, 16, 16, 3), np.uint8))
  assert still.joins == still.elsewhere == 1.0
  with pytest.raises(DataError, match="at least 3"):
    smoothness.transition_smoothness(steady[:1, :2])


def test_seam_ratio_of_a_known_jump():
  levels = np.array([[0, 2, 4, 6], [9, 11, 13, 15], [15, 17, 19, 21]])
  frames = np.broadcast_to(levels[..., None, None, None], (3, 4, 5, 6, 3)).astype(np.uint8)
  found = seams.seams(frames)
  assert (found.inside, found.across, found.ratio) == (2.0, 1.5, 0.75)
  cut = seams.seams(frames, np.array([False, True, False]))
  assert (cut.across, cut.ratio) == (0.0, 0.0)
  both = seams.seams(np.stack([frames, frames]), np.array([[False, True, False], [False, False, True]]))
  assert both.across == 1.5
  assert seams.seams(np.zeros_like(frames)).ratio == 1.0
  assert np.isnan(seams.seams(frames[:1]).ratio)
  with pytest.raises(DataError, match="at least 2"):
    seams.seams(frames[:, :1])


def test_the_worlds_own_walks_have_no_seams():
  """What an ideal model would reach: linear motion goes on through the joins."""
  walks, cuts = [], []
  for index in range(8):
    story = memory_world.story(5, index, 12)
    walks.append(walk_frames(story, np.arange(1, 49) / 4, 32, 32).reshape(12, 4, 32, 32, 3))
    cuts.append(story.cuts)
  assert seams.seams(np.stack(walks), np.array(cuts)).ratio == pytest.approx(1.0, abs=0.1)


def test_dynamic_degree_has_vbench_s_threshold():
  """6 pixels a frame at 256: 1.125 at 48."""
  slow, fast = (texture(np.arange(16) * speed) for speed in (0.9, 1.4))
  assert not motion.is_dynamic(slow, 8.0) and motion.is_dynamic(fast, 8.0)
  assert motion.is_dynamic(slow, 16.0)  # every second frame: twice the step
  assert motion.dynamic_degree([slow, fast, fast, fast], 8.0) == 0.75
  np.testing.assert_allclose(motion.speeds(fast), 1.4, atol=0.25)
  with pytest.raises(DataError):
    motion.dynamic_degree([], 8.0)


def test_flickering_and_smoothness_are_closed_forms():
  levels = np.array([10, 20, 30, 60, 50], np.uint8)
  frames = np.broadcast_to(levels[:, None, None, None], (5, 4, 4, 3))
  assert motion.temporal_flickering(frames) == pytest.approx(1 - 15 / 255)
  assert motion.motion_smoothness(frames) == pytest.approx(1 - 10 / 255)  # 20 for 20, 40 for 60
  steady = texture(np.arange(7) * 2.0)
  by_mean, by_flow = (motion.motion_smoothness(steady, how) for how in ("linear", "flow"))
  assert by_flow > by_mean and 1 - by_flow < 0.5 * (1 - by_mean)
  with pytest.raises(DataError, match="at least 3"):
    motion.motion_smoothness(frames[:2])
