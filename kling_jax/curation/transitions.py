"""The default method: a small network over thumbnails of every frame says where transitions are, rules give the spans.

Frames become thumbnails (`data.thumbnail`) as they are decoded and go through `models.shot_net` in chunks that overlap
by the network's reach, so that memory does not grow with the video but for a few numbers a frame. The weights were
trained on made-up films, see kling_jax/assets/shot_net/card.json.
"""

import functools
import itertools

import av
import cv2
import numpy as np
import safetensors.numpy

from kling_jax import assets
from kling_jax.curation.detector import Found
from kling_jax.data.record import Transition
from kling_jax.data.thumbnail import HEIGHT, WIDTH, thumbnail
from kling_jax.models import shot_net

RATE = 30.0  # frames a second that the network is used to; faster videos are looked at every second frame, or fewer
CHUNK = 768  # frames
WITHIN, SURE = 0.35, 0.6  # probability of a step to lie in a transition: where one goes on, and that makes one
LEAST = 0.65  # confidence; chosen on made-up films of held-out footage, where F1 is flat up to 0.75
SPIKE, LEAST_SPIKE = 2.0, 0.5  # a cut whose difference is that many times the largest of the 3 beside it needs less
EDGE = 0.5  # where a gradual one begins and ends
MIDDLE, APART = 0.4, 4  # probability of a middle that makes a transition; steps between two of them
SHORT, ABRUPT = 4, 0.8  # a transition of few steps, nearly all of whose change happens at one, is a cut
SAME, BESIDE = 0.9, 2  # likeness of the pictures that many frames beside a transition, from which they are one scene's
# Likeness of the colours of the frames so far from a gradual transition, from which one that is less clear than that is
# motion within one shot.
PALETTE, FRAMES_BESIDE, CLEAR = 0.78, (0, 2, 5, 8), 0.95
BLANK_DEVIATION = 6.0  # of luma levels; flatter frames show nothing
LUMA = HEIGHT * WIDTH


@functools.cache
def weights() -> dict[str, np.ndarray]:
  """The shipped weights of the network."""
  return safetensors.numpy.load_file(assets.folder("shot_net") / "model.safetensors")


class Watcher:
  """Looks at the frames of one video."""

  def __init__(self, rate: float | None = None):
    """`rate`: frames a second as the container states it; None where it does not."""
    self._stride = max(1, round((rate or RATE) / RATE))
    self._seen = 0
    self._last: np.ndarray | None = None
    self._waiting: list[np.ndarray] = []  # thumbnails whose steps are not all done, or that later steps lean on
    self._done = 0  # steps of the waiting thumbnails that are done
    self._logits: list[np.ndarray] = []
    self._levels: list[tuple[float, float, float]] = []  # difference, mean and deviation of luma, a frame
    self._layouts: list[np.ndarray] = []
    self._palettes: list[np.ndarray] = []

  def look(self, frame: av.VideoFrame) -> None:
    self.look_at(thumbnail(frame))

  def look_at(self, shown: np.ndarray) -> None:
    """Sees the next frame as a thumbnail, uint8 (3072,)."""
    luma = shown[:LUMA].reshape(HEIGHT, WIDTH)
    difference = np.nan if self._last is None else cv2.norm(luma, self._last, cv2.NORM_L1) / LUMA
    mean, deviation = cv2.meanStdDev(luma)
    self._levels.append((difference, mean.item(), deviation.item()))
    self._layouts.append(cv2.resize(luma, (16, 8), interpolation=cv2.INTER_AREA).reshape(-1))
    self._palettes.append(palette(shown))
    self._last = luma
    if self._seen % self._stride == 0:
      self._waiting.append(shown)
    self._seen += 1
    if len(self._waiting) >= CHUNK + 2 * shot_net.REACH:
      self._advance(len(self._waiting) - shot_net.REACH)

  def _advance(self, stop: int) -> None:
    """Does the steps of the waiting thumbnails before `stop`, and lets go what no later step leans on."""
    logits = shot_net.forward_numpy(weights(), np.stack(self._waiting))
    self._logits.append(logits[self._done : stop])
    spare = max(0, stop - shot_net.REACH)
    self._waiting = self._waiting[spare:]
    self._done = stop - spare

  def finish(self, fps: float) -> Found:
    del fps
    if len(self._waiting) - self._done > 1:
      self._advance(len(self._waiting) - 1)
    logits = np.concatenate(self._logits) if self._logits else np.zeros((0, 2 + len(shot_net.KINDS)), np.float32)
    difference, mean, deviation = np.array(self._levels).reshape(-1, 3).T
    layouts = np.stack(self._layouts) if self._layouts else np.zeros((0, 128), np.uint8)
    found = transitions(logits, difference, deviation, layouts, self._stride)
    found = [t for t in found if not _one_shot(t, self._palettes)]
    return Found(found, None, _statistics(logits, difference, mean, deviation, self._stride))


def _statistics(
  logits_SC: np.ndarray, difference: np.ndarray, mean: np.ndarray, deviation: np.ndarray, stride: int
) -> dict[str, np.ndarray]:
  """Columns of the table, one row a frame; of skipped frames those of the step that passes over them."""
  columns = {"difference": difference, "luma": mean, "luma_deviation": deviation}
  inside, middle, kinds = _probabilities(logits_SC)
  steps = np.maximum(np.arange(len(difference)) - 1, 0) // stride
  values = {"inside": inside, "middle": middle} | {kind: kinds[:, k] for k, kind in enumerate(shot_net.KINDS)}
  for name, value in values.items():
    column = np.full(len(difference), np.nan)
    known = (np.arange(len(difference)) > 0) & (steps < len(value))
    column[known] = value[steps[known]]
    columns[name] = column
  return columns


def _probabilities(logits_SC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  inside, middle = 1 / (1 + np.exp(-logits_SC[:, :2].astype(np.float64).T))
  kinds = np.exp(logits_SC[:, 2:].astype(np.float64) - logits_SC[:, 2:].max(1, keepdims=True, initial=-np.inf))
  return inside, middle, kinds / kinds.sum(1, keepdims=True)


# ---- from probabilities to spans -------------------------------------------------------------------------------------


def transitions(
  logits_SC: np.ndarray, difference: np.ndarray, deviation: np.ndarray, layouts_TC: np.ndarray, stride: int = 1
) -> list[Transition]:
  """Transitions in order, without overlap.

  Args:
    logits_SC: (S, 6), the network's answer at each step from one looked-at frame to the next.
    difference: (T,) mean absolute difference of luma from each frame to the one before; deviation: of its luma.
    layouts_TC: uint8 (T, 128), luma of each frame on a grid of 8 x 16.
    stride: frames a step.
  """
  inside, middle, kinds = _probabilities(logits_SC)
  found: list[Transition] = []
  for first, stop in _runs(inside > WITHIN):
    for low, high, peak in _parts(inside, middle, first, stop):
      span = inside[low:high]
      confidence = float(np.sqrt(span.max() * max(middle[low:high].max(), span.mean())))
      kind = shot_net.KINDS[int(kinds[low:high].mean(0).argmax())]
      sure = low + np.flatnonzero(span > EDGE)
      low, high = (int(sure[0]), int(sure[-1]) + 1) if sure.size else (low, high)
      frames = np.arange(low * stride + 1, min(high * stride, len(difference) - 1) + 1)
      if kind == "cut" or high - low == 1 or (high - low <= SHORT and _abrupt(difference, frames)):
        near = frames[np.abs((frames - 1) // stride - peak) <= 1] if kind == "cut" else frames
        near = near if near.size else frames
        new = int(near[difference[near].argmax()])
        found.append(Transition(new - 1, new, "cut", confidence))
      else:
        found.append(Transition(low * stride, min(high * stride, len(difference) - 1), kind, confidence))
  clear = [t for t in found if t.confidence >= (LEAST_SPIKE if _is_spike(t, difference) else LEAST)]
  return _joined([t for t in clear if t.kind == "fade" or not _one_scene(t, layouts_TC)], deviation)


def _is_spike(transition: Transition, difference: np.ndarray) -> bool:
  """Whether a cut stands alone in the differences; a flash does not, its end is as large as its start."""
  new = transition.end_frame
  beside = np.concatenate([difference[max(1, new - 3) : new], difference[new + 1 : new + 4]])
  return transition.kind == "cut" and bool(difference[new] > SPIKE * beside.max(initial=1.0))


def _abrupt(difference: np.ndarray, frames: np.ndarray) -> bool:
  """Whether nearly all that changes within `frames`, beyond the motion around them, changes at one of them."""
  around = difference[max(1, frames[0] - 8) : frames[-1] + 9]
  excess = np.maximum(difference[frames] - np.median(around), 0)
  return bool(excess.max() > ABRUPT * excess.sum())


def _one_scene(transition: Transition, layouts_TC: np.ndarray) -> bool:
  """Whether the same picture lies on both sides, under whatever light: changes of exposure look like dissolves.

  The mean of the correlations of levels and of their ranks (which clipped highlights leave alone). Of 160 true
  transitions between different footage one in a hundred comes above 0.9.
  """
  sides = max(0, transition.start_frame - BESIDE), min(len(layouts_TC) - 1, transition.end_frame + BESIDE)
  a, b = layouts_TC[list(sides)].astype(np.float64)
  ranks = [np.argsort(np.argsort(x, kind="stable")).astype(np.float64) for x in (a, b)]
  return (_correlation(a, b) + _correlation(*ranks)) / 2 > SAME


def palette(shown: np.ndarray) -> np.ndarray:
  """How many of a thumbnail's 512 chroma samples have each of 4 x 8 x 8 colours, uint16 (256,).

  Blue and red chroma are told apart finely where they are faint, as most are.
  """
  luma = cv2.resize(shown[:LUMA].reshape(HEIGHT, WIDTH), (WIDTH // 2, HEIGHT // 2), interpolation=cv2.INTER_AREA)
  colours = (
    _LUMA_LEVEL[luma.reshape(-1)] + _BLUE_LEVEL[shown[LUMA : LUMA * 5 // 4]] + _RED_LEVEL[shown[LUMA * 5 // 4 :]]
  )
  return np.bincount(colours, minlength=256).astype(np.uint16)


_CHROMA_LEVELS = np.digitize(np.arange(256), 128 + np.array([-32, -16, -6, 0, 6, 16, 32]))
_LUMA_LEVEL, _BLUE_LEVEL, _RED_LEVEL = np.arange(256) // 64 * 64, _CHROMA_LEVELS * 8, _CHROMA_LEVELS


def _one_shot(transition: Transition, palettes: list[np.ndarray]) -> bool:
  """Whether an unclear dissolve or wipe has the same colours on both sides: something moves past, the shot goes on.

  The likeness is the Bhattacharyya coefficient of the frames within a third of a second before and behind. Fades and
  cuts are left alone: they may return to the same scene.
  """
  if transition.kind in ("cut", "fade") or transition.confidence >= CLEAR:
    return False
  last = len(palettes) - 1
  before = [np.sqrt(palettes[max(0, transition.start_frame - k)]) for k in FRAMES_BESIDE]
  behind = [np.sqrt(palettes[min(last, transition.end_frame + k)]) for k in FRAMES_BESIDE]
  a, b = np.mean(before, axis=0), np.mean(behind, axis=0)
  return float(a @ b / np.sqrt((a @ a) * (b @ b))) >= PALETTE


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
  """Pearson's correlation; 0 for a picture without structure."""
  a, b = a - a.mean(), b - b.mean()
  length = float(np.sqrt((a * a).sum() * (b * b).sum()))
  return float((a * b).sum()) / length if length > 1 else 0.0


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
  """[first, stop) of every run of true values."""
  edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
  return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _parts(inside: np.ndarray, middle: np.ndarray, first: int, stop: int) -> list[tuple[int, int, int]]:
  """The transitions [low, high) with their middles in a run of steps that lie in one, or in several on end."""
  peaks: list[int] = []
  for step in sorted(range(first, stop), key=lambda step: -middle[step]):
    if middle[step] < MIDDLE:
      break
    if all(abs(step - other) > APART for other in peaks):
      peaks.append(step)
  if not peaks:
    if inside[first:stop].max() < SURE:
      return []
    peaks = [first + int(np.argmax(inside[first:stop] + middle[first:stop]))]
  peaks.sort()
  borders = [first]
  for a, b in itertools.pairwise(peaks):
    borders.append(a + 1 + int(np.argmin(inside[a + 1 : b + 1])))
  borders.append(stop)
  return [(low, high, peak) for low, high, peak in zip(borders, borders[1:], peaks, strict=False)]


def _joined(found: list[Transition], deviation: np.ndarray) -> list[Transition]:
  """Makes one fade of a fade out and the fade in after it, where nothing but blank frames lies between."""
  joined: list[Transition] = []
  for transition in found:
    last = joined[-1] if joined else None
    if last is not None and last.kind == transition.kind == "fade":
      between = deviation[last.end_frame : transition.start_frame + 1]
      if between.size == 0 or between.max() < BLANK_DEVIATION:
        joined[-1] = Transition(
          last.start_frame, transition.end_frame, "fade", max(last.confidence, transition.confidence)
        )
        continue
    joined.append(transition)
  return joined
