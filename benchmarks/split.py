"""Finds transitions with kling and with PySceneDetect on the same files: F1 by kind, false alarms by decoy, time.

    python benchmarks/split.py ../shared/videos                       annotated videos of a folder
    python benchmarks/split.py ../shared/videos --synthetic 210       and films made up from its footage
    python benchmarks/split.py ... --methods default,css,content,adaptive,histogram,hash --json split.json
    python benchmarks/split.py ... --methods default,transnetv2:transnetv2.onnx         with weights of yours, in ONNX

Annotated: transitions.json ({file: [{start_frame, end_frame, kind}]}), and MANIFEST.csv whose column has_transitions is
0 for videos of one shot; derived/films is read in the same way, with decoys.json. Synthetic: films of data/edits.py at
640 x 360, H.264, with dissolves, fades and wipes of 8, 16 and 30 frames, from footage that the shipped network was not
trained on (the names in its card.json are left out).

A transition is found when a detected one overlaps it within 2 frames, each detected one at most once; a fade out with
the fade in after it is one transition. `iou` is the mean overlap of found gradual ones with the truth. A false alarm
counts for the decoy that it touches. PySceneDetect (`pip install 'kling_jax[bench]'`) runs with its defaults.
"""

import argparse
import collections
import csv
import dataclasses
import functools
import json
import pathlib
import tempfile
import time
from collections.abc import Callable

import numpy as np

from kling_jax import assets
from kling_jax.curation import split, split_command
from kling_jax.data import container, decode, edits, encode

TOLERANCE = 2  # frames
TRANSNET = "transnetv2:"  # before the file of its weights; PySceneDetect runs it
SIZE, FRAMES, RATE, CHOICES = (360, 640), 480, 25, (8, 16, 30)
EXCERPT = 150  # frames of a piece of footage in memory


@dataclasses.dataclass(frozen=True)
class Span:
  """Frames of a transition or decoy; `label` is the kind, with the length of a gradual one where that is known."""

  start_frame: int
  end_frame: int
  kind: str
  label: str = ""


@dataclasses.dataclass
class Case:
  """A video with its truth."""

  video: pathlib.Path
  truth: list[Span]
  decoys: list[Span] = dataclasses.field(default_factory=list)


# ---- sets ------------------------------------------------------------------------------------------------------------


def annotated(folder: pathlib.Path) -> list[Case]:
  """The videos of a folder that have a truth."""
  cases: dict[str, Case] = {}
  manifest = folder / "MANIFEST.csv"
  if manifest.exists():
    for row in csv.DictReader(manifest.open(encoding="utf-8")):
      if row["has_transitions"] == "0" and (folder / row["file"]).exists():
        cases[row["file"]] = Case(folder / row["file"], [])
  decoys = folder / "decoys.json"
  false = json.loads(decoys.read_text(encoding="utf-8")) if decoys.exists() else {}
  for name, spans in json.loads((folder / "transitions.json").read_text(encoding="utf-8")).items():
    found = [Span(d["start_frame"], d["end_frame"], d["kind"]) for d in false.get(name, [])]
    cases[name] = Case(folder / name, merged(spans), found)
  return list(cases.values())


def merged(spans: list[dict]) -> list[Span]:
  """Joins each fade out with the fade in after it."""
  joined: list[Span] = []
  last = ""
  for span in spans:
    kind = "fade" if span["kind"].startswith("fade") else span["kind"]
    if last == "fade_out" and span["kind"] == "fade_in":
      joined[-1] = dataclasses.replace(joined[-1], end_frame=span["end_frame"])
    else:
      kind = "wipe" if kind in ("push", "iris") else kind
      length = f" {span['length']}" if "length" in span else ""
      joined.append(Span(span["start_frame"], span["end_frame"], kind, kind + length))
    last = span["kind"]
  return joined


def synthetic(footage: list[pathlib.Path], transitions: int, folder: pathlib.Path, seed: int) -> list[Case]:
  """Renders films into `folder` until they hold that many transitions."""
  pieces = [piece for piece in map(_excerpt, footage) if len(piece) > 1]
  mixture = edits.Mixture(choices=CHOICES, hold=(12, 70))
  cases: list[Case] = []
  while sum(len(case.truth) for case in cases) < transitions:
    film = edits.plan(seed, len(cases), FRAMES, [len(piece) for piece in pieces], mixture)
    video = folder / f"film-{len(cases):03d}.mp4"
    crf = 20 + 4 * (len(cases) % 4)
    encode.write(video, edits.frames(film, pieces, *SIZE), fps=RATE, crf=crf)
    truth = [Span(e.start_frame, e.end_frame, e.kind, _label(e)) for e in film.edits]
    cases.append(Case(video, truth, [Span(d.start_frame, d.end_frame, d.kind) for d in film.decoys]))
  return cases


def _excerpt(path: pathlib.Path) -> np.ndarray:
  frames = []
  for _, _, frame in decode.iterate(path, size=SIZE):
    frames.append(frame)
    if len(frames) == EXCERPT:
      break
  return np.stack(frames)


def _label(edit: edits.Edit) -> str:
  if edit.kind in ("cut", "fade"):
    return edit.kind
  return f"{edit.kind} {edit.end_frame - edit.start_frame - 1}"


def unseen(folder: pathlib.Path) -> list[pathlib.Path]:
  """Videos of one shot below a folder that share no group with what the shipped network was trained on."""
  card = json.loads((assets.folder("shot_net") / "card.json").read_text(encoding="utf-8"))
  rows = list(csv.DictReader((folder / "MANIFEST.csv").open(encoding="utf-8")))
  known = {row["group"] for row in rows if row["file"] in card["footage"]}
  groups: dict[str, str] = {}
  for row in rows:
    whole = row["has_transitions"] == "0" and row["frames"] and int(row["frames"]) >= 30
    if whole and row["group"] not in known and not row["file"].startswith("derived"):
      groups.setdefault(row["group"] + row["file"] * (row["group"] == "koh_lipe"), row["file"])
  return [folder / name for name in groups.values()]


# ---- detectors -------------------------------------------------------------------------------------------------------


def ours(method: str) -> Callable[[pathlib.Path], list[Span]]:
  def run(video: pathlib.Path) -> list[Span]:
    return [Span(t.start_frame, t.end_frame, t.kind) for t in split.split(video, method).transitions]

  return run


def pyscenedetect(name: str) -> Callable[[pathlib.Path], list[Span]]:
  import scenedetect

  if name.startswith(TRANSNET):
    from scenedetect.detectors.transnet_v2 import TransnetV2Detector

    make = functools.partial(TransnetV2Detector, model_path=name.removeprefix(TRANSNET))
  else:
    make = getattr(scenedetect.detectors, f"{name.capitalize()}Detector")

  def run(video: pathlib.Path) -> list[Span]:
    scenes = scenedetect.detect(str(video), make())
    return [Span(start.frame_num - 1, start.frame_num, "cut") for start, _ in scenes[1:]]

  return run


def detector(name: str) -> Callable[[pathlib.Path], list[Span]]:
  return ours(name) if name in split.METHODS else pyscenedetect(name)


def bare_decoding(video: pathlib.Path) -> int:
  with container.open_video(video) as opened:
    return sum(1 for _ in opened.frames())


# ---- measures --------------------------------------------------------------------------------------------------------


def compare(truth: list[Span], found: list[Span]) -> tuple[list[tuple[Span, Span]], list[Span], list[Span]]:
  """(pairs, missed, extra)."""
  left = list(found)
  pairs, missed = [], []
  for span in truth:
    low, high = span.start_frame - TOLERANCE, span.end_frame + TOLERANCE
    hit = next((t for t in left if t.start_frame <= high and t.end_frame >= low), None)
    if hit is None:
      missed.append(span)
    else:
      left.remove(hit)
      pairs.append((span, hit))
  return pairs, missed, left


def overlap(span: Span, found: Span) -> float:
  low, high = max(span.start_frame, found.start_frame), min(span.end_frame, found.end_frame)
  union = max(span.end_frame, found.end_frame) - min(span.start_frame, found.start_frame)
  return max(0, high - low) / union


def measure(cases: list[Case], method: str, verbose: bool) -> dict:
  """One row of the table."""
  run = detector(method)
  found_by, all_by = collections.Counter(), collections.Counter()
  alarms, decoys = collections.Counter(), collections.Counter()
  kinds_right, exact, extras, overlaps = 0, 0, 0, []
  extra_by = collections.Counter()
  wall, cpu = time.perf_counter(), time.process_time()
  answers = [run(case.video) for case in cases]
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  for case, found in zip(cases, answers, strict=True):
    pairs, missed, extra = compare(case.truth, found)
    extras += len(extra)
    for span, hit in pairs:
      found_by[span.label or span.kind] += 1
      kinds_right += span.kind == hit.kind
      exact += span.kind == "cut" and (span.start_frame, span.end_frame) == (hit.start_frame, hit.end_frame)
      overlaps += [overlap(span, hit)] if span.kind != "cut" else []
    all_by.update(span.label or span.kind for span in case.truth)
    decoys.update(decoy.kind for decoy in case.decoys)
    for hit in extra:
      extra_by[hit.kind] += 1
      near = [d for d in case.decoys if hit.start_frame <= d.end_frame + 2 and hit.end_frame >= d.start_frame - 2]
      alarms[near[0].kind if near else "none"] += 1
    if verbose and (missed or extra):
      lost = [f"{s.kind} {s.start_frame}-{s.end_frame}" for s in missed]
      false = [f"{t.kind} {t.start_frame}-{t.end_frame}" for t in extra]
      print(f"  {case.video.name}: missed {', '.join(lost) or '-'}; false {', '.join(false) or '-'}")
  hits, total = sum(found_by.values()), sum(all_by.values())
  precision, recall = hits / max(hits + extras, 1), hits / max(total, 1)
  f1 = {}
  for kind in sorted({label.split()[0] for label in all_by}):
    hit = sum(v for k, v in found_by.items() if k.split()[0] == kind)
    everything = sum(v for k, v in all_by.items() if k.split()[0] == kind)
    f1[kind] = 2 * hit / max(hit + everything + extra_by[kind], 1)
  return {
    "method": method,
    "f1": 2 * precision * recall / max(precision + recall, 1e-9),
    "precision": precision,
    "recall": recall,
    "f1_by_kind": f1,
    "found": {label: f"{found_by[label]}/{all_by[label]}" for label in sorted(all_by)},
    "false_alarms": {kind: f"{alarms[kind]}/{decoys[kind]}" for kind in sorted(decoys)} | {"none": alarms["none"]},
    "kind_right": kinds_right / max(hits, 1),
    "iou": float(np.mean(overlaps)) if overlaps else 0.0,
    "cuts_exact": exact,
    "wall_s": wall,
    "cpu_s": cpu,
  }


def table(name: str, cases: list[Case], methods: list[str], verbose: bool) -> dict:
  clock, cpu = time.perf_counter(), time.process_time()
  frames = sum(bare_decoding(case.video) for case in cases)
  clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
  count = sum(len(case.truth) for case in cases)
  print(f"\n{name}: {len(cases)} videos, {frames} frames, {count} transitions; decoding alone {cpu:.1f} s of CPU")
  print(f"{'method':<11}{'F1':>7}{'P':>7}{'R':>7}{'IoU':>6}{'wall s':>8}{'CPU s':>7}{'x dec':>6}  found; false alarms")
  rows = []
  for method in methods:
    row = measure(cases, method, verbose)
    rows.append(row)
    numbers = f"{row['f1']:>7.3f}{row['precision']:>7.3f}{row['recall']:>7.3f}{row['iou']:>6.2f}"
    speed = f"{row['wall_s']:>8.1f}{row['cpu_s']:>7.1f}{row['cpu_s'] / cpu:>6.2f}"
    print(f"{method:<11}{numbers}{speed}  {row['found']}; {row['false_alarms']}")
    print(f"{'':<11}F1 by kind { {k: round(v, 3) for k, v in row['f1_by_kind'].items()} }")
  return {"set": name, "frames": frames, "transitions": count, "decode_cpu_s": cpu, "rows": rows}


def folder_wall(cases: list[Case]) -> float:
  """Seconds that `kling split` takes over all videos, in processes."""
  clock = time.perf_counter()
  jobs = [{"video": str(c.video), "method": "default", "weights": None, "output": None, "formats": []} for c in cases]
  for _ in split_command.answers(jobs, None):
    pass
  return time.perf_counter() - clock


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--methods", default="default,css,content,adaptive,histogram,hash")
  parser.add_argument("--synthetic", type=int, default=0, help="make films with at least this many transitions as well")
  parser.add_argument("--only_synthetic", action="store_true")
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument("--keep", type=pathlib.Path, help="folder for the films (default: a temporary one)")
  parser.add_argument("--verbose", action="store_true", help="list misses and false alarms")
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  methods = args.methods.split(",")
  answers = []
  with tempfile.TemporaryDirectory() as temporary:
    sets: list[tuple[str, list[Case]]] = []
    if not args.only_synthetic:
      for folder in (args.folder, args.folder / "derived" / "films"):
        if (folder / "transitions.json").exists():
          readable = [case for case in annotated(folder) if _readable(case.video)]
          sets.append((folder.name, readable))
    if args.synthetic:
      folder = args.keep or pathlib.Path(temporary)
      folder.mkdir(parents=True, exist_ok=True)
      sets.append(("synthetic", synthetic(unseen(args.folder), args.synthetic, folder, args.seed)))
    for name, cases in sets:
      answers.append(table(name, cases, methods, args.verbose))
      if {"default", "adaptive"} <= set(methods):
        wall = folder_wall(cases)
        adaptive = next(row["wall_s"] for row in answers[-1]["rows"] if row["method"] == "adaptive")
        answers[-1] |= {"folder_wall_s": wall, "times_adaptive": wall / adaptive}
        print(f"kling split over the folder: {wall:.1f} s, {wall / adaptive:.2f} times PySceneDetect Adaptive's")
  if args.json:
    args.json.write_text(json.dumps(answers, indent=1) + "\n", encoding="utf-8")


def _readable(video: pathlib.Path) -> bool:
  try:
    with container.open_video(video) as opened:
      return next(opened.frames(), None) is not None
  except container.reasons.MediaError as error:
    print(f"left out: {error}")
    return False


if __name__ == "__main__":
  main()
