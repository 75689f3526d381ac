"""Rated clips: a table of ratings beside a clip set, checked; the inputs of each clip; splits by source video."""

import csv
import dataclasses
import hashlib
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow.parquet as pq

from kling_jax.data import records
from kling_jax.data.source import Score
from kling_jax.errors import DataError
from kling_jax.measure import sample as sample_lib
from kling_jax.measure import vtss
from kling_jax.measure.fragments import Plan
from kling_jax.measure.vtss import Feature

LEAST, MOST = -1.0, 7.0  # of ratings: averages of rescaled votes may leave 1 to 5
GOOD = 4.0  # ratings from which clips are what is usual
ORIGINAL = "original"


@dataclasses.dataclass(frozen=True)
class Rated:
  """A clip with its rating.

  Attributes:
    clip: its number in the set. clip_id, video_id, rating: as the table has them.
    reference, degradation, strength: of weak labels; "", "" and 0 for ratings by people.
  """

  clip: int
  clip_id: str
  video_id: str
  rating: float
  reference: str = ""
  degradation: str = ""
  strength: int = 0


def read(table: str | os.PathLike[str], source: records.RecordSource) -> list[Rated]:
  """The rated clips of a set, in the order of the table.

  Args:
    table: .parquet or .csv with the columns clip_id, video_id (optional), rating; weak labels also have reference,
      degradation and strength.
    source: the set.

  Raises:
    DataError: no such table or columns, a rating that is no number of 1 to 5 (averages of rescaled votes may lie up to
      2 beyond), a clip rated twice, ratings of clips that are not in the set, or all ratings alike.
  """
  rows = _rows(pathlib.Path(table))
  places = {source.info(index).clip_id: index for index in range(len(source))}
  found, unknown, seen = [], [], set()
  for number, row in enumerate(rows):
    name, rating = str(row["clip_id"]), _rating(table, number, row["rating"])
    if name in seen:
      raise DataError(f"{table}: clip {name} is rated twice; export one averaged rating a clip")
    seen.add(name)
    if name not in places:
      unknown.append(name)
      continue
    video = source.info(places[name]).video_id
    clip = Rated(places[name], name, str(row.get("video_id") or video), rating)
    if "reference" in row:
      clip = dataclasses.replace(
        clip, reference=str(row["reference"]), degradation=str(row["degradation"]), strength=int(row["strength"])
      )
    found.append(clip)
  if unknown:
    raise DataError(
      f"{table}: {len(unknown)} of {len(rows)} rated clips are not in the set, first {unknown[0]}; give the set that "
      "was rated (clips that `select` dropped are in it too)"
    )
  if len({row.rating for row in found}) < 2:
    raise DataError(f"{table}: {len(found)} clips, all rated alike: there is nothing to learn")
  return found


def _rows(path: pathlib.Path) -> list[dict]:
  try:
    if path.suffix == ".csv":
      with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    else:
      rows = pq.read_table(path).to_pylist()
  except (OSError, ValueError) as error:
    raise DataError(
      f"{path} is no table of ratings ({error}); wants .parquet or .csv as `kling annotate` exports"
    ) from error
  if not rows:
    raise DataError(f"{path} holds no ratings")
  lost = [name for name in ("clip_id", "rating") if name not in rows[0]]
  if lost:
    raise DataError(f"{path} lacks the columns {', '.join(lost)}; it has {', '.join(map(str, rows[0]))}")
  return rows


def _rating(table: str | os.PathLike[str], number: int, value: object) -> float:
  try:
    rating = float(value)  # type: ignore[arg-type]
  except (TypeError, ValueError):
    rating = math.nan
  if not LEAST <= rating <= MOST:
    raise DataError(f"{table}: row {number} has rating {value!r}; wants a number from 1 to 5")
  return rating


def fold(video_id: str, folds: int) -> int:
  """The part of a k-fold split that a source video belongs to: all of its clips go together, in every run alike."""
  return int.from_bytes(hashlib.sha256(video_id.encode()).digest()[:8], "big") % folds


def features(names: Sequence[str], rows: Sequence[Rated], source: records.RecordSource) -> tuple[Feature, ...]:
  """Each sub-metric with its quantiles over the rated clips.

  Raises:
    DataError: a sub-metric that no clip has, or that two scorers or versions measured.
  """
  found = []
  infos = [source.info(row.clip) for row in rows]
  for name in names:
    scores = [info.scores[name] for info in infos if name in info.scores]
    makers = {(score.scorer, score.version) for score in scores}
    if len(makers) != 1:
      which = ", ".join(sorted(f"{scorer} {version}" for scorer, version in makers)) or "nobody"
      raise DataError(f"sub-metric {name!r} was measured by {which}; run `kling score` on the set, or leave it out")
    (maker,) = makers
    values = [score.value for score in scores]
    low, high = np.quantile(values, [0.01, 0.99])
    if high - low < 1e-9:  # a share that hardly any clip has
      low, high = min(values), max(values)
    good = [i.scores[name].value for i, row in zip(infos, rows, strict=True) if row.rating >= GOOD and name in i.scores]
    found.append(Feature(name, *maker, float(low), float(high), float(np.median(good or values))))
  return tuple(found)


def values(wanted: Sequence[Feature], scores: dict[str, Score]) -> np.ndarray:
  """(M,) sub-metrics in 0..1, NaN where missing."""
  return np.array([feature.value(scores) for feature in wanted], np.float32)


def pictures(media: bytes, plan: Plan, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Fragments and picture of a clip, uint8."""
  seen = sample_lib.of_media(media, (plan, seed))
  assert seen.mosaics_QTHWC is not None
  return seen.mosaics_QTHWC, vtss.picture_of(seen, plan)
