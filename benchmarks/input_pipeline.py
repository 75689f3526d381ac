"""Clips a second of the input pipeline: from records and from raw files, with more and fewer threads and workers.

  python benchmarks/input_pipeline.py [--videos DIR] [--size 64] [--seconds 6] [--step-ms 200] [--json OUT]

The same spans of the same videos are read in two ways: cut into an ArrayRecord set (group_size:1, H.264 clips), and
from the raw files (a table of spans, decoded from the keyframe before). Both go through the same pipeline.
The second table drives the pipeline with a step that takes `--step-ms` and reports the part of the time for which the
step waited for data. Without --videos, films of the procedural world are rendered. Rounds alternate between the
settings, so that a slow spell of the machine meets all of them; the best round counts.
"""

import argparse
import csv
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence

from kling_jax import progress
from kling_jax.data import cut, films, folder, koala, mixture, pipeline, probe, record
from kling_jax.data.records import RecordSource, RecordWriter
from kling_jax.data.table import TableSource
from kling_jax.data.tokens import ByteTokenizer
from kling_jax.errors import DataError

SPAN_S = 2.5
ROUNDS = 2


def prepare(
  videos: Sequence[pathlib.Path], where: pathlib.Path, short_side: int, spans: int
) -> dict[str, mixture.Mixture]:
  """Cuts `spans` spans of SPAN_S seconds out of each video into records, and writes the table of the same spans."""
  rows = []
  with RecordWriter(where / "set", recipe=f"benchmark-{short_side}") as writer:
    for path in progress.track(videos, "cut clips"):
      info = probe.probe(path)
      ticks = round(SPAN_S / info.time_base)
      starts = range(info.start_pts, info.end_pts - ticks + 1, ticks)[:spans]
      for index, start in enumerate(starts):
        media = cut.cut(path, start, start + ticks, short_side=min(short_side, info.height, info.width)).media
        clip = probe.probe(media)
        name = record.clip_id(record.content_hash(path), start, start + ticks, info.time_base, "benchmark")
        writer.write(
          record.ClipRecord(
            name, path.stem, str(path), start, start + ticks, str(info.time_base), clip.fps, clip.width, clip.height,
            clip.num_frames, index, caption=f"{path.stem}, part {index}",
          ),
          media,
        )  # fmt: skip
        from_s = (start - info.start_pts) * float(info.time_base)
        rows.append((str(path), koala.format_span(from_s, from_s + SPAN_S), f"{path.stem}, part {index}"))
  if not rows:
    raise DataError(f"no video lasts {SPAN_S} s; give longer ones")
  with (where / "clips.csv").open("w", newline="") as file:
    csv.writer(file).writerows([("url", "timestamp", "caption"), *rows])
  sources = {"records": RecordSource(where / "set"), "raw files": TableSource(where / "clips.csv")}
  return {kind: mixture.Mixture((source,)) for kind, source in sources.items()}


def throughput(batches: pipeline.Batches, threads: int, workers: int, seconds: float) -> float:
  """Clips a second over about `seconds`, once what was built during the start is used up."""
  stream = batches.iterate(0, threads=threads, workers=workers)
  for _ in range((threads + 3) * max(workers, 1)):
    next(stream)
  start, clips = time.perf_counter(), 0
  for _, batch in stream:
    clips += len(batch["index"])
    if time.perf_counter() - start > seconds:
      break
  spent = time.perf_counter() - start
  stream.close()
  return clips / spent


def data_wait(batches: pipeline.Batches, threads: int, workers: int, step_s: float, seconds: float) -> float:
  """Part of the time for which steps of `step_s` seconds wait; the step sleeps, as a host does beside a device."""
  stream = batches.iterate(0, threads=threads, workers=workers)
  next(stream)
  steps = max(int(seconds / step_s), 5)
  waited, begin = 0.0, time.perf_counter()
  for _ in range(steps):
    time.sleep(step_s)
    asked = time.perf_counter()
    next(stream)
    waited += time.perf_counter() - asked
  spent = time.perf_counter() - begin
  stream.close()
  return waited / spent


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--videos", type=pathlib.Path, help="folder of videos; films are rendered where absent")
  parser.add_argument("--frames", type=int, default=9)
  parser.add_argument("--fps", type=float, default=8.0)
  parser.add_argument("--size", type=int, default=64, help="height and width of the batch")
  parser.add_argument("--short-side", type=int, default=144, help="of the clips in the records")
  parser.add_argument("--spans", type=int, default=4, help=f"most spans of {SPAN_S} s that one video gives")
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--seconds", type=float, default=2.0, help="measured in each round of each setting")
  parser.add_argument("--step-ms", type=float, default=200.0, help="of the step that the data wait is measured against")
  parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 4])
  parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix="kling-bench-") as name:
    where = pathlib.Path(name)
    if args.videos:
      videos = [pathlib.Path(path) for path in sorted(folder.find_videos(args.videos))]
      videos = [path if path.is_absolute() else args.videos / path for path in videos]
    else:
      videos = films.render_films(where / "films", count=3, seconds=10.0)
    sources = prepare(readable(videos), where, args.short_side, args.spans)
    bucket = [(args.frames, args.size, args.size)]
    batches = {
      kind: pipeline.Batches(source, buckets=bucket, fps=args.fps, batch=args.batch, tokenizer=ByteTokenizer(64))
      for kind, source in sources.items()
    }
    report(args, batches)


def readable(videos: Sequence[pathlib.Path]) -> list[pathlib.Path]:
  """Those videos that decode and last long enough; the others are named."""
  good = []
  for path in videos:
    try:
      info = probe.probe(path)
    except DataError as error:
      print(f"left out: {error}")
      continue
    if info.end_pts - info.start_pts >= round(SPAN_S / info.time_base):
      good.append(path)
  return good


def report(args: argparse.Namespace, batches: dict[str, pipeline.Batches]) -> None:
  clips = sum(len(part) for part in batches["records"].clips)
  settings = [(kind, threads, workers) for workers in args.workers for threads in args.threads for kind in batches]
  best: dict[tuple[str, int, int], float] = {}
  for _ in range(ROUNDS):
    for kind, threads, workers in progress.track(settings, "measure"):
      rate = throughput(batches[kind], threads, workers, args.seconds)
      best[kind, threads, workers] = max(best.get((kind, threads, workers), 0.0), rate)
  print(f"{clips} clips of {SPAN_S} s; batches of {args.batch} x {args.frames} x {args.size} x {args.size}; "
        f"{os.cpu_count()} cores")  # fmt: skip
  print(f"{'workers':>8} {'threads':>8} {'records clips/s':>16} {'raw files clips/s':>18} {'ratio':>7}")
  rows = []
  for workers in args.workers:
    for threads in args.threads:
      fast, slow = best["records", threads, workers], best["raw files", threads, workers]
      rows.append({"workers": workers, "threads": threads, "records": fast, "raw_files": slow, "ratio": fast / slow})
      print(f"{workers:>8} {threads:>8} {fast:>16.1f} {slow:>18.1f} {fast / slow:>7.2f}")
  waits = []
  print(f"\nwaiting for data beside a step of {args.step_ms:g} ms\n{'threads':>8} {'records':>16} {'raw files':>18}")
  for threads in args.threads:
    wait = {kind: data_wait(batches[kind], threads, 0, args.step_ms / 1000, args.seconds) for kind in batches}
    waits.append({"threads": threads, "records": wait["records"], "raw_files": wait["raw files"]})
    print(f"{threads:>8} {wait['records']:>16.2%} {wait['raw files']:>18.2%}")
  if args.json:
    args.json.write_text(json.dumps({"clips": clips, "throughput": rows, "data_wait": waits, "step_ms": args.step_ms}))


if __name__ == "__main__":
  main()
