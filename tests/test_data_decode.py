"""Frames by time: any rate, rotation, pixel format, container; against raw PyAV, closed forms, linear decoding."""

import csv
import fractions
import gc
import itertools
import pathlib

import av
import cv2
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from kling_jax.data import decode, encode, picture, reasons

HEIGHT, WIDTH = 48, 64


def grey(level: float, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
  return np.full((height, width, 3), level, np.uint8)


def colours() -> np.ndarray:
  """Four soft-edged quarters: red, green / blue, white; every corner differs."""
  rgb = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
  rgb[: HEIGHT // 2, : WIDTH // 2] = 200, 30, 30
  rgb[: HEIGHT // 2, WIDTH // 2 :] = 30, 180, 40
  rgb[HEIGHT // 2 :, : WIDTH // 2] = 40, 50, 190
  rgb[HEIGHT // 2 :, WIDTH // 2 :] = 220, 220, 220
  return cv2.GaussianBlur(rgb, (0, 0), 2)


def mux(path: pathlib.Path, frames, codec: str, pix_fmt: str, options=None, before_mux=None, rate: int = 10) -> None:
  """An independent writer: any codec and pixel format, through PyAV's plain road."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=rate)
    stream.height, stream.width = frames[0].shape[:2]
    stream.pix_fmt, stream.options = pix_fmt, options or {}
    if before_mux:
      before_mux(stream)
    for rgb in frames:
      frame = av.VideoFrame.from_ndarray(rgb, format="rgba" if rgb.shape[2] == 4 else "rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


# ---- times ----------------------------------------------------------------------------------------------------------

LEVELS = np.array([20, 60, 100, 140, 180, 220])
TIMES_S = np.array([0.0, 0.04, 0.05, 0.4, 0.44, 1.0])


@pytest.fixture(scope="module")
def irregular() -> bytes:
  """Six frames at irregular times, each known by its grey level."""
  return encode.encode([grey(level) for level in LEVELS], times_s=TIMES_S)


def shown(frames: np.ndarray) -> np.ndarray:
  """Which of LEVELS each frame is."""
  return np.abs(frames.mean((1, 2, 3))[:, None] - LEVELS).argmin(1)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.lists(st.floats(-0.5, 2.0), min_size=1, max_size=8))
def test_the_frame_at_a_time_is_the_last_that_started(irregular: bytes, times: list[float]) -> None:
  times_s = np.sort(np.array(times))
  gaps = np.abs(times_s[:, None] - TIMES_S).min(1)
  hypothesis.assume(np.all((gaps == 0) | (gaps > 0.001)))
  expected = np.clip(np.searchsorted(TIMES_S, times_s, side="right") - 1, 0, None)
  np.testing.assert_array_equal(shown(decode.frames_at(irregular, times_s, 8, 8)), expected)


def test_spans_are_looked_up_from_their_start_and_end_before_their_end(irregular: bytes) -> None:
  frames = decode.frames_at(irregular, np.array([0.0, 0.02, 0.9, 5.0]), 8, 8, start_s=0.04, end_s=1.0)
  np.testing.assert_array_equal(shown(frames), [1, 2, 4, 4])
  listed = list(decode.iterate(irregular, start_s=0.05, end_s=0.44))
  assert [index for index, _, _ in listed] == [2, 3]
  np.testing.assert_allclose([time for _, time, _ in listed], [0.05, 0.4])


def test_times_rounded_by_the_container_are_found(tmp_path: pathlib.Path) -> None:
  """Matroska rounds 1/30 s to milliseconds; frame k must still be found at k / 30."""
  path = tmp_path / "ms.mkv"
  levels = np.linspace(20, 230, 30)
  mux(path, [grey(level) for level in levels], "ffv1", "yuv444p", rate=30)
  frames = decode.frames_at(path, np.arange(30) / 30, 8, 8)
  np.testing.assert_allclose(frames.mean((1, 2, 3)), levels, atol=2)


def test_containers_that_start_late_start_at_their_first_frame(shared: pathlib.Path) -> None:
  path = shared / "videos/derived/juggle.ts"
  first = next(decode.iterate(path))
  assert first[:2] == (0, pytest.approx(1.4833333))
  np.testing.assert_array_equal(decode.frames_at(path, np.zeros(1), 270, 480)[0], first[2])


def test_streams_without_time_stamps_follow_their_rate(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "raw.h264"
  mux(path, [grey(level) for level in LEVELS], "libx264", "yuv420p", {"bf": "0"}, rate=25)
  with av.open(str(path)) as container:
    assert next(container.decode(video=0)).pts is None
  listed = list(decode.iterate(path))
  np.testing.assert_allclose([time for _, time, _ in listed], np.arange(6) / 25, atol=1e-6)
  np.testing.assert_array_equal(shown(np.stack([frame for *_, frame in listed])), np.arange(6))
  np.testing.assert_array_equal(shown(decode.frames_at(path, np.array([0.0, 0.1, 0.2]), 8, 8)), [0, 2, 5])
  assert decode.probe(path, decode=False).num_frames == decode.probe(path).num_frames == 6


def test_no_times_give_no_frames_and_falling_times_are_refused(irregular: bytes) -> None:
  assert decode.frames_at(irregular, np.zeros(0), 8, 8).shape == (0, 8, 8, 3)
  with pytest.raises(ValueError, match="ascending"):
    decode.frames_at(irregular, np.array([1.0, 0.0]), 8, 8)


# ---- seeking --------------------------------------------------------------------------------------------------------

SEEKED = [
  "drone_koh_lipe_2.mp4",  # HEVC, 9 s between keyframes
  pytest.param("vfr_highway_traffic.mp4", marks=pytest.mark.drill),
  pytest.param("bbb_intro_30s.webm", marks=pytest.mark.drill),
  "stream_title_blur.webm",
  "turtle_tiny.flv",
  "derived/interlaced_mpeg2.mpg",
  "derived/juggle.ts",
  "venus_transit_theora.mkv",
  "newtons_cradle.gif",
  "broken/truncated.avi",
  "broken/middle_zeroed.mkv",
]


@pytest.mark.parametrize("name", SEEKED)
def test_frames_after_a_seek_are_those_of_linear_decoding(shared: pathlib.Path, name: str) -> None:
  path = shared / "videos" / name
  times, frames = [], []
  for _, time, frame in decode.iterate(path, size=(36, 64)):
    times.append(time)
    frames.append(frame)
  rng = np.random.default_rng(0)
  chosen = np.sort(rng.uniform(times[0], times[-1] + 0.1, 5))
  expected = np.stack([frames[np.searchsorted(times, t, side="right") - 1] for t in chosen])
  for start in (0, 3):  # the second one's first jump is a long one
    found = decode.frames_at(path, chosen[start:] - times[0], 36, 64)
    np.testing.assert_array_equal(found, expected[start:])


def test_seeking_decodes_and_converts_little(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
  path = tmp_path / "long.mp4"
  encode.write(path, (grey(k % 200, 16, 16) for k in range(1000)), fps=50, keyframe_every=50)
  decoded, converted = [], []
  real_decode, real_cover = decode.Video.decode, picture.cover
  monkeypatch.setattr(decode.Video, "decode", lambda *a: (f := real_decode(*a), decoded.extend(f))[0])
  monkeypatch.setattr(picture, "cover", lambda *a: (converted.append(1), real_cover(*a))[1])
  frames = decode.frames_at(path, np.array([9.99, 10.0, 19.0, 19.001]), 8, 8)
  np.testing.assert_allclose(frames.mean((1, 2, 3)), [499 % 200, 500 % 200, 950 % 200, 950 % 200], atol=2)
  assert len(decoded) < 120 and len(converted) == 3


# ---- pictures -------------------------------------------------------------------------------------------------------

FORMATS = [
  ("libx264", "yuv420p", "a.mp4", {"crf": "1"}),
  ("libx264", "yuv444p", "a.mkv", {"crf": "1"}),
  ("libx264", "yuv420p10le", "a.mp4", {"crf": "1"}),
  ("libx265", "yuv420p10le", "a.mp4", {"x265-params": "log-level=none:crf=1"}),
  ("libsvtav1", "yuv420p", "a.mp4", {"crf": "5"}),
  ("libvpx-vp9", "yuv420p", "a.webm", {"crf": "4", "b": "0", "deadline": "realtime"}),
  ("ffv1", "yuv422p", "a.mkv", {}),
  ("ffv1", "bgr0", "a.mkv", {}),
  ("mjpeg", "yuvj420p", "a.avi", {"q": "2"}),
  ("mpeg2video", "yuv420p", "a.mpg", {"q": "2"}),
  ("mpeg2video", "yuv420p", "a.ts", {"q": "2"}),
  ("flv", "yuv420p", "a.flv", {"q": "2"}),
  ("prores_ks", "yuv422p10le", "a.mov", {}),
  ("png", "rgb24", "a.mov", {}),
  ("gif", "rgb8", "a.gif", {}),
]


@pytest.mark.parametrize(("codec", "pix_fmt", "name", "options"), FORMATS)
def test_formats_show_the_same_picture(tmp_path: pathlib.Path, codec: str, pix_fmt: str, name: str, options) -> None:
  path = tmp_path / name
  rate = 25 if codec == "mpeg2video" else 10
  mux(path, [colours()] * 5, codec, pix_fmt, options, rate=rate)
  frames = [frame for *_, frame in decode.iterate(path)]
  assert len(frames) == 5 == decode.probe(path, decode=False).num_frames
  # Rough: blocky codecs, chroma at half size, 8 colours a channel in the GIF.
  error = np.abs(frames[2].astype(int) - colours()).mean()
  assert error < (25 if codec == "gif" else 6), error


def test_odd_sizes_keep_every_row_and_column(shared: pathlib.Path) -> None:
  for name, size in (("water_319x239_vp9.webm", (239, 319)), ("water_321x181_yuv444.mkv", (181, 321))):
    assert next(decode.iterate(shared / "videos/derived" / name))[2].shape == (*size, 3)


@pytest.mark.parametrize("mirrored", ["", "columns", "rows"])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_display_matrix_is_applied(tmp_path: pathlib.Path, degrees: int, mirrored: str) -> None:
  """PyAV's angle is counter-clockwise, as NumPy's quarter turns are; it mirrors afterwards."""
  path = tmp_path / "turned.mp4"

  def turn(stream: av.VideoStream) -> None:
    stream.set_display_rotation(degrees, hflip=mirrored == "columns", vflip=mirrored == "rows")

  mux(path, [colours()] * 3, "libx264", "yuv420p", {"crf": "1"}, turn)
  expected = np.rot90(colours(), degrees // 90)
  expected = {"": expected, "columns": expected[:, ::-1], "rows": expected[::-1]}[mirrored]
  frame = next(decode.iterate(path))[2]
  assert frame.shape == expected.shape
  assert np.abs(frame.astype(int) - expected).mean() < 4
  info = decode.probe(path)
  assert (info.height, info.width) == expected.shape[:2]


def test_real_rotation_flag(shared: pathlib.Path) -> None:
  path = shared / "videos/derived/rotated90_flag.mp4"
  with av.open(str(path)) as container:
    stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
  frame = next(decode.iterate(path))[2]
  assert frame.shape == (640, 360, 3)
  assert np.abs(frame.astype(int) - np.rot90(stored)).mean() < 3


def test_alpha_is_composited_on_black(tmp_path: pathlib.Path) -> None:
  rgba = np.dstack([colours(), np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))])
  mux(tmp_path / "alpha.mov", [rgba] * 2, "png", "rgba")
  frame = next(decode.iterate(tmp_path / "alpha.mov"))[2]
  expected = colours() * (rgba[..., 3:] / 255.0)
  assert np.abs(frame - expected).max() <= 1


def test_colour_matrix_is_that_of_the_stream(shared: pathlib.Path) -> None:
  """The definition of BT.709 limited range, on chroma at full size, against a real file that is tagged so."""
  with av.open(str(shared / "videos/hands_letter_blocks.mp4")) as container:
    frame = next(container.decode(video=0))
  assert (frame.colorspace, frame.color_range) == (1, 1)
  y, u, v = (
    np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width].astype(float)
    for plane in frame.planes
  )
  y, u, v = (y - 16) * 255 / 219, *((c.repeat(2, 0).repeat(2, 1) - 128) * 255 / 224 for c in (u, v))
  red, blue = y + 1.5748 * v, y + 1.8556 * u
  green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
  expected = np.clip(np.stack([red, green, blue], -1), 0, 255)
  difference = picture.to_rgb(frame) - expected
  assert np.abs(difference.mean((0, 1))).max() < 0.1 and np.abs(difference).mean() < 1.5


@pytest.mark.parametrize("size", [(36, 64), (64, 64), (90, 40), (100, 500)])
def test_cover_is_an_area_resize_and_a_centre_crop(shared: pathlib.Path, size: tuple[int, int]) -> None:
  path = shared / "videos/wolf_turns_head.mp4"  # 512 x 512
  full = next(decode.iterate(path))[2].astype(np.float32)
  height, width = size
  side = max(size)
  expected = cv2.resize(full, (side, side), interpolation=cv2.INTER_AREA)
  top, left = (side - height) // 2, (side - width) // 2
  expected = expected[top : top + height, left : left + width]
  found = decode.frames_at(path, np.zeros(1), height, width)[0]
  assert found.shape == (*size, 3) and np.abs(found - expected).mean() < 1.5


def test_enlarging_covers_too(irregular: bytes) -> None:
  assert decode.frames_at(irregular, np.zeros(1), 200, 100).shape == (1, 200, 100, 3)


def test_a_stream_that_changes_size_keeps_the_first_one(tmp_path: pathlib.Path) -> None:
  for name, scale in (("a.ts", 1), ("b.ts", 2)):
    frame = cv2.resize(colours(), None, fx=scale, fy=scale)
    mux(tmp_path / name, [frame] * 3, "mpeg2video", "yuv420p", rate=25)
  joined = (tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes()
  listed = list(decode.iterate(joined))
  assert {frame.shape for *_, frame in listed} == {(HEIGHT, WIDTH, 3)}
  # FFmpeg drops the frame that waits in the decoder when the size changes. Time stamps start over; times go on.
  assert len(listed) >= 5 and np.all(np.diff([time for _, time, _ in listed]) > 0)
  assert np.abs(listed[-1][2].astype(int) - colours()).mean() < 6


def test_still_pictures_are_read_as_such(tmp_path: pathlib.Path) -> None:
  for name in ("a.png", "a.jpg", "a.bmp", "a.webp", "a.tiff"):
    cv2.imwrite(str(tmp_path / name), colours()[..., ::-1])
    assert np.abs(decode.image(tmp_path / name).astype(int) - colours()).mean() < 8, name
    assert decode.image(tmp_path / name, (8, 8)).shape == (8, 8, 3)
    with pytest.raises(reasons.MediaError):
      decode.open_video(tmp_path / name)
  with pytest.raises(reasons.MediaError, match=r"missing\.png.*No such file"):
    decode.image(tmp_path / "missing.png")


def test_photographs_stand_upright(tmp_path: pathlib.Path) -> None:
  """A JPEG with EXIF orientation 6, which FFmpeg reports beside a kind of side data that PyAV has no name for."""
  _, encoded = cv2.imencode(".jpg", colours()[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])
  tags = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
  segment = b"\xff\xe1" + (len(tags) + 2).to_bytes(2, "big") + tags
  path = tmp_path / "photo.jpg"
  path.write_bytes(encoded.tobytes()[:2] + segment + encoded.tobytes()[2:])
  expected = cv2.imread(str(path))[..., ::-1]
  assert expected.shape == (WIDTH, HEIGHT, 3)
  assert np.abs(decode.image(path).astype(int) - expected).mean() < 4


# ---- limits, hostile input ------------------------------------------------------------------------------------------


def test_limits_have_their_reasons(irregular: bytes) -> None:
  with pytest.raises(reasons.MediaError) as error:
    list(decode.iterate(irregular, limits=decode.Limits(seconds=0.0)))
  assert error.value.reason == "timeout"
  with pytest.raises(reasons.MediaError) as error:
    decode.frames_at(irregular, np.zeros(1), 8, 8, limits=decode.Limits(pixels=HEIGHT * WIDTH - 1))
  assert error.value.reason == "out_of_memory"
  decode.frames_at(irregular, np.zeros(1), 8, 8, limits=decode.Limits(pixels=HEIGHT * WIDTH, threads=2))


def test_playlists_do_not_open_other_files(tmp_path: pathlib.Path, irregular: bytes) -> None:
  (tmp_path / "secret.mp4").write_bytes(irregular)
  playlists = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.mp4\n#EXT-X-ENDLIST\n",
    "list.mp4": "ffconcat version 1.0\nfile secret.mp4\n",
  }
  for name, text in playlists.items():
    (tmp_path / name).write_text(text)
    with pytest.raises(reasons.MediaError):
      decode.open_video(tmp_path / name)


def test_names_are_no_addresses(tmp_path: pathlib.Path, irregular: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.chdir(tmp_path)
  for name in ("concat:a.mp4", "-i.mp4", "100%d.mp4", "a b'\".mp4", "subfile,,start,1,end,9,,:a.mp4", "é.mp4"):
    pathlib.Path(name).write_bytes(irregular)
    assert decode.probe(name).num_frames == 6, name


def test_bytes_and_files_agree(shared: pathlib.Path) -> None:
  path = shared / "videos/stream_of_water.mp4"
  times = np.array([0.0, 1.0, 2.9])
  a, b = (decode.frames_at(source, times, 36, 48) for source in (path, path.read_bytes()))
  np.testing.assert_array_equal(a, b)


# ---- probe ----------------------------------------------------------------------------------------------------------

SAMPLE = ["carphone_qcif.mp4", "asl_sign_eat.mkv", "newtons_cradle.gif", "turtle_tiny.flv", "drone_cliff_lofoten.mp4"]
SAMPLE += ["stream_title_blur.webm", "derived/interlaced_mpeg2.mpg", "derived/single_frame.mp4", "wolf_turns_head.mp4"]


def manifest(shared: pathlib.Path) -> dict[str, dict[str, str]]:
  with (shared / "videos/MANIFEST.csv").open() as file:
    return {row["file"]: row for row in csv.DictReader(file)}


def check_against_manifest(shared: pathlib.Path, row: dict[str, str]) -> None:
  path = shared / "videos" / row["file"]
  if not row["width"]:
    with pytest.raises(reasons.MediaError) as error:
      decode.probe(path)
    assert error.value.reason == "no_video_stream"
    return
  infos = [decode.probe(path, decode=fully) for fully in (True, False)]
  assert infos[0] == infos[1]
  info = infos[0]
  sides = (info.width, info.height) if "rotated" not in row["file"] else (info.height, info.width)
  assert sides == (int(row["width"]), int(row["height"]))
  assert info.num_frames == int(row["frames"]) and info.vfr == bool(int(row["vfr"]))
  assert info.duration_s == pytest.approx(float(row["seconds"]), abs=0.05)
  assert info.has_audio == bool(row["audio"]) and info.pixel_format == row["pix_fmt"]
  assert not info.damage
  assert info.interlaced == ("interlaced" in row["file"])


@pytest.mark.parametrize("name", SAMPLE)
def test_sample_of_the_manifest(shared: pathlib.Path, name: str) -> None:
  check_against_manifest(shared, manifest(shared)[name])


@pytest.mark.drill
def test_the_whole_manifest(shared: pathlib.Path) -> None:
  for row in manifest(shared).values():
    check_against_manifest(shared, row)


def test_probe_states_exact_ticks() -> None:
  rate = fractions.Fraction(30000, 1001)
  info = decode.probe(encode.encode([grey(9)] * 12, fps=rate))
  assert (info.start_pts, info.end_pts * info.time_base, info.fps) == (0, 12 / rate, pytest.approx(float(rate)))


def test_decoded_frames_do_not_wait_for_the_cyclic_collector(shared: pathlib.Path) -> None:
  """240 frames of 720p are 330 MB; without any collection, decoding them must not hold on to them."""
  import psutil

  process = psutil.Process()
  source = shared / "videos" / "fades_autumn_deer.mp4"
  gc.collect()
  gc.disable()
  try:
    frames = iter(decode.iterate(source, size=(64, 64)))
    next(frames)
    before = process.memory_info().rss
    for _ in itertools.islice(frames, 240):
      pass
    grown = process.memory_info().rss - before
  finally:
    gc.enable()
  assert grown < 120 * 2**20, f"{grown / 2**20:.0f} MiB"
