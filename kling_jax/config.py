"""Configs are Python files with `get_config(arg="") -> ConfigDict`: loading, overriding, checking, comparing."""

import importlib.util
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from kling_jax.errors import ConfigError, nearest

ROOT = pathlib.Path(__file__).parent


def parse_arg(arg: str, **defaults: Any) -> ml_collections.ConfigDict:
  """Parses the part after the colon of `file.py:size=B,runlocal` into typed values.

  Args:
    arg: comma-separated `key=value`; a bare `key` means True.
    **defaults: the legal keys; a value is read in the type of its default.

  Raises:
    ConfigError: unknown key, or a value of another type.
  """
  values = dict(defaults)
  for item in filter(None, arg.split(",")):
    key, has_value, text = item.partition("=")
    if key not in defaults:
      raise ConfigError(f"config argument {key!r} is unknown{nearest(key, defaults)}")
    kind = type(defaults[key])
    try:
      values[key] = _read_bool(text if has_value else "true") if kind is bool else kind(text)
    except ValueError as error:
      raise ConfigError(f"config argument {key}={text!r} is not of type {kind.__name__}") from error
  return ml_collections.ConfigDict(values)


def _read_bool(text: str) -> bool:
  if text.lower() not in ("true", "false", "1", "0"):
    raise ValueError(text)
  return text.lower() in ("true", "1")


def locate(path: str) -> pathlib.Path:
  """Finds a config file: as given, else among the packaged configs (`video_dit` or `configs/video_dit.py`)."""
  given = pathlib.Path(path)
  packaged = packaged_folder()
  for candidate in (given, packaged / given.with_suffix(".py").name, packaged.parent / given):
    if candidate.is_file():
      return candidate
  known = [file.stem for file in packaged.glob("*.py") if not file.stem.startswith("_")]
  raise ConfigError(f"no config file at {path}{nearest(given.stem, known)}")


def packaged_folder() -> pathlib.Path:
  """Where the packaged configs lie: `configs/` of a checkout, `kling_jax/configs/` of a wheel."""
  spec = importlib.util.find_spec("kling_jax.configs")
  if spec is None or not spec.submodule_search_locations:
    return ROOT.parent / "configs"
  return pathlib.Path(next(iter(spec.submodule_search_locations)))


def load(spec: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
  """Loads `path/to/config.py:args` and applies `--config.key=value` overrides with the types of the file.

  Raises:
    ConfigError: the file is missing or has no `get_config`; an override names an unknown key or has another type.
  """
  path, _, arg = spec.partition(":")
  file = locate(path)
  arguments = [f"--config={file}" + (f":{arg}" if arg else ""), *overrides]
  for override in overrides:
    if not override.startswith("--config.") or "=" not in override:
      raise ConfigError(f"override {override!r} is not of the form --config.key=value")
  try:
    known = known_keys(_parse(arguments[:1]))
    for override in overrides:
      key = override.removeprefix("--config.").partition("=")[0]
      if key not in known:
        raise ConfigError(f"config key {key!r} is unknown{nearest(key, known)}")
    return _parse(arguments)
  except (flags.Error, TypeError, ValueError, AttributeError) as error:
    raise ConfigError(f"config {spec}: {str(error).splitlines()[0]}") from error


def _parse(arguments: Sequence[str]) -> ml_collections.ConfigDict:
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["kling", *arguments])
  values(["kling", *arguments])
  return values.config


def known_keys(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
  """The dotted names of all leaves of a config."""
  names: list[str] = []
  for key in config:
    value = config[key]
    group = isinstance(value, ml_collections.ConfigDict)
    names += known_keys(value, f"{prefix}{key}.") if group else [prefix + key]
  return names


def reference(name: str) -> ml_collections.ConfigDict:
  """`get_config()` of the packaged config `name`; it is the schema of every config of the same task."""
  file = locate(name)
  spec = importlib.util.spec_from_file_location(f"kling_jax_config_{name}", file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module.get_config()


def check(config: ml_collections.ConfigDict, schema: ml_collections.ConfigDict, prefix: str = "") -> None:
  """Refuses keys and types that the schema does not have.

  Args:
    config: the config to run.
    schema: a config of the same task whose keys and value types are legal; None or a placeholder takes any type.

  Raises:
    ConfigError: names the key and the nearest legal one, or the two types.
  """
  for key in config:
    name = prefix + key
    if key not in schema:
      raise ConfigError(f"config key {name!r} is unknown{nearest(key, list(schema))}")
    given, legal = config[key], schema[key]
    if isinstance(legal, ml_collections.ConfigDict):
      if not isinstance(given, ml_collections.ConfigDict):
        raise ConfigError(f"config key {name!r} must be a group of keys, not {given!r}")
      check(given, legal, name + ".")
    elif given is not None and legal is not None and not _same_kind(given, legal):
      raise ConfigError(f"config key {name!r} must be {type(legal).__name__}, not {type(given).__name__} {given!r}")
  missing = [prefix + key for key in schema if key not in config]
  if missing:
    raise ConfigError(f"config lacks {', '.join(map(repr, missing))}; start from the packaged config of its task")


def _same_kind(given: Any, legal: Any) -> bool:
  if isinstance(legal, bool) or isinstance(given, bool):
    return isinstance(legal, bool) and isinstance(given, bool)
  if isinstance(legal, float):
    return isinstance(given, (int, float))
  if isinstance(legal, (tuple, list)):
    return isinstance(given, (tuple, list))
  return isinstance(given, type(legal))


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as JSON-ready values (tuples become lists)."""

  def as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
      return {key: as_json(item) for key, item in value.items()}
    return [as_json(item) for item in value] if isinstance(value, (tuple, list)) else value

  return as_json(config.to_dict())


def restore(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """The inverse of `plain`: lists become tuples again, so that configs stay hashable by parts."""

  def as_config(value: Any) -> Any:
    if isinstance(value, Mapping):
      return {key: as_config(item) for key, item in value.items()}
    return tuple(as_config(item) for item in value) if isinstance(value, list) else value

  return ml_collections.ConfigDict(as_config(values))


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
  """Dotted keys whose values differ between two plain configs, as "key: old -> new"."""
  lines: list[str] = []
  for key in sorted(set(old) | set(new)):
    before, after = old.get(key), new.get(key)
    if isinstance(before, Mapping) and isinstance(after, Mapping):
      lines += difference(before, after, f"{prefix}{key}.")
    elif before != after:
      lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
  return lines
