"""The card of a clip set: what is in it, from where, by whom measured and under which licences; `card.json`, README.md.

It is written anew whenever the set's table is, from the table alone, so that it never lags behind. Licences are what
people state in `licences.json` ({"default": name, "videos": {video_id: name}}); nothing is guessed, and what is not
stated counts as unknown.
"""

import collections
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kling_jax import files
from kling_jax.errors import DataError

CARD, README, LICENCES = "card.json", "README.md", "licences.json"
UNKNOWN = "unknown"
MOST = 20  # rows of a table of the README


def facts(table: pa.Table, recipe: str, shards: int, size_bytes: int, licences: Mapping[str, Any]) -> dict[str, Any]:
  """What the card says of a set.

  Args:
    table: of the set (`clip_table.SCHEMA`). recipe: what decided its frames. shards, size_bytes: of its records.
    licences: {"default", "videos"}, see `read_licences`.
  """
  kept = pc.equal(table["status"], "kept")
  seconds = pc.subtract(table["end_s"], table["start_s"])
  sum_of = lambda values: float(pc.sum(values).as_py() or 0.0)
  lasts = pc.quantile(seconds, [0.0, 0.5, 1.0]).to_pylist() if len(table) else [0.0] * 3
  sizes = collections.Counter(zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True))
  reasons = collections.Counter(table.filter(pc.invert(kept))["status_reason"].to_pylist())
  captioners = collections.Counter(
    " ".join(filter(None, pair)) or UNKNOWN
    for pair, caption in zip(
      zip(table["captioner"].to_pylist(), table["caption_model"].to_pylist(), strict=True),
      table["caption"].to_pylist(), strict=True,
    )
    if caption
  )  # fmt: skip
  stated = licences.get("videos", {})
  default = licences.get("default", UNKNOWN)
  licensed = collections.Counter(stated.get(video, default) for video in table["video_id"].to_pylist())
  return {
    "clips": len(table),
    "kept": int(pc.sum(kept).as_py() or 0),
    "videos": pc.count_distinct(table["video_id"]).as_py(),
    "hours": sum_of(seconds) / 3600,
    "hours_kept": sum_of(seconds.filter(kept)) / 3600,
    "seconds_a_clip": dict(zip(("least", "median", "most"), lasts, strict=True)),
    "sizes": {f"{width}x{height}": count for (width, height), count in sizes.most_common()},
    "salvaged": int(pc.sum(table["salvaged"]).as_py() or 0),
    "dropped_by": dict(reasons.most_common()),
    "licences": dict(licensed.most_common()),
    "captions": dict(captioners.most_common()),
    "scores": _scores(table),
    "recipe": recipe,
    "recipe_hash": hashlib.sha256(recipe.encode()).hexdigest()[:16],
    "shards": shards,
    "bytes": size_bytes,
  }


def write(folder: str | os.PathLike[str], table: pa.Table, recipe: str, shards: Sequence[tuple[int, int]]) -> None:
  """Writes both forms beside the table.

  Args:
    shards: (records, bytes) of each.

  Raises:
    DataError: licences.json is damaged.
  """
  folder = pathlib.Path(folder)
  found = facts(table, recipe, len(shards), sum(size for _, size in shards), read_licences(folder))
  files.write_json(folder / CARD, found)
  files.write_text(folder / README, markdown(folder.resolve().name, found))


def read_licences(folder: pathlib.Path) -> dict[str, Any]:
  """What licences.json of a set says; {} where there is none.

  Raises:
    DataError: it is damaged.
  """
  path = folder / LICENCES
  if not path.exists():
    return {}
  try:
    held = json.loads(path.read_text(encoding="utf-8"))
    default, videos = held.get("default", UNKNOWN), held.get("videos", {})
    if not isinstance(default, str) or not all(isinstance(v, str) for pair in videos.items() for v in pair):
      raise ValueError("licences are texts")
  except (OSError, ValueError, AttributeError) as error:
    raise DataError(f'{path}: wants {{"default": NAME, "videos": {{VIDEO_ID: NAME}}}} ({error})') from error
  return {"default": default, "videos": videos}


def state_licences(folder: pathlib.Path, default: str | None, videos: Mapping[str, str]) -> None:
  """Adds what is known of licences to licences.json."""
  held = read_licences(folder)
  whole = {"default": default or held.get("default", UNKNOWN), "videos": held.get("videos", {}) | dict(videos)}
  files.write_json(folder / LICENCES, whole)


def markdown(name: str, found: Mapping[str, Any]) -> str:
  """The README: YAML front matter as dataset hubs read it, then tables."""
  licences = found["licences"]
  [only] = licences if len(licences) == 1 else ["other"]
  lines = [
    "---", f"license: {json.dumps('unknown' if only == UNKNOWN else only)}", "task_categories: [text-to-video]",
    f"size_categories: [{_size_category(found['clips'])}]", "---", "", f"# {_plain(name)}", "",
    f"{found['kept']:,} of {found['clips']:,} clips are kept, {found['hours_kept']:.2f} of {found['hours']:.2f} hours, "
    f"from {found['videos']:,} videos.", "",
    f"A clip lasts {found['seconds_a_clip']['least']:.2f} to {found['seconds_a_clip']['most']:.2f} s, the median "
    f"{found['seconds_a_clip']['median']:.2f} s. {found['salvaged']:,} come from damaged files.", "",
  ]  # fmt: skip
  for title, counts in (
    ("Licences", licences), ("Sizes", found["sizes"]), ("Captions by", found["captions"]),
    ("Dropped by", found["dropped_by"]),
  ):  # fmt: skip
    lines += _counts(title, counts)
  if found["scores"]:
    lines += ["## Scores", "", "| score | scorer | clips | least | mean | most |", "|---|---|---|---|---|---|"]
    lines += [
      f"| {_plain(row['name'])} | {_plain(row['scorer'])} {_plain(row['version'])} | {row['clips']:,} "
      f"| {row['least']:.4g} | {row['mean']:.4g} | {row['most']:.4g} |"
      for row in found["scores"]
    ]
    lines.append("")
  made = f"{found['shards']} shards, {found['bytes']:,} bytes; recipe `{found['recipe_hash']}`:"
  lines += ["## Made by", "", made, "", "```", *found["recipe"].replace("```", "").splitlines(), "```", ""]
  return "\n".join(lines)


def _counts(title: str, counts: Mapping[str, int]) -> list[str]:
  if not counts:
    return []
  shown = [f"| {_plain(name)} | {count:,} |" for name, count in list(counts.items())[:MOST]]
  more = [f"| {len(counts) - MOST} others | {sum(list(counts.values())[MOST:]):,} |"] if len(counts) > MOST else []
  return [f"## {title}", "", "| | clips |", "|---|---|", *shown, *more, ""]


def _plain(text: str) -> str:
  """A text of strangers in a table's cell."""
  return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")[:200]


def _size_category(clips: int) -> str:
  """As dataset hubs name them."""
  names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")
  return next((name for power, name in enumerate(names, 3) if clips < 10**power), "100M<n<1B")


def _scores(table: pa.Table) -> list[dict[str, Any]]:
  """Count, least, mean and most of each score by each scorer, in the order of their names."""
  parts = []
  for chunk in table["scores"].chunks:
    entries = pc.list_flatten(chunk.cast(pa.list_(pa.struct([("key", pa.string()), ("value", chunk.type.item_type)]))))
    values = pc.struct_field(entries, "value")
    fields = {name: pc.struct_field(values, name) for name in ("value", "scorer", "version")}
    parts.append(pa.table({"name": pc.struct_field(entries, "key"), **fields}))
  whole = pa.concat_tables(parts) if parts else pa.table({n: [] for n in ("name", "value", "scorer", "version")})
  if not len(whole):
    return []
  how = [("value", "count"), ("value", "min"), ("value", "mean"), ("value", "max")]
  found = whole.group_by(["name", "scorer", "version"]).aggregate(how).to_pylist()
  rows = [
    {"name": row["name"], "scorer": row["scorer"], "version": row["version"], "clips": row["value_count"],
     "least": row["value_min"], "mean": row["value_mean"], "most": row["value_max"]}
    for row in found
  ]  # fmt: skip
  return sorted(rows, key=lambda row: (row["name"], row["scorer"], row["version"]))
