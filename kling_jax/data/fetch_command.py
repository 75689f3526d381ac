"""Flags of `kling fetch`; nothing heavy is imported before it runs."""

import argparse
import typing
from typing import Any

if typing.TYPE_CHECKING:
  from kling_jax.data import fetch


def add(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("--table", required=True, help="CSV, JSON lines or Parquet with a column of addresses")
  parser.add_argument("--output", required=True, help="folder for the files; started again, it goes on")
  parser.add_argument("--column", help="with the addresses: http, https, s3, gs (default: url)")
  parser.add_argument("--concurrency", type=int, help="downloads at a time (default: 8)")
  parser.add_argument("--per_host", type=int, help="downloads at a time from one host (default: 4)")
  parser.add_argument("--rate", type=float, help="most requests a minute to one host (default: no limit)")
  parser.add_argument("--megabytes_per_second", type=float, help="of all downloads together (default: no limit)")
  parser.add_argument("--tries", type=int, help="that bring nothing new, until an address is given up (default: 5)")
  parser.add_argument("--timeout", type=float, help="seconds of silence until a server is given up (default: 60)")
  parser.add_argument("--seconds_per_file", type=float, help="longest time of one file (default: 3600)")
  parser.add_argument("--file_gb", type=float, help="most GiB of one file (default: 64)")
  parser.add_argument("--most_gb", type=float, help="most GiB in the folder (default: no limit)")
  parser.add_argument("--private", action="store_true", help="allow addresses of private networks and this machine")


def run(args: argparse.Namespace) -> "fetch.Summary":
  """Fetches what the flags say.

  Raises:
    UsageError: a flag is wrong. DataError: see `fetch.fetch`.
  """
  from kling_jax.data import fetch
  from kling_jax.data.download import Limits

  gib = lambda value: None if value is None else int(value * 2**30)
  limits: dict[str, Any] = {"timeout_s": args.timeout, "seconds": args.seconds_per_file, "private": args.private}
  limits |= {"file_bytes": gib(args.file_gb), "total_bytes": gib(args.most_gb)}
  names = ("column", "concurrency", "per_host", "rate", "megabytes_per_second", "tries")
  given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  known = Limits(**{name: value for name, value in limits.items() if value is not None})
  return fetch.fetch(args.table, args.output, fetch.Options(**given, limits=known))
