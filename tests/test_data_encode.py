"""H.264 clips: exact times, true colours, spans cut to the tick, files whole or not at all."""

import fractions
import pathlib
import weakref

import av
import numpy as np
import pytest

from kling_jax import errors
from kling_jax.data import decode, encode


def pictures(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
  """Soft waves of all colours that drift, without edges (4:2:0 would smear them)."""
  y, x, c = np.meshgrid(np.arange(height) / height, np.arange(width) / width, np.arange(3) / 3, indexing="ij")
  return [(128 + 90 * np.sin(2 * np.pi * (x + y + c + k / width))).astype(np.uint8) for k in range(count)]


def times_of(media: bytes) -> np.ndarray:
  return np.array([time for _, time, _ in decode.iterate(media, size=(8, 8))])


@pytest.mark.parametrize("fps", [25, fractions.Fraction(30000, 1001), 29.97, 0.5, 120])
def test_constant_rates_are_exact(fps) -> None:
  media = encode.encode(pictures(8), fps=fps)
  np.testing.assert_allclose(times_of(media), np.arange(8) / float(fps), atol=1e-9)
  info = decode.probe(media)
  assert info.duration_s == pytest.approx(8 / float(fps), abs=1e-9) and not info.vfr and not info.damage


def test_irregular_times_are_exact() -> None:
  times = np.array([0.0, 0.033, 0.067, 0.1, 0.5, 0.501, 2.0, 2.1])
  media = encode.encode(pictures(8), times_s=times + 7.0)
  np.testing.assert_allclose(times_of(media), times, atol=1e-5)  # 1/90000 s
  info = decode.probe(media)
  assert info.vfr and info.duration_s == pytest.approx(2.2, abs=1e-5)


def test_colours_survive() -> None:
  original = pictures(6)
  found = [frame for *_, frame in decode.iterate(encode.encode(original, fps=10, crf=8))]
  difference = np.stack(found).astype(float) - np.stack(original)
  assert np.abs(difference.mean((0, 1, 2))).max() < 0.5  # no shift of brightness or hue
  assert np.sqrt((difference**2).mean()) < 2.5  # 4.0 when chroma is shown a quarter pixel off its place


def test_small_frames_give_equal_bytes_again_and_again() -> None:
  """x264's macroblock trees gave other bytes in one of a hundred runs at this size."""
  rng = np.random.default_rng(0)
  noise = rng.integers(0, 255, (48, 64, 3), np.uint8)
  frames = [np.roll(noise, (k, 2 * k), (0, 1)) for k in range(25)]
  held = []
  found = set()
  for k in range(60):
    held.append(rng.integers(0, 255, 1000 * (k % 7) + 50_000, np.uint8))  # memory that the encoder may find used
    found.add(encode.encode(frames, fps=24))
    held = held[-5:]
  assert len(found) == 1


def test_equal_frames_give_equal_bytes() -> None:
  assert encode.encode(pictures(5), fps=10) == encode.encode(pictures(5), fps=10)


def test_the_index_stands_in_front_and_keyframes_come_as_asked(tmp_path: pathlib.Path) -> None:
  media = encode.encode(pictures(20), fps=10, keyframe_every=5)
  assert media.index(b"moov") < media.index(b"mdat")
  (tmp_path / "a.mp4").write_bytes(media)
  with av.open(str(tmp_path / "a.mp4")) as container:
    keys = [k for k, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
  assert keys == [0, 5, 10, 15]


def test_odd_sizes_lose_their_last_row_and_column() -> None:
  original = pictures(3, 49, 65)
  frame = next(decode.iterate(encode.encode(original, fps=10, crf=4)))[2]
  assert frame.shape == (48, 64, 3)
  assert np.abs(frame.astype(int) - original[0][:48, :64]).mean() < 3


@pytest.mark.parametrize(("audio", "loud"), [("sine", True), ("silence", False)])
def test_audio_lasts_as_long_as_the_video(tmp_path: pathlib.Path, audio: encode.Audio, loud: bool) -> None:
  encode.write(tmp_path / "a.mp4", pictures(15), fps=10, audio=audio)
  assert decode.probe(tmp_path / "a.mp4").has_audio
  with av.open(str(tmp_path / "a.mp4")) as container:
    samples = np.concatenate([frame.to_ndarray().mean(0) for frame in container.decode(audio=0)])
    rate = container.streams.audio[0].rate
  assert len(samples) / rate == pytest.approx(1.5, abs=0.05)
  assert (np.abs(samples).max() > 0.1) == loud
  if loud:  # the loudest tone is the one that was asked for
    spectrum = np.abs(np.fft.rfft(samples[:rate]))
    assert spectrum.argmax() == pytest.approx(440, abs=1)


def test_only_one_frame_is_held() -> None:
  alive: list[weakref.ref] = []

  class Frame(np.ndarray):
    """An array that can be watched."""

  def frames():
    for k in range(50):
      frame = pictures(1)[0].view(Frame) + k % 3
      alive.append(weakref.ref(frame))
      yield frame
      del frame
      assert sum(ref() is not None for ref in alive) <= 2

  encode.encode(frames(), fps=10)


@pytest.mark.parametrize(
  ("frames", "options", "words"),
  [
    ([], {"fps": 10}, "no frames"),
    (pictures(2), {}, "either fps or times_s"),
    (pictures(2), {"fps": 10, "times_s": [0, 1]}, "either fps or times_s"),
    (pictures(2), {"fps": 0}, "above 0"),
    (pictures(2), {"times_s": [0, 0]}, "ascend"),
    (pictures(2), {"times_s": [0, 1, 2]}, "fewer frames"),
    (pictures(3), {"times_s": [0, 1]}, "more frames"),
    ([*pictures(1), *pictures(1, 50, 64)], {"fps": 10}, "frame 1 is 64 x 50"),
    ([pictures(1)[0].astype(np.float32)], {"fps": 10}, "must be uint8"),
    ([pictures(1)[0][..., 0]], {"fps": 10}, "must be uint8"),
    ([pictures(1)[0][:1]], {"fps": 10}, "must be uint8"),
  ],
)
def test_wrong_input_is_named_and_leaves_no_file(tmp_path: pathlib.Path, frames, options, words: str) -> None:
  with pytest.raises(errors.DataError, match=words):
    encode.write(tmp_path / "a.mp4", frames, **options)
  assert list(tmp_path.iterdir()) == []


def test_a_failing_writer_leaves_the_old_file(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "a.mp4"
  encode.write(path, pictures(2), fps=10)
  before = path.read_bytes()

  def frames():
    yield from pictures(2)
    raise KeyError

  with pytest.raises(KeyError):
    encode.write(path, frames(), fps=10)
  assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
