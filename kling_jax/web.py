"""Asking servers over HTTP: several tries with growing pauses, one pace for all threads, answers of bounded size."""

import dataclasses
import hashlib
import math
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import TypeVar

import requests
import urllib3.exceptions
import urllib3.util

from kling_jax import __version__, errors

TRANSIENT = (408, 425, 429, 500, 502, 503, 504, 529)  # what another try may mend
USER_AGENT = f"kling_jax/{__version__}"
CHUNK = 1 << 16
SILENT = "no answer in time"
# What goes wrong on the way: no connection, a cut one, a silent one.
BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)

T = TypeVar("T")


class TransientError(errors.DataError):
  """The server or the way to it failed in a way that another try may mend; `retry_after_s` is what it asked for."""

  def __init__(self, message: str, retry_after_s: float | None = None):
    super().__init__(message)
    self.retry_after_s = retry_after_s


class RefusedError(errors.UsageError):
  """The server refuses for good; `status` is its HTTP status."""

  def __init__(self, message: str, status: int):
    super().__init__(message)
    self.status = status


class StoppedError(Exception):
  """The run is ending; nobody waits any more."""


@dataclasses.dataclass(frozen=True)
class Patience:
  """How often something is tried, and how long the pauses are.

  Attributes:
    tries: in all, at least 1.
    first_s, most_s: the pauses double from the first to the most; each is shortened by up to a half, so that threads
      that failed together do not come back together.
    longest_ask_s: a server that asks for a longer pause (Retry-After) ends the tries.
  """

  tries: int = 6
  first_s: float = 1.0
  most_s: float = 60.0
  longest_ask_s: float = 600.0

  def pause_s(self, number: int, key: str) -> float:
    """Seconds after try `number` (from 1); the same for the same key, so that runs can be repeated."""
    share = hashlib.sha256(f"{key}/{number}".encode()).digest()[0] / 255
    return min(self.most_s, self.first_s * 2.0 ** (number - 1)) * (1 - share / 2)


class Pace:
  """One pace for all threads: a least distance between starts, and pauses that hold everybody.

  Args:
    per_minute: most starts a minute; None: no limit.
  """

  def __init__(self, per_minute: float | None = None):
    if per_minute is not None and per_minute <= 0:
      raise errors.UsageError(f"a rate of {per_minute:g} requests a minute is none; give more than 0")
    self._distance_s = 60.0 / per_minute if per_minute else 0.0
    self._next = self._held = 0.0
    self._lock = threading.Lock()
    self._stopped = threading.Event()

  def wait(self, amount: float = 1.0) -> None:
    """Returns when it is this caller's turn; `amount` counts as so many starts.

    Raises:
      StoppedError: `stop` was called.
    """
    while True:
      with self._lock:
        turn = max(self._next, time.monotonic())
        self._next = turn + amount * self._distance_s
      self.rest(turn - time.monotonic())
      if self._held <= turn:
        return
      # A pause was asked for while this caller waited: it takes another turn, behind the pause.

  def hold(self, seconds: float) -> None:
    """Nobody's turn comes within the next `seconds`."""
    with self._lock:
      self._held = max(self._held, time.monotonic() + seconds)
      self._next = max(self._next, self._held)

  def rest(self, seconds: float) -> None:
    """Sleeps, unless the run ends."""
    if self._stopped.wait(max(0.0, seconds)) if seconds > 0 else self._stopped.is_set():
      raise StoppedError

  def stop(self) -> None:
    """Ends all waiting, now and later."""
    self._stopped.set()


def persist(
  call: Callable[[], T], patience: Patience, pace: Pace, key: str, progress: Callable[[], int] | None = None
) -> T:
  """The answer of `call`; after a TransientError it is tried again. The last one is raised, with the tries counted.

  Args:
    progress: how far it came (bytes of a download): tries that come further than all before are not counted.
  """
  number, furthest = 0, progress() if progress else 0
  while True:
    pace.wait()
    try:
      return call()
    except TransientError as error:
      number += 1
      if progress and progress() > furthest:
        number, furthest = 1, progress()
      asked_s = error.retry_after_s or 0.0
      if asked_s > patience.longest_ask_s:
        raise TransientError(f"{error}; it asks for a pause of {asked_s:.0f} s, too long to wait") from error
      if number >= patience.tries:
        tries = f" ({number} tries)" if number > 1 else ""
        raise TransientError(f"{error}{tries}", error.retry_after_s) from error
      if asked_s:
        pace.hold(asked_s)
      pace.rest(max(asked_s, patience.pause_s(number, key)))


def retry_after_s(response: requests.Response) -> float | None:
  """What the header Retry-After asks for, in seconds from now; None where it is missing or nonsense."""
  header = response.headers.get("Retry-After")
  if not header:
    return None
  try:
    return urllib3.util.Retry().parse_retry_after(header)
  except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
    return None


def body(response: requests.Response, deadline: float = math.inf) -> Iterator[bytes]:
  """The bytes of a streamed answer as they come, not decoded.

  Args:
    deadline: `time.monotonic()` after which a server that sends drop by drop is given up.

  Raises:
    TransientError: the connection was cut, or the deadline passed.
  """
  try:
    while chunk := response.raw.read1(CHUNK):
      yield chunk
      if time.monotonic() > deadline:
        raise TransientError("the answer took too long")
  except BROKEN as error:
    raise TransientError(reason(error)) from error
  left = getattr(response.raw, "length_remaining", None)
  if left:
    raise TransientError(f"the connection was cut, {left} bytes are missing")


def reason(error: BaseException) -> str:
  """The innermost cause of a failed request, short and without addresses that may hold a password."""
  cause = error
  while cause.__cause__ or cause.__context__:
    cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
  if isinstance(error, requests.ConnectTimeout | requests.ReadTimeout) or isinstance(cause, TimeoutError):
    return SILENT
  return f"{type(cause).__name__}: {cause}" if not isinstance(cause, OSError) else (cause.strerror or str(cause))


def shown(address: str) -> str:
  """The address without user, password and query, for messages."""
  try:
    parts = urllib.parse.urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))
  except ValueError:
    return "an address that cannot be read"
