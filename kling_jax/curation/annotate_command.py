"""What `kling annotate` does and prints: serve the page, write labels, take ratings in."""

import argparse
import sys

from kling_jax import answers
from kling_jax.curation import annotate
from kling_jax.errors import UsageError


def run(args: argparse.Namespace) -> int:
  """The verb; see `command.py` for its flags."""
  if args.export and args.table:
    raise UsageError("--export and --import are two steps; call `kling annotate` twice")
  if args.export:
    return _export(args)
  if not args.input:
    raise UsageError("--input wants the clip set that is rated")
  if args.table:
    added = annotate.take(args.input, args.db, args.table, args.skip_unknown)
    if args.json:
      answers.show({"added": added})
    else:
      print(f"{added} new ratings in {args.db}")
    return 0
  annotate.serve(args.input, args.db, args.port)
  return 0


def _export(args: argparse.Namespace) -> int:
  found, raw = annotate.export(args.db, args.export)
  for warning in found.warnings():
    print(f"kling: warning: {warning}", file=sys.stderr)
  if args.json:
    answers.show(
      {"labels": len(found.table), "table": args.export, "raw": str(raw), "left_out": dict(found.left_out),
       "unlabelled": list(found.unlabelled)}
    )  # fmt: skip
  else:
    print(f"{len(found.table)} labels in {args.export}, raw ratings in {raw}")
  return 0
