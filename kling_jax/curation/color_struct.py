"""Color-Struct SVM, the transition detector of Koala-36M: two similarities of neighbouring frames and a linear margin.

Paper: Koala-36M (arXiv 2410.08260), section 4.1, equations 1 to 4; the constants, sizes and the temporal rule are those
of the released detector, which the paper leaves open. A frame becomes the histogram of its colours and a picture of its
grey values and edges; a pair of frames becomes c, the correlation of the histograms, and s, the structural similarity
of the pictures; the margin m = w . (c, s) + b is below 0 at a transition.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import av
import cv2
import jax
import jax.numpy as jnp
import numpy as np
from av.video.reformatter import Interpolation

from kling_jax import files
from kling_jax.curation.detector import Found
from kling_jax.data import picture
from kling_jax.data.record import Transition
from kling_jax.errors import WeightsError

COLOUR_SIDE, STRUCTURE_SIDE = 256, 128  # pixels of the square pictures; the frame's shape is ignored
LOWEST, HIGHEST = 1, 255  # levels [1, 255) are counted: pure black and white are not
CANNY = 100, 200
WINDOW = 7  # pixels of SSIM's uniform window
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
HISTORY, LOW_TRIM, HIGH_TRIM = 8, 1, 2  # margins before a pair; the lowest and the highest of them do not count
GATE, SIGMAS, LEAST_SIGMA = 0.75, 3.0, 0.2
CLIP_MARGIN = 4  # pairs that a clip loses at either end
TOLERANCE = 1e-4  # of the fit


@dataclasses.dataclass(frozen=True)
class Weights:
  """The linear SVM: m = colour * c + structure * s + bias."""

  colour: float
  structure: float
  bias: float

  def margins(self, similarities_T2: np.ndarray) -> np.ndarray:
    """(pairs, 2) similarities (c, s) -> (pairs,) margins."""
    return self.colour * similarities_T2[:, 0] + self.structure * similarities_T2[:, 1] + self.bias

  def save(self, path: str | os.PathLike[str]) -> None:
    files.write_json(pathlib.Path(path), {"format": "color-struct-svm-v1"} | dataclasses.asdict(self))

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> "Weights":
    """Reads what `save` wrote.

    Raises:
      WeightsError: it is something else.
    """
    try:
      held = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
      weights = cls(*(float(held[field.name]) for field in dataclasses.fields(cls)))
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise WeightsError(f"{path} holds no Color-Struct SVM ({error}); `kling split --fit` writes one") from error
    if not np.isfinite(dataclasses.astuple(weights)).all():
      raise WeightsError(f"{path}: the numbers of the SVM must be finite")
    return weights


PUBLISHED = Weights(4.61480465, 3.75211168, -5.485968377115124)


@dataclasses.dataclass(frozen=True)
class Frames:
  """What the pairs of a run of frames are made of.

  Attributes:
    histograms_TC: (T, 762) float32 counts of the levels 1 to 254 in blue, green and red of a 256 x 256 picture.
    structure_THW: (T, 128, 128) uint8, the larger of grey value and Canny edge (equation 3).
  """

  histograms_TC: np.ndarray
  structure_THW: np.ndarray

  @classmethod
  def of(cls, frames_bgr: Iterable[np.ndarray]) -> "Frames":
    """Looks at uint8 BGR frames (H, W, 3) of any size."""
    pairs = [_look(frame) for frame in frames_bgr]
    if not pairs:
      return cls(np.zeros((0, 3 * (HIGHEST - LOWEST)), np.float32), np.zeros((0,) + (STRUCTURE_SIDE,) * 2, np.uint8))
    return cls(np.stack([histogram for histogram, _ in pairs]), np.stack([structure for _, structure in pairs]))

  @classmethod
  def joined(cls, parts: Sequence["Frames"]) -> "Frames":
    return cls(np.concatenate([p.histograms_TC for p in parts]), np.concatenate([p.structure_THW for p in parts]))

  def __len__(self) -> int:
    return len(self.histograms_TC)

  def take(self, indices: np.ndarray) -> "Frames":
    return Frames(self.histograms_TC[indices], self.structure_THW[indices])


def shrunk(frame_bgr: np.ndarray) -> np.ndarray:
  """The 256 x 256 picture that everything is measured on; shrinking it again changes nothing."""
  return cv2.resize(frame_bgr, (COLOUR_SIDE, COLOUR_SIDE), interpolation=cv2.INTER_LINEAR)


def _look(frame_bgr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  small = shrunk(frame_bgr)
  counts = [cv2.calcHist([small], [k], None, [HIGHEST - LOWEST], [LOWEST, HIGHEST]).ravel() for k in range(3)]
  grey = cv2.resize(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY), (STRUCTURE_SIDE, STRUCTURE_SIDE))
  return np.concatenate(counts), np.maximum(grey, cv2.Canny(grey, *CANNY))


# ---- similarities ----------------------------------------------------------------------------------------------------


def similarities(first: Frames, second: Frames) -> np.ndarray:
  """(c, s) of each pair: (pairs, 2) float64. NumPy and OpenCV; no JAX is started."""
  colour = _correlation(first.histograms_TC.astype(np.float64), second.histograms_TC.astype(np.float64))
  structure = [_ssim(a, b) for a, b in zip(first.structure_THW, second.structure_THW, strict=True)]
  return np.stack([colour, np.array(structure, np.float64)], axis=1)


def _correlation(a_TC: np.ndarray, b_TC: np.ndarray) -> np.ndarray:
  """Equation 2 over all 762 counts at once; 1 where a histogram is empty or flat, as OpenCV has it."""
  n = a_TC.shape[1]
  s1, s2 = a_TC.sum(1), b_TC.sum(1)
  numerator = (a_TC * b_TC).sum(1) - s1 * s2 / n
  square = ((a_TC * a_TC).sum(1) - s1 * s1 / n) * ((b_TC * b_TC).sum(1) - s2 * s2 / n)
  blank = np.abs(square) <= np.finfo(np.float64).eps
  return np.where(blank, 1.0, numerator / np.sqrt(np.where(blank, 1.0, square)))


def _ssim(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
  """Mean SSIM (equation 4) with a uniform 7 x 7 window and sample covariances over the pixels whose window is whole."""
  a, b, inside = a_HW.astype(np.float64), b_HW.astype(np.float64), WINDOW // 2
  mean = lambda x: cv2.blur(x, (WINDOW, WINDOW))[inside:-inside, inside:-inside]
  ma, mb, size = mean(a), mean(b), WINDOW * WINDOW
  unbias = size / (size - 1)
  va, vb, vab = (unbias * (mean(x * y) - mx * my) for x, mx, y, my in ((a, ma, a, ma), (b, mb, b, mb), (a, ma, b, mb)))
  ssim = ((2 * ma * mb + C1) * (2 * vab + C2)) / ((ma * ma + mb * mb + C1) * (va + vb + C2))
  return float(ssim.mean())


def similarities_batched(first: Frames, second: Frames, batch: int = 64) -> np.ndarray:
  """The twin of `similarities` on JAX's device, in batches of one size; float64 where it counts.

  Sums over windows and histograms are exact integers, so that the only rounding is in the last quotients.
  """
  pairs = len(first)
  out = np.empty((pairs, 2), np.float64)
  with jax.enable_x64(True):
    for start in range(0, pairs, batch):
      rows = np.minimum(np.arange(start, start + batch), pairs - 1)  # the last batch repeats its last pair
      a, b = first.take(rows), second.take(rows)
      answer = _similarities(a.histograms_TC, b.histograms_TC, a.structure_THW, b.structure_THW)
      out[start : start + batch] = np.asarray(answer)[: pairs - start]
  return out


@jax.jit
def _similarities(h1_TC: jax.Array, h2_TC: jax.Array, a_THW: jax.Array, b_THW: jax.Array) -> jax.Array:
  h1, h2 = h1_TC.astype(jnp.float64), h2_TC.astype(jnp.float64)
  n = h1.shape[1]
  moment = lambda x, y: jnp.sum(x * y, 1) - jnp.sum(x, 1) * jnp.sum(y, 1) / n
  square = moment(h1, h1) * moment(h2, h2)
  blank = jnp.abs(square) <= np.finfo(np.float64).eps
  colour = jnp.where(blank, 1.0, moment(h1, h2) / jnp.sqrt(jnp.where(blank, 1.0, square)))

  a, b, size = a_THW.astype(jnp.int32), b_THW.astype(jnp.int32), WINDOW * WINDOW
  total = lambda x: jax.lax.reduce_window(x, 0, jax.lax.add, (1, WINDOW, WINDOW), (1, 1, 1), "valid")
  sa, sb = total(a), total(b)
  covariance = lambda x, y, sx, sy: (size * total(x * y) - sx * sy).astype(jnp.float64) / (size * (size - 1))
  ma, mb = sa.astype(jnp.float64) / size, sb.astype(jnp.float64) / size
  upper = (2 * ma * mb + C1) * (2 * covariance(a, b, sa, sb) + C2)
  lower = (ma * ma + mb * mb + C1) * (covariance(a, a, sa, sa) + covariance(b, b, sb, sb) + C2)
  return jnp.stack([colour, jnp.mean(upper / lower, (1, 2))], axis=1)


# ---- temporal rule ---------------------------------------------------------------------------------------------------


def flags(margins_T: np.ndarray) -> np.ndarray:
  """Which pairs are transitions: a negative margin, or one that leaves the 3-sigma band of the 8 margins before it.

  The band is that of running means of 3 margins, without the lowest and the two highest of the 8 (so the released
  code), and at least 0.6 wide; flagged pairs stay in the history of later ones.

  Args:
    margins_T: (pairs,) of neighbouring frames; pair i is (frame i, frame i + 1).

  Returns:
    (pairs,) bool.
  """
  flagged = margins_T < 0
  if len(margins_T) <= HISTORY:
    return flagged
  smooth = smoothed(margins_T)
  history = np.sort(np.lib.stride_tricks.sliding_window_view(smooth[:-1], HISTORY), axis=1)
  kept = history[:, LOW_TRIM : HISTORY - HIGH_TRIM]
  band = kept.mean(1) - SIGMAS * np.maximum(LEAST_SIGMA, kept.std(1))
  late = smooth[HISTORY:]
  flagged[HISTORY:] |= (late < GATE) & (late < band)
  return flagged


def smoothed(margins_T: np.ndarray) -> np.ndarray:
  """Running means of 3 margins; the first and last stay as they are."""
  smooth = margins_T.astype(np.float64)
  if len(smooth) > 2:
    smooth[1:-1] = (margins_T[:-2] + margins_T[1:-1] + margins_T[2:]) / 3
  return smooth


def clips(flagged_T: np.ndarray) -> list[tuple[int, int]]:
  """Frames [start, end) of the clips that the released writer makes: 4 frames off at the head, 5 at the tail.

  Runs of at most 8 unflagged pairs give nothing; the frames of flagged pairs belong to no clip.
  """
  found, start = [], 0
  for stop in [*np.flatnonzero(flagged_T).tolist(), len(flagged_T)]:
    if stop - start > 2 * CLIP_MARGIN:
      found.append((start + CLIP_MARGIN, stop - CLIP_MARGIN))
    start = stop + 1
  return found


def transitions(flagged_T: np.ndarray, margins_T: np.ndarray) -> list[Transition]:
  """Runs of flagged pairs. The method knows no kinds: up to 3 pairs, one of them negative, are a cut at that pair.

  (The rule looks one pair ahead, so that a cut usually flags the pair before it as well.) Any other run is `other`. The
  confidence is the logistic function of minus the run's least margin, and at least a half.
  """
  edges = np.flatnonzero(np.diff(np.concatenate([[0], flagged_T.astype(np.int8), [0]])))
  found = []
  for first, stop in edges.reshape(-1, 2).tolist():
    negative = first + np.flatnonzero(margins_T[first:stop] < 0)
    confidence = float(1 / (1 + np.exp(min(0.0, float(margins_T[first:stop].min())))))
    if len(negative) == 1 and stop - first <= 3:
      found.append(Transition(int(negative[0]), int(negative[0]) + 1, "cut", confidence))
    else:
      found.append(Transition(first, stop, "other", confidence))
  return found


def bgr(frame: av.VideoFrame) -> np.ndarray:
  """A decoded frame as OpenCV's own decoder gives it: uint8 BGR (H, W, 3), upright, chroma enlarged bicubically."""
  pixels = picture.reformat(frame, format="bgr24", interpolation=Interpolation.BICUBIC).to_ndarray()
  transpose, flip_rows, flip_columns = picture.orientation(frame)
  pixels = pixels.swapaxes(0, 1) if transpose else pixels
  return np.ascontiguousarray(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


class Detector:
  """Method `css` of `kling split`: holds one frame, and two numbers a pair."""

  def __init__(self, weights: Weights = PUBLISHED):
    self._weights = weights
    self._last: Frames | None = None
    self._similarities: list[np.ndarray] = []

  def look(self, frame: av.VideoFrame) -> None:
    seen = Frames.of([bgr(frame)])
    if self._last is not None:
      self._similarities.append(similarities(self._last, seen)[0])
    self._last = seen

  def finish(self, fps: float) -> Found:
    del fps  # the rule counts frames
    pairs_T2 = np.array(self._similarities, np.float64).reshape(-1, 2)
    margins = self._weights.margins(pairs_T2)
    flagged = flags(margins)
    behind = lambda values: np.concatenate([[np.nan], values])
    columns = {"colour": pairs_T2[:, 0], "structure": pairs_T2[:, 1], "margin": margins, "flag": flagged.astype(float)}
    return Found(transitions(flagged, margins), clips(flagged), {k: behind(v) for k, v in columns.items()})


# ---- fit -------------------------------------------------------------------------------------------------------------


def free_pairs(videos: Sequence[tuple[Frames, Frames]], count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Training pairs that nobody has to label (section 4.1): a transition has a low probability at any instant.

  Args:
    videos: at least two; of each some frames, and the frames that follow them.
    count: pairs of each class.
    seed: of the choice.

  Returns:
    Similarities (2 count, 2), and labels (2 count,): +1 for neighbouring frames of one video, -1 for frames of two.
  """
  rng = np.random.Generator(np.random.PCG64(seed))
  one = rng.integers(len(videos), size=count)
  other = (one + rng.integers(1, len(videos), size=count)) % len(videos)
  sizes = np.array([len(first) for first, _ in videos])
  offset = np.concatenate([[0], np.cumsum(sizes)[:-1]])
  place = lambda video: offset[video] + (rng.random(count) * sizes[video]).astype(int)
  same = place(one)
  rows = np.concatenate([same, place(one)]), np.concatenate([same, place(other)])
  first, second = (Frames.joined([video[k] for video in videos]) for k in range(2))
  return similarities_batched(first.take(rows[0]), second.take(rows[1])), np.repeat([1.0, -1.0], count)


def fit(similarities_T2: np.ndarray, labels_T: np.ndarray, cost: float = 1.0) -> Weights:
  """The linear SVM of labelled pairs: least |w|^2 / 2 + cost * sum of hinge losses, in the similarities (c, s).

  Solved in its dual, two multipliers at a time (SMO), until no condition of optimality is off by more than 1e-4.

  Args:
    similarities_T2: (pairs, 2). labels_T: (pairs,) of +1 (one shot) and -1 (a transition); both must occur.
    cost: of a unit of hinge loss.
  """
  return Weights(*_solve(similarities_T2, labels_T, cost))


def _solve(x_T2: np.ndarray, y_T: np.ndarray, cost: float) -> tuple[float, float, float]:
  alpha = np.zeros(len(y_T))
  gradient = y_T.copy()  # y - w . x
  w = np.zeros(2)
  while True:
    up = np.where(y_T > 0, alpha < cost, alpha > 0)
    down = np.where(y_T > 0, alpha > 0, alpha < cost)
    i = int(np.argmax(np.where(up, gradient, -np.inf)))
    gap = np.where(down, gradient[i] - gradient, -np.inf)
    if gap.max() < TOLERANCE:
      return float(w[0]), float(w[1]), float(gradient[i] - gap.max() / 2)
    # The partner with which the dual gains most (second-order choice of Fan, Chen & Lin 2005).
    ways = x_T2[i] - x_T2
    curvature = np.maximum((ways * ways).sum(1), 1e-9)
    j = int(np.argmax(np.where(gap > 0, gap * gap / curvature, -np.inf)))
    room_i = cost - alpha[i] if y_T[i] > 0 else alpha[i]
    room_j = alpha[j] if y_T[j] > 0 else cost - alpha[j]
    step = min(gap[j] / curvature[j], room_i, room_j)
    alpha[i] += y_T[i] * step
    alpha[j] -= y_T[j] * step
    w += step * ways[j]
    gradient -= step * (x_T2 @ ways[j])
