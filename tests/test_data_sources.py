"""Folders, tables and names as clip sources, on real files: order, captions, spans, what is refused and why."""

import json
import pathlib
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kling_jax import errors
from kling_jax.data import clip_table, cut, decode, encode, folder, quarantine, record, records, table
from kling_jax.data import open as sources
from kling_jax.data.source import ClipSource


def clip(level: int, frames: int = 10) -> bytes:
  """A second at 10 frames a second whose grey rises by 10 a frame."""
  return encode.encode([np.full((24, 32, 3), level + 10 * k, np.uint8) for k in range(frames)], fps=10)


@pytest.fixture(scope="module")
def media() -> dict[int, bytes]:
  return {level: clip(level) for level in (20, 60, 100)}


@pytest.fixture
def videos(tmp_path: pathlib.Path, media: dict[int, bytes]) -> pathlib.Path:
  top = tmp_path / "videos"
  for name, level in (("b.mp4", 20), ("a/z.mp4", 60), ("c/d/e.MP4", 100)):
    (top / name).parent.mkdir(parents=True, exist_ok=True)
    (top / name).write_bytes(media[level])
  for name in (".hidden.mp4", ".cache/x.mp4"):
    (top / name).parent.mkdir(exist_ok=True)
    (top / name).write_bytes(media[20])
  (top / "notes.txt").write_text("no video")
  return top


def level(source: ClipSource, index: int, time: float = 0.0) -> float:
  return float(source.frames(index, np.array([time]), 8, 8).mean())


# ---- folder ---------------------------------------------------------------------------------------------------------


def test_folder_is_sorted_recursive_and_skips_dot_files(videos: pathlib.Path) -> None:
  source = folder.FolderSource(videos)
  assert isinstance(source, ClipSource)
  assert [source.info(k).video_id for k in range(len(source))] == ["a/z.mp4", "b.mp4", "c/d/e.MP4"]
  assert [level(source, k) for k in range(3)] == pytest.approx([60, 20, 100], abs=2)
  info = source.info(1)
  assert (info.num_frames, info.fps, info.duration_s) == (10, pytest.approx(10), pytest.approx(1.0))
  assert (info.width, info.height, info.caption) == (32, 24, "")
  assert source.refused == ()


def test_folder_identity_is_its_content_and_order(videos: pathlib.Path) -> None:
  before = folder.FolderSource(videos)
  assert folder.FolderSource(videos).fingerprint == before.fingerprint
  assert pickle.loads(pickle.dumps(before)).info(2) == before.info(2)
  shutil.move(videos / "b.mp4", videos / "renamed.mp4")
  after = folder.FolderSource(videos)
  assert after.fingerprint != before.fingerprint
  assert {after.info(k).clip_id for k in range(3)} == {before.info(k).clip_id for k in range(3)}


def test_captions_lie_beside_the_videos(videos: pathlib.Path) -> None:
  (videos / "captions.csv").write_text('file,caption\nb.mp4,"from, the table"\na/z.mp4,unused\n')
  (videos / "a/z.txt").write_text("\ufefffrom the text file\n")
  (videos / "c/d/e.json").write_text(json.dumps({"subject": "A cat", "action": "sleeps.", "other": 1}))
  source = folder.FolderSource(videos)
  captions = [source.info(k).caption for k in range(3)]
  assert captions == ["from the text file", "from, the table", "A cat sleeps."]
  (videos / "captions.csv").unlink()
  (videos / "captions.jsonl").write_text('{"file": "./b.mp4", "caption": "line"}\n')
  assert folder.FolderSource(videos).info(1).caption == "line"


@pytest.mark.parametrize(
  ("name", "text", "words"),
  [
    ("b.json", "{", "b.json: no JSON"),
    ("b.json", '{"caption": 3}', "b.json: wants"),
    ("b.json", "[1]", "b.json: wants"),
    ("captions.csv", "path,caption\nb.mp4,x\n", "wants the columns file and caption; it has path, caption"),
    ("captions.csv", "file,caption\nb.mp4,x,y\n", "no table"),
    ("captions.jsonl", "nonsense\n", "no table"),
  ],
)
def test_caption_files_that_are_none_are_named(videos: pathlib.Path, name: str, text: str, words: str) -> None:
  (videos / name).write_text(text)
  with pytest.raises(errors.DataError, match=words):
    folder.FolderSource(videos)


def test_text_that_is_no_utf8_is_named(videos: pathlib.Path) -> None:
  (videos / "b.txt").write_bytes(b"caf\xe9")
  with pytest.raises(errors.DataError, match=r"b\.txt: cannot be read as UTF-8"):
    folder.FolderSource(videos)


def test_broken_files_are_listed_and_the_rest_goes_on(videos: pathlib.Path, shared: pathlib.Path) -> None:
  shutil.copytree(shared / "videos/broken", videos / "broken")
  (videos / "bad\nname.mp4").write_bytes((videos / "b.mp4").read_bytes())
  source = folder.FolderSource(videos, quarantine=videos / "quarantine.jsonl")
  names = [source.info(k).video_id for k in range(len(source))]
  expected = json.loads((shared / "videos/broken/expected.json").read_text())
  usable = {f"broken/{name}" for name, wish in expected.items() if wish["outcome"] != "quarantine"}
  assert set(names) == usable | {"a/z.mp4", "b.mp4", "c/d/e.MP4"}
  entries = quarantine.read(videos / "quarantine.jsonl")
  assert len(entries) == len(source.refused) == len(expected) - len(usable) + 1
  assert {(e.source, e.reason) for e in entries} == {(v.source, v.reason) for v in source.refused}
  for k in range(len(source)):
    assert source.frames(k, np.array([0.0, 0.5]), 8, 8).shape == (2, 8, 8, 3)


def test_folders_without_anything_to_use_say_so(tmp_path: pathlib.Path, shared: pathlib.Path) -> None:
  with pytest.raises(errors.DataError, match="no folder"):
    folder.FolderSource(tmp_path / "missing")
  (tmp_path / "readme.txt").write_text("")
  with pytest.raises(errors.DataError, match="holds no video file"):
    folder.FolderSource(tmp_path)
  shutil.copy(shared / "videos/broken/zero_bytes.mp4", tmp_path)
  shutil.copy(shared / "videos/broken/png_renamed.mp4", tmp_path)
  with pytest.raises(errors.DataError, match="1 no_video_stream, 1 unreadable"):
    folder.FolderSource(tmp_path, tmp_path / "q.jsonl")
  assert len(quarantine.read(tmp_path / "q.jsonl")) == 2  # the list is written all the same


def test_small_and_short_videos_can_be_refused(videos: pathlib.Path) -> None:
  (videos / "long.mp4").write_bytes(clip(5, 20))
  source = folder.FolderSource(videos, min_frames=11)
  assert len(source) == 1 and {v.reason for v in source.refused} == {"too_short"}
  with pytest.raises(errors.DataError, match="4 too_small"):
    folder.FolderSource(videos, min_side=25)


# ---- table ----------------------------------------------------------------------------------------------------------

KOALA = """videoID,url,timestamp,caption,clarity_score,aesthetic_score,motion_score,video_training_suitability_score
film_0,b.mp4,"['0:00:00.000', '0:00:00.500']","A grey, square.",0.9,4.5,12.25,3.5
film_1,b.mp4,"['0:00:00.500', '0:00:01.000']",The same,,4.25,0.5,2.5
"""


def test_released_koala_columns(videos: pathlib.Path) -> None:
  (videos / "koala.csv").write_text(KOALA)
  source = table.TableSource(videos / "koala.csv")
  assert isinstance(source, ClipSource) and len(source) == 2
  first, second = source.info(0), source.info(1)
  assert (first.video_id, first.index, second.index) == ("film", 0, 1)
  assert (first.caption, first.num_frames, first.duration_s) == ("A grey, square.", 5, pytest.approx(0.5))
  assert {name: score.value for name, score in first.scores.items()} == {
    "clarity": 0.9,
    "aesthetic": 4.5,
    "motion": 12.25,
    "vtss": 3.5,
  }
  assert "clarity" not in second.scores
  # Frames 0 to 4 belong to the first clip, 5 to 9 to the second, whatever time is asked for.
  assert [level(source, 0, t) for t in (0.0, 0.21, 3.0)] == pytest.approx([20, 40, 60], abs=2)
  assert [level(source, 1, t) for t in (0.0, 0.21, 3.0)] == pytest.approx([70, 90, 110], abs=2)
  assert pickle.loads(pickle.dumps(source)).info(1) == second


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_the_three_formats_agree(videos: pathlib.Path, suffix: str) -> None:
  rows = [{"url": "b.mp4", "caption": "1"}, {"url": str(videos / "a/z.mp4"), "caption": "2"}]
  path = videos / f"t{suffix}"
  if suffix == ".csv":
    path.write_text("url,caption\n" + "".join(f"{r['url']},{r['caption']}\n" for r in rows))
  elif suffix == ".jsonl":
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  else:
    pq.write_table(pa.Table.from_pylist(rows), path)
  source = table.TableSource(path)
  assert [source.info(k).caption for k in range(2)] == ["1", "2"]
  assert [level(source, k) for k in range(2)] == pytest.approx([20, 60], abs=2)
  assert source.info(0).num_frames == 10


def test_unknown_columns_are_named(videos: pathlib.Path) -> None:
  (videos / "t.csv").write_text("url,captoin,matching_score\nb.mp4,x,0.4\n")
  with pytest.raises(errors.DataError, match=r"'captoin'; did you mean 'caption'.*'matching_score'"):
    table.TableSource(videos / "t.csv")
  assert len(table.TableSource(videos / "t.csv", ignore=["captoin", "matching_score"])) == 1
  (videos / "t.csv").write_text("caption\nx\n")
  with pytest.raises(errors.DataError, match="no column 'url'"):
    table.TableSource(videos / "t.csv")


def test_rows_that_are_no_clip_are_refused_with_their_number(videos: pathlib.Path, shared: pathlib.Path) -> None:
  shutil.copy(shared / "videos/broken/zero_bytes.mp4", videos)
  rows = [
    ("b.mp4", ""),
    ("https://example.org/v?x=1", ""),
    ("../videos/b.mp4", ""),
    ("zero_bytes.mp4", ""),
    ("missing.mp4", ""),
    ("", ""),
    ("b.mp4", "[0, 1]"),
    ("b.mp4", "['0:00:05.000', '0:00:06.000']"),
    ("b.mp4", "['0:00:00.000', '0:00:09.000']"),
    ("b.mp4", "['0:00:00.000', '0:00:01.400']"),  # half a second of slack
  ]
  pq.write_table(pa.Table.from_pylist([{"url": u, "timestamp": t} for u, t in rows]), videos / "t.parquet")
  source = table.TableSource(videos / "t.parquet", quarantine=videos / "q.jsonl")
  assert len(source) == 2 and source.info(1).duration_s == pytest.approx(1.0)
  found = {int(v.source.split("row ")[1].split(":")[0]): v.reason for v in source.refused}
  assert found == {
    2: "unreadable",
    3: "hostile_name",
    4: "unreadable",
    5: "unreadable",
    6: "unreadable",
    7: "unreadable",
    8: "too_short",
    9: "too_short",
  }
  assert len(quarantine.read(videos / "q.jsonl")) == 8
  pq.write_table(pa.Table.from_pylist([{"url": "http://a/b"}]), videos / "t.parquet")
  with pytest.raises(errors.DataError, match="kling fetch"):
    table.TableSource(videos / "t.parquet")


def test_times_are_those_of_a_player(shared: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """The transport stream starts at 1.48 s of its own clock; a player calls that 0."""
  row = {"url": "juggle.ts", "timestamp": "['0:00:01.000', '0:00:02.000']"}
  pq.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
  source = table.TableSource(tmp_path / "t.parquet", root=shared / "videos/derived")
  listed = list(decode.iterate(shared / "videos/derived/juggle.ts", size=(27, 48)))
  np.testing.assert_array_equal(source.frames(0, np.array([0.0]), 27, 48)[0], listed[24][2])


def test_the_table_of_a_set_reads_back_as_a_table(videos: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """clips.parquet of a set that was cut from a video gives the same frames from the video itself."""
  path = videos / "b.mp4"
  info = decode.probe(path)
  middle = info.end_pts // 2
  with records.RecordWriter(tmp_path / "set", "test") as writer:
    for k, span in enumerate([(0, middle), (middle, info.end_pts)]):
      name = record.clip_id(record.content_hash(path), *span, info.time_base, "test")
      clip = record.ClipRecord(name, "film", str(path), *span, str(info.time_base), 10.0, 32, 24, 5, index=k)
      writer.write(clip, cut.cut(path, *span).media)
  ours, original = records.RecordSource(tmp_path / "set"), table.TableSource(tmp_path / "set" / clip_table.TABLE)
  for k in range(2):
    assert (ours.info(k).num_frames, ours.info(k).index) == (original.info(k).num_frames, original.info(k).index)
    times = np.array([0.0, 0.25, 0.4])
    difference = ours.frames(k, times, 8, 8).astype(int) - original.frames(k, times, 8, 8)
    assert np.abs(difference).max() <= 2


# ---- by name --------------------------------------------------------------------------------------------------------


def test_sources_are_opened_by_what_lies_there(videos: pathlib.Path, tmp_path: pathlib.Path) -> None:
  (videos / "koala.csv").write_text(KOALA)
  with records.RecordWriter(tmp_path / "set", "test") as writer:
    writer.write(record.ClipRecord("id", "v", "s", 0, 10, "1/10", 10.0, 32, 24, 10), clip(20))
  opened = {
    str(videos): folder.FolderSource,
    str(videos / "koala.csv"): table.TableSource,
    str(tmp_path / "set"): records.RecordSource,
    str(tmp_path / "set/records"): records.RecordSource,
  }
  for spec, kind in opened.items():
    assert type(sources.open_source(spec)) is kind, spec
    assert type(sources.open_source({"source": spec})) is kind
  assert type(sources.open_source(videos)) is folder.FolderSource
  world = sources.open_source("worlds:shapes-v1?count=3&seed=5")
  assert len(world) == 3 and world.fingerprint != sources.open_source("worlds:shapes-v1?count=3&seed=6").fingerprint
  options = {"source": str(videos), "quarantine": str(tmp_path / "q.jsonl"), "min_frames": 5}
  assert len(sources.open_source(options)) == 3


@pytest.mark.parametrize(
  ("spec", "kind", "words"),
  [
    ("missing-folder", errors.DataError, "does not exist"),
    (__file__, errors.UsageError, "of another kind"),
    ("worlds:shapes-v1?cuont=3", errors.UsageError, "did you mean 'count'"),
    ("worlds:shapes-v1?count=-3", errors.UsageError, "whole number"),
    ({"folder": "x"}, errors.UsageError, "needs the key 'source'"),
    ({"source": "worlds:shapes-v1", "colour": 1}, errors.UsageError, "colour"),
  ],
)
def test_names_of_no_kind_are_explained(spec, kind: type[Exception], words: str) -> None:
  with pytest.raises(kind, match=words):
    sources.open_source(spec)
