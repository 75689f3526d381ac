"""Trains on a Ray cluster: one `kling train` process a bundle of a placement group, joined into one JAX job.

  python -m kling_jax.launch.ray_train --processes 4 --gpus 8 -- --config configs/video_dit.py:size=XL --workdir runs/xl

What stands behind -- goes to `kling train` on every host. The place of process 0 and the number of each process are
Ray's; they reach the processes as JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Variables that begin
with JAX_, XLA_ or LIBTPU_ are passed on. SIGTERM or Ctrl-C lets the job save and leave; `ray job stop` sends it and
kills after RAY_JOB_STOP_WAIT_TIME_S (3 s), so raise that. A job that lost a process ends as a whole, with exit code 1;
started again, it goes on from its last checkpoint.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kling_jax.errors import KlingError, ProcessError, UsageError

PASSED_ON = ("JAX_", "XLA_", "LIBTPU_")
# `kling`, which gets SIGTERM when the process that started it dies (PR_SET_PDEATHSIG).
TIED = """
import ctypes, signal, sys
if sys.platform == "linux":
  ctypes.CDLL(None).prctl(1, signal.SIGTERM)
from kling_jax import cli
sys.exit(cli.main())
"""
STRATEGIES = ("SPREAD", "STRICT_SPREAD", "PACK", "STRICT_PACK")


def run(
  words: Sequence[str],
  processes: int,
  resources: Mapping[str, float],
  *,
  strategy: str = "SPREAD",
  patience_s: float = 600.0,
) -> int:
  """Runs `kling train WORDS` as one job of `processes`; the exit code is 0 where all of them end with 0.

  Args:
    resources: of one process, in Ray's names: CPU, GPU, TPU.
    strategy: of the placement group, one of `STRATEGIES`; STRICT_SPREAD puts each process on a host of its own.
    patience_s: how long to wait until the cluster has room.

  Raises:
    UsageError: ray is not installed.
    ProcessError: the cluster has no room.
  """
  try:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
  except ImportError as error:
    raise UsageError("training on Ray needs ray: pip install 'kling_jax[ray]'") from error
  ray.init(address=os.environ.get("RAY_ADDRESS"), include_dashboard=False, ignore_reinit_error=True)
  group = placement_group([dict(resources)] * processes, strategy=strategy)
  try:
    if not group.wait(patience_s):
      raise ProcessError(
        f"no room for {processes} bundles of {dict(resources)} ({strategy}) after {patience_s:g} s; the cluster has "
        f"{ray.cluster_resources()}"
      )

    def start(function: Any, bundle: int, *arguments: Any) -> Any:
      where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
      others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
      remote = ray.remote(
        num_cpus=resources.get("CPU", 0), num_gpus=resources.get("GPU", 0), resources=others, max_retries=0
      )(function)
      return remote.options(scheduling_strategy=where).remote(*arguments)

    coordinator = ray.get(start(_free_address, 0))
    passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    tasks = [start(_train, n, list(words), coordinator, processes, n, passed, os.getcwd()) for n in range(processes)]
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, lambda number, frame: [ray.cancel(task) for task in tasks])
    return max(_code(ray, task) for task in tasks)
  finally:
    remove_placement_group(group)


def _code(ray: Any, task: Any) -> int:
  try:
    return ray.get(task)
  except ray.exceptions.TaskCancelledError:
    return 0  # it was asked to leave, saved and left
  except ray.exceptions.RayError as error:
    print(f"kling: ProcessError: {' '.join(str(error).split())[:300]}", file=sys.stderr)
    return 1


def _free_address() -> str:
  """host:port on which process 0 may listen."""
  import ray

  with socket.socket() as free:
    free.bind(("", 0))
    return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


def _train(words: list[str], coordinator: str, count: int, index: int, passed: dict[str, str], folder: str) -> int:
  """The Ray task: one process of the job, which is told to save and leave when the task is cancelled or dies."""
  joining = {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
  process = subprocess.Popen(
    [sys.executable, "-c", TIED, "train", *words], cwd=folder, env={**os.environ, **passed, **joining}
  )
  while True:
    try:
      return process.wait(timeout=1)  # not for ever: what ray.cancel raises would wait as well
    except subprocess.TimeoutExpired:
      continue
    except KeyboardInterrupt:
      process.terminate()


def main(argv: Sequence[str] | None = None) -> int:
  arguments = list(sys.argv[1:] if argv is None else argv)
  own, words = arguments, []
  if "--" in arguments:
    own, words = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--processes", type=int, required=True, help="processes of the job, one a host")
  parser.add_argument("--cpus", type=float, default=1, help="of each process")
  parser.add_argument("--gpus", type=float, default=0, help="of each process")
  parser.add_argument("--tpus", type=float, default=0, help="TPU chips of each process")
  parser.add_argument("--strategy", default="SPREAD", choices=STRATEGIES, help="how bundles spread over hosts")
  args = parser.parse_args(own)
  if not words:
    parser.error("give the words of `kling train` behind --")
  resources = {name: n for name, n in (("CPU", args.cpus), ("GPU", args.gpus), ("TPU", args.tpus)) if n}
  try:
    return run(words, args.processes, resources, strategy=args.strategy)
  except KlingError as error:
    print(f"kling: {type(error).__name__}: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
  sys.exit(main())
