"""Selection: thresholds on scores decide which clips are kept; a dropped clip keeps its row, with the reason."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from kling_jax.data import records
from kling_jax.data.record import ClipRecord
from kling_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Threshold:
  """The range of a score that is kept, ends included, in the raw unit of its scorer."""

  least: float = -math.inf
  most: float = math.inf

  def __post_init__(self) -> None:
    if not self.least <= self.most:
      raise UsageError(f"a threshold from {self.least:g} to {self.most:g} keeps nothing")


# Freezes, flat frames and black leaders; everything else is for the user to judge (docs/guide/curation.md).
DEFAULT_THRESHOLDS = {"motion": Threshold(least=0.0005), "clarity": Threshold(least=0.05)}


def parse_threshold(text: str) -> tuple[str, Threshold]:
  """Reads `motion>=0.01`, `motion<=0.5` or `0.01<=motion<=0.5`.

  Raises:
    UsageError: it has another form.
  """
  parts = [part.strip() for part in text.replace(">=", "\0>").replace("<=", "\0<").split("\0")]
  try:
    if len(parts) == 2 and parts[0] and parts[1][0] in "<>":
      value = float(parts[1][1:])
      return parts[0], Threshold(least=value) if parts[1][0] == ">" else Threshold(most=value)
    if len(parts) == 3 and parts[1][0] == parts[2][0] == "<":
      return parts[1][1:].strip(), Threshold(float(parts[0]), float(parts[2][1:]))
  except (ValueError, IndexError):
    pass
  raise UsageError(f"threshold {text!r}: wants motion>=0.01, motion<=0.5 or 0.01<=motion<=0.5")


def judge(clip: ClipRecord, thresholds: Mapping[str, Threshold]) -> ClipRecord:
  """The clip with the status that the thresholds give it; the first score out of its range is the reason.

  A score that the clip does not have (the motion of a single frame) drops it only where a threshold asks for it.
  """
  for name, threshold in thresholds.items():
    if name == "vtss":
      value = clip.vtss
    else:
      value = clip.scores[name].value if name in clip.scores else None
    if value is None:
      return dataclasses.replace(clip, status="dropped", status_reason=f"{name} unknown")
    if not threshold.least <= value <= threshold.most:
      side = f"below {threshold.least:g}" if value < threshold.least else f"above {threshold.most:g}"
      return dataclasses.replace(clip, status="dropped", status_reason=f"{name} {side}")
  return dataclasses.replace(clip, status="kept", status_reason="")


def select(folder: str | os.PathLike[str], thresholds: Mapping[str, Threshold]) -> dict[str, int]:
  """Judges every clip of a set anew; the set changes at once or not at all.

  Returns:
    {reason: clips}, "" for the kept ones.

  Raises:
    DataError: no set, or a damaged one.
  """
  counts: dict[str, int] = {}

  def update(clip: ClipRecord) -> ClipRecord:
    judged = judge(clip, thresholds)
    counts[judged.status_reason] = counts.get(judged.status_reason, 0) + 1
    return judged

  records.rewrite(folder, update)
  return counts


def to_json(thresholds: Mapping[str, Threshold]) -> dict[str, Any]:
  """{score: [least, most]}; an open end is null."""
  ends = {name: (t.least, t.most) for name, t in thresholds.items()}
  return {name: [end if math.isfinite(end) else None for end in pair] for name, pair in ends.items()}
