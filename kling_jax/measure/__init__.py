"""Scores of a clip from its frames: `measure.score(frames, times)`; each value names its scorer and version."""

from kling_jax.measure.clip import SCORERS, Scorer, sample_times, score

__all__ = ["SCORERS", "Scorer", "sample_times", "score"]
