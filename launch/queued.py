"""Queued resources of Cloud TPU: one job's request, from nothing to deleted; the words of each call of gcloud."""

import argparse
import json
import pathlib
import re
import shlex
import time
from typing import Any

from kling_jax import files
from kling_jax.errors import DataError, UsageError
from kling_jax.launch import job as job_lib
from kling_jax.launch import slices
from kling_jax.launch.job import say
from kling_jax.launch.program import Program, Refused, Unreached

TRANSIENT = (
  r"could not resolve host", r"connection (reset|aborted|refused)", r"timed out", r"\bhttp ?error 50\d", r"\b50[234]\b",
  r"service unavailable", r"internal error", r"deadline.exceeded", r"requests per minute", r"network is unreachable",
)  # fmt: skip
WAITING = ("WAITING_FOR_RESOURCES", "ACCEPTED", "CREATING", "PROVISIONING", "STATE_UNSPECIFIED")
LEAVING = ("SUSPENDING", "DELETING")
OWNED = "kling"  # the label of all that launchers create
UNTIL = "kling-until"  # the label that holds the end of its life, in seconds since 1970
SLACK_S = 900  # after its longest life the resource deletes itself, if nobody else did

STARTUP = """#!/bin/bash
# The resource deletes itself when its longest life is over, whatever became of the launcher.
left=$(({until} - $(date +%s)))
systemd-run --unit=kling-lifetime --on-active="$((left > 60 ? left : 60))s" \\
  gcloud compute tpus queued-resources delete {name} --zone={zone} --project={project} --force --quiet
"""


class Queued:
  """One job's queued resource, and the words of every call about it."""

  def __init__(self, args: argparse.Namespace, job: job_lib.Job, package: job_lib.Package):
    self.args, self.job, self.package = args, job, package
    self.slice = slices.Slice(args.accelerator_type)
    self.hosts = self.slice.hosts * args.slices
    self.stage = job_lib.stage(job.name)
    self.workdir = str(pathlib.PurePosixPath(args.root) / job.workdir) if job.workdir else ""
    self.until = time.time() + job.hours * 3600
    advice = f"what it left: `python -m launch.tpu_vm list --zone {args.zone} --project {args.project}`"
    patience = {"patience_s": args.patience_s, "pause_s": min(2.0, args.poll_s)}
    self._gcloud = Program("gcloud", TRANSIENT, timeout_s=1800, advice=advice, **patience)
    self._ssh = Program("gcloud", ("",), timeout_s=args.ssh_timeout_s, **patience)  # whatever ssh says may pass
    shared = self.hosts > 1 or args.spot or args.flex_start
    if shared and job.words[0] == "train" and not (args.bucket or args.nfs):
      raise UsageError(
        "several hosts, and hosts that may be taken away, need a disk that all see and that outlives them: give "
        "--bucket NAME or --nfs HOST:/PATH; the work directory is made there"
      )

  # ---- calls ---------------------------------------------------------------------------------------------------------

  def _words(self, *verb: str) -> list[str]:
    return ["compute", "tpus", *verb, f"--zone={self.args.zone}", f"--project={self.args.project}"]

  def describe_words(self) -> list[str]:
    return [*self._words("queued-resources", "describe", self.job.name), "--format=json"]

  def create_words(self) -> list[str]:
    a, name = self.args, self.job.name
    nodes = [f"--node-id={name}"] if a.slices == 1 else [f"--node-count={a.slices}", f"--node-prefix={name}"]
    kind = ["--spot"] if a.spot else ["--reserved"] if a.reserved else []
    if a.flex_start:
      kind = ["--provisioning-model=flex-start", f"--max-run-duration={round(self.job.hours * 3600)}s"]
    words = [
      *self._words("queued-resources", "create", name), *nodes, f"--accelerator-type={a.accelerator_type}",
      f"--runtime-version={a.runtime_version or self.slice.runtime}", *kind,
      f"--valid-until-duration={round(min(a.wait_hours, self.job.hours) * 3600)}s",
      f"--labels={OWNED}=launch,{UNTIL}={self.until:.0f}",
      f"--metadata-from-file=startup-script={self.stage / 'startup.sh'}", *a.create_option, "--quiet",
    ]  # fmt: skip
    return ["alpha", *words] if a.flex_start else words

  def delete_words(self) -> list[str]:
    return [*self._words("queued-resources", "delete", self.job.name), "--force", "--quiet"]

  def copy_words(self) -> list[str]:
    copied = [str(self.stage / "kling-host.sh"), str(self.stage / self.package.name)]
    return [*self._words("queued-resources", "scp", *copied, f"{self.job.name}:"), *self._on("all"), "--quiet"]

  def host_words(self, verb: str, *words: str, where: str = "all") -> list[str]:
    """Runs a verb of host.sh; the exit code is that of ssh alone, and a failure of the verb a line of its output."""
    line = f"bash kling-host.sh {shlex.join([verb, self.job.name, *words])}"
    if verb == "status":  # a new host has no script
      line = f"test ! -e kling-host.sh || {line}"
    line = f'{{ {line}; }} 2>&1 || {{ code=$?; echo "kling-failed $(hostname) $code"; }}'
    return [
      *self._words("queued-resources", "ssh", self.job.name), *self._on(where), f"--command={line}",
      *self.args.ssh_option, "--quiet",
    ]  # fmt: skip

  @staticmethod
  def _on(where: str) -> list[str]:
    return [f"--node={where}", f"--worker={where}"]

  def start_words(self, attempt: int) -> list[str]:
    words = self.job.attempt(self.until, self.workdir)
    return self.host_words("start", str(attempt), self.workdir or ".", *words)

  def install_words(self) -> list[list[str]]:
    """Of all that happens before the start."""
    calls = [self.host_words("install", self.package.digest, self.package.name, self.args.extras)]
    shared = [("nfs", self.args.nfs)] if self.args.nfs else [("bucket", self.args.bucket)] if self.args.bucket else []
    return [*(self.host_words("mount", kind, what, self.args.root) for kind, what in shared), *calls]

  def fetched(self) -> pathlib.Path:
    """Where the archive of what is fetched arrives."""
    return self.stage / f"{self.job.name}-fetched.tar.gz"

  def fetch_words(self) -> list[list[str]]:
    packed = self.fetched()
    back = self._words("queued-resources", "scp", f"{self.job.name}:{packed.name}", str(packed))
    return [self.host_words("pack", *self.args.fetch.split(","), where="0"), [*back, *self._on("0"), "--quiet"]]

  def plan(self) -> list[list[str]]:
    """Every different call of a run in which all goes well, in its order."""
    follow = [self.host_words("status"), self.host_words("log", "1", "0", where="0")]
    fetch = self.fetch_words() if self.job.workdir else []
    return [
      self.describe_words(), self.create_words(), self.host_words("status"), self.copy_words(), *self.install_words(),
      self.start_words(1), *follow, *fetch, self.delete_words(),
    ]  # fmt: skip

  def startup(self) -> str:
    a = self.args
    until = round(self.until + SLACK_S)
    return STARTUP.format(name=self.job.name, zone=a.zone, project=a.project, until=until)

  # ---- the queued resource -------------------------------------------------------------------------------------------

  def describe(self) -> dict[str, Any] | None:
    """What the cloud has under this name; None where it has nothing."""
    try:
      return json.loads(self._gcloud.run(*self.describe_words()))
    except Refused as error:
      if re.search(r"not.?found", error.said, re.IGNORECASE):
        return None
      raise

  def adopt(self) -> None:
    """Takes over a resource of this name from an earlier call, and with it the end of its life.

    Raises:
      UsageError: it is somebody else's, or of another kind; it is left alone.
    """
    found = self.describe()
    if found is None:
      return
    node = found["tpu"]["nodeSpec"][0]["node"]
    labels = node.get("labels", {})
    if labels.get(OWNED) != "launch" or node.get("acceleratorType") != self.args.accelerator_type:
      raise UsageError(
        f"{self.job.name} exists in {self.args.zone} and is not this job's ({node.get('acceleratorType')}, labels "
        f"{labels}); choose another --name"
      )
    self.until = float(labels[UNTIL])
    say(f"{self.job.name} is there ({state_of(found)}); going on with it")

  def ensure(self) -> None:
    """Returns when the resource is ACTIVE: creates it, waits for it, replaces one that was taken away.

    Raises:
      DataError: it cannot be had; the cloud's words.
    """
    said = ""
    while True:
      found = self.describe()
      state = state_of(found) if found else ""
      if state != said and state:
        say(f"{self.job.name}: {state}")
      said = state
      if state == "ACTIVE":
        return
      if time.time() > self.until:
        raise DataError(f"the {self.job.hours:g} h of --hours are over; start again with more to go on")
      if found is None:
        self.create()
      elif state == "SUSPENDED":
        self.delete()
      elif state == "FAILED":
        raise DataError(
          f"the request for {self.args.accelerator_type} failed: {_why(found)}; try another --zone or kind"
        )
      elif state in (*WAITING, *LEAVING):
        time.sleep(self.args.poll_s)
      else:
        raise DataError(f"{self.job.name} is in state {state}, which this launcher does not know")

  def create(self) -> None:
    files.write_text(self.stage / "startup.sh", self.startup())
    try:
      self._gcloud.run(*self.create_words(), once=True)
    except Unreached:
      time.sleep(self._gcloud.pause_s)  # the answer was lost, and perhaps not the request: `ensure` looks
    except Refused as error:
      if re.search(r"already.?exists", error.said, re.IGNORECASE):
        return
      if re.search(r"quota|resource_exhausted", error.said, re.IGNORECASE):
        raise DataError(
          f"no quota for {self.args.accelerator_type} in {self.args.zone}: {error.said}; ask for more (IAM > Quotas), "
          "use another --zone, or --spot, which has a quota of its own"
        ) from error
      raise

  def delete(self) -> None:
    """Deletes the resource and its nodes, and sees that they are gone.

    Raises:
      DataError: they are not.
    """
    begun = time.monotonic()
    while True:
      try:
        self._gcloud.run(*self.delete_words())
      except Refused as error:
        if not re.search(r"not.?found", error.said, re.IGNORECASE) and self.describe() is None:
          return
      found = self.describe()
      if found is None:
        say(f"{self.job.name}: deleted")
        return
      if time.monotonic() - begun > self.args.patience_s:
        raise DataError(
          f"{self.job.name} is still there ({state_of(found)}) and costs money: run "
          f"`gcloud {shlex.join(self.delete_words())}`"
        )
      time.sleep(self.args.poll_s)

  def nodes(self) -> list[str]:
    """States of the nodes."""
    count, name = self.args.slices, self.job.name
    states = []
    for node in [name] if count == 1 else [f"{name}-{n}" for n in range(count)]:
      try:
        states.append(json.loads(self._gcloud.run(*self._words("tpu-vm", "describe", node), "--format=json"))["state"])
      except Refused as error:
        if not re.search(r"not.?found", error.said, re.IGNORECASE):
          raise
        states.append("NOT_FOUND")
    return states


def state_of(found: dict[str, Any]) -> str:
  state = found["state"]
  return state["state"] if isinstance(state, dict) else state


def _why(found: dict[str, Any]) -> str:
  state = found["state"]
  return json.dumps(state.get("failedData", {})) if isinstance(state, dict) else str(state)
