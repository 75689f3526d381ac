"""Reference models in PyTorch with random weights, and our classes around the same weights."""

import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from agreement import cosine, relative_error, times


def weights_of(model: Any) -> dict[str, np.ndarray]:
  return {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}


def facts_of(model: Any) -> dict[str, Any]:
  """config.json of a model, without the version of its library."""
  config = model.config if isinstance(model.config, dict) else model.config.to_dict()
  return {name: value for name, value in config.items() if name[0] != "_" and name != "transformers_version"}


def randomised(model: Any, seed: int) -> Any:
  """The model in evaluation mode, with normal weights of variance 1 / fan in, and nothing left at 0 or 1."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, tensor in model.named_parameters():
      draw = torch.randn(tensor.shape, generator=generator)
      fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
      if "norm" in name and name.endswith(("weight", "gamma")):
        tensor.copy_(1 + 0.2 * draw)
      elif "table" in name or "relative" in name or "embedding" in name or "shared" in name:
        tensor.copy_(0.5 * draw)
      else:
        tensor.copy_(draw / fan_in**0.5 if tensor.ndim > 1 else 0.2 * draw)
  return model.eval()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def loaded(model: Any, config: Mapping[str, Any], weights: Mapping[str, np.ndarray] | None = None) -> tuple[Any, Any]:
  """Our class around the weights of `model`, through its own folder and our importer: (graph, parameters)."""
  import safetensors.numpy

  from kling_jax.interop import detect
  from kling_jax.interop import safetensors as files
  from kling_jax.nn import params as params_lib

  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / "config.json").write_text(json.dumps(dict(config), default=list))
    safetensors.numpy.save_file(dict(weights or weights_of(model)), folder / "model.safetensors")
    found = detect.recognise(folder)
    graph, shapes, _ = params_lib.abstract(found.init)
    params, report = files.load_into(
      shapes, folder, found.name_map, allow_missing=found.ours, allow_unexpected=found.ignored
    )
    assert not report.missing, report.missing
  return graph, params


def row(
  part: str, reference: str, pairs: Any, low: Any, note: str, ours: Callable, theirs: Callable, **more: Any
) -> dict:
  """A row from (ours, theirs) pairs in float32, (bfloat16, theirs) pairs, and the two timed calls."""
  return {
    "part": part, "reference": reference, "max_rel_error": max(relative_error(*pair) for pair in pairs),
    "cosine_bf16": min(cosine(*pair) for pair in low), "note": note, **times(ours, theirs), **more,
  }  # fmt: skip
