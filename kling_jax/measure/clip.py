"""All scores of one clip: who measures what, which scorers a user may ask for, and the call that runs them."""

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kling_jax.data import decode, record
from kling_jax.data.source import Score
from kling_jax.errors import DataError, UsageError, nearest
from kling_jax.measure import (
  aesthetic,
  camera,
  clarity,
  continuity,
  degradation,
  fragments,
  light,
  motion,
  published,
  stillness,
  text,
  vectors,
  vtss,
  watermark,
)  # fmt: skip
from kling_jax.measure import sample as sample_lib
from kling_jax.measure.sample import Sample, sample_times

__all__ = [
  "PRESETS",
  "SCORERS",
  "Scorer",
  "chosen",
  "judged_by",
  "measured",
  "sample_times",
  "sampled",
  "score",
  "score_media",
]


@dataclasses.dataclass(frozen=True)
class Scorer:
  """One way to measure one or several conditions.

  Attributes:
    name, version: written beside every value; a change of the arithmetic is a new version.
    conditions: the scores' names in a clip record (motion, aesthetic, clarity, ...).
    measure: sample -> {condition: value in the documented raw unit}. A condition that the clip does not define (the
      motion of a single frame) is left out; nothing outside `conditions` may be given.
    needs: scores that it reads; where there are any, `measure` is called with (sample, {name: Score}).
    wish: fragments that the sample must hold; of several scorers one may have any.
  """

  name: str
  version: str
  conditions: tuple[str, ...]
  measure: Callable[..., Mapping[str, float]]
  needs: tuple[str, ...] = ()
  wish: fragments.Plan | None = None

  @property
  def key(self) -> str:
    """Name and version in one word, as logs and jobs tell scorers apart."""
    return f"{self.name} {self.version}"

  def done(self, scores: Mapping[str, Score]) -> bool:
    """Whether a clip with these scores was measured by this scorer (at least one of its conditions is there)."""
    found = (scores[name] for name in self.conditions if name in scores)
    return any((score.scorer, score.version) == (self.name, self.version) for score in found)


def _motion(sample: Sample) -> dict[str, float]:
  speed = motion.mean_speed([sample.flows[pair] for pair in sample.pairs])
  return {} if speed is None else {"motion": speed}


def _vtss(name: str, version: str | None = None) -> Scorer:
  """The scorer of a suitability model; the weights of one whose version is known are read when they are needed."""
  model = None if version else vtss.load(name)
  names = model.names if model else vtss.FEATURES
  rate = lambda sample, scores={}: {vtss.CONDITION: vtss.load(name).vtss(sample, scores)}
  found = (model.spec.name, model.version) if model else (name, str(version))
  return Scorer(*found, (vtss.CONDITION,), rate, names, model.wish if model else None)


SCORERS: tuple[Scorer, ...] = (
  Scorer(motion.NAME, motion.VERSION, ("motion",), _motion),
  Scorer(aesthetic.NAME, aesthetic.VERSION, ("aesthetic",), lambda s: {"aesthetic": aesthetic.aesthetic(*s.looks)}),
  Scorer(clarity.NAME, clarity.VERSION, ("clarity",), lambda s: {"clarity": clarity.clarity(*s.looks)}),
  Scorer(degradation.NAME, degradation.VERSION, degradation.CONDITIONS, degradation.degradation),
  Scorer(camera.NAME, camera.VERSION, camera.CONDITIONS, camera.camera),
  Scorer(vectors.NAME, vectors.VERSION, vectors.CONDITIONS, vectors.motion_vectors),
  Scorer(light.NAME, light.VERSION, light.CONDITIONS, light.light),
  Scorer(light.BORDERS_NAME, light.BORDERS_VERSION, ("borders",), light.borders),
  Scorer(stillness.NAME, stillness.VERSION, stillness.CONDITIONS, stillness.stillness),
  Scorer(continuity.NAME, continuity.VERSION, continuity.CONDITIONS, continuity.continuity),
  Scorer(text.NAME, text.VERSION, text.CONDITIONS, text.text),
  Scorer(watermark.NAME, watermark.VERSION, watermark.CONDITIONS, watermark.watermark),
  _vtss(vtss.SHIPPED, vtss.SHIPPED_VERSION),
)
RAFT = "raft:"  # before the place of its weights
# Each decodes the media anew.
PRESETS = tuple(Scorer(one.name, published.VERSION, one.conditions, one.measure) for one in published.DEFINITIONS)


def chosen(words: Sequence[str]) -> tuple[Scorer, ...]:
  """The scorers that words ask for, each once; a later one for the same condition replaces the earlier.

  Args:
    words: "default" (what `kling curate` measures), "presets" (the definitions of published filters), "jax" (the
      camera's scores and flow_motion by the flow in JAX), "raft:FILE_OR_FOLDER" (the same by RAFT-small with the
      weights there), a condition such as "motion", or "package.module:NAME", a `Scorer` of yours.

  Raises:
    UsageError: an unknown condition, or a module without that scorer.
    WeightsError: no weights of RAFT-small where the word says.
  """
  known = {condition: scorer for scorer in (*PRESETS, *SCORERS) for condition in scorer.conditions}
  picked: list[Scorer] = []
  for word in words:
    if word == "default":
      picked += SCORERS
    elif word == "presets":
      picked += PRESETS
    elif word == "jax":
      picked += _in_jax()
    elif word.startswith(RAFT):
      picked += _raft(word.removeprefix(RAFT))
    elif ":" in word:
      picked.append(_foreign(word))
    elif word in known:
      picked.append(known[word])
    else:
      raise UsageError(f"unknown score {word!r}{nearest(word, [*known, 'default', 'presets', 'jax'])}")
  for scorer in list(picked):
    picked[:0] = [known[name] for name in scorer.needs if not any(name in one.conditions for one in picked)]
  last = {condition: scorer for scorer in picked for condition in scorer.conditions}
  kept = dict.fromkeys(scorer for scorer in picked if any(last[c] is scorer for c in scorer.conditions))
  return tuple(kept)


def judged_by(scorers: Sequence[Scorer], model: str | None) -> tuple[Scorer, ...]:
  """The scorers with a suitability model of the user's choice (a shipped name, or a folder) for the score vtss.

  Raises:
    WeightsError: no such model.
  """
  if model is None:
    return tuple(scorers)
  judge = _vtss(model)
  others = [one for one in scorers if one.conditions != judge.conditions]
  known = {condition: scorer for scorer in SCORERS for condition in scorer.conditions}
  held = {condition for one in others for condition in one.conditions}
  lacking = dict.fromkeys(known[name] for name in judge.needs if name not in held)
  return (*others, *lacking, judge)


def _in_jax() -> list[Scorer]:
  from kling_jax.measure import flow  # it starts JAX

  return [
    Scorer(flow.NAME, flow.VERSION, flow.CONDITIONS, flow.flow_motion),
    Scorer(flow.CAMERA_NAME, flow.VERSION, camera.CONDITIONS, flow.camera_motion),
  ]


def _raft(source: str) -> tuple[Scorer, ...]:
  from kling_jax.measure import raft  # it starts JAX

  return raft.scorers(source)


def _foreign(word: str) -> Scorer:
  module, _, name = word.partition(":")
  try:
    found = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError) as error:
    raise UsageError(f"scorer {word!r}: {error}; wants package.module:NAME of a measure.Scorer") from error
  if not isinstance(found, Scorer):
    raise UsageError(f"scorer {word!r} is a {type(found).__name__}, not a measure.Scorer")
  return found


def score(frames_THWC: np.ndarray, times_s: np.ndarray, scorers: Sequence[Scorer] = SCORERS) -> dict[str, Score]:
  """Measures frames that are at hand, such as a generated video.

  Args:
    frames_THWC: uint8 RGB frames (T, H, W, 3) at any size; `sample_times` says which frames of a long clip to take.
    times_s: (T,) their ascending times in seconds.
    scorers: who measures.

  Returns:
    {condition: Score}. A condition that the frames do not define (the motion of a single frame) is left out.

  Raises:
    DataError: no frames, a wrong shape or dtype, or times that do not match them.
  """
  wish = _wish(scorers)
  seed = fragments.seed_of(record.content_hash(frames_THWC.tobytes())) if wish else 0
  return measured(sample_lib.of_frames(frames_THWC, times_s, (wish, seed) if wish else None), scorers)


def score_media(
  source: decode.Media, scorers: Sequence[Scorer] = SCORERS, *, clip_id: str = "", known: Mapping[str, Score] = {}
) -> dict[str, Score]:
  """Measures a video file or encoded bytes; see `score`.

  Args:
    source: a file or bytes.
    scorers: who measures.
    clip_id: decides where fragments are taken, so that a clip's score never changes; "": the content does.
    known: scores that the clip has already, for scorers that need them.

  Raises:
    MediaError: nothing can be decoded.
  """
  return measured(sampled(source, scorers, clip_id), scorers, known)


def sampled(source: decode.Media, scorers: Sequence[Scorer], clip_id: str = "") -> Sample:
  """The sample of a clip with all that the scorers wish to see; see `score_media`."""
  wish = _wish(scorers)
  seed = fragments.seed_of(clip_id or record.content_hash(source)) if wish else 0
  return sample_lib.of_media(source, (wish, seed) if wish else None)


def _wish(scorers: Sequence[Scorer]) -> fragments.Plan | None:
  return next((scorer.wish for scorer in scorers if scorer.wish), None)


def measured(sample: Sample, scorers: Sequence[Scorer], known: Mapping[str, Score] = {}) -> dict[str, Score]:
  """The scores of a sample; of two scorers for a condition the later counts.

  `known` holds scores that the clip has already, for scorers that need them.

  Raises:
    DataError: a scorer gave a condition that it does not name, or no finite number.
  """
  scores: dict[str, Score] = {}
  for scorer in scorers:
    values = scorer.measure(sample, {**known, **scores}) if scorer.needs else scorer.measure(sample)
    for condition in scorer.conditions:
      scores.pop(condition, None)
    for condition, value in values.items():
      if condition not in scorer.conditions or not math.isfinite(value):
        named = ", ".join(scorer.conditions)
        raise DataError(f"scorer {scorer.name} gave {condition} = {value!r}; it measures {named}")
      scores[condition] = Score(float(value), scorer.name, scorer.version)
  return scores
