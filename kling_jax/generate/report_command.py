"""`kling report`: the page of a clip set, or of one or several training runs; flags here, the work when it runs."""

import argparse
import pathlib

from kling_jax.errors import UsageError


def add(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("where", nargs="*", metavar="SET_OR_RUN",
                      help="clip set; or work directories of training runs, several side by side")  # fmt: skip
  parser.add_argument("--input", nargs="+", default=[], metavar="SET_OR_RUN", help="the same, as of other verbs")
  parser.add_argument("--out", metavar="FILE.html", help="of runs (default: RUN/report/index.html of a single one)")


def run(args: argparse.Namespace) -> int:
  from kling_jax.curation import report
  from kling_jax.generate import run_report
  from kling_jax.train import workdir

  folders = [pathlib.Path(place) for place in (*args.where, *args.input)]
  if not folders:
    raise UsageError("kling report needs a clip set or work directories")
  runs = [folder for folder in folders if workdir.is_one(folder)]
  if not runs and len(folders) == 1 and args.out is None:
    print(report.write(folders[0]))
    return 0
  if len(runs) < len(folders):
    other = next(folder for folder in folders if folder not in runs)
    raise UsageError(f"{other} is no work directory of a run; several runs have a page together, a clip set its own")
  if args.out is None and len(runs) > 1:
    raise UsageError("the page of several runs needs --out FILE.html")
  print(run_report.write(runs, pathlib.Path(args.out or runs[0] / "report" / "index.html")))
  return 0
