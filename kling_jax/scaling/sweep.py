"""Sweep files: Python files with `get_config()` and `sweep()`, and the runs that they ask for.

`sweep()` yields one dict a run: config keys by their dotted names, and keys of the sweep itself:

  sweep.arm     name of the arm, "tuned" if left out; a run that several arms ask for is run once
  sweep.split   "fit" (default), or "holdout" for runs that no law may see

A `sweep(points)` that takes an argument is asked again whenever runs have finished, with what the ledger then holds
(see `points.points`): it can put runs where a law that was fitted to the first ones says. It must yield the earlier
runs again, and the same ones for the same points.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import pathlib
import types
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from kling_jax import config as config_lib
from kling_jax.errors import ConfigError, nearest
from kling_jax.train.defaults import RECIPE

SPLITS = ("fit", "holdout")
OWN = ("sweep.arm", "sweep.split")
# Keys that change how a run is done and not what it learns; they are no part of a run's id.
HOW = ("mesh", "log", "checkpoint", "data.threads", "data.workers", "data.memory_gib")
# Of paths only the last name counts.
PATHS = (
  "data.sources", "data.validation_sources", "data.captions", "data.shots", "codec.weights", "text.weights",
  "init_from",
)  # fmt: skip
# Keys that runs of one compiled program may differ in.
ARGUMENTS = ("optimizer.lr", "seed", "steps", "validation", "data.sources", "data.validation_sources")


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a sweep.

  Attributes:
    id: hash of what the run learns: how its config differs from the task's, without `HOW`, and the trainer's `RECIPE`.
    config: complete and checked. overrides: what the sweep changed.
    arms: who asked for it. split: "fit" or "holdout".
    program: equal for runs that share compiled programs.
  """

  id: str
  config: ml_collections.ConfigDict
  overrides: Mapping[str, Any]
  arms: tuple[str, ...]
  split: str
  program: str


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A loaded sweep file."""

  path: pathlib.Path
  module: types.ModuleType
  _made: dict[str, Run] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def _base(self) -> ml_collections.ConfigDict:
    return self.module.get_config()

  @functools.cached_property
  def _schema(self) -> ml_collections.ConfigDict:
    return _reference(self._base.task)

  @property
  def adaptive(self) -> bool:
    """Whether later runs depend on the results of earlier ones."""
    return bool(inspect.signature(self.module.sweep).parameters)

  def runs(self, points: Iterable[Mapping[str, Any]] = ()) -> list[Run]:
    """The runs that the file asks for, each once, in its order.

    Raises:
      ConfigError: an unknown key, a wrong type, a hold-out that is also a fitting run, or no runs.
    """
    found: dict[str, Run] = {}
    asked = self.module.sweep(list(points)) if self.adaptive else self.module.sweep()
    for number, overrides in enumerate(asked, 1):
      key = json.dumps(overrides, sort_keys=True, default=str)
      if key not in self._made:
        self._made[key] = make(self._base, self._schema, overrides, f"{self.path}, run {number}")
      run = self._made[key]
      known = found.get(run.id)
      if known is not None and known.split != run.split:
        raise ConfigError(f"{self.path}, run {number}: the same run is asked for as {known.split} and as {run.split}")
      if known is not None:
        run = dataclasses.replace(known, arms=tuple(dict.fromkeys(known.arms + run.arms)))
      found[run.id] = run
    if not found:
      raise ConfigError(f"{self.path}: sweep() yields no runs")
    return list(found.values())


def load(path: str) -> Sweep:
  """Loads a sweep file: as given, or by its name among the packaged ones (`configs/sweeps/`, `configs/`).

  Raises:
    ConfigError: no such file, or it lacks `get_config` or `sweep`.
  """
  given = pathlib.Path(path)
  packaged = config_lib.packaged_folder()
  name = given.with_suffix(".py").name
  file = next((p for p in (given, packaged / "sweeps" / name, packaged / name) if p.is_file()), None)
  if file is None:
    known = [p.stem for p in (packaged / "sweeps").glob("*.py") if not p.stem.startswith("_")]
    raise ConfigError(f"no sweep file at {path}{nearest(given.stem, known)}")
  spec = importlib.util.spec_from_file_location(f"kling_jax_sweep_{file.stem}", file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for name in ("get_config", "sweep"):
    if not callable(getattr(module, name, None)):
      raise ConfigError(f"{file} has no {name}(); a sweep file defines get_config() and sweep()")
  return Sweep(file, module)


def make(
  base: ml_collections.ConfigDict, schema: ml_collections.ConfigDict, overrides: Mapping[str, Any], where: str
) -> Run:
  """One run from the base config and the dict that a sweep yielded; `where` stands in messages."""
  own = {key: value for key, value in overrides.items() if key.startswith("sweep.")}
  for key in own:
    if key not in OWN:
      raise ConfigError(f"{where}: key {key!r} is unknown{nearest(key, OWN)}")
  changes = {key: value for key, value in overrides.items() if key not in own}
  split = own.get("sweep.split", "fit")
  if split not in SPLITS:
    raise ConfigError(f"{where}: sweep.split is {split!r}; legal: {', '.join(SPLITS)}")
  known = config_lib.known_keys(base)
  for key in changes:
    if key not in known:
      raise ConfigError(f"{where}: config key {key!r} is unknown{nearest(key, known)}")
  c = base.copy_and_resolve_references()
  try:
    c.update_from_flattened_dict(changes)
  except TypeError as error:
    raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error
  config_lib.check(c, schema)
  return Run(
    id=run_id(c),
    config=c,
    overrides=changes,
    arms=(str(own.get("sweep.arm", "tuned")),),
    split=split,
    program=_hash(_without(config_lib.plain(c), (*HOW, *ARGUMENTS))),
  )


def run_id(config: ml_collections.ConfigDict) -> str:
  """Twelve hexadecimal digits over what the run learns; the same on every machine and in every folder.

  Only what differs from the task's reference config is hashed: a new key of a later version, at its default, leaves
  the ids of a sweep alone.
  """
  values = _flat(_without(config_lib.plain(config), HOW))
  usual = _flat(_without(config_lib.plain(_reference(config.task)), HOW))
  for key in PATHS:
    if values.get(key):
      given = values[key]
      values[key] = [_last_name(spec) for spec in given] if isinstance(given, list) else _last_name(given)
  changed = {key: value for key, value in values.items() if key not in usual or usual[key] != value}
  return _hash({"recipe": RECIPE, "task": config.task, "config": changed})


@functools.cache
def _reference(task: str) -> ml_collections.ConfigDict:
  return config_lib.reference(task)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in values.items():
    flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return flat


def _last_name(spec: Any) -> Any:
  """A folder or file without where it lies; worlds and other named sources as they are."""
  if not isinstance(spec, str) or spec.startswith("worlds:"):
    return spec
  kind, colon, rest = spec.rpartition(":")
  return kind + colon + pathlib.PurePath(rest).name


def _without(values: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
  kept = json.loads(json.dumps(values))
  for key in keys:
    group, _, name = key.rpartition(".")
    (kept.get(group, {}) if group else kept).pop(name, None)
  return kept


def _hash(values: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
