"""The page of an evaluation: figures, distances, and videos side by side with their truth."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from kling_jax import page
from kling_jax.data import encode
from kling_jax.evals import compare

SIDE = 160  # pixels: larger videos are shrunk to this shorter side, those below half of it enlarged
FRAMES = 96  # of a shown video, at most
GAP = 4  # white pixels between videos


def build(
  answer: Mapping[str, Any], columns: Mapping[str, Mapping[str, compare.Figure]], shown: Sequence["Shown"]
) -> page.Page:
  """The page, to be written.

  Args:
    answer: what the JSON beside it holds (`generate.evaluate`). columns: figures of each set. shown: videos.
  """
  document = page.Page(answer["title"], answer["subtitle"])
  document.section("Figures", "Means over videos with their standard errors.")
  document.facts({f"{name} videos": count for name, count in answer["videos"].items()})
  document.table(*compare.table(columns))
  if answer["distances"]:
    document.section("Distances of the two sets", _features(answer["features"]))
    document.table(["distance", "value"], list(answer["distances"].items()))
  for note in answer["notes"]:
    document.text(note)
  if shown:
    document.section("Side by side", shown[0].order)
    widest = max(one.frames_THWC.shape[2] for one in shown)
    document.gallery([one.tile() for one in shown], width=min(max(widest, 220), 560))
  if answer["rows"]:
    document.section("Each video")
    names = [name for name in compare.MEANING if any(name in row["figures"] for row in answer["rows"])]
    rows = [(row["set"], row["name"], *(row["figures"].get(name, "") for name in names)) for row in answer["rows"]]
    document.table(["set", "video", *names], rows)
  return document


def _features(features: Mapping[str, str]) -> str:
  if features["name"] == compare.WITHOUT_WEIGHTS:
    return (
      "Of features that need no weights: the lowest frequencies of each colour. They see colours, coarse layout and "
      "slow change. This is no FVD; give --video_mae WEIGHTS for that."
    )
  return (
    f"Of features of VideoMAE (weights {features['version'][:12]}): the Frechet distance of these is FVD, biased "
    "upwards for few videos, so compare sets of equal count; the kernel distance is not biased."
  )


class Shown:
  """Videos of one row, put beside one another.

  Args:
    caption: below it. order: what stands where, from left to right. videos: uint8 (T, H, W, 3) of one size.
    fps: of all of them.
  """

  def __init__(self, caption: str, order: str, videos: Sequence[np.ndarray], fps: float):
    self.caption, self.order, self.fps = caption, order, fps
    count = min(len(video) for video in videos)
    every = -(-count // FRAMES)
    small = [_small(video[:count:every]) for video in videos]
    white = np.full((*small[0].shape[:2], GAP, 3), 255, np.uint8)
    parts = [part for video in small for part in (video, white)][:-1]
    self.frames_THWC = np.concatenate(parts, axis=2)
    self.fps /= every

  def tile(self) -> page.Tile:
    height, width = (side // 2 * 2 for side in self.frames_THWC.shape[1:3])
    media = encode.encode(list(self.frames_THWC[:, :height, :width]), fps=self.fps)
    return page.Tile(media, self.caption)


def difference(made_THWC: np.ndarray, true_THWC: np.ndarray) -> np.ndarray:
  """Their difference around grey: levels of 128 + (made - true) / 2, uint8."""
  return (128 + (made_THWC.astype(np.int16) - true_THWC) // 2).astype(np.uint8)


def _small(frames_THWC: np.ndarray) -> np.ndarray:
  """Shrunk to a shorter side of SIDE, or enlarged by a whole factor, both so that videos can be looked at."""
  height, width = frames_THWC.shape[1:3]
  shorter = min(height, width)
  if shorter > SIDE:
    size, how = (round(width * SIDE / shorter), round(height * SIDE / shorter)), cv2.INTER_AREA
  else:
    factor = max(1, SIDE // 2 // shorter)
    size, how = (width * factor, height * factor), cv2.INTER_NEAREST
  return np.stack([cv2.resize(frame, size, interpolation=how) for frame in frames_THWC])
