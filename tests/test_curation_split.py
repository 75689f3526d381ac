"""Splitting videos: synthetic transitions with known places, rendered films, real footage, JSON answers."""

import json

import cv2
import numpy as np
import pytest

from kling_jax.curation import split, split_command, transitions
from kling_jax.data import encode, films
from kling_jax.data.reasons import MediaError
from kling_jax.errors import UsageError


def scene(seed: int, frames: int, speed: float = 0.2) -> np.ndarray:
  """A smooth random picture under a slow pan, 18 x 32, as the detectors see a video."""
  rng = np.random.default_rng(seed)
  picture = cv2.GaussianBlur(rng.normal(size=(40, 120, 3)).astype(np.float32), (0, 0), 3)
  picture = 110 + rng.uniform(-50, 50, 3) + 60 * picture / picture.std()
  out = []
  for t in range(frames):
    shift = np.array([[1, 0, -10 - speed * t], [0, 1, -10]], np.float32)
    out.append(cv2.warpAffine(picture.astype(np.float32), shift, (32, 18)))
  return np.clip(np.stack(out), 0, 255)


def found(frames: np.ndarray, fps: float = 25.0) -> list[tuple[str, int, int]]:
  small = np.clip(np.rint(frames), 0, 255).astype(np.uint8)
  return [(t.kind, t.start_frame, t.end_frame) for t in transitions.find_transitions(small, fps)]


def mixed(a: np.ndarray, b: np.ndarray, length: int) -> np.ndarray:
  """a, then a dissolve of `length` mixed frames, then b."""
  share = (np.arange(1, length + 1) / (length + 1))[:, None, None, None]
  return np.concatenate([a[:-length], (1 - share) * a[-length:] + share * b[:length], b[length:]])


def test_a_cut_is_found_at_its_frame():
  assert found(np.concatenate([scene(1, 30), scene(2, 40), scene(3, 20)])) == [("cut", 29, 30), ("cut", 69, 70)]


def test_one_shot_has_no_transition_however_it_moves():
  for speed in (0.0, 0.5, 1.5):
    assert found(scene(4, 60, speed)) == []


@pytest.mark.parametrize("length", [8, 16, 30])
def test_a_dissolve_is_found_with_its_ends(length):
  [(kind, start, end)] = found(mixed(scene(5, 70, 0.05), scene(6, 70, 0.05), length))
  assert kind == "dissolve"
  assert abs(start - (69 - length)) <= 2 and abs(end - 70) <= 2


@pytest.mark.parametrize("level", [0.0, 255.0])
def test_a_fade_through_black_or_white_is_one_transition(level):
  down = np.linspace(1, 0, 12)[:, None, None, None]
  a, b = scene(7, 50), scene(8, 50)
  out = a[-12:] * down + level * (1 - down)
  into = b[:12] * down[::-1] + level * (1 - down[::-1])
  [(kind, start, end)] = found(np.concatenate([a[:-12], out, into, b[12:]]))
  assert kind == "fade"
  assert abs(start - 37) <= 3 and abs(end - 62) <= 3


def test_a_fade_in_from_black_at_the_start():
  up = np.linspace(0, 1, 15)[:, None, None, None]
  shot = scene(9, 60)
  [(kind, start, end)] = found(np.concatenate([np.zeros((5, 18, 32, 3)), shot[:15] * up, shot[15:]]))
  assert kind == "fade" and 4 <= start <= 6 and 17 <= end <= 20


def test_a_wipe_is_found():
  a, b = scene(10, 50, 0.0), scene(11, 50, 0.0)
  frames = np.concatenate([a, b])
  for k in range(12):
    columns = round(32 * (k + 1) / 13)
    frames[50 + k, :, columns:] = a[0, :, columns:]
  [(kind, start, end)] = found(frames)
  assert kind == "wipe" and abs(start - 49) <= 2 and abs(end - 62) <= 2


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_flash_is_no_transition(length):
  frames = scene(12, 60)
  frames[30 : 30 + length] = 250
  assert found(frames) == []


def test_another_light_on_the_same_scene_is_no_transition():
  frames = scene(13, 90, 0.0)
  frames *= np.clip(np.linspace(0.2, 1.6, 90), 0.5, 1.0)[:, None, None, None]
  assert found(frames) == []


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_videos_of_a_few_frames(count):
  assert found(scene(14, count)) == []


def test_long_videos_do_not_depend_on_the_chunks_they_are_looked_at_in(monkeypatch):
  frames = np.concatenate([mixed(scene(20 + k, 60, 0.05), scene(40 + k, 60, 0.05), 12) for k in range(4)])
  whole = found(frames)
  assert len(whole) == 7
  monkeypatch.setattr(transitions, "CHUNK", 37)
  assert found(frames) == whole


def test_films_of_the_world_are_split_as_their_truth_says(tmp_path):
  films.render_films(tmp_path, count=2, seconds=6.0, size=(72, 128), seed=5)
  truth = json.loads((tmp_path / "films.json").read_text())["films"]
  for film in truth:
    video = split.split(tmp_path / film["file"])
    assert len(video.transitions) == len(film["transitions"])
    for got, true in zip(video.transitions, film["transitions"], strict=True):
      assert got.kind == true["kind"]
      assert abs(got.start_frame - true["start_frame"]) <= (2 if got.kind == "dissolve" else 0)
      assert abs(got.end_frame - true["end_frame"]) <= (2 if got.kind == "dissolve" else 0)


def test_times_come_from_the_container_and_shots_tile_at_cuts(tmp_path):
  frames = [cv2.resize(f.astype(np.uint8), (64, 36)) for f in np.concatenate([scene(30, 20), scene(31, 20)])]
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
  frames = [cv2.resize(f.astype(np.uint8), (64, 36)) for f in np.concatenate([scene(30, 15), scene(31, 15)])]
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
