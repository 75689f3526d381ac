"""Duplicates of a clip set: equal media, near copies by perceptual signature, close embeddings; across sets as well.

Signatures are taken once a clip and kept in SET/cache/signatures, so that a set that has grown, or is compared with
another one, is not decoded again. What is found lies in duplicates.parquet; `select` decides which clip of it stays.
"""

import base64
import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kling_jax import files, progress
from kling_jax.curation import duplicates, engine, neighbours, rules, select, signature
from kling_jax.curation.duplicates import PREFER, Pairs
from kling_jax.curation.signature import Signature
from kling_jax.data import clip_table, columns, reasons, record
from kling_jax.data import folder as folder_lib
from kling_jax.errors import DataError, UsageError

CACHE = pathlib.PurePath("cache", "signatures", f"{signature.NAME}-{signature.VERSION}.parquet")
WORK = "kling_jax.curation.dedup:work"
BATCH = 16  # clips of a job
NEAR_FRAME = 0.6  # cosine of two frames from which their clips are compared
NEAR_EMBEDDING = 0.95
_UNREAD = "unread "  # instead of a digest
STATED = f"equal media, or {signature.NAME} {signature.VERSION} >= {signature.ALIKE:g}"
_TWINS = 20  # clips of equal media of which all pairs are listed


@dataclasses.dataclass(frozen=True)
class Clips:
  """The clips of a set that take part.

  Attributes:
    ids, digests: of clip and media. signatures: None where the media does not decode.
    video, start_s, end_s: where a clip comes from. name: of the set in reasons.
  """

  ids: list[str]
  digests: list[str]
  signatures: list[Signature | None]
  video: list[str]
  start_s: np.ndarray
  end_s: np.ndarray
  name: str

  def __len__(self) -> int:
    return len(self.ids)


def dedup(
  folder: str | os.PathLike[str],
  *,
  against: Sequence[str | os.PathLike[str]] = (),
  embeddings: str | os.PathLike[str] | None = None,
  least_embedding: float = NEAR_EMBEDDING,
  prefer: Sequence[str] = PREFER,
  workers: int | None = None,
) -> Pairs:
  """Finds the duplicates of a set; nothing is changed.

  Args:
    folder: the set. against: other sets, of which the kept clips count; a copy of one of them always goes.
    embeddings: .npy (a row a clip, in the order of the table) or .parquet (clip_id, embedding); compared by cosine.
    least_embedding: cosine of embeddings from which clips are copies.
    prefer: which clip of several is best; see `duplicates.Pairs`.
    workers: processes that decode; None: one a core.

  Raises:
    DataError: no set, or embeddings that do not belong to it. UsageError: an option is out of range.
  """
  if not 0 < least_embedding <= 1:
    raise UsageError(f"a cosine of embeddings must be above 0 and at most 1, got {least_embedding}")
  clips = load(folder, workers)
  others = [load(other, workers, kept=True) for other in against]
  if len({other.name for other in (*others, clips)}) <= len(others):
    raise UsageError("the sets must be different and have different names; rename a folder")
  rows = _within(clips)
  for other in others:
    found = _exact(clips, other)
    rows += found + _near(clips, other, found)
  stated = STATED
  if embeddings is not None:
    known = {frozenset((row["clip_id"], row["other"])) for row in rows}
    found = _close(clips, _embeddings(embeddings, clips.ids), least_embedding)
    rows += [row for row in found if frozenset((row["clip_id"], row["other"])) not in known]
    stated += f", or embeddings >= {least_embedding:g}"
  stated += f"; the best by {', '.join(prefer)} stays"
  return Pairs(pa.Table.from_pylist(rows, duplicates.SCHEMA), stated, tuple(prefer))


def of_files(paths: Sequence[str], workers: int | None = None) -> Pairs:
  """The duplicates among loose videos; their paths are their names. What does not decode is only compared by hash.

  Raises:
    DataError: a path is no file.
  """
  lacking = next((path for path in paths if not os.path.isfile(path)), None)
  if lacking is not None:
    raise DataError(f"{lacking}: there is no such file")
  cache = _work_all([{"path": path} for path in paths], {}, workers)
  digests = [cache[path][0] for path in paths]
  signatures = [Signature.from_bytes(cache[path][1]) if cache[path][1] else None for path in paths]
  whole = np.zeros(len(paths)), np.zeros(len(paths))
  clips = Clips(list(paths), digests, signatures, list(paths), *whole, "")
  return Pairs(pa.Table.from_pylist(_within(clips), duplicates.SCHEMA), STATED)


def _within(clips: Clips) -> list[dict[str, Any]]:
  rows = _exact(clips, clips)
  return rows + _near(clips, clips, rows)


# ---- signatures ------------------------------------------------------------------------------------------------------


def load(folder: str | os.PathLike[str], workers: int | None = None, kept: bool = False) -> Clips:
  """The clips of a set with their signatures; those that the cache lacks are taken now, and kept there.

  Args:
    kept: only clips with status kept.
  """
  folder = clip_table.set_folder(folder)
  names = ["clip_id", "video_id", "start_s", "end_s", "shard", "position", "status"]
  table = pq.read_table(folder / clip_table.TABLE, columns=names)
  if kept:
    table = table.filter(pa.array(np.array(table["status"].to_pylist(), object) == "kept"))
  ids = table["clip_id"].to_pylist()
  cache = _read_cache(folder / CACHE)
  missing = [row for row in table.select(["clip_id", "shard", "position"]).to_pylist() if row["clip_id"] not in cache]
  if missing:
    cache |= _take(folder, missing, workers)
    _write_cache(folder / CACHE, {name: held for name, held in cache.items() if not held[0].startswith(_UNREAD)})
  digests = [cache[name][0] for name in ids]
  signatures = [Signature.from_bytes(cache[name][1]) if cache[name][1] else None for name in ids]
  starts, ends = (table[name].to_numpy() for name in ("start_s", "end_s"))
  return Clips(ids, digests, signatures, table["video_id"].to_pylist(), starts, ends, folder.resolve().name)


def _take(folder: pathlib.Path, rows: list[dict[str, Any]], workers: int | None) -> dict[str, tuple[str, bytes]]:
  return _work_all(sorted(rows, key=lambda row: (row["shard"], row["position"])), {"folder": str(folder)}, workers)


def _work_all(rows: list[dict[str, Any]], shared: dict[str, Any], workers: int | None) -> dict[str, tuple[str, bytes]]:
  """{name: (digest, signature)} of clips or files, taken in processes."""
  size = BATCH if shared else 1
  batches = [rows[k : k + size] for k in range(0, len(rows), size)]
  jobs: list[dict[str, Any]] = [shared | {"rows": batch} for batch in batches]
  found: dict[str, tuple[str, bytes]] = {}
  with progress.bar("signatures", len(rows)) as line:
    for index, answer in engine.run(WORK, jobs, workers):
      if isinstance(answer, engine.Failure):
        if len(batches[index]) > 1:  # one of them ends its process; the others shall not suffer
          for row in batches[index]:
            found |= _work_all([row], shared, 1)
        else:
          [row] = batches[index]
          name = row["path"] if "path" in row else row["clip_id"]
          print(f"kling: {name}: left out: {answer.detail}", file=sys.stderr)
          found[name] = (f"{_UNREAD}{name}", b"")
        line.advance(len(batches[index]))
        continue
      for name, digest, data in answer["signatures"]:
        found[name] = (digest, base64.b64decode(data))
      line.advance(len(batches[index]))
  return found


def work(job: dict[str, Any]) -> dict[str, Any]:
  """Takes signatures of clips {folder, rows: [{clip_id, shard, position}]} or of files {rows: [{path}]}.

  Returns:
    {signatures: [[clip_id or path, SHA-256 of the media, base64]]}; the last is empty where the media does not decode.
  """
  cv2.setNumThreads(1)
  found = []
  for row in job["rows"]:
    media: bytes | str
    if "path" in row:
      name, media = row["path"], row["path"]
    else:
      path = pathlib.Path(job["folder"]) / clip_table.RECORDS / row["shard"]
      _, media = record.unpack(clip_table.read_record(clip_table.open_reader(path), path, row["position"]))
      name = row["clip_id"]
    try:
      data = signature.of_media(media).to_bytes()
    except reasons.MediaError:  # `kling data verify` is about such clips; equal media are still found
      data = b""
    found.append([name, record.content_hash(media), base64.b64encode(data).decode("ascii")])
  return {"signatures": found}


def _read_cache(path: pathlib.Path) -> dict[str, tuple[str, bytes]]:
  if not path.exists():
    return {}
  try:
    table = pq.read_table(path, columns=["clip_id", "media_sha256", "data"])
  except (pa.ArrowException, OSError) as error:
    raise DataError(f"{path} is damaged ({error}); remove it, and it is made again") from error
  rows = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
  return {name: (digest, data) for name, digest, data in rows}


def _write_cache(path: pathlib.Path, cache: dict[str, tuple[str, bytes]]) -> None:
  if not cache:
    return
  digests, data = zip(*cache.values(), strict=True)
  table = {"clip_id": pa.array(list(cache)), "media_sha256": pa.array(digests), "data": pa.array(data, pa.binary())}
  with files.whole(path) as temporary:
    pq.write_table(pa.table(table), temporary)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def _pair(a: Clips, i: int, b: Clips, j: int, kind: str, similarity: float, **more: float) -> dict[str, Any]:
  same = {"offset_s": 0.0, "share": 1.0, "other_share": 1.0} | more
  other_set = "" if a is b else b.name
  return {"clip_id": a.ids[i], "other": b.ids[j], "other_set": other_set, "kind": kind, "similarity": similarity} | same


def _exact(a: Clips, b: Clips) -> list[dict[str, Any]]:
  """Clips of equal media."""
  places: dict[str, list[int]] = {}
  for j, digest in enumerate(b.digests):
    places.setdefault(digest, []).append(j)
  found = []
  for i, digest in enumerate(a.digests):
    twins = places.get(digest, [])
    if a is b:  # each pair once; of many twins each with the first ones
      twins = [j for j in twins[:_TWINS] if j < i]
    found += [_pair(a, i, b, j, "exact", 1.0) for j in (twins if a is b else twins[:1])]
  return found


def _near(a: Clips, b: Clips, exact: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Copies by signature. Clips of equal media are represented by one of them."""
  twins = {row["clip_id"] for row in exact}
  first = [i for i, one in enumerate(a.signatures) if one is not None and a.ids[i] not in twins]
  second = first if a is b else [j for j, one in enumerate(b.signatures) if one is not None]
  base, base_owner = _frames(b, second)
  queries, query_owner = (base, base_owner) if a is b else _frames(a, first)
  if not len(queries) or not len(base):
    return []
  turned = (queries * signature.mirror()).astype(np.int8)
  both, owners = np.concatenate([queries, turned]), np.concatenate([query_owner, query_owner])
  shift = 0 if a is b else len(a)  # clips of different sets are never the same clip
  candidates = neighbours.pairs(both, owners, base, base_owner + shift, NEAR_FRAME) - [0, shift]
  if a is b:
    candidates = np.unique(np.sort(candidates, axis=1), axis=0)
  found = []
  for i, j in progress.track(candidates.tolist(), "match"):
    one, other = a.signatures[i], b.signatures[j]
    if one is None or other is None or (a is b and _apart(a, i, j)):
      continue
    match = signature.match(one, other)
    if match.copy:
      shares = {"share": match.overlap / len(one), "other_share": match.overlap / len(other)}
      found.append(_pair(a, i, b, j, "near", match.similarity, offset_s=match.shift * signature.STEP_S, **shares))
  return found


def _frames(clips: Clips, members: list[int]) -> tuple[np.ndarray, np.ndarray]:
  """Vectors (F, 63) int8 of the distinct frames of clips, and the clips that they belong to."""
  vectors, owners = [np.zeros((0, signature.DEPTH), np.int8)], [np.zeros(0, np.int64)]
  for i in members:
    one = clips.signatures[i]
    assert one is not None
    picks = one.distinct()
    vectors.append(one.vectors[picks])
    owners.append(np.full(len(picks), i))
  return np.concatenate(vectors), np.concatenate(owners)


def _apart(clips: Clips, i: int, j: int) -> bool:
  """Whether two clips are different moments of one video: then they are no copies however alike they are."""
  overlap = min(clips.end_s[i], clips.end_s[j]) - max(clips.start_s[i], clips.start_s[j])
  return clips.video[i] == clips.video[j] and overlap <= 0


def _embeddings(path: str | os.PathLike[str], ids: list[str]) -> np.ndarray:
  """(N, D) float32 in the order of `ids`.

  Raises:
    DataError: other rows than clips, or no numbers.
  """
  path = pathlib.Path(path)
  try:
    if path.suffix == ".npy":
      found = np.load(path, allow_pickle=False)
    else:
      table = columns.read_table(path)
      row = {name: k for k, name in enumerate(table["clip_id"].to_pylist())}
      found = np.array(table["embedding"].to_pylist(), np.float32)[[row[name] for name in ids]]
  except (OSError, ValueError, KeyError) as error:
    raise DataError(f"{path}: wants .npy, or a table with clip_id and embedding for every clip ({error})") from error
  if found.ndim != 2 or len(found) != len(ids) or not np.isfinite(found).all():
    raise DataError(f"{path} holds {found.shape} values; wants a finite row for each of {len(ids)} clips")
  return found.astype(np.float32)


def _close(clips: Clips, vectors: np.ndarray, least: float) -> list[dict[str, Any]]:
  owners = np.arange(len(clips))
  candidates = neighbours.pairs(vectors, owners, vectors, owners, least)
  units = neighbours.units(vectors)
  found = []
  for i, j in np.unique(np.sort(candidates, axis=1), axis=0).tolist():
    if not _apart(clips, i, j):
      found.append(_pair(clips, i, clips, j, "embedding", float(units[i] @ units[j])))
  return found


# ---- the verb --------------------------------------------------------------------------------------------------------


def run(source: Sequence[str], what_if: bool = False, **options: Any) -> dict[str, Any]:
  """Finds duplicates of a set and, unless `what_if`, saves them and selects the set with its rules.

  Args:
    source: one clip set; or video files and folders of them, whose groups are only told.

  Returns:
    {clips, pairs: {kind: count}, groups, largest, dropped, stated}; largest holds all groups of loose videos.
  """
  if not (len(source) == 1 and (pathlib.Path(source[0]) / clip_table.TABLE).exists()):
    if options["against"] or options["embeddings"]:
      raise UsageError("--against and --embeddings belong to a clip set, and --input names videos")
    paths = [path for name in source for path in (folder_lib.find_videos(name) if os.path.isdir(name) else [name])]
    return _answer(of_files(list(dict.fromkeys(paths)), options["workers"]), paths, 0, len(paths))
  folder = source[0]
  pairs = dedup(folder, **options)
  held = select.stored(folder)
  chosen, seed = held or (select.DEFAULT_RULES, 0)
  if what_if:
    selection = select.evaluate(select.load(folder, chosen), chosen, seed, pairs, strict=False)
  else:
    pairs.save(folder)
    selection = select.select(folder, chosen, seed, strict=False)
  dropped = next((step.dropped for step in selection.steps if step.name == rules.DUPLICATE), 0)
  return _answer(pairs, selection.ids, dropped, 10)


def _answer(pairs: Pairs, ids: list[str], dropped: int, most: int) -> dict[str, Any]:
  groups = pairs.clusters(ids)
  kinds = pairs.table["kind"].to_pylist()
  return {
    "clips": len(ids), "pairs": {kind: kinds.count(kind) for kind in sorted(set(kinds))}, "groups": len(groups),
    "largest": groups[:most], "dropped": dropped, "stated": pairs.stated,
  }  # fmt: skip
