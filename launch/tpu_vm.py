"""Runs a `kling` command on TPU VMs: queued resource, code, install, run on all hosts, logs, fetch, delete.

  python -m launch.tpu_vm --config configs/video_dit.py:size=14b --workdir runs/14b --accelerator_type v5p-128 \\
    --zone us-east5-a --project my-project --spot --bucket my-bucket --usd_per_chip_hour 1.5 --hours 48 --dry_run
  python -m launch.tpu_vm list --zone us-east5-a --project my-project
  python -m launch.tpu_vm delete --name kling-me-14b --zone us-east5-a --project my-project

What there is, is asked of the cloud and the hosts each time: the same command, started again after whatever happened,
goes on. At the end, whatever the end is, the resource is deleted, unless --keep or --detach says otherwise.
"""

import argparse
import dataclasses
import importlib.resources
import json
import pathlib
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence

from kling_jax import files
from kling_jax.errors import DataError, UsageError
from kling_jax.launch import job as job_lib
from kling_jax.launch import slices, source
from kling_jax.launch.attempt import EXPIRED, FATAL, STOPPED
from kling_jax.launch.job import say
from kling_jax.launch.program import Program, Unreached
from kling_jax.launch.queued import OWNED, TRANSIENT, UNTIL, Queued, state_of

GONE = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", "NOT_FOUND")  # of a node
FETCHED = ("config.json", "metrics.jsonl", "samples", "report")
GRACE_S = 180  # hosts whose peers have ended notice it within this time (heartbeat 100 s)
IDLE = 3  # failures in a row without a new checkpoint that end the job
TRIES = 3  # of an installation


class Gone(Exception):
  """The hosts are not there any more."""


@dataclasses.dataclass(frozen=True)
class Host:
  """What one host says of its part: state is none, running, ended or lost; step is the newest checkpoint it sees."""

  attempt: int
  state: str
  code: int | None
  step: int


class TpuVm(Queued):
  """The hosts of the resource, and the job on them."""

  def on_hosts(self, words: Sequence[str]) -> str:
    """Output of a call that goes to hosts, asked again while they are silent.

    Raises:
      Gone: they were taken away, or are silent for longer than `--patience_s`.
      DataError: the verb failed on a host.
    """
    begun = time.monotonic()
    while True:
      try:
        output = self._ssh.run(*words, once=True)
        break
      except Unreached as error:
        found = self.describe()
        states = self.nodes() if found and state_of(found) == "ACTIVE" else []
        if not states or any(state in GONE for state in states):
          raise Gone(", ".join(states) or (state_of(found) if found else "deleted")) from error
        if time.monotonic() - begun > self.args.patience_s:
          raise Gone(f"silent for {self.args.patience_s:g} s: {error}") from error
        say("a host does not answer; asking again")
        time.sleep(self.args.poll_s)
    failed = re.search(r"kling-failed (\S+) (\d+)", output)
    if failed:
      raise DataError(f"on host {failed[1]} (exit code {failed[2]}): {' '.join(output.split())[-400:]}")
    return output

  def status(self) -> list[Host]:
    """What the hosts say of the job; fewer than there are hosts where some have not heard of it."""
    found = re.finditer(
      r"^kling-host \S+ attempt=(\d+) state=(\w+) code=(\S+) step=(\d+)",
      self.on_hosts(self.host_words("status")), re.MULTILINE,
    )  # fmt: skip
    return [Host(int(m[1]), m[2], int(m[3]) if m[3].isdigit() else None, int(m[4])) for m in found]

  def prepare(self) -> None:
    """Copies and installs; what is there already stays."""
    say(f"copying {self.package.name} to {self.hosts} hosts")
    script = importlib.resources.files("kling_jax.launch").joinpath("host.sh").read_text(encoding="utf-8")
    files.write_text(self.stage / "kling-host.sh", script)
    made = self.package.make(self.stage)
    if made.parent != self.stage:
      shutil.copy(made, self.stage)
    self.on_hosts(self.copy_words())
    say("installing")
    for words in self.install_words():
      for tried in range(1, TRIES + 1):
        try:
          self.on_hosts(words)
          break
        except DataError as error:  # package indexes have bad minutes
          if tried == TRIES:
            raise
          say(f"{error}; trying again")
          time.sleep(self.args.poll_s)

  def run_once(self, after: int) -> tuple[int, int, int]:
    """Runs one attempt after number `after`, or follows what is there; its exit code, newest checkpoint and number.

    Raises:
      Gone: the hosts went away meanwhile.
    """
    hosts = self.status()
    current = max((host.attempt for host in hosts), default=0)
    if current <= after or len(hosts) < self.hosts or any(host.attempt < current for host in hosts):
      current = max(current, after + 1)
      self.prepare()
      say(f"attempt {current}: kling {shlex.join(self.job.words)}")
      self.on_hosts(self.start_words(current))
    if self.args.detach:
      return 0, 0, current
    return *self.follow(current), current

  def follow(self, attempt: int) -> tuple[int, int]:
    """Prints the log of the first host until all have ended."""
    offset, since, asked = 0, None, False
    while True:
      hosts = self.status()
      offset += self.log(attempt, offset)
      running = [host for host in hosts if host.state == "running"]
      step = max((host.step for host in hosts), default=0)
      if not running:
        codes = [host.code if host.state == "ended" and host.code is not None else 1 for host in hosts]
        worst = [code for code in codes if code in FATAL] or [code for code in codes if code not in (0, STOPPED)]
        return (worst or [max(codes)])[0], step
      if len(running) < self.hosts:  # the others hear of it by themselves, or are told
        since = since or time.monotonic()
        if time.monotonic() - since > GRACE_S * (2 if asked else 1):
          if asked:
            raise Gone("a host does not end")
          asked = True
          self.on_hosts(self.host_words("stop"))
      time.sleep(self.args.poll_s)

  def log(self, attempt: int, offset: int) -> int:
    """Prints what the first host wrote since; returns how many bytes."""
    output = self.on_hosts(self.host_words("log", str(attempt), str(offset), where="0"))
    text = output.partition("kling-log\n")[2]
    sys.stdout.write(text)
    sys.stdout.flush()
    return len(text.encode())

  def fetch(self) -> None:
    """Copies what `--fetch` names from the work directory there to the one here."""
    pack, copy = self.fetch_words()
    self.on_hosts(pack)
    self.on_hosts(copy)
    packed = self.fetched()
    names = source.unpack(packed.read_bytes(), pathlib.Path(self.job.workdir))
    packed.unlink()
    say(f"{self.job.workdir}: fetched {len(names)} files ({', '.join(names[:6])}{', ...' if len(names) > 6 else ''})")

  # ---- all of it -----------------------------------------------------------------------------------------------------

  def run(self) -> int:
    """From nothing, or from wherever an earlier call was ended, to the fetched results of a finished job."""
    self.adopt()
    left = False
    try:
      self.until_done()
      left = self.args.detach
      return 0
    except Unreached:
      left = True  # the network is away, which is no fault of the job's
      raise
    finally:
      left = left or self.args.keep
      if left:
        say(f"{self.job.name} stays, at most until {time.ctime(self.until)}; the same command goes on with it, "
            f"`python -m launch.tpu_vm delete --name {self.job.name} ...` ends it")  # fmt: skip
      else:
        with job_lib.undisturbed():
          self.delete()

  def until_done(self) -> None:
    """Attempts, on one resource after another, until one has done all.

    Raises:
      DataError: the job fails by itself, or has used up its restarts or its life.
    """
    reached = idle = after = 0
    for restart in range(self.args.restarts + 1):
      self.ensure()
      try:
        code, step, after = self.run_once(after)
        if code == 0 and self.job.workdir and not self.args.detach:
          self.fetch()
      except Gone as error:
        say(f"hosts are gone ({error}); restart {restart + 1} of {self.args.restarts}")
        self.delete()
        after = 0
        continue
      if code == 0:
        return
      if code == EXPIRED:
        raise DataError(f"the {self.job.hours:g} h of --hours are over; saved at step {step}, start again to go on")
      if code in FATAL:
        raise DataError(f"`kling {self.job.words[0]}` ended with exit code {code}, which would come again; see its log")
      idle = 0 if step > reached or code == STOPPED else idle + 1
      reached = max(reached, step)
      if idle >= IDLE:
        raise DataError(f"{IDLE} attempts failed (exit code {code}) without a checkpoint beyond step {reached}")
      say(f"exit code {code} at step {step}; restart {restart + 1} of {self.args.restarts}")
    raise DataError(f"{self.args.restarts} restarts (--restarts) are used up; start again to go on")


# ---- the command ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
  made = job_lib.Parser("launch.tpu_vm", __doc__)
  _place(made)
  made.add_argument("--accelerator_type", required=True, help="as gcloud names it: v5litepod-16, v5p-128, v6e-256")
  made.add_argument("--slices", type=int, default=1, help="joined over the data-centre network (default: 1)")
  made.add_argument("--runtime_version", help="image of the hosts (default: by generation)")
  kind = made.add_mutually_exclusive_group()
  kind.add_argument("--spot", action="store_true", help="may be taken away; the job then goes on on another")
  kind.add_argument("--flex_start", action="store_true", help="for up to 7 days, deleted by the cloud after --hours")
  kind.add_argument("--reserved", action="store_true", help="from a reservation")
  made.add_argument("--wait_hours", type=float, default=24.0, help="the request stands in the queue for so long")
  disk = made.add_mutually_exclusive_group()
  disk.add_argument("--bucket", help="Cloud Storage bucket, mounted at --root with gcsfuse")
  disk.add_argument("--nfs", metavar="HOST:/PATH", help="file system (Filestore), mounted at --root")
  made.add_argument("--root", default="/var/tmp/kling", help="where --workdir begins on the hosts")
  made.add_argument("--extras", default="tpu,cloud", help="of kling_jax, installed on the hosts (default: tpu,cloud)")
  made.add_argument("--restarts", type=int, default=100, help="after losses and failures (default: 100)")
  made.add_argument("--fetch", default=",".join(FETCHED), help="what is copied back from the work directory")
  made.add_argument("--keep", action="store_true", help="do not delete at the end")
  made.add_argument("--detach", action="store_true", help="end once it runs; the same command without it follows")
  made.add_argument("--create_option", action="append", default=[], help="another flag of `queued-resources create`")
  made.add_argument("--ssh_option", action="append", default=[], help="another flag of `queued-resources ssh`")
  made.add_argument("--ssh_timeout_s", type=float, default=1800.0, help="a call to hosts that takes longer failed")
  job_lib.add_code(made, wheel=True)
  job_lib.add_flags(made, "chip")
  return made


def _place(made: argparse.ArgumentParser) -> None:
  made.add_argument("--zone", required=True)
  made.add_argument("--project", required=True)


def run(argv: Sequence[str] | None = None) -> int:
  own, words = job_lib.split(argv)
  if own[:1] in (["list"], ["delete"]):
    return _manage(own[0], own[1:])
  args, job = job_lib.parse(parser(), own, words)
  package = job_lib.Package.of(args)
  made = TpuVm(args, job, package)
  chips = made.slice.chips * args.slices
  say(slices.cost(chips, "chip", args.usd_per_chip_hour, job.hours) + (" (spot)" if args.spot else ""))
  if args.dry_run:
    print(f"# {made.stage / 'startup.sh'}:\n{made.startup()}")
    for line in made.plan():
      print("gcloud", shlex.join(line))
    return 0
  return made.run()


def _manage(verb: str, words: Sequence[str]) -> int:
  """`list` and `delete`: what launchers created, by its label."""
  made = job_lib.Parser(f"launch.tpu_vm {verb}")
  _place(made)
  if verb == "delete":
    job_lib.add_chosen(made)
  args = made.parse_args(words)
  gcloud = Program("gcloud", TRANSIENT, timeout_s=1800, advice="try again")
  at = [f"--zone={args.zone}", f"--project={args.project}"]
  everything = json.loads(gcloud.run("compute", "tpus", "queued-resources", "list", *at, "--format=json") or "[]")
  owned = {}
  for found in everything:
    node = found["tpu"]["nodeSpec"][0]["node"]
    if node.get("labels", {}).get(OWNED) == "launch":
      owned[found["name"].rpartition("/")[2]] = (found, node)
  if verb == "list":
    for name, (found, node) in sorted(owned.items()):
      until = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(node["labels"][UNTIL])))
      print(f"{name}\t{node.get('acceleratorType')}\t{state_of(found)}\tuntil {until}")
    return 0
  names = sorted(owned) if args.all else args.name
  for name in names:
    if name not in owned:
      raise UsageError(f"{name} is nothing that a launcher made in {args.zone}; `list` shows what is")
    gcloud.run("compute", "tpus", "queued-resources", "delete", name, *at, "--force", "--quiet")
    say(f"{name}: deleted")
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  return job_lib.main(lambda: run(argv))


if __name__ == "__main__":
  sys.exit(main())
