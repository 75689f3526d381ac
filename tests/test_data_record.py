"""The KLC1 record: what is packed comes back, and nothing that a stranger writes raises anything but DataError."""

import dataclasses
import fractions
import json
import math
import struct

import hypothesis
import hypothesis.strategies as st
import pytest

from kling_jax import errors
from kling_jax.data import koala, record
from kling_jax.data.source import Score

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.floats(-1e6, 1e6)


@st.composite
def records(draw: st.DrawFn) -> record.ClipRecord:
  start = draw(st.integers(-(2**40), 2**40))
  frames = st.integers(0, 10**6)
  edges = draw(st.lists(st.tuples(frames, frames, st.sampled_from(record.KINDS), st.floats(0, 1)), max_size=2))
  return record.ClipRecord(
    clip_id=draw(st.text("0123456789abcdef", min_size=1, max_size=32)),
    video_id=draw(TEXT),
    source=draw(TEXT),
    start_pts=start,
    end_pts=start + draw(st.integers(1, 2**40)),
    time_base=draw(st.sampled_from(["1/12800", "1001/30000", "1/90000", "2"])),
    fps=draw(st.floats(0.01, 1000)),
    width=draw(st.integers(1, 8192)),
    height=draw(st.integers(1, 8192)),
    num_frames=draw(st.integers(1, 10**6)),
    index=draw(st.integers(0, 10**6)),
    cut_before=draw(st.booleans()),
    prev_clip_id=draw(TEXT),
    source_start_s=draw(NUMBERS),
    subject=draw(TEXT),
    action=draw(TEXT),
    camera=draw(TEXT),
    caption=draw(TEXT),
    caption_tokens=draw(st.integers(0, 500)),
    caption_part_tokens=tuple(draw(st.lists(st.integers(0, 500), max_size=6))),
    captioner=draw(TEXT),
    scores=draw(st.dictionaries(TEXT, st.builds(Score, NUMBERS, TEXT, TEXT), max_size=3)),
    vtss=draw(st.none() | st.floats(1, 5)),
    transitions=tuple(record.Transition(min(a, b), max(a, b), kind, sure) for a, b, kind, sure in edges),
    status=draw(st.sampled_from(record.STATUSES)),
    status_reason=draw(TEXT),
    salvaged=draw(st.booleans()),
  )


def example(**changes: object) -> record.ClipRecord:
  values: dict = {
    "clip_id": "ab" * 16,
    "video_id": "film",
    "source": "/videos/film.mp4",
    "start_pts": 1024,
    "end_pts": 13824,
    "time_base": "1/12800",
    "fps": 25.0,
    "width": 640,
    "height": 360,
    "num_frames": 25,
  }
  return record.ClipRecord(**(values | changes))


def header_of(clip: record.ClipRecord) -> dict:
  return json.loads(record.header_json(clip))


def packed(header: object, media: bytes = b"") -> bytes:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return b"KLC1" + struct.pack("<I", len(text)) + text + media


@hypothesis.settings(deadline=None)
@hypothesis.given(records(), st.binary(max_size=50))
def test_what_is_packed_comes_back(clip: record.ClipRecord, media: bytes) -> None:
  data = record.pack(clip, media)
  assert record.unpack(data) == (clip, media)
  assert record.unpack_header(data) == clip
  assert record.pack(*record.unpack(data)) == data  # one record, one sequence of bytes


def test_layout_is_the_contract() -> None:
  data = record.pack(example(), b"media")
  assert data[:4] == b"KLC1"
  (length,) = struct.unpack("<I", data[4:8])
  header = json.loads(data[8 : 8 + length])
  assert data[8 + length :] == b"media"
  assert header["start_s"] == 1024 / 12800 and header["end_s"] == 13824 / 12800
  contract = (
    "clip_id video_id index cut_before prev_clip_id source start_pts end_pts time_base start_s end_s fps width "
  )
  contract += "height num_frames subject action environment visual camera world caption caption_tokens scores vtss "
  contract += "transitions status status_reason salvaged "
  contract += "caption_part_tokens caption_tokenizer captioner caption_model caption_prompt"
  assert set(contract.split()) <= set(header)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.binary(max_size=200))
def test_random_bytes_raise_data_error(data: bytes) -> None:
  for hostile in (data, b"KLC1" + data, packed(data), b"KLC1" + struct.pack("<I", len(data) + 1) + data):
    with pytest.raises(errors.DataError):
      record.unpack(hostile)


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
  max_leaves=5,
)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.sampled_from(sorted(header_of(example()))), JSON)
def test_any_field_of_any_json_type_is_checked(name: str, value: object) -> None:
  """Either the value is legal, and then it survives, or it is a DataError."""
  header = header_of(example()) | {name: value}
  try:
    clip = record.unpack_header(packed(header))
  except errors.DataError:
    return
  assert record.unpack_header(record.pack(clip, b"")) == clip


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(0, 2000))
def test_cut_records_raise(length: int) -> None:
  data = record.pack(example(), b"")
  if length < len(data):
    with pytest.raises(errors.DataError):
      record.unpack(data[:length])


@pytest.mark.parametrize(
  ("data", "words"),
  [
    (b"", "0 bytes"),
    (b"RIFF" + bytes(20), "starts with b'RIFF'"),
    (b"KLC2" + bytes(20), "upgrade"),
    (b"KLC1" + struct.pack("<I", 2**32 - 1) + b"{}", "claims"),
    (packed(b"not json"), "no JSON"),
    (packed(b"\xff\xfe"), "no JSON"),
    (packed(b"[" * 100_000), "no JSON"),
    (packed(b'{"clip_id": NaN}'), "no JSON"),
    (packed(b'{"a": 1, "a": 2}'), "twice"),
    (packed([1, 2]), "not an object"),
    (packed({}), "missing"),
    (packed(header_of(example()) | {"clipid": ""}), "did you mean 'clip_id'"),
    (packed(header_of(example()) | {"width": True}), "64-bit integer"),
    (packed(header_of(example()) | {"width": 640.0}), "64-bit integer"),
    (packed(header_of(example()) | {"start_pts": 2**70}), "64-bit integer"),
    (packed(header_of(example()) | {"fps": "25"}), "finite number"),
    (packed(header_of(example()) | {"vtss": 10**400}), "no JSON|finite number"),
    (packed(header_of(example()) | {"caption": "\ud800"}), "Unicode"),
    (packed(header_of(example()) | {"time_base": "1/0"}), "time_base"),
    (packed(header_of(example()) | {"time_base": "1e5"}), "time_base"),
    (packed(header_of(example()) | {"status": "gone"}), "kept, dropped"),
    (packed(header_of(example()) | {"end_pts": 1024, "end_s": 0.08}), "empty"),
    (packed(header_of(example()) | {"end_s": 5.0}), "time stamp says"),
    (packed(header_of(example()) | {"scores": {"motion": {"value": 1.0}}}), "exactly value, scorer, version"),
    (packed(header_of(example()) | {"transitions": [{"kind": "cut"}]}), "exactly start_frame"),
  ],
)
def test_hostile_headers_are_named(data: bytes, words: str) -> None:
  with pytest.raises(errors.DataError, match=words):
    record.unpack(data)


def test_a_header_that_is_no_json_is_not_written() -> None:
  with pytest.raises(errors.DataError, match="JSON"):
    record.pack(example(vtss=math.inf), b"")
  with pytest.raises(errors.DataError, match="JSON"):
    record.pack(example(caption="\ud800"), b"")


def test_clip_id_is_stable_and_depends_on_every_part() -> None:
  """The value is fixed for good: caches on disk are keyed by it."""
  source = record.content_hash(b"video")
  base = record.clip_id(source, 0, 100, "1/25", "recipe")
  assert base == "09299bb966d72143f20ad5c5e710b901"
  assert base == record.clip_id(source, 0, 100, fractions.Fraction(2, 50), "recipe")
  others = [
    record.clip_id(record.content_hash(b"other"), 0, 100, "1/25", "recipe"),
    record.clip_id(source, 1, 100, "1/25", "recipe"),
    record.clip_id(source, 0, 101, "1/25", "recipe"),
    record.clip_id(source, 0, 100, "1/30", "recipe"),
    record.clip_id(source, 0, 100, "1/25", "recipe 2"),
  ]
  assert len({base, *others}) == 6


def test_content_hash_of_file_and_bytes_agree(tmp_path) -> None:
  (tmp_path / "a").write_bytes(b"abc")
  # FIPS 180-2's example.
  assert record.content_hash(tmp_path / "a") == record.content_hash(b"abc")
  assert record.content_hash(b"abc").startswith("ba7816bf8f01cfea")


def test_info_carries_vtss_as_a_score() -> None:
  info = example(vtss=4.2, scores={"motion": Score(1.0, "flow", "1")}).info()
  assert info.scores["vtss"].value == 4.2 and info.scores["motion"].scorer == "flow"
  assert info.duration_s == pytest.approx(1.0)


def test_records_do_not_change() -> None:
  with pytest.raises(dataclasses.FrozenInstanceError):
    example().clip_id = "other"  # type: ignore[misc]


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(0, 10**9), st.integers(1, 10**9))
def test_koala_time_stamps_survive(start_ms: int, length_ms: int) -> None:
  start, end = start_ms / 1000, (start_ms + length_ms) / 1000
  assert koala.parse_span(koala.format_span(start, end)) == pytest.approx((start, end), abs=1e-6)


def test_koala_time_stamps_as_released() -> None:
  assert koala.parse_span("['0:00:01.234', '0:01:05.678']") == pytest.approx((1.234, 65.678))
  assert koala.format_span(1.234, 3723.5) == "['0:00:01.234', '1:02:03.500']"


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(max_size=40))
def test_other_time_stamps_raise(text: str) -> None:
  with pytest.raises(errors.DataError):
    koala.parse_span(text)
