"""WebDataset tars in and out: read by the webdataset library, equal bytes, resumed exports, hostile members."""

import csv
import dataclasses
import gzip
import io
import json
import os
import pathlib
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kling_jax import cli, files
from kling_jax.data import encode, export, folder, koala, quarantine, record, records, table
from kling_jax.data import open as sources
from kling_jax.data import webdataset as tars
from kling_jax.data.source import ClipSource, Score
from kling_jax.errors import DataError, UsageError

CLIPS = 5


@pytest.fixture(scope="module")
def media() -> list[bytes]:
  return [encode.encode([np.full((24, 32, 3), 40 * k, np.uint8)] * 10, fps=10) for k in range(CLIPS)]


@pytest.fixture(scope="module")
def clips(media: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  top = tmp_path_factory.mktemp("set")
  with records.RecordWriter(top, "r") as writer:
    for k, data in enumerate(media):
      clip = record.ClipRecord(f"{k:032x}", "v.mp4", "/v.mp4", 10 * k, 10 * k + 10, "1/10", 10.0, 32, 24, 10, k)
      clip = dataclasses.replace(
        clip, caption=f'Clip {k}, "quoted"\n<b>', scores={"motion": Score(k / 10, "flow", "1")}
      )
      writer.write(dataclasses.replace(clip, status="dropped" if k == 3 else "kept", vtss=3.5), data)
  return top


def tar(path: pathlib.Path, members: dict[str, bytes] | list[tuple[tarfile.TarInfo | str, bytes]]) -> pathlib.Path:
  with tarfile.open(path, "w") as archive:
    for name, data in members.items() if isinstance(members, dict) else members:
      info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
  return path


# ---- out -----------------------------------------------------------------------------------------------------------


def test_an_export_is_what_the_webdataset_library_reads(clips, media, tmp_path) -> None:
  done = export.webdataset(clips, tmp_path / "out", shard_clips=2)
  assert (done.clips, len(done.files)) == (4, 2)
  urls = [str(tmp_path / "out" / name) for name in done.files]
  samples = list(webdataset.WebDataset(urls, shardshuffle=False))
  kept = [(clip, data) for clip, data in records.read_all(clips) if clip.status == "kept"]
  assert [sample["__key__"] for sample in samples] == [clip.clip_id for clip, _ in kept]
  for sample, (clip, data) in zip(samples, kept, strict=True):
    assert sample["mp4"] == data and sample["txt"].decode() == clip.caption
    assert record.parse_header(sample["json"]) == clip
  index = json.loads((tmp_path / "out" / "index.json").read_text())
  assert [shard["nsamples"] for shard in index["shardlist"]] == [2, 2] and index["kling"]["complete"]
  for shard in index["shardlist"]:
    path = tmp_path / "out" / shard["url"]
    assert (path.stat().st_size, record.content_hash(path)) == (shard["filesize"], shard["sha256"])
    with tarfile.open(path) as archive:
      assert all((m.mtime, m.uid, m.uname, m.mode) == (0, 0, "", 0o644) for m in archive)


def test_what_is_exported_reads_back_as_the_same_clips(clips, tmp_path) -> None:
  export.export(clips, tmp_path / "out", "webdataset", dropped=True)
  source, true = sources.open_source(tmp_path / "out"), records.RecordSource(clips)
  assert isinstance(source, ClipSource) and isinstance(source, tars.WebDatasetSource)
  assert [source.info(k) for k in range(len(source))] == [true.info(k) for k in range(len(true))]
  assert source.fingerprint == true.fingerprint and len(source) == 4
  copy = pickle.loads(pickle.dumps(source))
  times_s = np.array([0.0, 0.5])
  assert (copy.frames(2, times_s, 8, 8) == true.frames(2, times_s, 8, 8)).all()


def test_an_export_that_was_killed_goes_on_to_the_same_bytes(clips, tmp_path, monkeypatch) -> None:
  export.webdataset(clips, tmp_path / "whole", shard_clips=1)
  shards = []

  def killed(path, value):
    shards.append(path)
    if len(shards) == 3:
      raise KeyboardInterrupt  # the third tar lies there, but no index knows of it
    return whole(path, value)

  whole = files.write_json
  with monkeypatch.context() as patch:
    patch.setattr(files, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
      export.webdataset(clips, tmp_path / "part", shard_clips=1)
  assert not json.loads((tmp_path / "part" / "index.json").read_text())["kling"]["complete"]
  done = export.webdataset(clips, tmp_path / "part", shard_clips=1)
  assert done.kept_before == 2 and done.clips == 4
  for path in (tmp_path / "whole").iterdir():
    assert path.read_bytes() == (tmp_path / "part" / path.name).read_bytes()
  assert export.webdataset(clips, tmp_path / "part", shard_clips=1).kept_before == 4
  with pytest.raises(DataError, match="an export of another shard_clips"):
    export.webdataset(clips, tmp_path / "part", shard_clips=2)
  (tmp_path / "part" / "shard-000001.tar").unlink()
  with pytest.raises(DataError, match=r"shard-000001\.tar: missing"):
    export.webdataset(clips, tmp_path / "part", shard_clips=1)


def test_no_tar_is_larger_than_asked(clips, tmp_path) -> None:
  one = (export.webdataset(clips, tmp_path / "one", shard_clips=1)).bytes // 4
  done = export.webdataset(clips, tmp_path / "out", shard_bytes=2 * one)
  sizes = [(tmp_path / "out" / name).stat().st_size for name in done.files]
  assert len(sizes) < 4 and max(sizes) <= 2 * one
  assert len(export.webdataset(clips, tmp_path / "tiny", shard_bytes=1).files) == 4  # a clip is never cut in two


def test_the_verb_exports(clips, tmp_path, capsys) -> None:
  flags = ["data", "export", "--input", str(clips)]
  assert cli.main([*flags, "--output", str(tmp_path / "out"), "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["clips"] == 4
  assert cli.main([*flags, "--output", str(tmp_path / "k.csv"), "--format", "koala", "--dropped"]) == 0
  assert capsys.readouterr().out.startswith("5 clips in 1 files")
  assert cli.main(flags) == 2 and "needs --output" in capsys.readouterr().err


def test_exports_refuse_folders_of_others(clips, tmp_path) -> None:
  tar(tmp_path / "a.tar", {"x.txt": b""})
  with pytest.raises(DataError, match="no export of ours"):
    export.webdataset(clips, tmp_path)
  with pytest.raises(UsageError, match="is the set itself"):
    export.webdataset(clips, clips)
  with pytest.raises(UsageError, match="known: koala, webdataset"):
    export.export(clips, tmp_path, "zip")


def test_ids_of_strangers_are_no_names_in_tars(media, tmp_path) -> None:
  with records.RecordWriter(tmp_path / "set", "r") as writer:
    writer.write(record.ClipRecord("../../etc/passwd", "v", "/v", 0, 10, "1/10", 10.0, 32, 24, 10), media[0])
  export.webdataset(tmp_path / "set", tmp_path / "out")
  with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
    assert all("/" not in name and ".." not in name for name in archive.getnames())
  assert sources.open_source(tmp_path / "out").info(0).clip_id == "../../etc/passwd"


def test_koala_columns_go_out_and_come_back(clips, media, tmp_path) -> None:
  (tmp_path / "v.mp4").write_bytes(encode.encode([np.full((24, 32, 3), 9, np.uint8)] * 50, fps=10))
  export.export(clips, tmp_path / "koala.csv", "koala")
  rows = csv.DictReader((tmp_path / "koala.csv").open(newline=""))
  assert tuple(rows.fieldnames) == koala.COLUMNS
  found = list(rows)
  assert [row["videoID"] for row in found] == ["v.mp4_0", "v.mp4_1", "v.mp4_2", "v.mp4_4"]
  assert found[1]["caption"] == 'Clip 1, "quoted"\n<b>' and found[1]["aesthetic_score"] == ""
  assert found[1]["timestamp"] == "['0:00:01.000', '0:00:02.000']"
  text = (tmp_path / "koala.csv").read_text().replace("/v.mp4", "v.mp4")
  (tmp_path / "koala.csv").write_text(text)
  source = table.TableSource(tmp_path / "koala.csv")
  assert [source.info(k).scores["motion"].value for k in range(4)] == [0.0, 0.1, 0.2, 0.4]
  assert source.info(0).scores["vtss"].value == 3.5
  with pytest.raises(UsageError, match=r"one \.csv file"):
    export.export(clips, tmp_path / "koala.parquet", "koala")


# ---- in ------------------------------------------------------------------------------------------------------------


def test_tars_of_others_are_read_by_key(media, tmp_path) -> None:
  members = {
    "000.mp4": media[0], "000.txt": b"First.", "000.json": b'{"caption": "not this", "duration": 3}',
    "sub/001.webm": media[1], "sub/001.json": b'{"subject": "a cat", "action": "sleeps"}',
    "002.seg.mp4": media[2], "002.json": b"[1, 2]", "README": b"hi", "._000.mp4": b"", "__MACOSX.txt": b"",
  }  # fmt: skip
  source = tars.WebDatasetSource(tar(tmp_path / "a.tar", members))
  assert [source.info(k).video_id for k in range(3)] == ["000", "sub/001", "002"]
  assert [source.info(k).caption for k in range(3)] == ["First.", "a cat sleeps.", ""]
  (tmp_path / "000.mp4").write_bytes(media[0])
  assert source.info(0).clip_id == folder.one_file(tmp_path / "000.mp4").info(0).clip_id
  assert source.refused == ()
  assert float(source.frames(1, np.array([0.0]), 8, 8).mean()) == pytest.approx(40, abs=2)


def test_tars_beside_videos_are_ambiguous(media, tmp_path) -> None:
  tar(tmp_path / "a.tar", {"0.mp4": media[0]})
  (tmp_path / "b.mp4").write_bytes(media[0])
  with pytest.raises(DataError, match=r"holds tars \(a\.tar\) and videos .*b\.mp4"):
    sources.open_source(tmp_path)


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, target
  return info, b""


def test_hostile_members_are_refused_and_the_rest_is_used(media, tmp_path) -> None:
  good = [("good.mp4", media[0]), ("good.txt", b"Fine.")]
  bad = [
    ("/etc/abs.mp4", media[1]), ("../../up.mp4", media[1]), ("a/../../up.mp4", media[1]), ("new\nline.mp4", media[1]),
    ("rtl\u202egpj.mp4", media[1]), ("x" * 10_000 + ".mp4", media[1]),
    special("link.mp4", tarfile.SYMTYPE, "/etc/passwd"), special("hard.mp4", tarfile.LNKTYPE, "good.mp4"),
    special("dev.mp4", tarfile.CHRTYPE), special("pipe.mp4", tarfile.FIFOTYPE),
  ]  # fmt: skip
  rest = [special("dir", tarfile.DIRTYPE), ("good.mp4", media[2]), ("noise.mp4", b"no video"), ("only.txt", b"words")]
  rest += [("two.mp4", media[3]), ("two.webm", media[3])]
  log = tmp_path / "quarantine.jsonl"
  source = tars.WebDatasetSource(tar(tmp_path / "a.tar", good + bad + rest), log)
  assert [source.info(k).video_id for k in range(len(source))] == ["good", "two"]
  entries = quarantine.read(log)
  reasons = [entry.reason for entry in entries]
  assert reasons.count("hostile_name") == len(bad) and len(entries) == len(bad) + 4
  assert sorted(set(reasons)) == ["hostile_name", "no_video_stream", "unreadable"]
  assert all(len(entry.source) < 2000 and "\u202e" not in json.dumps(dataclasses.asdict(entry)) for entry in entries)
  assert sorted(os.listdir(tmp_path)) == ["a.tar", "quarantine.jsonl"]  # nothing was unpacked


def test_damaged_tars_give_what_lies_before_the_damage(media, tmp_path) -> None:
  whole = tar(tmp_path / "a.tar", {f"{k}.mp4": media[k] for k in range(3)}).read_bytes()
  with tarfile.open(tmp_path / "a.tar") as archive:
    last = archive.getmembers()[2]
  for name, data in {
    "cut in media": whole[: last.offset_data + 100],
    "cut in header": whole[: last.offset + 100],
    "header overwritten": whole[: last.offset] + b"\xff" * 512 + whole[last.offset + 512 :],
  }.items():
    (tmp_path / "b.tar").write_bytes(data)
    source = tars.WebDatasetSource(tmp_path / "b.tar")
    assert [source.info(k).video_id for k in range(len(source))] == ["0", "1"], name
    assert [verdict.reason for verdict in source.refused] == ["truncated"], name
  (tmp_path / "b.tar").write_bytes(gzip.compress(whole))
  with pytest.raises(DataError, match="1 unreadable.*compressed"):
    tars.WebDatasetSource(tmp_path / "b.tar")
  (tmp_path / "b.tar").write_bytes(b"")
  with pytest.raises(DataError, match="holds no clip"):
    tars.WebDatasetSource(tmp_path / "b.tar")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=20))
def test_flipped_bytes_never_break_the_scan(tmp_path, flips) -> None:
  path = tmp_path / "f.tar"
  if not (tmp_path / "base.tar").exists():
    tar(tmp_path / "base.tar", {f"{k}.{end}": b"x" * 700 for k in range(4) for end in ("mp4", "txt")})
  data = bytearray((tmp_path / "base.tar").read_bytes())
  for place, value in flips:
    data[place % len(data)] = value
  path.write_bytes(data)
  samples, refused = tars.scan(str(path))
  for sample in samples:
    assert len(sample.media.read()) == sample.media.size and ".." not in sample.key.split("/")
  assert all(verdict.reason in quarantine.REASONS for verdict in refused)
