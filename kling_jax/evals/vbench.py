"""VBench from outside: videos under the names and rates that its suites read, and its total scores as formulas.

VBench (arXiv 2311.17982) with its parts VBench-I2V and VBench-Long is run by its own code, which needs a dozen
pretrained networks; this is all that it wants from a model. Videos are `PROMPT-INDEX.mp4`, five a prompt (25 for
temporal flickering), at 8 frames a second (VBench) or the model's own rate (I2V, Long); prompts come from the suites'
own lists (`VBench_full_info.json`, `vbench2_i2v_full_info.json`).

Totals: each dimension is scaled to (score - min) / (max - min) and weighted.
"""

import dataclasses
import fractions
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kling_jax import files, progress
from kling_jax.data import encode
from kling_jax.errors import DataError, UsageError, nearest

SAMPLES, FLICKERING_SAMPLES = 5, 25
FPS = 8.0
CRF = 10.0
CUSTOM = (
  "subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality",
  "imaging_quality",
)  # fmt: skip

# Smallest and largest score of each dimension (scripts/constant.py of Vchitect/VBench); 0 and 1 where not named.
_RANGES = {
  "subject_consistency": (0.1462, 1.0),
  "background_consistency": (0.2615, 1.0),
  "temporal_flickering": (0.6293, 1.0),
  "motion_smoothness": (0.706, 0.9975),
  "scene": (0.0, 0.8222),
  "appearance_style": (0.0009, 0.2855),
  "temporal_style": (0.0, 0.364),
  "overall_consistency": (0.0, 0.364),
  "i2v_subject": (0.1462, 1.0),
  "i2v_background": (0.2615, 1.0),
}
_WEIGHTS = {"dynamic_degree": 0.5, "camera_motion": 0.1}  # all others 1
QUALITY = ("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness",
           "dynamic_degree", "aesthetic_quality", "imaging_quality")  # fmt: skip
SEMANTIC = ("object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene",
            "appearance_style", "temporal_style", "overall_consistency")  # fmt: skip
I2V = ("i2v_subject", "i2v_background")
DIMENSIONS = (*QUALITY, *SEMANTIC, *I2V, "camera_motion")


# ----------------------------------------------------------------------------------------------------------- totals


@dataclasses.dataclass(frozen=True)
class Total:
  """Shares in [0, 1]: of quality, of the other part (semantic, or likeness to the image), and in all."""

  quality: float
  other: float
  total: float


def total(scores: Mapping[str, float]) -> Total:
  """VBench's and VBench-Long's total: (4 x quality + semantic) / 5.

  Args:
    scores: {dimension: raw score in [0, 1]}, all sixteen.

  Raises:
    DataError: a dimension is missing or unknown, or a score is in percent.
  """
  _check(scores, (*QUALITY, *SEMANTIC))
  quality, semantic = _part(scores, QUALITY), _part(scores, SEMANTIC)
  return Total(quality, semantic, (4 * quality + semantic) / 5)


def i2v_total(scores: Mapping[str, float], definition: str = "script") -> Total:
  """VBench-I2V's total: the mean of the quality part and of the likeness to the image.

  Args:
    scores: {dimension: raw score in [0, 1]}.
    definition: "script", today's cal_i2v_final_score.py: camera motion counts, temporal flickering does not; or
      "owl1", that of the table in arXiv 2412.09600: the reverse.

  Raises:
    DataError: a dimension is missing or unknown, or a score is in percent. ValueError: another definition.
  """
  if definition not in ("script", "owl1"):
    raise ValueError(f"definition {definition!r}: legal are 'script' and 'owl1'")
  script = definition == "script"
  quality_names = tuple(name for name in QUALITY if not (script and name == "temporal_flickering"))
  image_names = (*I2V, "camera_motion") if script else I2V
  _check(scores, (*quality_names, *image_names))
  quality, image = _part(scores, quality_names), _part(scores, image_names)
  return Total(quality, image, (quality + image) / 2)


def _part(scores: Mapping[str, float], names: Sequence[str]) -> float:
  weights = [_WEIGHTS.get(name, 1.0) for name in names]
  scaled = []
  for name in names:
    low, high = _RANGES.get(name, (0.0, 1.0))
    scaled.append((scores[name] - low) / (high - low))
  return sum(w * s for w, s in zip(weights, scaled, strict=True)) / sum(weights)


def _check(scores: Mapping[str, float], names: Sequence[str]) -> None:
  for name in scores:
    if name not in DIMENSIONS:
      raise DataError(f"VBench has no dimension {name!r}{nearest(name, DIMENSIONS)}")
  missing = [name for name in names if name not in scores]
  if missing:
    raise DataError(f"the total needs the dimensions {', '.join(missing)}, too")
  wrong = [name for name in names if not -1 <= scores[name] <= 1]
  if wrong:
    raise DataError(f"{wrong[0]} is {scores[wrong[0]]}; scores are shares, not percent: divide by 100")


# ----------------------------------------------------------------------------------------------------------- export


@dataclasses.dataclass(frozen=True)
class Prompt:
  """One line of a suite: its text, the dimensions that it is for, and for I2V the file name of its image."""

  text: str
  dimensions: tuple[str, ...]
  image: str = ""

  @property
  def samples(self) -> int:
    return FLICKERING_SAMPLES if "temporal_flickering" in self.dimensions else SAMPLES


def read_suite(path: str | os.PathLike[str], dimensions: Sequence[str] = ()) -> list[Prompt]:
  """The prompts of a suite's `*full_info.json`, those of `dimensions` only (all where there are none).

  Raises:
    DataError: no such file. UsageError: an unknown dimension.
  """
  for name in dimensions:
    if name not in DIMENSIONS:
      raise UsageError(f"VBench has no dimension {name!r}{nearest(name, DIMENSIONS)}")
  try:
    entries = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    prompts = [Prompt(str(e["prompt_en"]), tuple(e["dimension"]), str(e.get("image_name", ""))) for e in entries]
  except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
    raise DataError(f"{path}: no full_info.json of VBench ({type(error).__name__}: {error})") from error
  chosen = [prompt for prompt in prompts if not dimensions or set(dimensions) & set(prompt.dimensions)]
  if not chosen:
    raise DataError(f"{path}: no prompt for {', '.join(dimensions)}")
  return chosen


Sample = Callable[[Prompt, int], np.ndarray]


def export(folder: str | os.PathLike[str], prompts: Sequence[Prompt], sample: Sample, fps: float = FPS) -> list[str]:
  """Writes the videos of a suite; those that are there already are left as they are, so that a killed run goes on.

  Beside them stands `videos.json`: {file: {prompt, index, image, dimensions, fps}}, which VBench does not read. The
  index is the seed that `sample` gets, so that a run can be repeated.

  Args:
    sample: (prompt, index) -> uint8 (T, H, W, 3).

  Returns:
    The file names, in the order of the suite.

  Raises:
    DataError: a prompt that can be no file name, or two prompts with one name.
  """
  folder = pathlib.Path(folder)
  # A prompt may come several times, for different dimensions; its videos are shared, the larger number is made.
  counts: dict[str, tuple[Prompt, int]] = {}
  for prompt in prompts:
    _, most = counts.get(prompt.text, (prompt, 0))
    counts[prompt.text] = prompt, max(most, prompt.samples)
  listed = {}
  for prompt, count in counts.values():
    for index in range(count):
      listed[_name(prompt.text, index)] = prompt, index
  for name, (prompt, index) in progress.track(listed.items(), "VBench videos", len(listed)):
    if not (folder / name).exists():
      frames_THWC = sample(prompt, index)
      encode.write(folder / name, iter(frames_THWC), fps=fractions.Fraction(fps).limit_denominator(1001), crf=CRF)
  about = {
    name: {
      "prompt": prompt.text, "index": index, "image": prompt.image, "dimensions": list(prompt.dimensions), "fps": fps,
    }
    for name, (prompt, index) in listed.items()
  }  # fmt: skip
  files.write_json(folder / "videos.json", about)
  return list(listed)


def export_custom(folder: str | os.PathLike[str], videos: Mapping[str, tuple[str, np.ndarray]], fps: float) -> None:
  """Writes one's own videos for VBench's modes `custom_input` and `long_custom_input`, for the dimensions CUSTOM.

  Beside them stands `prompts.json`, {path: prompt}, the form of VBench's `--prompt_file`: its command line does not
  take prompts of several words.

  Args:
    videos: {file name: (prompt, uint8 (T, H, W, 3))}.
  """
  folder = pathlib.Path(folder)
  for name, (_, frames_THWC) in videos.items():
    if pathlib.PurePath(name).name != name or not name.endswith(".mp4"):
      raise DataError(f"video {name!r}: wants a plain file name that ends in .mp4")
    encode.write(folder / name, iter(frames_THWC), fps=fractions.Fraction(fps).limit_denominator(1001), crf=CRF)
  files.write_json(folder / "prompts.json", {str(folder / name): prompt for name, (prompt, _) in videos.items()})


def _name(prompt: str, index: int) -> str:
  """The file name that the suites look for."""
  name = f"{prompt}-{index}.mp4"
  if "/" in prompt or "\0" in prompt or not prompt or len(name.encode()) > 255:
    raise DataError(f"prompt {prompt[:60]!r} can be no file name; VBench reads its videos by their prompts")
  return name
