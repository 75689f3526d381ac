"""Cutting clips: exact spans of all kinds of sources; copied packets are the source's, sound stays in step."""

import fractions
import io
import pathlib

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_jax import errors
from kling_jax.data import avc, cut, decode

CUT = [
  "bikes_city.mp4",
  "newtons_cradle.gif",
  "flower_opening.webm",
  "derived/juggle.ts",
  "derived/interlaced_mpeg2.mpg",
  "derived/rotated90_flag.mp4",
  "derived/water_321x181_yuv444.mkv",
  "broken/truncated.avi",
]


@pytest.mark.parametrize("name", CUT)
def test_cuts_hold_exactly_the_frames_of_their_span(shared: pathlib.Path, name: str) -> None:
  path = shared / "videos" / name
  info = decode.probe(path, decode=False)
  length = info.end_pts - info.start_pts
  span = info.start_pts + length // 3, info.start_pts + length // 2
  with decode.open_video(path) as video:
    source = [
      (video.ticks(time), frame) for _, time, frame in decode.iterate(video) if span[0] <= video.ticks(time) < span[1]
    ]
  media = cut.cut(path, *span, crf=10).media
  found = list(decode.iterate(media))
  assert len(found) == len(source) > 2
  expected = (np.array([pts for pts, _ in source]) - source[0][0]) * float(info.time_base)
  np.testing.assert_allclose([time for _, time, _ in found], expected, atol=1e-9)
  # Every frame is its own, not a neighbour.
  height, width = found[0][2].shape[:2]
  for k, (_, _, frame) in enumerate(found):
    assert np.abs(frame.astype(int) - source[k][1][:height, :width]).mean() < 5
  assert decode.probe(media).duration_s <= (span[1] - source[0][0]) * info.time_base + 1e-9


def test_neighbouring_cuts_share_no_frame_and_lose_none(shared: pathlib.Path) -> None:
  path = shared / "videos/derived/juggle.ts"
  info = decode.probe(path)
  middle = info.start_pts + 20 * 3750
  counts = [decode.probe(cut.cut(path, *span).media).num_frames for span in ((0, middle), (middle, info.end_pts))]
  assert counts == [20, 52]


def test_cuts_can_be_shrunk(shared: pathlib.Path) -> None:
  path = shared / "videos/derived/three_frames.mp4"  # 960 x 540
  info = decode.probe(cut.cut(path, 0, 2002, short_side=90).media)
  assert (info.width, info.height, info.num_frames) == (160, 90, 2)
  info = decode.probe(cut.cut(path, 0, 2002, short_side=9000).media)
  assert (info.width, info.height) == (960, 540)


def test_an_empty_span_is_an_error(shared: pathlib.Path) -> None:
  with pytest.raises(errors.DataError, match="no frame starts in"):
    cut.cut(shared / "videos/derived/three_frames.mp4", 10**9, 10**9 + 5)


# ---- copied packets --------------------------------------------------------------------------------------------------

STREAMS = {
  "plain": "keyint=12:bframes=0",
  "b-frames": "keyint=16:bframes=3:b-adapt=0",
  "pyramid": "keyint=20:bframes=5:b-adapt=0:b-pyramid=normal:ref=4",
  "open": "keyint=10:bframes=3:b-adapt=0:open-gop=1",
  "never": "keyint=infinite:bframes=2:b-adapt=0:scenecut=0",
}


def film(parameters: str, count: int = 60, *, irregular: bool = False, sound: str = "", format: str = "mp4") -> bytes:
  """A small H.264 film of moving noise whose frames all differ; `sound` is the codec of a 440 Hz tone."""
  rng = np.random.default_rng(0)
  noise = np.repeat(np.repeat(rng.integers(0, 255, (32, 48, 3), np.uint8), 4, 0), 4, 1)
  ticks = np.cumsum(rng.integers(200, 900, count)) if irregular else 512 * np.arange(count)
  ticks -= ticks[0]
  file = io.BytesIO()
  with av.open(file, "w", format=format) as out:
    stream = out.add_stream("libx264", rate=24)
    stream.width, stream.height, stream.pix_fmt = 192, 128, "yuv420p"
    stream.options = {"x264-params": parameters, "crf": "20"}
    stream.codec_context.time_base = fractions.Fraction(1, 12288)
    stream.codec_context.thread_count = 1
    voice = out.add_stream(sound, rate=48_000, layout="mono") if sound else None
    for k in range(count):
      frame = av.VideoFrame.from_ndarray(np.roll(noise, (4 * k, 8 * k), (0, 1)), format="rgb24").reformat(
        format="yuv420p"
      )
      frame.pts, frame.time_base = int(ticks[k]), fractions.Fraction(1, 12288)
      out.mux(stream.encode(frame))
    out.mux(stream.encode(None))
    if voice is not None:
      for begin in range(0, int(ticks[-1] / 12288 * 48_000), 960):
        # A tone whose loudness tells the time: one loud 0.1 s in every half second.
        n = np.arange(begin, begin + 960)
        wave = np.sin(2 * np.pi * 440 * n / 48_000) * np.where(n % 24_000 < 4_800, 0.8, 0.05)
        block = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], format="flt", layout="mono")
        block.sample_rate, block.pts, block.time_base = 48_000, begin, fractions.Fraction(1, 48_000)
        out.mux(voice.encode(block.reformat(format=voice.format.name) if hasattr(block, "reformat") else block))
      out.mux(voice.encode(None))
  return file.getvalue()


def pictures(media: bytes) -> list[tuple[fractions.Fraction, np.ndarray]]:
  with decode.open_video(media) as video:
    found = [(pts * video.time_base, frame.to_ndarray()) for pts, frame in video.frames()]
    assert not video.damage
  return found


@pytest.fixture(scope="module")
def films() -> dict[str, tuple[bytes, list[tuple[fractions.Fraction, np.ndarray]]]]:
  made = {name: film(parameters) for name, parameters in STREAMS.items()}
  made["irregular"] = film(STREAMS["pyramid"], irregular=True)
  return {name: (media, pictures(media)) for name, media in made.items()}


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from([*STREAMS, "irregular"]), a=st.integers(0, 58), length=st.integers(1, 60))
def test_any_span_of_any_stream_has_its_frames_and_times(films, name: str, a: int, length: int) -> None:
  media, source = films[name]
  b = min(a + length, len(source) - 1)
  if b == a:
    return
  tick = fractions.Fraction(1, 12288)
  made = cut.cut(media, int(source[a][0] / tick), int(source[b][0] / tick))
  found = pictures(made.media)
  assert made.frames == len(found) == b - a
  assert [time for time, _ in found] == [time - source[a][0] for time, _ in source[a:b]]
  distances = [np.abs(x.astype(int) - y[1]).mean() for (_, x), y in zip(found, source[a:b], strict=True)]
  # A neighbour is 60 grey levels away; encoded frames differ by their coding, copied ones not at all.
  assert max(distances) < 12
  assert sum(distance == 0 for distance in distances) >= made.copied
  assert made.copied == 0 or made.copied >= (b - a) / 2


@pytest.mark.parametrize("name", ["b-frames", "pyramid", "irregular"])
def test_a_span_from_keyframe_to_keyframe_costs_no_encoding(films, name: str) -> None:
  media = films[name][0]
  with av.open(io.BytesIO(media)) as file:
    keys = sorted(packet.pts for packet in file.demux(video=0) if packet.is_keyframe)
  made = cut.cut(media, keys[0], keys[2])
  assert made.copied == made.frames > 20
  with av.open(io.BytesIO(made.media)) as file:
    ours = [bytes(packet) for packet in file.demux(video=0) if packet.size]
  with av.open(io.BytesIO(media)) as file:
    theirs = {bytes(packet) for packet in file.demux(video=0)}
  assert len(ours) == made.frames and set(ours) <= theirs


def test_frames_around_the_copied_ones_are_encoded_beside_them(films) -> None:
  media, source = films["pyramid"]
  tick = fractions.Fraction(1, 12288)
  made = cut.cut(media, int(source[15][0] / tick), int(source[57][0] / tick), crf=5)
  assert 30 <= made.copied < made.frames == 42
  with av.open(io.BytesIO(made.media)) as file:
    header = avc.Header.parse(file.streams.video[0].codec_context.extradata)
  assert len(header.sequences) == len(header.pictures) == 2, "the source's parameter sets and the encoder's"
  found = pictures(made.media)
  assert max(np.abs(x.astype(int) - y).mean() for (_, x), (_, y) in zip(found, source[15:57], strict=True)) < 2


def test_what_cannot_be_copied_is_encoded(films, shared: pathlib.Path) -> None:
  media = films["plain"][0]
  assert cut.cut(media, 0, 20 * 512, copy=False).copied == 0
  assert cut.cut(media, 0, 20 * 512, short_side=32).copied == 0
  assert cut.cut(films["never"][0], 10 * 512, 50 * 512).copied == 0, "no keyframe in the span"
  turned = shared / "videos/derived/rotated90_flag.mp4"
  assert cut.cut(turned, 0, 10**6).copied == 0
  assert cut.cut(films["open"][0], 0, 59 * 512).frames == 59


def test_equal_spans_give_equal_bytes(films) -> None:
  media = films["pyramid"][0]
  assert cut.cut(media, 3 * 512, 50 * 512) == cut.cut(media, 3 * 512, 50 * 512)


@pytest.mark.parametrize(("codec", "container"), [("aac", "mp4"), ("flac", "matroska"), ("pcm_s16le", "matroska")])
@pytest.mark.parametrize("copy", [True, False])
def test_sound_stays_in_step(codec: str, container: str, copy: bool) -> None:
  media = film(STREAMS["plain"], 72, sound=codec, format=container)
  with decode.open_video(media) as video:
    span = video.ticks(0.75), video.ticks(2.25)
  made = cut.cut(media, *span, copy=copy)
  assert made.sound and (made.copied > 0) == copy
  with av.open(io.BytesIO(made.media)) as file:
    track = file.streams.audio[0]
    loudness = np.zeros(1600)
    for frame in file.decode(track):
      samples = np.abs(frame.to_ndarray().astype(np.float64)).reshape(-1)
      at = (float(frame.pts * frame.time_base) + np.arange(len(samples)) / track.rate) * 1000
      np.maximum.at(loudness, np.clip(at.astype(int), 0, 1599), samples)
  loud = np.flatnonzero(loudness > 0.4 * loudness.max())
  starts = loud[np.diff(loud, prepend=-1000) > 100]
  # Loud from 1.0, 1.5 and 2.0 s of the source: 0.25, 0.75 and 1.25 s of the clip.
  np.testing.assert_allclose(starts, [250, 750, 1250], atol=45)
  assert not cut.cut(media, *span, copy=copy, sound=False).sound


def test_the_last_place_that_nothing_leans_over() -> None:
  #        I  P  B  B  I  P  B   in decoding order, shown at these times
  stamps = [0, 3, 1, 2, 4, 6, 5]
  idr = [True, False, False, False, True, False, False]
  assert cut.copyable(stamps, idr, (0, 7)) == (0, 7)
  assert cut.copyable(stamps, idr, (0, 4)) == (0, 4)
  assert cut.copyable(stamps, idr, (0, 3)) == (0, 1), "the B-pictures lean on the P behind the end"
  assert cut.copyable(stamps, idr, (1, 6)) == (4, 5)
  assert cut.copyable(stamps, idr, (5, 7)) == (0, 0)
  assert cut.copyable([4, 2, 3], [True, False, False], (0, 9)) == (0, 0), "shown before the keyframe: not closed"
