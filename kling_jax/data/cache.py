"""Latents and text embeddings on disk: written whole by shards, read by clip id in any order, never silently wrong.

    SET/cache/latents/<encoder>-<weights>/card.json                  what wrote it; compared whenever it is opened
                                          p000-000000.safetensors    tensors "<variant>/<clip id>"

The variant of a latent is its bucket (frames, height, width, rate), that of a text the hash of the caption, so that an
entry of another crop or of an old caption cannot be taken for this one. A shard appears by rename: a kill loses at most
the shard that was being filled, and a second run goes on behind the last whole one.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

from kling_jax import errors, files

DTYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
STORED: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
MEND = "run `kling encode` for this set and encoder"


@dataclasses.dataclass(frozen=True)
class Card:
  """Who wrote a cache: equal cards mean interchangeable entries.

  Attributes:
    kind: "latents" or "text".
    encoder: name of the codec or text encoder, letters, digits, ".", "_", "-".
    weights: `weights_hash` of the encoder.
    dtype: of the stored arrays: bfloat16, float16 or float32.
    details: JSON-able shape facts that a reader checks, such as temporal, spatial, channels or width.
  """

  kind: str
  encoder: str
  weights: str
  dtype: str = "bfloat16"
  details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    if self.kind not in ("latents", "text"):
      raise errors.ConfigError(f"cache kind is {self.kind!r}; legal: latents, text")
    if self.dtype not in STORED:
      raise errors.ConfigError(f"cache dtype is {self.dtype!r}; legal: {', '.join(STORED)}")
    for field in ("encoder", "weights"):
      if not re.fullmatch(r"[A-Za-z0-9._]([A-Za-z0-9._-]*)", getattr(self, field)):
        raise errors.ConfigError(
          f"cache {field} is {getattr(self, field)!r}; it names a folder: use letters, digits, '.', '_', '-'"
        )

  def folder(self, clip_set: str | os.PathLike[str]) -> pathlib.Path:
    """Where this cache stands beside the clip set in folder `clip_set`."""
    return pathlib.Path(clip_set) / "cache" / self.kind / f"{self.encoder}-{self.weights}"

  def as_json(self) -> dict[str, Any]:
    return json.loads(json.dumps({**dataclasses.asdict(self), "details": dict(self.details)}))


def weights_hash(params: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> str:
  """16 hexadecimal digits over every parameter's path, type, shape and bytes, and over `config`.

  `config` says what the arrays do not (steps of a wavelet, normalisation); a codec without weights hashes it alone.
  """
  digest = hashlib.sha256(json.dumps(dict(config or {}), sort_keys=True, default=list).encode())
  for path in sorted(params):
    array = np.asarray(params[path], order="C")
    digest.update(f"{path}:{array.dtype.name}:{array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()[:16]


def text_variant(caption: str) -> str:
  """Names the caption that a text entry was made from."""
  return hashlib.sha256(caption.encode("utf-8", errors="replace")).hexdigest()[:16]


def latent_variant(frames: int, height: int, width: int, fps: float) -> str:
  """Names the bucket that a latent entry was made for: `frames` at `fps`, centred in the clip, height x width."""
  return f"{frames}x{height}x{width}@{fps:g}"


class _Entry(NamedTuple):
  shard: str
  offset: int
  dtype: str
  shape: tuple[int, ...]


class _Reader:
  """Random access to a cache folder by (variant, clip id).

  Picklable: the index is read on first use, and no file stays open. `get` may be called from several threads.
  """

  kind: str

  def __init__(self, folder: str | os.PathLike[str], card: Card | None = None):
    """Opens `folder`; `card` is what the caller expects of it.

    Raises:
      DataError: no cache there, of the other kind, or of another encoder, weights, type or shape than `card` says.
    """
    self.folder = pathlib.Path(folder)
    self.card = read_card(self.folder)
    if self.card.kind != self.kind:
      raise errors.DataError(f"{self.folder} holds {self.card.kind}, not {self.kind}")
    if card is not None:
      compare(self.folder, self.card, card)
    self._entries: dict[tuple[str, str], _Entry] | None = None

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_entries": None}  # workers read the index themselves: cheaper than pickling it

  @property
  def entries(self) -> dict[tuple[str, str], _Entry]:
    """{(variant, clip id): where it lies}."""
    if self._entries is None:
      self._entries = read_index(self.folder)
    return self._entries

  def __len__(self) -> int:
    return len(self.entries)

  def missing(self, variant_of_clip: Iterable[tuple[str, str]]) -> list[str]:
    """The clip ids of those (clip id, variant) pairs that the cache lacks; ask at start, not at step 5,000."""
    return [clip_id for clip_id, variant in variant_of_clip if (variant, clip_id) not in self.entries]

  def _read(self, clip_id: str, variant: str) -> np.ndarray:
    entry = self.entries.get((variant, clip_id))
    if entry is None:
      raise self._absent(clip_id, variant)
    dtype = np.dtype(DTYPES[entry.dtype])
    size = math.prod(entry.shape) * dtype.itemsize
    with (self.folder / entry.shard).open("rb") as file:
      file.seek(entry.offset)
      payload = file.read(size)
    if len(payload) != size:
      raise errors.DataError(f"{self.folder / entry.shard} became shorter while it was read; {MEND} again")
    return np.frombuffer(payload, dtype).reshape(entry.shape)

  def _absent(self, clip_id: str, variant: str) -> errors.DataError:
    others = sorted(held for held, held_id in self.entries if held_id == clip_id)
    known = f"it holds that clip for {', '.join(others)} only" if others else "it does not know that clip"
    return errors.DataError(f"{self.folder} lacks clip {clip_id!r} for {variant!r}: {known}; {MEND}")


class LatentCache(_Reader):
  """Latents by clip id and bucket."""

  kind = "latents"

  def get(self, clip_id: str, bucket: str) -> np.ndarray:
    """Latents (t, h, w, c) in the cache's dtype, read-only.

    Args:
      clip_id: the clip.
      bucket: `latent_variant(...)` of the bucket.

    Raises:
      DataError: the cache lacks the clip or has it for other buckets only.
    """
    return self._read(clip_id, bucket)


class TextCache(_Reader):
  """Text embeddings by clip id and caption, trimmed to their true length."""

  kind = "text"

  def get(self, clip_id: str, caption: str) -> np.ndarray:
    """Embeddings (L, D) of the clip's caption in the cache's dtype, read-only; L is the true length.

    Raises:
      DataError: the cache lacks the clip, or the caption is not the one that was encoded.
    """
    return self._read(clip_id, text_variant(caption))

  def null(self) -> np.ndarray:
    """Embeddings (L, D) of the empty caption, for dropped text and for guidance."""
    return self._read("", text_variant(""))


class Writer:
  """Fills a cache folder; `with Writer(card.folder(clip_set), card) as writer: writer.add(...)`.

  Leaving the block without an error writes the last shard. Entries that already stand in whole shards are kept: ask
  `(variant, clip_id) in writer` before computing one. Several processes may fill one folder, each under its own number.
  """

  def __init__(self, folder: str | os.PathLike[str], card: Card, *, process: int = 0, shard_bytes: int = 64 * 2**20):
    """Opens or makes `folder`.

    Args:
      folder: usually `card.folder(clip_set)`.
      card: what is going to be written.
      process: number of this process, part of its shards' names.
      shard_bytes: a shard is closed when it holds this many bytes; what a kill may lose.

    Raises:
      DataError: the folder holds a cache with another card.
    """
    self.folder, self.card = pathlib.Path(folder), card
    self._process, self._shard_bytes = process, shard_bytes
    if (self.folder / "card.json").exists():
      compare(self.folder, read_card(self.folder), card)
    else:
      files.write_json(self.folder / "card.json", card.as_json())
    self._held = set(read_index(self.folder))
    self._pending: dict[str, np.ndarray] = {}
    self._pending_bytes = 0
    numbers = [int(path.stem.split("-")[1]) for path in self.folder.glob(f"p{process:03d}-*.safetensors")]
    self._next = max(numbers, default=-1) + 1

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    if kind is None:
      self.flush()

  def __contains__(self, key: tuple[str, str]) -> bool:
    """Whether (variant, clip id) is held or about to be."""
    return key in self._held

  def add(self, clip_id: str, variant: str, array: np.ndarray) -> None:
    """Takes one array, cast to the card's dtype.

    Raises:
      DataError: it has values that are not finite after the cast, or the entry is there already.
    """
    if "/" in variant:
      raise ValueError(f"variant {variant!r} has a slash, which ends the variant in a tensor's name")
    if (variant, clip_id) in self:
      raise errors.DataError(f"{self.folder} already holds clip {clip_id!r} for {variant!r}")
    stored = as_stored(self.card, array, f"clip {clip_id!r} ({variant})")
    self._held.add((variant, clip_id))
    self._pending[f"{variant}/{clip_id}"] = stored
    self._pending_bytes += stored.nbytes
    if self._pending_bytes >= self._shard_bytes:
      self.flush()

  def flush(self) -> None:
    """Writes what is pending as one shard, whole or not at all."""
    if self._pending:
      with files.whole(self.folder / f"p{self._process:03d}-{self._next:06d}.safetensors") as temporary:
        safetensors.numpy.save_file(self._pending, temporary)
      self._pending, self._pending_bytes, self._next = {}, 0, self._next + 1


def as_stored(card: Card, array: np.ndarray, what: str) -> np.ndarray:
  """An array in the card's dtype.

  Raises:
    DataError: it has values that are not finite after the cast.
  """
  with np.errstate(over="ignore"):  # what overflows is found, and named, below
    stored = np.array(array, STORED[card.dtype], order="C")
  if not np.isfinite(stored.astype(np.float32)).all():
    raise errors.DataError(f"the {card.encoder} encoder gave values that are not finite for {what}")
  return stored


def chunk_path(folder: pathlib.Path, keys: Iterable[tuple[str, str]]) -> pathlib.Path:
  """The shard of one job: named by the (variant, clip id) that it holds, not by who writes it."""
  names = "\n".join(sorted(f"{variant}/{clip_id}" for variant, clip_id in keys))
  return folder / f"pjob-{hashlib.sha256(names.encode()).hexdigest()[:16]}.safetensors"


def write_chunk(path: pathlib.Path, card: Card, entries: Mapping[tuple[str, str], np.ndarray]) -> None:
  """Writes one job's arrays as one shard, whole or not at all; equal entries give equal bytes.

  Raises:
    DataError: values that are not finite.
  """
  stored = {
    f"{variant}/{clip_id}": as_stored(card, array, f"clip {clip_id!r} ({variant})")
    for (variant, clip_id), array in sorted(entries.items())
  }
  with files.whole(path) as temporary:
    safetensors.numpy.save_file(stored, temporary)


def read_card(folder: pathlib.Path) -> Card:
  """Reads who wrote the cache in `folder`.

  Raises:
    DataError: there is none, or its card is damaged.
  """
  path = folder / "card.json"
  try:
    return Card(**json.loads(path.read_text(encoding="utf-8")))
  except FileNotFoundError as error:
    raise errors.DataError(f"no cache in {folder} (it has no card.json); {MEND}") from error
  except (ValueError, TypeError, errors.ConfigError) as error:
    raise errors.DataError(f"{path} is damaged ({error}); delete the folder and {MEND}") from error


def compare(folder: pathlib.Path, held: Card, expected: Card) -> None:
  """Raises DataError where the cache in `folder` was not written by `expected`, naming each difference."""
  held_json, expected_json = held.as_json(), expected.as_json()
  wrong = [
    f"{key} is {held_json[key]!r}, expected {expected_json[key]!r}"
    for key in held_json
    if held_json[key] != expected_json[key]
  ]
  if wrong:
    raise errors.DataError(f"cache {folder} was written by another encoder: {'; '.join(wrong)}; {MEND}")


def read_index(folder: pathlib.Path) -> dict[tuple[str, str], _Entry]:
  """Reads the headers of all shards in `folder`: {(variant, clip id): entry}; later shards win.

  Raises:
    DataError: a shard is damaged.
  """
  index = {}
  for path in sorted(folder.glob("p*.safetensors")):
    for name, entry in read_header(path).items():
      variant, _, clip_id = name.partition("/")
      index[variant, clip_id] = entry
  return index


def read_header(path: pathlib.Path) -> dict[str, _Entry]:
  """Reads where each tensor of a safetensors file lies, checked against the file's size.

  Raises:
    DataError: the file is damaged.
  """
  size = path.stat().st_size
  try:
    with path.open("rb") as file:
      (length,) = struct.unpack("<Q", file.read(8))
      if length > size - 8:
        raise ValueError(f"its header claims {length} of {size} bytes")
      header = json.loads(file.read(length))
    entries, end = {}, 0
    for name, facts in header.items():
      if name == "__metadata__":
        continue
      start, stop = facts["data_offsets"]
      shape = tuple(map(int, facts["shape"]))
      if stop - start != math.prod(shape) * np.dtype(DTYPES[facts["dtype"]]).itemsize:
        raise ValueError(f"{name} has {stop - start} bytes for shape {shape}")
      entries[name] = _Entry(path.name, 8 + length + start, facts["dtype"], shape)
      end = max(end, 8 + length + stop)
    if end != size:
      raise ValueError(f"it has {size} bytes, its header speaks of {end}")
  except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.DataError(f"cache shard {path} is damaged ({error}); delete that file and {MEND}") from error
  return entries


def not_finite(folder: pathlib.Path, entries: Mapping[tuple[str, str], _Entry]) -> list[str]:
  """ "variant/clip id" of the entries whose values are not all finite; reads every value."""
  found = []
  for (variant, clip_id), entry in entries.items():
    kind = np.dtype(DTYPES[entry.dtype])
    with (folder / entry.shard).open("rb") as file:
      file.seek(entry.offset)
      data = file.read(math.prod(entry.shape) * kind.itemsize)
    if not np.isfinite(np.frombuffer(data, kind).astype(np.float32)).all():
      found.append(f"{variant}/{clip_id}")
  return found


def pad_text(texts_BLD: Iterable[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Stacks trimmed embeddings into a batch.

  Args:
    texts_BLD: arrays (L_b, D), one a sample.
    length: tokens a row of the batch.

  Returns:
    text_BLD zero-padded to `length`, and mask_BL bool, true where a token stands.

  Raises:
    DataError: one is longer than `length`.
  """
  rows = list(texts_BLD)
  longest = max(len(row) for row in rows)
  if longest > length:
    raise errors.DataError(
      f"a cached text has {longest} tokens, the batch takes {length}; raise the config's text length to {longest}"
    )
  text_BLD = np.zeros((len(rows), length, rows[0].shape[-1]), rows[0].dtype)
  for place, row in zip(text_BLD, rows, strict=True):
    place[: len(row)] = row
  return text_BLD, np.arange(length) < np.array([len(row) for row in rows])[:, None]
