"""Curation from films to a clip set: contents, captions, resume after a kill, additions, refusals."""

import dataclasses
import fractions
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_jax.curation import curate, journal, rules, select, video
from kling_jax.curation.split import Shot, Split
from kling_jax.data import conditions, films, records, verify
from kling_jax.data.record import Transition
from kling_jax.errors import ConfigError, DataError, UsageError

RECIPE = video.Recipe(min_seconds=0.5, max_seconds=1.5, min_side=16)
OPTIONS = curate.Options(recipe=RECIPE, workers=2, report=False)


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
  """Two films with captions, the copy of one, and two files that are no videos."""
  folder = tmp_path_factory.mktemp("footage")
  films.render_films(folder, count=2, seconds=4.0, size=(48, 64), seed=3)
  (folder / "sub").mkdir()
  shutil.copy(folder / "film-001.mp4", folder / "sub" / "copy.mp4")
  (folder / "empty.mp4").write_bytes(b"")
  (folder / "page.mp4").write_text("<html>not found</html>")
  return folder


@pytest.fixture(scope="module")
def curated(footage, tmp_path_factory):
  output = tmp_path_factory.mktemp("set") / "set"
  funnel = curate.curate(footage, output, dataclasses.replace(OPTIONS, report=True))
  return output, funnel


def contents(output):
  """Everything about the clips of a set, in order."""
  return [(header, media) for header, media in records.read_all(output)]


def test_the_set_is_sound_and_the_funnel_adds_up(curated, footage):
  output, funnel = curated
  report = verify.verify(output)
  assert report.ok, report.problems
  assert (funnel.videos, funnel.duplicates, funnel.quarantined) == (5, 1, {"unreadable": 2})
  truth = json.loads((footage / "films.json").read_text())["films"]
  assert funnel.shots == sum(len(film["shots"]) for film in truth)
  assert funnel.clips == report.clips and funnel.kept + sum(funnel.dropped.values()) == funnel.clips
  assert 0.8 * funnel.seconds < funnel.clip_seconds < funnel.seconds
  assert funnel.text().count("\n") == 2
  assert not (output / "work").exists()
  entries = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
  assert {os.path.basename(e["source"]): e["reason"] for e in entries} == {
    "empty.mp4": "unreadable",
    "page.mp4": "unreadable",
  }
  assert "Quarantined files" in (output / "report" / "index.html").read_text()


def test_clips_lie_within_shots_and_carry_their_captions(curated, footage):
  output, _ = curated
  truth = {film["file"]: film for film in json.loads((footage / "films.json").read_text())["films"]}
  for header, _ in contents(output):
    film = truth[header.video_id]
    assert header.start_s >= 0 and RECIPE.min_seconds - 0.05 <= header.duration_s <= RECIPE.max_seconds + 0.05
    middle = (header.start_s + header.end_s) / 2
    [shot] = [s for s in film["shots"] if s["start_s"] - 0.1 <= header.start_s and header.end_s <= s["end_s"] + 0.1]
    assert header.caption == shot["caption"] and shot["start_s"] < middle < shot["end_s"]
    assert header.fps == pytest.approx(float(fractions.Fraction(film["fps"])), rel=1e-3)
    for span in film["transitions"]:  # no frame of a dissolve is in a clip
      first, last = (round(s * header.fps) for s in (header.start_s, header.end_s))
      assert last <= span["start_frame"] + 1 or first >= span["end_frame"]
    assert {"motion", "aesthetic", "clarity", "camera_pan", "text"} <= set(header.scores)


def test_clips_of_a_video_are_chained(curated):
  output, _ = curated
  for name in ("film-000.mp4", "film-001.mp4"):
    chain = [header for header, _ in contents(output) if header.video_id == name]
    assert [header.index for header in chain] == list(range(len(chain)))
    assert [header.prev_clip_id for header in chain] == [""] + [header.clip_id for header in chain[:-1]]
    for before, after in itertools.pairwise(chain):
      assert after.cut_before == (after.start_pts != before.end_pts or bool(after.transitions and before.transitions))


def test_conditions_are_fitted_on_the_kept_clips(curated):
  output, funnel = curated
  fitted = conditions.load(output / "conditions.json")
  assert fitted.names == ("motion", "aesthetic", "clarity", "vtss")
  assert {condition.clips for condition in fitted.conditions} == {funnel.kept}


def test_a_second_run_changes_nothing(curated, footage):
  output, funnel = curated
  files = {path: path.stat().st_mtime_ns for path in output.rglob("*.array_record")}
  again = curate.curate(footage, output, OPTIONS)
  assert dataclasses.replace(again, wall_s=0) == dataclasses.replace(funnel, wall_s=0)
  assert {path: path.stat().st_mtime_ns for path in output.rglob("*.array_record")} == files


def test_new_videos_are_added_and_other_thresholds_applied(footage, curated, tmp_path):
  source, output = tmp_path / "in", tmp_path / "set"
  source.mkdir()
  shutil.copy(footage / "film-000.mp4", source / "a.mp4")
  first = curate.curate(source, output, OPTIONS)
  before = contents(output)
  shutil.copy(footage / "film-001.mp4", source / "b.mp4")
  strict = dataclasses.replace(OPTIONS, rules=rules.parse_all(["motion <= -1"]))
  second = curate.curate(source, output, strict)
  after = contents(output)
  assert second.clips > first.clips and second.kept == 0 and second.dropped == {"motion": second.clips}
  assert [(h.clip_id, m) for h, m in after[: len(before)]] == [(h.clip_id, m) for h, m in before]
  assert not (output / "conditions.json").exists()  # no kept clip, no percentiles
  third = curate.curate(source, output, dataclasses.replace(OPTIONS, rules=select.DEFAULT_RULES))
  assert third.kept == third.clips - sum(third.dropped.values()) > 0


def test_a_mended_file_is_tried_again_and_a_changed_one_refused(footage, tmp_path):
  source, output = tmp_path / "in", tmp_path / "set"
  source.mkdir()
  shutil.copy(footage / "film-000.mp4", source / "a.mp4")
  (source / "b.mp4").write_bytes(b"half a download")
  assert curate.curate(source, output, OPTIONS).quarantined == {"unreadable": 1}
  shutil.copy(footage / "film-001.mp4", source / "b.mp4")
  assert curate.curate(source, output, OPTIONS).quarantined == {}
  shutil.copy(footage / "film-001.mp4", source / "a.mp4")
  with pytest.raises(DataError, match=r"a\.mp4 changed"):
    curate.curate(source, output, OPTIONS)


def test_a_table_names_videos_and_captions(footage, tmp_path):
  shutil.copy(footage / "film-000.mp4", tmp_path / "a.mp4")
  (tmp_path / "t.csv").write_text("file,caption\na.mp4,all of it\nmissing.mp4,\n../outside.mp4,\n")
  funnel = curate.curate(tmp_path / "t.csv", tmp_path / "set", OPTIONS)
  assert funnel.quarantined == {"hostile_name": 1, "unreadable": 1}
  assert {header.caption for header, _ in contents(tmp_path / "set")} == {"all of it"}


def test_refusals_are_one_clear_error_each(footage, curated, tmp_path):
  output, _ = curated
  with pytest.raises(ConfigError, match=r"max_seconds: 1\.5 there, 2\.0 now"):
    curate.curate(footage, output, dataclasses.replace(OPTIONS, recipe=dataclasses.replace(RECIPE, max_seconds=2.0)))
  with pytest.raises(DataError, match="no video file"):
    (tmp_path / "nothing").mkdir()
    curate.curate(tmp_path / "nothing", tmp_path / "s1", OPTIONS)
  assert not (tmp_path / "s1").exists()
  with pytest.raises(UsageError, match="input folder"):
    curate.curate(footage, footage, OPTIONS)
  with pytest.raises(UsageError, match="twice"):
    curate.curate(footage, tmp_path / "s2", curate.Options(recipe=video.Recipe(min_seconds=2, max_seconds=3)))
  broken = tmp_path / "broken"
  broken.mkdir()
  (broken / "x.mp4").write_bytes(b"")
  (broken / "y.avi").write_bytes(b"text")
  with pytest.raises(DataError, match="none of 2 videos gives a clip"):
    curate.curate(broken, tmp_path / "s3", OPTIONS)
  assert len((tmp_path / "s3" / "quarantine.jsonl").read_text().splitlines()) == 2
  assert not (tmp_path / "s3" / "clips.parquet").exists()


RUN = """
import sys
from kling_jax.curation import curate, journal, rules, select, video
recipe = video.Recipe(min_seconds=0.5, max_seconds=1.5, min_side=16)
curate.curate(sys.argv[1], sys.argv[2], curate.Options(recipe=recipe, workers=2, report=False))
"""


def killed(footage, output, after_s: float) -> bool:
  """Runs curation and kills it after a while; returns whether it came to its end first."""
  process = subprocess.Popen([sys.executable, "-c", RUN, str(footage), str(output)], stderr=subprocess.DEVNULL)
  try:
    return process.wait(after_s) == 0
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGKILL)
    process.wait()
    return False


def test_killed_and_started_again_gives_the_same_set(footage, curated, tmp_path):
  output = tmp_path / "set"
  process = subprocess.Popen([sys.executable, "-c", RUN, str(footage), str(output)], stderr=subprocess.DEVNULL)
  while not (output / "work").exists():  # an event, not a time: machines differ in speed
    assert process.poll() is None
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert (output / "work").exists() and not (output / "clips.parquet").exists()  # killed in the middle
  curate.curate(footage, output, OPTIONS)
  assert contents(output) == contents(curated[0])
  assert verify.verify(output).ok
  assert journal.read(output) and not (output / "work").exists()


@pytest.mark.drill
def test_killed_at_many_moments_gives_the_same_set(footage, curated, tmp_path):
  rng = np.random.default_rng(0)
  for attempt in range(3):
    output = tmp_path / f"set-{attempt}"
    longest_s = 4.0
    while not killed(footage, output, float(rng.uniform(0.4, longest_s))):
      longest_s *= 1.1  # a slow machine must come to an end, too
    assert contents(output) == contents(curated[0])
    assert verify.verify(output).ok


@pytest.mark.parametrize("moment", ["commit", "_enter", "_select"])
def test_stopped_between_any_two_writes_of_the_end(footage, curated, tmp_path, monkeypatch, moment):
  """An error at each step of the end stands for a kill there; the next run completes the same set."""

  class Stop(Exception):
    pass

  def stop(*_):
    raise Stop

  owner = curate._Writer if moment == "commit" else curate._Run
  monkeypatch.setattr(owner, moment, stop)
  output = tmp_path / "set"
  with pytest.raises(Stop):
    curate.curate(footage, output, OPTIONS)
  monkeypatch.undo()
  curate.curate(footage, output, OPTIONS)
  assert contents(output) == contents(curated[0])


def test_two_runs_do_not_share_a_set(footage, tmp_path):
  output = tmp_path / "set"
  with curate._locked(output), pytest.raises(DataError, match="at work"):
    curate.curate(footage, output, OPTIONS)


def test_broken_files_end_as_expected(shared, tmp_path):
  folder = shared / "videos" / "broken"
  expected = json.loads((folder / "expected.json").read_text())
  recipe = video.Recipe(min_seconds=0.4, max_seconds=10.0, min_side=16)
  curate.curate(folder, tmp_path / "set", dataclasses.replace(OPTIONS, recipe=recipe))
  found = {entry["name"]: entry for entry in journal.read(tmp_path / "set")}
  for name, wanted in expected.items():
    entry = found[name]
    outcome = "quarantine" if entry["reason"] else "salvage" if entry["damage"] else "accept"
    assert outcome == wanted["outcome"], (name, entry)
    assert entry["frames"] >= wanted.get("min_frames", 0)
    assert bool(entry["clips"]) == (outcome != "quarantine")


@settings(max_examples=60, deadline=None)
@given(
  lengths=st.lists(st.integers(1, 120), min_size=1, max_size=6),
  gradual=st.lists(st.integers(0, 20), min_size=5, max_size=5),
  least=st.floats(0.1, 2.0),
  factor=st.floats(2.0, 6.0),
)
def test_pieces_are_ordered_long_enough_and_inside_their_shots(lengths, gradual, least, factor):
  spans, shots, start = [], [], 0
  for k, length in enumerate(lengths):
    shots.append(Shot(start, start + length, start / 25, (start + length) / 25))
    start += length
    if k + 1 < len(lengths):
      end = start + gradual[k]
      spans.append(Transition(start - 1, end, "dissolve" if gradual[k] else "cut", 0.9))
      start = end
  pts = np.arange(start) * 512
  whole = Split("v", 64, 48, 25.0, fractions.Fraction(1, 12800), pts, start * 512, tuple(spans), tuple(shots))
  pieces = video.pieces(whole, least, factor * least)
  for before, after in itertools.pairwise(pieces):
    assert before.end <= after.start and (after.cut_before or before.end == after.start)
  for piece in pieces:
    seconds = (piece.end - piece.start) / 25
    assert seconds <= factor * least + 0.04 + 1e-6
    assert seconds >= min(least, factor * least / 2) - 0.05
    assert any(shot.start_frame <= piece.start < piece.end <= shot.end_frame for shot in shots)
    for span in spans:
      if span.kind == "dissolve":
        assert piece.end <= span.start_frame + 1 - 2 or piece.start >= span.end_frame + 2
