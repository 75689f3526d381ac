"""Opens a video file or bytes safely and yields its frames in presentation order with repaired time stamps."""

import contextlib
import dataclasses
import fractions
import io
import os
import stat
import time
import typing
from collections.abc import Iterator

import av
import av.error
import av.logging
from av.codec.context import Flags2

from kling_jax.data import reasons

# Containers that hold one video each. Playlists and scripts (hls, dash, concat, image2 patterns) stay out: they would
# make FFmpeg open other files or the network on behalf of an untrusted file. The pipes only serve to name pictures.
_FORMATS = (
  "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,live_flv,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,obu,av1,ivf,gif,apng,"
  "asf,ogg,nut,mxf,wtv,dv,rm,vc1,yuv4mpegpipe,y4m,swf,nsv,gxf,"
  "mp3,wav,flac,aac,aiff,caf,w64,"
  "png_pipe,jpeg_pipe,jpegls_pipe,jpegxl_pipe,webp_pipe,bmp_pipe,tiff_pipe,gif_pipe,ppm_pipe,pgm_pipe,psd_pipe,exr_pipe"
)
_LONGEST_LIST_OF_DAMAGE = 16
_LONGEST_FRAME_S = 3600

# Titles in Latin-1 are common; only releases below 19 stumble over them.
_TAGS: dict[str, typing.Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

# FFmpeg reports every damaged macroblock on standard error; what matters of it reaches the user as a reason.
av.logging.set_level(av.logging.PANIC)


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one file may cost.

  Attributes:
    seconds: wall-clock from the opening to the last frame; None: no limit. It is looked at between packets, so a
      decoder that hangs inside one packet needs a process around it.
    pixels: largest width x height of a frame.
    threads: decoder threads. One by default: files, not threads, are the way to fill cores (1.2 times the frames per
      second for two files at once against one file with two threads).
  """

  seconds: float | None = None
  pixels: int = 2**26
  threads: int = 1


DEFAULT_LIMITS = Limits()


class Video:
  """An open video stream; made by `open_video`, closed by `close` or a with block.

  Attributes:
    source: name for messages; "<bytes>" for media in memory.
    container, stream: the PyAV objects.
    time_base: seconds per tick of the stream's time stamps.
    width, height: stored size, before the rotation flag.
    damage: what was wrong so far, in words: empty for a sound file.
  """

  def __init__(
    self,
    source: str,
    container: av.container.InputContainer,
    limits: Limits,
    deadline: float | None,
    stills: bool = False,
  ):
    self.source, self.container, self.limits = source, container, limits
    self.damage: list[str] = []
    self._deadline = deadline
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
      kinds = ", ".join(sorted({str(s.type) for s in container.streams})) or "nothing"
      raise reasons.MediaError(source, "no_video_stream", f"the {container.format.name} file holds {kinds}")
    if container.format.name.endswith("_pipe") and not stills:
      kind = container.format.name.removesuffix("_pipe")
      raise reasons.MediaError(source, "no_video_stream", f"a still picture ({kind})")
    self.stream = streams[0]
    if self.stream.codec_context is None:
      raise reasons.MediaError(source, "unsupported_codec", "no decoder for the video stream")
    context = self.stream.codec_context
    self._check_size(context.width, context.height)
    context.thread_count = limits.threads
    context.thread_type = "AUTO" if limits.threads != 1 else "NONE"
    self.time_base = rational(self.stream.time_base) or fractions.Fraction(1, 1000)

  @property
  def width(self) -> int:
    return self.stream.codec_context.width

  @property
  def height(self) -> int:
    return self.stream.codec_context.height

  @property
  def rate(self) -> fractions.Fraction | None:
    """Frames per second as the container states it; None where it does not."""
    return rational(self.stream.average_rate) or rational(self.stream.guessed_rate)

  def close(self) -> None:
    self.container.close()

  def __enter__(self) -> "Video":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def seconds(self, pts: int) -> float:
    """Container time in seconds of an integer time stamp."""
    return float(pts * self.time_base)

  def ticks(self, seconds: float) -> int:
    """The integer time stamp nearest to a container time in seconds."""
    return round(fractions.Fraction(seconds) / self.time_base)

  def note(self, what: str) -> None:
    """Remembers a sign of damage; equal ones count once, and the list stays short."""
    if what not in self.damage and len(self.damage) < _LONGEST_LIST_OF_DAMAGE:
      self.damage.append(what)

  def packets(self) -> Iterator[av.Packet]:
    """Packets of all streams from the current position, in file order; a failing container ends them with a note."""
    packets = self.container.demux()
    while True:
      self._check_clock()
      try:
        packet = next(packets)
      except StopIteration:
        return
      except av.error.MemoryError as error:
        raise reasons.MediaError(self.source, "out_of_memory", "the container asked for too much memory") from error
      except (av.error.FFmpegError, OSError) as error:
        self._check_clock()
        self.note(f"the container ends early ({_words(error)})")
        return
      yield packet

  def decode(self, packet: av.Packet) -> list[av.VideoFrame]:
    """Frames that `packet` completes; a damaged packet gives none (or concealed ones) and a note."""
    if packet.is_corrupt:
      self.note("a packet is cut or damaged")
    try:
      frames = packet.decode()
    except av.error.EOFError:
      return []
    except (av.error.MemoryError, MemoryError) as error:
      raise reasons.MediaError(self.source, "out_of_memory", "a frame did not fit into memory") from error
    except av.error.DecoderNotFoundError as error:
      raise reasons.MediaError(self.source, "unsupported_codec", _words(error)) from error
    except (av.error.PatchWelcomeError, NotImplementedError) as error:
      raise reasons.MediaError(self.source, "unsupported_codec", _words(error)) from error
    except av.error.FFmpegError as error:
      self.note(f"a packet does not decode ({_words(error)})")
      return []
    for frame in frames:
      self._check_size(frame.width, frame.height)
      if frame.is_corrupt:
        self.note("a frame is damaged and was patched by the decoder")
    return frames

  def frames(self) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (pts, frame) in presentation order from the current position; pts strictly ascend.

    A frame without a time stamp, or with one that does not come after its forerunner's (concatenated streams that
    start over), is placed one frame duration after its forerunner.
    """
    last: int | None = None
    for packet in self.packets():
      if packet.stream.index != self.stream.index:  # The closing, empty packets have no stream_index of their own.
        continue
      for frame in self.decode(packet):
        last = self.placed(frame, last)
        yield last, frame

  def placed(self, frame: av.VideoFrame, last: int | None) -> int:
    """The time stamp of `frame`, given its forerunner's: its own where that comes later, else one duration later."""
    if frame.pts is not None and (last is None or frame.pts > last):
      return int(frame.pts)
    return int(self.stream.start_time or 0) if last is None else last + self.duration(frame)

  def duration(self, frame: av.VideoFrame) -> int:
    """How long `frame` shows, in ticks: its own duration, else one frame of the stream's rate; at least 1.

    A duration of more than an hour is damage and counts as none.
    """
    if frame.duration and frame.duration * self.time_base < _LONGEST_FRAME_S:
      return max(1, int(frame.duration))
    return max(1, round(1 / (self.rate * self.time_base))) if self.rate else 1

  def seek(self, pts: int) -> bool:
    """Moves to a keyframe at or before `pts` where the container can; returns whether it could."""
    try:
      self.container.seek(pts, stream=self.stream, backward=True, any_frame=False)
    except (av.error.FFmpegError, OSError):
      return False
    return True

  def _check_clock(self) -> None:
    if self._deadline is not None and time.monotonic() > self._deadline:
      raise reasons.MediaError(self.source, "timeout", f"decoding took longer than {self.limits.seconds:g} s")

  def _check_size(self, width: int, height: int) -> None:
    if width * height > self.limits.pixels:
      detail = f"frames of {width} x {height} pixels; the limit is {self.limits.pixels} pixels"
      raise reasons.MediaError(self.source, "out_of_memory", detail)


def open_video(
  source: str | os.PathLike[str] | bytes,
  limits: Limits = DEFAULT_LIMITS,
  *,
  stills: bool = False,
  vectors: bool = False,
) -> Video:
  """Opens a video by its content (not by its suffix), from a local file or from bytes in memory.

  Names are never read as addresses or patterns, and only formats that stay within the one file are opened. A still
  picture is refused unless `stills`. With `vectors` the decoder attaches motion vectors to frames (a tenth more time).

  Raises:
    MediaError: with the reason why it cannot be used.
  """
  if isinstance(source, bytes | bytearray | memoryview):
    name, head = "<bytes>", bytes(source[:64])
    target: str | io.BytesIO = io.BytesIO(source)
    empty = len(source) == 0
  else:
    name = os.fspath(source)
    head, empty = _first_bytes(name)
    target = "file:" + os.path.abspath(name)
  if empty:
    raise reasons.MediaError(name, "unreadable", "the file is empty")
  deadline = None if limits.seconds is None else time.monotonic() + limits.seconds
  try:
    container = av.open(
      target,
      "r",
      timeout=limits.seconds,
      options={"max_pixels": str(limits.pixels)},
      container_options={"format_whitelist": _FORMATS, "protocol_whitelist": "file"},
      **_TAGS,
    )
  except av.error.ExitError as error:
    raise reasons.MediaError(name, "timeout", f"opening took longer than {limits.seconds:g} s") from error
  except (av.error.MemoryError, MemoryError) as error:
    raise reasons.MediaError(name, "out_of_memory", "the header asks for too much memory") from error
  except (av.error.ArgumentError, av.error.DemuxerNotFoundError) as error:
    raise reasons.MediaError(
      name, "unsupported_codec", f"a container that is not read here ({_words(error)})"
    ) from error
  except (av.error.FFmpegError, OSError, ValueError) as error:
    if head[4:8] == b"ftyp":
      raise reasons.MediaError(name, "truncated", "an MP4 without its index (moov)") from error
    raise reasons.MediaError(name, "unreadable", f"no video container ({_words(error)})") from error
  with contextlib.ExitStack() as on_error:
    on_error.callback(container.close)
    video = Video(name, container, limits, deadline, stills)
    if vectors:
      video.stream.codec_context.flags2 |= int(Flags2.export_mvs)
    on_error.pop_all()
  return video


def rational(value: typing.Any) -> fractions.Fraction | None:
  """A rate or time base of PyAV (Fraction or None up to 18, AVRational from 19) as a Fraction above 0, else None."""
  if value is None or value.numerator <= 0 or value.denominator <= 0:
    return None
  return fractions.Fraction(int(value.numerator), int(value.denominator))


def _first_bytes(name: str) -> tuple[bytes, bool]:
  """The first 64 bytes of a regular file, and whether it is empty."""
  try:
    # A pipe or device would block or never end; the check comes before the opening.
    if not stat.S_ISREG(os.stat(name).st_mode):
      raise reasons.MediaError(name, "unreadable", "not a regular file")
    with open(name, "rb") as file:
      head = file.read(64)
  except (OSError, ValueError) as error:
    raise reasons.MediaError(name, "unreadable", _words(error)) from error
  return head, not head


def _words(error: BaseException) -> str:
  """The error's message without the file name, which the caller already names."""
  return getattr(error, "strerror", None) or str(error) or type(error).__name__
