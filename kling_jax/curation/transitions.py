"""Transitions from small pictures of every frame: cuts by content difference, fades and dissolves by blend tests.

All tests work on pictures of about 32 x 18 pixels as points of the HSV cone (chroma * cos hue, chroma * sin hue,
value), where grey pixels have no hue to flicker. Distances are mean absolute differences, 0 to 255.

* Cut: the difference of neighbouring frames is large, and large against its surroundings (fast motion raises both).
  A flash is none: what was before it comes back after it.
* Fade: frames without structure, dark or bright, with a ramp of contrast on at least one side.
* Dissolve: frames lie on the line between the pictures before and after, in order. Motion leaves that line.
* Wipe: every pixel is that of the picture before or after, and the share of the latter grows.
  Both end in a calmer picture on at least one side: a slow pan over a smooth scene looks like a dissolve without end.
"""

import itertools

import av
import numpy as np

from kling_jax.curation.detector import Found
from kling_jax.data import picture
from kling_jax.data.record import Transition

SMALL_SIDE = 32  # pixels of the longer side that the tests see

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
CUT_DIFFERENCE, CUT_RATIO = 7.0, 3.0
CUT_WINDOW = 3  # frames on either side that make the surroundings
FLASH_FRAMES = 4  # longest flash
FLASH_RETURN = 0.45  # share of the difference below which what was before counts as back
BLANK_DARK, BLANK_BRIGHT, BLANK_DEVIATION = 28.0, 225.0, 7.0  # luma levels
RAMP_FRAMES, RAMP_CONTRAST = 3, 12.0  # shortest fade, least contrast (deviation of luma) where it ends
# Half lengths of the windows in which dissolves and wipes are looked for, in seconds.
HALF_LENGTHS_S = (0.2, 0.33, 0.5, 0.75, 1.05)
GRADUAL_DIFFERENCE, GRADUAL_CORRELATION = 15.0, 0.5  # least difference, largest likeness of the pictures at the ends
PLATEAU_FRAMES, PLATEAU_RATIO = 12, 2.0  # a transition changes the picture faster than the calmer of its neighbours
DISSOLVE_RESIDUAL, WIPE_RESIDUAL = 0.27, 0.2  # distance from the line or from both pictures, relative to the ends'
CHUNK = 1024


class SmallPictures:
  """The detector of this file: keeps a small picture of every frame."""

  def __init__(self) -> None:
    self._small: list[np.ndarray] = []
    self._size = (0, 0)

  def look(self, frame: av.VideoFrame) -> None:
    if not self._small:
      rows, columns = picture.upright_size(frame)
      scale = SMALL_SIDE / max(rows, columns)
      self._size = max(4, round(rows * scale)), max(4, round(columns * scale))
    self._small.append(picture.to_rgb(frame, self._size))

  def finish(self, fps: float) -> Found:
    return Found(find_transitions(np.stack(self._small), fps), None, {})


def find_transitions(small_THWC: np.ndarray, fps: float) -> list[Transition]:
  """Finds the transitions of a video in presentation order; spans do not overlap.

  A fade at the very start or end of a video counts as one, from or to its blank frames. Confidences say how far a test
  was passed, from 0.5 up; they are not calibrated.

  Args:
    small_THWC: uint8 RGB, every frame of the video shrunk (area mean) to about 32 x 18 pixels.
    fps: mean frames per second; sets the lengths of gradual transitions that are looked for.
  """
  if len(small_THWC) < 2:
    return []
  cuts = _cuts(small_THWC)
  fades = _fades(small_THWC, {cut.start_frame for cut in cuts})
  hard = [c for c in cuts if not any(f.start_frame <= c.start_frame < f.end_frame for f in fades)]
  return sorted(_gradual(small_THWC, fps, hard + fades) + hard + fades, key=lambda t: t.start_frame)


def cone(rgb: np.ndarray) -> np.ndarray:
  """RGB (..., 3) in 0..255 -> (chroma cos hue, chroma sin hue, value), float32, same range."""
  red, green, blue = np.moveaxis(rgb.astype(np.float32), -1, 0)
  value = np.maximum(np.maximum(red, green), blue)
  chroma = value - np.minimum(np.minimum(red, green), blue)
  a = red - 0.5 * (green + blue)
  b = np.float32(np.sqrt(0.75)) * (green - blue)
  length = np.maximum(np.hypot(a, b), 1e-6)
  return np.stack([chroma * a / length, chroma * b / length, value], -1)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.abs(a - b).mean((-3, -2, -1))


# ------------------------------------------------------------------------------------------------------------- cuts


def _cuts(small_THWC: np.ndarray) -> list[Transition]:
  difference = np.zeros(len(small_THWC) - 1)
  for start in range(0, len(difference), CHUNK):
    points = cone(small_THWC[start : start + CHUNK + 1])
    difference[start : start + CHUNK] = _distance(points[1:], points[:-1])
  window = np.lib.stride_tricks.sliding_window_view(
    np.pad(difference, CUT_WINDOW, mode="symmetric"), 2 * CUT_WINDOW + 1
  )
  around = (window.sum(1) - difference) / (2 * CUT_WINDOW)
  ratio = difference / (around + 1.5)
  cuts = []
  for t in np.nonzero((difference > CUT_DIFFERENCE) & (ratio > CUT_RATIO))[0]:
    if not _is_flash(small_THWC, int(t), float(difference[t])):
      cuts.append(Transition(int(t), int(t) + 1, "cut", float(1 - 0.5 * CUT_RATIO / ratio[t])))
  return cuts


def _is_flash(small_THWC: np.ndarray, t: int, difference: float) -> bool:
  """Whether the picture before t returns soon after, or the one after t was there shortly before (a flash's end)."""

  def alike(first: slice, second: slice) -> bool:
    pairs = itertools.product(cone(small_THWC[first]), cone(small_THWC[second]))
    return any(_distance(a, b) < FLASH_RETURN * difference for a, b in pairs)

  begins = alike(slice(max(0, t - 2), t + 1), slice(t + FLASH_FRAMES, t + 2 * FLASH_FRAMES))
  return begins or alike(slice(max(0, t - FLASH_FRAMES - 2), max(0, t - 2)), slice(t + 1, t + 3))


# ------------------------------------------------------------------------------------------------------------ fades


def _fades(small_THWC: np.ndarray, cuts: set[int]) -> list[Transition]:
  luma = small_THWC.astype(np.float32) @ LUMA
  mean, deviation = luma.mean((1, 2)), luma.std((1, 2))
  blank = (deviation < BLANK_DEVIATION) & ((mean < BLANK_DARK) | (mean > BLANK_BRIGHT))
  fades = []
  for first, last in _runs(blank):
    before = _ramp(deviation, first, -1) if first - 1 not in cuts else None
    after = _ramp(deviation, last, +1) if last not in cuts else None
    if before is None and after is None:
      continue
    # Without a ramp on one side, the fade reaches to the plainest frame next to the other side's ramp.
    plain = first + np.flatnonzero(deviation[first : last + 1] <= deviation[first : last + 1].min() + 0.5)
    start, end = (int(plain[-1]) if before is None else before), (int(plain[0]) if after is None else after)
    contrast = max(deviation[start], deviation[end])
    fades.append(Transition(start, end, "fade", float(1 - 0.5 * RAMP_CONTRAST / contrast)))
  return [fade for k, fade in enumerate(fades) if k == 0 or fade.start_frame >= fades[k - 1].end_frame]


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
  """(first, last) of every run of true values."""
  edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
  return [(int(a), int(b) - 1) for a, b in edges.reshape(-1, 2)]


def _ramp(deviation: np.ndarray, blank: int, step: int) -> int | None:
  """Walks away from a blank frame while the contrast grows; the frame where it stops, none if that is no fade."""
  best, last, position = deviation[blank], blank, blank
  while 0 <= position + step < len(deviation) and abs(position - last) < 3:
    position += step
    if deviation[position] > 1.01 * best + 0.15:
      best, last = deviation[position], position
  if abs(last - blank) < RAMP_FRAMES or best < RAMP_CONTRAST:
    return None
  steps = np.abs(np.diff(deviation[min(blank, last) : max(blank, last) + 1]))
  return last if steps.max() < 0.6 * (best - deviation[blank]) else None  # else a cut, followed by motion


# ------------------------------------------------------------------------------------------------ dissolves and wipes


def _gradual(small_THWC: np.ndarray, fps: float, known: list[Transition]) -> list[Transition]:
  """Dissolves and wipes whose windows hold no known transition; the clearest first, others must not overlap it."""
  taken = np.zeros(len(small_THWC) + 1, np.int32)
  for transition in known:
    taken[transition.start_frame : transition.end_frame] = 1  # steps from frame to frame that are explained
  taken_sum = np.concatenate([[0], np.cumsum(taken)])
  halves = sorted({max(4, round(s * fps)) for s in HALF_LENGTHS_S})
  margin = halves[-1] + PLATEAU_FRAMES
  found: list[tuple[float, Transition]] = []
  for start in range(0, len(small_THWC), CHUNK):
    origin = max(0, start - margin)
    points = cone(small_THWC[origin : start + CHUNK + margin])  # converted once for all window lengths
    for half in halves:
      middles = np.arange(max(start, half), min(start + CHUNK, len(small_THWC) - half))
      free = taken_sum[middles + half] == taken_sum[middles - half]
      for middle in _promising(points, middles[free] - origin, half):
        candidate = _blend(points[middle - half : middle + half + 1], int(middle) - half + origin)
        if candidate is not None and _has_plateau(points, candidate[1], origin, taken):
          found.append(candidate)
  chosen: list[Transition] = []
  for _, new in sorted(found, key=lambda item: -item[0]):
    if all(new.end_frame <= old.start_frame or new.start_frame >= old.end_frame for old in chosen):
      chosen.append(new)
  return chosen


def _promising(points: np.ndarray, middles: np.ndarray, half: int) -> np.ndarray:
  """The middles at which the ends differ and the middle frame is a blend or a patchwork of them."""
  size = _distance(points[middles - half], points[middles + half])
  middles, size = middles[size > GRADUAL_DIFFERENCE], size[size > GRADUAL_DIFFERENCE]
  before, after, middle = (points[middles + shift] for shift in (-half, half, 0))
  share, residual = _line(before, after, middle)
  near = np.minimum(np.abs(middle - before).mean(-1), np.abs(middle - after).mean(-1)).mean((-2, -1))
  blend = (residual < DISSOLVE_RESIDUAL) | (near < WIPE_RESIDUAL * size)
  return middles[(share > 0.2) & (share < 0.8) & blend]


def _line(before: np.ndarray, after: np.ndarray, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where frames lie along the line before -> after (0 to 1), and how far off it, relative to its length."""
  axes = (-3, -2, -1)
  way = after - before
  length = np.maximum((way * way).sum(axes), 1e-6)
  share = ((frames - before) * way).sum(axes) / length
  off = frames - before - share[..., None, None, None] * way
  return share, np.sqrt((off * off).sum(axes) / length)


def _blend(points: np.ndarray, origin: int) -> tuple[float, Transition] | None:
  """(rank, transition) if the window of frames `points`, the first of number `origin`, is one dissolve or one wipe."""
  before, after, half = points[0], points[-1], len(points) // 2
  if _correlation(before[..., 2], after[..., 2]) > GRADUAL_CORRELATION:
    return None  # the same picture under another light
  size = float(_distance(before, after))
  share, residual = _line(before, after, points)
  inner = slice(half // 2, -(half // 2))
  if residual[inner].max() < DISSOLVE_RESIDUAL and _rises(share, 0.3):
    kind, off = "dissolve", float(residual[inner].max())
  else:
    from_before, from_after = (np.abs(points - end).mean(-1) for end in (before, after))
    off = float(np.minimum(from_before, from_after).mean((1, 2))[inner].max()) / size
    share = (from_after < from_before).mean((1, 2))
    changed = (np.abs(after - before).mean(-1) > 10).mean()
    if off > WIPE_RESIDUAL or changed < 0.8 or not _rises(share, 0.5):
      return None
    kind = "wipe"
  low, high = np.flatnonzero(share < 0.04), np.flatnonzero(share > 0.96)
  start, end = (int(low[-1]) if low.size else 0), (int(high[0]) if high.size else len(points) - 1)
  if end - start < 3:
    return None
  return size * (1 - off), Transition(origin + start, origin + end, kind, 1 - off)


def _has_plateau(points: np.ndarray, transition: Transition, origin: int, taken: np.ndarray) -> bool:
  """Whether the picture changes faster within the transition than on the calmer of its sides (known ones left out)."""
  start, end = transition.start_frame, transition.end_frame
  within = _distance(points[start - origin], points[end - origin]) / (end - start)
  reach = min(PLATEAU_FRAMES, end - start)
  before = max(origin, start - reach)
  after = min(origin + len(points) - 1, end + reach)
  before = max([before, *(k + 1 for k in range(before, start) if taken[k])])
  after = min([after, *(k for k in range(end, after) if taken[k])])
  rates = [
    float(_distance(points[a - origin], points[b - origin])) / (b - a)
    for a, b in ((before, start), (end, after))
    if b - a >= RAMP_FRAMES
  ]
  return bool(rates) and bool(within > PLATEAU_RATIO * min(rates))


def _rises(share: np.ndarray, largest_step: float) -> bool:
  steps = np.diff(share)
  return bool((steps > -0.02).mean() > 0.95 and steps.max() < largest_step)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
  """Pearson's correlation; 0 for a picture without structure."""
  a, b = a - a.mean(), b - b.mean()
  length = float(np.sqrt((a * a).sum() * (b * b).sum()))
  return float((a * b).sum()) / length if length > 1 else 0.0
