"""Scores as conditions: percentiles fitted on a set turn each raw score into u in [0, 1000], the same everywhere.

u = 1000 * clip((x - q1) / (q99 - q1), 0, 1), where x is the raw score (motion: log1p of it) and q1, q99 are the 1st and
99th percentile of x over the set (Koala-36M, section 5, gives the three scores; the range keeps outliers from
stretching it). The pipeline, the checkpoints and the knobs of `kling sample` go through this one file, in float64, and
a score of another scorer or version is refused: its numbers would mean something else.
"""

import dataclasses
import json
import logging
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kling_jax import files
from kling_jax.data import tokens
from kling_jax.data.mixture import Mixture
from kling_jax.data.source import ClipInfo, Score
from kling_jax.errors import ConfigError, DataError, UsageError, nearest

log = logging.getLogger(__name__)

FORMAT = "kling-conditions-1"
FILE = "conditions.json"
SCALE = 1000.0  # u has the range of the diffusion time that enters the same frequency embedding
LOGARITHMIC = frozenset({"motion"})  # spread over orders of magnitude
TRANSFORMS = ("identity", "log1p")


@dataclasses.dataclass(frozen=True)
class Condition:
  """What the raw values of one score mean on one set.

  Attributes:
    name: of the score.
    scorer, version: what measured the values; others are refused.
    transform: "identity" or "log1p", applied before the percentiles.
    q1, q99: percentiles of the transformed values.
    clips: the number of clips that they were taken from.
  """

  name: str
  scorer: str
  version: str
  transform: str
  q1: float
  q99: float
  clips: int

  def u(self, raw: float) -> float:
    """The condition of a raw value, in [0, 1000].

    Where the set had one value only (q1 = q99), that value is 500, smaller ones 0 and larger ones 1000.

    Raises:
      DataError: `raw` is not finite, or negative where the transform is log1p.
    """
    x = transformed(self.name, self.transform, raw)
    if self.q99 > self.q1:
      return SCALE * min(max((x - self.q1) / (self.q99 - self.q1), 0.0), 1.0)
    return SCALE * (0.5 + 0.5 * float(np.sign(x - self.q1)))

  def check(self, score: Score, where: str) -> None:
    """Raises DataError where `score` was not made by the scorer and version of the percentiles."""
    if (score.scorer, score.version) != (self.scorer, self.version):
      raise DataError(
        f"{where}: {self.name} comes from {score.scorer} {score.version}, the percentiles from {self.scorer} "
        f"{self.version}; score the set again with one version, then fit {FILE} again"
      )


def transformed(name: str, transform: str, raw: float) -> float:
  """The value whose percentiles are taken. Raises DataError where `raw` has none."""
  raw = float(raw)
  if not math.isfinite(raw) or (transform == "log1p" and raw < 0):
    legal = "a finite number of at least 0" if transform == "log1p" else "a finite number"
    raise DataError(f"{name} is {raw}; {name} must be {legal}")
  return math.log1p(raw) if transform == "log1p" else raw


@dataclasses.dataclass(frozen=True)
class Percentiles:
  """The conditions of a model, in the order of its score embeddings."""

  conditions: tuple[Condition, ...]

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(condition.name for condition in self.conditions)

  def normalise(self, name: str, raw: float) -> float:
    """The condition u of one raw value: what a clip with that score was trained with.

    Raises:
      UsageError: the model has no such score.
      DataError: the value is not legal.
    """
    for condition in self.conditions:
      if condition.name == name:
        return float(np.float32(condition.u(raw)))
    raise UsageError(f"this model was not trained with a score {name!r}{nearest(name, self.names)}")

  def of_clip(self, scores: Mapping[str, Score], where: str) -> tuple[np.ndarray, np.ndarray]:
    """The conditions of one clip.

    Args:
      scores: raw scores by name; missing ones become unknown, further ones are ignored.
      where: names the clip in errors.

    Returns:
      u_M float32 in [0, 1000] (0 where unknown) and known_M bool.

    Raises:
      DataError: a value is not legal, or comes from another scorer or version.
    """
    u_M, known_M = np.zeros(len(self.conditions), np.float32), np.zeros(len(self.conditions), bool)
    for m, condition in enumerate(self.conditions):
      score = scores.get(condition.name)
      if score is None:
        continue
      condition.check(score, where)
      u_M[m], known_M[m] = condition.u(score.value), True
    return u_M, known_M

  def raw(self, name: str, u: float) -> float:
    """The raw value whose condition is `u` in [0, 1000]: the inverse of `normalise` between the percentiles.

    Raises:
      UsageError: the model has no such score.
    """
    for condition in self.conditions:
      if condition.name == name:
        x = condition.q1 + u / SCALE * (condition.q99 - condition.q1)
        return math.expm1(x) if condition.transform == "log1p" else x
    raise UsageError(f"this model was not trained with a score {name!r}{nearest(name, self.names)}")

  def caption_of(self, info: ClipInfo, room: int) -> str:
    """The caption of a clip with its scores behind it (`in_caption`); those that it lacks are left out."""
    return self.in_caption(info.caption, {name: score.value for name, score in info.scores.items()}, room)

  def in_caption(self, caption: str, raw: Mapping[str, float], room: int) -> str:
    """`caption` with raw scores as text: "a cat. motion score: 10, aesthetic score: 5.5."; others are ignored.

    That is how Open-Sora 1.2 tells a model its scores: the baseline that AdaLN is compared with (Koala-36M, section 5).

    Args:
      caption: cut where the scores would otherwise not fit.
      raw: {name: value}; names that are no condition are ignored.
      room: bytes of the whole.

    Raises:
      ConfigError: not even the scores fit.
    """
    told = ", ".join(f"{name} score: {raw[name]:.3g}" for name in self.names if name in raw)
    if not told:
      return caption
    left = room - len(told) - 1
    if left < 0:
      raise ConfigError(f"text.tokens = {room + 2} holds no {told!r}; model.told = 'caption' needs longer texts")
    words = tokens.cut(caption.rstrip().rstrip(".").encode("utf-8", errors="replace"), max(0, left - 2)).decode("utf-8")
    return f"{words}. {told}." if words else f"{told}."

  def select(self, names: Sequence[str]) -> "Percentiles":
    """The conditions `names`, in that order.

    Raises:
      DataError: one was not fitted.
    """
    held = {condition.name: condition for condition in self.conditions}
    for name in names:
      if name not in held:
        raise DataError(f"no percentiles of the score {name!r}{nearest(name, held)}; score the set, then fit again")
    return Percentiles(tuple(held[name] for name in names))

  def to_json(self) -> dict[str, Any]:
    """JSON-ready form, for conditions.json and for checkpoints."""
    return {"format": FORMAT, "conditions": [dataclasses.asdict(condition) for condition in self.conditions]}

  @staticmethod
  def from_json(value: Any, where: str = "conditions") -> "Percentiles":
    """The inverse of `to_json`; `where` names the file in errors.

    Raises:
      DataError: `value` has another form.
    """
    try:
      if value["format"] != FORMAT:
        raise ValueError(f"format is {value['format']!r}, expected {FORMAT!r}")
      read = Percentiles(tuple(Condition(**entry) for entry in value["conditions"]))
      for condition in read.conditions:
        _check_form(condition)
      if len(set(read.names)) < len(read.names):
        raise ValueError(f"a score stands there twice: {', '.join(read.names)}")
    except (KeyError, TypeError, ValueError) as error:
      raise DataError(f"{where} is no list of condition percentiles ({error}); fit it again") from error
    return read

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes conditions.json, whole or not at all."""
    files.write_json(path, self.to_json())


def load(path: str | os.PathLike[str]) -> Percentiles:
  """Reads conditions.json.

  Raises:
    DataError: it is missing or damaged.
  """
  try:
    value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise DataError(f"{path} does not exist; it is fitted on a scored set") from error
  except ValueError as error:
    raise DataError(f"{path} is not JSON ({error}); fit it again") from error
  return Percentiles.from_json(value, str(path))


def fit(infos: Iterable[ClipInfo], names: Sequence[str]) -> Percentiles:
  """Fits q1 and q99 of each score of `names` over a set; clips without a score do not count for it.

  Raises:
    ConfigError: a name stands twice.
    DataError: no clip has the score, its scorer or version changes within the set, or a value is not legal.
  """
  if len(set(names)) < len(names):
    raise ConfigError(f"a condition stands twice in {', '.join(names)}")
  values: dict[str, list[float]] = {name: [] for name in names}
  made_by: dict[str, Condition] = {}
  seen: set[str] = set()
  for info in infos:
    seen.update(info.scores)
    for name in names:
      score = info.scores.get(name)
      if score is None:
        continue
      transform = "log1p" if name in LOGARITHMIC else "identity"
      first = made_by.setdefault(name, Condition(name, score.scorer, score.version, transform, 0.0, 0.0, 0))
      first.check(score, f"clip {info.clip_id}")
      values[name].append(transformed(f"clip {info.clip_id}: {name}", transform, score.value))
  return Percentiles(tuple(_fitted(name, made_by.get(name), values[name], seen) for name in names))


def _fitted(name: str, made_by: Condition | None, values: Sequence[float], seen: Iterable[str]) -> Condition:
  if made_by is None:
    raise DataError(f"no clip of the set has the score {name!r}{nearest(name, seen)}; score the set, or leave it out")
  q1, q99 = (float(q) for q in np.percentile(np.asarray(values, np.float64), (1, 99)))
  if q1 == q99:
    log.warning("all %d clips have the same %s (%g): it tells the model nothing", len(values), name, q1)
  return dataclasses.replace(made_by, q1=q1, q99=q99, clips=len(values))


def for_sources(sources: Mixture, names: Sequence[str]) -> Percentiles:
  """The percentiles of a training mixture: conditions.json where it is one set that has it, else fitted here.

  A mixture of several sets is always fitted as a whole: one raw score must mean one u.

  Raises:
    DataError: see `fit` and `load`.
  """
  if not names:
    return Percentiles(())
  beside = sources.folders[0] / FILE if len(sources.folders) == 1 and sources.folders[0] else None
  if beside is not None and beside.exists():
    return load(beside).select(names)
  return fit(sources.infos(), names)


def _check_form(condition: Condition) -> None:
  if not all(isinstance(getattr(condition, key), str) for key in ("name", "scorer", "version")):
    raise ValueError("name, scorer and version are texts")
  if condition.transform not in TRANSFORMS:
    raise ValueError(f"{condition.name} has the transform {condition.transform!r}; legal: {', '.join(TRANSFORMS)}")
  if not (math.isfinite(condition.q1) and math.isfinite(condition.q99) and condition.q1 <= condition.q99):
    raise ValueError(f"{condition.name} has q1 = {condition.q1} and q99 = {condition.q99}")
