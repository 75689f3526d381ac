"""Shots that a cut parts although they show the same: their ends are compared as embeddings, and alike ones are joined.

Panda-70M's stitching (arXiv 2402.19479, section 3.1) does so with ImageBind. Here an embedding is any function of
frames; the one at hand needs no weights and knows colours and coarse layout only, so that it joins what a false alarm
parted and not two shots of one scene.
"""

import dataclasses
import importlib
from collections.abc import Callable

import cv2
import numpy as np

from kling_jax.curation import split as split_lib
from kling_jax.data import container, decode
from kling_jax.errors import UsageError

SIDE = 224  # pixels of the frames that are embedded
BESIDE_S = (0.0, 0.2, 0.4)  # from the cut into each shot
COLOURS = "colours"  # the embedding at hand

Embed = Callable[[np.ndarray], np.ndarray]  # uint8 RGB (B, 224, 224, 3) -> (B, E)


def merged(
  video: split_lib.Split, path: str, least: float, embed: Embed, limits: container.Limits = container.DEFAULT_LIMITS
) -> split_lib.Split:
  """The split without the cuts whose two sides have a mean embedding of a cosine of at least `least`.

  Gradual transitions stay: their frames belong to neither shot. Frames are decoded again beside each cut.

  Args:
    video: as `split.split` found it. path: its file.
    least: cosine; embed: see `embedding`.
  """
  alike = set()
  for transition in video.transitions:
    if transition.kind != "cut":
      continue
    before, behind = video.seconds(transition.start_frame), video.seconds(transition.end_frame)
    first, last = video.seconds(0), video.seconds(video.num_frames - 1)
    times_s = [max(first, before - beside) for beside in reversed(BESIDE_S)]
    times_s += [min(last, behind + beside) for beside in BESIDE_S]
    vectors = np.asarray(embed(decode.frames_at(path, np.array(times_s), SIDE, SIDE, limits=limits)), np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    a, b = vectors[: len(BESIDE_S)].mean(axis=0), vectors[len(BESIDE_S) :].mean(axis=0)
    if a @ b >= least * np.linalg.norm(a) * np.linalg.norm(b):
      alike.add(transition)
  if not alike:
    return video
  kept = tuple(transition for transition in video.transitions if transition not in alike)
  ends = {transition.end_frame for transition in alike}
  shots: list[split_lib.Shot] = []
  for shot in video.shots:
    if shots and shot.start_frame in ends and shots[-1].end_frame == shot.start_frame:
      shots[-1] = dataclasses.replace(shots[-1], end_frame=shot.end_frame, end_s=shot.end_s)
    else:
      shots.append(shot)
  return dataclasses.replace(video, transitions=kept, shots=tuple(shots))


def embedding(word: str) -> Embed:
  """The function of a name: "colours", or "package.module:function" of yours.

  Raises:
    UsageError: there is no such function.
  """
  if word == COLOURS:
    return colours
  module, colon, name = word.partition(":")
  try:
    if colon:
      return getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise UsageError(f"embedding {word!r}: {error}") from error
  raise UsageError(f"unknown embedding {word!r}; legal: {COLOURS}, or package.module:function")


def colours(frames_BHWC: np.ndarray) -> np.ndarray:
  """Square roots of the shares of 12 x 6 x 6 colours (hue, saturation, value) in each of 2 x 2 parts, (B, 1728)."""
  found = []
  for frame in frames_BHWC:
    small = cv2.cvtColor(cv2.resize(frame, (64, 64), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2HSV)
    parts = [small[i : i + 32, j : j + 32] for i in (0, 32) for j in (0, 32)]
    bins, ranges = [12, 6, 6], [0, 180, 0, 256, 0, 256]
    found.append(np.concatenate([cv2.calcHist([part], [0, 1, 2], None, bins, ranges).ravel() for part in parts]))
  return np.sqrt(np.stack(found) / 4096)
