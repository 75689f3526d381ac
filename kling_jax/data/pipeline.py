"""Batches as a pure function of (sources, seed, step): random access, so that resuming needs the step alone.

    step --Schedule--> (bucket, k) --> rows k * B .. (k + 1) * B of the bucket's endless stream of clips
    stream of a bucket: sources mixed by weight, the clips of each in an order reshuffled every epoch
    row --> clip, start of its frames, flip: from the seed and the row's place in the stream

A process builds the rows [p B / P, (p + 1) B / P) of each global batch; concatenated over the processes they are the
same bytes for every number of processes, threads and workers.
"""

import dataclasses
import hashlib
import heapq
import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kling_jax.data import buckets as buckets_lib
from kling_jax.data import mixture as mixture_lib
from kling_jax.data import order
from kling_jax.data.buckets import Bucket
from kling_jax.data.cache import LatentCache, TextCache, pad_text, text_variant
from kling_jax.data.conditions import Percentiles
from kling_jax.data.mixture import Mixture
from kling_jax.data.source import ClipInfo
from kling_jax.data.stream import FAILURES_IN_A_ROW, Batch, StepBatches
from kling_jax.errors import ConfigError, DataError, nearest

log = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Row:
  """Where one row of a batch comes from: a clip of the mixture and the frames that it shows."""

  clip: int
  info: ClipInfo
  start_s: float
  flip: bool


class Batches(StepBatches):
  """The batches of one split of a mixture, as this process sees them; picklable.

  Keys of a batch, B = rows of this process:
    frames uint8 (B, T, H, W, 3), or latents (B, t, h, w, c) from caches;
    tokens int32 (B, L) and tokens_mask bool (B, L), or text (B, L, D) and text_mask bool (B, L) from caches;
    scores float32 (B, M) in [0, 1000] and scores_known bool (B, M); fps float32 (B,);
    index uint32 (B,): row in the global batch (in the table for `fixed_rows`).

  Attributes:
    report: what became of every clip of the mixture (both splits).
    buckets, sizes: the buckets that have clips, and the global batch size of each.
    failed: {clip id: message} of clips that could not be decoded, seen by this process so far.
  """

  def __init__(
    self,
    sources: Mixture,
    *,
    buckets: Sequence[Bucket | tuple[int, int, int]],
    fps: float | None = None,
    batch: int | None = None,
    token_budget: int | None = None,
    tokens_of: Callable[[Bucket], int] | None = None,
    weigh: str = "clips",
    seed: int = 0,
    split: str = "train",
    validation_fraction: float = 0.0,
    limits: buckets_lib.Limits = buckets_lib.Limits(),
    flip: bool = False,
    tokenizer: Tokenizer | None = None,
    percentiles: Percentiles = Percentiles(()),
    caption: Callable[[ClipInfo], str] | None = None,
    latents: Sequence[LatentCache] = (),
    texts: Sequence[TextCache] = (),
    text_length: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    multiple_of: int = 1,
  ):
    """Sorts the clips into buckets and plans the run; decodes nothing.

    Args:
      sources: the clips.
      buckets: `Bucket`s, or (frames, height, width) that all have `fps`.
      fps: frames a second of buckets given as triples.
      batch: clips a global batch; or None, and then
      token_budget: most tokens a global batch, counted by
      tokens_of: the tokens of one clip of a bucket (its pixels where None).
      weigh: "clips" shows every clip equally often; "tokens" in proportion to its bucket's tokens.
      seed: of order, mixture, starts and flips.
      split: "train" or "validation".
      validation_fraction: part of the videos that is held out (`mixture.held_out`).
      limits: what a clip may suffer to fit a bucket.
      flip: mirror half of the rows; off where captions name left and right.
      tokenizer: captions -> tokens, mask. Not used where `texts` is given.
      percentiles: the conditions, in the model's order.
      caption: the text that the tokenizer is given of a clip; None: its caption.
      latents: one cache a source; replaces decoding.
      texts: one cache a source; replaces the tokenizer. `text_length` is the row length L.
      process_index, process_count: this process, and how many share a global batch.
      multiple_of: what the mesh and the accumulation divide a global batch by.

    Raises:
      ConfigError: sizes that do not divide, unknown names.
      DataError: nothing is left to train on, or a cache lacks clips.
    """
    _check_choice("split", split, mixture_lib.SPLITS)
    _check_choice("weigh", weigh, ("clips", "tokens"))
    for name, caches in (("latents", latents), ("texts", texts)):
      if caches and len(caches) != len(sources.sources):
        raise ConfigError(f"{len(caches)} caches of {name} for {len(sources.sources)} sources; give one a source")
    if flip and latents:
      raise ConfigError("flip mirrors frames, not cached latents; turn one of the two off")
    if not 0 <= process_index < process_count:
      raise ConfigError(f"process_index {process_index} is not one of {process_count} processes")
    self.sources, self.seed, self.split, self.flip = sources, seed, split, flip
    self.tokenizer, self.percentiles, self.caption = tokenizer, percentiles, caption
    self.latents, self.texts, self.text_length = tuple(latents), tuple(texts), text_length
    self.process_index, self.process_count = process_index, process_count
    super().__init__()

    asked = tuple(_bucket(bucket, fps) for bucket in buckets)
    videos: list[str] = []
    members, self.report = buckets_lib.assign(self._checked(videos), asked, limits)
    if self.report.dropped or not all(self.report.clips):
      log.warning("clips were dropped, or buckets stay empty\n%s", self.report)
    members = self._of_split(members, videos, validation_fraction)
    held = [b for b, clips in enumerate(members) if len(clips)]
    self.buckets = tuple(asked[b] for b in held)
    self.clips = tuple(members[b] for b in held)
    self.multiple_of = int(np.lcm(multiple_of, process_count))
    costs = [tokens_of(bucket) if tokens_of else bucket.pixels for bucket in self.buckets]
    self.sizes = buckets_lib.batch_sizes(
      self.buckets, batch=batch, token_budget=token_budget, tokens=costs, multiple_of=self.multiple_of
    )
    self._check_caches()
    self._plan(costs if weigh == "tokens" else [1] * len(costs))

  def _checked(self, videos: list[str]) -> Iterator[ClipInfo]:
    """The headers of all clips in one pass; notes their videos and refuses scores of other scorers before the run."""
    for info in self.sources.infos():
      self.percentiles.of_clip(info.scores, f"clip {info.clip_id}")
      videos.append(mixture_lib.video_of(info))
      yield info

  def _of_split(self, members: Sequence[np.ndarray], videos: Sequence[str], fraction: float) -> tuple[np.ndarray, ...]:
    held_out = mixture_lib.held_out({videos[clip] for clips in members for clip in clips}, fraction)
    wanted = self.split == "validation"
    return tuple(np.asarray([c for c in clips if (videos[c] in held_out) == wanted], np.int64) for clips in members)

  def _check_caches(self) -> None:
    """Asks the caches for every clip before the run, not at step 5,000."""
    for kind, caches in (("latents", self.latents), ("text", self.texts)):
      for source, cache in enumerate(caches):
        wanted = []
        for bucket, clips in zip(self.buckets, self.clips, strict=True):
          for info in map(self.sources.info, clips[self.sources.source_of(clips) == source].tolist()):
            wanted.append((info.clip_id, bucket.name if kind == "latents" else text_variant(info.caption)))
        missing = cache.missing(wanted)
        if missing:
          raise DataError(
            f"{cache.folder} lacks the {kind} of {len(missing)} of {len(wanted)} clips, first {missing[0]!r}; run "
            "`kling encode` for this set with the encoder and the buckets of the config"
          )

  def _plan(self, costs: Sequence[int]) -> None:
    """The schedule of steps over buckets, and in each bucket of rows over sources."""
    names = range(len(self.sources.sources))
    parts = [[clips[self.sources.source_of(clips) == source] for source in names] for clips in self.clips]
    whole = [sum(len(split[source]) for split in parts) for source in names]
    rates = [mixture_lib.rates([len(part) for part in split], whole, self.sources.weights) for split in parts]
    self._mixed: list[tuple[order.Schedule | None, list[np.ndarray]]] = []
    for b, (split, rate) in enumerate(zip(parts, rates, strict=True)):
      if self.sources.weights:
        self._mixed.append((order.Schedule(rate, f"{self._tag(b)}/sources"), split))
      else:  # one permutation over the clips of all sources
        self._mixed.append((None, [self.clips[b]]))
    weights = [sum(rate) * cost / size for rate, cost, size in zip(rates, costs, self.sizes, strict=True)]
    self.schedule = order.Schedule(weights, f"{self.seed}/buckets") if weights else None

  # ---- which clip stands where -------------------------------------------------------------------------------------

  def _tag(self, b: int) -> str:
    """Names the streams of bucket b; by its shape, so that further buckets leave its order alone."""
    return f"{self.seed}/{self.buckets[b].name}"

  def _clip(self, b: int, place: int) -> int:
    """The clip at `place` of bucket b's stream: the source by weight, then its clips, reshuffled every epoch."""
    mixed, parts = self._mixed[b]
    part, k = mixed.at(place) if mixed else (0, place)
    clips = parts[part]
    return int(clips[order.shuffled(f"{self._tag(b)}/{part}", k, len(clips))])

  def at(self, step: int) -> tuple[int, range]:
    """The bucket of `step`, and the places in its stream that this process builds.

    Raises:
      DataError: the split holds no clips.
    """
    if self.schedule is None:
      raise DataError(f"the {self.split} split holds no clips; raise data.validation_fraction, or add videos")
    b, k = self.schedule.at(step)
    return b, self._slice(k * self.sizes[b], self.sizes[b])

  def _slice(self, start: int, size: int) -> range:
    rows = size // self.process_count
    return range(start + self.process_index * rows, start + (self.process_index + 1) * rows)

  def _row(self, b: int, place: int) -> Row:
    """The row at `place` of bucket b's stream; two draws place it in its clip."""
    late, side = order.draws(f"{self._tag(b)}/row", place, 2)
    clip = self._clip(b, place)
    info = self.sources.info(clip)
    slack_s = max(buckets_lib.slack_s(info, self.buckets[b]), 0.0)
    return Row(clip, info, slack_s * (int(late) / 2**64), self.flip and bool(int(side) >> 63))

  # ---- building ----------------------------------------------------------------------------------------------------

  def _build(self, step: int) -> tuple[Batch, list[tuple[str, str]]]:
    """The batch of `step`, and (clip id, message) of each clip that was replaced in it."""
    b, places = self.at(step)
    size = self.sizes[b]
    return self._stack(b, [self._row(b, place) for place in places], [place % size for place in places])

  def _stack(self, b: int, rows: Sequence[Row], index: Sequence[int]) -> tuple[Batch, list[tuple[str, str]]]:
    failures: list[tuple[str, str]] = []
    shown = [self._shown(b, row, failures) for row in rows]
    pictures, infos, clips = [p for p, _, _ in shown], [i for _, i, _ in shown], [c for _, _, c in shown]
    batch = {"latents" if self.latents else "frames": np.stack(pictures)}
    captions = [info.caption for info in infos]
    if self.texts:
      owners = self.sources.source_of(np.asarray(clips))
      texts = [self.texts[s].get(info.clip_id, info.caption) for s, info in zip(owners, infos, strict=True)]
      batch["text"], batch["text_mask"] = pad_text(texts, self.text_length)
    elif self.tokenizer is not None:
      written = captions if self.caption is None else [self.caption(info) for info in infos]
      batch["tokens"], batch["tokens_mask"] = self.tokenizer(written)
    told = [self.percentiles.of_clip(info.scores, f"clip {info.clip_id}") for info in infos]
    batch["scores"] = np.stack([u_M for u_M, _ in told])
    batch["scores_known"] = np.stack([known_M for _, known_M in told])
    batch["fps"] = np.full(len(rows), self.buckets[b].fps, np.float32)
    batch["index"] = np.asarray(index, np.uint32)
    return batch, failures

  def _shown(self, b: int, row: Row, failures: list[tuple[str, str]]) -> tuple[np.ndarray, ClipInfo, int]:
    """(frames or latents, header, number) of a row's clip; where it cannot be decoded, of the bucket's next clip.

    The choice depends on the files alone, never on what this run saw before, so every run and process agrees.
    """
    bucket, clips = self.buckets[b], self.clips[b]
    if self.latents:
      cache = self.latents[self.sources.find(row.clip)[0]]
      return cache.get(row.info.clip_id, bucket.name), row.info, row.clip
    first = int(np.searchsorted(clips, row.clip))
    tries = min(FAILURES_IN_A_ROW, len(clips))
    clip, info = row.clip, row.info
    for ahead in range(1, tries + 1):
      start_s = min(row.start_s, max(buckets_lib.slack_s(info, bucket), 0.0))
      times_s = start_s + np.arange(bucket.frames) / bucket.fps
      try:
        frames_THWC = self.sources.frames(clip, times_s, bucket.height, bucket.width)
      except DataError as error:
        failures.append((info.clip_id, str(error)))
        clip = int(clips[(first + ahead) % len(clips)])
        info = self.sources.info(clip)
        continue
      return frames_THWC[:, :, ::-1] if row.flip else frames_THWC, info, clip
    raise DataError(
      f"{tries} clips of bucket {bucket.name} that follow each other cannot be decoded, the last one: "
      f"{failures[-1][1]}; check the set with `kling data verify`"
    )

  @property
  def clip_count(self) -> int:
    return sum(len(clips) for clips in self.clips)

  # ---- the fixed table ---------------------------------------------------------------------------------------------

  def fixed_rows(self, count: int) -> list[Batch]:
    """A table of at least `count` rows that never changes: clips in the order of their ids' hashes, centred in time.

    Buckets share the rows by their clips. A bucket's rows go round its clips, so that few clips fill many rows (whose
    times and noises differ by `index`, the row's number in the whole table). Batches have the bucket's size, or less
    where the table is smaller: what `count` needs, rounded up to what the mesh divides.

    Returns:
      This process's part of each batch; [] where the split holds no clips.
    """
    table: list[Batch] = []
    number = 0
    total = sum(len(clips) for clips in self.clips)
    for b, (bucket, clips) in enumerate(zip(self.buckets, self.clips, strict=True)):
      wanted = -(-count * len(clips) // total)
      size = min(self.sizes[b], -(-wanted // self.multiple_of) * self.multiple_of)
      wanted = -(-wanted // size) * size
      chosen = heapq.nsmallest(wanted, clips.tolist(), key=self._hash_of)
      infos = [self.sources.info(clip) for clip in chosen]
      late = [max(buckets_lib.slack_s(info, bucket), 0.0) / 2 for info in infos]
      rows = [Row(*row, flip=False) for row in zip(chosen, infos, late, strict=True)]
      for start in range(0, wanted, size):
        places = self._slice(start, size)
        batch, failures = self._stack(b, [rows[p % len(rows)] for p in places], [number + p for p in places])
        self._note(failures, 0)
        table.append(batch)
      number += wanted
    return table

  def _hash_of(self, clip: int) -> bytes:
    return hashlib.blake2b(self.sources.info(clip).clip_id.encode(), digest_size=16).digest()


def _bucket(bucket: Bucket | Sequence[int], fps: float | None) -> Bucket:
  if isinstance(bucket, Bucket):
    return bucket
  if len(bucket) != 3 or fps is None:
    raise ConfigError(f"bucket {tuple(bucket)} must be (frames, height, width), with data.fps beside it")
  return Bucket(int(bucket[0]), int(bucket[1]), int(bucket[2]), float(fps))


def _check_choice(name: str, value: str, legal: Sequence[str]) -> None:
  if value not in legal:
    raise ConfigError(f"{name} is {value!r}{nearest(value, legal)}")
