"""Precision and recall of `kling split` on annotated videos, and its speed against decoding alone.

    python benchmarks/split.py ../shared/videos [--method default] [--json split.json]

The folder holds transitions.json ({file: [{start_frame, end_frame, kind}]}), and MANIFEST.csv whose column
has_transitions is 0 for videos of one shot; derived/films is read in the same way where it is there. A transition is
found when a detected one overlaps it within 2 frames, each detected one at most once; a fade out with the fade in
after it is one transition. `iou` is the mean overlap of the found gradual ones with the annotated span.
"""

import argparse
import collections
import csv
import json
import pathlib
import time

from kling_jax.curation import split
from kling_jax.data import container

TOLERANCE = 2  # frames


def annotated(folder: pathlib.Path) -> dict[pathlib.Path, list[dict]]:
  """{video: transitions} of a folder."""
  videos: dict[pathlib.Path, list[dict]] = {}
  manifest = folder / "MANIFEST.csv"
  if manifest.exists():
    for row in csv.DictReader(manifest.open(encoding="utf-8")):
      if row["has_transitions"] == "0" and (folder / row["file"]).exists():
        videos[folder / row["file"]] = []
  for name, spans in json.loads((folder / "transitions.json").read_text(encoding="utf-8")).items():
    videos[folder / name] = merged(spans)
  return videos


def merged(spans: list[dict]) -> list[dict]:
  """Joins each fade out with the fade in after it."""
  joined: list[dict] = []
  for span in spans:
    kind = "fade" if span["kind"].startswith("fade") else span["kind"]
    if joined and joined[-1]["from"] == "fade_out" and span["kind"] == "fade_in":
      joined[-1] |= {"end_frame": span["end_frame"], "from": "fade"}
    else:
      joined.append({**span, "kind": kind, "from": span["kind"]})
  return joined


def compare(truth: list[dict], found: list) -> tuple[list[tuple[dict, object]], list[dict], list]:
  """(pairs, missed, extra)."""
  left = list(found)
  pairs, missed = [], []
  for span in truth:
    low, high = span["start_frame"] - TOLERANCE, span["end_frame"] + TOLERANCE
    hit = next((t for t in left if t.start_frame <= high and t.end_frame >= low), None)
    if hit is None:
      missed.append(span)
    else:
      left.remove(hit)
      pairs.append((span, hit))
  return pairs, missed, left


def overlap(span: dict, found) -> float:
  low, high = max(span["start_frame"], found.start_frame), min(span["end_frame"], found.end_frame)
  union = max(span["end_frame"], found.end_frame) - min(span["start_frame"], found.start_frame)
  return max(0, high - low) / union


def measure(folder: pathlib.Path, method: str) -> dict:
  """Counts over all annotated videos of a folder."""
  kinds: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
  hits = misses = extras = frames = 0
  seconds = decoding = 0.0
  overlaps = []
  for video, truth in annotated(folder).items():
    try:
      clock = time.perf_counter()
      answer = split.split(video, method)
      seconds += time.perf_counter() - clock
    except container.reasons.MediaError as error:
      print(f"left out: {error}")
      continue
    clock = time.perf_counter()
    with container.open_video(video) as opened:
      frames += sum(1 for _ in opened.frames())
    decoding += time.perf_counter() - clock
    pairs, missed, extra = compare(truth, list(answer.transitions))
    hits, misses, extras = hits + len(pairs), misses + len(missed), extras + len(extra)
    overlaps += [overlap(span, found) for span, found in pairs if span["kind"] != "cut"]
    for span, _ in pairs:
      kinds[span["kind"]][0] += 1
    for span in truth:
      kinds[span["kind"]][1] += 1
    if missed or extra:
      lost = [f"{s['kind']} {s['start_frame']}-{s['end_frame']}" for s in missed]
      false = [f"{t.kind} {t.start_frame}-{t.end_frame}" for t in extra]
      print(f"{video.name}: missed {', '.join(lost) or '-'}; false {', '.join(false) or '-'}")
  precision, recall = hits / max(hits + extras, 1), hits / max(hits + misses, 1)
  return {
    "folder": folder.name,
    "method": method,
    "precision": precision,
    "recall": recall,
    "f1": 2 * precision * recall / max(precision + recall, 1e-9),
    "found_by_kind": {kind: f"{a}/{b}" for kind, (a, b) in sorted(kinds.items())},
    "iou": sum(overlaps) / max(len(overlaps), 1),
    "false": extras,
    "frames": frames,
    "frames_per_s": frames / seconds,
    "times_decoding": seconds / decoding,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--method", default="default")
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  folders = [
    folder for folder in (args.folder, args.folder / "derived" / "films") if (folder / "transitions.json").exists()
  ]
  rows = [measure(folder, args.method) for folder in folders]
  print(f"{'set':<10}{'precision':>10}{'recall':>8}{'F1':>7}{'IoU':>7}{'frames/s':>10}{'x decode':>10}  found by kind")
  for row in rows:
    numbers = f"{row['precision']:>10.3f}{row['recall']:>8.3f}{row['f1']:>7.3f}{row['iou']:>7.3f}"
    speed = f"{row['frames_per_s']:>10.0f}{row['times_decoding']:>10.2f}"
    print(f"{row['folder']:<10}{numbers}{speed}  {row['found_by_kind']}")
  if args.json:
    args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
