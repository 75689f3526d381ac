"""Runs a `kling` command on GKE: a JobSet of TPU slices or GPU hosts, or the same through XPK.

  python -m launch.gke --config configs/video_dit.py:size=14b --workdir runs/14b --tpu tpu-v5p-slice:4x4x4 --slices 2 \\
    --spot --image us-docker.pkg.dev/me/kling --build --bucket my-bucket --usd_per_chip_hour 1.5 --hours 48 --dry_run
  python -m launch.gke --xpk --cluster c --project p --zone z --tpu_type v5p-128 --image ... --config ... --workdir ...
  python -m launch.gke list
  python -m launch.gke delete --name kling-me-14b

The cluster restarts the job when nodes are taken away; the launcher may end and be started again meanwhile. When the
job is over, whatever its end is, its JobSet is deleted, unless --keep or --detach says otherwise.
"""

import argparse
import importlib.resources
import json
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import yaml

from kling_jax import files
from kling_jax.errors import DataError, UsageError
from kling_jax.launch import job as job_lib
from kling_jax.launch import kubernetes, slices
from kling_jax.launch.attempt import FATAL
from kling_jax.launch.job import say
from kling_jax.launch.program import Program, Refused, Unreached

COORDINATOR_PORT = 12321
SLACK_S = 900  # after its longest life the job is not waited for any more
TTL_S = 3600  # a JobSet that is over is deleted by the cluster then, if nobody else did
WORK = "/kling"  # where the bucket or the claim is mounted


class Gke:
  """One job as a JobSet."""

  def __init__(self, args: argparse.Namespace, job: job_lib.Job, package: job_lib.Package | None):
    self.args, self.job, self.package = args, job, package
    self.stage = job_lib.stage(job.name)
    self.shape = kubernetes.Shape(args.tpu, args.gpus, args.cores, args.memory, args.spot)
    self.image = f"{args.image}:{package.digest}" if package else args.image
    self.until = time.time() + job.hours * 3600
    if bool(args.bucket) == bool(args.claim):
      raise UsageError("pods come and go: give --bucket NAME or --claim NAME for the work directory to outlive them")
    if args.tpu and args.slices > 1 and self.shape.hosts == 1:
      raise UsageError(f"{args.tpu} stands in one host; GKE joins slices of several hosts only")
    patience = {"patience_s": args.patience_s, "pause_s": min(2.0, args.poll_s)}
    self._kubectl = Program("kubectl", kubernetes.TRANSIENT, advice="the pods go on, start again to follow", **patience)

  @property
  def pods(self) -> int:
    """Of one of the JobSet's Jobs: the hosts of a slice, or all GPU hosts."""
    return self.shape.hosts if self.args.tpu else self.args.nodes

  def manifest(self) -> dict[str, Any]:
    """The JobSet: synchronous training, so that a pod that is lost restarts all of them."""
    a, name = self.args, self.job.name
    workdir = str(pathlib.PurePosixPath(WORK) / self.job.workdir) if self.job.workdir else ""
    words = ["python", "-m", "kling_jax.launch.attempt", *self.job.attempt(self.until, workdir)]
    environment = dict(pair.split("=", 1) for pair in a.env)
    if not a.tpu and a.nodes > 1:  # GKE tells TPU hosts their places, others are told by us
      environment |= {"JAX_COORDINATOR_ADDRESS": f"{name}-worker-0-0.{name}:{COORDINATOR_PORT}",
                      "JAX_NUM_PROCESSES": str(a.nodes)}  # fmt: skip
    volume = kubernetes.bucket(a.bucket) if a.bucket else kubernetes.claim(a.claim)
    pod = kubernetes.pod(
      self.shape, image=self.image, words=words, environment=environment, volume=volume, mount=WORK,
      folder="/src" if self.package else WORK,
    )  # fmt: skip
    spec = kubernetes.job(
      pod, pods=self.pods, backoff=0, seconds=round(self.job.hours * 3600) + SLACK_S, fatal=FATAL,
      ignore_disruption=False, annotations=kubernetes.FUSE if a.bucket else None,
    )  # fmt: skip
    reasons = ["PodFailurePolicy", "DeadlineExceeded"]
    rules = [{"name": "comes-again", "action": "FailJobSet", "onJobFailureReasons": reasons}]
    policy = {"maxRestarts": a.restarts, "rules": rules}
    replicas = a.slices if a.tpu else 1
    return kubernetes.jobset(
      name, spec, replicas=replicas, exclusive=bool(a.tpu) and self.shape.hosts > 1, policy=policy, ttl_s=TTL_S
    )

  # ---- calls ---------------------------------------------------------------------------------------------------------

  def build_words(self) -> list[list[str]]:
    """Builds the image from the staged checkout and pushes it."""
    if not self.package:
      return []
    return [["docker", "build", "--tag", self.image, str(self.stage / "context")], ["docker", "push", self.image]]

  def get_words(self) -> list[str]:
    return ["get", "jobset", self.job.name, "--ignore-not-found", "--output=json"]

  def apply_words(self) -> list[str]:
    return ["apply", f"--filename={self.stage / 'jobset.yaml'}"]

  def pods_words(self) -> list[str]:
    """The first pod, whose log is followed."""
    return ["get", "pods", f"--selector=jobset.sigs.k8s.io/jobset-name={self.job.name},jobset.sigs.k8s.io/job-index=0,"
            "batch.kubernetes.io/job-completion-index=0", "--output=json"]  # fmt: skip

  def delete_words(self) -> list[str]:
    return ["delete", "jobset", self.job.name, "--ignore-not-found", "--wait=true"]

  def plan(self) -> list[list[str]]:
    """Every different call of a run in which all goes well, in its order, but for the pod's name."""
    calls = [self.get_words(), self.apply_words(), self.pods_words(), ["logs", "--follow", "POD"], self.delete_words()]
    return [*self.build_words(), *(["kubectl", *words] for words in calls)]

  # ---- the JobSet ----------------------------------------------------------------------------------------------------

  def get(self) -> dict[str, Any] | None:
    said = self._kubectl.run(*self.get_words())
    return json.loads(said) if said.strip() else None

  def run(self) -> int:
    found = self.get()
    if found and found["metadata"].get("labels", {}).items() < kubernetes.MANAGED.items():
      raise UsageError(f"JobSet {self.job.name} exists and no launcher made it; choose another --name")
    left = False
    try:
      if found and not ended(found):
        say(f"{self.job.name} is there; going on with it")
      else:
        if found:
          self.delete()
        self.create()
      left = self.args.detach
      if not left:
        self.follow()
      return 0
    except Unreached:
      left = True  # the network is away, which is no fault of the job's
      raise
    finally:
      if left or self.args.keep:
        say(f"{self.job.name} stays; the same command follows it, `python -m launch.gke delete` ends it")
      else:
        with job_lib.undisturbed():
          self.delete()

  def create(self) -> None:
    if self.package:
      stage_context(self.package, self.stage)
      for words in self.build_words():
        Program(words[0], (r"connection reset", r"timed? ?out")).run(*words[1:])
    files.write_text(self.stage / "jobset.yaml", yaml.safe_dump(self.manifest(), sort_keys=False))
    try:
      self._kubectl.run(*self.apply_words())
    except Refused as error:
      if "no matches for kind" in error.said:
        raise UsageError(
          "the cluster has no JobSet controller: github.com/kubernetes-sigs/jobset, section Installation"
        ) from error
      raise

  def delete(self) -> None:
    self._kubectl.run(*self.delete_words())
    say(f"{self.job.name}: deleted")

  def follow(self) -> None:
    """Prints the log of the first pod until the JobSet is over.

    Raises:
      DataError: it failed; the cluster's words.
    """
    restarts, pod, log = 0, "", None
    try:
      while True:
        found = self.get()
        if found is None:
          raise DataError(f"JobSet {self.job.name} was deleted by somebody")
        again = found.get("status", {}).get("restarts", 0)
        if again > restarts:
          say(f"restarted by the cluster ({again} of {self.args.restarts})")
          restarts = again
        over = ended(found)
        if over:
          if log:
            log.wait()  # what it still has to say
          if over["type"] == "Failed":
            raise DataError(f"JobSet {self.job.name} failed: {over.get('reason', '')} {over.get('message', '')}")
          return
        if time.time() > self.until + SLACK_S:
          raise DataError(f"the {self.job.hours:g} h of --hours are over; start again to go on")
        if log is None or log.poll() is not None:
          pod, log = self.attach(pod, log)
        time.sleep(self.args.poll_s)
    finally:
      if log:
        log.kill()
        log.wait()

  def attach(self, last: str, log: subprocess.Popen | None) -> tuple[str, subprocess.Popen | None]:
    """Follows the log of the first pod once it runs: from its start, or, after a broken connection, from just now."""
    items = json.loads(self._kubectl.run(*self.pods_words()))["items"]
    names = [item["metadata"]["name"] for item in items if item["status"].get("phase") not in (None, "Pending")]
    running = [item["metadata"]["name"] for item in items if item["status"].get("phase") == "Running"]
    if not names or (names[-1] == last and last not in running):
      return last, log
    since = ["--since=30s"] if names[-1] == last else []
    return names[-1], subprocess.Popen(["kubectl", "logs", "--follow", names[-1], *since])


def ended(found: dict[str, Any]) -> dict[str, Any] | None:
  """The condition under which a JobSet is over: of type Completed or Failed."""
  conditions = found.get("status", {}).get("conditions", ())
  return next((c for c in conditions if c["type"] in ("Completed", "Failed") and c.get("status") == "True"), None)


def stage_context(package: job_lib.Package, stage: pathlib.Path) -> None:
  """Makes the folder from which an image is built: the checkout, with our Dockerfile where it has none."""
  context = package.unpack(stage)
  if not (context / "Dockerfile").exists():
    text = importlib.resources.files("kling_jax.launch").joinpath("Dockerfile").read_text(encoding="utf-8")
    files.write_text(context / "Dockerfile", text)


# ---- XPK -----------------------------------------------------------------------------------------------------------


class Xpk:
  """The same as a workload of XPK, which writes the JobSet itself; --workdir is a path that the cluster mounts."""

  def __init__(self, args: argparse.Namespace, job: job_lib.Job, package: job_lib.Package | None):
    self.args, self.job, self.package = args, job, package
    self.stage = job_lib.stage(job.name)
    self.until = time.time() + job.hours * 3600
    missing = [name for name in ("cluster", "project", "zone", "tpu_type") if not getattr(args, name)]
    if missing:
      raise UsageError(f"--xpk needs {', '.join(f'--{name}' for name in missing)}")
    self._xpk = Program("xpk", kubernetes.TRANSIENT, patience_s=args.patience_s, pause_s=min(2.0, args.poll_s))

  def _words(self, verb: str, *words: str) -> list[str]:
    a = self.args
    at = ["--cluster", a.cluster, "--project", a.project, "--zone", a.zone]
    return ["workload", verb, *at, *words]

  def create_words(self) -> list[str]:
    a = self.args
    words = ["python", "-m", "kling_jax.launch.attempt", *self.job.attempt(self.until)]
    image = ["--docker-image", a.image]
    if self.package:  # XPK builds and pushes: the folder on top of the image
      image = ["--base-docker-image", a.image, "--script-dir", str(self.stage / "context")]
    return self._words(
      "create", "--workload", self.job.name, "--tpu-type", a.tpu_type, "--num-slices", str(a.slices),
      *(["--spot"] if a.spot else []), *image, "--command", shlex.join(words), "--max-restarts", str(a.restarts),
      "--restart-on-user-code-failure", "--termination-grace-period-seconds", str(kubernetes.GRACE_S),
      "--ttl-seconds-after-finished", str(TTL_S), *(word for pair in a.env for word in ("--env", pair)),
    )  # fmt: skip

  def list_words(self) -> list[str]:
    return self._words("list", "--filter-by-job", self.job.name)

  def wait_words(self) -> list[str]:
    return self._words("list", "--wait-for-job-completion", self.job.name)

  def delete_words(self) -> list[str]:
    return self._words("delete", "--workload", self.job.name, "--force")

  def plan(self) -> list[list[str]]:
    calls = (self.list_words(), self.create_words(), self.wait_words(), self.delete_words())
    return [["xpk", *words] for words in calls]

  def run(self) -> int:
    left = False
    try:
      if self.job.name in self._xpk.run(*self.list_words()).split():
        say(f"{self.job.name} is there; going on with it")
      else:
        if self.package:
          stage_context(self.package, self.stage)
        self._create()
      left = self.args.detach
      if not left:
        self._xpk.run(*self.wait_words())
      return 0
    except Unreached:
      left = True  # the network is away, which is no fault of the job's
      raise
    finally:
      if not (left or self.args.keep):
        with job_lib.undisturbed():
          if self.job.name in self._xpk.run(*self.list_words()).split():
            self._xpk.run(*self.delete_words())
          say(f"{self.job.name}: deleted")

  def _create(self) -> None:
    try:
      self._xpk.run(*self.create_words(), once=True)
    except Unreached:  # the answer was lost, and perhaps not the workload
      time.sleep(self._xpk.pause_s)
      if self.job.name not in self._xpk.run(*self.list_words()).split():
        self._xpk.run(*self.create_words())


# ---- the command ---------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
  made = job_lib.Parser("launch.gke", __doc__)
  made.add_argument("--image", required=True, help="with kling_jax in it; with --build: its name, without a tag")
  made.add_argument("--build", action="store_true", help="build and push the image from --code")
  made.add_argument("--tpu", default="", help="accelerator and topology of a slice, e.g. tpu-v5p-slice:4x4x4")
  made.add_argument("--slices", type=int, default=1, help="joined over the data-centre network (default: 1)")
  made.add_argument("--nodes", type=int, default=1, help="GPU hosts (default: 1)")
  made.add_argument("--gpus", type=int, default=0, help="of each host")
  made.add_argument("--cores", type=int, default=0, help="of each pod")
  made.add_argument("--memory", type=int, default=0, help="GiB of each pod")
  made.add_argument("--spot", action="store_true", help="on spot nodes; the cluster restarts the job")
  made.add_argument("--bucket", help=f"Cloud Storage bucket that holds --workdir, mounted at {WORK}")
  made.add_argument("--claim", help=f"persistent volume claim (ReadWriteMany) that holds it, mounted at {WORK}")
  made.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="variable of the pods")
  made.add_argument("--restarts", type=int, default=100, help="by the cluster (default: 100)")
  made.add_argument("--keep", action="store_true", help="do not delete at the end")
  made.add_argument("--detach", action="store_true", help="end once it is submitted; the same command follows")
  made.add_argument("--xpk", action="store_true", help="through XPK")
  for name in ("cluster", "project", "zone", "tpu_type"):
    made.add_argument(f"--{name}", help="of XPK")
  job_lib.add_code(made)
  job_lib.add_flags(made, "chip")
  made.add_argument("--usd_per_gpu_hour", type=float, help="price of one gpu for an hour")
  return made


def price(args: argparse.Namespace, hours: float) -> str:
  """The line about cost."""
  if args.xpk or args.tpu:
    chips = slices.Slice(args.tpu_type).chips if args.xpk else kubernetes.Shape(args.tpu).chips
    return slices.cost(chips * args.slices, "chip", args.usd_per_chip_hour, hours)
  return slices.cost(args.nodes * args.gpus, "gpu", args.usd_per_gpu_hour, hours)


def run(argv: Sequence[str] | None = None) -> int:
  own, words = job_lib.split(argv)
  if own[:1] in (["list"], ["delete"]):
    return _manage(own[0], own[1:])
  args, job = job_lib.parse(parser(), own, words)
  package = job_lib.Package.of(args) if args.build else None
  made = (Xpk if args.xpk else Gke)(args, job, package)
  say(price(args, job.hours) + (" (spot)" if args.spot else ""))
  if args.dry_run:
    if isinstance(made, Gke):
      print(f"# {made.stage / 'jobset.yaml'}:\n{yaml.safe_dump(made.manifest(), sort_keys=False)}")
    for line in made.plan():
      print(shlex.join(line))
    return 0
  return made.run()


def _manage(verb: str, words: Sequence[str]) -> int:
  """`list` and `delete`: JobSets that launchers made, by their label."""
  made = job_lib.Parser(f"launch.gke {verb}")
  if verb == "delete":
    job_lib.add_chosen(made)
  args = made.parse_args(words)
  kubectl = Program("kubectl", kubernetes.TRANSIENT, advice="try again")
  selector = ",".join(f"{key}={value}" for key, value in kubernetes.MANAGED.items())
  items = json.loads(kubectl.run("get", "jobsets", f"--selector={selector}", "--output=json"))["items"]
  owned = {item["metadata"]["name"]: item for item in items}
  if verb == "list":
    for name, item in sorted(owned.items()):
      over = ended(item)
      print(f"{name}\t{over['type'] if over else 'running'}\trestarts {item.get('status', {}).get('restarts', 0)}")
    return 0
  for name in sorted(owned) if args.all else args.name:
    if name not in owned:
      raise UsageError(f"{name} is nothing that a launcher made; `list` shows what is")
    kubectl.run("delete", "jobset", name, "--ignore-not-found", "--wait=true")
    say(f"{name}: deleted")
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  return job_lib.main(lambda: run(argv))


if __name__ == "__main__":
  sys.exit(main())
