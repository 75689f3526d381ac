"""Opens a clip source by what its name says or by what lies at the path."""

import os
import pathlib
import typing
import urllib.parse

from kling_jax import errors, stores
from kling_jax.data.source import ClipSource

# Sources are imported when one is opened: a world needs no Arrow, a table no TFDS.


def open_source(spec: str | os.PathLike[str] | dict[str, typing.Any]) -> ClipSource:
  """Opens a clip source.

  Args:
    spec: one of
      "worlds:shapes-v1?count=512&seed=0": a procedural world of single clips;
      "worlds:memory-v1?count=256&seed=0&clips=24": a procedural world of walks, `count` of `clips` clips each;
      "tfds:DIR": a TFDS data set of clips;
      FILE.csv, .jsonl, .parquet: a table of clips;
      FILE.tar: a WebDataset shard;
      DIR: a clip set of ours (clips.parquet, or its `records` folder), a TFDS data set, a folder of WebDataset shards
      (it holds .tar files), or a folder of videos;
      any of these as an address of an object store, such as s3://BUCKET/DIR or gs://BUCKET/DIR (`stores`);
      a dict {"source": one of the above, **arguments of the source's class}, for example
      {"source": "videos", "quarantine": "videos/quarantine.jsonl", "min_frames": 17}.

  Raises:
    UsageError: the name is of no kind, or has an option that its kind does not know.
    DataError: nothing is there, or it cannot be read.
  """
  options = dict(spec) if isinstance(spec, dict) else {}
  if isinstance(spec, dict) and "source" not in options:
    raise errors.UsageError(f"data source {spec!r}: a dict needs the key 'source'")
  name = os.fspath(options.pop("source")) if isinstance(spec, dict) else os.fspath(spec)
  kind, colon, rest = name.partition(":")
  try:
    if colon and kind == "worlds":
      return _world(rest, options)
    if colon and kind == "tfds":
      return _tfds(stores.here(rest), options)
    return _path(name, options)
  except TypeError as error:
    if options and "argument" in str(error):
      raise errors.UsageError(f"data source {name!r}: options {options!r}: {error}") from error
    raise


def _path(name: str, options: dict[str, typing.Any]) -> ClipSource:
  path = pathlib.Path(stores.here(name)).expanduser()
  if path.is_dir():
    if (path / "clips.parquet").exists() or any(path.glob("*.array_record")) or (path / "records").is_dir():
      from kling_jax.data.records import RecordSource

      return RecordSource(path, **options)
    # TFDS names its files *.array_record-00000-of-00001.
    if any(any(path.glob(f"{below}features.json")) for below in ("", "*/", "*/*/")):
      return _tfds(path, options)
    if any(path.glob("*.tar")):
      return _webdataset(path, options)  # it refuses folders that hold videos, too
    from kling_jax.data.folder import FolderSource

    return FolderSource(path, **options)
  from kling_jax.data import columns

  if path.is_file() and path.suffix.lower() in columns.SUFFIXES:
    from kling_jax.data.table import TableSource

    return TableSource(path, **options)
  if path.is_file() and path.suffix.lower() == ".tar":
    return _webdataset(path, options)
  kinds = f"a folder, a table ({', '.join(columns.SUFFIXES)}), a .tar, tfds:DIR or worlds:shapes-v1?count=512&seed=0"
  if path.exists():
    raise errors.UsageError(f"data source {name!r} is a file of another kind; name {kinds}")
  raise errors.DataError(f"data source {name!r} does not exist; name {kinds}")


def _webdataset(path: pathlib.Path, options: dict[str, typing.Any]) -> ClipSource:
  from kling_jax.data.webdataset import WebDatasetSource

  return WebDatasetSource(path, **options)


def _tfds(folder: str | pathlib.Path, options: dict[str, typing.Any]) -> ClipSource:
  from kling_jax.data.tfds_clips import TfdsSource

  return TfdsSource(folder, **options)


def _world(rest: str, options: dict[str, typing.Any]) -> ClipSource:
  from kling_jax.data import memory_world_frames, worlds

  name, _, query = rest.partition("?")
  walks = name == memory_world_frames.WORLD
  if not walks and name not in worlds.WORLDS:
    every = (*worlds.WORLDS, memory_world_frames.WORLD)
    raise errors.ConfigError(f"unknown procedural world {name!r}{errors.nearest(name, every)}")
  known = ("count", "seed", "clips") if walks else ("count", "seed")
  for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
    if key not in known:
      raise errors.UsageError(f"worlds:{rest}: unknown option {key!r}{errors.nearest(key, known)}")
    if not (value.isascii() and value.isdigit()):
      raise errors.UsageError(f"worlds:{rest}: {key} is {value!r}; give a whole number")
    options[key] = int(value)
  return memory_world_frames.MemoryWorld(**options) if walks else worlds.WorldSource(name, **options)
