"""Runs a `kling` command under SLURM: on several nodes as one job, or as an array of tasks (sweeps).

  python -m launch.slurm --config configs/video_dit.py:size=14b --workdir runs/14b --nodes 4 --gpus 8 --hours 24 \\
    --option=--partition=gpu --dry_run
  python -m launch.slurm --array 8 --gpus 1 --workdir runs/s -- sweep work my_sweep.py --workdir runs/s
  python -m launch.slurm list
  python -m launch.slurm delete --name kling-me-14b

SLURM itself puts the job back into its queue after a preemption, a lost node or the end of its wall time, as long as
it gets on; the launcher may end and be started again meanwhile. Ctrl-C cancels the job, unless --keep or --detach is
given.
"""

import argparse
import getpass
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Sequence

from kling_jax import files
from kling_jax.errors import DataError, UsageError
from kling_jax.launch import job as job_lib
from kling_jax.launch import sbatch, slices
from kling_jax.launch.attempt import STOPPED
from kling_jax.launch.job import say
from kling_jax.launch.program import Program, Refused, Unreached

GRACE_S = 180  # between SIGTERM and the end of the wall time: enough to save
BODY = """
newest() {{ {newest}; }}
again() {{ [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ] && scontrol requeue "{identity}"; }}
before=$(newest)
code=0
srun {command} || code=$?
# It saved and left, or a process was lost after a new checkpoint: back into the queue.
if [ "$code" = {stopped} ] || {{ [ "$code" = 1 ] && [ "$(newest)" -gt "$before" ]; }}; then
  again && exit 0
fi
echo "$code" >{code}
exit "$code"
"""


class Slurm:
  """One job, or one array."""

  def __init__(self, args: argparse.Namespace, job: job_lib.Job):
    self.args, self.job = args, job
    if args.array and (args.nodes > 1 or args.tasks_per_node > 1):
      raise UsageError(
        "--array starts tasks that know nothing of each other; --nodes and --tasks_per_node are for one job"
      )
    self.folder = pathlib.Path(job.workdir or args.logs or f"logs/{job.name}").absolute() / "slurm"
    patience = {"patience_s": args.patience_s, "pause_s": min(2.0, args.poll_s)}
    advice = "the job goes on, start again to follow it"
    self._sbatch, self._squeue, self._scancel = (
      Program(name, sbatch.TRANSIENT, advice=advice, **patience) for name in ("sbatch", "squeue", "scancel")
    )

  def log(self) -> pathlib.Path:
    """Of the job, or of the first task of an array."""
    return self.folder / ("log-0" if self.args.array else "log")

  def script(self) -> str:
    """The batch script."""
    a, n = self.args, self.args.array
    options = [
      f"--job-name={self.job.name}", "--comment=kling", f"--time={sbatch.clock(self.job.hours)}",
      f"--output={self.folder}/log{'-%a' if n else ''}", "--open-mode=append", f"--signal=TERM@{GRACE_S}", "--requeue",
      *([f"--array=0-{n - 1}"] if n else [f"--nodes={a.nodes}", f"--ntasks-per-node={a.tasks_per_node}"]),
      *sbatch.resources(a.cores, a.gpus, a.memory), *a.option,
    ]  # fmt: skip
    return sbatch.script(options, {}, os.getcwd(), self.body())

  def body(self) -> str:
    attempt = [sys.executable, "-m", "kling_jax.launch.attempt"]
    identity = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if self.args.array else "$SLURM_JOB_ID"
    return BODY.format(
      newest=shlex.join([*attempt, "--newest", self.job.workdir or "."]), restarts=self.args.restarts,
      identity=identity, command=shlex.join(["--kill-on-bad-exit=1", *attempt, *self.job.words]), stopped=STOPPED,
      code=shlex.quote(str(self.folder / "exit")) + ('"-$SLURM_ARRAY_TASK_ID"' if self.args.array else ""),
    )  # fmt: skip

  # ---- calls ---------------------------------------------------------------------------------------------------------

  def queue_words(self) -> list[str]:
    return ["--noheader", "--array", "--me", "--name", self.job.name, "--format", "%T"]

  def submit_words(self) -> list[str]:
    return ["--parsable", str(self.folder / "job.sbatch")]

  def cancel_words(self) -> list[str]:
    return ["--me", "--name", self.job.name]

  def plan(self) -> list[list[str]]:
    """Every different call of a run in which all goes well."""
    return [["squeue", *self.queue_words()], ["sbatch", *self.submit_words()]]

  def waiting(self) -> list[str]:
    """States of the tasks that run or wait."""
    states = self._squeue.run(*self.queue_words()).split()
    return [state for state in states if state not in sbatch.ENDED]

  # ---- all of it -----------------------------------------------------------------------------------------------------

  def run(self) -> int:
    left = False
    try:
      if self.waiting():
        say(f"{self.job.name} is there; going on with it")
        offset = self.log().stat().st_size if self.log().exists() else 0
      else:
        offset = 0
        self.submit()
      left = self.args.detach
      if not left:
        self.follow(offset)
      return 0
    except Unreached:
      left = True  # the network is away, which is no fault of the job's
      raise
    finally:
      if left or self.args.keep:
        say(f"{self.job.name} stays; the same command follows it, `python -m launch.slurm delete` ends it")
      else:
        with job_lib.undisturbed():
          if self.waiting():
            self._scancel.run(*self.cancel_words())
            say(f"{self.job.name}: cancelled")

  def submit(self) -> None:
    for path in (*self.folder.glob("exit*"), *self.folder.glob("log*")):
      path.unlink()
    files.write_text(self.folder / "job.sbatch", self.script())
    try:
      said = self._sbatch.run(*self.submit_words(), once=True)
      say(f"{self.job.name}: job {said.strip()}")
    except Unreached:
      # The answer was lost, and perhaps not the job: submitting again would start it twice.
      time.sleep(self._sbatch.pause_s)
      if not self.waiting():
        self._sbatch.run(*self.submit_words())
    except Refused as error:
      raise DataError(
        f"{error}; see `sinfo`, `sacctmgr show qos`, and give --option=--partition=... where it must"
      ) from error

  def follow(self, offset: int) -> None:
    """Prints the log until no task runs or waits.

    Raises:
      DataError: the job failed.
    """
    said: list[str] = []
    while True:
      states = self.waiting()
      offset += self.show(offset)
      if not states:
        break
      if sorted(set(states)) != said:
        said = sorted(set(states))
        say(f"{self.job.name}: {', '.join(f'{states.count(state)} {state}' for state in said)}")
      time.sleep(self.args.poll_s)
    codes = {path.name: path.read_text().strip() for path in sorted(self.folder.glob("exit*"))}
    failed = {name: code for name, code in codes.items() if code != "0"}
    expected = self.args.array or 1
    if failed or len(codes) < expected:
      told = (
        ", ".join(f"{name} {code}" for name, code in failed.items()) or f"{expected - len(codes)} left no exit code"
      )
      raise DataError(f"{self.job.name} failed ({told}); see {self.folder}; start again to go on")

  def show(self, offset: int) -> int:
    """Prints what was written since; returns how many bytes."""
    if not self.log().exists():
      return 0
    with self.log().open("rb") as file:
      file.seek(offset)
      data = file.read()
    sys.stdout.write(data.decode(errors="replace"))
    sys.stdout.flush()
    return len(data)


def parser() -> argparse.ArgumentParser:
  made = job_lib.Parser("launch.slurm", __doc__)
  made.add_argument("--nodes", type=int, default=1)
  made.add_argument("--tasks_per_node", type=int, default=1, help="processes on a node, which share its GPUs")
  made.add_argument("--array", type=int, default=0, help="so many independent tasks instead of one job")
  made.add_argument("--gpus", type=int, default=0, help="of a task")
  made.add_argument("--cores", type=int, default=0, help="of a task")
  made.add_argument("--memory", type=int, default=0, help="GiB of a node")
  made.add_argument("--option", action="append", default=[], metavar="TEXT", help="another #SBATCH line")
  made.add_argument("--logs", help="folder of logs, for commands without --workdir")
  made.add_argument("--restarts", type=int, default=100, help="times that it goes back into the queue (default: 100)")
  made.add_argument("--keep", action="store_true", help="do not cancel when the launcher ends early")
  made.add_argument("--detach", action="store_true", help="end once it is submitted; the same command follows")
  job_lib.add_flags(made, "gpu")
  return made


def run(argv: Sequence[str] | None = None) -> int:
  own, words = job_lib.split(argv)
  if own[:1] in (["list"], ["delete"]):
    return _manage(own[0], own[1:])
  args, job = job_lib.parse(parser(), own, words)
  made = Slurm(args, job)
  gpus = args.gpus * (args.array or args.nodes * args.tasks_per_node)
  if args.usd_per_gpu_hour is not None:
    say(slices.cost(gpus, "gpu", args.usd_per_gpu_hour, job.hours))
  say(f"at most {gpus * job.hours:g} GPU hours before it is put back into the queue")
  if args.dry_run:
    print(f"# {made.folder / 'job.sbatch'}:\n{made.script()}")
    for line in made.plan():
      print(shlex.join(line))
    return 0
  return made.run()


def _manage(verb: str, words: Sequence[str]) -> int:
  """`list` and `delete`: jobs of this user that launchers submitted, by their comment."""
  made = job_lib.Parser(f"launch.slurm {verb}")
  if verb == "delete":
    job_lib.add_chosen(made)
  args = made.parse_args(words)
  lines = Program("squeue", sbatch.TRANSIENT).run("--noheader", "--me", "--format", "%j|%T|%l|%k").splitlines()
  owned = [line.strip().split("|") for line in lines if line.strip().endswith("|kling")]
  if verb == "list":
    for name, state, limit, _ in owned:
      print(f"{name}\t{state}\t{limit}")
    return 0
  names = sorted({name for name, *_ in owned})
  for name in names if args.all else args.name:
    if name not in names:
      raise UsageError(f"{name} is nothing that a launcher submitted for {getpass.getuser()}; `list` shows what is")
    Program("scancel", sbatch.TRANSIENT).run("--me", "--name", name)
    say(f"{name}: cancelled")
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  return job_lib.main(lambda: run(argv))


if __name__ == "__main__":
  sys.exit(main())
