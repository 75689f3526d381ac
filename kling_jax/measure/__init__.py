"""Scores of a clip: `measure.score(frames, times)`, `measure.score_media(file)`; each value names its scorer."""

from kling_jax.measure.clip import (
  PRESETS,
  SCORERS,
  Scorer,
  chosen,
  judged_by,
  measured,
  sample_times,
  sampled,
  score,
  score_media,
)  # fmt: skip
from kling_jax.measure.sample import Sample

__all__ = [
  "PRESETS",
  "SCORERS",
  "Sample",
  "Scorer",
  "chosen",
  "judged_by",
  "measured",
  "sample_times",
  "sampled",
  "score",
  "score_media",
]
