"""The page of a curated set: funnel, rules, limits to drag, correlations, clips kept and dropped by each rule, timings.

It opens from disk and asks nothing of the network. Its size does not grow with the set: at most TILES pictures of about
30 kB, ROWS rows a table, and 27 kB a score (`explorer`).
"""

import collections
import os
import pathlib
import shlex
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.stats

from kling_jax import page
from kling_jax.curation import duplicates, explorer, journal, rules, select
from kling_jax.curation.clip_columns import ClipColumns
from kling_jax.curation.funnel import Funnel
from kling_jax.data import clip_table, decode, quarantine, record
from kling_jax.errors import DataError

KEPT_TILES, RULE_TILES, TILES = 18, 6, 78  # kept clips, clips of one rule, pictures in all
ROWS = 50  # of a table
SLOWEST = 12
SHOWN = 5  # scores below a clip
SHORT = 160  # characters of a text on the page
SHEET_FRAMES = 4  # of a clip, 2 x 2
SHEET_WIDTH, GAP = 320, 4  # pixels of a contact sheet, and between its frames
_ROW = ("clip_id", "video_id", "start_s", "end_s", "source_start_s", "fps", "width", "height", "caption", "scores",
        "status_reason", "salvaged", "shard", "position")  # fmt: skip


def write(folder: str | os.PathLike[str], funnel: Funnel | None = None) -> pathlib.Path:
  """Writes report/index.html of a set and returns its path.

  Raises:
    DataError: no set, or a damaged one.
  """
  folder = pathlib.Path(folder)
  funnel = funnel or Funnel.of_set(folder)
  document = page.Page(f"Curation of {folder.name}", _subtitle(funnel))
  add(document, folder, funnel)
  path = folder / "report" / "index.html"
  document.write(path)
  return path


def add(document: page.Page, folder: pathlib.Path, funnel: Funnel | None = None) -> None:
  """Adds the sections of a set to a page (the demo's report holds them too)."""
  funnel = funnel or Funnel.of_set(folder)
  columns = select.load(folder)
  reasons = pq.read_table(clip_table.set_folder(folder) / clip_table.TABLE, columns=list(clip_table.MARKS))
  kept = np.array(reasons["status"].to_pylist(), object) == "kept"
  held = select.stored(folder)
  chosen = held[0] if held else ()
  _add_funnel(document, funnel)
  _add_rules(document, folder, held)
  _add_scores(document, columns, chosen, folder)
  _add_correlations(document, columns)
  _add_clips(document, folder, kept, reasons["status_reason"].to_pylist())
  _add_duplicates(document, folder, columns)
  _add_slowest(document, folder)
  _add_refused(document, folder, funnel)
  _add_timings(document, funnel)


def _subtitle(funnel: Funnel) -> str:
  return f"{funnel.videos} videos, {funnel.clips} clips, {funnel.kept} kept ({_duration(funnel.kept_seconds)})"


def _add_funnel(document: page.Page, funnel: Funnel) -> None:
  document.section("Funnel", "From source files to the clips that are kept. Dropped clips stay in the set, marked.")
  refused = sum(funnel.quarantined.values())
  used = funnel.videos - refused - funnel.duplicates
  stages = [
    ("videos", float(funnel.videos), f"{funnel.videos:,}"),
    ("readable", float(funnel.videos - refused), f"{funnel.videos - refused:,}"),
    ("distinct", float(used), f"{used:,}"),
  ]
  losses: list[dict[str, float]] = [dict(funnel.quarantined), _some("copies of another file", funnel.duplicates), {}]
  if not funnel.duplicates:
    del stages[2], losses[2]
  if funnel.videos:
    document.funnel(stages, losses)
  # Shots and clips are of another kind than files, so they have bars of their own.
  made = [("shots", float(funnel.shots), f"{funnel.shots:,}")] if funnel.shots else []
  lost = [_some("shots too short for a clip", funnel.short_shots)] if funnel.shots else []
  clips = [("clips", float(funnel.clips), f"{funnel.clips:,}"), ("kept", float(funnel.kept), f"{funnel.kept:,}")]
  document.funnel([*made, *clips], [*lost, {_short(name, 60): count for name, count in funnel.dropped.items()}])
  document.facts(
    {
      "of video read": _duration(funnel.seconds),
      "in clips": _duration(funnel.clip_seconds),
      "kept": _duration(funnel.kept_seconds),
      "transitions": sum(funnel.transitions.values()),
      "damaged files salvaged": funnel.salvaged,
    }
  )
  if funnel.transitions:
    document.text(f"Transitions: {', '.join(f'{n} {kind}' for kind, n in funnel.transitions.items())}.")


def _add_rules(document: page.Page, folder: pathlib.Path, held: tuple[tuple[rules.Rule, ...], int] | None) -> None:
  if held is None or not held[0]:
    return
  chosen, seed = held
  found = select.evaluate(select.load(folder, chosen), chosen, seed, duplicates.load(folder), strict=False)
  document.section(
    "Rules", "Tried in order; the first that is not true is a clip's reason. Alone: what a rule would drop by itself."
  )
  document.table(
    ["rule", "wants", "seen", "dropped", "unknown", "alone"],
    [(_short(s.name), _short(s.text, 400), s.seen, s.dropped, s.unknown, "" if s.alone is None else s.alone)
     for s in found.steps],
  )  # fmt: skip


def _add_scores(
  document: page.Page, columns: ClipColumns, chosen: tuple[rules.Rule, ...], folder: pathlib.Path
) -> None:
  found = explorer.data(columns, chosen, f"kling select --input {shlex.quote(str(folder))}")
  if not found["columns"]:
    return
  text = "Raw values in the units of their scorers. Drag the limits: the counts follow, and the command does it."
  if found["sample"] < found["total"]:
    text += f" Kept counts come from an even sample of {found['sample']:,} clips, those of one limit from all."
  if found["others"]:
    text += f" Not replayed here: {_short(', '.join(found['others']), 300)}."
  if found["more"]:
    text += f" {found['more']} further columns are left out."
  document.section("Scores", text)
  explorer.add(document, found)


def _add_correlations(document: page.Page, columns: ClipColumns) -> None:
  names = [name for name in explorer.named(columns) if len(np.unique(columns[name].values[columns[name].known])) > 2]
  if columns.has("vtss"):
    names.append("vtss")
  names = names[: explorer.COLUMNS]
  if len(names) < 2 or len(columns) < 4:
    return
  rng = np.random.Generator(np.random.PCG64(0))
  size = min(len(columns), explorer.SAMPLE)
  picks = rng.choice(len(columns), size, replace=False)
  cells = []
  for first in names:
    row: list[float | None] = []
    for second in names:
      a, b = columns[first], columns[second]
      both = picks[a.known[picks] & b.known[picks]]
      flat = len(both) < 3 or np.ptp(a.values[both]) == 0 or np.ptp(b.values[both]) == 0
      row.append(None if flat else float(scipy.stats.spearmanr(a.values[both], b.values[both]).statistic))
    cells.append(row)
  document.section("Correlations", f"Spearman's rank correlation of scores over {size:,} clips.")
  document.heatmap(names, cells)


def _add_clips(document: page.Page, folder: pathlib.Path, kept: np.ndarray, reasons: list[str]) -> None:
  places: dict[str, list[int]] = collections.defaultdict(list)
  for row in np.flatnonzero(~kept):
    places[rules.rule_of(reasons[row])].append(int(row))
  left = TILES
  by_rule = sorted(places.items(), key=lambda item: (-len(item[1]), item[0]))
  groups = [("Kept clips", np.flatnonzero(kept).tolist(), KEPT_TILES)]
  groups += [(f"Dropped by {_short(name, 60)}", rows, RULE_TILES) for name, rows in by_rule]
  for title, rows, most in groups:
    most = min(most, left)
    if not rows or not most:
      continue
    picks = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int))
    left -= len(picks)
    shown = "all of them" if len(picks) == len(rows) else f"{len(picks)} of {len(rows):,}, evenly spread"
    document.section(title, f"Four frames of each, in reading order; {shown}.")
    document.gallery(_tiles(folder, [rows[k] for k in picks], bad=title != "Kept clips"))


def _tiles(folder: pathlib.Path, rows: list[int], bad: bool) -> list[page.Tile]:
  folder = clip_table.set_folder(folder)
  table = pq.read_table(folder / clip_table.TABLE, columns=list(_ROW)).take(pa.array(rows))
  tiles = []
  for row in table.to_pylist():
    path = folder / clip_table.RECORDS / row["shard"]
    _, media = record.unpack(clip_table.read_record(clip_table.open_reader(path), path, row["position"]))
    start = row["start_s"] - row["source_start_s"]
    scores = sorted(row["scores"], key=lambda item: (item[0] not in select.CONDITIONS, item[0]))[:SHOWN]
    values = ", ".join(f"{_short(name, 40)} {score['value']:.3g}" for name, score in scores)
    place = f"{_short(row['video_id'], 80)} {start:.2f}–{start + row['end_s'] - row['start_s']:.2f} s"
    text = " · ".join(part for part in (place, values, _short(row["caption"]), row["clip_id"][:12]) if part)
    note = _short(row["status_reason"]) or ("salvaged" if row["salvaged"] else "")
    tiles.append(page.Tile(contact_sheet(media, row), text, note, bad=bad))
  return tiles


def contact_sheet(media: bytes, row: dict[str, Any]) -> bytes:
  """Four evenly spaced frames of a clip, 2 x 2, as JPEG."""
  width = (SHEET_WIDTH - GAP) // 2
  height = max(2, round(width * row["height"] / row["width"]))
  if height > 2 * width:  # very tall clips are cropped at the centre
    height = 2 * width
  last = row["end_s"] - row["start_s"] - 1 / row["fps"]
  frames = decode.frames_at(media, np.linspace(0, max(last, 0.0), SHEET_FRAMES), height, width)
  sheet = np.full((2 * height + GAP, 2 * width + GAP, 3), 255, np.uint8)
  for k, frame in enumerate(frames):
    top, left = k // 2 * (height + GAP), k % 2 * (width + GAP)
    sheet[top : top + height, left : left + width] = frame
  done, data = cv2.imencode(".jpg", sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])
  if not done:
    raise DataError(f"clip {row['clip_id']}: its contact sheet cannot be encoded")
  return data.tobytes()


def _add_duplicates(document: page.Page, folder: pathlib.Path, columns: ClipColumns) -> None:
  pairs = duplicates.load(folder)
  if pairs is None or not len(pairs):
    return
  clusters = pairs.clusters(columns.ids())
  across = sum(bool(name) for name in pairs.table["other_set"].to_pylist())
  also = f" {across:,} pairs are with clips of other sets." if across else ""
  document.section("Duplicates", f"{len(pairs):,} pairs, {len(clusters):,} groups ({_short(pairs.stated, 300)}).{also}")
  shown = [(len(group), ", ".join(name[:12] for name in group[:12])) for group in clusters[:ROWS]]
  if shown:
    document.table(["clips", "first of them"], shown)


def _add_slowest(document: page.Page, folder: pathlib.Path) -> None:
  entries = [entry for entry in journal.read(folder) if entry["timings"]]
  worst = sorted(entries, key=lambda entry: -sum(entry["timings"].values()))[:SLOWEST]
  if not worst:
    return
  document.section("Slowest files", "Seconds of work, and work for each second of video.")
  rows = []
  for entry in worst:
    total = sum(entry["timings"].values())
    stage = max(entry["timings"], key=entry["timings"].get)
    ratio = f"{total / entry['seconds']:.2f}" if entry["seconds"] else ""
    rows.append((_short(entry["name"], 120), f"{total:.2f} s", ratio, _duration(entry["seconds"]), stage))
  document.table(["file", "work", "work per second", "length", "most of it"], rows)


def _add_refused(document: page.Page, folder: pathlib.Path, funnel: Funnel) -> None:
  log = folder / "quarantine.jsonl"
  entries = quarantine.read(log) if log.exists() else []
  if not entries:
    return
  counts = ", ".join(f"{n} {reason}" for reason, n in funnel.quarantined.items())
  document.section("Quarantined files", f"They are left alone where they are; the run went on without them: {counts}.")
  shown = [(_short(pathlib.PurePath(e.source).name, 120), e.reason, _short(e.detail, 300)) for e in entries[:ROWS]]
  document.table(["file", "reason", "what was seen"], shown)
  if len(entries) > len(shown):
    document.text(f"... and {len(entries) - len(shown):,} more in quarantine.jsonl.")


def _add_timings(document: page.Page, funnel: Funnel) -> None:
  if not funnel.timings:
    return
  document.section("Timings", "Seconds of work in each stage, summed over processes and runs.")
  total = sum(funnel.timings.values()) or 1.0
  rows = [(stage, f"{seconds:.2f} s", f"{100 * seconds / total:.0f} %") for stage, seconds in funnel.timings.items()]
  if funnel.wall_s:
    rows.append(("last run, wall clock", f"{funnel.wall_s:.2f} s", ""))
  document.table(["stage", "time", "share"], rows)


def _some(name: str, count: int) -> dict[str, float]:
  return {name: float(count)} if count else {}


def _short(text: str, most: int = SHORT) -> str:
  """A text on one line, cut where it is long."""
  line = " ".join(text.split())
  return line if len(line) <= most else line[: most - 1] + "…"


def _duration(seconds: float) -> str:
  if seconds < 120:
    return f"{seconds:.1f} s"
  if seconds < 7200:
    return f"{seconds / 60:.1f} min"
  return f"{seconds / 3600:,.1f} h"
