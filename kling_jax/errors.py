"""The exception family: each message says what is wrong, where, and how to mend it."""

import difflib
import errno
import os
from collections.abc import Iterable


class KlingError(Exception):
  """Base of every error that a user can mend; the command line prints it as one line and exits with `exit_code`."""

  exit_code = 1


class ConfigError(KlingError):
  """A config key, value or combination is wrong."""

  exit_code = 2


class UsageError(KlingError):
  """The command was called wrongly, or needs a part that is not installed."""

  exit_code = 2


class DataError(KlingError):
  """Input data is missing, damaged or of another kind than was promised."""


class NoRoom(DataError):
  """The disk is full; what was written before is intact."""

  exit_code = 74  # EX_IOERR of sysexits.h: a runner tells it from a worker that broke


class WeightsError(KlingError):
  """Weights or a checkpoint do not fit the model."""


class MeshError(KlingError):
  """The device mesh does not divide the work, or does not fit the devices."""

  exit_code = 2


class ProcessError(KlingError):
  """A process of a job with several was lost, so that none of them can go on."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_room(error: BaseException | None) -> bool:
  """Whether a full disk is behind an error; libraries wrap it in kinds of their own."""
  while error is not None:
    if isinstance(error, NoRoom) or (isinstance(error, OSError) and error.errno in NO_ROOM):
      return True
    if any(os.strerror(code) in str(error) for code in NO_ROOM):
      return True
    error = error.__cause__ or error.__context__
  return False


def nearest(word: str, known: Iterable[str]) -> str:
  """Returns "; did you mean 'x'?" for the closest of `known`, or "; known: a, b, ..." where none is close."""
  known = sorted(known)
  close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
  return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
