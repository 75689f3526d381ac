"""`kling sweep ACTION`: the flags of each action; what an action needs is imported when it runs."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from kling_jax.errors import UsageError

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


def print_json(value: Any) -> None:
  """Prints JSON on standard output; a figure that is not finite becomes null."""
  json.dump(_plain(value), sys.stdout, indent=1, allow_nan=False)
  print()


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  return None if isinstance(value, float) and not abs(value) < float("inf") else value


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
  parser.add_argument("--flop_rule", help="6nt, or cross_dit:CONTEXT with the tokens that one attends to "
                      "(default: the table's or the law's)")  # fmt: skip


def _add_fit(parser: argparse.ArgumentParser) -> None:
  _add_table(parser, required=True)
  parser.add_argument("--flops", type=float, help="budget to quote the optimum at (default: 10 times the largest)")
  parser.add_argument("--json", action="store_true", help="machine-readable answer on standard output")


def _fit(args: argparse.Namespace) -> int:
  found = _analyse(args)
  warn(found.warnings)
  if args.json:
    print_json(found.answer(args.flops))
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
  return analysis.analyse(table.read(args.table, _units(args.units)), options, args.flops, rule)


def _units(words: list[str]) -> dict[str, float]:
  units = {}
  for word in words:
    name, _, count = word.partition("=")
    try:
      units[name] = float(count)
    except ValueError as error:
      raise UsageError(f"--units {word!r} is not of the form COLUMN=COUNT, e.g. tokens=1e9") from error
  return units


ACTIONS: dict[str, Action] = {
  "fit": (_add_fit, _fit, "Loss surface and laws of learning rate and batch from a table of runs, with intervals."),
}
