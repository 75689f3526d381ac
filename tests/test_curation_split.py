"""Splitting videos: synthetic transitions with known places, rendered films, real footage, JSON answers."""

import json

import cv2
import numpy as np
import pytest

from kling_jax.curation import split, split_command, transitions
from kling_jax.data import effects, encode, films, leaves, thumbnail
from kling_jax.data.reasons import MediaError
from kling_jax.errors import UsageError
from kling_jax.models import shot_net


def scene(seed: int, frames: int, drift: float = 0.3) -> np.ndarray:
  """A shot of dead leaves under a slow pan, uint8 (T, 54, 96, 3)."""
  still = leaves.scene((seed, 99), 1, 108, 192)[0]
  shift = lambda t: np.array([[1, 0, -40 - drift * t], [0, 1, -25 - 0.3 * drift * t]], np.float32)
  return np.stack([cv2.warpAffine(still, shift(t), (96, 54), borderMode=cv2.BORDER_REFLECT) for t in range(frames)])


def found(frames: np.ndarray, rate: float = 25.0) -> list[tuple[str, int, int]]:
  watcher = transitions.Watcher(rate)
  for frame in np.clip(np.rint(frames), 0, 255).astype(np.uint8):
    watcher.look_at(thumbnail.of_rgb(frame))
  return [(t.kind, t.start_frame, t.end_frame) for t in watcher.finish(rate).transitions]


def mixed(a: np.ndarray, b: np.ndarray, length: int) -> np.ndarray:
  """a, then a dissolve of `length` mixed frames, then b."""
  share = (np.arange(1, length + 1) / (length + 1))[:, None, None, None]
  return np.concatenate([a[:-length], (1 - share) * a[-length:] + share * b[:length], b[length:]])


def test_cuts_are_found_at_their_frames():
  assert found(np.concatenate([scene(1, 40), scene(2, 50), scene(3, 30)])) == [("cut", 39, 40), ("cut", 89, 90)]


@pytest.mark.parametrize("drift", [0.0, 0.5, 2.0])
def test_one_shot_has_no_transition_however_it_moves(drift):
  assert found(scene(4, 80, drift)) == []


@pytest.mark.parametrize("length", [8, 16, 30])
def test_a_dissolve_is_found_with_its_ends(length):
  [(kind, start, end)] = found(mixed(scene(5, 80), scene(6, 80), length))
  assert kind == "dissolve"
  assert abs(start - (79 - length)) <= 4 and abs(end - 80) <= 4


@pytest.mark.parametrize("level", [0.0, 255.0])
def test_a_fade_through_black_or_white_is_one_transition(level):
  down = np.linspace(1, 0, 12)[:, None, None, None]
  a, b = scene(7, 60), scene(8, 60)
  out = a[-12:] * down + level * (1 - down)
  into = b[:12] * down[::-1] + level * (1 - down[::-1])
  blank = np.full((9, 54, 96, 3), level)
  [(kind, start, end)] = found(np.concatenate([a[:-12], out, blank, into, b[12:]]))
  assert kind == "fade"
  assert abs(start - 47) <= 4 and abs(end - 81) <= 4


@pytest.mark.parametrize("style", ["from left", "from above", "iris", "push"])
def test_a_wipe_is_found(style):
  a, b = scene(10, 60, 0.0).astype(np.float32), scene(11, 60, 0.0).astype(np.float32)
  y, x = np.mgrid[0:54, 0:96]
  when = {"from left": x / 96, "from above": y / 54, "iris": np.hypot(x - 48, y - 27) / 56}
  middle = []
  for k in range(1, 15):
    if style == "push":
      middle.append(effects.move(a[-1], b[0], "push", 0, k / 15))
    else:
      middle.append(effects.wipe(a[-1], b[0], when[style].astype(np.float32), k / 15, 0.02))
  [(kind, start, end)] = found(np.concatenate([a, middle, b]))
  assert kind == "wipe" and abs(start - 59) <= 4 and abs(end - 74) <= 4


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_flash_is_no_transition(length):
  frames = scene(12, 80).astype(np.float32)
  frames[40 : 40 + length] += 170
  assert found(frames) == []


def test_a_strobe_and_a_shake_are_no_transitions():
  frames = scene(13, 90).astype(np.float32)
  frames[30:46:4] += 150
  frames[31:46:4] += 150
  assert found(frames) == []
  rng = np.random.default_rng(0)
  shaken = scene(13, 90)
  for t in range(40, 52):
    shaken[t] = np.roll(shaken[t], rng.integers(-4, 5, 2), (0, 1))
  assert found(shaken) == []


def test_another_light_on_the_same_scene_is_no_transition():
  frames = scene(14, 100, 0.0) * np.clip(np.linspace(0.2, 1.6, 100), 0.5, 1.0)[:, None, None, None]
  assert found(frames) == []


@pytest.mark.parametrize("bars", ["letterbox", "pillarbox"])
def test_bars_do_not_hide_a_cut(bars):
  frames = np.concatenate([scene(1, 40), scene(2, 40)])
  if bars == "letterbox":
    frames[:, :8], frames[:, -8:] = 0, 0
  else:
    frames[:, :, :18], frames[:, :, -18:] = 0, 0
  assert found(frames) == [("cut", 39, 40)]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_videos_of_a_few_frames(count):
  assert found(scene(14, 7)[:count]) == []


def test_fast_videos_are_looked_at_every_second_frame_and_cuts_stay_exact():
  frames = np.concatenate([scene(1, 81, 0.15), scene(2, 80, 0.15)])
  assert found(frames, 60.0) == [("cut", 80, 81)]


def test_long_videos_do_not_depend_on_the_chunks_they_are_looked_at_in(monkeypatch):
  frames = np.concatenate([mixed(scene(20 + k, 60, 0.05), scene(40 + k, 60, 0.05), 12) for k in range(4)])
  whole = found(frames)
  assert len(whole) == 7
  monkeypatch.setattr(transitions, "CHUNK", 50)
  assert found(frames) == whole


def test_few_numbers_a_frame_are_kept(monkeypatch):
  monkeypatch.setattr(transitions, "CHUNK", 40)
  watcher = transitions.Watcher(25.0)
  shown = [thumbnail.of_rgb(frame) for frame in scene(1, 30)]
  for t in range(600):
    watcher.look_at(shown[t % 30])
  assert len(watcher._waiting) <= 40 + 2 * shot_net.REACH
  assert sum(len(part) for part in watcher._logits) >= 600 - 40 - 3 * shot_net.REACH


def test_films_of_the_world_are_split_as_their_truth_says(tmp_path):
  films.render_films(tmp_path, count=2, seconds=6.0, size=(72, 128), seed=5)
  truth = json.loads((tmp_path / "films.json").read_text())["films"]
  for film in truth:
    video = split.split(tmp_path / film["file"])
    assert len(video.transitions) == len(film["transitions"])
    for got, true in zip(video.transitions, film["transitions"], strict=True):
      assert got.kind == true["kind"]
      assert abs(got.start_frame - true["start_frame"]) <= (5 if got.kind == "dissolve" else 0)
      assert abs(got.end_frame - true["end_frame"]) <= (5 if got.kind == "dissolve" else 0)


def test_times_come_from_the_container_and_shots_tile_at_cuts(tmp_path):
  frames = [cv2.resize(f, (64, 36)) for f in np.concatenate([scene(30, 20), scene(31, 20)])]
  times = np.cumsum(np.tile([0.02, 0.05, 0.03, 0.1], 10))  # variable frame rate
  encode.write(tmp_path / "v.mp4", frames, times_s=times)
  video = split.split(tmp_path / "v.mp4")
  [cut] = video.transitions
  assert (cut.start_frame, cut.end_frame) == (19, 20)
  first, second = video.shots
  assert (first.start_frame, first.end_frame, second.start_frame, second.end_frame) == (0, 20, 20, 40)
  assert first.end_s == second.start_s == pytest.approx(times[20] - times[0], abs=1e-4)
  assert video.to_json()["transitions"][0]["start_s"] == pytest.approx(times[19] - times[0], abs=1e-4)


def test_json_has_the_keys_that_others_rely_on(tmp_path, capsys):
  frames = [cv2.resize(f, (64, 36)) for f in np.concatenate([scene(30, 15), scene(31, 15)])]
  encode.write(tmp_path / "v.mp4", frames, fps=25)
  (tmp_path / "bad.mp4").write_bytes(b"no video")
  code = split_command.command([str(tmp_path / "v.mp4"), str(tmp_path / "bad.mp4")], as_json=True)
  out, err = capsys.readouterr()
  [video] = json.loads(out)
  assert set(video) == {"video", "fps", "num_frames", "transitions", "shots"}
  assert set(video["transitions"][0]) == {"start_frame", "end_frame", "start_s", "end_s", "kind", "confidence"}
  assert set(video["shots"][0]) == {"start_frame", "end_frame", "start_s", "end_s"}
  assert code == 1 and "bad.mp4" in err and len(err.splitlines()) == 1


def test_unknown_method_and_unreadable_file(tmp_path):
  with pytest.raises(UsageError, match="default"):
    split.split(tmp_path / "none.mp4", method="defualt")
  with pytest.raises(MediaError):
    split.split(tmp_path / "none.mp4")


@pytest.mark.parametrize("name", ["bikes_city.mp4", "venus_transit_theora.mkv", "derived/films/film_1_3.mp4"])
def test_cuts_of_real_footage(shared, name):
  folder = (shared / "videos" / name).parent
  truth = json.loads((folder / "transitions.json").read_text())[(shared / "videos" / name).name]
  cuts = [(t["start_frame"], t["end_frame"]) for t in truth if t["kind"] == "cut"]
  got = [(t.start_frame, t.end_frame) for t in split.split(shared / "videos" / name).transitions if t.kind == "cut"]
  assert got == cuts
