"""The perceptual signature of a clip: low frequencies of its frames, four a second, and how alike two signatures are.

A frame is cut to what lies within dark bars, shrunk to 32 x 32 grey values whatever its shape, and goes through a
cosine transform of which the lowest 8 x 8 coefficients but the mean stay, each times its frequency, so that fine and
coarse parts weigh alike. The angle between two such vectors does not change with brightness and contrast, and little
with compression, size, noise and blur. A crop or a mirror image is a linear map of the coefficients, so that cropped
and mirrored copies are looked for without touching pixels again. Coarse colours can only speak against a copy. A clip
is a series of vectors, so that a copy that starts later, or is an excerpt, agrees at some shift in time.

What it cannot see as a copy: more than about 15 % cut off a side, pictures in pictures that are not on a dark ground,
frames without detail; turns beyond 5 degrees and speeds beyond 20 % were not tried. `benchmarks/dedup.py` counts.
"""

import dataclasses
import fractions
import functools
import itertools
import math
import pathlib
from collections.abc import Iterator

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation

from kling_jax.data import container, decode, picture, reasons

NAME, VERSION = "dct8", "1"
STEP_S = 0.25  # between frames of a signature
SIZE = 8  # coefficients a side
DEPTH = SIZE * SIZE - 1
_LOOK, _RASTER = 96, 32  # pixels a side: for borders, and for the transform
# A border's spread of grey levels, its largest level, its largest share of a side; the part of a side at which the
# picture must begin beside it.
_PLAIN, _DARK, _WIDEST, _BEGINS = 12.0, 60.0, 0.35, 0.3
_LONGEST = 40  # steps that one frame may last: ten seconds
_MINUTE = 240  # frames that tell the borders of a film
_FLAT = 2.5  # standard deviation in grey levels below which a frame says nothing
_LEAST = 4  # frames that must overlap: a second
_CROPS = ((0.0, 1.0), (0.06, 0.94), (0.12, 0.88), (0.0, 0.88), (0.12, 1.0))  # spans of a side that a crop leaves
ALIKE, ALIKE_CROPPED = 0.7, 0.74  # similarity of copies; a crop is chosen as the best of many, so it must fit better
_HOPELESS = 0.25  # below it no crop is tried
_STILL = 0.02  # energy of the changes in time below which they are noise
_SAME_CHANGES, _SAME_CHANGES_CROPPED = 0.2, 0.4  # correlation of the changes of copies that move
_HUES = 3  # frequencies of colour a side
_COLOURFUL, _SAME_COLOURS = 4.0, 0.75  # levels of colour from which it counts, and the cosine of copies


@dataclasses.dataclass(frozen=True)
class Signature:
  """A clip as vectors.

  Attributes:
    vectors: (T, 63) int8, direction only. flat: (T,) bool, frames without detail.
    colours: (T, 18) int8, the lowest 3 x 3 frequencies of blue and red difference, the first of each its mean level.
  """

  vectors: np.ndarray
  flat: np.ndarray
  colours: np.ndarray

  def __len__(self) -> int:
    return len(self.vectors)

  @functools.cached_property
  def units(self) -> np.ndarray:
    """(T, 63) float32 of length 1; 0 for flat frames."""
    return _units(self.vectors.astype(np.float32)) * ~self.flat[:, None]

  def to_bytes(self) -> bytes:
    """82 bytes a frame."""
    return np.concatenate([self.flat[:, None].astype(np.int8), self.vectors, self.colours], axis=1).tobytes()

  @classmethod
  def from_bytes(cls, data: bytes) -> "Signature":
    """The inverse of `to_bytes`. Raises ValueError where the length does not fit."""
    rows = np.frombuffer(data, np.int8).reshape(-1, 1 + DEPTH + 2 * _HUES**2)
    return cls(rows[:, 1 : DEPTH + 1], rows[:, 0] != 0, rows[:, DEPTH + 1 :])

  def distinct(self, least: float = 0.9) -> np.ndarray:
    """Indices of the frames with detail that differ from the last one taken: what a search looks at."""
    taken: list[int] = []
    for k in np.flatnonzero(~self.flat):
      if not taken or float(self.units[k] @ self.units[taken[-1]]) < least:
        taken.append(int(k))
    return np.array(taken, int)


def of_media(media: bytes | str | pathlib.Path, limits: container.Limits = decode.DEFAULT_LIMITS) -> Signature:
  """Decodes a clip and takes its signature.

  Raises:
    MediaError: nothing in it can be decoded.
  """
  parts: list[Signature] = []
  looks: list[np.ndarray] = []
  inner: tuple[int, int, int, int] | None = None
  for look in _looks(media, limits):
    looks.append(look)
    if len(looks) == _MINUTE:  # a film is not held whole
      inner = inner or borders(np.stack(looks)[:, 0])
      parts.append(of_frames(np.stack(looks), inner))
      looks.clear()
  if looks:
    parts.append(of_frames(np.stack(looks), inner))
  fields = ([getattr(part, name) for part in parts] for name in ("vectors", "flat", "colours"))
  return Signature(*(np.concatenate(field) for field in fields))


def _looks(media: bytes | str | pathlib.Path, limits: container.Limits) -> Iterator[np.ndarray]:
  """The frames shown in the middle of each step, (3, 96, 96)."""
  with container.open_video(media, limits) as video:
    step = STEP_S / video.time_base
    start, count, shown = 0, 0, None
    for pts, frame in video.frames():
      if shown is None:
        start = pts
      else:
        yield from (_look(shown) for _ in range(min(_steps(pts - start, step) - count, _LONGEST)))
        count = _steps(pts - start, step)
      shown, last = frame, pts
    if shown is None:
      detail = "; ".join(video.damage)
      reason: reasons.Reason = "decode_error" if detail else "zero_frames"
      raise reasons.MediaError(video.source, reason, detail or "no frame in the file")
    rest = _steps(last + video.duration(shown) - start, step) - count
    yield from (_look(shown) for _ in range(min(max(rest, int(count == 0)), _LONGEST)))


def _steps(ticks: int, step: fractions.Fraction | float) -> int:
  """How many middles of steps lie before a time."""
  return max(0, math.ceil(ticks / step - 0.5))


def of_frames(looks_TCHW: np.ndarray, inner: tuple[int, int, int, int] | None = None) -> Signature:
  """The signature of frames uint8 (T, 3, 96, 96), STEP_S apart: grey, blue and red difference.

  Args:
    inner: what lies within borders; None: `borders` of these frames.
  """
  top, bottom, left, right = inner or borders(looks_TCHW[:, 0])
  vectors, flat, colours = [], [], []
  basis = _basis()
  for look in looks_TCHW[:, :, top:bottom, left:right]:
    grey, *differences = (
      cv2.resize(plane, (_RASTER, _RASTER), interpolation=cv2.INTER_AREA).astype(np.float32) for plane in look
    )
    coefficients = (basis @ grey @ basis.T * _frequencies()).ravel()[1:]
    vectors.append(coefficients / max(float(np.abs(coefficients).max()), 1e-6) * 127)
    flat.append(float(grey.std()) < _FLAT)
    low = basis[:_HUES]
    colours.append(np.concatenate([(low @ (plane - 128) @ low.T).ravel() / _RASTER for plane in differences]))
  return Signature(
    np.rint(vectors).astype(np.int8), np.array(flat), np.clip(np.rint(colours), -127, 127).astype(np.int8)
  )


def _look(frame: av.VideoFrame) -> np.ndarray:
  """(3, 96, 96) uint8, upright."""
  options = {"width": _LOOK, "height": _LOOK, "format": "yuv444p", "interpolation": Interpolation.AREA}
  planes = picture.reformat(frame, **options).to_ndarray().reshape(3, _LOOK, _LOOK)
  transpose, flip_rows, flip_columns = picture.orientation(frame)
  planes = planes.swapaxes(1, 2) if transpose else planes
  planes = planes[:, ::-1] if flip_rows else planes
  return np.ascontiguousarray(planes[:, :, ::-1] if flip_columns else planes)


def borders(looks_THW: np.ndarray) -> tuple[int, int, int, int]:
  """(top, bottom, left, right) of what lies within dark, plain borders that never change, in pixels.

  A wall or a sky is plain as well. Only what is as dark as bars are is cut away, and only where the picture begins
  along a good part of the side at once: an object before a black ground does not.
  """
  spans = []
  for sides in (looks_THW.transpose(1, 0, 2), looks_THW.transpose(2, 0, 1)):
    low, high = np.percentile(sides, (2, 98), axis=(1, 2))
    first, last = _bar(low, high, sides), _bar(low[::-1], high[::-1], sides[::-1])
    # The row beside a border is a mixture of both.
    spans += [first + (first > 0), len(low) - last - (last > 0)]
  return spans[0], spans[1], spans[2], spans[3]


def _bar(low: np.ndarray, high: np.ndarray, rows_HTW: np.ndarray) -> int:
  """Rows of a bar that begins at row 0, given the range of levels of every row."""
  level = (low + high) / 2
  most = int(len(low) * _WIDEST)
  inside = (high - low <= _PLAIN) & (np.abs(level - level[0]) <= _PLAIN / 2)
  rows = next((k for k in range(most) if not inside[k]), most)
  begins = float((rows_HTW[rows + 1] > level[0] + _PLAIN).mean())
  return rows if level[0] <= _DARK and begins >= _BEGINS else 0


@dataclasses.dataclass(frozen=True)
class Match:
  """How two clips agree.

  Attributes:
    similarity: mean cosine over the frames that overlap, -1 to 1.
    shift: frame k of the first is frame k + shift of the second. overlap: frames.
    copy: whether this makes them copies.
  """

  similarity: float
  shift: int
  overlap: int
  copy: bool


def match(a: Signature, b: Signature) -> Match:
  """The best agreement of two signatures over shifts in time, then over crops and mirror images."""
  plain, shift, overlap = _best_shift(a.units[None], b.units[None], a.flat, b.flat)[1:]
  if plain >= ALIKE:
    same = _same_colours(a, b, shift, overlap, False) and _same_changes(a.units, b.units, shift, overlap, _SAME_CHANGES)
    return Match(plain, shift, overlap, same)
  mirrored = _best_shift((a.units * mirror())[None], b.units[None], a.flat, b.flat)
  if max(plain, mirrored[1]) < _HOPELESS:
    return Match(plain, shift, overlap, False)
  maps = _crops()
  found = []
  for flipped, units in ((False, a.units), (True, a.units * mirror())):
    if (mirrored[1] if flipped else plain) >= _HOPELESS:
      found.append((*_best_shift(_mapped(maps, units), b.units[None], a.flat, b.flat), flipped, True))
      found.append((*_best_shift(units[None], _mapped(maps, b.units), a.flat, b.flat), flipped, False))
  which, similarity, shift, overlap, flipped, of_first = max(found, key=lambda one: one[1])
  first = a.units * mirror() if flipped else a.units
  second = b.units
  if of_first:
    first = _mapped(maps[which : which + 1], first)[0]
  else:
    second = _mapped(maps[which : which + 1], second)[0]
  good = similarity >= (ALIKE if which == 0 else ALIKE_CROPPED)
  least = _SAME_CHANGES if which == 0 else _SAME_CHANGES_CROPPED
  good = good and _same_colours(a, b, shift, overlap, flipped)
  good = good and _same_changes(first, second, shift, overlap, least)
  return Match(similarity, shift, overlap, good)


def _best_shift(a_NTD: np.ndarray, b_MTD: np.ndarray, a_flat: np.ndarray, b_flat: np.ndarray):
  """(which map, similarity, shift, overlap) of the best of N x M maps (one of them 1) and all shifts."""
  long = max(_LEAST, (min(a_NTD.shape[1], b_MTD.shape[1]) + 1) // 2)
  least = min(long, a_NTD.shape[1], b_MTD.shape[1])
  cosines = np.matmul(a_NTD, b_MTD.swapaxes(1, 2))  # (maps, Ta, Tb)
  seen = ~a_flat[:, None] & ~b_flat[None]
  best = (0, -1.0, 0, 0)
  for shift in range(least - cosines.shape[1], cosines.shape[2] - least + 1):
    along = np.diagonal(seen, shift)
    count = int(along.sum())
    if count * 2 < len(along) or count == 0:
      continue
    means = np.diagonal(cosines, shift, axis1=1, axis2=2).sum(-1) / count
    which = int(means.argmax())
    if means[which] > best[1]:
      best = (which, float(means[which]), shift, len(along))
  return best


def _same_changes(a: np.ndarray, b: np.ndarray, shift: int, overlap: int, least: float) -> bool:
  """Whether what moves in one clip moves in the other: two moments before one still camera are no copies."""
  start = max(0, -shift)
  first, second = a[start : start + overlap], b[start + shift : start + shift + overlap]
  first, second = first - first.mean(0), second - second.mean(0)
  energy = float((first**2).sum()), float((second**2).sum())
  if min(energy) / max(overlap, 1) < _STILL:
    return True
  return float((first * second).sum()) / float(np.sqrt(energy[0] * energy[1])) >= least


def _same_colours(a: Signature, b: Signature, shift: int, overlap: int, flipped: bool) -> bool:
  """Whether colours agree where both have some: a grey copy passes, another scene of the same shapes does not."""
  start = max(0, -shift)
  first = a.colours[start : start + overlap].mean(0, dtype=np.float64)
  second = b.colours[start + shift : start + shift + overlap].mean(0, dtype=np.float64)
  if flipped:
    first = first * np.tile(np.where(np.arange(_HUES) % 2, -1.0, 1.0), 2 * _HUES)
  sizes = float(np.linalg.norm(first)), float(np.linalg.norm(second))
  return min(sizes) < _COLOURFUL or float(first @ second) / (sizes[0] * sizes[1]) >= _SAME_COLOURS


def _units(vectors: np.ndarray) -> np.ndarray:
  return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)


def _mapped(maps_NDD: np.ndarray, units_TD: np.ndarray) -> np.ndarray:
  return _units(np.matmul(units_TD[None], maps_NDD.swapaxes(1, 2)))


@functools.cache
def _basis() -> np.ndarray:
  """(8, 32): rows of an orthonormal cosine transform."""
  places = (np.arange(_RASTER) + 0.5) / _RASTER
  basis = np.cos(np.pi * np.arange(SIZE)[:, None] * places) * np.sqrt(2 / _RASTER)
  basis[0] /= np.sqrt(2)
  return basis.astype(np.float32)


@functools.cache
def _frequencies() -> np.ndarray:
  u = np.arange(SIZE)
  return np.hypot(u[:, None], u).astype(np.float32)


@functools.cache
def mirror() -> np.ndarray:
  """(63,): odd horizontal frequencies change sign in a mirror."""
  return np.tile(np.where(np.arange(SIZE) % 2, -1.0, 1.0), SIZE)[1:].astype(np.float32)


@functools.cache
def _crops() -> np.ndarray:
  """(N, 63, 63): what cropping and stretching back does to a vector, the first nothing.

  A picture of low frequencies is sum_u c_u cos(pi u x); its part x = p + (q - p) x' goes through the same transform.
  """
  places = (np.arange(_RASTER) + 0.5) / _RASTER
  sides = []
  for low, high in _CROPS:
    waves = np.cos(np.pi * np.arange(SIZE)[:, None] * (low + (high - low) * places)) * np.sqrt(2 / _RASTER)
    waves[0] /= np.sqrt(2)
    sides.append(_basis() @ waves.T)  # (new, old)
  weights = _frequencies().ravel()[1:]
  maps = [np.kron(rows, columns)[1:, 1:] for rows, columns in itertools.product(sides, sides)]
  return np.stack([weights[:, None] * one / weights for one in maps]).astype(np.float32)
