"""How two forward passes are compared: errors, cosines and times of the parity table, and the files of its fixtures."""

import dataclasses
import json
import math
import pathlib
import time
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

BOUND = 1e-4  # largest relative error in float32 of a part
DEEP_BOUND = 2e-3  # of one with 30 layers and more
LEAST_COSINE = 0.99  # of bfloat16 answers and the float32 reference
FIXTURES = pathlib.Path(__file__).parents[1] / "tests" / "fixtures" / "parity"
MOST_BYTES = 300 * 1024  # of a fixture


def relative_error(ours: Any, theirs: Any) -> float:
  """max |ours - theirs| / max |theirs|, in float64; shapes must agree.

  Raises:
    ValueError: other shapes, a value that is not finite, or a reference that is zero everywhere.
  """
  ours, theirs = (np.asarray(value, np.float64) for value in (ours, theirs))
  if ours.shape != theirs.shape:
    raise ValueError(f"shape {ours.shape} beside the reference's {theirs.shape}")
  largest = np.abs(theirs).max()
  if not (np.isfinite(ours).all() and np.isfinite(theirs).all() and largest > 0):
    raise ValueError("an answer that is not finite, or a reference that is zero")
  return float(np.abs(ours - theirs).max() / largest)


def cosine(ours: Any, theirs: Any) -> float:
  """The cosine of the angle between two answers, each flattened to one vector."""
  ours, theirs = (np.asarray(value, np.float64).ravel() for value in (ours, theirs))
  return float(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs))


def seconds(run: Callable[[], Any], rounds: int = 3) -> float:
  """The shortest of a few timed calls after one that is not timed; `run` must wait for its answer."""
  run()
  taken = []
  for _ in range(rounds):
    start = time.perf_counter()
    run()
    taken.append(time.perf_counter() - start)
  return min(taken)


def times(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int = 3) -> dict[str, float]:
  """{"seconds", "reference_seconds"} of a row: the shortest of a few calls each, by turns, after one that is not timed.

  Turns let a slow spell of the machine meet both. Both must wait for their answers.
  """
  best = {"seconds": math.inf, "reference_seconds": math.inf}
  for turn in range(rounds + 1):
    for name, run in (("seconds", ours), ("reference_seconds", theirs)):
      start = time.perf_counter()
      run()
      if turn:
        best[name] = min(best[name], time.perf_counter() - start)
  return best


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
  """Weights of a network whose own would be too large for a fixture, from names and shapes alone.

  Each is normal with variance 1 / fan in, vectors with a deviation of 0.1; the tests draw the same.
  """
  found = {}
  for name, shape in shapes.items():
    scale = math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape) * scale
    found[name] = values.astype(np.float32)
  return found


# ---- fixtures --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fixture:
  """What the test suite knows of a reference: random weights, inputs and the reference's outputs.

  Attributes:
    config: the foreign config.json.
    weights: {foreign name: array}, as the foreign library saves them. bfloat16 halves the file: round the reference's
      own weights first.
    inputs, outputs: {name: array}.
  """

  config: Mapping[str, Any]
  weights: Mapping[str, np.ndarray]
  inputs: Mapping[str, np.ndarray]
  outputs: Mapping[str, np.ndarray]

  def tensors(self) -> dict[str, np.ndarray]:
    """One flat dict, as in the file: names begin with weights., inputs. or outputs."""
    groups = (("weights", self.weights), ("inputs", self.inputs), ("outputs", self.outputs))
    return {
      f"{group}.{name}": np.asarray(array, order="C") for group, arrays in groups for name, array in arrays.items()
    }


def write_fixture(part: str, fixture: Fixture) -> pathlib.Path:
  """Writes tests/fixtures/parity/<part>.safetensors.

  Raises:
    ValueError: it is larger than a fixture may be.
  """
  data = safetensors.numpy.save(fixture.tensors(), metadata={"config": json.dumps(fixture.config, sort_keys=True)})
  if len(data) > MOST_BYTES:
    raise ValueError(f"the fixture {part} has {len(data)} bytes, at most {MOST_BYTES}; make its config smaller")
  FIXTURES.mkdir(parents=True, exist_ok=True)
  path = FIXTURES / f"{part}.safetensors"
  path.write_bytes(data)
  return path


def fixture_error(part: str, fixture: Fixture) -> str | None:
  """What a fixture made afresh has that the committed one has not; None where they agree.

  Weights, inputs and config must be the same; outputs may differ by 1e-5 (another build of PyTorch).
  """
  path = FIXTURES / f"{part}.safetensors"
  if not path.is_file():
    return "not committed"
  with safetensors.safe_open(path, framework="np") as file:
    config = json.loads(file.metadata()["config"])
  held, fresh = safetensors.numpy.load_file(path), fixture.tensors()
  if config != json.loads(json.dumps(fixture.config)):
    return "another config"
  if sorted(held) != sorted(fresh):
    return "other tensors"
  for name, array in fresh.items():
    outputs = name.startswith("outputs.") and np.issubdtype(array.dtype, np.floating)
    if not (relative_error(held[name], array) <= 1e-5 if outputs else np.array_equal(held[name], array)):
      return f"another {name}"
  return None
