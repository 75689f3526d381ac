"""Runs a `kling` command on a Ray cluster: curation and sweeps on many machines, training over its nodes.

  python -m launch.ray --workers 16 --machine n2-standard-32 --spot --project p --zone us-central1-a \\
    --usd_per_machine_hour 0.5 --hours 12 --dry_run -- curate --input gs://b/raw --output /data/set --engine ray
  python -m launch.ray --address http://head:8265 --processes 4 --gpus 8 --config F --workdir D
  python -m launch.ray list --project p
  python -m launch.ray delete --project p --zone us-central1-a --name kling-me-set

With --address the job goes to a cluster that is there; else one is made on Compute Engine and taken down at the end,
whatever the end is, unless --keep or --detach says otherwise. The cloud deletes every machine of it after --hours.
"""

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import yaml

from kling_jax import files
from kling_jax.errors import DataError, UsageError
from kling_jax.launch import job as job_lib
from kling_jax.launch import slices
from kling_jax.launch.job import say
from kling_jax.launch.program import Program, Refused, Unreached
from kling_jax.launch.queued import OWNED
from kling_jax.launch.queued import TRANSIENT as CLOUD

TRANSIENT = (*CLOUD, r"ssh.*(255|closed)", r"failed to connect", r"max retries exceeded")
HEAD = "http://127.0.0.1:8265"
BIN = "~/kling-venv/bin"
CODE = "/home/ubuntu/kling-code"
RUNNING = ("PENDING", "RUNNING")
IMAGE = "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64"


class Ray:
  """One job, and the cluster that is made for it."""

  def __init__(self, args: argparse.Namespace, job: job_lib.Job, package: job_lib.Package):
    self.args, self.job, self.package = args, job, package
    self.stage = job_lib.stage(job.name)
    self.cluster = str(self.stage / "cluster.yaml")
    patience = {"patience_s": args.patience_s, "pause_s": min(2.0, args.poll_s)}
    self._ray = Program("ray", TRANSIENT, advice="the job goes on, start again to follow it", **patience)
    if not args.address and not (args.project and args.zone and args.machine):
      raise UsageError("give --address of a cluster, or --project, --zone and --machine to make one")

  def manifest(self) -> dict[str, Any]:
    """The cluster file."""
    a = self.args
    scheduling: dict[str, Any] = {
      "instanceTerminationAction": "DELETE", "maxRunDuration": {"seconds": str(round(self.job.hours * 3600))},
      "automaticRestart": False, "onHostMaintenance": "TERMINATE",
    }  # fmt: skip
    disk = {"boot": True, "autoDelete": True, "type": "PERSISTENT",
            "initializeParams": {"diskSizeGb": a.disk, "sourceImage": a.disk_image}}  # fmt: skip
    node = {"machineType": a.machine, "disks": [disk], "labels": {OWNED: "launch"}, "scheduling": scheduling}
    spot = node | {"scheduling": scheduling | {"provisioningModel": "SPOT"}} if a.spot else node
    made = {
      "cluster_name": self.job.name,
      "max_workers": a.workers,
      "idle_timeout_minutes": 15,
      "provider": {"type": "gcp", "project_id": a.project, "availability_zone": a.zone, "region": a.zone[:-2]},
      "auth": {"ssh_user": "ubuntu"},
      "available_node_types": {
        "head": {"resources": {}, "node_config": node, "max_workers": 0},
        "worker": {"resources": {}, "node_config": spot, "min_workers": a.workers, "max_workers": a.workers},
      },
      "head_node_type": "head",
      "file_mounts": {CODE: str(self.stage / "context")},
      "setup_commands": [
        f"test -x {BIN}/pip || (sudo apt-get update -qq && sudo apt-get install -y -qq python3-venv && "
        f"python3 -m venv {BIN.removesuffix('/bin')})",
        f"{BIN}/pip install --quiet '{CODE}[{a.extras}]'",
      ],
      "head_start_ray_commands": [
        f"{BIN}/ray stop",
        f"{BIN}/ray start --head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml",
      ],
      "worker_start_ray_commands": [f"{BIN}/ray stop", f"{BIN}/ray start --address=$RAY_HEAD_IP:6379"],
    }
    return json.loads(json.dumps(made))  # no part twice: Ray changes what it has read

  # ---- calls ---------------------------------------------------------------------------------------------------------

  def up_words(self) -> list[str]:
    return ["up", self.cluster, "--yes", "--no-config-cache"]

  def down_words(self) -> list[str]:
    return ["down", self.cluster, "--yes"]

  def job_words(self, verb: str, *words: str) -> list[str]:
    """A `ray job` command, run here with --address, on the head of our own cluster otherwise."""
    if self.args.address:
      return ["job", verb, "--address", self.args.address, *words]
    line = shlex.join(["job", verb, "--address", HEAD, *words])
    return ["exec", self.cluster, f"{BIN}/ray {line}"]

  def submit_words(self, number: int) -> list[str]:
    """Submits try `number`."""
    a = self.args
    if self.job.words[0] == "train":
      own = ["--processes", str(a.processes), "--gpus", str(a.gpus), "--cpus", str(a.cores)]
      entry = ["-m", "kling_jax.launch.ray_train", *own, "--", *self.job.words[1:]]
    else:
      entry = ["-m", "kling_jax", *self.job.words]
    place = ["--working-dir", str(self.stage / "context")] if a.address else []
    python = "python" if a.address else f"/home/ubuntu/{BIN.removeprefix('~/')}/python"
    words = ["--submission-id", self.identity(number), "--no-wait", *place, "--", python, *entry]
    return self.job_words("submit", *words)

  def identity(self, number: int) -> str:
    return f"{self.job.name}-{number}"

  def plan(self) -> list[list[str]]:
    """Every different call of a run in which all goes well, in its order."""
    own = not self.args.address
    calls = [
      *([self.up_words()] if own else []), self.job_words("status", self.identity(1)), self.submit_words(1),
      self.job_words("logs", self.identity(1)), *([self.down_words()] if own else []),
    ]  # fmt: skip
    return [["ray", *words] for words in calls]

  # ---- the job -------------------------------------------------------------------------------------------------------

  def status(self, number: int) -> str:
    """State of a try, "" where there is none."""
    try:
      said = self._ray.run(*self.job_words("status", self.identity(number)))
    except Refused as error:
      if "does not exist" in error.said:
        return ""
      raise
    found = re.search(r"\b(PENDING|RUNNING|SUCCEEDED|FAILED|STOPPED)\b", said, re.IGNORECASE)
    if "does not exist" in said or found is None:
      return ""
    return found[1].upper()

  def run(self) -> int:
    left = False
    try:
      self.package.unpack(self.stage)
      if not self.args.address:
        files.write_text(self.cluster, yaml.safe_dump(self.manifest(), sort_keys=False))
        self._ray.run(*self.up_words())
      number = 1
      while (state := self.status(number)) in ("FAILED", "STOPPED"):
        number += 1  # tries of an earlier call
      if state:
        say(f"{self.identity(number)} is there; going on with it")
      else:
        self.submit(number)
      left = self.args.detach
      if not left:
        self.follow(number)
      return 0
    except Unreached:
      left = True  # the network is away, which is no fault of the job's
      raise
    finally:
      if self.args.address:
        say("the cluster is left as it is")
      elif left or self.args.keep:
        say(f"the cluster stays, at most {self.job.hours:g} h; the same command follows it, "
            f"`ray {shlex.join(self.down_words())}` ends it")  # fmt: skip
      else:
        with job_lib.undisturbed():
          self._ray.run(*self.down_words())
          say(f"{self.job.name}: taken down")

  def submit(self, number: int) -> None:
    say(f"{self.identity(number)}: kling {shlex.join(self.job.words)}")
    try:
      self._ray.run(*self.submit_words(number), once=True)
    except Unreached:  # the answer was lost, and perhaps not the job
      time.sleep(self._ray.pause_s)
      if not self.status(number):
        self._ray.run(*self.submit_words(number))

  def follow(self, first: int) -> None:
    """Prints the log until a try succeeds.

    Raises:
      DataError: they fail.
    """
    number, printed, since = first, 0, time.monotonic()
    while True:
      state = self.status(number)
      if state:
        text = self._ray.run(*self.job_words("logs", self.identity(number)))
        sys.stdout.write(text[printed:])
        sys.stdout.flush()
        printed = len(text)
      if state == "SUCCEEDED":
        return
      if state not in RUNNING:
        if number - first >= self.args.restarts:
          raise DataError(
            f"{self.identity(number)} ended as {state or 'unknown'} (--restarts {self.args.restarts}); see its log"
          )
        number, printed = number + 1, 0
        self.submit(number)
      if time.monotonic() - since > self.job.hours * 3600:
        raise DataError(f"the {self.job.hours:g} h of --hours are over; start again to go on")
      time.sleep(self.args.poll_s)


# ---- the command ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
  made = job_lib.Parser("launch.ray", __doc__)
  made.add_argument("--address", help="of a cluster that is there, http://HOST:8265; else one is made")
  made.add_argument("--project")
  made.add_argument("--zone")
  made.add_argument("--machine", help="type of all machines, e.g. n2-standard-32")
  made.add_argument("--workers", type=int, default=1, help="machines beside the head (default: 1)")
  made.add_argument("--spot", action="store_true", help="workers may be taken away; the head stays")
  made.add_argument("--disk", type=int, default=200, help="GB of each machine (default: 200)")
  made.add_argument("--disk_image", default=IMAGE, help=f"default: {IMAGE}")
  made.add_argument("--extras", default="ray,cloud", help="of kling_jax, installed on the machines")
  made.add_argument("--processes", type=int, default=1, help="train: processes of the job")
  made.add_argument("--gpus", type=float, default=0, help="train: of each process")
  made.add_argument("--cores", type=float, default=1, help="train: of each process")
  made.add_argument("--restarts", type=int, default=3, help="after failures (default: 3)")
  made.add_argument("--keep", action="store_true", help="do not take the cluster down at the end")
  made.add_argument("--detach", action="store_true", help="end once it is submitted; the same command follows")
  job_lib.add_code(made)
  job_lib.add_flags(made, "machine")
  return made


def run(argv: Sequence[str] | None = None) -> int:
  own, words = job_lib.split(argv)
  if own[:1] in (["list"], ["delete"]):
    return _manage(own[0], own[1:])
  args, job = job_lib.parse(parser(), own, words)
  made = Ray(args, job, job_lib.Package.of(args))
  if not args.address:
    say(slices.cost(args.workers + 1, "machine", args.usd_per_machine_hour, job.hours))
  if args.dry_run:
    if not args.address:
      print(f"# {made.cluster}:\n{yaml.safe_dump(made.manifest(), sort_keys=False)}")
    for line in made.plan():
      print(shlex.join(line))
    return 0
  return made.run()


def _manage(verb: str, words: Sequence[str]) -> int:
  """`list` and `delete`: machines of clusters that launchers made, by their label."""
  made = job_lib.Parser(f"launch.ray {verb}")
  made.add_argument("--project", required=True)
  if verb == "delete":
    made.add_argument("--zone", required=True)
    made.add_argument("--name", required=True, help="of the cluster")
  args = made.parse_args(words)
  gcloud = Program("gcloud", CLOUD, advice="try again")
  instances = ["compute", "instances", "list", f"--project={args.project}", f"--filter=labels.{OWNED}=launch"]
  found = json.loads(gcloud.run(*instances, "--format=json") or "[]")
  if verb == "list":
    for machine in found:
      cluster = machine.get("labels", {}).get("ray-cluster-name", "")
      print(f"{cluster}\t{machine['name']}\t{machine['zone'].rpartition('/')[2]}\t{machine['status']}")
    return 0
  mine = [machine["name"] for machine in found if machine["labels"].get("ray-cluster-name") == args.name]
  if not mine:
    raise UsageError(f"no machine of a cluster {args.name}; `list` shows what there is")
  at = [f"--project={args.project}", f"--zone={args.zone}", "--quiet"]
  gcloud.run("compute", "instances", "delete", *mine, *at)
  say(f"{args.name}: {len(mine)} machines deleted")
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  return job_lib.main(lambda: run(argv))


if __name__ == "__main__":
  sys.exit(main())
