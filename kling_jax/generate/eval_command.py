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


def _add_videos(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--made", required=True, nargs="+", metavar="DIR_OR_FILE", help="videos that are judged")
  parser.add_argument("--true", nargs="+", default=[], metavar="DIR_OR_FILE", help="real videos to compare with")
  parser.add_argument("--paired", action="store_true", help="each has its truth of the same name: PSNR, SSIM, GMSD")
  parser.add_argument("--size", help="WIDTHxHEIGHT that all are covered and cropped to (default: their own)")
  parser.add_argument("--fps", type=float, help="that all are read at (default: their own)")
  parser.add_argument("--frames", type=int, help="most frames of a video (default: all)")
  _add_page(parser, "eval", video_mae=True)


def _videos(args: argparse.Namespace) -> int:
  from kling_jax.generate import evaluate

  if args.paired and not args.true:
    raise UsageError("--paired needs --true")
  if args.frames is not None and args.frames < 1:
    raise UsageError(f"--frames {args.frames} must be at least 1")
  if args.fps is not None and not args.fps > 0:
    raise UsageError(f"--fps {args.fps:g} must be above 0")
  width, height = _size(args.size)
  size = (height, width) if width and height else None
  reading = evaluate.Reading(args.frames, size, args.fps)
  return _told(
    args,
    evaluate.videos(args.made, args.true, args.out, reading, paired=args.paired, video_mae=args.video_mae),
    args.out,
  )


def _add_run(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", required=True, help="work directory of a video_dit run with held-out clips")
  parser.add_argument("--count", type=int, default=64, help="held-out clips that are sampled for (default: 64)")
  parser.add_argument("--given", default="text", help="text (default): sets are compared; image: the first frame is "
                      "given, too, and pairs are compared")  # fmt: skip
  parser.add_argument("--seed", type=int, default=0, help="of the first sample")
  parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
  parser.add_argument("--steps", type=int, help="sampler steps")
  parser.add_argument("--guidance", type=float, help="text scale; 1 = off")
  parser.add_argument("--frames", type=int)
  parser.add_argument("--size", help="WIDTHxHEIGHT in pixels")
  parser.add_argument("--batch", type=int, help="videos a network call")
  _add_page(parser, "WORKDIR/report/eval", video_mae=True)


def _run(args: argparse.Namespace) -> int:
  from kling_jax.generate import evaluate, sample

  if args.count < 2:
    raise UsageError(f"--count {args.count}: an evaluation needs at least 2 clips")
  width, height = _size(args.size)
  settings = sample.Settings(
    frames=args.frames, height=height, width=width, steps=args.steps, text=args.guidance, batch=args.batch
  )
  answer = evaluate.run(
    args.workdir, args.out, count=args.count, given=args.given, seed=args.seed, step=args.step, settings=settings,
    video_mae=args.video_mae,
  )  # fmt: skip
  return _told(args, answer, args.out or f"{args.workdir}/report/eval")


def _add_rollout(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--input", required=True, nargs="+", metavar="DIR",
                      help="what `kling rollout --out` wrote, or a folder of such folders")  # fmt: skip
  _add_page(parser, "eval")


def _rollout(args: argparse.Namespace) -> int:
  from kling_jax.generate import evaluate_world

  return _told(args, evaluate_world.on_disk(args.input, args.out), args.out)


def _add_world(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", required=True, help="work directory of an owl run that films")
  parser.add_argument("--worlds", type=int, default=8, help="stories of memory-v1 (default: 8)")
  parser.add_argument("--clips", type=int, default=12, help="of each story (default: 12)")
  parser.add_argument("--seed", type=int, default=1, help="of the stories; not that of training's (default: 1)")
  parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
  parser.add_argument("--steps", type=int, help="sampler steps")
  _add_page(parser, "WORKDIR/report/world")


def _world(args: argparse.Namespace) -> int:
  from kling_jax.generate import evaluate_world, rollout

  answer = evaluate_world.world(
    args.workdir, args.out, worlds=args.worlds, clips=args.clips, seed=args.seed, step=args.step,
    settings=rollout.Settings(steps=args.steps),
  )  # fmt: skip
  return _told(args, answer, args.out or f"{args.workdir}/report/world")


def _add_vbench(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", help="work directory of a video_dit run, or of an owl run (VBench-Long, -I2V)")
  parser.add_argument("--suite", metavar="JSON", help="VBench_full_info.json, or vbench2_i2v_full_info.json")
  parser.add_argument("--out", help="folder of the videos; started again, it goes on")
  parser.add_argument("--images", metavar="DIR", help="the pictures of VBench-I2V")
  parser.add_argument("--dimensions", default="", help="only prompts of these, by commas (default: all)")
  parser.add_argument("--limit", type=int, help="first prompts only")
  parser.add_argument("--clips", type=int, default=8, help="of an owl rollout (default: 8)")
  parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
  parser.add_argument("--steps", type=int, help="sampler steps of a video_dit run")
  parser.add_argument("--frames", type=int, help="of a video_dit run")
  parser.add_argument("--scores", metavar="JSON", help="instead: totals of the scores that VBench gave")
  parser.add_argument("--total", default="vbench", help="with --scores: vbench (also Long), i2v, i2v-owl1 (default: "
                      "vbench)")  # fmt: skip
  answers.add_flag(parser)


def _vbench(args: argparse.Namespace) -> int:
  from kling_jax.generate import sample, vbench_export

  if args.scores:
    found = vbench_export.totals(args.scores, args.total)
    text = ", ".join(f"{name} {100 * value:.2f} %" for name, value in found.items())
  else:
    missing = [name for name in ("workdir", "suite", "out") if not getattr(args, name)]
    if missing:
      raise UsageError(f"kling eval vbench needs --{missing[0]}, or --scores")
    dimensions = [word.strip() for word in args.dimensions.split(",") if word.strip()]
    found = vbench_export.export(
      args.workdir, args.suite, args.out, dimensions=dimensions, images=args.images, clips=args.clips, step=args.step,
      settings=sample.Settings(steps=args.steps, frames=args.frames, batch=1), limit=args.limit,
    )  # fmt: skip
    text = f"{args.out}: {found['videos']} videos at {found['fps']:g} fps; in a copy of VBench: {found['command']}"
  if args.json:
    answers.show(found)
  else:
    print(text)
  return 0


def _add_page(parser: argparse.ArgumentParser, out: str, video_mae: bool = False) -> None:
  if video_mae:
    parser.add_argument("--video_mae", metavar="WEIGHTS", help="safetensors of VideoMAE, for FVD and KVD (default: "
                        "distances of features without weights, which are no FVD)")  # fmt: skip
  fixed = None if out.startswith("WORKDIR") else out
  parser.add_argument("--out", default=fixed, help=f"folder for eval.json and index.html (default: {out})")
  answers.add_flag(parser)


def _told(args: argparse.Namespace, answer: tuple[dict, str], out: str) -> int:
  if args.json:
    answers.show(answer[0])
  else:
    print(f"{answer[1]}\n{out}/index.html")
  return 0


def _size(text: str | None) -> tuple[int | None, int | None]:
  """(width, height) of WIDTHxHEIGHT."""
  if text is None:
    return None, None
  width, times, height = text.lower().partition("x")
  if not (times and width.isdigit() and height.isdigit() and int(width) and int(height)):
    raise UsageError(f"--size {text!r} is not of the form WIDTHxHEIGHT, e.g. 128x64")
  return int(width), int(height)


ACTIONS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int], str]] = {
  "videos": (_add_videos, _videos, "Folders of videos, alone, against real ones, or in pairs."),
  "run": (_add_run, _run, "Samples of a checkpoint against its held-out clips."),
  "rollout": (_add_rollout, _rollout, "Rollouts on disk: seams, smoothness, drift, repetition."),
  "world": (_add_world, _world, "A world model told the stories of memory-v1: does it follow, does it remember."),
  "vbench": (_add_vbench, _vbench, "Videos for VBench, VBench-I2V and VBench-Long; totals of their scores."),
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
