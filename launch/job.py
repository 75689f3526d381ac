"""What every launcher is told: the `kling` command, its name, its longest life, what travels with it."""

import argparse
import contextlib
import dataclasses
import getpass
import pathlib
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from kling_jax.errors import KlingError, UsageError
from kling_jax.launch import attempt, source
from kling_jax.launch.kubernetes import identifier


class Parser(argparse.ArgumentParser):
  """argparse that reports bad usage as one line, and reads words from files: @pod.txt holds one word a line."""

  def __init__(self, prog: str, description: str | None = None):
    formatter = argparse.RawDescriptionHelpFormatter
    super().__init__(prog, description=description, formatter_class=formatter, fromfile_prefix_chars="@")

  def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
    return shlex.split(arg_line, comments=True)

  def error(self, message: str) -> NoReturn:
    raise UsageError(f"{message} (see `{self.prog} --help`)")


@dataclasses.dataclass(frozen=True)
class Job:
  """A `kling` command that is to run elsewhere.

  Attributes:
    name: finds it again in the cloud; from the work directory by default.
    words: behind `kling`. workdir: as given, "" where the command has none.
    hours: longest life.
  """

  name: str
  words: tuple[str, ...]
  workdir: str
  hours: float

  def attempt(self, until: float, workdir: str = "") -> list[str]:
    """The words behind `python -m kling_jax.launch.attempt` that run it once, in another `workdir` if one is given."""
    moved = {self.workdir: workdir, f"--workdir={self.workdir}": f"--workdir={workdir}"} if workdir else {}
    return ["--until", f"{until:.0f}", *(moved.get(word, word) for word in self.words)]


def add_flags(parser: argparse.ArgumentParser, price: str = "") -> None:
  """The flags that all launchers share; `price` names the unit that is paid for."""
  parser.add_argument("--config", help="of `kling train`: file.py[:args]; any other command stands behind --")
  parser.add_argument("--workdir", help="of `kling train`; overrides follow as --config.key=value")
  parser.add_argument("--name", help="finds the job again (default: from the work directory)")
  parser.add_argument("--hours", type=float, default=24.0, help="longest life: saved and deleted then (default: 24)")
  parser.add_argument("--dry_run", action="store_true", help="print exactly what would run, and end")
  if price:
    parser.add_argument(f"--usd_per_{price}_hour", type=float, help=f"price of one {price} for an hour")
  parser.add_argument("--poll_s", type=float, default=15.0, help="between two looks at the job (default: 15)")
  parser.add_argument("--patience_s", type=float, default=600.0, help="how long silence is borne (default: 600)")


def add_code(parser: argparse.ArgumentParser, wheel: bool = False) -> None:
  """The flags of what travels with a job."""
  parser.add_argument("--code", default=".", help="git checkout whose files are copied (default: this folder)")
  if wheel:
    parser.add_argument("--wheel", help="copy this wheel instead of a checkout")
  parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="leave files out of the copy")


def add_chosen(parser: argparse.ArgumentParser) -> None:
  """The flags of `delete`: which of those that `list` shows."""
  chosen = parser.add_mutually_exclusive_group(required=True)
  chosen.add_argument("--name", action="append", default=[])
  chosen.add_argument("--all", action="store_true", help="everything that `list` shows")


def split(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
  """Own words, and those behind --."""
  words = list(sys.argv[1:] if argv is None else argv)
  at = words.index("--") if "--" in words else len(words)
  return words[:at], words[at + 1 :]


def parse(parser: argparse.ArgumentParser, own: Sequence[str], words: Sequence[str]) -> tuple[argparse.Namespace, Job]:
  """The flags and the job that they tell.

  Raises:
    UsageError: there is no command, or there are two.
  """
  args, overrides = parser.parse_known_args(list(own))
  strangers = [word for word in overrides if not word.startswith("--config.")]
  if strangers:
    parser.error(f"unknown flags {' '.join(strangers)}; words of another command than train stand behind --")
  if bool(args.config) == bool(words):
    parser.error("give --config and --workdir for `kling train`, or another command behind --")
  if args.config:
    if not args.workdir:
      parser.error("--config needs --workdir")
    words = ["train", "--config", args.config, "--workdir", args.workdir, *overrides]
  folder = attempt.workdir(words) or ""
  name = args.name or f"kling-{getpass.getuser()}-{pathlib.PurePath(folder).name or words[0]}"
  return args, Job(identifier(name, 40), tuple(words), folder, args.hours)


@dataclasses.dataclass(frozen=True)
class Package:
  """What is copied to the hosts: an archive of a checkout, or a wheel."""

  digest: str
  name: str
  make: Callable[[pathlib.Path], pathlib.Path]

  @staticmethod
  def of(args: argparse.Namespace) -> "Package":
    """The package that the flags of `add_code` name, searched for secrets.

    Raises:
      UsageError: secrets would be copied, or there is nothing to copy.
    """
    if getattr(args, "wheel", None):
      wheel = pathlib.Path(args.wheel)
      if not wheel.is_file() or wheel.suffix != ".whl":
        raise UsageError(f"--wheel {wheel} is no wheel; `pip wheel --no-deps .` builds one")
      return Package(wheel.stem[:40], wheel.name, lambda folder: wheel)
    root = pathlib.Path(args.code)
    names = source.tracked(root, args.exclude)
    if not {"setup.py", "pyproject.toml"} & {str(name) for name in names}:
      raise UsageError(f"the checkout {root} is no Python package; give --code CHECKOUT or --wheel FILE")
    source.check(root, names)
    digest = source.digest(root, names)
    name = f"kling-{digest}.tar.gz"

    def make(folder: pathlib.Path) -> pathlib.Path:
      source.pack(root, names, folder / name)
      return folder / name

    return Package(digest, name, make)

  def unpack(self, folder: pathlib.Path) -> pathlib.Path:
    """Makes the folder `context` in `folder`, with the files of the checkout and nothing else."""
    context = folder / "context"
    shutil.rmtree(context, ignore_errors=True)  # what was deleted since the last time
    source.unpack(self.make(folder).read_bytes(), context)
    return context


def stage(name: str) -> pathlib.Path:
  """The folder on this machine that holds what is copied, a folder a job."""
  return pathlib.Path.home() / ".cache" / "kling" / name


class Ended(BaseException):
  """SIGTERM or SIGHUP to the launcher: it cleans up like after Ctrl-C."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Turns SIGTERM and SIGHUP into an exception, so that `finally` is reached."""

  def end(number: int, frame: FrameType | None) -> NoReturn:
    raise Ended(signal.Signals(number).name)

  old = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
  try:
    yield
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
  """What runs inside is not ended by Ctrl-C, SIGTERM or SIGHUP."""
  numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
  old = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
  try:
    yield
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def say(text: str) -> None:
  print(f"launch: {text}", flush=True)


def main(run: Callable[[], int]) -> int:
  """Runs a launcher; errors become one line, interruptions an exit code."""
  try:
    with interruptible():
      return run()
  except KlingError as error:
    print(f"launch: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code
  except KeyboardInterrupt:
    print("launch: interrupted", file=sys.stderr)
    return 130
  except Ended as error:
    print(f"launch: ended by {error}", file=sys.stderr)
    return 143
