"""Shot lists: read back by the libraries whose formats they are."""

import csv
import fractions
import io
import json

import numpy as np
import opentimelineio as otio
import pytest

from kling_jax.curation import shot_lists, split_command
from kling_jax.curation.split import Shot, Split
from kling_jax.data import encode
from kling_jax.data.record import Transition
from kling_jax.errors import UsageError

CUT, DISSOLVE = Transition(29, 30, "cut", 0.9), Transition(59, 68, "dissolve", 0.8)


def video(pts, time_base, end_pts, fps, name="film \u202e<b>.mp4"):
  pts = np.array(pts, np.int64)
  statistics = {"difference": np.concatenate([[np.nan], np.arange(len(pts) - 1.0)])}
  bare = Split(name, 64, 36, fps, time_base, pts, end_pts, (CUT, DISSOLVE), (), (), "default", statistics)
  shots = [Shot(a, b, bare.seconds(a), bare.seconds(b)) for a, b in ((0, 30), (30, 60), (68, len(pts)))]
  return Split(*[getattr(bare, f) for f in ("video", "width", "height", "fps", "time_base", "pts", "end_pts")],
               bare.transitions, tuple(shots), (), "default", statistics)  # fmt: skip


@pytest.fixture(params=["even", "ntsc", "variable"])
def film(request):
  if request.param == "even":
    return video(range(100), fractions.Fraction(1, 25), 100, 25.0)
  if request.param == "ntsc":
    return video(1001 * np.arange(100), fractions.Fraction(1, 30000), 100100, 30000 / 1001)
  steps = np.tile([2, 5, 3, 10], 25)
  stamps = np.cumsum(steps) - steps[0] + 7  # a start that is not 0
  return video(stamps, fractions.Fraction(1, 100), int(stamps[-1]) + 5, 20.0)


def test_csv_has_pyscenedetects_columns_and_frames_from_one(film):
  rows = list(csv.reader(io.StringIO(shot_lists.scenes_csv(film))))
  assert rows[0][0] == "Timecode List:" and len(rows[0]) == 3
  assert tuple(rows[1]) == shot_lists.HEADER
  assert [(int(row[1]), int(row[4]), int(row[7])) for row in rows[2:]] == [(1, 30, 30), (31, 60, 30), (69, 100, 32)]
  assert float(rows[3][3]) == pytest.approx(film.shots[1].start_s, abs=1e-3)
  hours, minutes, seconds = rows[3][2].split(":")
  assert int(hours) * 3600 + int(minutes) * 60 + float(seconds) == pytest.approx(film.shots[1].start_s, abs=1e-3)


def test_otio_is_read_by_opentimelineio_and_its_times_are_exact(film):
  timeline = otio.adapters.read_from_string(shot_lists.otio(film), "otio_json")
  [track] = timeline.video_tracks()
  shots = [clip for clip in track if clip.metadata["kling"]["role"] == "shot"]
  assert [clip.name for clip in track] == ["shot 0001", "shot 0002", "between shots", "shot 0003"]
  for clip, shot in zip(shots, film.shots, strict=True):
    span = clip.trimmed_range_in_parent() or clip.range_in_parent()
    assert otio.opentime.to_seconds(clip.source_range.start_time) == pytest.approx(shot.start_s, abs=1e-9)
    assert otio.opentime.to_seconds(span.start_time) == pytest.approx(shot.start_s, abs=1e-9)
    assert otio.opentime.to_seconds(clip.duration()) == pytest.approx(shot.end_s - shot.start_s, abs=1e-9)
  assert otio.opentime.to_seconds(track.duration()) == pytest.approx(film.seconds(100), abs=1e-9)
  assert [marker.name for marker in track.markers] == ["cut", "dissolve"]
  assert list(track.markers[1].metadata["kling"]["frames"]) == [59, 68]


def test_edl_is_read_by_the_cmx_adapter(film):
  text = shot_lists.edl(film)
  assert "\u202e" not in text
  rate = {25: 25, 30: 30, 20: 24}[round(film.fps)]
  timeline = otio.adapters.read_from_string(text, "cmx_3600", rate=rate)
  clips = [item for item in timeline.tracks[0] if isinstance(item, otio.schema.Clip)]
  assert len(clips) == 3
  for clip, shot in zip(clips, film.shots, strict=True):
    frame = shot.start_frame if rate != 24 else round(shot.start_s * rate)
    assert clip.source_range.start_time.value == frame
  assert "DISSOLVE FRAMES 59 68 CONFIDENCE 0.80" in text and text.count("* COMMENT") == 2


def test_statistics_have_a_row_a_frame(film):
  rows = list(csv.DictReader(io.StringIO(shot_lists.statistics_csv(film))))
  assert len(rows) == 100 and rows[0]["difference"] == "" and float(rows[5]["difference"]) == 4
  assert float(rows[5]["Time (seconds)"]) == pytest.approx(film.seconds(5), abs=1e-6)


def test_the_verb_writes_lists_of_many_videos_in_processes(tmp_path, capsys):
  rng = np.random.default_rng(0)
  names = []
  for k in range(3):
    shots = [np.full((36, 64, 3), rng.integers(0, 256, 3), np.uint8) for _ in range(2)]
    encode.write(tmp_path / f"{k}.mp4", [shots[t // 12] for t in range(24)], fps=25)
    names.append(str(tmp_path / f"{k}.mp4"))
  formats = list(shot_lists.WRITERS)
  assert split_command.command(names, as_json=True, output=str(tmp_path / "out"), formats=formats, workers=2) == 0
  apart = json.loads(capsys.readouterr().out)
  assert [answer["video"] for answer in apart] == names
  for name in names:
    for suffix, _ in shot_lists.WRITERS.values():
      assert (tmp_path / "out" / (name.rsplit("/", 1)[1] + suffix)).read_text()
  assert split_command.command(names, as_json=True, workers=1) == 0
  assert json.loads(capsys.readouterr().out) == apart
  with pytest.raises(UsageError, match="two videos"):
    split_command.command([names[0], names[0]], output=str(tmp_path), formats=["edl"])
  with pytest.raises(UsageError, match="otio"):
    split_command.command(names, output=str(tmp_path), formats=["otoi"])
