"""Walks: rows of several clips that follow each other, for models that go on from what they have seen.

    video -> its clips in order -> pieces of about T / fps seconds without gaps -> rows of O pieces in a row

A piece is T frames spread evenly over its span (start, start + length]: frame k is shown at start + (k + 1) length / T,
so that the last frame of a piece is the picture from which the next one goes on, and `image`, at the start of the
first piece, is the picture before all of them. Pieces of a clip fill it whole; their frame rate is what that makes of
it, within `STRETCH` of the wished one. A piece has a cut before it where its clip has one, or where the clip before it
is missing. Batch i is a pure function of (sources, seed, i).
"""

import dataclasses
import hashlib
import logging
import typing
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from kling_jax.data import memory, order
from kling_jax.data import mixture as mixture_lib
from kling_jax.data.dense_captions import DenseCaptions, named
from kling_jax.data.mixture import Mixture
from kling_jax.data.source import ClipInfo, ClipSource
from kling_jax.data.stream import FAILURES_IN_A_ROW, Batch, StepBatches
from kling_jax.errors import ConfigError, DataError, nearest

log = logging.getLogger(__name__)

STRETCH = 1.5  # most that the frame rate of a piece may differ from the wished one
SLACK_S = 0.1  # less than this between two clips is no gap


@typing.runtime_checkable
class Scripted(typing.Protocol):
  """What a source of made-up walks knows beyond a `ClipSource`; see `memory_world_frames.MemoryWorld`."""

  def dynamics(self, index: int) -> str: ...

  def scene(self, index: int) -> str: ...

  def determined(self, index: int) -> bool: ...

  def fresh(self, index: int) -> bool: ...

  def truth(self, index: int, times_s: np.ndarray, height: int, width: int) -> typing.Any: ...


@dataclasses.dataclass(frozen=True)
class Piece:
  """T frames of a clip: seconds (start_s, start_s + length_s] from the clip's start; `clip` counts in the mixture."""

  clip: int
  start_s: float
  length_s: float
  cut: bool
  dynamics: str
  fresh: bool = True  # a row may begin here


@dataclasses.dataclass(frozen=True)
class Row:
  """One walk as it is read.

  Attributes:
    frames_OTHWC: uint8 frames; image_HWC: uint8, the picture before them.
    prompt: what the walk starts from: the text of its video's first scene, or of its first piece.
    dynamics: O texts, each of what its piece shows.
    cut_O: bool, a cut lies directly before the piece; fps_O: float32.
    determined_O: bool, the text follows from what was before; None where nobody knows.
    truth: O records of what is true in the frames; () where nobody knows.
    clip_ids: of the pieces' clips.
  """

  frames_OTHWC: np.ndarray
  image_HWC: np.ndarray
  prompt: str
  dynamics: tuple[str, ...]
  cut_O: np.ndarray
  fps_O: np.ndarray
  determined_O: np.ndarray | None
  truth: tuple[typing.Any, ...]
  clip_ids: tuple[str, ...]


Shots = Mapping[str, Sequence[tuple[float, float]]]
Tokenizer = typing.Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


class Walks(StepBatches):
  """The walks of one split of a mixture, as this process sees them; picklable.

  Keys of a batch, B = rows of this process:
    frames uint8 (B, O, T, H, W, 3); image uint8 (B, H, W, 3); cut bool (B, O); fps float32 (B, O);
    prompt int32 (B, L), dynamics int32 (B, O, L) and prompt_mask, dynamics_mask bool, where there are tokenizers;
    index uint32 (B,): row in the global batch (in the table for `fixed_rows`).

  Attributes:
    videos: the pieces of every video that is long enough, in order.
    short: how many videos are not, and the longest of them in pieces.
    failed: {clip id: message} of clips that could not be decoded, seen by this process so far.
  """

  def __init__(
    self,
    sources: Mixture,
    *,
    clips: int,
    frames: int,
    height: int,
    width: int,
    fps: float,
    batch: int,
    seed: int = 0,
    split: str = "train",
    validation_fraction: float = 0.0,
    captions: DenseCaptions | None = None,
    shots: Shots | None = None,
    prompt_tokenizer: Tokenizer | None = None,
    dynamics_tokenizer: Tokenizer | None = None,
    process_index: int = 0,
    process_count: int = 1,
    multiple_of: int = 1,
  ):
    """Lays out the pieces of all videos; decodes nothing.

    Args:
      sources: the clips; those of one `video_id` are a video, in the order of `index`.
      clips: pieces a row (O).
      frames: frames a piece (T).
      height, width: of the frames.
      fps: wished frames a second. A procedural world has its own clips: frames / fps must be their length.
      batch: rows a global batch.
      seed: of the order and the starts.
      split: "train" or "validation"; videos are held out whole (`mixture.held_out`).
      captions: sentences with times, which replace the clips' captions where they overlap. Scenes of Vript, which are
        files of their own, become videos again, with a cut before each.
      shots: of the videos, in seconds (`dense_captions.read_shots`): no piece straddles a cut. Clip sets need none.
      prompt_tokenizer, dynamics_tokenizer: texts -> tokens, mask.
      process_index, process_count: this process, and how many share a global batch.
      multiple_of: what the mesh and the accumulation divide a global batch by.

    Raises:
      ConfigError: sizes that do not divide or are below 1, an unknown split, a frame rate that a world does not have.
      DataError: no video is long enough; names the largest legal `clips`.
    """
    if split not in mixture_lib.SPLITS:
      raise ConfigError(f"split is {split!r}{nearest(split, mixture_lib.SPLITS)}")
    if min(clips, frames, height, width) < 1 or fps <= 0:
      raise ConfigError(f"clips={clips}, frames={frames}, height={height}, width={width}, fps={fps}: want at least 1")
    needed = int(np.lcm(multiple_of, process_count))
    if batch < 1 or batch % needed:
      legal = f"{max(batch // needed, 1) * needed} or {(batch // needed + 1) * needed}"
      raise ConfigError(f"batch is {batch}; it must be a multiple of {needed}, for example {legal}")
    if not 0 <= process_index < process_count:
      raise ConfigError(f"process_index {process_index} is not one of {process_count} processes")
    super().__init__()
    self.sources, self.seed, self.split = sources, seed, split
    self.clips, self.frames, self.height, self.width = clips, frames, height, width
    self.batch, self.multiple_of = batch, needed
    self.process_index, self.process_count = process_index, process_count
    self.prompt_tokenizer, self.dynamics_tokenizer = prompt_tokenizer, dynamics_tokenizer
    every = _videos(sources, frames / fps, captions, shots or {})
    held = mixture_lib.held_out(every, validation_fraction)
    chosen = {name: pieces for name, pieces in every.items() if (name in held) == (split == "validation")}
    self.videos = {name: pieces for name, pieces in chosen.items() if _starts(pieces, clips)}
    longest = max((len(pieces) for name, pieces in chosen.items() if name not in self.videos), default=0)
    self.short = (len(chosen) - len(self.videos), longest)
    if every and not any(_starts(pieces, clips) for pieces in every.values()):
      most = max(len(pieces) for pieces in every.values())
      raise DataError(
        f"no video has {clips} pieces of {frames} frames at {fps:g} fps in a row; the longest has {most}: lower "
        "`clips` to at most that, raise `fps`, or add longer videos"
      )
    if self.short[0]:
      log.warning("%d videos of the %s split have fewer than %d pieces and are left out", self.short[0], split, clips)
    self._names = list(self.videos)
    self._plan()

  def _plan(self) -> None:
    """The videos of each source, and the schedule of rows over sources."""
    owners = [int(self.sources.source_of(np.asarray(self.videos[name][0].clip))) for name in self._names]
    count = len(self.sources.sources)
    self._parts = [[k for k, owner in enumerate(owners) if owner == source] for source in range(count)]
    rates = mixture_lib.rates([len(p) for p in self._parts], [len(p) for p in self._parts], self.sources.weights)
    self._mixed = order.Schedule(rates, f"{self.seed}/walks/sources") if self.sources.weights and any(rates) else None

  @property
  def clip_count(self) -> int:
    return len({piece.clip for pieces in self.videos.values() for piece in pieces})

  # ---- which walk stands where -------------------------------------------------------------------------------------

  def at(self, place: int) -> tuple[str, int]:
    """The (video, first piece) of the row at `place` of the endless stream of rows.

    Raises:
      DataError: the split holds no walks.
    """
    if not self._names:
      raise DataError(f"the {self.split} split holds no walks; raise data.validation_fraction, or add videos")
    source, k = self._mixed.at(place) if self._mixed else (0, place)
    videos = self._parts[source] if self._mixed else range(len(self._names))
    name = self._names[videos[order.shuffled(f"{self.seed}/walks/{source}", k, len(videos))]]
    starts = _starts(self.videos[name], self.clips)
    draw = int(order.draws(f"{self.seed}/walks/start", place, 1)[0])
    return name, starts[draw * len(starts) >> 64]

  def _places(self, step: int) -> range:
    share = self.batch // self.process_count
    start = step * self.batch + self.process_index * share
    return range(start, start + share)

  # ---- building ----------------------------------------------------------------------------------------------------

  def row(self, video: str, first: int, clips: int | None = None) -> Row:
    """The walk of `clips` pieces (O where None) of `video` from piece `first` on, with texts and truth.

    Raises:
      DataError: the media cannot be decoded.
      IndexError: the video has no such pieces.
    """
    pieces = self.videos[video][first : first + (clips or self.clips)]
    if first < 0 or len(pieces) < (clips or self.clips):
      raise IndexError(f"video {video} has {len(self.videos[video])} pieces, not {clips or self.clips} from {first} on")
    frames, truths, determined = [], [], []
    for piece in pieces:
      source, index = self.sources.find(piece.clip)
      world = _script(self.sources.sources[source])
      times_s = self._times(piece)
      frames.append(self.sources.frames(piece.clip, times_s, self.height, self.width))
      if world is not None:
        truths.append(world.truth(index, times_s, self.height, self.width))
        determined.append(world.determined(index))
    start = pieces[0]
    source, index = self.sources.find(start.clip)
    world = _script(self.sources.sources[source])
    return Row(
      frames_OTHWC=np.stack(frames),
      image_HWC=self.sources.frames(start.clip, np.array([start.start_s]), self.height, self.width)[0],
      prompt=world.scene(index) if world is not None else start.dynamics,
      dynamics=tuple(piece.dynamics for piece in pieces),
      cut_O=np.array([piece.cut and k > 0 for k, piece in enumerate(pieces)]),
      fps_O=np.array([self.frames / piece.length_s for piece in pieces], np.float32),
      determined_O=np.array(determined) if len(determined) == len(pieces) else None,
      truth=tuple(truths) if len(truths) == len(pieces) else (),
      clip_ids=tuple(self.sources.info(piece.clip).clip_id for piece in pieces),
    )

  def _times(self, piece: Piece) -> np.ndarray:
    return piece.start_s + np.arange(1, self.frames + 1) / self.frames * piece.length_s

  def _build(self, step: int) -> tuple[Batch, list[tuple[str, str]]]:
    places = self._places(step)
    failures: list[tuple[str, str]] = []
    rows = [self._readable(*self.at(place), failures) for place in places]
    return self._stack(rows, [place % self.batch for place in places]), failures

  def _readable(self, video: str, first: int, failures: list[tuple[str, str]]) -> Row:
    """The row, or where it cannot be decoded the first one of the next video; the same for every run and process."""
    tries = min(FAILURES_IN_A_ROW, len(self._names))
    for _ in range(tries):
      try:
        return self.row(video, first)
      except DataError as error:
        failures.append((self.sources.info(self.videos[video][first].clip).clip_id, str(error)))
        video = self._names[(self._names.index(video) + 1) % len(self._names)]
        first = _starts(self.videos[video], self.clips)[0]
    raise DataError(
      f"{tries} videos that follow each other cannot be decoded, the last one: {failures[-1][1]}; check the set with "
      "`kling data verify`"
    )

  def _stack(self, rows: Sequence[Row], index: Sequence[int]) -> Batch:
    batch = {
      "frames": np.stack([row.frames_OTHWC for row in rows]),
      "image": np.stack([row.image_HWC for row in rows]),
      "cut": np.stack([row.cut_O for row in rows]),
      "fps": np.stack([row.fps_O for row in rows]),
      "index": np.asarray(index, np.uint32),
    }
    if self.prompt_tokenizer is not None:
      batch["prompt"], batch["prompt_mask"] = self.prompt_tokenizer([row.prompt for row in rows])
    if self.dynamics_tokenizer is not None:
      tokens_NL, mask_NL = self.dynamics_tokenizer([text for row in rows for text in row.dynamics])
      shape = (len(rows), self.clips, tokens_NL.shape[1])
      batch["dynamics"], batch["dynamics_mask"] = tokens_NL.reshape(shape), mask_NL.reshape(shape)
    return batch

  # ---- the fixed table ---------------------------------------------------------------------------------------------

  def fixed(self, count: int) -> list[tuple[str, int]]:
    """(video, first piece) of `count` walks that never change: videos by the hash of their name, from their start.

    Goes round the videos where there are fewer, each time one legal start later.
    """
    ordered = sorted(self._names, key=lambda name: hashlib.blake2b(name.encode(), digest_size=16).digest())
    chosen = []
    for number in range(count if ordered else 0):
      name = ordered[number % len(ordered)]
      starts = _starts(self.videos[name], self.clips)
      chosen.append((name, starts[number // len(ordered) % len(starts)]))
    return chosen

  def fixed_rows(self, count: int) -> list[Batch]:
    """This process's part of a table of at least `count` rows (see `fixed`); [] where there are no walks."""
    if not self._names:
      return []
    size = min(self.batch, -(-count // self.multiple_of) * self.multiple_of)
    wanted = -(-count // size) * size
    table, walks = [], self.fixed(wanted)
    share = size // self.process_count
    for start in range(0, wanted, size):
      mine = range(start + self.process_index * share, start + (self.process_index + 1) * share)
      failures: list[tuple[str, str]] = []
      rows = [self._readable(*walks[k], failures) for k in mine]
      table.append(self._stack(rows, list(mine)))
      self._note(failures, 0)
    return table


def _script(source: ClipSource) -> Scripted | None:
  """What a source of made-up walks knows, also behind a memory; None for all others."""
  inner = source.source if isinstance(source, memory.MemorySource) else source
  return inner if isinstance(inner, Scripted) else None


def _starts(pieces: Sequence[Piece], clips: int) -> list[int]:
  """Pieces with which a row of `clips` may begin."""
  return [k for k in range(len(pieces) - clips + 1) if pieces[k].fresh]


def _videos(
  sources: Mixture, length_s: float, captions: DenseCaptions | None, shots: Shots
) -> dict[str, tuple[Piece, ...]]:
  """The pieces of every video, by "source number/video id" (the id alone where there is one source)."""
  members: dict[str, list[tuple[int, int, ClipInfo]]] = {}
  for number, info in enumerate(sources.infos()):
    source = int(sources.source_of(np.asarray(number)))
    name, index = mixture_lib.video_of(info), info.index
    scene = DenseCaptions.place(name) if captions is not None else None
    if scene is not None:
      name, index = scene
    members.setdefault(name if len(sources.sources) == 1 else f"{source}/{name}", []).append((index, number, info))
  videos = {}
  for name, clips in members.items():
    clips.sort(key=lambda clip: clip[:2])
    videos[name] = tuple(_pieces(sources, clips, length_s, captions, shots))
  return videos


def _pieces(
  sources: Mixture,
  clips: Sequence[tuple[int, int, ClipInfo]],
  length_s: float,
  captions: DenseCaptions | None,
  shots: Shots,
) -> Iterable[Piece]:
  """The pieces of one video's clips, in order; what is too short to give one leaves a cut."""
  goes_on: int | None = None  # the index that the next clip has if nothing is missing between
  for index, number, info in clips:
    source, within = sources.find(number)
    world = _script(sources.sources[source])
    if world is not None:
      if abs(info.duration_s - length_s) > 1e-6:
        raise ConfigError(
          f"clips of {info.video_id} last {info.duration_s:g} s, not {length_s:g}: set fps to "
          f"frames / {info.duration_s:g}"
        )
      fresh, dynamics = world.fresh(within), world.dynamics(within)
      yield Piece(number, 0.0, length_s, info.cut_before, dynamics, fresh)
      continue
    cut = info.cut_before or index != goes_on
    for start_s, end_s in _spans(info, shots):
      cut = cut or start_s > 0
      count = round((end_s - start_s) / length_s)
      part = (end_s - start_s) / max(count, 1)
      if count < 1 or not 1 / STRETCH <= part / length_s <= STRETCH:
        cut, goes_on = True, None
        continue
      for k in range(count):
        span = start_s + k * part, start_s + (k + 1) * part
        yield Piece(number, span[0], part, cut and k == 0, _text(info, span, captions))
      cut, goes_on = False, index + 1 if end_s >= info.duration_s - SLACK_S else None


def _spans(info: ClipInfo, shots: Shots) -> list[tuple[float, float]]:
  """The shots of a clip, in seconds from its start; the whole clip where none are known."""
  known = named(shots, info.video_id)
  if known is None:
    return [(0.0, info.duration_s)]
  within = [(max(a - info.start_s, 0.0), min(b - info.start_s, info.duration_s)) for a, b in known]
  return [(a, b) for a, b in within if b > a]


def _text(info: ClipInfo, span: tuple[float, float], captions: DenseCaptions | None) -> str:
  said = captions.of(info.video_id, info.start_s + span[0], info.start_s + span[1]) if captions is not None else ""
  return said or info.caption
