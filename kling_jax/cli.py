"""The command line: one parser for all verbs, each verb imported only when it runs."""

import argparse
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from kling_jax import __version__
from kling_jax.errors import KlingError, UsageError, nearest

Run = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
  """argparse that reports bad usage as our one clear line (exit code 2)."""

  def error(self, message: str) -> NoReturn:
    raise UsageError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one verb; returns the exit code: 0 ok, 1 failed, 2 bad usage, 130 interrupted."""
  arguments = list(sys.argv[1:] if argv is None else argv)
  debug = "--debug" in arguments
  try:
    args = parse([word for word in arguments if word != "--debug"])
    args.debug = debug
    _prepare()
    return args.run(args)
  except BrokenPipeError:  # `kling split ... | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  the last place that can turn a bug into a line
    return report(error, debug)


def report(error: BaseException, debug: bool = False) -> int:
  """Prints an error as one line on standard error; returns the exit code."""
  if isinstance(error, KeyboardInterrupt):
    print("kling: interrupted", file=sys.stderr)
    return 130
  if debug:
    traceback.print_exception(error)
  line = " ".join(str(error).split())
  if isinstance(error, KlingError):
    print(f"kling: {type(error).__name__}: {line}", file=sys.stderr)
    return error.exit_code
  print(
    f"kling: unexpected {type(error).__name__}: {line[:500]} (this is a bug; run again with --debug for the traceback)",
    file=sys.stderr,
  )
  return 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Parses the words after `kling`; the namespace holds `run`.

  Raises:
    UsageError: unknown verb or flag, or a value of another type.
  """
  parser = Parser(prog="kling", description="Video generation research in JAX.", allow_abbrev=False)
  parser.add_argument("--version", action="version", version=f"kling_jax {__version__}")
  verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
  for name, (add, run, summary) in VERBS.items():
    sub = verbs.add_parser(
      name, help=summary, description=summary, allow_abbrev=False, epilog="Any verb: --debug shows tracebacks."
    )
    add(sub)
    sub.set_defaults(run=run)
  if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
    raise UsageError(f"unknown verb {argv[0]!r}{nearest(argv[0], VERBS)}")
  args, rest = parser.parse_known_args(argv)
  configured = hasattr(args, "config")  # verbs with a config take --config.key=value
  if rest and not configured:
    raise UsageError(f"unknown argument {rest[0]!r} of `kling {args.verb}` (see `kling {args.verb} --help`)")
  args.overrides = rest
  return args


def _prepare() -> None:
  """What every verb needs before it imports anything heavy."""
  from absl import flags, logging

  flags.FLAGS.mark_as_parsed()  # Grain's worker processes refuse unparsed flags
  logging.set_verbosity(logging.ERROR)


def _print_json(value: Any) -> None:
  json.dump(value, sys.stdout, indent=1)
  print()


# ---- demo, doctor --------------------------------------------------------------------------------------------------


def _add_demo(parser: Parser) -> None:
  parser.add_argument("--workdir", default="demo", help="everything is written here (default: demo)")
  parser.add_argument("--videos", help="your own footage instead of rendered films")
  parser.add_argument("--steps", type=int, help="training steps")


def _demo(args: argparse.Namespace) -> int:
  from kling_jax import demo

  print(demo.run(pathlib.Path(args.workdir), args.videos, args.steps))
  return 0


def _add_json(parser: Parser) -> None:
  parser.add_argument("--json", action="store_true", help="machine-readable answer on standard output")


def _doctor(args: argparse.Namespace) -> int:
  from kling_jax import doctor

  facts = doctor.examine()
  if args.json:
    _print_json(facts)
  else:
    doctor.show(facts)
  return 0


# ---- curation ------------------------------------------------------------------------------------------------------


def _add_split(parser: Parser) -> None:
  parser.add_argument("video", nargs="+", help="video files")
  parser.add_argument("--method", default="default", help="default, or css: Color-Struct SVM of Koala-36M")
  parser.add_argument("--output", help="folder for shot lists")
  parser.add_argument("--format", action="append", default=[], metavar="FORMAT",
                      help="csv (as PySceneDetect's), edl, otio, stats (a row a frame); repeat for others")  # fmt: skip
  parser.add_argument("--workers", type=int, help="processes (default: one a core)")
  parser.add_argument("--weights", metavar="FILE", help="what --fit wrote (css)")
  parser.add_argument("--fit", metavar="FILE", help="train css's SVM on these videos, without labels; write it here")
  parser.add_argument("--seed", type=int, default=0, help="of --fit's choice of pairs")
  _add_json(parser)


def _split(args: argparse.Namespace) -> int:
  from kling_jax.curation import split_command

  if args.fit:
    return split_command.fit(args.video, args.fit, seed=args.seed, as_json=args.json)
  return split_command.command(
    args.video, method=args.method, as_json=args.json, weights=args.weights, output=args.output, formats=args.format,
    workers=args.workers,
  )  # fmt: skip


def _add_curate(parser: Parser) -> None:
  parser.add_argument("--input", required=True, help="folder of videos, one video, WebDataset tars, or a table that "
                      "names videos by file, url or videoID")  # fmt: skip
  parser.add_argument("--method", help="who splits: default, css, or table: cut exactly the table's spans")
  parser.add_argument("--videos", help="folder with the videos of a table (default: the table's)")
  parser.add_argument("--output", required=True, help="clip set to write; started again, it goes on")
  parser.add_argument("--engine", help="local (default), or ray: the CPUs of a Ray cluster")
  parser.add_argument("--workers", type=int, help="processes (default: one a core)")
  parser.add_argument("--min_seconds", type=float, help="shortest clip (default: 1)")
  parser.add_argument("--max_seconds", type=float, help="longest clip (default: 10)")
  parser.add_argument("--min_side", type=int, help="smallest shorter side of a video in pixels (default: 32)")
  parser.add_argument("--short_side", type=int, help="clips are shrunk to it; 0 keeps the source's size (default: 720)")
  parser.add_argument("--crf", type=float, help="H.264 quality of what is encoded (default: 18)")
  parser.add_argument("--no_copy", action="store_true", help="encode all clips anew instead of copying H.264 packets")
  parser.add_argument("--keep", action="append", metavar="RULE",
                      help="what is kept, e.g. 'motion >= 0.01'; repeat for others (see `kling select`)")  # fmt: skip
  parser.add_argument("--seconds_per_video", type=float, help="longer ones are quarantined as timeout (default: 3600)")
  parser.add_argument("--memory_per_video", type=float, metavar="GIB",
                      help="videos that need more are quarantined as out_of_memory (default: 8)")  # fmt: skip
  parser.add_argument("--cache", metavar="DIR", help="keeps splits for other sets of the same videos")
  parser.add_argument("--no_report", action="store_true", help="write no report page")
  _add_json(parser)


def _curate(args: argparse.Namespace) -> int:
  from kling_jax.curation import curate, rules
  from kling_jax.curation.video import Recipe

  names = ("method", "min_seconds", "max_seconds", "min_side", "short_side", "crf")
  given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  if given.get("short_side") == 0:
    given["short_side"] = None
  given["copy"] = not args.no_copy
  changes: dict[str, Any] = {"recipe": Recipe(**given), "workers": args.workers, "report": not args.no_report}
  changes |= {"cache": args.cache} | ({"engine": args.engine} if args.engine else {})
  changes["videos"] = args.videos
  if args.keep:
    changes["rules"] = rules.parse_all(args.keep)
  if args.seconds_per_video is not None:
    changes["seconds_per_video"] = args.seconds_per_video
  if args.memory_per_video is not None:
    changes["memory_gib"] = args.memory_per_video
  funnel = curate.curate(args.input, args.output, curate.Options(**changes))
  if args.json:
    _print_json(funnel.to_json())
  else:
    print(funnel.text())
  return 0


def _add_select(parser: Parser) -> None:
  parser.add_argument("--input", required=True, help="clip set; with --what_if also a table (.parquet, .csv, .jsonl)")
  parser.add_argument("--keep", action="append", default=[], metavar="RULE",
                      help="what is kept, e.g. 'vtss >= 2.5', 'slow: quantile(motion, 0.05) <= motion', "
                      "'cap(100, source)'; repeat for others, tried in order")  # fmt: skip
  parser.add_argument("--rules", metavar="FILE", help="JSON list of rules: 'name: expression' or {name, keep}")
  parser.add_argument("--preset", action="append", default=[], help="published rules: cosmos, datajuicer, koala, ...")
  parser.add_argument("--without", action="append", default=[], metavar="NAME", help="rule of a preset to leave out")
  parser.add_argument("--seed", type=int, help="of balancing (default: that of the last time, or 0)")
  parser.add_argument("--what_if", action="store_true", help="only print what the rules would do")
  parser.add_argument("--explain", metavar="CLIP_ID", help="only print what every rule says of one clip")
  parser.add_argument("--weights", metavar="TEMPER", help="write sampling weights, e.g. 'temper(0.5, source)'")
  _add_json(parser)


def _select(args: argparse.Namespace) -> int:
  from kling_jax.curation import select_command

  return select_command.run(
    args.input, keep=args.keep, file=args.rules, presets=args.preset, without=args.without, seed=args.seed,
    what_if=args.what_if, explain=args.explain, weights=args.weights, as_json=args.json,
  )  # fmt: skip


def _add_dedup(parser: Parser) -> None:
  parser.add_argument("--input", required=True, nargs="+", metavar="SET_OR_FILES",
                      help="clip set; or video files and folders, whose groups are told")  # fmt: skip
  parser.add_argument("--against", action="append", default=[], metavar="SET", help="another set whose clips stay")
  parser.add_argument("--embeddings", metavar="FILE", help=".npy (a row a clip), or a table: clip_id, embedding")
  parser.add_argument("--least_embedding", type=float, default=0.95, help="cosine of copies (default: 0.95)")
  parser.add_argument("--prefer", action="append", metavar="EXPRESSION",
                      help="larger is better, the first counts most (default: width * height, clarity, vtss, "
                      "duration_s)")  # fmt: skip
  parser.add_argument("--workers", type=int, help="processes (default: one a core)")
  parser.add_argument("--what_if", action="store_true", help="only say what would go")
  _add_json(parser)


def _dedup(args: argparse.Namespace) -> int:
  from kling_jax.curation import dedup, duplicates

  found = dedup.run(
    args.input, args.what_if, against=args.against, embeddings=args.embeddings, least_embedding=args.least_embedding,
    prefer=args.prefer or duplicates.PREFER, workers=args.workers,
  )  # fmt: skip
  if args.json:
    _print_json(found)
  else:
    kinds = ", ".join(f"{count} {kind}" for kind, count in found["pairs"].items()) or "no"
    verb = "would go" if args.what_if else "dropped"
    print(f"{found['clips']} clips: {kinds} pairs, {found['groups']} groups, {found['dropped']} clips {verb}")
    if args.what_if or not found["dropped"]:
      for group in found["largest"]:
        print("  " + "  ".join(group))
    print(f"copies are: {found['stated']}")
  return 0


def _add_report(parser: Parser) -> None:
  parser.add_argument("--input", required=True, help="clip set")


def _report(args: argparse.Namespace) -> int:
  from kling_jax.curation import report as curation_report

  print(curation_report.write(args.input))
  return 0


def _add_caption(parser: Parser) -> None:
  from kling_jax.curation import caption_command  # flags only, nothing heavy

  caption_command.add(parser)
  _add_json(parser)


def _caption(args: argparse.Namespace) -> int:
  from kling_jax.curation import caption_command

  summary = caption_command.run(args)
  if args.json:
    _print_json(summary.to_json())
  else:
    print(summary.text())
  return 1 if summary.failed else 0


def _add_score(parser: Parser) -> None:
  parser.add_argument("--input", required=True, nargs="+", metavar="SET_OR_FILES",
                      help="clip set, which gets the scores it lacks; or video files and folders of them")  # fmt: skip
  parser.add_argument("--scorers", default="default",
                      help="default, presets, names such as motion, your package.module:NAME; by commas")  # fmt: skip
  parser.add_argument("--aesthetic_weights", metavar="FILE_OR_FOLDER",
                      help="safetensors of CLIP ViT-L/14 and LAION's head (default: a classical stand-in)")  # fmt: skip
  parser.add_argument("--workers", type=int, help="processes (default: one a core)")
  _add_json(parser)


def _score_clips(args: argparse.Namespace) -> int:
  from kling_jax.curation import score_command

  words = tuple(word.strip() for word in args.scorers.split(",") if word.strip())
  wanted = score_command.Wanted(words, args.aesthetic_weights)
  return score_command.command(args.input, wanted=wanted, workers=args.workers, as_json=args.json)


# ---- data ----------------------------------------------------------------------------------------------------------


def _add_data(parser: Parser) -> None:
  parser.add_argument("action", choices=["verify", "export"],
                      help="verify: read every record of a set; export: write it in another format")  # fmt: skip
  parser.add_argument("--input", required=True, help="clip set")
  parser.add_argument("--output", help="what export writes: a folder, or FILE.csv")
  parser.add_argument("--format", default="webdataset", help="of export: webdataset, or koala: a CSV with Koala-36M's "
                      "columns (default: webdataset)")  # fmt: skip
  parser.add_argument("--shard_mb", type=int, default=1024, help="most MiB of a WebDataset tar (default: 1024)")
  parser.add_argument("--dropped", action="store_true", help="export clips that selection dropped, too")
  _add_json(parser)


def _data(args: argparse.Namespace) -> int:
  if args.action == "export":
    return _export(args)
  from kling_jax.data import records

  report = records.verify(args.input)
  if args.json:
    _print_json(report.to_json())
  else:
    print(report.text())
  return 0 if report.ok else 1


def _export(args: argparse.Namespace) -> int:
  from kling_jax.data import export

  if not args.output:
    raise UsageError("kling data export needs --output")
  limits = {"shard_bytes": args.shard_mb * 2**20} if args.format == "webdataset" else {}
  done = export.export(args.input, args.output, args.format, dropped=args.dropped, **limits)
  if args.json:
    _print_json(done.to_json())
  else:
    print(done.text())
  return 0


def _add_fetch(parser: Parser) -> None:
  from kling_jax.data import fetch_command  # flags only, nothing heavy

  fetch_command.add(parser)
  _add_json(parser)


def _fetch(args: argparse.Namespace) -> int:
  from kling_jax.data import fetch_command

  summary = fetch_command.run(args)
  if args.json:
    _print_json(summary.to_json())
  else:
    print(summary.text())
  return 1 if summary.failed and not summary.fetched + summary.kept_before else 0


def _add_encode(parser: Parser) -> None:
  parser.add_argument("--config", required=True, help="training config whose codec, text encoder and buckets are used")
  parser.add_argument("--input", help="clip set (default: the sources of the config)")


def _encode(args: argparse.Namespace) -> int:
  from kling_jax import config
  from kling_jax.generate import encode

  print(encode.run(config.load(args.config, args.overrides), args.input))
  return 0


# ---- train, sample -------------------------------------------------------------------------------------------------


def _add_train(parser: Parser) -> None:
  parser.add_argument("--config", required=True, help="file.py[:args], e.g. configs/video_dit.py:size=S,res=128")
  parser.add_argument("--workdir", required=True, help="started again with the same config, it goes on exactly")
  parser.add_argument("--distributed", default="auto", help="auto, none, flags, tpu, slurm, kubernetes (default: auto)")
  parser.add_argument("--coordinator", help="host:port of process 0, with --processes and --process")
  parser.add_argument("--processes", type=int, help="processes of the job")
  parser.add_argument("--process", type=int, help="number of this one, from 0")
  parser.add_argument("--heartbeat", type=int, default=100, help="seconds until a silent process counts as dead")
  parser.epilog = "Override any key: --config.optimizer.lr=1e-4. Any verb: --debug shows tracebacks."


def _train(args: argparse.Namespace) -> int:
  from kling_jax import config
  from kling_jax.train import distributed

  loaded = config.load(args.config, args.overrides)
  job = distributed.detect(
    args.distributed, coordinator=args.coordinator, processes=args.processes, process=args.process
  )
  distributed.supervise(job, args.heartbeat)
  try:
    distributed.start(job, args.heartbeat)
    from kling_jax.train import loop

    summary = loop.run(loaded, args.workdir)
  except (Exception, KeyboardInterrupt) as error:
    if job.count > 1:
      distributed.end(job, report(distributed.lost(error) or error, args.debug))
    raise
  if job.index:
    return 0
  state = "finished" if summary.finished else "stopped by SIGTERM, saved; run again to go on"
  print(f"{args.workdir}: step {summary.step}, loss {summary.metrics.get('loss', float('nan')):.4f}, {state}")
  return 0


def _add_sample(parser: Parser) -> None:
  parser.add_argument("--workdir", required=True, help="work directory of a video_dit run")
  parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
  parser.add_argument("--prompt", action="append", default=[], help="text; may be given several times")
  parser.add_argument("--prompts", help="JSONL file: a text, or {prompt, negative, seed, scores, image, video} a line")
  parser.add_argument("--negative", default="", help="what to steer away from")
  parser.add_argument("--image", help="picture that becomes the first frame")
  parser.add_argument("--video", help="video to continue")
  parser.add_argument("--frames", type=int)
  parser.add_argument("--size", help="WIDTHxHEIGHT in pixels")
  parser.add_argument("--fps", type=float)
  for name in ("motion", "aesthetic", "clarity", "vtss"):
    parser.add_argument(f"--{name}", help="raw score, or low, mid, high; left out = not told")
  parser.add_argument("--seed", type=int, default=0, help="of the first video of each prompt")
  parser.add_argument("--count", type=int, default=1, help="videos a prompt, with seeds from --seed on")
  parser.add_argument("--steps", type=int, help="sampler steps")
  parser.add_argument("--sampler", help="euler, heun, ddim, dpmpp_2m")
  parser.add_argument("--shift", type=float, help="of the noise schedule")
  parser.add_argument("--guidance", type=float, help="text scale; 1 = off")
  parser.add_argument("--guidance_scores", type=float, help="score scale")
  parser.add_argument("--guidance_image", type=float, help="image or history scale")
  parser.add_argument("--rescale", type=float, help="guidance rescale, 0 to 1")
  parser.add_argument("--batch", type=int, help="videos a network call")
  parser.add_argument(
    "--rewrite", help="OpenAI-compatible server that lengthens prompts, e.g. http://localhost:8000/v1"
  )
  parser.add_argument("--rewrite_model", default="default", help="model name on that server")
  parser.add_argument("--out", required=True, help="F.mp4; several videos become F-000.mp4, F-001.mp4, ...")


def _sample(args: argparse.Namespace) -> int:
  from kling_jax.generate import sample

  scores = {name: _score(getattr(args, name)) for name in ("motion", "aesthetic", "clarity", "vtss")}
  shared = {
    "negative": args.negative,
    "image": args.image,
    "video": args.video,
    "scores": {name: value for name, value in scores.items() if value is not None},
  }
  asked: list[dict[str, Any]] = [{"prompt": prompt} for prompt in args.prompt]
  asked += sample.read_prompts(args.prompts) if args.prompts else []
  if not asked:
    raise UsageError("give --prompt or --prompts")
  rows = [
    {**shared, **row, "seed": row.get("seed", args.seed) + number} for row in asked for number in range(args.count)
  ]
  width, height = _size(args.size)
  settings = sample.Settings(
    frames=args.frames, height=height, width=width, fps=args.fps, steps=args.steps, method=args.sampler,
    shift=args.shift, text=args.guidance, scores_scale=args.guidance_scores, image_scale=args.guidance_image,
    rescale=args.rescale, batch=args.batch,
  )  # fmt: skip
  rewriter = (args.rewrite, args.rewrite_model) if args.rewrite else None
  for path in sample.run(args.workdir, rows, args.out, settings, step=args.step, rewriter=rewriter):
    print(path)
  return 0


def _score(text: str | None) -> float | str | None:
  try:
    return None if text is None else float(text)
  except ValueError:
    return text


def _size(text: str | None) -> tuple[int | None, int | None]:
  if text is None:
    return None, None
  width, times, height = text.lower().partition("x")
  if not (times and width.isdigit() and height.isdigit()):
    raise UsageError(f"--size {text!r} is not of the form WIDTHxHEIGHT, e.g. 128x64")
  return int(width), int(height)


# ---- sweep ---------------------------------------------------------------------------------------------------------


def _add_sweep(parser: Parser) -> None:
  from kling_jax.scaling import command  # flags only, nothing heavy

  command.add(parser)


def _sweep(args: argparse.Namespace) -> int:
  from kling_jax.scaling import command

  return command.run(args)


VERBS: dict[str, tuple[Callable[[Parser], None], Run, str]] = {
  "demo": (_add_demo, _demo, "The whole chain in minutes: curate, train, sample, report."),
  "doctor": (_add_json, _doctor, "What this machine can run, and what each extra would add."),
  "split": (_add_split, _split, "Transitions and shots of videos."),
  "curate": (_add_curate, _curate, "Raw videos to a scored, selected clip set."),
  "score": (_add_score, _score_clips, "Scores of a clip set, of loose videos, of generated videos."),
  "select": (_add_select, _select, "Which clips of a set are kept, by rules; or what rules would do."),
  "caption": (_add_caption, _caption, "Captions in six parts for a clip set or loose videos."),
  "fetch": (_add_fetch, _fetch, "Videos that a table names by address, into a folder."),
  "dedup": (_add_dedup, _dedup, "Copies in a set, or of another set: equal, near, or close in an embedding."),
  "report": (_add_report, _report, "The page of a set: funnel, limits to drag, clips kept and dropped, timings."),
  "data": (_add_data, _data, "Integrity of a clip set; the set in other formats."),
  "encode": (_add_encode, _encode, "Latents and text of a clip set into caches."),
  "train": (_add_train, _train, "Train any task of any config."),
  "sample": (_add_sample, _sample, "Videos from a checkpoint: from text, from an image, continuing a video."),
  "sweep": (_add_sweep, _sweep, "Scaling laws: fit them to runs, check them, predict with them."),
}
