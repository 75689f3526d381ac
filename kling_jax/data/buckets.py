"""Buckets: which shape a clip is trained at, and how many clips that leaves.

A clip goes to one bucket or is dropped with a reason; nothing else ever leaves a run: streams repeat for ever, batches
cross the borders of epochs, and a set smaller than a batch fills it by repetition. What was kept and what was dropped
is a table (`Report`), and a set of which nothing is left is an error that names the cause and the mend.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kling_jax.data.source import ClipInfo
from kling_jax.errors import ConfigError, DataError

REASONS = {
  "too_short": "ends before the bucket's last frame",
  "low_fps": "has fewer frames a second than the bucket asks for",
  "too_small": "would have to be enlarged beyond the limit",
  "aspect": "would lose too much of its picture to the crop",
}
ROUNDING_S = 1e-3  # containers round durations to milliseconds


@dataclasses.dataclass(frozen=True, order=True)
class Bucket:
  """One shape of batches: `frames` of `height` x `width` pixels, `fps` of them a second."""

  frames: int
  height: int
  width: int
  fps: float

  def __post_init__(self) -> None:
    if not (self.frames >= 1 and self.height >= 1 and self.width >= 1 and 0 < self.fps < math.inf):
      raise ConfigError(f"bucket {self.name} is empty: frames, height, width and fps must be above 0")

  @property
  def name(self) -> str:
    """Like 17x64x64@8; caches know the bucket's latents by it."""
    return f"{self.frames}x{self.height}x{self.width}@{self.fps:g}"

  @property
  def span_s(self) -> float:
    """Seconds from the first frame to the last."""
    return (self.frames - 1) / self.fps

  @property
  def pixels(self) -> int:
    return self.frames * self.height * self.width


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a clip may suffer to fit a bucket.

  Attributes:
    enlarge: largest factor by which pictures are enlarged.
    repeat: largest bucket rate over clip rate; above 1 some frames are shown twice.
    kept: smallest part of the picture's area that the crop leaves.
  """

  enlarge: float = 1.25
  repeat: float = 1.25
  kept: float = 0.25


def slack_s(info: ClipInfo, bucket: Bucket) -> float:
  """Seconds by which the bucket's frames may start later than the clip; negative where they do not fit.

  The last frame that a clip shows begins one frame before its end.
  """
  last_s = info.duration_s - 1 / info.fps if info.fps > 0 else 0.0
  return max(last_s, 0.0) - bucket.span_s


def refusal(info: ClipInfo, bucket: Bucket, limits: Limits) -> str | None:
  """Why `bucket` does not take the clip (a key of REASONS), or None."""
  if bucket.frames > 1:
    if slack_s(info, bucket) < -ROUNDING_S:
      return "too_short"
    if bucket.fps > info.fps * limits.repeat:
      return "low_fps"
  if info.width < 1 or info.height < 1:
    return "too_small"
  if max(bucket.height / info.height, bucket.width / info.width) > limits.enlarge:
    return "too_small"
  return "aspect" if math.exp(-_crop(info, bucket)) < limits.kept else None


def _crop(info: ClipInfo, bucket: Bucket) -> float:
  """Distance of the aspect ratios: |log(clip / bucket)|; exp(-distance) of the picture survives the crop."""
  if info.width < 1 or info.height < 1:
    return math.inf
  return abs(math.log((info.width / info.height) / (bucket.width / bucket.height)))


def best(info: ClipInfo, buckets: Sequence[Bucket], limits: Limits) -> int | None:
  """The bucket of a clip: among those that take it the nearest aspect ratio, then most frames, then most pixels."""
  fitting = [index for index, bucket in enumerate(buckets) if refusal(info, bucket, limits) is None]
  order = lambda index: (round(_crop(info, buckets[index]), 3), -buckets[index].frames, -buckets[index].pixels, index)
  return min(fitting, key=order, default=None)


@dataclasses.dataclass
class Report:
  """What became of the clips of a set.

  Attributes:
    buckets: the buckets asked for.
    clips, seconds: kept in each bucket.
    refused: for each bucket, how many of the *dropped* clips it refused for which reason.
    reasons: dropped clips by the reason of the bucket that they came nearest to.
    longest_s, largest, fastest: the longest duration, largest (width, height) and highest rate of the set.
  """

  buckets: tuple[Bucket, ...]
  clips: list[int]
  seconds: list[float]
  refused: list[collections.Counter[str]]
  reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  longest_s: float = 0.0
  largest: tuple[int, int] = (0, 0)
  fastest: float = 0.0

  @property
  def kept(self) -> int:
    return sum(self.clips)

  @property
  def dropped(self) -> int:
    return self.reasons.total()

  def to_json(self) -> dict[str, Any]:
    """{kept, dropped, reasons: {reason: clips}, buckets: [{bucket, clips, hours, refused: {reason: clips}}]}."""
    rows = zip(self.buckets, self.clips, self.seconds, self.refused, strict=True)
    return {
      "kept": self.kept,
      "dropped": self.dropped,
      "reasons": dict(self.reasons),
      "buckets": [
        {"bucket": bucket.name, "clips": clips, "hours": seconds / 3600, "refused": dict(refused)}
        for bucket, clips, seconds, refused in rows
      ],
    }

  def summary(self) -> str:
    """One line: kept, dropped, why."""
    why = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
    return f"kept {self.kept} of {self.kept + self.dropped} clips" + (f", dropped {self.dropped}: {why}" if why else "")

  def __str__(self) -> str:
    """The table: a line a bucket with what it holds and for what it refused the clips that no bucket took."""
    width = max(len("bucket"), *(len(bucket.name) for bucket in self.buckets))
    lines = [f"{'bucket':{width}} {'clips':>9} {'hours':>9}   refused: " + " ".join(f"{r:>9}" for r in REASONS)]
    for bucket, clips, seconds, refused in zip(self.buckets, self.clips, self.seconds, self.refused, strict=True):
      counts = " ".join(f"{refused[reason]:>9}" for reason in REASONS)
      lines.append(f"{bucket.name:{width}} {clips:>9} {seconds / 3600:>9.2f}            {counts}")
    return "\n".join([*lines, self.summary()])


def assign(
  infos: Iterable[ClipInfo], buckets: Sequence[Bucket], limits: Limits = Limits()
) -> tuple[tuple[np.ndarray, ...], Report]:
  """Sorts a set into buckets.

  Returns:
    For each bucket the numbers of its clips (int64, ascending), and the report.

  Raises:
    ConfigError: no buckets, or one twice.
    DataError: the set is empty or nothing is left of it; names the cause and the mend.
  """
  buckets = tuple(buckets)
  if not buckets or len(set(buckets)) < len(buckets):
    raise ConfigError(f"buckets are {[bucket.name for bucket in buckets]}; give at least one, and each once")
  members: list[list[int]] = [[] for _ in buckets]
  report = Report(buckets, [0] * len(buckets), [0.0] * len(buckets), [collections.Counter() for _ in buckets])
  number = -1
  for number, info in enumerate(infos):
    report.longest_s = max(report.longest_s, info.duration_s)
    report.fastest = max(report.fastest, info.fps)
    report.largest = max(report.largest, (info.width, info.height), key=lambda size: size[0] * size[1])
    chosen = best(info, buckets, limits)
    if chosen is not None:
      members[chosen].append(number)
      report.clips[chosen] += 1
      report.seconds[chosen] += info.duration_s
      continue
    refusals = [refusal(info, bucket, limits) or "" for bucket in buckets]
    for refused, reason in zip(report.refused, refusals, strict=True):
      refused[reason] += 1
    easiest = min(range(len(buckets)), key=lambda b: (_crop(info, buckets[b]), buckets[b].pixels))
    report.reasons[refusals[easiest]] += 1
  if number < 0:
    raise DataError("the set has no clips; look at its quarantine.jsonl or its filter for where they went")
  if not report.kept:
    raise DataError(_nothing_left(report, limits))
  return tuple(np.asarray(clips, np.int64) for clips in members), report


def _nothing_left(report: Report, limits: Limits) -> str:
  """The cause by numbers, and for the commonest reason the value that would let clips in."""
  reason = report.reasons.most_common(1)[0][0]
  shortest = min(report.buckets, key=lambda bucket: bucket.span_s)
  smallest = min(report.buckets, key=lambda bucket: bucket.height * bucket.width)
  width, height = report.largest
  fitting = int(max(report.longest_s - 1 / max(report.fastest, 1e-9), 0) * shortest.fps + 1)
  advice = {
    "too_short": f"the longest clip lasts {report.longest_s:.2f} s, the shortest bucket {shortest.name} needs "
    f"{shortest.span_s:.2f} s and one frame; use a bucket of at most {fitting} frames at {shortest.fps:g} fps",
    "low_fps": f"the fastest clip has {report.fastest:g} fps; use buckets of at most "
    f"{report.fastest * limits.repeat:.4g} fps",
    "too_small": f"the largest clip is {width}x{height}, the smallest bucket {smallest.width}x{smallest.height} "
    f"(width x height), and pictures are enlarged by at most {limits.enlarge:g}; use a smaller bucket",
    "aspect": f"the crop may not leave less than {limits.kept:g} of a picture; add a bucket whose width/height is near "
    f"{width / max(height, 1):.2f}",
  }[reason]
  return f"no clip fits any bucket: {report.summary()}; {advice}"


def batch_sizes(
  buckets: Sequence[Bucket],
  *,
  batch: int | None = None,
  token_budget: int | None = None,
  tokens: Sequence[int] | None = None,
  multiple_of: int = 1,
) -> tuple[int, ...]:
  """Clips a global batch of each bucket: `batch`, or as many as `token_budget` holds.

  Args:
    buckets: the buckets.
    batch: the same size for all; or None, and then
    token_budget: most tokens in a global batch, with
    tokens: the tokens of one clip in each bucket (pixels where None).
    multiple_of: what the mesh divides a batch by.

  Raises:
    ConfigError: a size that does not divide; names the legal ones.
  """
  if (batch is None) == (token_budget is None):
    raise ConfigError(f"batch is {batch} and token_budget {token_budget}; set one of the two")
  if batch is not None:
    if batch < 1 or batch % multiple_of:
      below = batch // multiple_of * multiple_of
      legal = " or ".join(str(size) for size in (below, below + multiple_of) if size > 0)
      raise ConfigError(
        f"a batch of {batch} clips does not divide over the mesh, the processes and the accumulation, which need a "
        f"multiple of {multiple_of}; use {legal}"
      )
    return (batch,) * len(buckets)
  assert token_budget is not None
  costs = tokens if tokens is not None else [bucket.pixels for bucket in buckets]
  sizes = [token_budget // cost // multiple_of * multiple_of for cost in costs]
  for bucket, size, cost in zip(buckets, sizes, costs, strict=True):
    if size < 1:
      raise ConfigError(
        f"a token budget of {token_budget} does not hold {multiple_of} clips (what the mesh needs) of bucket "
        f"{bucket.name}, {cost} tokens each; use at least {multiple_of * cost}, or a smaller bucket"
      )
  return tuple(sizes)
