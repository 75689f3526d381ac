"""`kling sweep design, run, work, status`: flags, and what each prints; `command.py` holds the verb."""

import argparse
import pathlib
import sys
from typing import Any

EXECUTORS = ("local", "ray", "slurm", "gke")


def _add_sweep(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("sweep", help="sweep file, or the name of a packaged one (configs/sweeps/)")
  parser.add_argument("--workdir", help="ledger and runs (default: runs/sweeps/<name of the file>)")


def _add_limits(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--retries", type=int, default=2, help="times that a failed run is tried again (default: 2)")
  parser.add_argument("--kills", type=int, default=20, help="workers that a run may lose in a row (default: 20)")
  parser.add_argument("--stale", type=float, default=120.0, help="seconds without heartbeat that free a run's lease")


def _limits(args: argparse.Namespace) -> Any:
  from kling_jax.scaling.ledger import Limits

  return Limits(args.retries, args.kills, args.stale)


def _open(args: argparse.Namespace) -> tuple[Any, pathlib.Path]:
  from kling_jax.scaling import runner, sweep

  loaded = sweep.load(args.sweep)
  return loaded, pathlib.Path(args.workdir) if args.workdir else runner.default_folder(loaded)


# ---- run -----------------------------------------------------------------------------------------------------------


def add_run(parser: argparse.ArgumentParser) -> None:
  _add_sweep(parser)
  parser.add_argument("--executor", default="local", choices=EXECUTORS)
  parser.add_argument("--workers", type=int, help="at a time (default: local: one a core or GPU; elsewhere 1)")
  parser.add_argument("--cores", type=int, help="local, ray, slurm, gke: CPU cores of a worker")
  parser.add_argument("--gpus", type=int, default=0, help="ray, slurm, gke: GPUs of a worker")
  parser.add_argument("--tpu", help="gke: accelerator and topology of a worker, e.g. tpu-v5p-slice:2x2x1")
  parser.add_argument("--image", help="gke: container image with kling_jax")
  parser.add_argument("--claim", help="gke: persistent volume claim that holds the work directory, mounted at /sweep")
  parser.add_argument("--hours", type=float, default=24.0, help="slurm, gke: longest life of a worker (default: 24)")
  parser.add_argument("--option", action="append", default=[], metavar="TEXT",
                      help="slurm: another #SBATCH line, e.g. --option=--partition=gpu")  # fmt: skip
  _add_limits(parser)


def run(args: argparse.Namespace) -> int:
  loaded, folder = _open(args)
  from kling_jax.scaling import runner
  from kling_jax.scaling.ledger import Ledger

  ledger = Ledger(folder, _limits(args))
  folder.mkdir(parents=True, exist_ok=True)
  flags = ["--retries", str(args.retries), "--kills", str(args.kills), "--stale", str(args.stale)]
  with runner.view() as show:
    found = runner.run(loaded, ledger, _executor(args, str(loaded.path), folder, flags), show=show)
  for warning in found.warnings:
    print(f"kling: warning: {warning}", file=sys.stderr)
  print(f"{folder}: " + ", ".join(f"{count} {name}" for name, count in found.counts.items()))
  return 1 if found.counts.get("abandoned") else 0


def _executor(args: argparse.Namespace, path: str, folder: pathlib.Path, flags: list[str]) -> Any:
  from kling_jax.scaling import executor

  return executor.Local(path, folder, flags, workers=args.workers, cores=args.cores)


# ---- work ----------------------------------------------------------------------------------------------------------


def add_work(parser: argparse.ArgumentParser) -> None:
  _add_sweep(parser)
  parser.add_argument("--seconds", type=float, default=0.0, help="begin no run later than this (default: no limit)")
  parser.add_argument("--parent", action="store_true", help="save and leave when standard input closes")
  _add_limits(parser)


def work(args: argparse.Namespace) -> int:
  loaded, folder = _open(args)
  from kling_jax.scaling import worker

  done = worker.work(str(loaded.path), folder, worker.Options(_limits(args), args.seconds, parent=args.parent))
  print(f"{folder}: {done} runs done by this worker")
  return 0


# ---- status --------------------------------------------------------------------------------------------------------


def add_status(parser: argparse.ArgumentParser) -> None:
  _add_sweep(parser)
  _add_limits(parser)
  parser.add_argument("--points", metavar="F.csv", help="write the table that `kling sweep fit --table` reads")
  parser.add_argument("--html", metavar="F.html", help="write the page of the sweep")
  parser.add_argument("--json", action="store_true", help="machine-readable answer on standard output")


def status(args: argparse.Namespace) -> int:
  loaded, folder = _open(args)
  from kling_jax.scaling import command, points
  from kling_jax.scaling import status as status_lib
  from kling_jax.scaling.ledger import Ledger

  ledger = Ledger(folder, _limits(args))
  finished = points.points(ledger.finished())
  found = status_lib.of(ledger, loaded.runs(finished))
  if args.points:
    points.write_csv(args.points, finished)
  if args.json:
    command.print_json(found.to_json())
  else:
    print(status_lib.text(found), end="")
    command.warn(found.warnings)
  return 0
