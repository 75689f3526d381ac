"""`kling score`: a set gets what it lacks and nothing else changes; kills, other versions, loose and broken files."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from kling_jax import measure
from kling_jax.curation import score_command
from kling_jax.curation.score_command import JOURNAL, Wanted, command
from kling_jax.data import clip_table, conditions, encode, records, worlds
from kling_jax.data.record import ClipRecord
from kling_jax.data.source import Score
from kling_jax.errors import DataError, UsageError

LIGHT = Wanted(("brightness", "motion"))


def media(index: int) -> bytes:
  frames = worlds.WorldSource(count=4, seed=3).frames(index, np.arange(12) / 12, 64, 96)
  return encode.encode(frames, fps=12)


@pytest.fixture(scope="module")
def films() -> list[bytes]:
  return [media(index) for index in range(3)]


@pytest.fixture
def clip_set(tmp_path, films):
  folder = tmp_path / "set"
  with records.RecordWriter(folder, "test") as writer:
    for index, data in enumerate(films):
      clip = ClipRecord(
        clip_id=f"{index:032x}", video_id=f"v{index}", source="x", start_pts=0, end_pts=12, time_base="1/12", fps=12.0,
        width=96, height=64, num_frames=12, caption=f"film {index}", vtss=3.0,
        scores={"mine": Score(7.0, "me", "1"), "motion": Score(9.0, "flow", "0")},
      )  # fmt: skip
      writer.write(clip, data)
  return folder


def clips(folder) -> list[tuple[ClipRecord, bytes]]:
  return list(records.read_all(folder))


def test_a_set_gets_its_scores_and_keeps_everything_else(clip_set, films, capsys):
  before = clips(clip_set)
  infos = [clip.info() for clip, _ in before]
  conditions.fit(infos, ["motion"]).save(clip_set / conditions.FILE)
  assert command([str(clip_set)], wanted=LIGHT, workers=1, as_json=True) == 0
  rows = json.loads(capsys.readouterr().out)
  after = clips(clip_set)
  assert [data for _, data in after] == films
  for (old, _), (new, data), row in zip(before, after, rows, strict=True):
    assert dataclasses.replace(new, scores={}) == dataclasses.replace(old, scores={})
    assert new.scores["mine"] == Score(7.0, "me", "1")  # of nobody that was asked
    expected = measure.score_media(data, measure.chosen(LIGHT.words))
    assert {**expected, "mine": new.scores["mine"]} == new.scores  # motion of version 0 is replaced
    assert row["clip"] == new.clip_id and row["vtss"] == 3.0
    assert row["scores"]["motion"] == dataclasses.asdict(new.scores["motion"])
    assert row["scores"]["safety"]["value"] is None
  fitted = conditions.load(clip_set / conditions.FILE).conditions[0]
  assert fitted.version == "1" and fitted.q99 < 9.0
  assert all(value is not None for value in clip_table.Index.load(clip_set).table["motion_score"].to_pylist())
  assert not (clip_set / JOURNAL).exists()


def test_what_is_there_is_not_measured_again(clip_set, monkeypatch):
  command([str(clip_set)], wanted=LIGHT, workers=1)
  asked = []
  monkeypatch.setattr(score_command, "_answers", lambda jobs, names, workers: asked.append(jobs) or iter(()))
  command([str(clip_set)], wanted=LIGHT)
  command([str(clip_set)], wanted=Wanted(("brightness", "borders")))
  assert asked[0] == [] and [job["keys"] for job in asked[1]] == [["flat-margins 1"]] * 3


def test_a_run_goes_on_where_it_was_killed(clip_set, films, monkeypatch):
  """The journal of a killed run: one clip done, one line cut off; the rest is measured, and once."""
  expected = measure.score_media(films[0], measure.chosen(LIGHT.words))
  scores = {name: {"value": -1.0, "scorer": s.scorer, "version": s.version} for name, s in expected.items()}
  done = {"clip": f"{0:032x}", "keys": sorted({f"{s.scorer} {s.version}" for s in expected.values()}), "scores": scores}
  (clip_set / JOURNAL).write_text(json.dumps(done) + "\n" + json.dumps(done)[:40], encoding="utf-8")
  jobs = []
  real = score_command._answers
  monkeypatch.setattr(score_command, "_answers", lambda j, n, w: jobs.extend(n) or real(j, n, w))
  assert command([str(clip_set)], wanted=LIGHT, workers=1) == 0
  assert jobs == [f"{1:032x}", f"{2:032x}"]
  values = [clip.scores["brightness"].value for clip, _ in clips(clip_set)]
  assert values[0] == -1.0 and all(0 < value < 1 for value in values[1:])
  assert not (clip_set / JOURNAL).exists()


def test_a_damaged_clip_costs_only_itself(tmp_path, films, capsys):
  folder = tmp_path / "set"
  with records.RecordWriter(folder, "test") as writer:
    for index, data in enumerate([films[0], b"no video at all"]):
      clip = ClipRecord(
        clip_id=f"{index:032x}", video_id="v", source="x", start_pts=index, end_pts=12, time_base="1/12", fps=12.0,
        width=96, height=64, num_frames=12,
      )  # fmt: skip
      writer.write(clip, data)
  assert command([str(folder)], wanted=LIGHT, workers=1) == 1
  assert f"{1:032x}" in capsys.readouterr().err
  assert [sorted(clip.scores) for clip, _ in clips(folder)] == [
    ["bright", "brightness", "contrast", "dark", "grey", "motion", "saturation"],
    [],
  ]


def test_two_runs_on_one_set_do_not_mix(clip_set):
  with score_command._journal(clip_set), pytest.raises(DataError, match="another `kling score`"):
    command([str(clip_set)], wanted=LIGHT)


def test_loose_files_keep_their_order_and_broken_ones_are_told(tmp_path, films, capsys):
  names = []
  for index, data in enumerate([films[1], b"", films[0]]):
    path = tmp_path / f"{2 - index}.mp4"
    path.write_bytes(data)
    names.append(str(path))
  assert command(names, wanted=LIGHT, workers=2, as_json=True) == 1
  said = capsys.readouterr()
  rows = json.loads(said.out)
  assert [row["clip"] for row in rows] == [names[0], names[2]] and names[1] in said.err
  expected = measure.score_media(films[0], measure.chosen(LIGHT.words))
  assert rows[1]["scores"]["motion"]["value"] == expected["motion"].value  # the same in another process


def test_words_choose_scorers():
  assert measure.chosen(["default"]) == measure.SCORERS
  assert {s.name for s in measure.chosen(["motion", "borders", "motion"])} == {"flow", "flat-margins"}
  mine = measure.chosen(["default", f"{__name__}:OCR"])
  assert OCR in mine and not any(s.name == "letter-rows" for s in mine)
  for wrong in ("motoin", "kling_jax.measure:sample_times", "no.such.module:X", f"{__name__}:missing"):
    with pytest.raises(UsageError):
      measure.chosen([wrong])
  with pytest.raises(UsageError, match="did you mean 'motion'|motion"):
    measure.chosen(["motoin"])


OCR = measure.Scorer("my-reader", "3", ("text",), lambda sample: {"text": float(len(sample.times_s))})


def test_a_scorer_of_yours_takes_the_place_of_the_detector(films):
  scores = measure.score_media(films[0], measure.chosen(["text", f"{__name__}:OCR"]))
  assert scores["text"].scorer == "my-reader" and scores["text"].version == "3"
  wrong = measure.Scorer("wrong", "1", ("text",), lambda sample: {"text": float("nan")})
  with pytest.raises(DataError, match="wrong"):
    measure.score_media(films[0], [wrong])


@pytest.mark.drill
def test_a_killed_run_of_the_command_ends_with_the_set_of_an_unbroken_one(tmp_path, films):
  folders = [tmp_path / name for name in ("unbroken", "killed")]
  for folder in folders:
    with records.RecordWriter(folder, "test") as writer:
      for index in range(24):
        clip = ClipRecord(
          clip_id=f"{index:032x}", video_id=f"v{index}", source="x", start_pts=0, end_pts=12, time_base="1/12",
          fps=12.0, width=96, height=64, num_frames=12,
        )  # fmt: skip
        writer.write(clip, films[index % 3])
  run = lambda folder: [sys.executable, "-m", "kling_jax", "score", "--input", str(folder), "--workers", "2"]
  subprocess.run(run(folders[0]), check=True, stdout=subprocess.DEVNULL)
  for least in (2, 9):  # lines of the journal at the kill
    process = subprocess.Popen(run(folders[1]), start_new_session=True, stdout=subprocess.DEVNULL)
    journal = folders[1] / JOURNAL
    while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") >= least):
      time.sleep(0.01)
    assert process.poll() is None, "the run ended before the kill"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert all(not clip.scores for clip, _ in clips(folders[1]))  # the set changes at the end, at once
  subprocess.run(run(folders[1]), check=True, stdout=subprocess.DEVNULL)
  assert clips(folders[1]) == clips(folders[0])
  assert not (folders[1] / JOURNAL).exists()
