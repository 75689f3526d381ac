"""Joining shots that show the same: false cuts go, cuts between different footage stay."""

import dataclasses
import pathlib

import numpy as np
import pytest

from kling_jax.curation import merge, split
from kling_jax.data import encode, films
from kling_jax.data.record import Transition
from kling_jax.errors import UsageError


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> tuple[pathlib.Path, split.Split]:
  folder = tmp_path_factory.mktemp("film")
  films.render_films(folder, count=1, seconds=6.0, size=(72, 128), seed=2)
  [path] = folder.glob("*.mp4")
  return path, split.split(path)


def with_cut(video: split.Split, frame: int) -> split.Split:
  """The split with a false cut within a shot."""
  false = Transition(frame - 1, frame, "cut", 0.7)
  shots = []
  for shot in video.shots:
    if shot.start_frame < frame < shot.end_frame:
      shots += [
        split.Shot(shot.start_frame, frame, shot.start_s, video.seconds(frame)),
        split.Shot(frame, shot.end_frame, video.seconds(frame), shot.end_s),
      ]
    else:
      shots.append(shot)
  spans = sorted([*video.transitions, false], key=lambda t: t.start_frame)
  return dataclasses.replace(video, transitions=tuple(spans), shots=tuple(shots))


def test_a_false_cut_goes_and_true_ones_stay(film) -> None:
  path, video = film
  assert any(t.kind == "cut" for t in video.transitions)
  longest = max(video.shots, key=lambda shot: shot.end_frame - shot.start_frame)
  spoiled = with_cut(video, (longest.start_frame + longest.end_frame) // 2)
  assert len(spoiled.shots) == len(video.shots) + 1
  assert merge.merged(spoiled, str(path), 0.9, merge.colours) == video
  assert merge.merged(video, str(path), 0.9, merge.colours) is video


def test_the_embedding_is_asked_with_three_frames_of_each_side(tmp_path: pathlib.Path) -> None:
  """An embedding that only knows brightness joins two shots of different colours and equal brightness."""
  pictures = [np.full((48, 64, 3), (200, 40, 40), np.uint8)] * 20 + [np.full((48, 64, 3), (40, 40, 200), np.uint8)] * 20
  path = tmp_path / "two.mp4"
  encode.write(path, pictures, fps=20)
  video = split.split(path)
  assert len(video.shots) == 2
  seen = []

  def brightness(frames_BHWC: np.ndarray) -> np.ndarray:
    seen.append(frames_BHWC.mean(axis=(1, 2)))
    return frames_BHWC.mean(axis=(1, 2, 3))[:, None] * np.ones((1, 2))

  assert len(merge.merged(video, str(path), 0.99, brightness).shots) == 1
  red, blue = seen[0][:3], seen[0][3:]
  assert (red[:, 0] > red[:, 2]).all() and (blue[:, 2] > blue[:, 0]).all()
  assert len(merge.merged(video, str(path), 0.99, merge.colours).shots) == 2


def test_embeddings_are_named() -> None:
  assert merge.embedding("kling_jax.curation.merge:colours") is merge.embedding("colours") is merge.colours
  for word in ("clip", "no.such.module:f", "kling_jax.curation.merge:nothing"):
    with pytest.raises(UsageError, match="embedding"):
      merge.embedding(word)
