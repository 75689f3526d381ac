"""The file of a step cache: how residuals change from network call to call, and whose they are."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from kling_jax import files
from kling_jax.errors import WeightsError
from kling_jax.nn.params import Params

KIND = "kling_jax step cache 1"
SPACED = 8  # numbers along each axis of a parameter that tell checkpoints apart

Owner = dict[str, Any]


def owner(params: Params, recipe: Any) -> Owner:
  """What a calibration belongs to, JSON-ready: the weights by a hash of numbers of each, and every sampler setting."""
  settings = json.loads(json.dumps(dataclasses.asdict(recipe)))  # tuples become lists, as in the file
  return {"weights": _fingerprint(params), "sampler": settings}


def _fingerprint(params: Params) -> str:
  """Hash of names, shapes and evenly spaced numbers of all parameters: adapters and another step change it."""
  digest = hashlib.sha256()
  for name, value in sorted(params.items()):
    some = value[tuple(slice(None, None, -(-size // SPACED)) for size in value.shape)]
    digest.update(f"{name} {value.shape} {value.dtype}".encode() + np.asarray(some).tobytes())
  return digest.hexdigest()[:16]


def write(path: str | pathlib.Path, whose: Owner, ratio_CB: np.ndarray) -> None:
  """Writes the ratios of a dense run, (calls, videos), with their mean and spread over the videos."""
  ratio_C, spread_C = ratio_CB.mean(1), ratio_CB.std(1)
  if not np.isfinite(ratio_C).all():
    raise WeightsError("the step cache cannot be calibrated: the network's activations are not finite")
  answer = {
    "kind": KIND, **whose, "videos": ratio_CB.shape[1],
    "ratio": [round(float(x), 6) for x in ratio_C], "spread": [round(float(x), 6) for x in spread_C],
  }  # fmt: skip
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  files.write_json(path, answer)


def read(path: str | pathlib.Path, whose: Owner, calls: int) -> np.ndarray:
  """The ratios (calls,) of the file `path`.

  Raises:
    WeightsError: no such file, a damaged one, or one of another checkpoint or sampler: says what differs.
  """
  mend = "calibrate again: the same `kling sample` with --calibrate_cache FILE in place of --cache"
  try:
    held = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    if held["kind"] != KIND:
      raise ValueError(f"kind {held['kind']!r}")
    weights, settings = str(held["weights"]), dict(held["sampler"])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise WeightsError(f"{path} is no step cache ({error}); {mend}") from error
  if weights != whose["weights"]:
    raise WeightsError(f"{path} belongs to another checkpoint (or other adapters); {mend}")
  differing = [
    f"{name} {settings.get(name)} there and {value} here"
    for name, value in whose["sampler"].items()
    if settings.get(name) != value
  ]
  if differing:
    raise WeightsError(f"{path} belongs to another sampler: {', '.join(differing)}; {mend}")
  try:
    ratio_C = np.asarray(held["ratio"], np.float64)
    if ratio_C.shape != (calls,) or not np.isfinite(ratio_C).all():
      raise ValueError(f"ratios of shape {ratio_C.shape}, not {calls} finite ones")
  except (ValueError, KeyError, TypeError) as error:
    raise WeightsError(f"{path} is damaged ({error}); {mend}") from error
  return ratio_C
