"""The clip record: magic `KLC1`, header length, JSON header, media bytes; written by us, parsed as if by a stranger."""

import dataclasses
import fractions
import hashlib
import json
import math
import os
import re
import struct
import typing
from collections.abc import Iterable

from kling_jax import errors
from kling_jax.data.source import ClipInfo, Score

MAGIC = b"KLC1"
STATUSES = ("kept", "dropped")
KINDS = ("cut", "dissolve", "fade", "wipe", "other")
CAPTION_FIELDS = ("subject", "action", "environment", "visual", "camera", "world")

_PREFIX = struct.Struct("<4sI")  # magic, header length in bytes; little endian
_LONGEST_HEADER = 2**24  # bytes; a header holds captions and scores, never media
_INT64 = 2**63


@dataclasses.dataclass(frozen=True)
class Transition:
  """What lay at an edge of the clip and was trimmed; frames of the source video, 0-based, in presentation order."""

  start_frame: int
  end_frame: int
  kind: str
  confidence: float

  def __post_init__(self) -> None:
    if self.kind not in KINDS:
      raise errors.DataError(f"transition kind {self.kind!r}: legal are {', '.join(KINDS)}")
    if not 0 <= self.start_frame <= self.end_frame or not 0.0 <= self.confidence <= 1.0:
      raise errors.DataError(f"{self}: wants 0 <= start_frame <= end_frame and confidence in [0, 1]")


@dataclasses.dataclass(frozen=True)
class ClipRecord:
  """The header of a clip (house contract "Clip record").

  Attributes:
    clip_id: `clip_id(...)`: hash of the source's content, the span and the recipe; equal ids mean equal frames.
    video_id: name of the source video within its set.
    index: place of the clip in its video, from 0.
    cut_before: a hard or soft transition lies directly before the clip (false: the clip goes on from prev_clip_id).
    prev_clip_id: the clip before this one in the same video; empty for the first.
    source: path or address of the source video.
    start_pts, end_pts, time_base: the span [start_pts, end_pts) in ticks of the source's time base, "n/d" seconds.
    start_s, end_s: the same in container seconds: pts x time base.
    source_start_s: container time of the source's first frame; players show start_s - source_start_s.
    fps, width, height, num_frames: of the media in this record.
    subject, action, environment, visual, camera, world: caption fields; empty where there are none.
    caption: the merged caption; caption_tokens: its token count (0: not counted).
    caption_part_tokens: token counts of the six fields, in their order; () where nothing was counted.
    caption_tokenizer: who counted; captioner, caption_model, caption_prompt: who wrote the caption, with which model or
      version, asked what (a digest); all empty where it is not known.
    scores: raw scores by name; vtss: video training suitability score, 1 to 5, or None.
    transitions: what was trimmed at the clip's edges.
    status, status_reason: kept or dropped, and why; only `select` drops.
    salvaged: the source was damaged.
  """

  clip_id: str
  video_id: str
  source: str
  start_pts: int
  end_pts: int
  time_base: str
  fps: float
  width: int
  height: int
  num_frames: int
  index: int = 0
  cut_before: bool = True
  prev_clip_id: str = ""
  start_s: float = math.nan  # filled in from the span
  end_s: float = math.nan
  source_start_s: float = 0.0
  subject: str = ""
  action: str = ""
  environment: str = ""
  visual: str = ""
  camera: str = ""
  world: str = ""
  caption: str = ""
  caption_tokens: int = 0
  scores: dict[str, Score] = dataclasses.field(default_factory=dict)
  vtss: float | None = None
  transitions: tuple[Transition, ...] = ()
  status: str = "kept"
  status_reason: str = ""
  salvaged: bool = False
  caption_part_tokens: tuple[int, ...] = ()
  caption_tokenizer: str = ""
  captioner: str = ""
  caption_model: str = ""
  caption_prompt: str = ""

  def __post_init__(self) -> None:
    tick = _time_base(self.time_base)
    for name, pts in (("start_s", self.start_pts), ("end_s", self.end_pts)):
      seconds, given = float(pts * tick), getattr(self, name)
      if math.isnan(given):
        object.__setattr__(self, name, seconds)
      elif abs(given - seconds) > 1e-6 + 1e-12 * abs(seconds):
        raise errors.DataError(f"clip {self.clip_id}: {name} is {given}, but its time stamp says {seconds}")
    problems = [
      (self.clip_id == "", "clip_id is empty"),
      (self.end_pts <= self.start_pts, f"the span [{self.start_pts}, {self.end_pts}) is empty"),
      (min(self.width, self.height, self.num_frames) < 1, "width, height and num_frames must be at least 1"),
      (self.fps <= 0, f"fps must be above 0, not {self.fps}"),
      (min(self.index, self.caption_tokens) < 0, "index and caption_tokens must be at least 0"),
      (min(self.caption_part_tokens, default=0) < 0, "caption_part_tokens must be at least 0"),
      (self.status not in STATUSES, f"status {self.status!r}: legal are {', '.join(STATUSES)}"),
    ]
    for wrong, why in problems:
      if wrong:
        raise errors.DataError(f"clip {self.clip_id or '?'}: {why}")

  @property
  def duration_s(self) -> float:
    return self.end_s - self.start_s

  def info(self) -> ClipInfo:
    """What a training pipeline wants to know of the clip; VTSS joins the scores as "vtss"."""
    scores = dict(self.scores)
    if self.vtss is not None and "vtss" not in scores:
      scores["vtss"] = Score(self.vtss, "vtss", "")
    return ClipInfo(
      clip_id=self.clip_id,
      caption=self.caption,
      duration_s=self.duration_s,
      fps=self.fps,
      num_frames=self.num_frames,
      width=self.width,
      height=self.height,
      scores=scores,
      video_id=self.video_id,
      index=self.index,
      cut_before=self.cut_before,
      start_s=self.start_s - self.source_start_s,
      parts={name: getattr(self, name) for name in CAPTION_FIELDS if getattr(self, name)},
    )


def content_hash(source: str | os.PathLike[str] | bytes) -> str:
  """SHA-256 of a file's or buffer's bytes, in hex."""
  if isinstance(source, bytes | bytearray | memoryview):
    return hashlib.sha256(source).hexdigest()
  with open(source, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def clip_id(source_hash: str, start_pts: int, end_pts: int, time_base: str | fractions.Fraction, recipe: str) -> str:
  """Deterministic name of a clip: 32 hex digits.

  Args:
    source_hash: `content_hash` of the source video.
    start_pts, end_pts, time_base: the exact span, in integers; 2/50 and 1/25 are the same time base.
    recipe: whatever decides the frames of the clip beside its span (size, codec settings, version).
  """
  tick = _time_base(str(time_base))
  text = json.dumps([source_hash, int(start_pts), int(end_pts), str(tick), recipe])
  return hashlib.sha256(text.encode()).hexdigest()[:32]


def fingerprint(clip_ids: Iterable[str]) -> str:
  """16 hex digits that tell the identity and order of clips."""
  digest = hashlib.sha256()
  for name in clip_ids:
    digest.update(name.encode("utf-8", "surrogateescape") + b"\n")
  return digest.hexdigest()[:16]


def pack(record: ClipRecord, media: bytes) -> bytes:
  """The record as bytes: magic, uint32 header length, JSON header, media."""
  header = header_json(record)
  if len(header) > _LONGEST_HEADER:
    raise errors.DataError(f"clip {record.clip_id}: a header of {len(header)} bytes; the limit is {_LONGEST_HEADER}")
  return _PREFIX.pack(MAGIC, len(header)) + header + media


def unpack(data: bytes) -> tuple[ClipRecord, bytes]:
  """Parses a record of unknown origin.

  Raises:
    DataError: anything about it is not as `pack` writes it.
  """
  record, start = _header(data)
  return record, bytes(data[start:])


def unpack_header(data: bytes) -> ClipRecord:
  """`unpack` without copying the media."""
  return _header(data)[0]


def header_json(record: ClipRecord) -> bytes:
  """The header as canonical UTF-8 JSON: fields in the order of the class, no spaces."""
  try:
    text = json.dumps(dataclasses.asdict(record), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8")
  except (TypeError, ValueError) as error:  # also UnicodeEncodeError
    raise errors.DataError(f"clip {record.clip_id}: the header cannot be written as JSON: {error}") from error


def parse_header(header: bytes) -> ClipRecord:
  """A record from its JSON header as `header_json` writes it.

  Raises:
    DataError: no JSON object, or fields that are missing, unknown or of another type.
  """
  try:
    values = json.loads(header.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
  except (ValueError, RecursionError) as error:  # also UnicodeDecodeError and JSONDecodeError
    raise errors.DataError(f"clip record: the header is no JSON ({error})") from error
  if not isinstance(values, dict):
    raise errors.DataError(f"clip record: the header is a JSON {type(values).__name__}, not an object")
  return from_dict(values)


def from_dict(values: dict[str, typing.Any]) -> ClipRecord:
  """A record from the plain values of a JSON header; every field is checked for its type.

  Raises:
    DataError: a field is missing, unknown or of another type.
  """
  known = {f.name: f for f in dataclasses.fields(ClipRecord)}
  for name in values:
    if name not in known:
      raise errors.DataError(f"clip header: unknown field {name!r}{errors.nearest(name, known)}")
  checked: dict[str, typing.Any] = {}
  for name, field in known.items():
    if name not in values:
      if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        raise errors.DataError(f"clip header: field {name!r} is missing")
      continue
    checked[name] = _checked(name, values[name])
  return ClipRecord(**checked)


def _header(data: bytes) -> tuple[ClipRecord, int]:
  if len(data) < _PREFIX.size:
    raise errors.DataError(f"clip record: {len(data)} bytes; even the prefix has {_PREFIX.size}")
  magic, length = _PREFIX.unpack_from(data)
  if magic != MAGIC:
    if magic[:3] == MAGIC[:3]:
      raise errors.DataError(f"clip record of version {magic[3:]!r}; this release reads {MAGIC!r}: upgrade kling_jax")
    raise errors.DataError(f"clip record: starts with {magic!r}, not {MAGIC!r}; no set of this project")
  if length > min(len(data) - _PREFIX.size, _LONGEST_HEADER):
    raise errors.DataError(f"clip record: the header claims {length} bytes of {len(data) - _PREFIX.size}; it is cut")
  return parse_header(bytes(data[_PREFIX.size : _PREFIX.size + length])), _PREFIX.size + length


def _refuse_constant(name: str) -> typing.NoReturn:
  raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, typing.Any]]) -> dict[str, typing.Any]:
  values = dict(pairs)
  if len(values) != len(pairs):
    raise ValueError("a key stands twice in one object")
  return values


_INTEGERS = ("start_pts", "end_pts", "width", "height", "num_frames", "index", "caption_tokens")
_FLOATS = ("fps", "start_s", "end_s", "source_start_s")
_FLAGS = ("cut_before", "salvaged")


def _checked(name: str, value: typing.Any) -> typing.Any:
  """`value` as the type of field `name`, or a DataError."""
  if name in _INTEGERS:
    return _integer(name, value)
  if name in _FLOATS:
    return _number(name, value)
  if name in _FLAGS:
    return _of(name, value, bool)
  if name == "vtss":
    return None if value is None else _number(name, value)
  if name == "scores":
    return {_text("scores", key): _score(key, score) for key, score in _of(name, value, dict).items()}
  if name == "caption_part_tokens":
    return tuple(_integer(name, item) for item in _of(name, value, list))
  if name == "transitions":
    return tuple(_transition(item) for item in _of(name, value, list))
  return _text(name, value)


def _score(name: str, value: typing.Any) -> Score:
  where = f"scores.{name}"
  fields = _exact(where, value, ("value", "scorer", "version"))
  return Score(
    _number(f"{where}.value", fields["value"]),
    _text(f"{where}.scorer", fields["scorer"]),
    _text(f"{where}.version", fields["version"]),
  )


def _transition(value: typing.Any) -> Transition:
  fields = _exact("transitions", value, ("start_frame", "end_frame", "kind", "confidence"))
  return Transition(
    _integer("transitions.start_frame", fields["start_frame"]),
    _integer("transitions.end_frame", fields["end_frame"]),
    _text("transitions.kind", fields["kind"]),
    _number("transitions.confidence", fields["confidence"]),
  )


def _exact(name: str, value: typing.Any, keys: tuple[str, ...]) -> dict[str, typing.Any]:
  fields = _of(name, value, dict)
  if set(fields) != set(keys):
    raise errors.DataError(f"clip header: {name!r} wants exactly {', '.join(keys)}, not {', '.join(map(repr, fields))}")
  return fields


def _of(name: str, value: typing.Any, kind: type) -> typing.Any:
  if type(value) is not kind:
    raise errors.DataError(f"clip header: {name!r} wants a {kind.__name__}, not {_short(value)}")
  return value


def _integer(name: str, value: typing.Any) -> int:
  if type(value) is not int or not -_INT64 <= value < _INT64:
    raise errors.DataError(f"clip header: {name!r} wants a 64-bit integer, not {_short(value)}")
  return value


def _number(name: str, value: typing.Any) -> float:
  # The bound keeps float() of a long integer from overflowing; comparison with it is exact.
  if type(value) not in (int, float) or not -1e300 < value < 1e300:
    raise errors.DataError(f"clip header: {name!r} wants a finite number, not {_short(value)}")
  return float(value)


def _text(name: str, value: typing.Any) -> str:
  text: str = _of(name, value, str)
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise errors.DataError(f"clip header: {name!r} is no legal Unicode ({error.reason})") from error
  return text


def _short(value: typing.Any) -> str:
  kind = type(value).__name__
  return f"{kind} {value!r}" if isinstance(value, bool | float | type(None)) else f"a {kind}"


def _time_base(text: str) -> fractions.Fraction:
  match = re.fullmatch(r"([0-9]{1,18})(?:/([0-9]{1,18}))?", text, re.ASCII)
  if not match or int(match[1]) == 0 or int(match[2] or 1) == 0:
    raise errors.DataError(f"time_base {text[:40]!r}: wants seconds per tick as 'n/d', above 0, for example '1/12800'")
  return fractions.Fraction(int(match[1]), int(match[2] or 1))
