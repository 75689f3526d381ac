"""Spans of a video cut out as MP4 clips, frame by frame and with their sound; H.264 is copied where it can be.

Of an H.264 source the packets are kept from the first IDR picture of the span to the last place where nothing leans on
what comes after the span. Only the frames before and behind are encoded: as pictures of parameter sets of their own,
which stand beside the source's in the file's header (ISO/IEC 14496-15 lists any number of them). So the kept frames
lose nothing, and a span that starts at a keyframe, as shots mostly do, costs no encoding at all. Everything else is
encoded whole (`encode`).
"""

import bisect
import dataclasses
import fractions
import itertools
import os
import pathlib
import tempfile
import typing
from collections.abc import Iterator, Sequence

import av
import av.error
import av.video.frame
import numpy as np

from kling_jax import errors
from kling_jax.data import avc, container, decode, encode, picture, reasons

LEAST_COPIED = 0.5  # of a clip's frames; below, one encoding of the whole clip is simpler and hardly dearer
_MOST_TICKS = 2**31  # of a duration in MP4
_SOUND_AHEAD_S = 1.0  # how far sound may lie behind the picture of its time in the file
_SHORTEST_S = 0.002  # MP4 counts the length of a whole track in milliseconds; shorter, the last frame would fall out
_COPIED_SOUND = ("aac", "mp3", "opus", "ac3", "eac3", "alac", "flac")
_SOUND_RATE = 48_000  # samples per second of sound that MP4 cannot hold as it is


class _Packet(typing.NamedTuple):
  """One coded picture; times in ticks of the stream."""

  data: bytes
  pts: int
  dts: int
  duration: int
  is_key: bool


@dataclasses.dataclass(frozen=True)
class Cut:
  """A clip.

  Attributes:
    media: an MP4 file.
    frames: how many it has. copied: how many of them are the source's own packets.
    sound: whether it has sound.
  """

  media: bytes
  frames: int
  copied: int
  sound: bool


def cut(
  source: decode.Media,
  start_pts: int,
  end_pts: int,
  *,
  short_side: int | None = None,
  crf: float = 18.0,
  keyframe_every: int = 48,
  copy: bool = True,
  sound: bool = True,
  limits: decode.Limits = decode.DEFAULT_LIMITS,
) -> Cut:
  """Cuts out exactly the frames that start in [start_pts, end_pts) ticks of the source's time base.

  The clip's first frame moves to time 0; distances between frames stay exact, constant rate or not.

  Args:
    source: a file or bytes.
    start_pts, end_pts: the span.
    short_side: larger sources are shrunk to this shorter side; None keeps the source's size.
    crf: quality of what is encoded, 0 (lossless) to 51.
    keyframe_every: largest distance between keyframes of what is encoded; copied packets keep theirs.
    copy: keep the packets of 8-bit 4:2:0 H.264 that needs no turning and no shrinking. Otherwise, and for all other
      sources, frames are encoded: upright, without alpha, an odd last row or column cropped.
    sound: keep the first sound track: whole packets (about 20 ms) that start in the span.
    limits: time, size and threads of the decoder.

  Raises:
    DataError: no frame starts in the span.
    MediaError: the source cannot be decoded, or its time stamps make no sense.
  """
  span = start_pts, end_pts
  if end_pts - start_pts >= _MOST_TICKS:
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "<bytes>"
    raise reasons.MediaError(name, "decode_error", "time stamps that jump farther than an MP4 can tell")
  with container.open_video(source, limits) as video, tempfile.TemporaryDirectory(prefix="kling-") as folder:
    path = pathlib.Path(folder) / "clip.mp4"
    track = next(iter(video.container.streams.audio), None) if sound else None
    wanted = copy and _can_copy(video, short_side)
    pictures, sounds = _packets(video, span, track) if wanted or track else ([], [])
    start_s = start_pts * video.time_base
    joined = _joined(source, video, pictures, span, crf, keyframe_every, limits) if pictures and wanted else None
    if joined is not None:
      _write(path, video.stream, joined.header, joined.packets, track, sounds, start_s)
      return Cut(path.read_bytes(), len(joined.packets), joined.copied, bool(sounds))
    frames = _encode(path, source, span, short_side, crf, keyframe_every, limits)
    if not sounds:
      return Cut(path.read_bytes(), frames, 0, False)
    spoken = pathlib.Path(folder) / "spoken.mp4"
    with av.open(f"file:{path}") as mute:
      stream = mute.streams.video[0]
      packets = [_value(packet) for packet in mute.demux(stream) if packet.dts is not None]
      _write(spoken, stream, None, packets, track, sounds, start_s)
    return Cut(spoken.read_bytes(), frames, 0, True)


# ---- encoded whole ---------------------------------------------------------------------------------------------------


def _encode(
  path: pathlib.Path,
  source: decode.Media,
  span: tuple[int, int],
  short_side: int | None,
  crf: float,
  keyframe_every: int,
  limits: decode.Limits,
) -> int:
  """Writes the frames of a span, without sound; returns how many there are."""
  with decode.Cursor(source, limits) as cursor:
    video = cursor.video
    stamped = _restamped(cursor.span(*span), span[1], short_side, cursor)
    first = next(stamped, None)
    if first is None:
      where = f"[{span[0]}, {span[1]}) ticks of {video.time_base} s"
      raise errors.DataError(f"{video.source!r}: no frame starts in {where}; `decode.probe` tells the file's span")
    rate = video.rate or fractions.Fraction(25)
    return encode.mux(path, itertools.chain([first], stamped), video.time_base, rate, crf, keyframe_every)


def _restamped(
  frames: Iterator[tuple[int, av.VideoFrame]], end_pts: int, short_side: int | None, cursor: decode.Cursor
) -> Iterator[encode.Stamped]:
  """Moves a span to time 0; a frame shows until the next one, the last one for its own duration within the span."""
  held: tuple[int, np.ndarray, int] | None = None
  size: tuple[int, int] | None = None
  zero = 0
  for pts, frame in frames:
    if size is None:
      zero, size = pts, _shrunk(picture.upright_size(frame), short_side)
    if held is not None:
      yield held[0] - zero, pts - held[0], held[1]
    held = pts, picture.cover(frame, *size), min(cursor.video.duration(frame), end_pts - pts)
  if held is not None:
    yield held[0] - zero, max(1, held[2]), held[1]


def _shrunk(size: tuple[int, int], short_side: int | None) -> tuple[int, int]:
  """(height, width) with the shorter side at most `short_side`: `size` itself, or both even."""
  if short_side is None or short_side >= min(size):
    return size
  rows, columns = (max(2, round(n * short_side / min(size)) // 2 * 2) for n in size)
  return rows, columns


# ---- copied ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Joined:
  """Packets of a clip, in decoding order and from time 0 on, of which `copied` are the source's."""

  packets: list[_Packet]
  header: bytes
  copied: int


def _can_copy(video: container.Video, short_side: int | None) -> bool:
  """Whether the source's packets may stand in a clip: plain H.264 in a container with whole time stamps."""
  context = video.stream.codec_context
  if context.codec.name != "h264" or context.pix_fmt != "yuv420p" or not avc.is_header(context.extradata or b""):
    return False
  if video.container.format.flags & typing.cast(int, av.format.Flags.ts_discont.value) or video.damage:
    return False
  if short_side is not None and min(video.width, video.height) > short_side:
    return False
  if context.sample_aspect_ratio not in (None, 0, 1) or video.width % 2 or video.height % 2:
    return False
  first = next(video.frames(), None)
  return first is not None and not any(picture.orientation(first[1]))


def _value(packet: av.Packet) -> _Packet:
  pts, dts = typing.cast(int, packet.pts), typing.cast(int, packet.dts)
  return _Packet(bytes(packet), pts, dts, packet.duration or 0, packet.is_keyframe)


def _packets(
  video: container.Video, span: tuple[int, int], track: av.AudioStream | None
) -> tuple[list[_Packet], list[av.Packet]]:
  """The pictures from the keyframe at or before the span to its end, and the sound of the span.

  A picture that the container marks as not to be shown, or as damaged, leaves no picture at all to copy.
  """
  if not video.container.format.flags & typing.cast(int, av.format.Flags.ts_discont.value):
    video.seek(span[0])
  start_s, end_s = (pts * video.time_base for pts in span)
  pictures: list[_Packet] = []
  sounds: list[av.Packet] = []
  plain, seen, heard = True, False, track is None
  for packet in video.packets():
    if packet.dts is None or packet.pts is None or packet.time_base is None:
      continue
    at_s = packet.pts * packet.time_base
    if packet.stream is video.stream:
      seen = packet.dts >= span[1]
      plain = plain and not packet.is_discard and not packet.is_corrupt
      pictures += [] if seen else [_value(packet)]
    elif packet.stream is track:
      heard = at_s >= end_s
      sounds += [packet] if start_s <= at_s < end_s else []
    if seen and (heard or at_s > end_s + _SOUND_AHEAD_S):
      break
  return (pictures if plain else []), sounds


def _joined(
  source: decode.Media,
  video: container.Video,
  pictures: list[_Packet],
  span: tuple[int, int],
  crf: float,
  keyframe_every: int,
  limits: decode.Limits,
) -> _Joined | None:
  """The span as copied packets with encoded ones before and behind; None where that cannot be had or is not worth it.

  Decoding times stay ascending: encoded pictures are as far ahead of their showing as the copied ones beside them.
  """
  header = avc.Header.parse(video.stream.codec_context.extradata or b"")
  first, stop = copyable([p.pts for p in pictures], [header.is_idr(p.data) for p in pictures], span)
  within = sorted(p.pts for p in pictures if span[0] <= p.pts < span[1])
  kept = pictures[first:stop]
  if len(kept) < max(1, LEAST_COPIED * len(within)) or not all(header.knows(p.data) for p in kept):
    return None
  head = within[: bisect.bisect_left(within, kept[0].pts)]
  tail = within[bisect.bisect_right(within, max(p.pts for p in kept)) :]
  if len(head) + len(kept) + len(tail) != len(within) or len(set(within)) != len(within):
    return None
  number = header.free_id()
  before = _encoded(source, video, head, number, crf, keyframe_every, limits)
  after = _encoded(source, video, tail, number, crf, keyframe_every, limits)
  if before is None or after is None:
    return None
  if before or after:
    header = header.joined(avc.parameter_sets((before or after)[0].data))
  delay = kept[0].pts - kept[0].dts
  packets = [p._replace(dts=p.pts - delay) for p in before] + kept
  delay = after[0].pts - pictures[stop].dts if after else 0
  packets += [p._replace(dts=p.pts - delay) for p in after]
  ends = dict(zip(within, [*within[1:], max(span[1], within[-1] + video.ticks(_SHORTEST_S))], strict=True))
  copies = set(p.pts for p in kept)
  packets = [
    _Packet(
      p.data if p.pts in copies else avc.without_parameter_sets(p.data),
      p.pts - within[0],
      p.dts - within[0],
      ends[p.pts] - p.pts,
      p.is_key,
    )
    for p in packets
  ]
  return _Joined(packets, bytes(header), len(kept))


def copyable(pts: Sequence[int], is_idr: Sequence[bool], span: tuple[int, int]) -> tuple[int, int]:
  """The packets [first, stop) that a span can keep; an empty range where there are none.

  The first is an IDR picture: nothing after it leans on what came before. The range ends where all packets so far show
  before all that follow, which so can lean on nothing in it that is missing.

  Args:
    pts: time stamps in decoding order, at least up to the first one that is decoded at the span's end or later.
    is_idr: which of them are IDR pictures.
    span: [start, end) in the same ticks.
  """
  first = next((i for i, stamp in enumerate(pts) if is_idr[i] and span[0] <= stamp < span[1]), None)
  if first is None or min(pts[first:]) < pts[first]:
    return 0, 0
  following = [*itertools.accumulate(reversed(pts[first:]), min)][::-1] + [span[1]]
  latest, stop = pts[first], first
  for i, stamp in enumerate(pts[first:], first):
    latest = max(latest, stamp)
    if latest >= span[1]:
      break
    if following[i - first + 1] > latest:
      stop = i + 1
  return first, stop


def _encoded(
  source: decode.Media,
  video: container.Video,
  stamps: Sequence[int],
  number: int,
  crf: float,
  keyframe_every: int,
  limits: decode.Limits,
) -> list[_Packet] | None:
  """The frames of `stamps` as H.264 whose parameter sets carry `number`; None where the decoder gives others."""
  if not stamps:
    return []
  context = av.CodecContext.create("libx264", "w")
  of = video.stream.codec_context
  context.width, context.height, context.pix_fmt = video.width, video.height, "yuv420p"
  context.time_base, context.framerate = video.time_base, video.rate or fractions.Fraction(25)
  context.color_range, context.colorspace = of.color_range, of.colorspace
  context.color_primaries, context.color_trc = of.color_primaries, of.color_trc
  context.thread_count = 1  # x264's output depends on the number of its threads.
  parameters = f"annexb=0:sps-id={number}:{encode.SAME_BYTES}"
  context.options = {
    "crf": str(crf), "preset": "veryfast", "bf": "0", "g": str(keyframe_every), "x264-params": parameters
  }  # fmt: skip
  packets: list[av.Packet] = []
  with decode.Cursor(source, limits) as cursor:
    found = 0
    for pts, frame in cursor.span(stamps[0], stamps[-1] + 1):
      if found == len(stamps) or pts != stamps[found] or frame.format.name != "yuv420p":
        return None
      if (frame.width, frame.height) != (video.width, video.height):
        return None
      frame.pict_type = av.video.frame.PictureType.NONE  # the encoder chooses
      frame.pts, frame.time_base = pts, video.time_base
      packets += context.encode(frame)
      found += 1
    if found != len(stamps) or cursor.video.damage:
      return None
  return [_value(packet) for packet in packets + context.encode(None)]


# ---- the file --------------------------------------------------------------------------------------------------------


def _write(
  path: pathlib.Path,
  template: av.VideoStream,
  header: bytes | None,
  packets: list[_Packet],
  track: av.AudioStream | None,
  sounds: list[av.Packet],
  start_s: fractions.Fraction,
) -> None:
  """Writes picture packets (from time 0 on) and sound packets (of the source's time) into an MP4."""
  with av.open("file:" + os.path.abspath(path), "w", format="mp4", options={"movflags": "+faststart"}) as out:
    stream = out.add_stream_from_template(template, opaque=True)
    if header is not None:
      stream.codec_context.extradata = header
    stream.time_base = template.time_base
    voice = _voice(out, track) if track is not None and sounds else None
    for p in packets:
      packet = av.Packet(p.data)
      packet.pts, packet.dts, packet.duration, packet.is_keyframe = p.pts, p.dts, p.duration, p.is_key
      packet.time_base, packet.stream = typing.cast(fractions.Fraction, template.time_base), stream
      out.mux(packet)
    if voice is not None and track is not None:
      for packet in _spoken(voice, track, sounds, start_s):
        packet.stream = voice
        out.mux(packet)


def _copies(track: av.AudioStream) -> bool:
  return track.codec_context.codec.canonical_name in _COPIED_SOUND


def _voice(out: av.container.OutputContainer, track: av.AudioStream) -> av.AudioStream:
  """The clip's sound track: of the source's codec where MP4 can hold it, else AAC."""
  if _copies(track):
    return out.add_stream_from_template(track, opaque=True)
  layout = "mono" if track.codec_context.layout.nb_channels == 1 else "stereo"
  return out.add_stream("aac", rate=_SOUND_RATE, layout=layout)


def _spoken(
  voice: av.AudioStream, track: av.AudioStream, sounds: list[av.Packet], start_s: fractions.Fraction
) -> Iterator[av.Packet]:
  """The packets of the sound track, moved to the clip's time."""
  if _copies(track):
    for packet in sounds:
      at = typing.cast(int, packet.pts) - round(start_s / packet.time_base)
      packet.pts = packet.dts = max(0, at)
      yield packet
    return
  resampler = av.AudioResampler(format="fltp", layout=voice.codec_context.layout.name, rate=_SOUND_RATE)
  for packet in sounds:
    try:
      frames = typing.cast(list[av.AudioFrame], packet.decode())
    except av.error.FFmpegError:  # a damaged packet of sound is a gap and costs no picture
      continue
    for frame in frames:
      frame.pts = max(0, (frame.pts or 0) - round(start_s / typing.cast(fractions.Fraction, frame.time_base)))
      for even in resampler.resample(frame):
        yield from voice.encode(even)
  for even in resampler.resample(None):
    yield from voice.encode(even)
  yield from voice.encode(None)
