"""The clips of a run: one or more sources, opened by name, mixed by weight and split into training and validation."""

import dataclasses
import functools
import hashlib
import logging
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from kling_jax import stores
from kling_jax.data.memory import remembered
from kling_jax.data.open import open_source
from kling_jax.data.source import ClipInfo, ClipSource
from kling_jax.errors import ConfigError

log = logging.getLogger(__name__)

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Sources end to end: clip number n of the mixture is clip n - (clips of the sources before) of its source.

  Attributes:
    sources: the sources, in the order of the config.
    weights: part of the rows drawn from each source, any sum; empty = by their numbers of clips.
    folders: where each source keeps conditions.json and caches; None for those without a folder.
  """

  sources: tuple[ClipSource, ...]
  weights: tuple[float, ...] = ()
  folders: tuple[pathlib.Path | None, ...] = ()

  def __post_init__(self) -> None:
    if not self.sources:
      raise ConfigError("data.sources is empty; name at least one folder, table, clip set or world")
    if not self.folders:
      object.__setattr__(self, "folders", (None,) * len(self.sources))
    if self.weights and (len(self.weights) != len(self.sources) or min(self.weights) <= 0):
      raise ConfigError(
        f"data.weights has {len(self.weights)} values {tuple(self.weights)} for {len(self.sources)} sources; give one "
        "above 0 for each source, or none (a source without weight is left out of data.sources)"
      )

  @staticmethod
  def open(specs: Sequence[str], weights: Sequence[float] = (), memory_gib: float = 0.0) -> "Mixture":
    """Opens sources by name (see `data.open.open_source`), behind a memory of decoded frames where one is asked for.

    Raises:
      ConfigError: no sources, or weights that do not match.
      UsageError: an unknown kind of source.
      DataError: a source that cannot be read.
    """
    share = int(memory_gib * 2**30) // max(len(specs), 1)
    opened = (remembered(spec, share) if share else open_source(spec) for spec in specs)
    return Mixture(tuple(opened), tuple(weights), tuple(map(home, specs)))

  @functools.cached_property
  def starts(self) -> np.ndarray:
    """Number of each source's first clip, and the number of all clips (int64, sources + 1)."""
    return np.cumsum([0] + [len(source) for source in self.sources])

  def __len__(self) -> int:
    return int(self.starts[-1])

  @property
  def fingerprint(self) -> str:
    """Hash of the sources' fingerprints, in order."""
    return hashlib.sha256("/".join(source.fingerprint for source in self.sources).encode()).hexdigest()[:16]

  def source_of(self, numbers: np.ndarray) -> np.ndarray:
    """The source of each clip number."""
    return np.searchsorted(self.starts, numbers, side="right") - 1

  def find(self, number: int) -> tuple[int, int]:
    """(source, clip in it) of clip `number`."""
    source = int(self.source_of(np.asarray(number)))
    return source, number - int(self.starts[source])

  def info(self, number: int) -> ClipInfo:
    source, index = self.find(number)
    return self.sources[source].info(index)

  def infos(self) -> Iterator[ClipInfo]:
    """The headers of all clips, in order of their numbers."""
    for source in self.sources:
      for index in range(len(source)):
        yield source.info(index)

  def frames(self, number: int, times_s: np.ndarray, height: int, width: int) -> np.ndarray:
    """See `ClipSource.frames`."""
    source, index = self.find(number)
    return self.sources[source].frames(index, times_s, height, width)


def held_out(videos: Iterable[str], fraction: float) -> frozenset[str]:
  """The videos of the validation split: those whose hash, read as a number in [0, 1), lies below `fraction`.

  A video keeps its side when others come or go, and its clips never straddle the two. In small sets where the rule
  would give all or nothing, the videos of smallest or largest hash fill the empty side. Of a single video nothing is
  held out, with a warning.

  Raises:
    ConfigError: `fraction` is not in [0, 1).
  """
  if not 0 <= fraction < 1:
    raise ConfigError(f"validation_fraction is {fraction}; legal: 0 (nothing held out) up to below 1")
  if fraction == 0:
    return frozenset()
  place = {video: _hash(video) for video in set(videos)}
  if len(place) < 2:
    log.warning("the set has one video: all of it is trained on, and there is no validation split")
    return frozenset()
  ordered = sorted(place, key=lambda video: place[video])
  count = sum(value < fraction for value in place.values())
  return frozenset(ordered[: min(max(count, 1), len(ordered) - 1)])


def _hash(video: str) -> float:
  digest = hashlib.blake2b(video.encode("utf-8", errors="surrogateescape"), digest_size=8).digest()
  return int.from_bytes(digest, "big") / 2**64


def video_of(info: ClipInfo) -> str:
  """The video of a clip; a clip without one stands for itself."""
  return info.video_id or info.clip_id


def home(spec: str) -> pathlib.Path | None:
  """The folder beside which the source `spec` keeps conditions.json and caches; None for a procedural world."""
  kind, colon, rest = spec.partition(":")
  if colon and kind == "worlds":
    return None
  path = pathlib.Path(stores.here(rest if colon and kind == "tfds" else spec)).expanduser()
  return path.parent if path.is_file() or path.name == "records" else path


def rates(clips: Sequence[int], sources: Sequence[int], weights: Sequence[float]) -> list[float]:
  """Rows drawn from each (bucket's part of a) source, relative to the others.

  Args:
    clips: clips of each source within the bucket.
    sources: clips of each source in all buckets.
    weights: as in `Mixture`; empty = by clips.
  """
  if not weights:
    return [float(count) for count in clips]
  total = math.fsum(weights)
  return [
    weight / total * (count / whole if whole else 0.0)
    for count, whole, weight in zip(clips, sources, weights, strict=True)
  ]
