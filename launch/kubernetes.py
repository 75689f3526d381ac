"""Manifests for Kubernetes: pods of indexed Jobs, and JobSets of them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kling_jax.errors import UsageError

GRACE_S = 120  # between the announcement of a pod's end and its end: enough to save
MANAGED = {"app.kubernetes.io/managed-by": "kling"}
TRANSIENT = (
  r"unable to connect to the server", r"connection refused", r"i/o timeout", r"tls handshake timeout",
  r"etcdserver: request timed out", r"the server is currently unable", r"too many requests",
  r"internal error occurred",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
  """What a pod needs.

  Attributes:
    tpu: "tpu-v5p-slice:2x2x1": accelerator and topology of a slice; "" for CPU or GPU pods.
    gpus, cores, memory_gib: of each pod; 0 = none or the cluster's default. spot: nodes that may be taken away.
  """

  tpu: str = ""
  gpus: int = 0
  cores: int = 0
  memory_gib: int = 0
  spot: bool = False

  @property
  def hosts(self) -> int:
    """Pods of a slice: four chips each, but for slices of eight and fewer v5e or v6e chips, which stand in one."""
    if not self.tpu:
      return 1
    single = 8 if re.search(r"v5-lite|v5e|v6e", self.tpu) else 4
    return 1 if self.chips <= single else -(-self.chips // 4)

  @property
  def chips(self) -> int:
    """TPU chips of a slice.

    Raises:
      UsageError: `tpu` is of another form.
    """
    topology = self.tpu.partition(":")[2]
    if not re.fullmatch(r"\d+(x\d+){1,2}", topology):
      raise UsageError(f"--tpu {self.tpu!r} is not of the form ACCELERATOR:TOPOLOGY, e.g. tpu-v5p-slice:2x2x1")
    chips = 1
    for side in topology.split("x"):
      chips *= int(side)
    return chips

  def selector(self) -> dict[str, str]:
    """Labels of the nodes that will do."""
    accelerator, _, topology = self.tpu.partition(":")
    chosen = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": topology}
    return (chosen if self.tpu else {}) | ({"cloud.google.com/gke-spot": "true"} if self.spot else {})

  def resources(self) -> dict[str, Any]:
    limits: dict[str, Any] = {"google.com/tpu": self.chips // self.hosts} if self.tpu else {}
    limits |= {"nvidia.com/gpu": self.gpus} if self.gpus else {}
    requests: dict[str, Any] = {"cpu": self.cores} if self.cores else {}
    requests |= {"memory": f"{self.memory_gib}Gi"} if self.memory_gib else {}
    return {"limits": limits, "requests": requests | limits}


def identifier(text: str, length: int = 50) -> str:
  """`text` as a name that clouds and clusters take: lower case, digits and dashes, a letter first."""
  name = re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")
  return (name if name[:1].isalpha() else f"k-{name}")[:length].rstrip("-")


def claim(name: str) -> dict[str, Any]:
  """A volume that is a persistent volume claim."""
  return {"persistentVolumeClaim": {"claimName": name}}


def bucket(name: str) -> dict[str, Any]:
  """A volume that is a Cloud Storage bucket, through GKE's gcsfuse driver (its pods need `FUSE`)."""
  options = "implicit-dirs,rename-dir-limit=1000000"
  return {
    "csi": {
      "driver": "gcsfuse.csi.storage.gke.io",
      "volumeAttributes": {"bucketName": name, "mountOptions": options},
    }
  }


FUSE = {"gke-gcsfuse/volumes": "true"}


def pod(
  shape: Shape,
  *,
  image: str,
  words: Sequence[str],
  environment: Mapping[str, str],
  volume: Mapping[str, Any],
  mount: str,
  folder: str = "",
  container: str = "worker",
) -> dict[str, Any]:
  """The spec of one pod with one container, which sees `volume` at `mount` and works in `folder` (or at `mount`)."""
  tolerations = [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
  inside = {
    "name": container, "image": image, "command": list(words), "workingDir": folder or mount,
    "env": [{"name": name, "value": value} for name, value in environment.items()],
    "resources": shape.resources(), "volumeMounts": [{"name": "work", "mountPath": mount}],
  }  # fmt: skip
  selector = shape.selector()
  return {
    "restartPolicy": "Never", "terminationGracePeriodSeconds": GRACE_S,
    **({"nodeSelector": selector} if selector else {}), **({"tolerations": tolerations} if shape.spot else {}),
    "containers": [inside], "volumes": [{"name": "work", **volume}],
  }  # fmt: skip


def job(
  spec: Mapping[str, Any],
  *,
  pods: int,
  backoff: int,
  seconds: int,
  fatal: Sequence[int],
  ignore_disruption: bool,
  container: str = "worker",
  annotations: Mapping[str, str] | None = None,
) -> dict[str, Any]:
  """The spec of an indexed Job of `pods` pods.

  Args:
    backoff: pods that may fail before the Job does. seconds: its longest life.
    fatal: exit codes that fail the Job at once, since the same would come again.
    ignore_disruption: pods that are preempted or drained do not count.
  """
  rules: list[dict[str, Any]] = [
    {"action": "FailJob", "onExitCodes": {"containerName": container, "operator": "In", "values": list(fatal)}}
  ]
  if ignore_disruption:
    rules.insert(0, {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]})
  metadata = {"metadata": {"annotations": dict(annotations)}} if annotations else {}
  return {
    "completionMode": "Indexed", "completions": pods, "parallelism": pods, "backoffLimit": backoff,
    "activeDeadlineSeconds": seconds, "podFailurePolicy": {"rules": rules},
    "template": {**metadata, "spec": dict(spec)},
  }  # fmt: skip


def jobset(
  name: str,
  spec: Mapping[str, Any],
  *,
  replicas: int,
  exclusive: bool,
  policy: Mapping[str, Any],
  labels: Mapping[str, str] = MANAGED,
  ttl_s: int | None = None,
) -> dict[str, Any]:
  """A JobSet of `replicas` equal Jobs named `worker`; `exclusive`: each has a node pool (a TPU slice) of its own."""
  topology = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  replicated = {"name": "worker", "replicas": replicas, "template": {"spec": dict(spec)}}
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": name, "labels": dict(labels), **({"annotations": topology} if exclusive else {})},
    "spec": {
      "failurePolicy": dict(policy), "replicatedJobs": [replicated],
      **({"ttlSecondsAfterFinished": ttl_s} if ttl_s is not None else {}),
    },
  }  # fmt: skip
