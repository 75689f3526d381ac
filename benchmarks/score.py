"""What measuring costs beside decoding: milliseconds a clip for each scorer, and the share of the clip's bare decode.

    python benchmarks/score.py ../shared/videos --json score.json

Every video of the folder of at most 20 s is a clip. "bare decode" reads all its frames and looks at none; "decode" is
the one pass that all scorers share (frames, luma, thumbnails and motion vectors taken along). One process, one thread.
"""

import argparse
import json
import pathlib
import statistics
import time

import cv2

from kling_jax import measure
from kling_jax.data import container, decode, folder, reasons
from kling_jax.measure.sample import WHOLE_S


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--scorers", default="default", help="as of kling score")
  parser.add_argument("--limit", type=int, default=12, help="clips")
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  cv2.setNumThreads(1)
  scorers = measure.chosen(args.scorers.split(","))
  rows = []
  for path in folder.find_videos(args.folder):
    try:
      info = decode.probe(path, decode=False)
    except reasons.MediaError:
      continue
    if info.duration_s > WHOLE_S or info.num_frames < 24 or len(rows) == args.limit:
      continue
    measure.score_media(path, scorers)  # the first call of everything, and the file into memory
    clock = time.perf_counter()
    with container.open_video(path) as video:
      frames = sum(1 for _ in video.frames())
    bare = time.perf_counter() - clock
    timings: dict[str, float] = {}
    measure.score_media(path, scorers, timings=timings)
    name = pathlib.Path(path).name
    rows.append({"clip": name, "height": info.height, "frames": frames, "bare_decode": bare, **timings})
  names = ["bare_decode", "decode", *(scorer.name for scorer in scorers)]
  print(f"{len(rows)} clips, median ms a clip:")
  for name in names:
    print(f"  {name:<28}{1e3 * statistics.median(row[name] for row in rows):8.1f}")
  measuring = [sum(row[scorer.name] for scorer in scorers) for row in rows]
  shares = [
    (row["decode"] - row["bare_decode"] + m) / row["bare_decode"] for row, m in zip(rows, measuring, strict=True)
  ]
  print(f"  {'all scorers':<28}{1e3 * statistics.median(measuring):8.1f}")
  print(f"measuring beside bare decoding: {statistics.median(shares):.2f} of it (median), {max(shares):.2f} at most")
  if args.json:
    args.json.write_text(json.dumps({"clips": rows, "share": shares}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
