"""Machine-readable answers: the flag --json of a verb, and what it prints."""

import argparse
import json
import math
import sys
from typing import Any


def add_flag(parser: argparse.ArgumentParser) -> None:
  """Declares --json."""
  parser.add_argument("--json", action="store_true", help="machine-readable answer on standard output")


def show(value: Any) -> None:
  """Prints JSON on standard output; a figure that is not finite becomes null."""
  json.dump(plain(value), sys.stdout, indent=1, allow_nan=False)
  print()


def plain(value: Any) -> Any:
  """JSON-ready: figures that are not finite become None."""
  if isinstance(value, dict):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value
