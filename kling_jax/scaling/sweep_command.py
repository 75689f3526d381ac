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


# ---- design --------------------------------------------------------------------------------------------------------


def _add_hardware(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--device", help="kind of device, e.g. 'TPU v5p', 'NVIDIA H100' (default: a CPU core)")
  parser.add_argument("--flops_per_s", type=float, help="peak of a device that the table lacks")
  parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches (default: 0.4)")
  parser.add_argument("--devices", type=int, default=1, help="of one run (default: 1)")
  parser.add_argument("--price", type=float, default=float("nan"), help="dollars for an hour of one device")


def add_design(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("sweep", nargs="?", help="sweep file to print the plan and cost of")
  parser.add_argument("--config", default="video_dit:res=256", metavar="FILE[:ARGS]",
                      help="without a sweep file: config to design IsoFLOP grids for, without its size")  # fmt: skip
  parser.add_argument("--flops", help="budgets, e.g. 3e17,6e17,1e18")
  parser.add_argument("--device_hours", help="budgets instead of --flops, e.g. 10,100")
  parser.add_argument("--law", default="yin2024", help="law in print that centres the grids (default: yin2024)")
  parser.add_argument("--fit", help="fit.json of `kling sweep fit --out` that centres them instead")
  parser.add_argument("--sizes", type=int, default=7, help="models a budget (default: 7)")
  parser.add_argument(
    "--spread", type=float, default=8.0, help="from the middle to the smallest and largest (default: 8)"
  )
  parser.add_argument("--multiple", type=int, default=1, help="clips of a batch are a multiple of this")
  parser.add_argument("--out", metavar="F.py", help="write the sweep file")
  parser.add_argument(
    "--next", type=int, metavar="K", help="the K runs that would teach most, by the ledger in --workdir"
  )
  parser.add_argument("--workdir", help="of the sweep, for --next")
  parser.add_argument("--aim", metavar="N,T", help="--next: what is to be known is the loss of this N and T")
  parser.add_argument("--dry_run", action="store_true", help="write nothing, print the plan")
  parser.add_argument("--json", action="store_true", help="machine-readable answer on standard output")
  _add_hardware(parser)


def design(args: argparse.Namespace) -> int:
  from kling_jax.errors import UsageError
  from kling_jax.scaling import planning

  hardware = planning.hardware(args.device, args.flops_per_s, args.mfu, args.devices, args.price)
  if args.next is not None:
    if not args.sweep:
      raise UsageError("--next needs the sweep file whose ledger is read")
    loaded, folder = _open(args)
    aim = planning.numbers(args.aim, "--aim", 2) if args.aim else None
    answer = planning.following(loaded, folder, args.next, aim)
    return planning.show(answer, planning.following_text, args.json)
  if args.sweep:
    return planning.show(planning.of_sweep(args.sweep, hardware), planning.plan_text, args.json)
  if bool(args.flops) == bool(args.device_hours):
    raise UsageError("give a sweep file, or budgets by --flops or --device_hours")
  budgets = planning.numbers(args.flops or args.device_hours, "--flops" if args.flops else "--device_hours")
  if args.device_hours:
    budgets = [hardware.flops(hours) for hours in budgets]
  law = planning.Centre(args.fit, "fit") if args.fit else planning.Centre(args.law, "law")
  text = planning.isoflop_file(args.config, budgets, law, args.sizes, args.spread, args.multiple)
  return planning.show(
    planning.of_text(text, hardware, None if args.dry_run else args.out), planning.plan_text, args.json
  )


# ---- run -----------------------------------------------------------------------------------------------------------


def add_run(parser: argparse.ArgumentParser) -> None:
  _add_sweep(parser)
  parser.add_argument("--executor", default="local", choices=EXECUTORS)
  parser.add_argument("--workers", type=int, help="at a time (default: local: one a core or GPU; elsewhere 1)")
  parser.add_argument("--cores", type=int, help="local, ray, slurm, gke: CPU cores of a worker")
  parser.add_argument("--gpus", type=int, default=0, help="ray, slurm, gke: GPUs of a worker")
  parser.add_argument("--memory", type=int, default=0, help="slurm, gke: GiB of a worker")
  parser.add_argument("--tpu", default="", help="gke: accelerator and topology of a worker, e.g. tpu-v5p-slice:2x2x1")
  parser.add_argument("--image", help="gke: container image with kling_jax")
  parser.add_argument("--claim", help="gke: persistent volume claim that holds the work directory, mounted at /sweep")
  parser.add_argument("--hours", type=float, default=24.0, help="slurm, gke: longest life of a worker (default: 24)")
  parser.add_argument("--address", help="ray: of the cluster (default: RAY_ADDRESS, else this machine)")
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
  from kling_jax.errors import UsageError
  from kling_jax.scaling import clusters, executor

  if args.executor == "local":
    return executor.Local(path, folder, flags, workers=args.workers, cores=args.cores)
  needs = clusters.Needs(args.workers or 1, args.cores or 0, args.gpus, args.memory, args.hours, tuple(args.option))
  if args.executor == "slurm":
    return clusters.Slurm(path, folder, flags, needs)
  if args.executor == "ray":
    return clusters.Ray(path, folder, flags, needs, args.address)
  if not args.image or not args.claim:
    raise UsageError(
      "--executor gke needs --image (with kling_jax) and --claim (a volume that holds sweep and work directory)"
    )
  return clusters.Gke(args.sweep, folder, flags, needs, image=args.image, claim=args.claim, tpu=args.tpu)


# ---- work ----------------------------------------------------------------------------------------------------------


def add_work(parser: argparse.ArgumentParser) -> None:
  _add_sweep(parser)
  parser.add_argument("--seconds", type=float, default=0.0, help="begin no run later than this (default: no limit)")
  parser.add_argument("--parent", action="store_true", help="save and leave when standard input closes")
  parser.add_argument("--distributed", action="store_true", help="one of the hosts of a worker that has several")
  _add_limits(parser)


def work(args: argparse.Namespace) -> int:
  loaded, folder = _open(args)
  from kling_jax.scaling import worker

  done = worker.work(str(loaded.path), folder, worker.Options(_limits(args), args.seconds, parent=args.parent,
                                                               distributed=args.distributed))  # fmt: skip
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
  from kling_jax import answers
  from kling_jax.scaling import command, points
  from kling_jax.scaling import status as status_lib
  from kling_jax.scaling.ledger import Ledger

  ledger = Ledger(folder, _limits(args))
  finished = points.points(ledger.finished())
  found = status_lib.of(ledger, loaded.runs(finished))
  if args.points:
    points.write_csv(args.points, finished)
  if args.html:
    from kling_jax.scaling import dashboard

    dashboard.write(args.html, loaded, ledger, found)
    print(f"wrote {args.html}", file=sys.stderr)
  if args.json:
    answers.show(found.to_json())
  else:
    print(status_lib.text(found), end="")
    command.warn(found.warnings)
  return 0
