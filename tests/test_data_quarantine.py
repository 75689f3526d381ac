"""Which files are used: every damaged file ends as expected, names are checked, the list survives kills."""

import json
import os
import pathlib
import pickle

import av
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from kling_jax import errors
from kling_jax.data import decode, encode, quarantine, reasons

BROKEN = pathlib.Path(__file__).parents[2] / "shared/videos/broken"
EXPECTED = json.loads((BROKEN / "expected.json").read_text()) if BROKEN.is_dir() else {}
REASONS = {
  "garbage_before_mp4.mp4": "unreadable",
  "header_only.mp4": "truncated",
  "html_error_page.mp4": "unreadable",
  "moov_without_mdat.mp4": "zero_frames",
  "png_renamed.mp4": "no_video_stream",
  "random_bytes.mkv": "unreadable",
  "text_renamed.mp4": "unreadable",
  "truncated.webm": "zero_frames",
  "truncated_no_moov.mp4": "truncated",
  "zero_bytes.mp4": "unreadable",
  "zero_filled.mp4": "unreadable",
}


@pytest.fixture(scope="module")
def clip() -> bytes:
  rng = np.random.default_rng(0)
  return encode.encode(rng.integers(0, 255, (8, 32, 32, 3), np.uint8), fps=10)


@pytest.mark.parametrize("name", EXPECTED)
def test_damaged_files_end_as_expected(name: str) -> None:
  verdict = quarantine.classify(BROKEN / name)
  assert verdict.outcome == EXPECTED[name]["outcome"], verdict
  if verdict.outcome == "quarantine":
    assert verdict.reason == REASONS[name] and verdict.detail
  else:
    assert verdict.info is not None and verdict.info.num_frames >= EXPECTED[name]["min_frames"]
    frames = sum(1 for _ in decode.iterate(BROKEN / name, size=(8, 8)))
    assert frames == verdict.info.num_frames  # what is promised can be had
    assert verdict.info.salvaged == (verdict.outcome == "salvage")
  # The quick look quarantines the same files for the same reasons.
  quick = quarantine.classify(BROKEN / name, decode=False)
  assert (quick.outcome == "quarantine", quick.reason) == (verdict.outcome == "quarantine", verdict.reason)


def test_valid_oddities(shared: pathlib.Path) -> None:
  folder = shared / "videos/derived"
  assert quarantine.classify(folder / "audio_only.mp4").reason == "no_video_stream"
  assert quarantine.classify(folder / "single_frame.mp4").outcome == "accept"
  assert quarantine.classify(folder / "single_frame.mp4", min_frames=2).reason == "too_short"
  assert quarantine.classify(folder / "three_frames.mp4", min_side=720).reason == "too_small"
  assert quarantine.classify(folder / "three_frames.mp4", limits=decode.Limits(seconds=0)).reason == "timeout"
  assert quarantine.classify(folder / "three_frames.mp4", limits=decode.Limits(pixels=99)).reason == "out_of_memory"


def test_a_codec_that_nobody_knows(tmp_path: pathlib.Path, clip: bytes) -> None:
  (tmp_path / "a.mp4").write_bytes(clip.replace(b"avc1", b"zzz9").replace(b"avcC", b"zzzC"))
  assert quarantine.classify(tmp_path / "a.mp4").reason == "unsupported_codec"
  (tmp_path / "b.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\na.mp4\n#EXT-X-ENDLIST\n")
  assert quarantine.classify(tmp_path / "b.mp4").reason in ("unsupported_codec", "unreadable")


def test_titles_that_are_no_utf8_do_no_harm(tmp_path: pathlib.Path) -> None:
  with av.open(str(tmp_path / "a.mkv"), "w") as container:
    container.metadata["title"] = "cafeteria"
    stream = container.add_stream("ffv1", rate=5)
    stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv444p"
    container.mux(stream.encode(av.VideoFrame(16, 16, "yuv444p")))
    container.mux(stream.encode(None))
  media = (tmp_path / "a.mkv").read_bytes()
  assert b"cafeteria" in media
  (tmp_path / "a.mkv").write_bytes(media.replace(b"cafeteria", b"caf\xe9teria"))
  assert quarantine.classify(tmp_path / "a.mkv").outcome == "accept"


def test_what_is_no_file(tmp_path: pathlib.Path) -> None:
  os.mkfifo(tmp_path / "pipe.mp4")
  (tmp_path / "folder.mp4").mkdir()
  (tmp_path / "dangling.mp4").symlink_to("nowhere")
  for name in ("pipe.mp4", "folder.mp4", "dangling.mp4", "missing.mp4", "/dev/zero"):
    assert quarantine.classify(tmp_path / name).reason == "unreadable", name


HOSTILE = ["line\nbreak.mp4", "bell\x07.mp4", "esc\x1b[31m.mp4", "turned\u202e4pm.mp4", "next\u2028line.mp4"]
HARMLESS = [
  "-rf.mp4",
  "a b.mp4",
  "$(touch x).mp4",
  "a'b\"c.mp4",
  "…日本語.mp4",
  "..mp4",
  "a..b.mp4",
  "%s%d.mp4",
  "C:x.mp4",
]


def test_hostile_names_are_refused_and_harmless_ones_read(tmp_path: pathlib.Path, clip: bytes) -> None:
  for name in HOSTILE + HARMLESS:
    (tmp_path / name).write_bytes(clip)
    verdict = quarantine.classify(tmp_path / name)
    assert (verdict.reason == "hostile_name") == (name in HOSTILE), verdict
    assert verdict.outcome == ("quarantine" if name in HOSTILE else "accept")


def test_names_that_are_no_utf8(tmp_path: pathlib.Path, clip: bytes) -> None:
  name = os.fsencode(tmp_path) + b"/bad\xff.mp4"
  pathlib.Path(os.fsdecode(name)).write_bytes(clip)
  verdict = quarantine.classify(os.fsdecode(name))
  assert verdict.reason == "hostile_name" and verdict.source.endswith("bad\\xff.mp4")
  log = quarantine.Log(tmp_path / "q.jsonl")
  log.add(os.fsdecode(name), "hostile_name", verdict.detail)
  assert quarantine.read(tmp_path / "q.jsonl")[0].source == verdict.source


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_damage_of_any_kind_gives_a_verdict(clip: bytes, tmp_path_factory: pytest.TempPathFactory, data) -> None:
  """Bytes changed, cut, dropped: never an exception, always an outcome that decoding keeps."""
  media = bytearray(clip)
  for _ in range(data.draw(st.integers(0, 12))):
    media[data.draw(st.integers(0, len(media) - 1))] = data.draw(st.integers(0, 255))
  start, end = data.draw(st.integers(0, 40)), data.draw(st.integers(len(media) // 3, len(media)))
  path = tmp_path_factory.getbasetemp() / "damaged.mp4"
  path.write_bytes(media[start * data.draw(st.booleans()) : end])
  verdict = quarantine.classify(path)
  assert (verdict.reason in quarantine.REASONS) == (verdict.outcome == "quarantine")
  if verdict.outcome != "quarantine":
    assert verdict.info is not None
    assert sum(1 for _ in decode.iterate(path)) == verdict.info.num_frames
    assert decode.frames_at(path, np.linspace(0, verdict.info.duration_s, 3), 8, 8).shape == (3, 8, 8, 3)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  st.binary(max_size=300), st.sampled_from([b"", b"\x1aE\xdf\xa3", b"RIFF", b"GIF89a", b"FLV\x01", b"G"])
)
def test_noise_is_quarantined(tmp_path_factory: pytest.TempPathFactory, noise: bytes, magic: bytes) -> None:
  path = tmp_path_factory.getbasetemp() / "noise.mp4"
  path.write_bytes(magic + noise)
  assert quarantine.classify(path).outcome == "quarantine"


# ---- the list -------------------------------------------------------------------------------------------------------


def test_lines_have_the_contracts_keys(tmp_path: pathlib.Path) -> None:
  log = quarantine.Log(tmp_path / "deep/q.jsonl")
  log.add("a\nb.mp4", "hostile_name", "line break")
  log.add("c.mp4", "too_short", "é")
  log.add("c.mp4", "too_short", "é")  # once is enough
  lines = (tmp_path / "deep/q.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {"source": "a\nb.mp4", "reason": "hostile_name", "detail": "line break"},
    {"source": "c.mp4", "reason": "too_short", "detail": "é"},
  ]
  with pytest.raises(ValueError, match="no quarantine reason"):
    log.add("d.mp4", "boring", "")  # type: ignore[arg-type]


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(0, 300))
def test_a_line_cut_by_a_kill_is_dropped(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
  path = tmp_path_factory.mktemp("log") / "q.jsonl"
  log = quarantine.Log(path)
  for name in ("a", "b", "c"):
    log.add(name, "unreadable", "x" * 40)
  text = path.read_bytes()[:length]
  path.write_bytes(text)
  again = quarantine.Log(path)
  assert again.entries == log.entries[: text.count(b"\n")]
  again.add("d", "timeout", "")
  assert [entry.source for entry in quarantine.read(path)] == [*"abc"[: text.count(b"\n")], "d"]


def test_a_foreign_line_is_named(tmp_path: pathlib.Path) -> None:
  (tmp_path / "q.jsonl").write_text('{"source": "a", "reason": "timeout", "detail": ""}\nnonsense\n')
  with pytest.raises(errors.DataError, match="line 2"):
    quarantine.read(tmp_path / "q.jsonl")
  (tmp_path / "q.jsonl").write_text('{"source": "a", "reason": "boring", "detail": ""}\n')
  with pytest.raises(errors.DataError, match="unknown reason 'boring'"):
    quarantine.read(tmp_path / "q.jsonl")


def test_errors_cross_process_borders() -> None:
  error = pickle.loads(pickle.dumps(reasons.MediaError("a.mp4", "timeout", "slow")))
  assert (error.source, error.reason, error.detail) == ("a.mp4", "timeout", "slow")


def test_reasons_are_the_closed_list() -> None:
  contract = "unreadable truncated no_video_stream zero_frames decode_error too_short too_small timeout out_of_memory "
  contract += "unsupported_codec hostile_name"
  assert set(quarantine.REASONS) == set(contract.split())
