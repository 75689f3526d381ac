"""A plan: a config on a topology, its memory predicted by arithmetic, its programs compiled and read."""

import dataclasses
import math
import pathlib
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from jax.experimental import serialize_executable

from kling_jax.config import plain
from kling_jax.errors import MeshError
from kling_jax.plan import compiled, memory, programs, work
from kling_jax.plan import search as search_lib
from kling_jax.plan.compiled import Report
from kling_jax.plan.topology import GIB, Topology
from kling_jax.train import sharding, task
from kling_jax.train.task import Task


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of a config on a topology.

  Attributes:
    config, topology, mesh: the three.
    predicted: memory of the training step before anything was compiled.
    estimate_s: of a training step, for ranking meshes (`search.seconds`).
    reports: of the compiled programs, () where nothing was compiled.
    executables: the compiled programs.
  """

  config: ml_collections.ConfigDict
  topology: Topology
  mesh: dict[str, int]
  predicted: memory.Prediction
  estimate_s: float
  reports: tuple[Report, ...] = ()
  executables: tuple[Any, ...] = ()

  @property
  def fits(self) -> bool:
    return all(report.fits for report in self.reports) if self.reports else self.predicted.fits(self.topology)

  def to_json(self) -> dict[str, Any]:
    """The keys that `kling plan --json` promises are those of the first program."""
    first = self.reports[0].to_json() if self.reports else {}
    prediction = {"by_kind": self.predicted.by_kind, "hbm_bytes_per_device": self.predicted.total}
    prediction |= {"temporaries": self.predicted.temporaries, "host_bytes_per_device": self.predicted.host}
    return first | {
      "topology": str(self.topology), "slices": self.topology.slices, "devices": self.topology.size, "mesh": self.mesh,
      "fits": self.fits, "predicted": prediction, "estimate_s": self.estimate_s,
      "hbm_available": self.topology.chip.hbm, "programs": [report.to_json() for report in self.reports],
      "config": plain(self.config),
    }  # fmt: skip

  def text(self) -> str:
    """For a terminal."""
    lines = [f"{self.config.task} on {self.topology} ({self.topology.size} devices), mesh "
             + " x ".join(f"{name} {size}" for name, size in self.mesh.items())]  # fmt: skip
    kinds = ", ".join(f"{kind} {_gib(size)}" for kind, size in self.predicted.by_kind.items() if size >= 2**23)
    lines.append(f"  predicted: {_gib(self.predicted.total)} GiB a device of {_gib(self.topology.chip.hbm)} ({kinds})")
    if self.predicted.host:
      lines.append(f"             {_gib(self.predicted.host)} GiB a device in the hosts' memory")
    for report in self.reports:
      lines += ["", *_lines(report)]
    return "\n".join(lines)

  def save(self, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes each compiled program with its argument trees; returns the files.

    `jax.experimental.serialize_executable.deserialize_and_load` takes them on the topology that they were compiled
    for, under the same libtpu. That start without compiling cannot be seen on a machine without the TPUs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for report, executable in zip(self.reports, self.executables, strict=True):
      path = folder / f"{report.name}-{str(self.topology).replace(':', '-')}.executable"
      path.write_bytes(pickle.dumps(serialize_executable.serialize(executable)))
      files.append(path)
    return files


def plan(
  config: ml_collections.ConfigDict,
  topology: Topology,
  wanted: Sequence[str] = (),
  *,
  compile_: bool = True,
  options: Mapping[str, str] | None = None,
) -> Plan:
  """Predicts, refuses what cannot fit, and compiles `wanted` programs (default: all of the task).

  Raises:
    ConfigError, MeshError: what cannot run, with what would.
    UsageError: an unknown program, or no TPU compiler.
  """
  job = task.make(config)
  mesh = sizes(config, topology)
  sharding.check(mesh, job.shapes, job.axes, job.extents())
  memory.refuse(job, mesh, topology, lambda remat: _under(config, remat))
  predicted = memory.predict(job, mesh)
  found = Plan(config, topology, mesh, predicted, search_lib.seconds(job, mesh, topology))
  return _compiled(found, job, wanted, options) if compile_ else found


def search(
  config: ml_collections.ConfigDict,
  topology: Topology,
  wanted: Sequence[str] = (),
  compile_: int = 1,
  options: Mapping[str, str] | None = None,
) -> list[Plan]:
  """Plans on the meshes that are estimated fastest, best first; with `compile_` of them compiled, by their bounds.

  Raises:
    MeshError: the config fits on no mesh of these chips; says what would.
  """
  job = task.make(config)
  found = search_lib.candidates(job, topology)
  if not found:
    anything = memory.meshes(job, topology.size)
    if anything:
      memory.refuse(job, min(anything, key=lambda one: memory.predict(job, one).total), topology,
                    lambda remat: _under(config, remat))  # fmt: skip
    raise MeshError(
      f"no mesh of {topology.size} devices divides {config.task}: rows {config.data.batch}, "
      + ", ".join(f"{extent.what} {extent.size}" for extent in job.extents() if extent.axis != "batch")
    )
  plans = [
    Plan(_on(config, one.mesh), topology, one.mesh, one.memory, one.seconds) for one in found[: max(compile_, 8)]
  ]
  if not compile_:
    return plans
  done = [_compiled(one, task.make(one.config), wanted, options) for one in plans[:compile_]]
  return sorted(done, key=lambda one: (not one.fits, one.reports[0].bound.seconds))


def sizes(config: ml_collections.ConfigDict, topology: Topology) -> dict[str, int]:
  """The sizes of the config's mesh on this topology; without asking for devices.

  Raises:
    MeshError: they do not multiply to the number of devices.
  """
  mesh = {axis: int(config.mesh[axis]) for axis in sharding.AXES}
  free = [axis for axis, size in mesh.items() if size == -1]
  fixed = math.prod(size for size in mesh.values() if size != -1)
  if len(free) == 1 and fixed and topology.size % fixed == 0:
    mesh[free[0]] = topology.size // fixed
  if math.prod(mesh.values()) != topology.size or min(mesh.values()) < 1:
    raise MeshError(f"mesh {mesh} does not multiply to the {topology.size} devices of {topology}; or use --search")
  return mesh


def _compiled(plan: Plan, job: Task, wanted: Sequence[str], options: Mapping[str, str] | None) -> Plan:
  devices = plan.topology.devices()
  mesh = sharding.make_mesh(plan.mesh, devices)
  done = []
  for name in wanted or programs.names(job):
    traced = programs.trace(name, job, mesh, plan.topology.generation)
    kinds = traced.arguments
    state = sum(kinds.get(kind, 0) for kind in ("params", "ema", "optimiser"))
    has_to = work.of(name, job, plan.mesh, state, plan.predicted.by_kind["activations"])
    done.append(compiled.compile_(traced, plan.topology, mesh, has_to, options))
  executables, reports = zip(*done, strict=True)
  return dataclasses.replace(plan, reports=reports, executables=executables)


def _on(config: ml_collections.ConfigDict, mesh: Mapping[str, int]) -> ml_collections.ConfigDict:
  other = ml_collections.ConfigDict(config.to_dict())
  other.mesh.update(mesh)
  return other


def _under(config: ml_collections.ConfigDict, remat: str) -> Task | None:
  """The task with another remat policy; None where it has none."""
  other = ml_collections.ConfigDict(config.to_dict())
  group = next((other[name] for name in ("video", "model") if name in other and "remat" in other[name]), None)
  if group is None:
    return None
  group.remat = remat
  return task.make(other)


def _gib(size: float) -> str:
  return f"{size / GIB:.2f}"


def _lines(report: Report) -> list[str]:
  bound = report.bound
  kinds = ", ".join(f"{kind} {_gib(size)}" for kind, size in report.by_kind.items() if size >= 2**23)
  verdict = "fits" if report.fits else "DOES NOT FIT"
  lines = [
    f"{report.name}: {verdict}, {_gib(report.hbm_bytes)} GiB a device of {_gib(report.hbm_available)} ({kinds})",
    f"  compiled in {report.compile_s:.0f} s",
    f"  at least {bound.seconds:.3f} s a call: "
    + ", ".join(f"{name} {seconds:.3f}" for name, seconds in bound.parts.items()),
  ]
  if report.host_bytes:
    lines.insert(1, f"  in the hosts' memory {_gib(report.host_bytes)} GiB a device")
  if report.flops is not None:
    lines.append(f"  {report.flops:.4g} FLOPs a step; MFU at most {bound.mfu:.1%}")
  for one in report.moved[:12]:
    place = "in blocks" if one.in_blocks else "outside"
    hidden = "hidden" if one.hidden else "exposed"
    lines.append(f"  {one.kind} over {' x '.join(one.axes) or 'nothing'}, {place}, {hidden}: {one.count} operations, "
                 f"{_gib(one.bytes)} GiB, {one.seconds * 1e3:.1f} ms")  # fmt: skip
  return lines
