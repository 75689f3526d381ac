"""The page of a curated set: funnel with reasons, score histograms, contact sheets of clips, timings."""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np

from kling_jax import page
from kling_jax.curation.funnel import Funnel
from kling_jax.data import clip_table, decode, quarantine, record
from kling_jax.errors import DataError

KEPT_TILES, DROPPED_TILES, REFUSED_ROWS = 18, 12, 50
SHEET_FRAMES = 4  # of a clip, 2 x 2
SHEET_WIDTH, GAP = 320, 4  # pixels of a contact sheet, and between its frames

require = page.require


def write(folder: str | os.PathLike[str], funnel: Funnel | None = None) -> pathlib.Path:
  """Writes report/index.html of a set and returns its path.

  Raises:
    DataError: no set, or a damaged one. UsageError: plotly is missing.
  """
  folder = pathlib.Path(folder)
  document = page.Page(f"Curation of {folder.name}", _subtitle(funnel or Funnel.of_set(folder)))
  add(document, folder, funnel)
  path = folder / "report" / "index.html"
  document.write(path)
  return path


def add(document: page.Page, folder: pathlib.Path, funnel: Funnel | None = None) -> None:
  """Adds the sections of a set to a page (the demo's report holds them too)."""
  funnel = funnel or Funnel.of_set(folder)
  index = clip_table.Index.load(folder)
  rows = index.table.to_pylist()
  _add_funnel(document, funnel)
  _add_scores(document, rows)
  _add_clips(document, index, rows)
  _add_refused(document, folder, funnel)
  _add_timings(document, funnel)


def _subtitle(funnel: Funnel) -> str:
  return f"{funnel.videos} videos, {funnel.clips} clips, {funnel.kept} kept ({_duration(funnel.kept_seconds)})"


def _add_funnel(document: page.Page, funnel: Funnel) -> None:
  document.section("Funnel", "From source files to the clips that are kept. Dropped clips stay in the set, marked.")
  refused = sum(funnel.quarantined.values())
  used = funnel.videos - refused - funnel.duplicates
  stages = [
    ("videos", float(funnel.videos), str(funnel.videos)),
    ("readable", float(funnel.videos - refused), str(funnel.videos - refused)),
    ("distinct", float(used), str(used)),
  ]
  losses: list[dict[str, float]] = [dict(funnel.quarantined), _some("duplicates", funnel.duplicates), {}]
  if not funnel.duplicates:
    del stages[2], losses[2]
  document.funnel(stages, losses)
  # Shots and clips are of another kind than files, so they have bars of their own.
  document.funnel(
    [
      ("shots", float(funnel.shots), str(funnel.shots)),
      ("clips", float(funnel.clips), str(funnel.clips)),
      ("kept", float(funnel.kept), str(funnel.kept)),
    ],
    [_some("shots too short for a clip", funnel.short_shots), dict(funnel.dropped)],
  )
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


def _add_scores(document: page.Page, rows: list[dict[str, Any]]) -> None:
  names = sorted({name for row in rows for name, _ in row["scores"]})
  if not names:
    return
  scorers = {n: f"{s['scorer']} {s['version']}" for row in rows for n, s in row["scores"]}
  document.section("Scores", "Raw values in the units of their scorers; one bar piles up kept and dropped clips.")
  figures = []
  for name in names:
    groups = {
      status: [
        dict(row["scores"])[name]["value"] for row in rows if name in dict(row["scores"]) and row["status"] == status
      ]
      for status in ("kept", "dropped")
    }
    figures.append((f"{name} ({scorers[name]})", page.histogram({k: v for k, v in groups.items() if v}, name)))
  seconds = {"": [row["end_s"] - row["start_s"] for row in rows]}
  figures.append(("length", page.histogram(seconds, "seconds")))
  document.charts(figures)


def _add_clips(document: page.Page, index: clip_table.Index, rows: list[dict[str, Any]]) -> None:
  kept = [row for row in rows if row["status"] == "kept"]
  dropped = [row for row in rows if row["status"] != "kept"]
  for title, chosen, most in (("Kept clips", kept, KEPT_TILES), ("Dropped clips", dropped, DROPPED_TILES)):
    if not chosen:
      continue
    picks = np.unique(np.linspace(0, len(chosen) - 1, min(most, len(chosen))).round().astype(int))
    shown = "all of them" if len(picks) == len(chosen) else f"{len(picks)} of {len(chosen)}, evenly spread"
    document.section(title, f"Four frames of each, in reading order; {shown}.")
    document.gallery(_tiles(index, [chosen[k] for k in picks]))


def _tiles(index: clip_table.Index, rows: Iterable[dict[str, Any]]) -> list[page.Tile]:
  tiles = []
  for row in rows:
    path = index.folder / clip_table.RECORDS / row["shard"]
    _, media = record.unpack(clip_table.read_record(clip_table.open_reader(path), path, row["position"]))
    start = row["start_s"] - row["source_start_s"]
    values = ", ".join(f"{name} {score['value']:.3g}" for name, score in sorted(row["scores"]))
    place = f"{row['video_id']} {start:.2f}–{start + row['end_s'] - row['start_s']:.2f} s"
    words = row["caption"] if len(row["caption"]) <= 160 else row["caption"][:159] + "…"
    text = " · ".join(part for part in (place, values, words) if part)
    note = row["status_reason"] or ("salvaged" if row["salvaged"] else "")
    tiles.append(page.Tile(contact_sheet(media, row), text, note, bad=row["status"] != "kept"))
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


def _add_refused(document: page.Page, folder: pathlib.Path, funnel: Funnel) -> None:
  log = folder / "quarantine.jsonl"
  entries = quarantine.read(log) if log.exists() else []
  if not entries:
    return
  counts = ", ".join(f"{n} {reason}" for reason, n in funnel.quarantined.items())
  document.section("Quarantined files", f"They are left alone where they are; the run went on without them: {counts}.")
  shown = entries[:50]
  document.table(
    ["file", "reason", "what was seen"], [(pathlib.Path(e.source).name, e.reason, e.detail) for e in shown]
  )
  if len(entries) > len(shown):
    document.text(f"... and {len(entries) - len(shown)} more in quarantine.jsonl.")


def _add_timings(document: page.Page, funnel: Funnel) -> None:
  document.section("Timings", "Seconds of work in each stage, summed over processes and runs.")
  total = sum(funnel.timings.values()) or 1.0
  rows = [(stage, f"{seconds:.2f} s", f"{100 * seconds / total:.0f} %") for stage, seconds in funnel.timings.items()]
  if funnel.wall_s:
    rows.append(("last run, wall clock", f"{funnel.wall_s:.2f} s", ""))
  document.table(["stage", "time", "share"], rows)


def _some(name: str, count: int) -> dict[str, float]:
  return {name: float(count)} if count else {}


def _duration(seconds: float) -> str:
  if seconds < 120:
    return f"{seconds:.1f} s"
  if seconds < 7200:
    return f"{seconds / 60:.1f} min"
  return f"{seconds / 3600:.1f} h"
