"""Flags of `kling caption`; nothing heavy is imported before it runs."""

import argparse
import typing
from typing import Any

from kling_jax.errors import UsageError

if typing.TYPE_CHECKING:
  from kling_jax.curation import caption


def add(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument("--input", required=True, help="clip set, folder of videos, or one video")
  parser.add_argument("--output", metavar="FILE.jsonl", help="caption table for loose files")
  parser.add_argument("--captioner", help="server, local:DIR, facts, sidecar, in the order they are asked, with commas "
                      "between (default: server with --url, else facts)")  # fmt: skip
  parser.add_argument("--url", default="", help="OpenAI-compatible server, e.g. http://localhost:8000/v1; the key is "
                      "read from OPENAI_API_KEY")  # fmt: skip
  parser.add_argument("--model", default="", help="vision-language model on that server")
  parser.add_argument("--frames", type=int, help="frames a clip (default: 8)")
  parser.add_argument("--side", type=int, help="pixels of their longer side (default: 512)")
  parser.add_argument("--max_tokens", type=int, help="longest answer (default: 1024)")
  parser.add_argument("--answers", type=int, help="times a clip is asked about until the answer is usable (default: 3)")
  parser.add_argument("--response_format", help="json_schema, json_object or text (default: the first that the server "
                      "takes)")  # fmt: skip
  parser.add_argument("--concurrency", type=int, help="clips at a time (default: 8)")
  parser.add_argument("--rate", type=float, help="most requests a minute (default: no limit)")
  parser.add_argument("--timeout", type=float, help="seconds until a request is given up (default: 120)")
  parser.add_argument("--tries", type=int, help="tries where the server fails or is busy (default: 6)")
  parser.add_argument("--prices", metavar="IN,OUT", help="dollars per million prompt and completion tokens")
  parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json that counts tokens (default: bytes)")
  parser.add_argument("--sidecar", help="folder or table with captions (default: beside the source videos)")
  parser.add_argument("--again", action="store_true", help="also clips that have a caption")
  parser.add_argument("--dropped", action="store_true", help="also clips that selection dropped")


def run(args: argparse.Namespace) -> "caption.Summary":
  """Captions what the flags say.

  Raises:
    UsageError: a flag is wrong. DataError: see `caption.run`.
  """
  from kling_jax.curation import caption
  from kling_jax.curation.caption_server import Question

  names = ("frames", "side", "max_tokens", "answers", "response_format")
  asked = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  changes: dict[str, Any] = {"concurrency": args.concurrency, "timeout_s": args.timeout, "tries": args.tries}
  options = caption.Options(
    captioners=(args.captioner or ("server" if args.url else "facts")).split(","),
    server=args.url, model=args.model, question=Question(**asked), rate=args.rate, prices=_prices(args.prices),
    tokenizer=args.tokenizer, sidecar=args.sidecar, again=args.again, dropped=args.dropped,
    **{name: value for name, value in changes.items() if value is not None},
  )  # fmt: skip
  return caption.run(args.input, options, args.output)


def _prices(text: str | None) -> tuple[float, float] | None:
  if text is None:
    return None
  try:
    prompt, completion = (float(part) for part in text.split(","))
  except ValueError as error:
    raise UsageError(f"--prices {text!r}: wants two numbers, e.g. 0.15,0.60") from error
  return prompt, completion
