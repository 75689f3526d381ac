"""Batches of edited films as thumbnails, with labels at every step between frames: what the splitter's network eats.

Film i is a pure function of (footage, seed, i), and batch s of (films, seed, s). Footage is what the user has, mixed
with scenes of dead leaves and with the procedural world, so that a few videos do not make all that the network knows.
"""

import dataclasses
import functools
import os
from collections.abc import Generator, Sequence
from typing import Any

import cv2
import grain
import numpy as np

from kling_jax.data import decode, edits, leaves, thumbnail, worlds
from kling_jax.errors import ConfigError, DataError

KINDS = edits.KINDS
HEIGHT, WIDTH = 54, 96  # pixels at which films are rendered
PIECES = 6  # of footage that a film is cut from
SCENES, SCENE_FRAMES = 200, 48  # of leaves; a quarter as many of the world
SHARES = (0.6, 0.3, 0.1)  # of the pieces: footage, leaves, world


@functools.cache
def load(path: str) -> np.ndarray:
  """All frames of a video at 54 x 96: uint8 (T, 54, 96, 3).

  Raises:
    MediaError: it cannot be decoded.
  """
  return np.stack([frame for _, _, frame in decode.iterate(path, size=(HEIGHT, WIDTH))])


@functools.cache
def scene(seed: int, kind: str, index: int) -> np.ndarray:
  """A procedural shot, uint8 (48, 54, 96, 3)."""
  if kind == "leaves":
    return leaves.scene((seed, index), SCENE_FRAMES, HEIGHT, WIDTH)
  script = worlds.script("shapes-v1", seed, index)
  return worlds.render(script, np.arange(SCENE_FRAMES) / worlds.FPS, HEIGHT, WIDTH)


@dataclasses.dataclass(frozen=True)
class Labels:
  """What a film is at each of its T - 1 steps.

  Attributes:
    inside: float32, 1 where the step belongs to a transition.
    middle: float32, 1 at a transition's middle, falling to 0 beside it.
    kind: int32 index into KINDS; -1 outside.
  """

  inside: np.ndarray
  middle: np.ndarray
  kind: np.ndarray

  @classmethod
  def of(cls, transitions: Sequence[edits.Edit], num_frames: int) -> "Labels":
    inside, middle = np.zeros((2, num_frames - 1), np.float32)
    kind = np.full(num_frames - 1, -1, np.int32)
    steps = np.arange(num_frames - 1)
    for edit in transitions:
      start, end = edit.start_frame, edit.end_frame
      inside[start:end], kind[start:end] = 1, KINDS.index(edit.kind)
      width = 0.5 if end - start == 1 else 1.0 if end - start <= 3 else 2.0
      middle = np.maximum(middle, 1 - np.abs(steps - (start + end - 1) / 2) / width).astype(np.float32)
    return cls(inside, middle, kind)

  def reversed(self) -> "Labels":
    return Labels(self.inside[::-1], self.middle[::-1], self.kind[::-1])


class Films:
  """`count` films of `num_frames` frames; each is rendered when first asked for, and its thumbnails are kept."""

  def __init__(self, footage: Sequence[str], count: int, num_frames: int, seed: int, scenes: int = SCENES):
    """Opens nothing yet.

    Args:
      footage: paths of videos, each a single shot. scenes: number of procedural ones beside them.

    Raises:
      ConfigError: fewer than one film, or of fewer than two frames.
      DataError: a path that is no file.
    """
    if count < 1 or num_frames < 2:
      raise ConfigError(f"{count} films of {num_frames} frames: wants at least one, of at least two frames")
    for path in footage:
      if not os.path.isfile(path):
        raise DataError(f"footage {path!r}: there is no such file")
    self.footage, self.num_frames, self.seed, self.scenes = tuple(footage), num_frames, seed, scenes
    self._kept: list[tuple[np.ndarray, Labels] | None] = [None] * count

  def __len__(self) -> int:
    return len(self._kept)

  def __getitem__(self, index: int) -> tuple[np.ndarray, Labels]:
    """Thumbnails uint8 (T, 3072) and labels of film `index`."""
    kept = self._kept[index]
    if kept is None:
      pieces = self._pieces(index)
      film = edits.plan(self.seed, index, self.num_frames, [len(piece) for piece in pieces])
      shown = [thumbnail.of_rgb(frame) for frame in edits.frames(film, pieces, HEIGHT, WIDTH)]
      kept = self._kept[index] = np.stack(shown), Labels.of(film.edits, self.num_frames)
    return kept

  def _pieces(self, index: int) -> list[np.ndarray]:
    rng = np.random.Generator(np.random.PCG64([self.seed, index, 1]))
    pieces = []
    for choice in rng.choice(3, PIECES, p=SHARES):
      if choice == 0 and self.footage:
        pieces.append(load(self.footage[rng.integers(len(self.footage))]))
      else:
        kind, count = ("world", max(1, self.scenes // 4)) if choice == 2 else ("leaves", self.scenes)
        pieces.append(scene(self.seed, kind, int(rng.integers(count))))
    return pieces


class Batches:
  """Batches of films, each shown mirrored, backwards or in other colours at random.

  Keys of a batch: thumbnails uint8 (B, T, 3072), inside and middle float32 (B, T - 1), kind int32 (B, T - 1), index
  uint32 (B,), the row in the global batch.
  """

  def __init__(
    self, films: Films, batch: int, seed: int, *, process_index: int = 0, process_count: int = 1, multiple_of: int = 1
  ):
    """
    Raises:
      ConfigError: the batch does not divide.
    """
    needed = int(np.lcm(multiple_of, process_count))
    if batch % needed:
      raise ConfigError(f"config key 'data.batch' = {batch} must be a multiple of {needed}")
    share = batch // process_count
    self._films, self._batch, self._seed = films, batch, seed
    self._rows = range(process_index * share, (process_index + 1) * share)

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    return stacked([self._row(step, row) for row in self._rows], self._rows)

  def _row(self, step: int, row: int) -> tuple[np.ndarray, Labels]:
    rng = np.random.Generator(np.random.PCG64([self._seed, step, row]))
    shown, labels = self._films[int(rng.integers(len(self._films)))]
    if rng.random() < 0.5:
      shown = mirrored(shown)
    if rng.random() < 0.5:
      shown, labels = shown[::-1], labels.reversed()
    if rng.random() < 0.4:
      shown = recoloured(shown, float(rng.uniform(0.3, 1.2) * rng.choice([-1, 1])), bool(rng.random() < 0.5))
    return shown, labels

  def iterate(
    self, start_step: int, *, threads: int = 4, workers: int = 0, stop: int | None = None
  ) -> Generator[tuple[int, dict[str, Any]], None, None]:
    """Yields (step, batch) from `start_step` up to before `stop`; `threads` build ahead, `workers` are not used."""
    del workers  # each would render the films again
    stop = 2**31 if stop is None else stop
    steps = grain.MapDataset.range(start_step, max(stop, start_step + 1)).map(lambda step: (step, self[step]))
    if start_step >= stop:
      return
    yield from steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1))


def stacked(rows: Sequence[tuple[np.ndarray, Labels]], numbers: Sequence[int]) -> dict[str, np.ndarray]:
  """A batch of rows."""
  return {
    "thumbnails": np.stack([shown for shown, _ in rows]),
    "inside": np.stack([labels.inside for _, labels in rows]),
    "middle": np.stack([labels.middle for _, labels in rows]),
    "kind": np.stack([labels.kind for _, labels in rows]),
    "index": np.array(numbers, np.uint32),
  }


def planes(thumbnails_TC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Luma (T, 32, 64) and chroma (T, 2, 16, 32) of thumbnails; views."""
  T = len(thumbnails_TC)
  return thumbnails_TC[:, :2048].reshape(T, 32, 64), thumbnails_TC[:, 2048:].reshape(T, 2, 16, 32)


def mirrored(thumbnails_TC: np.ndarray) -> np.ndarray:
  """Left and right exchanged."""
  luma, chroma = planes(thumbnails_TC)
  T = len(luma)
  return np.concatenate([luma[:, :, ::-1].reshape(T, -1), chroma[..., ::-1].reshape(T, -1)], axis=1)


def recoloured(thumbnails_TC: np.ndarray, factor: float, exchange: bool) -> np.ndarray:
  """Chroma scaled about grey (below 0: complementary colours), blue and red exchanged or not."""
  luma, chroma = planes(thumbnails_TC)
  table = np.clip(np.rint(128 + factor * (np.arange(256) - 128)), 0, 255).astype(np.uint8)
  changed = cv2.LUT(np.ascontiguousarray(chroma[:, ::-1] if exchange else chroma).reshape(len(luma), -1), table)
  return np.concatenate([luma.reshape(len(luma), -1), changed], axis=1)
