"""Camera and motion scores by RAFT-small's optical flow, where its weights are given: an option beside the others."""

import os
from collections.abc import Callable

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from kling_jax.interop import raft
from kling_jax.measure import camera, motion
from kling_jax.measure.clip import Scorer
from kling_jax.measure.sample import Sample
from kling_jax.models.raft import LEAST_SIDE, STRIDE
from kling_jax.nn import params as params_lib

NAME, CAMERA_NAME = "raft", "raft+similarity"
CONDITIONS = ("flow_motion",)
PAIRS = 4  # a call: bounds the memory of correlations, and clips share the program


def scorers(source: str | os.PathLike[str]) -> tuple[Scorer, Scorer]:
  """The scorers of `flow_motion` and of the camera's scores; their version is a hash of the weights.

  Raises:
    WeightsError: no weights of RAFT-small there.
  """
  find, version = finder(source)
  last: list[tuple[Sample, dict[tuple[int, int], motion.Flow]]] = []  # both scorers meet the same sample, one by one

  def flows(sample: Sample) -> dict[tuple[int, int], motion.Flow]:
    if not last or last[0][0] is not sample:
      last[:] = [(sample, of_sample(sample, find))]
    return last[0][1]

  def moved(sample: Sample) -> dict[str, float]:
    found = flows(sample)
    speed = motion.mean_speed([found[pair] for pair in sample.pairs])
    return {} if speed is None else {"flow_motion": speed}

  def cameras(sample: Sample) -> dict[str, float]:
    return camera.of_flows(sample, flows(sample))

  return (
    Scorer(NAME, version, CONDITIONS, moved),
    Scorer(CAMERA_NAME, version, camera.CONDITIONS, cameras),
  )


Find = Callable[[np.ndarray, np.ndarray], np.ndarray]


def finder(source: str | os.PathLike[str]) -> tuple[Find, str]:
  """(two stacks of uint8 RGB frames (B, H, W, 3) -> flow (B, H, W, 2) in their pixels, the version); see `scorers`."""
  graph, params, version = raft.load(source)
  params = jax.device_put(params)

  @jax.jit
  def found(params: params_lib.Params, first_BHWC: jax.Array, second_BHWC: jax.Array) -> jax.Array:
    even = lambda frames: frames.astype(jnp.float32) / 127.5 - 1
    return params_lib.merge(graph, params)(even(first_BHWC), even(second_BHWC))

  def find(first_BHWC: np.ndarray, second_BHWC: np.ndarray) -> np.ndarray:
    height, width = first_BHWC.shape[1:3]
    size = _side(height), _side(width)
    flow_BHWC = np.asarray(found(params, *(_resized(frames, size) for frames in (first_BHWC, second_BHWC))))
    scale = np.array([width / size[1], height / size[0]], np.float32)
    return np.stack([cv2.resize(flow, (width, height), interpolation=cv2.INTER_LINEAR) for flow in flow_BHWC]) * scale

  return find, version


def of_sample(sample: Sample, find: Find) -> dict[tuple[int, int], motion.Flow]:
  """The flows of a sample's steps, at the measuring size of `motion`."""
  steps = sample.steps
  found: dict[tuple[int, int], motion.Flow] = {}
  for start in range(0, len(steps), PAIRS):
    part = steps[start : start + PAIRS]
    filled = part + [part[-1]] * (PAIRS - len(part))
    first, second = (sample.frames_THWC[[step[k] for step in filled]] for k in (0, 1))
    for (i, j), flow_HWC in zip(part, find(first, second), strict=False):
      trust_HW = motion.prepare(sample.frames_THWC[i]).trust_HW
      scale = np.array(trust_HW.shape[::-1], np.float32) / flow_HWC.shape[1::-1]
      small = cv2.resize(flow_HWC, trust_HW.shape[::-1], interpolation=cv2.INTER_AREA) * scale
      found[i, j] = motion.Flow(small, trust_HW, float(sample.times_s[j] - sample.times_s[i]))
  return found


def _side(size: int) -> int:
  """The nearest size that the network takes."""
  return max(LEAST_SIDE, round(size / STRIDE) * STRIDE)


def _resized(frames_BHWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  if frames_BHWC.shape[1:3] == size:
    return frames_BHWC
  return np.stack([cv2.resize(frame, size[::-1], interpolation=cv2.INTER_LINEAR) for frame in frames_BHWC])
