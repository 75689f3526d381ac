"""Reads the committed fixtures of foreign networks: random weights, inputs, and what the reference made of them.

`benchmarks/parity.py --fixtures` writes them, with PyTorch; nothing here needs it.
"""

import dataclasses
import json
import math
import pathlib
import zlib

import numpy as np
import safetensors
import safetensors.numpy

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "parity"


@dataclasses.dataclass(frozen=True)
class Reference:
  """One fixture, its weights laid out as a foreign model's folder.

  Attributes:
    folder: with config.json and model.safetensors.
    config: the former.
    weights, inputs, outputs: {name: array}.
  """

  folder: pathlib.Path
  config: dict
  weights: dict[str, np.ndarray]
  inputs: dict[str, np.ndarray]
  outputs: dict[str, np.ndarray]


def load(part: str, folder: pathlib.Path) -> Reference:
  """The fixture `part`; its weights are written into `folder`, which must exist."""
  path = FOLDER / f"{part}.safetensors"
  with safetensors.safe_open(path, framework="np") as file:
    config = json.loads(file.metadata()["config"])
  tensors = safetensors.numpy.load_file(path)
  group = lambda kind: {name[len(kind) + 1 :]: array for name, array in tensors.items() if name.startswith(kind + ".")}
  weights = group("weights") or drawn(config["shapes"], config["seed"])
  safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
  (folder / "config.json").write_text(json.dumps(config))
  return Reference(folder, config, weights, group("inputs"), group("outputs"))


def drawn(shapes: dict[str, list[int]], seed: int) -> dict[str, np.ndarray]:
  """The weights of a network whose own would make too large a file; the benchmark draws the same."""
  found = {}
  for name, shape in shapes.items():
    scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape) * scale
    found[name] = values.astype(np.float32)
  return found
