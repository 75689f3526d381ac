"""`kling encode`: the latents and texts of clip sets into the caches beside them, resumable, in whole shards."""

import concurrent.futures
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kling_jax import progress
from kling_jax.data import buckets as buckets_lib
from kling_jax.data.buckets import Bucket
from kling_jax.data.cache import Writer, text_variant
from kling_jax.data.mixture import Mixture
from kling_jax.data.source import ClipSource
from kling_jax.errors import ConfigError, DataError, UsageError
from kling_jax.train import encoders

PIXELS_AT_ONCE = 2**20  # a frame, over the rows of a device: 16 clips of 256 x 256, one of 720 x 1280
MOST_ROWS = 16
THREADS = 4  # decoding; the encoder runs meanwhile


@dataclasses.dataclass
class Report:
  """What one call did to one cache.

  Attributes:
    folder: of the cache.
    encoded, held: entries written now, and found already there.
    failed: {clip id: reason} of clips that cannot be decoded.
    mean, std: over all values written now; latents should come near 0 and 1.
  """

  folder: pathlib.Path
  encoded: int = 0
  held: int = 0
  failed: dict[str, str] = dataclasses.field(default_factory=dict)
  mean: float = 0.0
  std: float = 0.0

  def __str__(self) -> str:
    line = f"{self.folder}: {self.encoded} encoded, {self.held} were there"
    if self.encoded:
      line += f"; mean {self.mean:.3f}, standard deviation {self.std:.3f}"
    return line


def run(config: ml_collections.ConfigDict, source: str | None = None) -> str:
  """Fills the caches that a video_dit config would read.

  Args:
    config: whose `codec`, `text` (where it is "cached") and `data` (sources, buckets, fps) are used.
    source: a clip set, in place of the config's sources.

  Returns:
    One line a cache.

  Raises:
    UsageError: the config is of another task.
    ConfigError: a source without a folder, a bucket that the codec cannot take.
    DataError: a cache of another encoder stands there; or, after all others were written, clips cannot be decoded.
    WeightsError: the encoder's weights do not fit.
  """
  reports = []
  sets = opened(config, source)
  latent = encoders.latent_encoder(config)
  text = encoders.text_encoder(config) if config.text.encoder == "cached" else None
  for clips, folder in sets:
    reports.append(encode_latents(clips, asked_of(config), latent, folder))
    if text is not None:
      reports.append(encode_text(clips, text, folder))
  return told(reports)


def opened(config: ml_collections.ConfigDict, source: str | None) -> list[tuple[ClipSource, str]]:
  """(clips, folder) of each set whose caches a config would read; see `run`."""
  if config.task != "video_dit":
    raise UsageError(f"kling encode takes a video_dit config, not one of task {config.task!r}")
  mixture = Mixture.open((source,) if source else config.data.sources)
  sets = []
  for clips, folder in zip(mixture.sources, mixture.folders, strict=True):
    if folder is None:
      raise ConfigError("a procedural world has no folder to keep caches beside; name a clip set with --input")
    sets.append((clips, os.fspath(folder)))
  return sets


def asked_of(config: ml_collections.ConfigDict) -> list[Bucket]:
  """The buckets of a config."""
  return [Bucket(frames, height, width, config.data.fps) for frames, height, width in config.data.buckets]


def told(reports: Sequence[Report]) -> str:
  """One line a cache.

  Raises:
    DataError: clips could not be decoded.
  """
  failed = {clip: reason for report in reports for clip, reason in report.failed.items()}
  lines = "\n".join(map(str, reports))
  if failed:
    clip, reason = next(iter(failed.items()))
    raise DataError(
      f"{len(failed)} clips cannot be decoded, first {clip!r}: {reason}; all others are encoded. Take them out of the "
      f"set (`kling data verify` lists them) before training on its caches\n{lines}"
    )
  return lines


def encode_latents(
  source: ClipSource, asked: Sequence[Bucket], encoder: encoders.FrozenCodec, folder: str | os.PathLike[str]
) -> Report:
  """Encodes each clip for the bucket that training would sort it into, from frames at the middle of the clip.

  Args:
    source: the clips; this process takes its share of them.
    asked: the buckets of the run.
    encoder: the codec.
    folder: of the clip set.

  Raises:
    ConfigError: the codec cannot take a bucket.
    DataError: the folder holds a cache of another encoder, or no clip fits any bucket.
  """
  for bucket in asked:
    encoder.geometry.latent_shape(bucket.frames, bucket.height, bucket.width)
  members, _ = buckets_lib.assign((source.info(index) for index in range(len(source))), asked)
  report = Report(encoder.card.folder(folder))
  moments = Moments()
  program = LatentProgram(encoder)
  with Writer(report.folder, encoder.card, process=jax.process_index()) as writer:
    todo = {
      bucket: [int(clip) for clip in _share(clips) if (bucket.name, source.info(int(clip)).clip_id) not in writer]
      for bucket, clips in zip(asked, members, strict=True)
    }
    report.held = sum(len(_share(clips)) for clips in members) - sum(map(len, todo.values()))
    with progress.bar(f"latents {encoder.card.encoder}", sum(map(len, todo.values()))) as bar:
      for bucket, clips in todo.items():
        for ids, latents in program(source, bucket, clips, report.failed):
          for clip_id, array in zip(ids, latents, strict=True):
            writer.add(clip_id, bucket.name, array)
          moments.add(latents)
          report.encoded += len(ids)
          bar.advance(len(ids))
  report.mean, report.std = moments.result()
  return report


def encode_text(source: ClipSource, encoder: encoders.FrozenTextEncoder, folder: str | os.PathLike[str]) -> Report:
  """Encodes each clip's caption, and the empty one, trimmed to their tokens.

  Raises:
    DataError: the folder holds a cache of another encoder.
  """
  report = Report(encoder.card.folder(folder))
  moments = Moments()
  program = TextProgram(encoder)
  infos = (source.info(int(index)) for index in _share(np.arange(len(source))))
  captions = [(info.clip_id, info.caption) for info in infos] + ([("", "")] if jax.process_index() == 0 else [])
  with Writer(report.folder, encoder.card, process=jax.process_index()) as writer:
    todo = [(clip_id, caption) for clip_id, caption in captions if (text_variant(caption), clip_id) not in writer]
    report.held = len(captions) - len(todo)
    with progress.bar(f"text {encoder.card.encoder}", len(todo)) as bar:
      for clip_id, caption, text_LD in program(todo):
        writer.add(clip_id, text_variant(caption), text_LD)
        moments.add(text_LD)
        report.encoded += 1
        bar.advance()
  report.mean, report.std = moments.result()
  return report


class LatentProgram:
  """The codec, compiled once for each bucket, with its rows over the devices of this process."""

  def __init__(self, encoder: encoders.FrozenCodec):
    self._apply = jax.jit(encoder.encode)
    self._rows_on, self._devices = _spread()
    self._params = jax.device_put(encoder.params, NamedSharding(self._rows_on.mesh, P()))

  def __call__(
    self, source: ClipSource, bucket: Bucket, clips: Sequence[int], failed: dict[str, str]
  ) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yields (clip ids, latents (B, t, h, w, c)) of the clips that decode; the others go into `failed`."""
    rows = self._devices * max(1, min(MOST_ROWS, PIXELS_AT_ONCE // (bucket.height * bucket.width)))
    for ids, frames in _batches(_decoded(source, bucket, clips, failed), rows):
      yield ids, np.asarray(self._apply(self._params, jax.device_put(_fill(frames, rows), self._rows_on)))[: len(ids)]


class TextProgram:
  """The text encoder, compiled once for each length."""

  def __init__(self, encoder: encoders.FrozenTextEncoder):
    self._encoder, self._apply = encoder, jax.jit(encoder.encode)

  def __call__(self, captions: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields (clip id, caption, text (L, D) of its tokens alone) of each (clip id, caption)."""
    rows = self._encoder.rows
    for chunk in (captions[start : start + rows] for start in range(0, len(captions), rows)):
      texts = [caption for _, caption in chunk]
      tokens_BL, mask_BL = encoders.shortened(*self._encoder.tokenizer(texts + [""] * (rows - len(texts))))
      text_BLD = np.asarray(self._apply(self._encoder.params, tokens_BL, mask_BL))
      for (clip_id, caption), text_LD, mask_L in zip(chunk, text_BLD, mask_BL, strict=False):
        yield clip_id, caption, text_LD[mask_L]


def _share(clips: np.ndarray) -> np.ndarray:
  """The clips of this process."""
  return clips[jax.process_index() :: jax.process_count()]


def _spread() -> tuple[NamedSharding, int]:
  """Rows over the devices of this process, and their number."""
  devices = jax.local_devices()
  return NamedSharding(Mesh(np.array(devices), ("rows",)), P("rows")), len(devices)


def _decoded(
  source: ClipSource, bucket: Bucket, clips: Sequence[int], failed: dict[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
  """(clip id, frames) of each clip that decodes, in order, decoded ahead by threads; the others go into `failed`."""

  def decode(clip: int) -> np.ndarray | DataError:
    start_s = max(buckets_lib.slack_s(source.info(clip), bucket), 0.0) / 2
    times_s = start_s + np.arange(bucket.frames) / bucket.fps
    try:
      return source.frames(clip, times_s, bucket.height, bucket.width)
    except DataError as error:
      return error

  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    ahead: list[tuple[str, concurrent.futures.Future[np.ndarray | DataError]]] = []
    remaining = iter(clips)
    while True:
      for clip in itertools.islice(remaining, 2 * THREADS - len(ahead)):
        ahead.append((source.info(clip).clip_id, pool.submit(decode, clip)))
      if not ahead:
        return
      clip_id, future = ahead.pop(0)
      frames = future.result()
      if isinstance(frames, DataError):
        failed[clip_id] = str(frames)
      else:
        yield clip_id, frames


def _batches(items: Iterable[tuple[str, np.ndarray]], rows: int) -> Iterator[tuple[list[str], np.ndarray]]:
  items = iter(items)
  while chunk := list(itertools.islice(items, rows)):
    yield [name for name, _ in chunk], np.stack([frames for _, frames in chunk])


def _fill(frames_BTHWC: np.ndarray, rows: int) -> np.ndarray:
  """Repeats the last row up to `rows`, so that every call has the shape that is compiled."""
  return np.concatenate([frames_BTHWC, np.repeat(frames_BTHWC[-1:], rows - len(frames_BTHWC), axis=0)])


@dataclasses.dataclass
class Moments:
  """Count, sum and sum of squares of all values that went by, in float64."""

  count: int = 0
  sum: float = 0.0
  squares: float = 0.0

  def add(self, values: Any) -> None:
    values = np.asarray(values, np.float64)
    self.count += values.size
    self.sum += float(values.sum())
    self.squares += float(np.square(values).sum())

  def __add__(self, other: "Moments") -> "Moments":
    return Moments(self.count + other.count, self.sum + other.sum, self.squares + other.squares)

  def result(self) -> tuple[float, float]:
    """Mean and standard deviation."""
    mean = self.sum / max(self.count, 1)
    return mean, max(self.squares / max(self.count, 1) - mean**2, 0.0) ** 0.5
