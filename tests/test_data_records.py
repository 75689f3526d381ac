"""Clip sets on disk: whole or not at all, the table and the records agree, damage is found."""

import concurrent.futures
import dataclasses
import functools
import pathlib
import pickle
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kling_jax import errors
from kling_jax.data import encode, record, records
from kling_jax.data.source import ClipSource, Score

FRAMES, HEIGHT, WIDTH = 4, 32, 48


@functools.cache
def media(number: int) -> bytes:
  """Four grey frames of level 40 + 4 * number."""
  return encode.encode([np.full((HEIGHT, WIDTH, 3), 40 + 4 * number, np.uint8)] * FRAMES, fps=8)


def clip(number: int, **changes: object) -> record.ClipRecord:
  values: dict = {
    "clip_id": record.clip_id(record.content_hash(media(number)), 0, FRAMES, "1/8", "test"),
    "video_id": "film",
    "index": number,
    "source": "film.mp4",
    "start_pts": FRAMES * number,
    "end_pts": FRAMES * (number + 1),
    "time_base": "1/8",
    "fps": 8.0,
    "width": WIDTH,
    "height": HEIGHT,
    "num_frames": FRAMES,
    "caption": f"clip {number}, “ü”",
    "scores": {"motion": Score(1.5 * number, "flow", "2"), "clarity": Score(0.5, "sharp", "1")},
    "transitions": (record.Transition(3, 4, "cut", 0.9),),
    "vtss": None if number == 1 else 3.25,
  }
  return record.ClipRecord(**(values | changes))


def write(folder: pathlib.Path, numbers=range(5), recipe: str = "test", shard_bytes: int = 6000, **changes) -> None:
  with records.RecordWriter(folder, recipe, shard_bytes=shard_bytes) as writer:
    for number in numbers:
      writer.write(clip(number, **changes), media(number))


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
  write(tmp_path / "set")
  return tmp_path / "set"


def shards(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in (folder / "records").glob("*.array_record"))


def test_what_is_written_is_read_in_order(folder: pathlib.Path) -> None:
  source = records.RecordSource(folder)
  assert isinstance(source, ClipSource) and len(source) == 5
  for number in range(5):
    assert source.record(number) == clip(number)
    assert source.media(number) == media(number)
    frames = source.frames(number, np.array([0.0, 0.3]), 16, 24)
    assert frames.shape == (2, 16, 24, 3)
    assert abs(frames.mean() - (40 + 4 * number)) < 2
  with pytest.raises(IndexError):
    source.info(5)


def test_shards_are_bounded(folder: pathlib.Path) -> None:
  assert len(shards(folder)) > 1
  sizes = [(folder / "records" / name).stat().st_size for name in shards(folder)]
  assert max(sizes) <= 2**17  # 6000 bytes of records between two of ArrayRecord's blocks of 64 KiB


def test_only_kept_clips_by_default(tmp_path: pathlib.Path) -> None:
  with records.RecordWriter(tmp_path, "test") as writer:
    for number in range(4):
      writer.write(clip(number, status="kept" if number % 2 else "dropped"), media(number))
  kept, every = records.RecordSource(tmp_path), records.RecordSource(tmp_path, status=None)
  assert [kept.info(k).index for k in range(len(kept))] == [1, 3]
  assert len(every) == 4 and len(records.RecordSource(tmp_path, "dropped")) == 2
  assert kept.fingerprint != every.fingerprint


def test_nothing_kept_is_an_error(tmp_path: pathlib.Path) -> None:
  write(tmp_path, status="dropped")
  with pytest.raises(errors.DataError, match="'dropped': 5"):
    records.RecordSource(tmp_path)


def test_table_has_koalas_columns_first(folder: pathlib.Path) -> None:
  table = pq.read_table(folder / "clips.parquet")
  assert table.schema.names[:8] == [
    "videoID",
    "url",
    "timestamp",
    "caption",
    "clarity_score",
    "aesthetic_score",
    "motion_score",
    "video_training_suitability_score",
  ]
  assert {f.name for f in dataclasses.fields(record.ClipRecord)} <= set(table.schema.names)
  row = table.to_pylist()[2]
  assert row["videoID"] == "film_2" and row["url"] == "film.mp4"
  assert row["timestamp"] == "['0:00:01.000', '0:00:01.500']"
  assert (row["clarity_score"], row["aesthetic_score"], row["motion_score"]) == (0.5, None, 3.0)


def test_copies_travel_to_other_processes_and_threads(folder: pathlib.Path) -> None:
  source = pickle.loads(pickle.dumps(records.RecordSource(folder)))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(source.media, [k % 5 for k in range(200)]))
  assert found == [media(k % 5) for k in range(200)]


def test_a_copy_refuses_a_set_that_changed(folder: pathlib.Path) -> None:
  copy = pickle.dumps(records.RecordSource(folder))
  write(folder, [5])
  with pytest.raises(errors.DataError, match="rewritten"):
    pickle.loads(copy).info(0)


def test_appending_wants_the_same_recipe(folder: pathlib.Path) -> None:
  before = shards(folder)
  with pytest.raises(errors.DataError, match="recipe 'test', not 'other'"):
    write(folder, [6], recipe="other")
  assert shards(folder) == before
  write(folder, [5, 6])
  assert len(records.RecordSource(folder)) == 7 and records.verify(folder).ok


def test_a_clip_stands_once_in_a_set(folder: pathlib.Path) -> None:
  with pytest.raises(errors.DataError, match="already"):
    write(folder, [5, 2])
  assert len(records.RecordSource(folder)) == 5 and records.verify(folder).ok  # clip 5 went with its writer


def test_one_writer_at_a_time(folder: pathlib.Path) -> None:
  with records.RecordWriter(folder, "test"), pytest.raises(errors.DataError, match="another writer"):
    records.RecordWriter(folder, "test")
  records.RecordWriter(folder, "test").close()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import test_data_records as t
writer = t.records.RecordWriter(sys.argv[1], "test", shard_bytes=1)
for number in range(10, 13):
  writer.write(t.clip(number), t.media(number))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_a_killed_writer_leaves_no_half_set(tmp_path: pathlib.Path, existing: bool) -> None:
  folder = tmp_path / "set"
  if existing:
    write(folder)
    fingerprint = records.RecordSource(folder).fingerprint
  command = [sys.executable, "-c", KILLED, str(folder), str(pathlib.Path(__file__).parent)]
  assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
  if existing:
    assert records.RecordSource(folder).fingerprint == fingerprint and records.verify(folder).ok
  else:
    with pytest.raises(errors.DataError, match="never came to its end"):
      records.RecordSource(folder)
  count = len(shards(folder))
  write(folder, [20])  # The next writer clears up.
  assert records.verify(folder).ok and len(records.RecordSource(folder)) == (6 if existing else 1)
  assert len(shards(folder)) == count - 3 + 1


def test_an_error_in_the_with_block_writes_nothing(tmp_path: pathlib.Path) -> None:
  with pytest.raises(KeyError), records.RecordWriter(tmp_path, "test", shard_bytes=1) as writer:
    writer.write(clip(0), media(0))
    raise KeyError
  assert shards(tmp_path) == [] and not (tmp_path / "clips.parquet").exists()


def test_commits_add_up(tmp_path: pathlib.Path) -> None:
  with records.RecordWriter(tmp_path, "test") as writer:
    writer.write(clip(0), media(0))
    writer.commit()
    assert len(records.RecordSource(tmp_path)) == 1
    writer.write(clip(1), media(1))
  assert len(records.RecordSource(tmp_path)) == 2 and records.verify(tmp_path).ok


def test_verify_finds_a_flipped_byte(folder: pathlib.Path) -> None:
  path = folder / "records" / shards(folder)[0]
  data = bytearray(path.read_bytes())
  data[data.index(media(0)) + 100] ^= 1
  path.write_bytes(data)
  report = records.verify(folder)
  assert not report.ok and clip(0).clip_id in report.problems[0]
  with pytest.raises(errors.DataError, match="cannot be read"):
    records.RecordSource(folder).media(0)


def test_verify_finds_cut_and_missing_shards(folder: pathlib.Path) -> None:
  first, second = shards(folder)[:2]
  path = folder / "records" / first
  path.write_bytes(path.read_bytes()[:-100])
  (folder / "records" / second).unlink()
  text = records.verify(folder).text()
  assert "damaged or cut" in text and "missing" in text


def test_verify_finds_a_table_that_disagrees(folder: pathlib.Path) -> None:
  table = pq.read_table(folder / "clips.parquet")
  captions = [*table["caption"].to_pylist()[:-1], "edited by hand"]
  place = table.schema.get_field_index("caption")
  pq.write_table(table.set_column(place, "caption", pa.array(captions)), folder / "clips.parquet")
  report = records.verify(folder)
  assert len(report.problems) == 1 and "edited by hand" in report.problems[0]


def test_verify_finds_media_that_differ_from_the_header(tmp_path: pathlib.Path) -> None:
  with records.RecordWriter(tmp_path, "test") as writer:
    writer.write(clip(0, num_frames=FRAMES + 1), media(0))
    writer.write(clip(1), b"no video")
  problems = records.verify(tmp_path).problems
  assert "num_frames = 4, the header says 5" in problems[0] and "unreadable" in problems[1]
  assert records.verify(tmp_path, decode_media=False).ok


def test_rewrite_changes_headers_and_keeps_media(folder: pathlib.Path) -> None:
  records.rewrite(folder, lambda c: dataclasses.replace(c, status="dropped" if c.index == 2 else "kept"))
  source = records.RecordSource(folder)
  assert [source.info(k).index for k in range(len(source))] == [0, 1, 3, 4]
  assert records.verify(folder).ok and source.media(2) == media(3)


def test_a_failing_rewrite_changes_nothing(folder: pathlib.Path) -> None:
  before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

  def update(c: record.ClipRecord) -> record.ClipRecord:
    if c.index == 3:
      raise ValueError
    return dataclasses.replace(c, status="dropped")

  with pytest.raises(ValueError):
    records.rewrite(folder, update)
  assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_reindex_rebuilds_the_table(folder: pathlib.Path) -> None:
  before = pq.read_table(folder / "clips.parquet")
  (folder / "clips.parquet").unlink()
  with pytest.raises(errors.DataError, match="reindex"):
    records.RecordSource(folder)
  records.reindex(folder, "test")
  assert pq.read_table(folder / "clips.parquet").equals(before, check_metadata=True)


def test_a_foreign_table_is_refused(tmp_path: pathlib.Path) -> None:
  pq.write_table(pa.table({"a": [1]}), tmp_path / "clips.parquet")
  with pytest.raises(errors.DataError, match="no table of a clip set"):
    records.RecordSource(tmp_path)
  (tmp_path / "clips.parquet").write_bytes(b"PAR1 nonsense")
  with pytest.raises(errors.DataError, match="no table of a clip set"):
    records.RecordSource(tmp_path)
