"""Flags and answers of `kling import` and `kling export`; imports nothing heavy until they run."""

import argparse
from typing import Any

from kling_jax import answers


def add_import(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "source", help="folder or file of safetensors, a diffusers pipeline, or what `kling export` wrote"
  )
  parser.add_argument("--out", required=True, help="new folder: of safetensors (one model) or a work directory")
  parser.add_argument("--dtype", default="keep", help="of one model's tensors: keep, float32, bfloat16 (default: keep)")
  parser.add_argument("--config", help="training config of a pipeline's work directory (default: video_dit at the "
                      "model's size); override keys: --config.precision=bfloat16")  # fmt: skip
  answers.add_flag(parser)


def run_import(args: argparse.Namespace) -> int:
  from kling_jax.generate import convert

  done = convert.import_(args.source, args.out, dtype=args.dtype, config=args.config, overrides=args.overrides)
  return _tell(args, done, f"{done['folder']}: {done['kind']}, {done.get('parameters', 0) or 'all'} parameters")


def add_export(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", required=True, help="work directory of a video_dit or video_vae run")
  parser.add_argument("--out", required=True, help="new folder")
  parser.add_argument("--naming", default="kling_jax", help="kling_jax, or diffusers: Wan's names (default: kling_jax)")
  parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
  answers.add_flag(parser)


def run_export(args: argparse.Namespace) -> int:
  from kling_jax.generate import convert

  done = convert.export(args.workdir, args.out, naming=args.naming, step=args.step)
  line = f"{done['folder']}: {done['kind']} of step {done['step']} in {done['naming']}'s names"
  if done["rest"]:
    line += f"; {len(done['rest'])} parameters that these names have no place for are in rest/"
  return _tell(args, done, line)


def _tell(args: argparse.Namespace, done: dict[str, Any], line: str) -> int:
  if args.json:
    answers.show(done)
  else:
    print(line)
  return 0
