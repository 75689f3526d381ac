"""Progress bars on standard error: shown on a terminal, silent elsewhere, also behind `!` in a notebook."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

import rich.console
import rich.progress

T = TypeVar("T")


@contextlib.contextmanager
def bar(description: str, total: float | None) -> Iterator["Bar"]:
  """A bar that the block advances itself: `with bar("train", steps) as b: b.advance(1, note="loss 0.5")`."""
  console = rich.console.Console(stderr=True)
  columns = (
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeElapsedColumn(),
    rich.progress.TimeRemainingColumn(),
    rich.progress.TextColumn("{task.fields[note]}"),
  )
  with rich.progress.Progress(*columns, console=console, disable=not redraws(console)) as progress:
    yield Bar(progress, progress.add_task(description, total=total, note=""))


def redraws(console: rich.console.Console) -> bool:
  """Whether what was drawn can be drawn over. `!kling ...` in a notebook has a terminal of which every line stays."""
  return console.is_terminal and "JPY_PARENT_PID" not in os.environ


class Bar:
  """One line of progress; made by `bar`."""

  def __init__(self, progress: rich.progress.Progress, task: rich.progress.TaskID):
    self._progress, self._task = progress, task

  def advance(self, steps: float = 1, note: str = "") -> None:
    self._progress.update(self._task, advance=steps, note=note)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
  """Yields `items` under a progress bar; `total` defaults to `len(items)` where it has one."""
  if total is None and isinstance(items, Sized):
    total = len(items)
  with bar(description, total) as line:
    for item in items:
      yield item
      line.advance()
