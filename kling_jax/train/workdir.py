"""A work directory belongs to one config: claimed at the first start, checked at each later one."""

import fnmatch
import json
import pathlib

import ml_collections

from kling_jax import config as config_lib
from kling_jax import files
from kling_jax.errors import ConfigError, UsageError
from kling_jax.train import defaults

# Keys that do not change what is learned, so a run may be resumed under other values.
FREE = (
  "mesh.*",
  "optimizer.offload",
  "attention.*",
  "log.*",
  "checkpoint.*",
  "validation.every",
  "validation.samples",
  "data.threads",
  "data.workers",
)


def is_one(folder: pathlib.Path) -> bool:
  """Whether `folder` is a work directory."""
  return (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()


def claim(workdir: pathlib.Path, config: ml_collections.ConfigDict, write: bool = True) -> None:
  """Writes `config.json`, or compares with the one that is there.

  Every process of a job compares, so that all of them refuse; one of them, with `write`, writes.

  A longer or shorter run under a constant learning rate is the same run; under a schedule that ends it is not.

  Raises:
    ConfigError: the directory was used with another config; lists the differences.
  """
  path = workdir / "config.json"
  new = config_lib.plain(config)
  if path.exists():
    free = FREE + (("steps",) if config.optimizer.schedule == "constant" else ())
    lines = [
      line
      for line in config_lib.difference(json.loads(path.read_text(encoding="utf-8")), new)
      if not any(fnmatch.fnmatchcase(line.partition(":")[0], pattern) for pattern in free)
    ]
    if lines:
      raise ConfigError(f"{workdir} was used with another config ({'; '.join(lines)}); use a new --workdir")
  if write:
    files.write_json(path, new)


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The resolved config of a work directory.

  The trainer's keys that change nothing of what is learned, and came after the run was made, have their defaults.

  Raises:
    UsageError: there is none.
  """
  path = workdir / "config.json"
  if not path.exists():
    raise UsageError(f"{workdir} is no work directory: it has no config.json (train first, or check --workdir)")
  config = config_lib.restore(json.loads(path.read_text(encoding="utf-8")))
  known = defaults.trainer()
  for key in config_lib.known_keys(known):
    group, _, name = key.rpartition(".")
    if any(fnmatch.fnmatchcase(key, pattern) for pattern in FREE) and group in config and name not in config[group]:
      config[group][name] = known[group][name]
  return config
