"""Field accuracy of captioners of our own on clips of the procedural world that none was trained on.

  python benchmarks/captioner.py runs/captioner-mixed runs/captioner-video [--clips 200] [--json OUT]

Each RUN is a work directory of configs/captioner.py; its newest weights are written out, read back as `kling caption`
reads them, and shown clips of the world's seed 1 (training has seed 0), once as videos and once as pictures. A field is
right where the caption states what the clip's script states; "commonest" is what always stating the commonest value
would reach.
"""

import argparse
import json
import math
import pathlib
import sys
import tempfile

import numpy as np

from kling_jax.curation.caption_local import Local
from kling_jax.data.caption_lines import MOVING
from kling_jax.data.worlds import WorldSource
from kling_jax.evals import captions
from kling_jax.train.tasks.captioner import export

WORLD = "shapes-v1"
SEED = 1
ROWS = 20  # clips at a time


def look(source: WorldSource, captioner: Local, still: bool) -> list[dict[str, str]]:
  """What the captioner writes of every clip, or of its middle frame."""
  shape, written = captioner.shape, []
  for start in range(0, len(source), ROWS):
    frames = []
    for index in range(start, start + ROWS):
      duration_s = source.info(index).duration_s
      times_s = duration_s / 2 + (np.arange(shape.frames) + 0.5 - shape.frames / 2) / shape.fps * (not still)
      frames.append(source.frames(index, times_s, shape.size, shape.size))
    written += captioner.write(np.stack(frames))
  return written


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("runs", nargs="+", help="work directories")
  parser.add_argument("--clips", type=int, default=200, help=f"a multiple of {ROWS}")
  parser.add_argument("--json", help="file to write the figures to")
  args = parser.parse_args()
  source = WorldSource(WORLD, -(-args.clips // ROWS) * ROWS, SEED)
  true = {"video": [source.info(index).parts for index in range(len(source))]}
  true["picture"] = [{name: said for name, said in parts.items() if name not in MOVING} for parts in true["video"]]
  found = {}
  for run in args.runs:
    with tempfile.TemporaryDirectory() as folder:
      export(run, folder)
      captioner = Local(folder)
      for kind, truth in true.items():
        written = look(source, captioner, still=kind == "picture")
        found[f"{pathlib.Path(run).name}, {kind}"] = captions.field_accuracy(written, truth)
        print(f"{run}, {kind}: {written[0]}\n  truth: {truth[0]}", flush=True)
  names = list(captions.commonest(true["video"]))
  found["commonest"] = captions.commonest(true["video"])
  print(f"\n{len(source)} clips; standard error of a share: at most {50 / math.sqrt(len(source)):.1f} %\n")
  print("| | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
  for run, shares in found.items():
    print(f"| {run} | " + " | ".join(f"{100 * shares[name]:.0f} %" if name in shares else "-" for name in names) + " |")
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
  return 0


if __name__ == "__main__":
  sys.exit(main())
