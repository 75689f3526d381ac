"""Splits that were found before, by the content of the video and the method: each cost a whole decoding."""

import dataclasses
import fractions
import functools
import hashlib
import importlib.resources
import json
import pathlib

import numpy as np

import kling_jax
from kling_jax import files
from kling_jax.curation import split as split_lib
from kling_jax.data import container
from kling_jax.data.record import Transition


def split(path: str, content: str, method: str, limits: container.Limits, folder: pathlib.Path) -> split_lib.Split:
  """`split.split`, read from `folder` where the same content was split by the same method before; without statistics.

  Args:
    path: the video. content: its `record.content_hash`.
    method, limits: see `split.split`.
    folder: of the cache; may be shared by sets and machines.

  Raises:
    DataError: as `split.split`.
  """
  file = folder / f"{content[:32]}-{method}-{_version()}.npz"
  if file.exists():
    return dataclasses.replace(_load(file), video=path)
  found = split_lib.split(path, method, limits)
  with files.whole(file) as temporary:
    bare = dataclasses.replace(found, pts=np.zeros(0, np.int64), statistics={})
    meta = dataclasses.asdict(bare) | {"pts": [], "time_base": str(found.time_base)}
    np.savez(temporary, pts=found.pts, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8))
  return dataclasses.replace(found, statistics={})


@functools.cache
def _version() -> str:
  """What the methods are made of: this release and its weights."""
  weights = importlib.resources.files(kling_jax).joinpath("assets/shot_net/model.safetensors").read_bytes()
  return f"{kling_jax.__version__}-{hashlib.sha256(weights).hexdigest()[:8]}"


def _load(file: pathlib.Path) -> split_lib.Split:
  with np.load(file) as held:
    pts, meta = held["pts"], json.loads(held["meta"].tobytes())
  return split_lib.Split(
    **meta
    | {
      "pts": pts,
      "time_base": fractions.Fraction(meta["time_base"]),
      "transitions": tuple(Transition(**values) for values in meta["transitions"]),
      "shots": tuple(split_lib.Shot(**values) for values in meta["shots"]),
      "damage": tuple(meta["damage"]),
    }
  )
