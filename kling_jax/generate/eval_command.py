"""`kling eval`: one action a metric; flags here, the work is imported when it runs."""

import argparse
from collections.abc import Callable

from kling_jax import answers
from kling_jax.errors import UsageError


def _add_control(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", required=True, help="work directory of a video_dit run that is told scores")
  parser.add_argument("--baseline", help="another one, e.g. with model.told = caption, on the same texts and seeds")
  parser.add_argument("--out", help="folder for control.json and index.html (default: WORKDIR/report/control)")
  parser.add_argument("--pairs", type=int, default=48, help="texts and seeds, from held-out videos (default: 48)")
  parser.add_argument("--seed", type=int, default=0, help="of the first pair")
  parser.add_argument("--levels", default="0,0.5,1", help="of the raised score, from its 1st (0) to its 99th (1) "
                      "percentile (default: 0,0.5,1)")  # fmt: skip
  parser.add_argument("--scorers", default="default", help="who measures: as of `kling score` (default: default)")
  parser.add_argument("--step", type=int, help="checkpoint of both (default: the newest)")
  parser.add_argument("--steps", type=int, help="sampler steps")
  parser.add_argument("--guidance_scores", type=float, help="score scale; 1 = off")
  parser.add_argument("--batch", type=int, help="videos a network call")
  answers.add_flag(parser)


def _control(args: argparse.Namespace) -> int:
  from kling_jax.generate import control, sample

  try:
    levels = tuple(float(word) for word in args.levels.split(","))
  except ValueError as error:
    raise UsageError(f"--levels {args.levels!r} wants numbers in [0, 1] with commas between, e.g. 0,0.5,1") from error
  settings = sample.Settings(steps=args.steps, scores_scale=args.guidance_scores, batch=args.batch)
  words = tuple(word.strip() for word in args.scorers.split(",") if word.strip())
  options = control.Options(args.pairs, args.seed, levels, words, settings, args.step)
  out = args.out or f"{args.workdir}/report/control"
  answer, text = control.run(args.workdir, args.baseline, out, options)
  if args.json:
    answers.show(answer)
  else:
    print(f"{text}\n{out}/index.html")
  return 0


ACTIONS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int], str]] = {
  "control": (_add_control, _control, "Whether a raised score raises itself, and nothing else, in samples."),
}


def add(parser: argparse.ArgumentParser) -> None:
  actions = parser.add_subparsers(dest="action", metavar="METRIC", required=True, parser_class=type(parser))
  for name, (flags, act, summary) in ACTIONS.items():
    sub = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    flags(sub)
    sub.set_defaults(act=act)


def run(args: argparse.Namespace) -> int:
  return args.act(args)
