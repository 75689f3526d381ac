"""A command line tool of a cloud or a cluster, called so that a lost answer is not taken for a refusal."""

import re
import subprocess
import time
from collections.abc import Sequence

from kling_jax.errors import DataError, UsageError


class Unreached(DataError):
  """The server behind a tool does not answer."""


class Refused(DataError):
  """A tool did not do what was asked; `said` holds its own words."""

  def __init__(self, message: str, said: str):
    super().__init__(message)
    self.said = said


class Program:
  """A command line tool, asked again where it cannot reach its server.

  Args:
    name: of the program on PATH.
    transient: patterns of messages that pass by themselves.
    patience_s: for how long to ask again, with growing pauses.
    timeout_s: a call that takes longer counts as unanswered.
    advice: what to do when the server stays away.
  """

  def __init__(
    self,
    name: str,
    transient: Sequence[str],
    patience_s: float = 600.0,
    pause_s: float = 2.0,
    timeout_s: float | None = None,
    advice: str = "the workers go on, start again to follow them",
  ):
    self.name, self.patience_s, self.pause_s, self.timeout_s, self.advice = name, patience_s, pause_s, timeout_s, advice
    self._transient = re.compile("|".join(transient), re.IGNORECASE)

  def run(self, *words: str, once: bool = False) -> str:
    """Standard output of `name words`.

    Args:
      once: do not ask again where the answer was lost; the caller finds out whether it was done.

    Raises:
      UsageError: the program is not installed.
      Unreached: its server cannot be reached.
      Refused: it refuses.
    """
    begun, pause = time.monotonic(), self.pause_s
    while True:
      code, output, said = self._call(words)
      if code == 0:
        return output
      if code is not None and not self._transient.search(said):
        line = f"`{self.name} {' '.join(words[:4])} ...` refused: {said or f'exit code {code}'}"
        raise Refused(line, said)
      if once or time.monotonic() - begun > self.patience_s:
        raise Unreached(f"{self.name} cannot reach its server: {said}; {self.advice}")
      time.sleep(min(pause, 60.0))
      pause *= 2

  def _call(self, words: Sequence[str]) -> tuple[int | None, str, str]:
    """Exit code (None where the time was up), output, and what it said in one line."""
    try:
      done = subprocess.run([self.name, *words], capture_output=True, text=True, timeout=self.timeout_s)
    except FileNotFoundError as error:
      raise UsageError(f"{self.name} is not on PATH; run this where the cluster's tools are installed") from error
    except subprocess.TimeoutExpired:
      return None, "", f"no answer within {self.timeout_s:g} s"
    return done.returncode, done.stdout, " ".join((done.stderr or done.stdout).split())[-500:]
