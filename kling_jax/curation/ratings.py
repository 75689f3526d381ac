"""Ratings of clips by people: from raw scores to labels as in Koala-36M (appendix B), agreement, tables in and out.

A label file has a row a clip: clip_id, video_id, rating (the label) and raters (how many). Beside it lies a table of
the raw ratings: clip_id, video_id, rater, rating, at (seconds since 1970). Both as Parquet, or as CSV by suffix.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from kling_jax import files
from kling_jax.errors import DataError, UsageError, nearest

LOWEST, HIGHEST = 1, 5
SUFFIXES = (".parquet", ".csv")
LONGEST_NAME = 64  # characters of a rater's name
LISTED = 5  # offenders that a message names
_LABELS = pa.schema(
  [("clip_id", pa.string()), ("video_id", pa.string()), ("rating", pa.float64()), ("raters", pa.int64())]
)
_RAW = pa.schema(
  [("clip_id", pa.string()), ("video_id", pa.string()), ("rater", pa.string()), ("rating", pa.float64()),
   ("at", pa.float64())]
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rating:
  """One person's score of one clip, 1 (unfit for training) to 5 (ideal); `at` in seconds since 1970."""

  clip_id: str
  video_id: str
  rater: str
  rating: float
  at: float = 0.0


@dataclasses.dataclass(frozen=True)
class Labels:
  """What ratings say together.

  Attributes:
    table: clip_id, video_id, rating, raters; by clip_id.
    left_out: {rater: why their ratings count for nothing}.
    unlabelled: clips that only such raters scored.
  """

  table: pa.Table
  left_out: Mapping[str, str]
  unlabelled: tuple[str, ...]

  def warnings(self) -> list[str]:
    """A line for each rater who is left out, and one for the clips that this costs."""
    lines = [f"rater {name!r} is left out: {why}" for name, why in self.left_out.items()]
    if self.unlabelled:
      lines.append(f"{len(self.unlabelled)} clips have no label, for nobody else rated them: {_some(self.unlabelled)}")
    return lines


def labels(ratings: Iterable[Rating]) -> Labels:
  """The label of each clip.

  For rater e with mean mu_e and deviation sd_e over their ratings, and mu, sd over all ratings that count:

    y'_ev = (y_ev - mu_e) / sd_e * sd + mu,      label_v = mean of y'_ev over the raters e of clip v

  which takes away how strict a rater is and how widely they spread, and then averages what is left (Koala-36M,
  appendix B). Deviations are of the population (divided by n). Labels may lie a little outside 1 to 5.

  A rater with one rating, or with equal ones, has no deviation: they are left out of labels, mu and sd, and named.

  Raises:
    DataError: no ratings, or nobody whose ratings count.
  """
  by_rater: dict[str, list[Rating]] = {}
  for one in ratings:
    by_rater.setdefault(one.rater, []).append(one)
  if not by_rater:
    raise DataError("there are no ratings yet; `kling annotate --input SET --db FILE` collects them")
  left_out, counted = {}, {}
  for rater in sorted(by_rater):
    values = np.array([one.rating for one in by_rater[rater]], np.float64)
    if len(values) < 2:
      left_out[rater] = "a single rating tells nothing of how strict a rater is"
    elif values.min() == values.max():
      left_out[rater] = f"all {len(values)} ratings are {values[0]:g}"
    else:
      counted[rater] = values
  if not counted:
    raise DataError("no labels: " + "; ".join(f"rater {name!r}: {why}" for name, why in left_out.items()))
  everything = np.concatenate(list(counted.values()))
  mean, deviation = everything.mean(), everything.std()
  scaled: dict[str, list[float]] = {}
  videos: dict[str, str] = {}
  for rater, values in counted.items():
    for one, value in zip(by_rater[rater], (values - values.mean()) / values.std() * deviation + mean, strict=True):
      scaled.setdefault(one.clip_id, []).append(float(value))
      videos[one.clip_id] = one.video_id
  rows = [
    {"clip_id": clip, "video_id": videos[clip], "rating": math.fsum(scaled[clip]) / len(scaled[clip]),
     "raters": len(scaled[clip])}
    for clip in sorted(scaled)
  ]  # fmt: skip
  unlabelled = {one.clip_id for rater in left_out for one in by_rater[rater]} - set(scaled)
  return Labels(pa.Table.from_pylist(rows, _LABELS), left_out, tuple(sorted(unlabelled)))


def agreement(ratings: Iterable[tuple[str, float]]) -> float:
  """Krippendorff's alpha with the interval metric: 1 for full agreement, 0 for that of chance; NaN where undefined.

  alpha = 1 - Do / De with, over clips u of m_u >= 2 ratings and n = sum m_u (Krippendorff, Computing
  Krippendorff's Alpha-Reliability, 2011):

    Do = 1/n sum_u 1/(m_u - 1) sum_{i != j in u} (y_i - y_j)^2,    De = 1/(n (n - 1)) sum_{i != j} (y_i - y_j)^2

  It wants neither the same raters for all clips nor the same number. Undefined where no clip has two ratings, or all
  ratings are equal.

  Args:
    ratings: (clip, raw rating); a rater stands at most once in a clip.
  """
  units: dict[str, list[float]] = {}
  for clip, value in ratings:
    units.setdefault(clip, []).append(float(value))
  paired = [np.array(values) for values in units.values() if len(values) > 1]
  if not paired:
    return math.nan
  # sum_{i != j} (y_i - y_j)^2 = 2 m sum (y - mean)^2
  spread = lambda values: 2 * len(values) * float(((values - values.mean()) ** 2).sum())
  pooled = np.concatenate(paired)
  total = spread(pooled) / (len(pooled) * (len(pooled) - 1))
  if total == 0:
    return math.nan
  within = sum(spread(values) / (len(values) - 1) for values in paired) / len(pooled)
  return 1 - within / total


# ---- tables ----------------------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], ratings: Sequence[Rating]) -> tuple[Labels, pathlib.Path]:
  """Writes the labels to `path` and the raw ratings beside them; returns the labels and where the raw ones lie.

  Raises:
    UsageError: a suffix that is neither .parquet nor .csv. DataError: see `labels`.
  """
  path = pathlib.Path(path)
  if path.suffix.lower() not in SUFFIXES:
    raise UsageError(f"--export {path} must end in {' or '.join(SUFFIXES)}")
  found = labels(ratings)
  raw = path.with_name(f"{path.stem}_raw{path.suffix}")
  rows = sorted((dataclasses.asdict(one) for one in ratings), key=lambda row: (row["clip_id"], row["rater"]))
  _write(raw, pa.Table.from_pylist(rows, _RAW))
  _write(path, found.table)
  return found, raw


def _write(path: pathlib.Path, table: pa.Table) -> None:
  with files.whole(path) as temporary:
    if path.suffix.lower() == ".csv":
      pyarrow.csv.write_csv(table, temporary)
    else:
      pq.write_table(table, temporary)


def read(path: str | os.PathLike[str], videos: Mapping[str, str], skip_unknown: bool = False) -> list[Rating]:
  """Reads raw ratings: a table with the columns clip_id, rater and rating (a number from 1 to 5).

  Args:
    path: .csv or .parquet; further columns are ignored, but for `at`.
    videos: {clip_id: video_id} of the set. skip_unknown: leave out clips that it lacks.

  Raises:
    DataError: no such table, a value that is no rating, a pair of rater and clip that stands twice, or unknown clips.
      It names the rows; nothing is returned of a file with an error.
  """
  path = pathlib.Path(path)
  rows = _table(path).to_pylist()
  found: list[Rating] = []
  seen: set[tuple[str, str]] = set()
  unknown: list[str] = []
  for number, row in enumerate(rows, 2):  # as a text editor counts, below the header
    where = f"{path} row {number}"
    clip, rater = row["clip_id"] or "", name_of(row["rater"] or "", where)
    value = row["rating"]
    if value is None or not LOWEST <= value <= HIGHEST:  # also NaN
      raise DataError(f"{where}: the rating of clip {clip!r} is {value}; legal are numbers from {LOWEST} to {HIGHEST}")
    if (rater, clip) in seen:
      raise DataError(f"{where}: {rater!r} rated clip {clip!r} in an earlier row already; leave one of the two")
    seen.add((rater, clip))
    if clip not in videos:
      unknown.append(clip)
      continue
    found.append(Rating(clip, videos[clip], rater, float(value), float(row["at"] or 0.0)))
  if unknown and not skip_unknown:
    raise DataError(
      f"{path}: {len(unknown)} of {len(rows)} ratings are of clips that the set does not have: {_some(unknown)}; "
      "give the set that was rated, or --skip_unknown to leave them out"
    )
  if not found:
    raise DataError(f"{path} holds no rating of a clip of the set")
  return found


def _table(path: pathlib.Path) -> pa.Table:
  if path.suffix.lower() not in SUFFIXES:
    raise UsageError(f"{path} must end in {' or '.join(SUFFIXES)}")
  try:
    if path.suffix.lower() == ".csv":
      # Names such as "NA" are names; ids of digits alone keep their zeros.
      options = pyarrow.csv.ConvertOptions(
        column_types=dict(zip(_RAW.names, _RAW.types, strict=True)), strings_can_be_null=False, null_values=["", "NA"]
      )
      table = pyarrow.csv.read_csv(path, convert_options=options)
    else:
      table = pq.read_table(path)
    for name in ("clip_id", "rater", "rating"):
      if name not in table.schema.names:
        raise DataError(f"{path} has no column {name!r}{nearest(name, table.schema.names)}")
    if "at" not in table.schema.names:
      table = table.append_column("at", pa.nulls(len(table), pa.float64()))
    wanted = pa.schema([_RAW.field(name) for name in ("clip_id", "rater", "rating", "at")])
    return table.select(wanted.names).cast(wanted)
  except (pa.ArrowException, OSError, ValueError) as error:
    line = " ".join(str(error).split())[:300]
    raise DataError(f"{path} cannot be read as a table of ratings: {line}") from error


def name_of(text: str, where: str) -> str:
  """A rater's name: 1 to 64 printable characters, without spaces at its ends.

  Raises:
    DataError: it is not one.
  """
  name = text.strip()
  if not name or len(name) > LONGEST_NAME or not name.isprintable():
    raise DataError(f"{where}: a rater's name has 1 to {LONGEST_NAME} printable characters, not {text[:80]!r}")
  return name


def _some(names: Sequence[str]) -> str:
  distinct = sorted(set(names))
  return ", ".join(map(repr, distinct[:LISTED])) + (
    f" and {len(distinct) - LISTED} more" if len(distinct) > LISTED else ""
  )
