"""Weights from elsewhere at step 0: `init_from` and frozen pretrained parts, with a strict report."""

import pathlib
from collections.abc import Mapping, Sequence

import jax
import ml_collections

from kling_jax import files
from kling_jax.errors import WeightsError
from kling_jax.interop import safetensors
from kling_jax.nn.params import Params
from kling_jax.train import workdir
from kling_jax.train.checkpoint import Checkpoints


def apply(
  params: Params,
  config: ml_collections.ConfigDict,
  folder: pathlib.Path,
  shardings: Mapping[str, jax.sharding.Sharding],
  pretrained: Mapping[str, str],
) -> Params:
  """Replaces random parameters by loaded ones and writes `init_report.json` where anything was loaded.

  Args:
    params: the random ones, sharded.
    config: `init_from` (whole model) and `init_allow_missing` (patterns that may keep their random start).
    folder: the work directory.
    shardings: where each parameter lives.
    pretrained: {path prefix: work directory or safetensors folder} of parts that have weights of their own.

  Raises:
    WeightsError: a path is neither kind, or names or shapes do not match.
  """
  jobs = [("", config.init_from, tuple(config.init_allow_missing))] if config.init_from else []
  jobs += [(prefix, source, ()) for prefix, source in pretrained.items()]
  report = []
  for prefix, source, allowed in jobs:
    wanted = {
      name.removeprefix(prefix): jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=shardings[name])
      for name, value in params.items()
      if name.startswith(prefix)
    }
    loaded, lines = load(pathlib.Path(source), wanted, allowed)
    params = params | {prefix + name: jax.device_put(value, shardings[prefix + name]) for name, value in loaded.items()}
    report.append({"source": str(source), "prefix": prefix, **lines})
  if report and jax.process_index() == 0:
    files.write_json(folder / "init_report.json", report)
  return params


def load(
  source: pathlib.Path, wanted: Mapping[str, jax.ShapeDtypeStruct], allow_missing: Sequence[str]
) -> tuple[Params, dict[str, object]]:
  """Weights from a work directory (EMA ones of its newest checkpoint) or a folder or file of safetensors.

  Returns:
    (loaded parameters, report: kind, step, loaded, missing, unexpected).
  """
  if (source / "config.json").exists() and (source / "checkpoints").is_dir():
    workdir.read_config(source)
    checkpoints = Checkpoints(source)
    step = checkpoints.latest()
    if step is None:
      raise WeightsError(f"init_from {source} holds no complete checkpoint")
    params, names = checkpoints.restore_matching(step, wanted, allow_missing)
    return params, {"kind": "work directory", "step": step, **names}
  if source.exists():
    params, report = safetensors.load_into(wanted, source, allow_missing=allow_missing)
    return params, {"kind": "safetensors", **report.to_json()}
  raise WeightsError(f"init_from {source} does not exist; give a work directory or a folder of safetensors")
