"""Our clip sets as TensorFlow Datasets, written and read without TensorFlow (ArrayRecord files, `tfds.data_source`)."""

import contextlib
import hashlib
import os
import pathlib
import sys
import threading
import typing
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from kling_jax import errors
from kling_jax.data import clip_table, decode, reasons, record
from kling_jax.data.record import ClipRecord
from kling_jax.data.source import ClipInfo

NAME = "kling_clips"


class KlingClips(tfds.core.GeneratorBasedBuilder):
  """A TFDS builder over one clip set: split "train", the kept clips in the set's order.

  Features: `header` (JSON of the clip record), `media` (encoded clip; bytes), `clip_id`, `caption` (text). Text and
  bytes come back as bytes from `tfds.data_source`.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES: typing.ClassVar[dict[str, str]] = {"1.0.0": "Clip record KLC1."}
  name = NAME
  # Not a package of data sets: otherwise TFDS looks beside this file for one, with packages that it does not require.
  pkg_dir_path = None
  code_path = None

  def __init__(self, *, clips: str | os.PathLike[str], **options: typing.Any):
    self._clips = pathlib.Path(clips)
    super().__init__(file_format="array_record", **options)  # The one format that reads without TensorFlow.

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    return tfds.core.DatasetInfo(
      builder=self,
      description="Video clips with captions and scores (kling_jax clip records).",
      features=tfds.features.FeaturesDict({"header": text, "media": text, "clip_id": text, "caption": text}),
      metadata=tfds.core.MetadataDict(fingerprint=_fingerprint_of(self._clips)),
      disable_shuffling=True,  # The order is part of a set's identity.
    )

  def _split_generators(self, download: object) -> dict[str, Iterator[tuple[int, dict[str, typing.Any]]]]:
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, typing.Any]]]:
    kept = (item for item in clip_table.read_all(self._clips) if item[0].status == "kept")
    for key, (clip, media) in enumerate(kept):
      header = record.header_json(clip).decode("utf-8")
      yield key, {"header": header, "media": media, "clip_id": clip.clip_id, "caption": clip.caption}


def write(clips: str | os.PathLike[str], data_dir: str | os.PathLike[str]) -> pathlib.Path:
  """Writes the kept clips of a set as a TFDS data set below `data_dir`.

  Returns:
    The folder of the version, for `TfdsSource` and `tfds.builder_from_directory`.
  """
  tfds.display_progress_bar(sys.stderr.isatty())
  builder = KlingClips(clips=clips, data_dir=os.fspath(data_dir))
  with contextlib.redirect_stdout(sys.stderr):  # TFDS chats on standard output, which belongs to --json.
    builder.download_and_prepare()
  return pathlib.Path(builder.data_dir)


class TfdsSource:
  """A split of a TFDS data set written by `KlingClips`, read through `as_data_source`; implements ClipSource.

  Args:
    folder: the version's folder (holds features.json), or one with a single version below it.
    split: a TFDS split, for example "train" or "train[:100]".

  Raises:
    DataError: no such data set or split, or one with other features.
  """

  def __init__(self, folder: str | os.PathLike[str], split: str = "train"):
    self._folder, self._split = version_folder(folder), split
    self._lock = threading.Lock()
    self._data: typing.Any = None
    try:
      builder = tfds.builder_from_directory(self._folder)
      self._length = len(builder.as_data_source(split=split))
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
      raise errors.DataError(f"{self._folder}: split {split!r} cannot be read: {error}") from error
    missing = {"header", "media"} - set(builder.info.features)
    if missing:
      listed = ", ".join(builder.info.features)
      raise errors.DataError(f"{self._folder}: no data set of clips: it has {listed}; wants header and media")
    if self._length == 0:
      raise errors.DataError(f"{self._folder}: split {split!r} is empty")
    identity = (builder.info.metadata or {}).get("fingerprint") or (self._folder / "dataset_info.json").read_text()
    self._fingerprint = hashlib.sha256(f"{identity}/{split}".encode()).hexdigest()[:16]

  @property
  def fingerprint(self) -> str:
    return self._fingerprint

  def __len__(self) -> int:
    return self._length

  def __getstate__(self) -> dict[str, typing.Any]:
    return self.__dict__ | {"_lock": None, "_data": None}

  def __setstate__(self, state: dict[str, typing.Any]) -> None:
    self.__dict__ |= state
    self._lock = threading.Lock()

  def record(self, index: int) -> ClipRecord:
    """The header of clip `index`."""
    return record.parse_header(self._example(index)["header"])

  def info(self, index: int) -> ClipInfo:
    return self.record(index).info()

  def frames(self, index: int, times_s: np.ndarray, height: int, width: int) -> np.ndarray:
    try:
      return decode.frames_at(self._example(index)["media"], times_s, height, width)
    except reasons.MediaError as error:
      raise errors.DataError(f"{self._folder}: clip {index} does not decode: {error}") from error

  def _example(self, index: int) -> dict[str, typing.Any]:
    if not 0 <= index < self._length:
      raise IndexError(f"{self._folder} holds {self._length} clips; there is no clip {index}")
    with self._lock:
      if self._data is None:
        self._data = tfds.builder_from_directory(self._folder).as_data_source(split=self._split)
      data = self._data
    return data[index]


def version_folder(folder: str | os.PathLike[str]) -> pathlib.Path:
  """The folder with features.json: the given one, or the only one up to two levels (name, version) below it."""
  folder = pathlib.Path(folder)
  for pattern in ("features.json", "*/features.json", "*/*/features.json"):
    found = sorted(folder.glob(pattern))
    if len(found) == 1:
      return found[0].parent
    if found:
      listed = ", ".join(str(path.parent.relative_to(folder)) for path in found)
      raise errors.DataError(f"{folder}: several TFDS data sets: {listed}; name one of them")
  raise errors.DataError(f"{folder}: no TFDS data set (no features.json here or below)")


def _fingerprint_of(clips: pathlib.Path) -> str:
  table = clip_table.Index.load(clips).table.to_pydict()
  kept = [name for name, status in zip(table["clip_id"], table["status"], strict=True) if status == "kept"]
  return record.fingerprint(kept)
