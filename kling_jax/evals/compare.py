"""The metrics of videos in one place: of each video alone, of pairs, and of two sets; frames in, named figures out.

Alone (no weights, no truth): how a video moves, flickers, jerks and drifts. Of a pair: PSNR, SSIM and GMSD. Of two
sets: Frechet and kernel distances of features. With features of VideoMAE these are FVD and KVD; those without weights
are called the low-frequency distances.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from kling_jax.errors import DataError
from kling_jax.evals import drift, fidelity, frechet, motion, perceptual, smoothness

PARTS = 4  # of a video, between whose first and last drift is measured
LEAST_FRAMES = 3 * PARTS
WITHOUT_WEIGHTS = "low_frequency"

# What each figure is, and its unit. Those of videos alone are neither good nor bad: compare them with real videos'.
MEANING = {
  "psnr": "peak signal to noise ratio, dB, mean over frames",
  "ssim": "structural similarity (Wang et al. 2004), -1 to 1",
  "gmsd": "perceptual distance without a network (Xue et al. 2014), 0 to 0.5; no LPIPS",
  "dynamic_degree": "share of videos that move, flow of Horn and Schunck",
  "temporal_flickering": "1 less the mean change from frame to frame, over 255",
  "motion_smoothness": "1 less the error of a frame made up of its neighbours, over 255",
  "acceleration_smoothness": "exp(-acceleration of the flow), 0 to 1",
  "sharpness_drift": "log2 of the last quarter's sharpness over the first's",
  "saturation_drift": "last quarter's saturation less the first's",
  "luma_drift": "last quarter's brightness less the first's, levels of 255",
  "colour_drift": "distance of the last quarter's colour histogram to the first's, 0 to 1",
  # Of rollouts.
  "seam_ratio": "change across joins over the change within the clips after them; 1 is ideal",
  "smoothness_joins": "exp(-acceleration of the flow) where clips join (PAN)",
  "smoothness_elsewhere": "the same elsewhere",
  "distinct_2": "different pairs of words over all, in the texts that the model wrote",
  "repeat_rate": "share of its texts that equal the one before",
  "self_bleu": "mean BLEU of each of its texts against the others",
  # Of memory-v1.
  "following": "share of clips that show the event that was asked for",
  "following_by_chance": "what guessing among the legal events would reach",
  "reappearance": "share of returning things with their colour and shape",
  "returns": "things that returned in a walk",
  "stayed": "the same share of things that never left: what memory is not needed for",
}
PAIR = ("psnr", "ssim", "gmsd")


def alone(frames_THWC: np.ndarray, fps: float) -> dict[str, float]:
  """The figures of one video that need neither truth nor weights; those that it is too short for are left out.

  Args:
    frames_THWC: uint8 RGB. fps: its rate, of which only the dynamic degree makes use.

  Raises:
    DataError: fewer than 3 frames.
  """
  found = {}
  if len(frames_THWC) > max(1, round(fps / motion.FPS)):  # two frames at the rate that the verdict looks at
    found["dynamic_degree"] = float(motion.is_dynamic(frames_THWC, fps))
  found |= {
    "temporal_flickering": motion.temporal_flickering(frames_THWC),
    "motion_smoothness": motion.motion_smoothness(frames_THWC),
    "acceleration_smoothness": smoothness.transition_smoothness(frames_THWC[None]).elsewhere,
  }
  if len(frames_THWC) >= LEAST_FRAMES:
    length = len(frames_THWC) // PARTS
    parts = np.stack([frames_THWC[:length], frames_THWC[-length:]])
    curves = drift.curves(parts)
    first, last = (max(float(value), 1e-6) for value in curves["sharpness"])
    found["sharpness_drift"] = math.log2(last / first)
    found["saturation_drift"] = float(np.diff(curves["saturation"])[0])
    found["luma_drift"] = float(np.diff(curves["luma"])[0])
    found["colour_drift"] = float(curves["histogram"][1])
  return found


def pair(made_THWC: np.ndarray, true_THWC: np.ndarray) -> dict[str, float]:
  """PSNR, SSIM and GMSD of a video and its truth, means over frames. PSNR is inf where a frame is exact.

  Raises:
    DataError: shapes that differ, or sides below 11.
  """
  return {
    "psnr": float(fidelity.psnr(made_THWC, true_THWC).mean()),
    "ssim": float(fidelity.ssim(made_THWC, true_THWC).mean()),
    "gmsd": float(perceptual.gmsd(made_THWC, true_THWC).mean()),
  }


@dataclasses.dataclass(frozen=True)
class Extractor:
  """Features of videos, and what their distances are called.

  Attributes:
    name: "low_frequency" or "video_mae". version: hash of its weights, "" without weights.
    of: one video uint8 (T, H, W, 3) -> float (D,).
  """

  name: str
  version: str
  of: Callable[[np.ndarray], np.ndarray]

  @property
  def labels(self) -> tuple[str, str]:
    """Names of the Frechet and of the kernel distance."""
    if self.name == WITHOUT_WEIGHTS:
      return "low_frequency_frechet", "low_frequency_kernel"
    return f"fvd_{self.name}", f"kvd_{self.name}"


def extractor(weights: str | None) -> Extractor:
  """VideoMAE with the weights in a folder or file, or the features that need none.

  Raises:
    WeightsError: no VideoMAE there.
  """
  if weights is None:
    return Extractor(WITHOUT_WEIGHTS, "", lambda video: frechet.low_frequency(video[None])[0])
  features, version = frechet.video_mae(weights)
  return Extractor("video_mae", version, lambda video: features(video[None])[0])


def sets(made_ND: np.ndarray, true_MD: np.ndarray, by: Extractor) -> dict[str, float]:
  """Distances of two sets of features: Frechet's (biased for few videos) and the kernel's (not biased).

  Raises:
    DataError: fewer than two videos in a set.
  """
  distance = frechet.frechet(frechet.Moments.of(made_ND), frechet.Moments.of(true_MD))
  return dict(zip(by.labels, (distance, frechet.kernel(made_ND, true_MD)), strict=True))


@dataclasses.dataclass(frozen=True)
class Figure:
  """Mean of a figure over videos with its standard error (nan below two), over `count` videos that have it."""

  mean: float
  error: float
  count: int


def summary(rows: Iterable[Mapping[str, float]]) -> dict[str, Figure]:
  """{name: figure} over the videos; names in the order of MEANING.

  Raises:
    DataError: no rows.
  """
  rows = list(rows)
  if not rows:
    raise DataError("no videos; figures need at least one")
  found = {}
  for name in MEANING:
    values = np.array([row[name] for row in rows if name in row and not math.isnan(row[name])])
    if len(values):
      spread = values.std(ddof=1) if len(values) > 1 and np.isfinite(values).all() else float("nan")
      found[name] = Figure(float(values.mean()), float(spread / math.sqrt(len(values))), len(values))
  return found


def table(columns: Mapping[str, Mapping[str, Figure]]) -> tuple[list[str], list[Sequence[object]]]:
  """(header, rows) of a table: a row a figure, a column a set; "mean +- error"."""
  names = [name for name in MEANING if any(name in column for column in columns.values())]
  rows: list[Sequence[object]] = []
  for name in names:
    rows.append([name, *(_shown(column.get(name)) for column in columns.values()), MEANING[name]])
  return ["figure", *columns, "what it is"], rows


def text(columns: Mapping[str, Mapping[str, Figure]]) -> str:
  """The table for a terminal, without what the figures are."""
  header, rows = table(columns)
  cells = [[str(cell) for cell in row[:-1]] for row in (header, *rows)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def _shown(figure: Figure | None) -> str:
  if figure is None:
    return ""
  return f"{figure.mean:.4g}" if math.isnan(figure.error) else f"{figure.mean:.4g} ± {figure.error:.2g}"
