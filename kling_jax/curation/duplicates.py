"""Pairs of duplicate clips beside a set (duplicates.parquet), and which clip of them stays."""

import collections
import dataclasses
import json
import os
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kling_jax import files
from kling_jax.curation import rules
from kling_jax.curation.clip_columns import ClipColumns
from kling_jax.errors import DataError, UsageError

FILE = "duplicates.parquet"
PREFER = ("width * height", "clarity", "vtss", "duration_s")
LEAST_SHARE = 0.6  # of a clip that must be in another one before it is dropped for it

SCHEMA = pa.schema(
  [
    ("clip_id", pa.string()),
    ("other", pa.string()),
    ("other_set", pa.string()),  # "" for this set
    ("kind", pa.string()),  # exact, near or embedding
    ("similarity", pa.float64()),
    ("offset_s", pa.float64()),  # time in `other` minus time in the clip, of the same picture
    ("share", pa.float64()),  # of the clip that the other one shows, 0 to 1
    ("other_share", pa.float64()),  # of the other one
  ]
)
_METADATA = b"kling_duplicates"


@dataclasses.dataclass(frozen=True)
class Pairs:
  """What `dedup` found.

  Attributes:
    table: of `SCHEMA`; a pair within the set stands there once.
    stated: how the pairs were found, for people.
    prefer: expressions over columns, the most important first; larger is better, a missing value is worst.
  """

  table: pa.Table
  stated: str
  prefer: tuple[str, ...] = PREFER

  def __post_init__(self) -> None:
    for text in self.prefer:
      rules.parse_value(text)

  def __len__(self) -> int:
    return len(self.table)

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes duplicates.parquet beside a set, whole or not at all."""
    values = json.dumps({"stated": self.stated, "prefer": list(self.prefer)}).encode()
    with files.whole(pathlib.Path(folder) / FILE) as temporary:
      pq.write_table(self.table.cast(SCHEMA).replace_schema_metadata({_METADATA: values}), temporary)

  def clusters(self, ids: list[str]) -> list[list[str]]:
    """The connected groups of clips of this set (union-find over pairs), the largest first; singles are left out."""
    parent = list(range(len(ids)))
    row = {name: number for number, name in enumerate(ids)}

    def root(k: int) -> int:
      while parent[k] != k:
        parent[k] = parent[parent[k]]
        k = parent[k]
      return k

    for name, other, where in zip(*(self.table[c].to_pylist() for c in ("clip_id", "other", "other_set")), strict=True):
      if not where and name in row and other in row:
        first, second = sorted((root(row[name]), root(row[other])))
        parent[second] = first
    groups: dict[int, list[str]] = collections.defaultdict(list)
    for number in {
      row[name] for column in ("clip_id", "other") for name in self.table[column].to_pylist() if name in row
    }:
      groups[root(number)].append(ids[number])
    return sorted((sorted(group) for group in groups.values() if len(group) > 1), key=lambda g: (-len(g), g))

  def resolve(self, left: np.ndarray, columns: ClipColumns, ids: list[str]) -> dict[int, str]:
    """Which of the clips that are left go, and for which one each.

    The best clip stays, then the best of those that are no copy of one that stays, and so on: every clip that goes is
    itself a copy of one that stays, and LEAST_SHARE of it is in there. A copy in another set always stays.

    Args:
      left: (N,) bool. columns, ids: the table's.

    Returns:
      {row: clip_id of the copy that stays, "SET:clip_id" where it is in another set}.
    """
    row = {name: number for number, name in enumerate(ids)}
    near: dict[int, list[int]] = collections.defaultdict(list)
    gone: dict[int, str] = {}
    for pair in self.table.to_pylist():
      mine, other = row.get(pair["clip_id"]), row.get(pair["other"])
      if pair["other_set"]:
        if mine is not None and left[mine] and pair["share"] >= LEAST_SHARE:
          gone.setdefault(mine, f"{pair['other_set']}:{pair['other']}")
        continue
      if mine is None or other is None or not (left[mine] and left[other]):
        continue
      if pair["share"] >= LEAST_SHARE:
        near[mine].append(other)
      if pair["other_share"] >= LEAST_SHARE:
        near[other].append(mine)
    members = sorted({*near, *(other for others in near.values() for other in others)})
    stays = set()
    for number in _best_first(members, self.prefer, columns, ids):
      if number in gone:
        continue
      copy = next((other for other in near[number] if other in stays), None)
      if copy is None:
        stays.add(number)
      else:
        gone[number] = ids[copy]
    return gone


def _best_first(members: list[int], prefer: tuple[str, ...], columns: ClipColumns, ids: list[str]) -> list[int]:
  keys = []
  evaluator = rules.Evaluator(columns)
  for text in prefer:
    tree = rules.parse_value(text)
    if not all(columns.has(name) for name in rules.names(tree)):
      continue
    value = evaluator.value(tree)
    if value.kind != "number":
      raise UsageError(f"the best clip is told by numbers, and {text!r} is none")
    keys.append(np.where(np.broadcast_to(value.known, (len(columns),)), value.values, -np.inf))
  return sorted(members, key=lambda number: (*(-key[number] for key in keys), ids[number]))


def load(folder: str | os.PathLike[str]) -> Pairs | None:
  """The pairs beside a set; None where nobody looked for duplicates.

  Raises:
    DataError: duplicates.parquet is damaged.
  """
  path = pathlib.Path(folder) / FILE
  if not path.exists():
    return None
  try:
    table = pq.read_table(path)
    values = json.loads(table.schema.metadata[_METADATA])
    return Pairs(table.select(SCHEMA.names).cast(SCHEMA), values["stated"], tuple(values["prefer"]))
  except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
    raise DataError(f"{path} is damaged ({error}); run `kling dedup` again") from error
