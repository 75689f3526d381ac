"""The held-out clips of a run that fit its samples: what evaluations of a checkpoint compare with."""

import numpy as np

from kling_jax.data import buckets
from kling_jax.data.pipeline import Batches
from kling_jax.errors import DataError
from kling_jax.generate.sample import Model, Request, Settings


def fitting(model: Model, settings: Settings) -> tuple[Batches, list[int]]:
  """The validation split of a run, and the numbers of its clips that are as long and large as the samples."""
  frames, height, width = model.size(settings)
  bucket = buckets.Bucket(frames, height, width, settings.fps or model.config.data.fps)
  batches = model.task.batches("validation", 0, 1, 1)
  clips = [clip for held in batches.clips for clip in held.tolist()]
  return batches, [c for c in clips if buckets.refusal(batches.sources.info(c), bucket, buckets.Limits()) is None]


def frames_of(model: Model, settings: Settings, batches: Batches, clips: list[int]) -> list[np.ndarray]:
  """The first frames of clips at the size and rate of the samples, uint8 (T, H, W, 3) each."""
  frames, height, width = model.size(settings)
  times_s = np.arange(frames) / (settings.fps or model.config.data.fps)
  return [batches.sources.frames(clip, times_s, height, width) for clip in clips]


def examples(
  model: Model, settings: Settings, count: int, seed: int
) -> tuple[list[str], list[Request], list[np.ndarray]]:
  """(clip ids, requests with their captions and scores, their frames) of at most `count` held-out clips.

  Raises:
    DataError: fewer than two of them fit.
  """
  batches, clips = fitting(model, settings)
  if len(clips) < 2:
    raise DataError(
      f"{len(clips)} held-out clips are long enough, an evaluation needs two; raise data.validation_fraction of the "
      "run, or lower --frames"
    )
  infos = [batches.sources.info(clip) for clip in clips[:count]]
  told = model.percentiles.names
  requests = [
    Request(info.caption, seed=seed + k, scores={n: info.scores[n].value for n in told if n in info.scores})
    for k, info in enumerate(infos)
  ]
  return [info.clip_id for info in infos], requests, frames_of(model, settings, batches, clips[:count])
