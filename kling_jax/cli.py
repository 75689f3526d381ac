"""The command line: one parser for all verbs, each verb imported only when it runs."""

import argparse
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from kling_jax import __version__, answers
from kling_jax.curation import command as curation
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
    from kling_jax import stores

    with stores.Session():  # paths may be addresses of object stores
      stores.at_hand(args)
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


# ---- demo, doctor --------------------------------------------------------------------------------------------------


def _add_demo(parser: Parser) -> None:
  parser.add_argument("--workdir", default="demo", help="everything is written here (default: demo)")
  parser.add_argument("--videos", help="your own footage instead of rendered films")
  parser.add_argument("--steps", type=int, help="training steps")


def _demo(args: argparse.Namespace) -> int:
  from kling_jax import demo

  print(demo.run(pathlib.Path(args.workdir), args.videos, args.steps))
  return 0


def _doctor(args: argparse.Namespace) -> int:
  from kling_jax import doctor

  facts = doctor.examine()
  if args.json:
    answers.show(facts)
  else:
    doctor.show(facts)
  return 0


# ---- data ----------------------------------------------------------------------------------------------------------


def _add_data(parser: Parser) -> None:
  parser.add_argument("action", choices=["verify", "export", "card"],
                      help="verify: read every record of a set; export: write it in another format; card: write its "
                      "card anew, with licences")  # fmt: skip
  parser.add_argument("--input", required=True, help="clip set")
  parser.add_argument("--output", help="what export writes: a folder, or FILE.csv")
  parser.add_argument("--format", default="webdataset", help="of export: webdataset, or koala: a CSV with Koala-36M's "
                      "columns (default: webdataset)")  # fmt: skip
  parser.add_argument("--shard_mb", type=int, default=1024, help="most MiB of a WebDataset tar (default: 1024)")
  parser.add_argument("--dropped", action="store_true", help="export clips that selection dropped, too")
  parser.add_argument("--licence", metavar="NAME", help="of card: of all videos that have no other")
  parser.add_argument("--licences", metavar="TABLE", help="of card: a table with the columns video_id and licence")
  answers.add_flag(parser)


def _data(args: argparse.Namespace) -> int:
  if args.action == "export":
    return _export(args)
  if args.action == "card":
    return _card(args)
  from kling_jax.data import records

  report = records.verify(args.input)
  if args.json:
    answers.show(report.to_json())
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
    answers.show(done.to_json())
  else:
    print(done.text())
  return 0


def _card(args: argparse.Namespace) -> int:
  from kling_jax.data import card, clip_table, columns

  index = clip_table.Index.load(args.input)
  if args.licence or args.licences:
    rows = columns.read_table(args.licences, ("video_id", "licence")).to_pylist() if args.licences else []
    if rows and not {"video_id", "licence"} <= rows[0].keys():
      raise UsageError(f"--licences {args.licences}: wants the columns video_id and licence, has {', '.join(rows[0])}")
    card.state_licences(index.folder, args.licence, {row["video_id"]: row["licence"] for row in rows})
  shards = [(shard.records, shard.bytes) for shard in index.shards]
  card.write(index.folder, index.table, index.recipe, shards)
  if args.json:
    answers.show(card.facts(index.table, index.recipe, len(shards), sum(size for _, size in shards),
                            card.read_licences(index.folder)))  # fmt: skip
  else:
    print(index.folder / card.README)
  return 0


def _add_fetch(parser: Parser) -> None:
  from kling_jax.data import fetch_command  # flags only, nothing heavy

  fetch_command.add(parser)
  answers.add_flag(parser)


def _fetch(args: argparse.Namespace) -> int:
  from kling_jax.data import fetch_command

  summary = fetch_command.run(args)
  if args.json:
    answers.show(summary.to_json())
  else:
    print(summary.text())
  return 1 if summary.failed and not summary.fetched + summary.kept_before else 0


def _add_encode(parser: Parser) -> None:
  parser.add_argument("--config", required=True, help="training config whose codec, text encoder and buckets are used")
  parser.add_argument("--input", help="clip set (default: the sources of the config)")
  parser.add_argument("--engine", default="local", help="local (default), or ray: the nodes of a Ray cluster")
  parser.add_argument("--workers", type=int, help="processes, of Ray as many as there is room for (default: this one)")
  parser.add_argument("--per_worker", action="append", default=[], metavar="NAME=NUMBER",
                      help="resources of Ray that each takes, e.g. GPU=1")  # fmt: skip


def _encode(args: argparse.Namespace) -> int:
  from kling_jax import config

  loaded = config.load(args.config, args.overrides)
  if args.workers is not None and args.workers < 1:
    raise UsageError(f"--workers {args.workers} must be at least 1")
  if args.engine == "local" and args.workers is None and not args.per_worker:
    from kling_jax.generate import encode

    print(encode.run(loaded, args.input))
  else:
    from kling_jax.generate import encode_job

    needs = encode_job.parse_needs(args.per_worker)
    print(encode_job.run(loaded, args.input, args.engine, args.workers, needs))
  return 0


def _add_report(parser: Parser) -> None:
  from kling_jax.generate import report_command  # flags only, nothing heavy

  report_command.add(parser)


def _report(args: argparse.Namespace) -> int:
  from kling_jax.generate import report_command

  return report_command.run(args)


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
  from kling_jax import config, stores
  from kling_jax.train import distributed

  loaded = config.load(args.config, args.overrides)
  job = distributed.detect(
    args.distributed, coordinator=args.coordinator, processes=args.processes, process=args.process
  )
  if job.count > 1 and (address := stores.address_of(args.workdir)) is not None:
    raise UsageError(
      f"{address}: a work directory of several processes must be one that all see: a shared disk, or the bucket "
      "mounted with gcsfuse or mountpoint-s3"
    )
  end = distributed.supervise(job, args.heartbeat)
  try:
    distributed.start(job, args.heartbeat)
    from kling_jax.train import loop

    summary = loop.run(loaded, args.workdir)
  except (Exception, KeyboardInterrupt) as error:
    if job.count > 1:
      end(report(distributed.lost(error) or error, args.debug))
    raise
  state = "finished" if summary.finished else "stopped by SIGTERM, saved; run again to go on"
  if job.index == 0:
    print(f"{args.workdir}: step {summary.step}, loss {summary.metrics.get('loss', float('nan')):.4f}, {state}")
  end(0)
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
  parser.add_argument("--quantize", help="none, int8, fp8: how the blocks' products are taken (default: as trained)")
  parser.add_argument("--calibrate_cache", help="file to write: a step cache of this checkpoint and these settings")
  parser.add_argument("--cache", help="file that --calibrate_cache wrote: skips network calls that change little")
  parser.add_argument("--cache_error", type=float, help="that skipping may add up to (default: 0.05; 0 skips nothing)")
  parser.add_argument("--lora", action="append", default=[], help="LoRA file or folder, or FILE=SCALE; several add up")
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
    rescale=args.rescale, batch=args.batch, quantize=args.quantize, cache=args.cache,
    cache_error=sample.CACHE_ERROR if args.cache_error is None else args.cache_error,
  )  # fmt: skip
  rewriter = (args.rewrite, args.rewrite_model) if args.rewrite else None
  for path in sample.run(
    args.workdir, rows, args.out, settings, step=args.step, rewriter=rewriter, loras=args.lora,
    calibrate=args.calibrate_cache,
  ):  # fmt: skip
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


def _add_rollout(parser: Parser) -> None:
  from kling_jax.generate import rollout_command  # flags only, nothing heavy

  rollout_command.add(parser)


def _rollout(args: argparse.Namespace) -> int:
  from kling_jax.generate import rollout_command

  return rollout_command.run(args)


# ---- plan ----------------------------------------------------------------------------------------------------------


def _add_plan(parser: Parser) -> None:
  from kling_jax.plan import command  # flags only, nothing heavy

  command.add(parser)


def _plan(args: argparse.Namespace) -> int:
  from kling_jax.plan import command

  return command.run(args)


# ---- sweep ---------------------------------------------------------------------------------------------------------


def _add_sweep(parser: Parser) -> None:
  from kling_jax.scaling import command  # flags only, nothing heavy

  command.add(parser)


def _sweep(args: argparse.Namespace) -> int:
  from kling_jax.scaling import command

  return command.run(args)


# ---- eval ----------------------------------------------------------------------------------------------------------


def _add_eval(parser: Parser) -> None:
  from kling_jax.generate import eval_command  # flags only, nothing heavy

  eval_command.add(parser)


def _eval(args: argparse.Namespace) -> int:
  from kling_jax.generate import eval_command

  return eval_command.run(args)


# ---- import, export ------------------------------------------------------------------------------------------------


def _add_import(parser: Parser) -> None:
  from kling_jax.generate import convert_command  # flags only, nothing heavy

  convert_command.add_import(parser)


def _import(args: argparse.Namespace) -> int:
  from kling_jax.generate import convert_command

  return convert_command.run_import(args)


def _add_export(parser: Parser) -> None:
  from kling_jax.generate import convert_command

  convert_command.add_export(parser)


def _export_weights(args: argparse.Namespace) -> int:
  from kling_jax.generate import convert_command

  return convert_command.run_export(args)


VERBS: dict[str, tuple[Callable[..., None], Run, str]] = {
  "demo": (_add_demo, _demo, "The whole chain in minutes: curate, train, sample, report."),
  "doctor": (answers.add_flag, _doctor, "What this machine can run, and what each extra would add."),
  **curation.VERBS,
  "report": (_add_report, _report, "The page of a clip set, or of training runs side by side."),
  "fetch": (_add_fetch, _fetch, "Videos that a table names by address, into a folder."),
  "data": (_add_data, _data, "Integrity of a clip set; the set in other formats."),
  "encode": (_add_encode, _encode, "Latents and text of a clip set into caches."),
  "train": (_add_train, _train, "Train any task of any config."),
  "sample": (_add_sample, _sample, "Videos from a checkpoint: from text, from an image, continuing a video."),
  "rollout": (_add_rollout, _rollout, "A world model goes on clip by clip: its own next action, or yours."),
  "plan": (_add_plan, _plan, "A config on a TPU topology, by the real compiler: memory, FLOPs, transfers, verdict."),
  "eval": (_add_eval, _eval, "Metrics: of folders of videos, of a checkpoint, of rollouts; VBench; control."),
  "import": (_add_import, _import, "Weights of others into our folders and work directories."),
  "export": (_add_export, _export_weights, "Weights of a work directory as safetensors, in our names or diffusers'."),
  "sweep": (_add_sweep, _sweep, "Scaling laws: fit them to runs, check them, predict with them."),
}
