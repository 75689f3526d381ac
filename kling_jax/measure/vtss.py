"""The suitability score of a clip by a trained model: sub-metrics, fragments and a picture to VTSS, 1 to 5.

A model is a folder: `model.safetensors` (weights of `models.tsa`), `vtss.json` (what it reads and how raw scores become
VTSS). A model of sub-metrics alone runs on NumPy, so that curation's workers need not start JAX.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from kling_jax import assets, files
from kling_jax.data.source import Score
from kling_jax.errors import UsageError, WeightsError
from kling_jax.measure import fragments
from kling_jax.measure.sample import Sample
from kling_jax.measure.vtss_calibration import Calibration

FILE = "vtss.json"
CONDITION = "vtss"
SHIPPED, SHIPPED_VERSION = "weak-label", "62333383f82a"  # the model of every clip unless another is asked for
FEATURES = (
  "motion", "camera_shake", "clarity", "blur", "noise", "blockiness", "bright", "borders", "static", "duplicates",
  "brightness_change", "text", "watermark", "scene_change", "scene_unrest",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Feature:
  """A sub-metric as the label branch reads it: sqrt((x - low) / (high - low)), clipped to 0..1.

  Most sub-metrics are small for most clips and have long tails; the root gives the small ones room.

  Attributes:
    name: of the score. scorer, version: who measured it in training; others are refused.
    low, high: its 1 % and 99 % quantiles in training. usual: its median over well-rated clips.
  """

  name: str
  scorer: str
  version: str
  low: float
  high: float
  usual: float

  def value(self, scores: Mapping[str, Score]) -> float:
    """In 0..1; NaN where the clip has no such score.

    Raises:
      UsageError: it was measured by another scorer.
    """
    score = scores.get(self.name)
    if score is None or not math.isfinite(score.value):
      return math.nan
    if (score.scorer, score.version) != (self.scorer, self.version):
      raise UsageError(
        f"{self.name} was measured by {score.scorer} {score.version}; the model reads that of {self.scorer} "
        f"{self.version}: score the clips anew, or train a model on these"
      )
    return self.scaled(score.value)

  def scaled(self, value: float) -> float:
    return float(np.sqrt(np.clip((value - self.low) / max(self.high - self.low, 1e-12), 0, 1)))

  def raw(self, scaled: float) -> float:
    """The inverse of `scaled` within its range."""
    return self.low + scaled**2 * (self.high - self.low)


@dataclasses.dataclass(frozen=True)
class Spec:
  """What a model is, apart from its weights: the content of `vtss.json`.

  Attributes:
    name: of the model; goes beside every value as its scorer.
    preset, branches, fusion: of `models.tsa.Shape`.
    plan: what is sampled of a clip. features: of the label branch, in order.
    calibration: raw to VTSS. threshold: suggested least VTSS.
    usual: mean vectors of the branches over well-rated clips; what a branch is compared with to explain a score.
    training: facts of the training run for people.
  """

  name: str
  preset: str
  branches: tuple[str, ...]
  fusion: str
  plan: fragments.Plan
  features: tuple[Feature, ...]
  calibration: Calibration
  threshold: float
  usual: dict[str, list[float]]
  training: dict[str, Any]

  def save(self, folder: str | os.PathLike[str]) -> None:
    files.write_json(pathlib.Path(folder) / FILE, {"format": 1} | dataclasses.asdict(self))

  @staticmethod
  def load(folder: str | os.PathLike[str]) -> "Spec":
    """
    Raises:
      WeightsError: no model there, or a damaged one.
    """
    path = pathlib.Path(folder) / FILE
    try:
      held = json.loads(path.read_text(encoding="utf-8"))
      if held.pop("format") != 1:
        raise ValueError("another format; upgrade kling_jax")
      plan = held["plan"] | {"grid": tuple(held["plan"]["grid"])}
      return Spec(
        **held
        | {
          "branches": tuple(held["branches"]),
          "plan": fragments.Plan(**plan),
          "features": tuple(Feature(**feature) for feature in held["features"]),
          "calibration": Calibration(**held["calibration"]),
        }
      )
    except OSError as error:
      raise WeightsError(f"{folder} holds no suitability model ({FILE}: {error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise WeightsError(f"{path} is no description of a suitability model ({error}); export it again") from error


class Model:
  """A model with its weights.

  Attributes:
    spec: see `Spec`. version: hash of the model's files; clips scored by other weights are told apart by it.
  """

  def __init__(self, folder: str | os.PathLike[str]):
    """
    Raises:
      WeightsError: no model there, weights of another size, or a damaged file.
    """
    self.folder = pathlib.Path(folder)
    self.spec = Spec.load(folder)
    digest = hashlib.sha256((self.folder / FILE).read_bytes())
    tensors = _tensors(self.folder)
    for name in sorted(tensors):
      digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    self.version = digest.hexdigest()[:12]
    self._network: _Network | _SubMetrics
    self._network = _SubMetrics(tensors, self.spec) if self.spec.branches == ("label",) else _Network(self)

  @property
  def names(self) -> tuple[str, ...]:
    """Of the sub-metrics that it reads."""
    return tuple(feature.name for feature in self.spec.features) if "label" in self.spec.branches else ()

  @property
  def wish(self) -> fragments.Plan | None:
    """What is to be sampled of a clip; None where the model looks at no frames."""
    return self.spec.plan if {"dynamic", "static"} & set(self.spec.branches) else None

  def inputs(self, sample: Sample, scores: Mapping[str, Score]) -> dict[str, np.ndarray]:
    """What the network reads of a clip: fragments and image uint8, features float32 with NaN for what is missing."""
    return inputs(self.spec, sample, scores)

  def raw(self, inputs: Mapping[str, np.ndarray]) -> float:
    """The network's answer for one clip; always computed alone, so that no other clip changes a bit of it."""
    return self._network.raw(inputs)

  def vtss(self, sample: Sample, scores: Mapping[str, Score]) -> float:
    """1 to 5."""
    return self.spec.calibration.vtss(self.raw(self.inputs(sample, scores)))

  def why(self, inputs: Mapping[str, np.ndarray]) -> list[tuple[str, float, float]]:
    """What moves this clip's VTSS: (branch or sub-metric, its value or NaN, VTSS less what it would be if that one were
    usual), the most harmful first. One is changed at a time, so effects need not add up.
    """
    spec, network = self.spec, self._network
    calibrated = spec.calibration.vtss
    vtss = calibrated(network.raw(inputs))
    rows = []
    if "label" in spec.branches:
      for place, feature in enumerate(spec.features):
        changed = np.array(inputs["features"])
        changed[place] = feature.scaled(feature.usual)
        value = feature.raw(float(inputs["features"][place]))
        rows.append((feature.name, value, vtss - calibrated(network.raw({**inputs, "features": changed}))))
    if isinstance(network, _Network):
      rows += [(f"branch {name}", math.nan, vtss - calibrated(network.raw(inputs, usual=name))) for name in spec.usual]
    return sorted(rows, key=lambda row: row[2])


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The weights, read without JAX."""
  path = folder / "model.safetensors"
  try:
    return safetensors.numpy.load_file(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise WeightsError(f"{path} holds no weights ({error}); export the model again") from error


def inputs(spec: Spec, sample: Sample, scores: Mapping[str, Score]) -> dict[str, np.ndarray]:
  """See `Model.inputs`."""
  found: dict[str, np.ndarray] = {}
  if "dynamic" in spec.branches:
    if sample.mosaics_QTHWC is None:
      raise UsageError(f"model {spec.name} reads fragments, which this sample has not: sample with wish=model.wish")
    found["fragments"] = sample.mosaics_QTHWC
  if "static" in spec.branches:
    found["image"] = picture_of(sample, spec.plan)
  if "label" in spec.branches:
    found["features"] = np.array([feature.value(scores) for feature in spec.features], np.float32)
  return found


def picture_of(sample: Sample, plan: fragments.Plan) -> np.ndarray:
  """The frame in the middle of the clip's places as a square, uint8."""
  places = sample.places
  return fragments.image(sample.frames_THWC[places[len(places) // 2]], plan.image)


class _SubMetrics:
  """The label branch and the score head on NumPy."""

  def __init__(self, tensors: Mapping[str, np.ndarray], spec: Spec):
    wanted = {"null": (len(spec.features),)}
    stems = {name.rpartition(".")[0] for name in tensors if name != "null"}
    sizes = {stem: np.shape(tensors.get(f"{stem}.kernel", 0)) for stem in stems}
    fits = tensors.get("null", np.zeros(0)).shape == wanted["null"] and all(len(size) == 2 for size in sizes.values())
    if not fits or sizes.get("label_mlp.layers.0", (0,))[0] != len(spec.features):
      raise WeightsError(f"the weights of {spec.name} are not for {len(spec.features)} sub-metrics; export it again")
    self._tensors = {name: np.array(tensors[name]) for name in tensors}

  def raw(self, inputs: Mapping[str, np.ndarray]) -> float:
    from scipy.special import erf

    gelu = lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2)))
    x = np.where(np.isnan(inputs["features"]), self._tensors["null"], inputs["features"]).astype(np.float64)
    for stem, bare in (("label_mlp", False), ("head", True)):
      count = sum(name.startswith(f"{stem}.layers.") and name.endswith("kernel") for name in self._tensors)
      for number in range(count):
        layer = f"{stem}.layers.{number}"
        x = x @ self._tensors[f"{layer}.kernel"].astype(np.float64) + self._tensors[f"{layer}.bias"]
        x = x if bare and number == count - 1 else gelu(x)
    return float(x[0])


class _Network:
  """The whole network in JAX."""

  def __init__(self, model: Model):
    from kling_jax.measure import vtss_network  # it starts JAX

    self._rate = vtss_network.rater(model.folder, model.spec)

  def raw(self, inputs: Mapping[str, np.ndarray], usual: str | None = None) -> float:
    """`usual`: a branch whose vector is replaced by the usual one."""
    return self._rate(inputs, usual)


@functools.lru_cache(maxsize=4)
def load(name: str) -> Model:
  """The shipped model by its name, "weak-label", or a model by its folder; one a process.

  Raises:
    WeightsError: neither.
  """
  if name == SHIPPED:
    return Model(assets.folder("weak_label"))
  if not pathlib.Path(name).is_dir():
    raise WeightsError(f"no suitability model {name!r}: wants {SHIPPED}, or the folder of one")
  return Model(name)
