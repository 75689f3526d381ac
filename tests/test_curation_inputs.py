"""What curation reads: tables of Koala-36M's form with spans, fetched videos, WebDataset tars; what is not there."""

import csv
import dataclasses
import fractions
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import tracemalloc

import cv2
import loopback
import numpy as np
import pyarrow as pa
import pytest

from kling_jax import cli
from kling_jax.curation import curate, inputs, video
from kling_jax.data import container, download, encode, export, fetch, koala, quarantine, records, span_index, verify
from kling_jax.errors import DataError, UsageError

LIMITS = container.DEFAULT_LIMITS
FRAMES = 60
RATE = fractions.Fraction(30000, 1001)  # no whole number of milliseconds a frame


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Two videos of 2 s with a texture of their own, whose red tells the frame."""
  top = tmp_path_factory.mktemp("videos")
  for seed, name in enumerate(("dQw4w9WgXcQ", "a_b")):
    texture = cv2.resize(np.random.default_rng(seed).integers(0, 255, (6, 8), np.uint8), (64, 48))
    frame = lambda k, texture=texture: np.stack([np.full_like(texture, 2 * k), texture, texture], -1)
    encode.write(top / f"{name}.mp4", (frame(k) for k in range(FRAMES)), fps=RATE)
  return top


def koala_table(path: pathlib.Path, rows: list[dict[str, object]]) -> pathlib.Path:
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, koala.COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
  return path


def row(video_id: str, start: float, end: float, **values: object) -> dict[str, object]:
  url = f"https://www.youtube.com/watch?v={video_id.rpartition('_')[0]}"
  return {"videoID": video_id, "url": url, "timestamp": koala.format_span(start, end)} | values


def test_a_released_table_is_matched_to_the_videos_on_disk(footage, tmp_path) -> None:
  rows = [
    row("a_b_1", 1.0, 1.5, caption='Second, "quoted"\nline', motion_score=3.5, video_training_suitability_score=4.0),
    row("missing_0", 0.0, 1.0),
    row("a_b_0", 0.0, 1.0, caption="First"),
    row("dQw4w9WgXcQ_7", 0.5, 1.0, caption="Other"),
    {"videoID": "a_b_2", "timestamp": "nonsense"},
    {"videoID": "\x00", "url": "x" * 9000},
  ]
  table = koala_table(tmp_path / "Koala_36M_1.csv", rows)
  found = inputs.find(table, tmp_path, method="table", videos=footage)
  assert [os.path.basename(path) for path in found.paths] == ["a_b.mp4", "dQw4w9WgXcQ.mp4"]  # as the table has them
  assert (found.counts.rows, found.counts.absent, found.counts.damaged) == (6, 2, 1)
  assert "row 5: timestamp 'nonsense'" in found.counts.first
  spans = inputs.spans_of(found.job(found.paths[0]) | {"path": found.paths[0]})
  assert [(span.start_s, span.end_s, span.caption.text) for span in spans] == [
    (0.0, 1.0, "First"),
    (1.0, 1.5, 'Second, "quoted" line'),
  ]
  assert spans[1].vtss == 4.0 and spans[1].scores["koala_motion"].value == 3.5 and spans[0].scores == {}
  captions = inputs.said(found.job(found.paths[0]) | {"path": found.paths[0]}, lambda top: pytest.fail("not asked"))
  assert captions.of("", "", (1.1, 1.6)).text == 'Second, "quoted" line' and not captions.of("", "", (1.4, 2.0))


def test_spans_become_the_very_frames(footage) -> None:
  path = str(footage / "a_b.mp4")
  tick = 1 / float(RATE)
  spans = [(10, 20), (20, 21), (30, 60), (59, 99)]
  wanted = [koala.parse_span(koala.format_span(a * tick, b * tick)) for a, b in spans]
  asked = [span_index.Span(a, b, span_index.Caption(), {}) for a, b in [*wanted, (50.0, 60.0), (0.0, float("inf"))]]
  split, kept = inputs.split(path, asked, LIMITS)
  assert [(shot.start_frame, shot.end_frame) for shot in split.shots] == [
    (10, 20),
    (20, 21),
    (30, 60),
    (59, 60),
    (0, 60),
  ]
  assert len(kept) == 5 and split.transitions == () and split.num_frames == FRAMES


def test_memory_does_not_grow_with_the_table(footage, tmp_path) -> None:
  peaks = []
  for count in (5_000, 15_000):  # 10 and 30 MB
    name = lambda k: "a_b" if k % 50 == 0 else "gone"
    rows = [row(f"{name(k)}_{k}", k % 2, k % 2 + 0.5, caption="word " * 400) for k in range(count)]
    table = koala_table(tmp_path / f"{count}.csv", rows)
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    found = inputs.find(table, tmp_path, method="table", videos=footage)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert pa.total_allocated_bytes() - before < 1e6
    assert found.counts.rows == count and len(found.paths) == 1
    assert len(inputs.spans_of(found.job(found.paths[0]) | {"path": found.paths[0]})) == count // 50
  assert table.stat().st_size > 30e6 and peaks[1] < 1.2 * peaks[0] < 36e6


def test_fetched_videos_are_known_by_their_address(footage, tmp_path) -> None:
  (tmp_path / "videos").mkdir()
  url = "https://example.org/a.mp4?token=x"
  (tmp_path / "videos" / "f.mp4").write_bytes((footage / "a_b.mp4").read_bytes())
  entry = {"key": download.key(url), "url": "https://example.org/a.mp4", "file": "f.mp4", "bytes": 1, "sha256": ""}
  (tmp_path / "videos" / "fetched.jsonl").write_text(json.dumps(entry) + "\n")
  (tmp_path / "t.jsonl").write_text(
    json.dumps({"url": url}) + "\n" + json.dumps({"url": "https://example.org/b"}) + "\n"
  )
  found = inputs.find(tmp_path / "t.jsonl", tmp_path, method="default", videos=tmp_path / "videos")
  assert [os.path.basename(path) for path in found.paths] == ["f.mp4"] and found.counts.absent == 1


def test_what_was_fetched_is_found_by_the_table_that_named_it(footage, tmp_path) -> None:
  payload = (footage / "a_b.mp4").read_bytes()
  with loopback.Server(lambda handler, body: handler.say(200, payload)) as server:
    table = koala_table(tmp_path / "t.csv", [row("x_0", 0.0, 1.0) | {"url": server.address("/v?id=1")}])
    options = fetch.Options(limits=download.Limits(private=True))
    assert fetch.fetch(table, tmp_path / "videos", options).fetched == 1
  found = inputs.find(table, tmp_path, method="table", videos=tmp_path / "videos")
  assert pathlib.Path(found.paths[0]).read_bytes() == payload


@pytest.mark.parametrize(
  ("text", "method", "words"),
  [
    ("title\nx\n", "default", "wants a column file, url or videoID"),
    ("videoID\nx_1\n", "default", "none of its 1 rows names a video"),
    ("videoID,timestamp\na_b_1,soon\n", "table", "1 rows cannot be read, the first: row 1: timestamp 'soon'"),
  ],
)
def test_tables_without_videos_say_why(text, method, words, footage, tmp_path) -> None:
  (tmp_path / "t.csv").write_text(text)
  with pytest.raises(DataError, match=words):
    inputs.find(tmp_path / "t.csv", tmp_path, method=method, videos=footage)
  with pytest.raises(DataError, match="wants a table with spans"):
    inputs.find(footage, tmp_path, method="table")
  with pytest.raises(UsageError, match="--videos is for tables"):
    inputs.find(footage, tmp_path, method="default", videos=footage)


def test_a_member_of_a_tar_is_a_local_file_while_it_is_looked_at(footage, tmp_path) -> None:
  pack(tmp_path / "a.tar", {"x/1.mp4": (footage / "a_b.mp4").read_bytes(), "x/1.txt": b"A tar."})
  found = inputs.find(tmp_path / "a.tar", tmp_path, method="default")
  [path] = found.paths
  job = json.loads(json.dumps(found.job(path) | {"path": path, "staging": str(tmp_path)}))
  with inputs.local(job) as local:
    assert pathlib.Path(local).read_bytes() == (footage / "a_b.mp4").read_bytes() and local.endswith(".mp4")
  assert not os.path.exists(local) and found.holds(path) and not found.holds(path + "x")
  assert inputs.said(job, lambda top: pytest.fail("not asked")).of("", "").text == "A tar."
  state = (tmp_path / "a.tar").stat()
  assert inputs.file_state(path) == (state.st_size, state.st_mtime_ns) and inputs.file_state("/none/x") == (-1, -1)


# ---- the whole chain -------------------------------------------------------------------------------------------------

OPTIONS = curate.Options(recipe=video.Recipe(min_seconds=0.5, min_side=16), workers=1, report=False)


def test_a_released_table_is_cut_at_its_very_spans(footage, tmp_path, capsys) -> None:
  tick = 1 / float(RATE)
  rows = [
    row("a_b_0", 0.0, 20 * tick, caption="First", clarity_score=0.5, video_training_suitability_score=3.5),
    row("a_b_1", 20 * tick, 26 * tick, caption="Short"),
    row("a_b_2", 40 * tick, 60 * tick),
    row("dQw4w9WgXcQ_0", 3.0, 4.0),
    row("gone_0", 0.0, 1.0),
  ]
  table = koala_table(tmp_path / "Koala_36M_1.csv", rows)
  flags = [
    "curate",
    "--input",
    str(table),
    "--videos",
    str(footage),
    "--method",
    "table",
    "--output",
    str(tmp_path / "set"),
  ]
  assert cli.main([*flags, "--no_report", "--keep", "num_frames >= 1", "--json"]) == 0
  told = capsys.readouterr()
  assert "of 5 rows 1 name no video here, 0 cannot be read" in told.err and json.loads(told.out)["clips"] == 3
  clips = [clip for clip, _ in records.read_all(tmp_path / "set")]
  assert [clip.num_frames for clip in clips] == [20, 6, 20] and verify.verify(tmp_path / "set").ok
  assert [clip.cut_before for clip in clips] == [True, False, True] and clips[1].prev_clip_id == clips[0].clip_id
  assert [clip.caption for clip in clips] == ["First", "Short", ""] and clips[0].captioner == "sidecar"
  assert clips[0].vtss == 3.5 and clips[0].scores["koala_clarity"].value == 0.5 and "clarity" in clips[0].scores
  source = records.RecordSource(tmp_path / "set")
  red = [source.frames(k, np.array([0.0]), 8, 8)[0, ..., 0].mean() / 2 for k in range(3)]
  np.testing.assert_allclose(red, [0, 20, 40], atol=0.6)
  export.export(tmp_path / "set", tmp_path / "again.csv", "koala")  # what we write is what we read
  found = inputs.find(tmp_path / "again.csv", tmp_path, method="table", videos=footage)
  spans = inputs.spans_of(found.job(found.paths[0]) | {"path": found.paths[0]})
  shots = inputs.split(found.paths[0], spans, LIMITS)[0].shots
  assert [(shot.start_frame, shot.end_frame) for shot in shots] == [(0, 20), (20, 26), (40, 60)]


def test_tars_give_the_clips_that_their_videos_give(footage, tmp_path, capsys) -> None:
  tars = tmp_path / "tars"
  tars.mkdir()
  names = ("dQw4w9WgXcQ", "a_b")
  for k, name in enumerate(names):
    members = {f"{name}.mp4": (footage / f"{name}.mp4").read_bytes(), f"{name}.json": b'{"subject": "a square"}'}
    pack(tars / f"{k}.tar", members | {"../up.mp4": b"x", "noise.mp4": b"x"})
  funnel = curate.curate(tars, tmp_path / "set", OPTIONS)
  assert funnel.videos == 4 and funnel.quarantined == {"unreadable": 2}
  book = [(os.path.basename(e.source), e.reason) for e in quarantine.read(tmp_path / "set" / "quarantine.jsonl")]
  assert sorted(book) == [("noise.mp4", "unreadable")] * 2 + [("up.mp4", "hostile_name")] * 2
  curate.curate(footage, tmp_path / "plain", OPTIONS)
  packed, plain = (dict(contents(tmp_path / name)) for name in ("set", "plain"))
  assert packed == plain and len(packed) > 1
  clips = [clip for clip, _ in records.read_all(tmp_path / "set")]
  assert {clip.video_id for clip in clips} == {f"{k}.tar/{name}.mp4" for k, name in enumerate(names)}
  assert {(clip.caption, clip.subject) for clip in clips} == {("a square.", "a square")}
  again = curate.curate(tars, tmp_path / "set", OPTIONS)
  assert dataclasses.replace(again, wall_s=0, timings={}) == dataclasses.replace(funnel, wall_s=0, timings={})
  assert not (tmp_path / "set" / "work").exists()


@pytest.mark.drill
@pytest.mark.parametrize("kind", ["tars", "table"])
def test_a_run_that_is_killed_goes_on_to_the_same_set(kind, footage, tmp_path) -> None:
  """kill -9 of driver and workers, again and again, until a run comes to its end."""
  flags = ["--min_seconds", "0.3", "--max_seconds", "0.6", "--workers", "2", "--no_report", "--keep", "num_frames >= 1"]
  if kind == "tars":
    for name in ("a_b", "dQw4w9WgXcQ"):
      pack(tmp_path / f"{name}.tar", {f"{name}.mp4": (footage / f"{name}.mp4").read_bytes()})
    flags += ["--input", str(tmp_path)]
  else:
    rows = [row(f"{name}_{k}", k / 5, k / 5 + 0.2) for name in ("a_b", "dQw4w9WgXcQ") for k in range(10)]
    table = koala_table(tmp_path / "t.csv", rows)
    flags += ["--input", str(table), "--videos", str(footage), "--method", "table"]
  command = [sys.executable, "-m", "kling_jax", "curate", *flags, "--output"]
  subprocess.run([*command, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
  kills, wait_s = 0, 2.0
  while True:
    process = subprocess.Popen([*command, str(tmp_path / "set")], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
      assert process.wait(wait_s) == 0
      break
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
      kills, wait_s = kills + 1, wait_s * 1.3
  assert kills >= 1 and contents(tmp_path / "set") == contents(tmp_path / "whole")
  assert verify.verify(tmp_path / "set").ok and not list((tmp_path / "set").rglob(".member-*"))


def contents(top: pathlib.Path) -> list[tuple[str, bytes]]:
  return [(clip.clip_id, media) for clip, media in records.read_all(top)]


def pack(path: pathlib.Path, members: dict[str, bytes]) -> None:
  with tarfile.open(path, "w") as archive:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
