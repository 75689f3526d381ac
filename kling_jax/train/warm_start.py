"""Weights from elsewhere at step 0: `init_from` and frozen pretrained parts, with a strict report."""

import fnmatch
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import ml_collections

from kling_jax import files, stores
from kling_jax.errors import WeightsError
from kling_jax.interop import detect, safetensors
from kling_jax.nn.params import Params
from kling_jax.train import workdir
from kling_jax.train.checkpoint import Checkpoints

REPORT = "init_report.json"


class Pretrained(NamedTuple):
  """Weights of one part of a model: where they are, and patterns of parameters that may keep their random start."""

  source: str
  allow_missing: tuple[str, ...] = ()


def apply(
  params: Params,
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  shardings: Mapping[str, jax.sharding.Sharding],
  pretrained: Mapping[str, str | Pretrained],
) -> Params:
  """Replaces random parameters by loaded ones and writes `init_report.json` where anything was loaded.

  Args:
    params: the random ones, sharded.
    config: `init_from` (whole model), `init_allow_missing` (patterns that may keep their random start) and `init_skip`
      (patterns that do so whatever `init_from` has).
    folder: the work directory.
    shardings: where each parameter lives.
    pretrained: {path prefix: work directory or safetensors folder} of parts that have weights of their own, and
      whether some of their parameters may be missing there.

  Raises:
    WeightsError: a path is neither kind, or names or shapes do not match.
  """
  allowed = (*config.init_allow_missing, "lora.*")  # adapters start as the identity
  jobs = [("", config.init_from, allowed)] if config.init_from else []
  for prefix, part in pretrained.items():
    jobs.append((prefix, *(part if isinstance(part, Pretrained) else Pretrained(part))))
  report = []
  for prefix, source, allowed in jobs:
    wanted = {
      name.removeprefix(prefix): jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=shardings[name])
      for name, value in params.items()
      if name.startswith(prefix) and (prefix or not _listed(name, config.init_skip))
    }
    loaded, lines = load(pathlib.Path(stores.here(source)), wanted, allowed, () if prefix else config.init_skip)
    params = params | {prefix + name: jax.device_put(value, shardings[prefix + name]) for name, value in loaded.items()}
    report.append({"source": str(source), "prefix": prefix, **lines})
  if report and jax.process_index() == 0:
    files.write_json(folder / REPORT, report)
  return params


def _listed(name: str, patterns: Sequence[str]) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def origins(folder: pathlib.Path) -> list[dict[str, str]]:
  """Where the weights of a work directory came from, and their fingerprints; [] for a run that began at random."""
  path = folder / REPORT
  if not path.is_file():
    return []
  report = json.loads(path.read_text(encoding="utf-8"))
  return [
    {key: str(part[key]) for key in ("source", "prefix", "fingerprint", "step") if key in part} for part in report
  ]


def load(
  source: pathlib.Path,
  wanted: Mapping[str, jax.ShapeDtypeStruct],
  allow_missing: Sequence[str],
  skipped: Sequence[str] = (),
) -> tuple[Params, dict[str, object]]:
  """Weights from a work directory (EMA ones of its newest checkpoint) or a folder or file of safetensors.

  Args:
    allow_missing: patterns of wanted names that the source may lack.
    skipped: patterns of names in our layout that a file may have though nobody wants them; a work directory may have
      any.

  Returns:
    (loaded parameters, report: kind, step, loaded, missing, unexpected).
  """
  if workdir.is_one(source):
    workdir.read_config(source)
    checkpoints = Checkpoints(source)
    step = checkpoints.latest()
    if step is None:
      raise WeightsError(f"init_from {source} holds no complete checkpoint")
    params, names = checkpoints.restore_matching(step, wanted, allow_missing)
    return params, {"kind": "work directory", "step": step, **names}
  if source.exists():
    found = detect.recognise(source)
    if found is not None:
      return _load_foreign(found, wanted, allow_missing)
    params, report = safetensors.load_into(wanted, source, allow_missing=allow_missing, allow_unexpected=skipped)
    return params, {"kind": "safetensors", "fingerprint": safetensors.fingerprint(source), **report.to_json()}
  raise WeightsError(f"init_from {source} does not exist; give a work directory or a folder of safetensors")


def _load_foreign(
  found: detect.Foreign, wanted: Mapping[str, jax.ShapeDtypeStruct], allow_missing: Sequence[str]
) -> tuple[Params, dict[str, object]]:
  """Weights in a foreign layout; a transformer lands under "dit." where the whole model is wanted."""
  prefix = "dit." if found.kind == "video_dit" and any(name.startswith("dit.") for name in wanted) else ""
  name_map = {prefix + path: recipe for path, recipe in found.name_map.items()}
  allowed = (*allow_missing, *(prefix + pattern for pattern in found.ours))
  if prefix:  # what stands beside the transformer: of our own making, or loaded from elsewhere
    allowed = (*allowed, "null_text", "codec.*", "text.*")
  params, report = safetensors.load_into(
    wanted, found.tensors.source, name_map, allow_missing=allowed, allow_unexpected=found.ignored
  )
  facts = {"kind": found.kind, "naming": found.naming, "fingerprint": safetensors.fingerprint(found.tensors)}
  return params, facts | report.to_json()
