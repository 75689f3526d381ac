"""`kling plan`: what a config needs on a TPU topology, predicted, then compiled on this machine."""

import argparse
import pathlib
from collections.abc import Sequence

from kling_jax import answers
from kling_jax.errors import UsageError


def add(parser: argparse.ArgumentParser) -> None:
  """Declares the flags; imports nothing heavy."""
  parser.add_argument("--config", required=True, help="file.py[:args], e.g. configs/video_dit.py:size=14b,res=720p")
  parser.add_argument("--topology", required=True, help="v4, v5p, tpu7x:AxBxC or v5e, v6e:AxB, in chips")
  parser.add_argument("--slices", type=int, default=1, help="such slices, joined by the data-centre network")
  parser.add_argument("--programs", help="of train, sample, rollout (default: all that the task has)")
  parser.add_argument("--predict", action="store_true", help="predict the memory of the train step, compile nothing")
  parser.add_argument(
    "--search", action="store_true", help="find the best mesh for these chips instead of the config's"
  )
  parser.add_argument(
    "--compile", type=int, default=1, help="with --search: compile this many of the best (default: 1)"
  )
  parser.add_argument("--xla", action="append", default=[], metavar="FLAG=VALUE", help="flag of the compiler")
  parser.add_argument("--save", metavar="DIR", help="write each compiled program into a file, for a start without "
                      "compiling on that topology")  # fmt: skip
  answers.add_flag(parser)
  parser.epilog = "Override any key: --config.mesh.context=4. Any verb: --debug shows tracebacks."


def run(args: argparse.Namespace) -> int:
  """Plans, prints, and returns 0 where everything fits, 1 where a compiled program leaves too little memory.

  Raises:
    ConfigError, MeshError: a config that cannot run on this topology; the message names what would.
    UsageError: bad flags, or no TPU compiler.
  """
  from kling_jax.plan import topology as topology_lib

  if args.compile < 1:
    raise UsageError(f"--compile {args.compile}: at least one mesh is compiled; --predict compiles none")
  topology = topology_lib.Topology.parse(args.topology, args.slices)
  options = _options(args.xla)
  topology_lib.compiler()
  import jax

  from kling_jax import config
  from kling_jax.plan import plan as plan_lib

  jax.config.update("jax_enable_compilation_cache", False)  # this machine could not load what it would keep
  loaded = config.load(args.config, args.overrides)
  programs = tuple(filter(None, (args.programs or "").split(",")))
  if args.search:
    plans = plan_lib.search(loaded, topology, programs, 0 if args.predict else args.compile, options)
  else:
    plans = [plan_lib.plan(loaded, topology, programs, compile_=not args.predict, options=options)]
  if args.save:
    plans[0].save(pathlib.Path(args.save))
  if args.json:
    answers.show(plans[0].to_json() | ({"searched": [one.to_json() for one in plans]} if args.search else {}))
  else:
    for one in plans:
      print(one.text())
  return 0 if plans[0].fits else 1


def _options(given: Sequence[str]) -> dict[str, str]:
  flags = {}
  for item in given:
    name, equals, value = item.partition("=")
    if not equals or not name.startswith("xla_"):
      raise UsageError(f"--xla {item!r} is not of the form xla_flag=value")
    flags[name] = value
  return flags
