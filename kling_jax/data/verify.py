"""The integrity check of a clip set: every record parses, agrees with the table, and decodes as it says.

What is made of the set is looked at too: its card says what the table says, and its caches are whole.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import typing

from kling_jax import errors, progress
from kling_jax.data import cache, clip_table, probe, record
from kling_jax.data import card as card_lib


@dataclasses.dataclass(frozen=True)
class Report:
  """What `verify` found; `ok` means: every clip can be trusted. Notes are harmless."""

  folder: str
  clips: int
  kept: int
  shards: int
  problems: tuple[str, ...]
  notes: tuple[str, ...] = ()

  @property
  def ok(self) -> bool:
    return not self.problems

  def to_json(self) -> dict[str, typing.Any]:
    return {"ok": self.ok} | dataclasses.asdict(self)

  def text(self) -> str:
    """For people: one line, or one line a problem."""
    head = f"{self.folder}: {self.clips} clips ({self.kept} kept) in {self.shards} shards: "
    said = head + "whole" if self.ok else "\n  ".join([f"{head}{len(self.problems)} problems", *self.problems])
    return "\n  note: ".join([said, *self.notes])


def verify(folder: str | os.PathLike[str], *, decode_media: bool = True) -> Report:
  """Reads a whole set: every record parses, the table agrees with the records, every clip decodes as its header says.

  Raises:
    DataError: there is no set to look at. What is wrong inside one stands in the report.
  """
  index = clip_table.Index.load(folder)
  rows = index.table.to_pylist()
  counts = collections.Counter(row["clip_id"] for row in rows)
  problems = [f"clip {name}: stands {n} times in the table" for name, n in counts.items() if n > 1]
  listed = {shard.file: shard for shard in index.shards}
  places: dict[str, list[dict[str, typing.Any]]] = {name: [] for name in listed}
  for row in rows:
    places.setdefault(row["shard"], []).append(row)
  for name, found in progress.track(places.items(), "verify", len(places)):
    problems += _verify_shard(index.folder / clip_table.RECORDS / name, listed.get(name), found, decode_media)
  kept = sum(row["status"] == "kept" for row in rows)
  notes: list[str] = []
  strays = [path.name for path in clip_table.shard_files(index.folder) if path.name not in listed]
  if strays:
    notes.append(
      f"{len(strays)} shards are no part of the set, as a killed writer leaves them: {', '.join(strays[:3])}"
    )
  problems += _verify_card(index, kept, notes)
  for folder in sorted(index.folder.glob("cache/*/*/")):
    problems += _verify_cache(folder, set(counts), notes)
  return Report(str(index.folder), len(rows), kept, len(listed), tuple(problems), tuple(notes))


def _verify_card(index: clip_table.Index, kept: int, notes: list[str]) -> list[str]:
  """Whether the card says what the table says."""
  path = index.folder / card_lib.CARD
  if not path.exists():
    notes.append(f"no {card_lib.CARD}; `kling data card` writes it")
    return []
  try:
    held = json.loads(path.read_text(encoding="utf-8"))
    said = (held["clips"], held["kept"], held["recipe_hash"])
  except (ValueError, KeyError, TypeError) as error:
    return [f"{path.name} is damaged ({error}); `kling data card` writes it anew"]
  wanted = (len(index.table), kept, hashlib.sha256(index.recipe.encode()).hexdigest()[:16])
  if said != wanted:
    return [f"{path.name} says clips, kept, recipe {said}, the table {wanted}; `kling data card` writes it anew"]
  return []


def _verify_cache(folder: pathlib.Path, clips: set[str], notes: list[str]) -> list[str]:
  """Whether every shard of a cache is whole and none of its values is damaged."""
  where = "/".join(folder.parts[-3:])
  try:
    cache.read_card(folder)
    entries = cache.read_index(folder)
    broken = cache.not_finite(folder, entries)
  except errors.DataError as error:
    return [str(error)]
  gone = sum(bool(clip_id) and clip_id not in clips for _, clip_id in entries)
  if gone:
    notes.append(f"{where}: {gone} of {len(entries)} entries are of clips that are no longer in the set")
  return [f"{where}: {len(broken)} entries hold values that are not finite, first {broken[0]}"] if broken else []


def _verify_shard(
  path: pathlib.Path, listed: clip_table.Shard | None, rows: list[dict[str, typing.Any]], decode_media: bool
) -> list[str]:
  if listed is None:
    return [f"{path.name}: {len(rows)} rows of the table point to it, but it is no shard of the set"]
  try:
    reader = clip_table.open_reader(path)
  except errors.DataError as error:
    return [str(error)]
  problems = []
  size, count = path.stat().st_size, reader.num_records()
  if (count, size) != (listed.records, listed.bytes):
    seen, promised = f"{count} records in {size} bytes", f"{listed.records} in {listed.bytes}"
    problems.append(f"{path.name}: {seen}; the table promises {promised}")
  orphans = set(range(count)) - {row["position"] for row in rows}
  if orphans:
    problems.append(f"{path.name}: {len(orphans)} records without a row, the first at position {min(orphans)}")
  for row in rows:
    where = f"{path.name} record {row['position']} (clip {row['clip_id']})"
    try:
      problems += [f"{where}: {why}" for why in _verify_clip(reader, path, row, decode_media)]
    except errors.DataError as error:
      problems.append(f"{where}: {error}")
  return problems


def _verify_clip(reader: typing.Any, path: pathlib.Path, row: dict[str, typing.Any], decode_media: bool) -> list[str]:
  clip, media = record.unpack(clip_table.read_record(reader, path, row["position"]))
  expected = clip_table.to_row(clip, row["shard"], row["position"])
  problems = [
    f"the table says {name} = {row[name]!r}, the record {expected[name]!r}"
    for name in expected
    if name not in clip_table.MARKS and row[name] != expected[name]
  ]
  if decode_media:
    info = probe.probe(media)
    for name in ("num_frames", "width", "height"):
      if getattr(info, name) != getattr(clip, name):
        problems.append(f"the media has {name} = {getattr(info, name)}, the header says {getattr(clip, name)}")
    problems += [f"the media is damaged: {why}" for why in info.damage]
  return problems
