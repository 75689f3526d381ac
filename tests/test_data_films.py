"""Rendered films: real files whose frames, transitions and captions are as films.json says."""

import csv
import fractions
import hashlib
import itertools
import json

import av
import numpy as np
import pytest

from kling_jax.data import decode, films, worlds
from kling_jax.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("films")
  films.render_films(path, count=2, seconds=4.0, size=(48, 64), seed=3)
  return path


@pytest.fixture(scope="module")
def truth(folder):
  return json.loads((folder / "films.json").read_text())["films"]


def test_files_are_h264_with_sound_at_two_exact_rates(folder, truth):
  for film, rate in zip(truth, (fractions.Fraction(24), fractions.Fraction(30000, 1001)), strict=True):
    with av.open(str(folder / film["file"])) as container:
      assert container.streams.video[0].codec_context.name == "h264"
      assert container.streams.audio[0].codec_context.name == "aac"
      times = np.array([frame.pts * frame.time_base for frame in container.decode(video=0)])
    assert len(times) == film["num_frames"] == round(4 * rate)
    assert fractions.Fraction(film["fps"]) == rate
    assert all(t == k / rate for k, t in enumerate(times))


def test_every_kind_of_transition_lies_where_the_truth_says(folder, truth):
  kinds = set()
  for film in truth:
    frames = [f.astype(float) for _, _, f in decode.iterate(folder / film["file"])]
    step = np.array([np.abs(a - b).mean() for a, b in itertools.pairwise(frames)])
    for span in film["transitions"]:
      start, end = span["start_frame"], span["end_frame"]
      kinds.add(span["kind"])
      if span["kind"] == "cut":
        assert end == start + 1 and step[start] > 4 * np.median(step)
      else:
        middle = (start + end) / 2
        mixed = (frames[int(np.floor(middle))] + frames[int(np.ceil(middle))]) / 2
        ends = (frames[start] + frames[end]) / 2
        assert np.abs(mixed - ends).mean() < 0.4 * np.abs(frames[start] - frames[end]).mean()
        assert end - start > 4
  assert kinds == {"cut", "dissolve"}


def test_shots_cover_the_film_and_overlap_only_in_dissolves(truth):
  for film in truth:
    shots, spans = film["shots"], film["transitions"]
    assert shots[0]["start_frame"] == 0 and shots[-1]["end_frame"] == film["num_frames"]
    assert len(spans) == len(shots) - 1
    for old, new, span in zip(shots, shots[1:], spans, strict=False):
      assert (span["start_frame"], span["end_frame"]) == (new["start_frame"] - 1, old["end_frame"])


def test_a_shot_shows_its_clip_of_the_world(folder, truth):
  film = truth[0]
  for shot in film["shots"]:
    script = worlds.script("shapes-v1", 3, shot["clip"])
    assert shot["caption"] == script.caption
    assert shot["scores"]["motion"]["value"] == worlds.true_motion(script, 48, 64)
    middle = (shot["start_frame"] + shot["end_frame"] - 1) // 2
    time = worlds.DURATION_S / 2 + (middle - (shot["start_frame"] + shot["end_frame"] - 1) / 2) / 24
    expected = worlds.render(script, np.array([time]), 48, 64)[0].astype(float)
    shown = decode.frames_at(folder / film["file"], np.array([middle / 24]), 48, 64)[0].astype(float)
    assert np.sqrt(((shown - expected) ** 2).mean()) < 12  # 4:2:0 chroma and H.264 at quality 18


def test_captions_table_names_each_shot(folder, truth):
  rows = list(csv.DictReader((folder / "captions.csv").open()))
  shots = [(film["file"], shot) for film in truth for shot in film["shots"]]
  assert len(rows) == len(shots)
  for row, (name, shot) in zip(rows, shots, strict=True):
    assert (row["file"], row["caption"]) == (name, shot["caption"])
    assert float(row["start_s"]) == pytest.approx(shot["start_s"], abs=1e-6)
    assert float(row["end_s"]) == pytest.approx(shot["end_s"], abs=1e-6)


def test_equal_arguments_give_equal_files_and_film_i_does_not_depend_on_the_count(folder, tmp_path):
  films.render_films(tmp_path, count=1, seconds=4.0, size=(48, 64), seed=3)
  name = "film-000.mp4"
  first, again = (hashlib.sha256((path / name).read_bytes()).hexdigest() for path in (folder, tmp_path))
  assert first == again
  assert films.plan(5, 4.0, 3)[:2] == films.plan(2, 4.0, 3) != films.plan(2, 4.0, 4)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"seconds": 0.1}, {"size": (47, 64)}, {"size": (8, 8)}])
def test_wrong_arguments_are_usage_errors(tmp_path, wrong):
  with pytest.raises(UsageError):
    films.render_films(tmp_path / "none", **wrong)
  assert not (tmp_path / "none").exists()
