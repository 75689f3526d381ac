"""`kling sweep ACTION`: the flags of each action; what an action needs is imported when it runs."""

import argparse
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

from kling_jax import answers
from kling_jax.errors import UsageError
from kling_jax.scaling import sweep_command

Action = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int], str]


def add(parser: argparse.ArgumentParser) -> None:
  """Declares the actions under the parser of `kling sweep`."""
  actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
  for name, (flags, _, summary) in ACTIONS.items():
    flags(actions.add_parser(name, help=summary, description=summary, allow_abbrev=False))


def run(args: argparse.Namespace) -> int:
  """Runs the action that was asked for; returns the exit code."""
  return ACTIONS[args.action][1](args)


def warn(warnings: tuple[str, ...]) -> None:
  """Prints each warning as one line on standard error."""
  for warning in warnings:
    print(f"kling: warning: {warning}", file=sys.stderr)


# ---- fit -----------------------------------------------------------------------------------------------------------


def _add_table(parser: argparse.ArgumentParser, required: bool) -> None:
  parser.add_argument("--table", required=required,
                      help=".csv, .jsonl or .parquet of runs: params, tokens, loss; optional lr, batch_tokens, flops, "
                      "weight or stderr, run, split (train or test)")  # fmt: skip
  parser.add_argument("--units", action="append", default=[], metavar="COLUMN=COUNT",
                      help="raw counts in one unit of a column, e.g. tokens=1e9; repeat for others")  # fmt: skip
  parser.add_argument("--method", default="vp", help="vp: least squares by variable projection (default); huber: "
                      "log-Huber and L-BFGS, as papers do it")  # fmt: skip
  parser.add_argument("--delta", type=float, default=1e-3, help="of huber (default: 1e-3)")
  parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap (default: 1000)")
  parser.add_argument("--bootstrap", help="noise, or runs drawn with replacement (default: by the table)")
  parser.add_argument("--seed", type=int, default=0, help="of the draws")
  parser.add_argument("--least_tokens", type=float, default=0.0, help="rows of fewer tokens are left out of the loss "
                      "surface: early training does not follow it (default: 0)")  # fmt: skip
  parser.add_argument("--flop_rule", help="6nt, or cross_dit:CONTEXT with the tokens that one attends to "
                      "(default: the table's or the law's)")  # fmt: skip


def _add_fit(parser: argparse.ArgumentParser) -> None:
  _add_table(parser, required=True)
  parser.add_argument("--flops", type=float, help="budget to quote the optimum at (default: 10 times the largest)")
  parser.add_argument("--out", help="folder for fit.json (what `predict --fit` reads), plots and index.html")
  answers.add_flag(parser)


def _fit(args: argparse.Namespace) -> int:
  if args.out:
    from kling_jax.scaling import plots

    plots.require()
  found = _analyse(args)
  warn(found.warnings)
  if args.out:
    from kling_jax.scaling import report

    page = report.write(found, args.out, f"Scaling law of {pathlib.Path(args.table).name}")
    print(f"wrote {page}", file=sys.stderr)
  if args.json:
    answers.show(found.answer(args.flops))
  else:
    from kling_jax.scaling import analysis

    print(analysis.text(found))
  return 0


def _analyse(args: argparse.Namespace) -> Any:
  from kling_jax.models.flop_rules import FlopRule
  from kling_jax.scaling import analysis, table
  from kling_jax.scaling.fit import Options

  options = Options(args.method, args.delta, args.draws, args.seed, args.bootstrap)
  rule = FlopRule.parse(args.flop_rule) if args.flop_rule else None
  read = table.read(args.table, _units(args.units))
  return analysis.analyse(read, options, args.flops, rule, args.least_tokens)


def _units(words: list[str]) -> dict[str, float]:
  units = {}
  for word in words:
    name, _, count = word.partition("=")
    try:
      units[name] = float(count)
    except ValueError as error:
      raise UsageError(f"--units {word!r} is not of the form COLUMN=COUNT, e.g. tokens=1e9") from error
  return units


# ---- predict -------------------------------------------------------------------------------------------------------


def _add_predict(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--params", type=float, help="N, parameters: with --tokens or --flops")
  parser.add_argument("--tokens", type=float, help="T, training tokens")
  parser.add_argument("--flops", type=float, help="C, training FLOPs; alone: the best N and T for them")
  parser.add_argument("--device_hours", type=float, help="budget instead of --flops: with --device")
  parser.add_argument("--device", help="kind of device, e.g. 'TPU v5p', 'NVIDIA H100'")
  parser.add_argument("--mfu", type=float, default=0.4, help="share of the device's peak that training reaches")
  parser.add_argument("--law", default="yin2024", help="law in print (default: yin2024)")
  parser.add_argument("--fit", help="fit.json that `kling sweep fit --out` wrote, instead of a law in print")
  _add_table(parser, required=False)
  parser.add_argument("--within", type=float, default=0.1, help="percent above the lowest loss for the range of N")
  parser.add_argument("--config", metavar="FILE[:ARGS]", help="config whose clips make up a batch, without its size "
                      "(default with --out: video_dit:res=256)")  # fmt: skip
  parser.add_argument("--clip_tokens", type=int, default=1280, help="tokens of a clip, where no config counts them "
                      "(default: 1280, 17 frames of 256 x 256 in the codec of the video law)")  # fmt: skip
  parser.add_argument("--devices", type=int, default=1, help="devices that a batch is divided over (default: 1)")
  parser.add_argument("--out", metavar="F.py", help="write a config that `kling train` takes as it is")
  answers.add_flag(parser)


def _predict(args: argparse.Namespace) -> int:
  from kling_jax.models.flop_rules import FlopRule
  from kling_jax.scaling import predict

  if args.device_hours is not None:
    args.flops = _paid(args)
  if args.out and not args.out.endswith(".py"):
    raise UsageError(f"--out {args.out}: a config is a .py file")
  if args.table and args.fit:
    raise UsageError("give --table or --fit, not both")
  if args.devices < 1 or args.clip_tokens < 1 or not 0 < args.within < 100:
    raise UsageError("--devices and --clip_tokens must be at least 1, --within between 0 and 100 percent")
  if args.table:
    source = predict.from_analysis(_analyse(args), args.table)
  else:
    source = predict.load(args.fit) if args.fit else predict.from_published(args.law)
  rule = FlopRule.parse(args.flop_rule) if args.flop_rule else None
  wanted: dict[str, Any] = {"params": args.params, "tokens": args.tokens, "flops": args.flops}
  batching = predict.Batching(args.clip_tokens, args.devices)
  ask = lambda: predict.predict(source, **wanted, batching=batching, within=args.within / 100, rule=rule)
  found = ask()
  if args.config or args.out:
    from kling_jax.scaling import ready

    model = ready.base(args.config or "video_dit:res=256", found.params)
    batching = predict.Batching(model.clip_tokens, args.devices)
    if args.out:  # the family has no model of every size: what is trained is the nearest one, on the same tokens
      wanted = {"params": model.params, "tokens": found.tokens}
    found = ask()
    if args.out:
      ready.write(args.out, found, model, _command(args))
      print(f"wrote {args.out}", file=sys.stderr)
  warn(found.warnings)
  if args.json:
    answers.show(found.to_json())
  else:
    print(predict.text(found))
  return 0


def _command(args: argparse.Namespace) -> str:
  """The command line of a prediction, for the file that it writes."""
  names = ("params", "tokens", "device_hours", "device", "mfu") if args.device_hours else ("params", "tokens", "flops")
  source = "table" if args.table else "fit" if args.fit else "law"
  words = {name: getattr(args, name) for name in (*names, source, "config", "devices")}
  return "kling sweep predict " + " ".join(
    f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {shlex.quote(str(value))}"
    for name, value in words.items()
    if value is not None
  )


def _paid(args: argparse.Namespace) -> float:
  """FLOPs of the device hours."""
  from kling_jax.errors import nearest
  from kling_jax.train.peak import DEVICE_PEAKS

  if args.flops is not None:
    raise UsageError("give --flops or --device_hours, not both")
  if args.device not in DEVICE_PEAKS:
    said = f"--device {args.device!r} is unknown" if args.device else "--device_hours needs --device"
    raise UsageError(f"{said}{nearest(args.device or '', DEVICE_PEAKS)}")
  if not 0 < args.mfu <= 1 or not args.device_hours > 0:
    raise UsageError("--mfu must lie between 0 and 1, --device_hours above 0")
  return 3600 * args.device_hours * DEVICE_PEAKS[args.device] * args.mfu


ACTIONS: dict[str, Action] = {
  "design": (sweep_command.add_design, sweep_command.design, "Which runs to do, and what they cost."),
  "run": (sweep_command.add_run, sweep_command.run, "Run a sweep to its end: start workers, watch them, show them."),
  "work": (sweep_command.add_work, sweep_command.work, "One worker of a sweep; what executors start."),
  "status": (sweep_command.add_status, sweep_command.status, "Where a sweep stands: every run and its loss."),
  "fit": (_add_fit, _fit, "Loss surface and laws of learning rate and batch from a table of runs, with intervals."),
  "predict": (_add_predict, _predict, "Learning rate, batch, steps and loss of a run, from a law or a fit."),
}
