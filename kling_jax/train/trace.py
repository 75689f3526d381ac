"""Traces of a few steps for xprof and Perfetto: `log.profile`, each process of a job its own."""

import pathlib

import jax

from kling_jax.errors import ConfigError


class Trace:
  """Traces the steps first <= step < last into `profile/`, or of several processes into `profile/p000`, `p001`, ...

  A run that starts again within the span traces the rest of it. What is still open where a run ends is closed and
  written, also when the run ends by an error.

  Raises:
    ConfigError: a span that holds no step.
  """

  def __init__(self, span: tuple[int, ...], folder: pathlib.Path):
    if span and not (len(span) == 2 and 0 <= span[0] < span[1]):
      raise ConfigError(f"config key 'log.profile' = {tuple(span)!r}: wants (first, last) with first < last, or ()")
    self._span = tuple(span)
    self._folder = folder / "profile"
    if jax.process_count() > 1:
      self._folder /= f"p{jax.process_index():03d}"
    self._open = False

  def at(self, step: int) -> None:
    """Called before each step: starts or ends the trace where its span does."""
    inside = bool(self._span) and self._span[0] <= step < self._span[1]
    if inside and not self._open:
      jax.profiler.start_trace(str(self._folder))
      self._open = True
    elif self._open and not inside:
      self.close()

  def close(self) -> None:
    """Ends the trace where one is open."""
    if self._open:
      self._open = False
      jax.profiler.stop_trace()
