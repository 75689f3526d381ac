"""A prediction as a config file that `kling train` takes as it is."""

import dataclasses
import json
import os
import textwrap
from typing import Any

import jax
import ml_collections

from kling_jax import config as config_lib
from kling_jax import files
from kling_jax.errors import ConfigError, UsageError
from kling_jax.scaling import predict
from kling_jax.train import task

WIDE = 256  # widths from here on are multiples of 64, so that heads have 64


@dataclasses.dataclass(frozen=True)
class Base:
  """The config that a prediction changes.

  Attributes:
    spec: file.py:args with the size of the model.
    params: N of that model, d^3. clip_tokens: T of one clip. clip_flops: of training on one, exactly.
  """

  spec: str
  params: float
  clip_tokens: int
  clip_flops: float


def width(params: float) -> int:
  """The width d of the scaling family's member nearest to N = d^3: a multiple of 16, of 64 where it is wide."""
  exact = params ** (1 / 3)
  step = 64 if exact >= WIDE else 16
  return max(16, round(exact / step) * step)


def base(spec: str, params: float) -> Base:
  """The config `spec` with a model of the scaling family nearest to N = params.

  Raises:
    ConfigError: no such config, or one whose argument `size` is not free.
  """
  path, _, arguments = spec.partition(":")
  words = [word for word in arguments.split(",") if word]
  if any(word.startswith("size=") for word in words):
    raise ConfigError(f"config {spec}: leave size out, the prediction chooses it")
  d = width(params)
  full = f"{path}:{','.join([f'size=d{d}', *words])}"
  tokens, flops = cost(config_lib.load(full))
  return Base(full, float(d**3), tokens, flops)


def cost(config: ml_collections.ConfigDict) -> tuple[int, float]:
  """(tokens, exact training FLOPs) of one clip in the first bucket of a config."""
  frames, height, columns = config.data.buckets[0]
  clip = {"frames": jax.ShapeDtypeStruct((1, frames, height, columns, 3), "uint8")}
  return task.make(config).step_cost(clip)


def write(path: str | os.PathLike[str], found: predict.Prediction, model: Base, command: str) -> None:
  """Writes the config file of a prediction for `model`.

  Raises:
    UsageError: the law states no learning rate and batch.
  """
  if found.lr is None or found.batch_tokens is None or found.steps is None:
    raise UsageError(f"law {found.law} states no learning rate and batch: no config can be written")
  files.write_text(path, _text(found, model, command))


def _text(found: predict.Prediction, model: Base, command: str) -> str:
  assert found.batch_tokens is not None and found.lr is not None and found.best_batch_tokens is not None
  values: dict[str, Any] = {
    "optimizer.lr": float(f"{found.lr:.4g}"),
    "optimizer.schedule": "constant",  # the laws belong to a constant rate
    "data.batch": found.batch_tokens // model.clip_tokens,
    "steps": found.steps,
  }
  low, high = found.intervals.get("loss", (float("nan"), float("nan")))
  expected = f"expected loss {found.loss:.5g}" + (f" ({low:.5g} to {high:.5g})" if low == low else "")
  exact = found.tokens / model.clip_tokens * model.clip_flops
  facts = (
    f"Law {found.law}; {found.flops:.4g} FLOPs ({found.flop_rule}; {exact:.4g} counted exactly); {expected}. "
    f"Batch of {found.batch_tokens:,} tokens (best: {found.best_batch_tokens:,.0f}), {model.clip_tokens:,} a clip."
  )
  lines = "\n".join(f"    c.{key} = {json.dumps(value)}" for key, value in values.items())
  warned = "".join(f"\n{textwrap.fill('Warning: ' + warning, 116)}" for warning in found.warnings)
  return f'''"""Video DiT of {model.params:.4g} parameters on {found.tokens:.4g} tokens, by `kling sweep predict`.

{textwrap.fill(facts, 116)}{warned}

Written by: {command}
"""

from kling_jax import config


def get_config(arg: str = ""):
  c = config.load({json.dumps(model.spec)} + ("," + arg if arg else ""))
  if "runlocal" not in arg:
{lines}
  return c
'''
