"""RGB frames to H.264 MP4 with exact time stamps.

Clips are yuv420p, BT.709, limited range, without B-frames (so that every duration in the file is exact and decoding
never looks ahead), with the index in front. Equal frames give equal bytes on every machine with the same FFmpeg.
"""

import fractions
import itertools
import os
import pathlib
import tempfile
import typing
from collections.abc import Iterable, Iterator, Sequence

import av
import numpy as np
from av.video.reformatter import Interpolation

from kling_jax import errors, files
from kling_jax.data import picture

_FINE = fractions.Fraction(1, 90_000)  # seconds; the tick of clips with irregular times
_CHROMA = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
# Macroblock trees are computed in floats: their last bits differ between AVX2 and AVX-512, and below 128 pixels from
# run to run. Without them equal frames give equal bytes.
SAME_BYTES = "no-mbtree=1"
_AUDIO_RATE = 48_000  # samples per second
_SINE_HZ = 440.0

Stamped = tuple[int, int, np.ndarray]  # time stamp, duration (ticks), uint8 RGB (H, W, 3)
Audio = typing.Literal["sine", "silence"]


def encode(
  frames: Iterable[np.ndarray],
  *,
  fps: float | fractions.Fraction | None = None,
  times_s: Sequence[float] | np.ndarray | None = None,
  crf: float = 18.0,
  keyframe_every: int = 48,
  audio: Audio | None = None,
) -> bytes:
  """Encodes uint8 RGB frames (H, W, 3) of one size; an odd last row or column is cropped (4:2:0 has none).

  Args:
    frames: at least one frame, any iterator: only one frame is held.
    fps: constant rate in frames per second, exact as a fraction; or
    times_s: one ascending start time per frame, in seconds, rounded to 1/90000 s. The last frame shows as long as
      the one before it.
    crf: x264's quality, 0 (lossless) to 51; 18 is visually lossless.
    keyframe_every: largest distance between keyframes, in frames.
    audio: adds an AAC track as long as the video: a 440 Hz sine or silence.

  Raises:
    DataError: no frames, frames of differing or unusable shape, times that do not ascend or do not fit the frames.
  """
  with tempfile.TemporaryDirectory(prefix="kling-") as folder:
    path = pathlib.Path(folder) / "clip.mp4"
    _encode(path, frames, fps=fps, times_s=times_s, crf=crf, keyframe_every=keyframe_every, audio=audio)
    return path.read_bytes()


def write(path: str | os.PathLike[str], frames: Iterable[np.ndarray], **options: typing.Any) -> None:
  """Writes `encode(frames, **options)` to `path`; the file appears whole or not at all."""
  with files.whole(path) as temporary:
    _encode(temporary, frames, **options)


def _encode(
  path: pathlib.Path,
  frames: Iterable[np.ndarray],
  *,
  fps: float | fractions.Fraction | None = None,
  times_s: Sequence[float] | np.ndarray | None = None,
  crf: float = 18.0,
  keyframe_every: int = 48,
  audio: Audio | None = None,
) -> None:
  if (fps is None) == (times_s is None):
    raise errors.DataError(f"give either fps or times_s, not fps={fps!r} and times_s={times_s!r}")
  if fps is not None:
    rate = fractions.Fraction(fps).limit_denominator(1001)
    if rate <= 0:
      raise errors.DataError(f"fps must be above 0, not {fps!r}")
    stamped: Iterator[Stamped] = ((k, 1, frame) for k, frame in enumerate(frames))
    mux(path, stamped, 1 / rate, rate, crf, keyframe_every, audio)
    return
  stamps = np.round(np.asarray(times_s, np.float64) / float(_FINE)).astype(np.int64)
  if stamps.ndim != 1 or len(stamps) == 0 or np.any(np.diff(stamps) <= 0):
    raise errors.DataError("times_s must hold at least one time and ascend by at least 1/90000 s")
  stamps -= stamps[0]
  last = stamps[-1] - stamps[-2] if len(stamps) > 1 else 3600  # 1/25 s for a single frame
  steps = np.append(np.diff(stamps), last)
  mean = fractions.Fraction(1.0 / (float(np.mean(steps)) * float(_FINE))).limit_denominator(1001)
  stamped = ((int(t), int(d), f) for t, d, f in _matched(stamps, steps, frames))
  mux(path, stamped, _FINE, mean or fractions.Fraction(1), crf, keyframe_every, audio)


def _matched(stamps: np.ndarray, steps: np.ndarray, frames: Iterable[np.ndarray]) -> Iterator[tuple]:
  """zip that refuses other lengths in the words of this module."""
  missing = object()
  for k, (stamp, step, frame) in enumerate(itertools.zip_longest(stamps, steps, frames, fillvalue=missing)):
    if stamp is missing or frame is missing:
      have, want = ("fewer frames", "times") if frame is missing else ("more frames", "times")
      raise errors.DataError(f"{have} than {want}: {len(stamps)} times, and the frames differ at number {k}")
    yield stamp, step, frame


def mux(
  path: pathlib.Path,
  stamped: Iterator[Stamped],
  tick: fractions.Fraction,
  rate: fractions.Fraction,
  crf: float,
  keyframe_every: int,
  audio: Audio | None = None,
) -> int:
  """Encodes frames with their time stamps and durations (in ticks of `tick` seconds) into an MP4 at `path`.

  Args: as of `encode`; `rate` is the nominal frame rate.

  Returns:
    the number of frames.

  Raises:
    DataError: no frames, or frames of differing or unusable shape.
  """
  first = next(stamped, None)
  if first is None:
    raise errors.DataError("there are no frames to encode")
  height, width = _even(first[2], 0)
  with av.open("file:" + os.path.abspath(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
    stream = container.add_stream("libx264", rate=rate)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    # swscale puts chroma in the middle of its four pixels; untagged it would be shown a quarter pixel too far left.
    stream.options = {
      "crf": str(crf),
      "preset": "veryfast",
      "bf": "0",
      "g": str(keyframe_every),
      "x264-params": f"chromaloc=1:{SAME_BYTES}",
    }
    context = stream.codec_context
    context.time_base = tick
    context.thread_count = 1  # x264's output depends on the number of its threads.
    context.color_range, context.colorspace, context.color_primaries, context.color_trc = 1, 1, 1, 1
    sound = container.add_stream("aac", rate=_AUDIO_RATE, layout="mono") if audio else None
    samples_done = 0
    durations: dict[int, int] = {}
    for k, (stamp, duration, rgb) in enumerate(itertools.chain([first], stamped)):
      if _even(rgb, k) != (height, width):
        raise errors.DataError(f"frame {k} is {rgb.shape[1]} x {rgb.shape[0]}; the first one was {width} x {height}")
      durations[stamp] = duration
      for packet in stream.encode(_to_yuv(rgb[:height, :width], stamp, duration, tick)):
        container.mux(_timed(packet, durations))
      if sound is not None:
        wanted = round((stamp + duration) * tick * _AUDIO_RATE)
        for block in _tone(samples_done, wanted, audio == "sine"):
          container.mux(sound.encode(block))
        samples_done = wanted
    for packet in stream.encode(None):
      container.mux(_timed(packet, durations))
    if sound is not None:
      container.mux(sound.encode(None))
  return k + 1


def _timed(packet: av.Packet, durations: dict[int, int]) -> av.Packet:
  """Gives a packet its frame's own duration; x264 would write one frame of the mean rate."""
  if packet.pts is not None:
    packet.duration = durations.pop(packet.pts)
  return packet


def _even(rgb: np.ndarray, number: int) -> tuple[int, int]:
  """(height, width) of a frame after cropping to even numbers."""
  if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or min(rgb.shape[:2]) < 2:
    raise errors.DataError(f"frame {number} must be uint8 (height >= 2, width >= 2, 3), not {rgb.dtype} {rgb.shape}")
  return rgb.shape[0] // 2 * 2, rgb.shape[1] // 2 * 2


def _to_yuv(rgb: np.ndarray, stamp: int, duration: int, tick: fractions.Fraction) -> av.VideoFrame:
  frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
  frame = picture.reformat(
    frame, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", interpolation=_CHROMA, threads=1
  )
  frame.pts, frame.time_base, frame.duration = stamp, tick, duration
  return frame


def _tone(start: int, end: int, audible: bool) -> Iterator[av.AudioFrame]:
  """Mono blocks of samples [start, end)."""
  for begin in range(start, end, 1024):
    n = np.arange(begin, min(begin + 1024, end))
    wave = 0.2 * np.sin(2 * np.pi * _SINE_HZ * n / _AUDIO_RATE) * audible
    block = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], format="fltp", layout="mono")
    block.sample_rate, block.pts, block.time_base = _AUDIO_RATE, begin, fractions.Fraction(1, _AUDIO_RATE)
    yield block
