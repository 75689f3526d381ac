"""Scores of a clip: `measure.score(frames, times)`, `measure.score_media(file)`; each value names its scorer."""

from kling_jax.measure.clip import PRESETS, SCORERS, Scorer, chosen, sample_times, score, score_media
from kling_jax.measure.sample import Sample

__all__ = ["PRESETS", "SCORERS", "Sample", "Scorer", "chosen", "sample_times", "score", "score_media"]
