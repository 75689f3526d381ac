"""The funnel of a curated set: how many videos, shots and clips there were, and why some are not kept."""

import collections
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa

from kling_jax.curation import journal, rules
from kling_jax.data import clip_table


@dataclasses.dataclass(frozen=True)
class Funnel:
  """Counts from videos to kept clips.

  Attributes:
    videos: files that were looked at; quarantined: {reason: files}; salvaged: damaged files that gave clips;
      duplicates: files with the content of another one.
    shots: between the transitions; short_shots: too short for a clip. transitions: {kind: count}.
    clips: cut from the shots; dropped: {rule: clips}; kept.
    seconds: of video that could be read; clip_seconds, kept_seconds.
    timings: {stage: seconds of work}, summed over processes; wall_s: of the last call.
  """

  videos: int
  quarantined: dict[str, int]
  salvaged: int
  duplicates: int
  shots: int
  short_shots: int
  transitions: dict[str, int]
  clips: int
  dropped: dict[str, int]
  kept: int
  seconds: float
  clip_seconds: float
  kept_seconds: float
  timings: dict[str, float]
  wall_s: float = 0.0

  @classmethod
  def of_set(cls, folder: str | os.PathLike[str], wall_s: float = 0.0) -> "Funnel":
    """Counts what stands in a set's videos.jsonl and clips.parquet."""
    folder = pathlib.Path(folder)
    videos = journal.read(folder)
    read = [video for video in videos if not video["reason"] and not video["duplicate_of"]]
    timings: collections.Counter[str] = collections.Counter()
    for video in videos:
      timings.update(video["timings"])
    reasons: list[str] = []
    lengths_s = kept_s = np.zeros(0)
    if (folder / clip_table.TABLE).exists():
      columns = ["status", "status_reason", "start_s", "end_s"]
      table = clip_table.Index.load(folder).table.select(columns)
      kept = np.array(table["status"].to_pylist()) == "kept"
      reasons = [rules.rule_of(reason) for reason in table["status_reason"].filter(pa.array(~kept)).to_pylist()]
      lengths_s = table["end_s"].to_numpy() - table["start_s"].to_numpy()
      kept_s = lengths_s[kept]
    return cls(
      videos=len(videos),
      quarantined=_counts(video["reason"] for video in videos if video["reason"]),
      salvaged=sum(bool(video["damage"]) for video in read),
      duplicates=sum(bool(video["duplicate_of"]) for video in videos),
      shots=sum(video["shots"] for video in read),
      short_shots=sum(video["short_shots"] for video in read),
      transitions=_counts(t["kind"] for video in read for t in video["transitions"]),
      clips=len(lengths_s),
      dropped=_counts(reasons),
      kept=len(kept_s),
      seconds=sum(video["seconds"] for video in read),
      clip_seconds=float(lengths_s.sum()),
      kept_seconds=float(kept_s.sum()),
      timings=dict(timings),
      wall_s=wall_s,
    )

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def text(self) -> str:
    """A few lines for the terminal."""
    refused = sum(self.quarantined.values())
    lines = [
      f"{self.videos} videos, {refused} quarantined{_list(self.quarantined)}, {self.duplicates} duplicates, "
      f"{self.salvaged} salvaged",
      f"{self.shots} shots, {self.short_shots} too short; transitions{_list(self.transitions) or ' none'}",
      f"{self.clips} clips, {self.clips - self.kept} dropped{_list(self.dropped)}, {self.kept} kept: "
      f"{self.kept_seconds:.1f} s of {self.seconds:.1f} s",
    ]
    return "\n".join(lines)


def _counts(values: Any) -> dict[str, int]:
  """{value: count}, the most frequent first, equal ones by name."""
  return dict(sorted(collections.Counter(values).items(), key=lambda item: (-item[1], item[0])))


def _list(counts: dict[str, int]) -> str:
  return f" ({', '.join(f'{count} {name}' for name, count in counts.items())})" if counts else ""
