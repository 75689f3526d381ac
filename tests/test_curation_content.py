"""Cuts by the change of colour, against its formula written anew over whole arrays."""

import colorsys

import av
import numpy as np
import pytest

from kling_jax import errors
from kling_jax.curation import content, split
from kling_jax.data import encode


def hsv(rgb_HWC: np.ndarray) -> np.ndarray:
  """OpenCV's scale of HSV from the definition: hue in half degrees, the others up to 255."""
  found = np.array([colorsys.rgb_to_hsv(*(pixel / 255.0)) for pixel in rgb_HWC.reshape(-1, 3)])
  return (found * (180, 255, 255)).reshape(rgb_HWC.shape)


def test_the_change_is_the_mean_of_three_differences():
  rng = np.random.default_rng(0)
  frames = [rng.integers(0, 256, (8, 12, 3), dtype=np.uint8) for _ in range(4)]
  detector = content.Detector()
  for frame in frames:
    detector.look(av.VideoFrame.from_ndarray(frame, format="rgb24"))
  found = detector.finish(25.0).statistics["content"]
  assert np.isnan(found[0])
  for k in range(1, 4):
    expected = np.abs(hsv(frames[k]) - hsv(frames[k - 1])).mean()
    assert found[k] == pytest.approx(expected, abs=0.7)  # OpenCV rounds each value


def test_cuts_are_found_and_not_too_close_to_one_another():
  """Colours change at 20 and 45, and for a flash of three frames at 70; panning stripes are no cut."""
  frames = []
  for k in range(100):
    base = np.array((200, 40, 40) if k < 20 else (20, 100, 30) if k < 45 else (40, 60, 220), float)
    stripe = 12 * ((np.arange(64)[None] + k) // 8 % 2)[..., None]
    frames.append(np.broadcast_to(np.clip(base + stripe, 0, 255), (48, 64, 3)).astype(np.uint8))
  for k in (70, 71, 72):
    frames[k] = np.full((48, 64, 3), 255, np.uint8)
  video = split.split(encode.encode(frames, fps=25), "content")
  assert [t.end_frame for t in video.transitions] == [20, 45, 70]
  assert [(s.start_frame, s.end_frame) for s in video.shots] == [(0, 20), (20, 45), (45, 70), (70, 100)]
  assert all(t.kind == "cut" for t in video.transitions) and video.method == "content"
  assert video.statistics["content"][73] > content.THRESHOLD, "the end of the flash is too close to its start"
  with pytest.raises(errors.UsageError, match="method content takes no weights"):
    split.detector("content", "w.json")


@pytest.mark.drill
def test_it_cuts_where_pyscenedetect_does(shared):
  scenedetect = pytest.importorskip("scenedetect")
  for name in ("bbb_intro_30s.webm", "bbb_bunny_wakes.mp4"):
    path = str(shared / "videos" / name)
    theirs = scenedetect.ContentDetector(threshold=content.THRESHOLD, min_scene_len=content.SHORTEST)
    manager = scenedetect.SceneManager()
    manager.add_detector(theirs)
    manager.detect_scenes(scenedetect.open_video(path))
    wanted = [start.frame_num for start, _ in manager.get_scene_list()[1:]]
    mine = [t.end_frame for t in split.split(path, "content").transitions]
    assert len(set(mine) ^ set(wanted)) <= max(1, len(wanted) // 10), (name, mine, wanted)
