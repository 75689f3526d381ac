"""One attempt at a `kling` command on a host, as launchers start it: its exit code says whether to try again.

  python -m kling_jax.launch.attempt --until 1790000000 train --config configs/video_dit.py --workdir runs/a

`kling train` leaves with 0 on SIGTERM, done or not. Whether it is done stands in its work directory: the checkpoint of
the last step is there. Nothing else is asked, so that a launcher may be killed, and a host lost, at any line.
"""

import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from kling_jax.errors import NoRoom, UsageError

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: it saved and left; start it again to go on
EXPIRED = 124  # as timeout(1): the longest life of the job is over; it saved and left
FATAL = (UsageError.exit_code, NoRoom.exit_code, EXPIRED)  # the same would come again
TIED = """
import ctypes, signal, sys
if sys.platform == "linux":
  ctypes.CDLL(None).prctl(1, signal.SIGTERM)
from kling_jax import cli
sys.exit(cli.main())
"""


def run(words: Sequence[str], until: float | None = None) -> int:
  """Runs `kling WORDS`; the exit code is 0 where it is done, `STOPPED`, `EXPIRED`, or its own.

  SIGTERM and SIGINT are passed on, and so is the end of the time at `until` (seconds since 1970), as SIGTERM.
  """
  if until is not None and time.time() >= until:
    return EXPIRED
  child = subprocess.Popen([sys.executable, "-c", TIED, *words])
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: child.send_signal(number))
  expired = False
  while True:
    left = None if until is None or expired else max(until - time.time(), 0.01)
    try:
      code = child.wait(timeout=left)
      break
    except subprocess.TimeoutExpired:
      expired = True
      child.terminate()
  if code < 0:  # as a shell says it
    code = 128 - code
  if code == 0 and not finished(words):
    return EXPIRED if expired else STOPPED
  return code


def finished(words: Sequence[str]) -> bool:
  """Whether a command that ended with 0 has done all of it; only `train` may have stopped before."""
  folder = workdir(words)
  return words[0] != "train" or folder is None or done(pathlib.Path(folder))


def workdir(words: Sequence[str]) -> str | None:
  """What stands behind --workdir."""
  for word, following in zip(words, [*words[1:], ""], strict=True):
    if word == "--workdir":
      return following
    if word.startswith("--workdir="):
      return word.partition("=")[2]
  return None


def done(folder: pathlib.Path) -> bool:
  """Whether a work directory holds the checkpoint of its config's last step."""
  config = folder / "config.json"
  if not config.is_file():
    return False
  return newest(folder) >= json.loads(config.read_text(encoding="utf-8"))["steps"]


def newest(folder: pathlib.Path) -> int:
  """The step of the newest checkpoint, 0 where there is none."""
  checkpoints = folder / "checkpoints"
  names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
  return max((int(name) for name in names if name.isdigit()), default=0)


def main(argv: Sequence[str] | None = None) -> int:
  words = list(sys.argv[1:] if argv is None else argv)
  until = None
  if words[:1] == ["--until"]:
    until, words = float(words[1]), words[2:]
  if words[:1] == ["--newest"]:  # what a host tells its launcher
    print(newest(pathlib.Path(words[1])))
    return 0
  if not words:
    print("attempt: give the words of `kling`", file=sys.stderr)
    return UsageError.exit_code
  return run(words, until)


if __name__ == "__main__":
  sys.exit(main())
