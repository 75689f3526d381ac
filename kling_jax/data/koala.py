"""Koala-36M's released table: its eight columns and its time stamps."""

import ast
import re

from kling_jax import errors

COLUMNS = (
  "videoID",
  "url",
  "timestamp",
  "caption",
  "clarity_score",
  "aesthetic_score",
  "motion_score",
  "video_training_suitability_score",
)
# Released column -> name of the score here. VTSS is a field of its own in the clip record.
SCORES = {"clarity_score": "clarity", "aesthetic_score": "aesthetic", "motion_score": "motion"}
VTSS = "video_training_suitability_score"

_CLOCK = re.compile(r"(?:(\d{1,6}):)?(\d{1,2}):(\d{1,2}(?:\.\d{1,9})?)", re.ASCII)


def format_span(start_s: float, end_s: float) -> str:
  """Player times as the released tables write them: "['0:00:01.234', '0:00:05.678']"; milliseconds."""
  return str([_clock(start_s), _clock(end_s)])


def parse_span(text: str) -> tuple[float, float]:
  """The (start, end) seconds of a `timestamp` cell.

  Raises:
    DataError: no list of two clock times, or an empty span.
  """
  try:
    values = ast.literal_eval(text) if len(text) < 200 else None
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    values = None
  if not isinstance(values, list | tuple) or len(values) != 2 or not all(isinstance(v, str) for v in values):
    raise errors.DataError(f"timestamp {text[:80]!r}: wants two clock times, \"['0:00:01.234', '0:00:05.678']\"")
  start, end = (_seconds(value, text) for value in values)
  if end <= start:
    raise errors.DataError(f"timestamp {text[:80]!r}: the end does not come after the start")
  return start, end


def _clock(seconds: float) -> str:
  milliseconds = max(0, round(seconds * 1000))
  minutes, milliseconds = divmod(milliseconds, 60_000)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{milliseconds // 1000:02d}.{milliseconds % 1000:03d}"


def _seconds(clock: str, text: str) -> float:
  match = _CLOCK.fullmatch(clock.strip())
  if not match:
    raise errors.DataError(f"timestamp {text[:80]!r}: {clock!r} is no clock time H:MM:SS.mmm")
  return int(match[1] or 0) * 3600.0 + int(match[2]) * 60.0 + float(match[3])
