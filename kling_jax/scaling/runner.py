"""`kling sweep run`: starts workers, watches the ledger, starts more where some died, and shows how it goes."""

import contextlib
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.live

from kling_jax import progress
from kling_jax.scaling import points, status, sweep
from kling_jax.scaling.executor import Executor
from kling_jax.scaling.ledger import Ledger
from kling_jax.scaling.status import Status


def run(
  loaded: sweep.Sweep,
  ledger: Ledger,
  executor: Executor,
  *,
  poll_s: float = 2.0,
  show: Callable[[Status], None] = lambda _: None,
) -> Status:
  """Runs the sweep to its end: every run finished, diverged or abandoned.

  Ctrl-C or an error asks the workers to save and leave; the same call goes on later.

  Args:
    loaded, ledger: what to run, and where it is recorded.
    executor: starts the workers.
    poll_s: seconds between looks at the ledger.
    show: called with the status at each look.

  Raises:
    DataError, UsageError: from the executor; NoRoom where the disk is full.
  """
  try:
    while True:
      found = status.of(ledger, loaded.runs(points.points(ledger.finished())))
      show(found)
      if found.ended:
        return found
      executor.alive()
      executor.start()
      time.sleep(poll_s)
  finally:
    executor.stop()
    points.write_csv(ledger.folder / "points.csv", points.points(ledger.finished()))


@contextlib.contextmanager
def view() -> Iterator[Callable[[Status], None]]:
  """Yields what `run` shows its status with: a live table on a terminal, a line a change elsewhere."""
  console = rich.console.Console(stderr=True)
  if progress.redraws(console):
    with rich.live.Live(console=console, refresh_per_second=2) as live:
      yield lambda found: live.update(status.table(found, most=max(8, console.height - 6)))
    return
  said: list[dict[str, int]] = [{}]

  def tell(found: Status) -> None:
    if found.counts != said[0]:
      said[0] = dict(found.counts)
      print(", ".join(f"{number} {name}" for name, number in found.counts.items()), file=sys.stderr, flush=True)

  yield tell


def default_folder(loaded: sweep.Sweep) -> pathlib.Path:
  """Where a sweep is kept unless the caller says: `runs/sweeps/<name of the file>`."""
  return pathlib.Path("runs") / "sweeps" / loaded.path.stem
