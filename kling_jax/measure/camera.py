"""What the camera does, from optical flow: pan, tilt, zoom, roll, shake; what is left is the motion of objects.

Each flow is fitted by a similarity around the middle of the frame,

  u(x, y) = a + z x - r y,   v(x, y) = b + z y + r x,

with iteratively reweighted least squares under Tukey's biweight, so that objects covering less than about half of the
textured picture do not count. x to the right, y down, all in pixels of the measuring size.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from kling_jax.measure.motion import Flow
from kling_jax.measure.sample import Sample

NAME, VERSION = "flow+similarity", "1"
CONDITIONS = (
  "camera_motion", "object_motion", "camera_pan", "camera_tilt", "camera_zoom", "camera_roll", "camera_shake",
)  # fmt: skip
STEP = 4  # pixels between the places of a flow that are fitted
ITERATIONS = 12
TUKEY = 4.7  # of the residuals' deviation: full efficiency for normal residuals
LEAST_SCALE = 0.05  # pixels; residuals below are no sign of another motion
LABELS = ("static", "pan", "tilt", "zoom", "roll", "handheld", "shake")
MOVES, TREMBLES, SHAKES = 0.006, 0.01, 0.08  # least diagonals per second of a label
MEAN_RADIUS = 0.29  # of a 16:9 frame's points from its middle, in diagonals


@dataclasses.dataclass(frozen=True)
class Camera:
  """The motion of the picture between two frames: (a, b) in pixels, z and r without unit, for the whole gap."""

  a: float
  b: float
  z: float
  r: float

  def field(self, shape: tuple[int, ...], step: int = 1) -> np.ndarray:
    """The flow (H, W, 2) of the picture of a still scene, at every `step`-th pixel of a frame of `shape`."""
    height, width = shape
    y, x = np.mgrid[0:height:step, 0:width:step].astype(np.float64)
    x, y = x - (width - 1) / 2, y - (height - 1) / 2
    return np.stack([self.a + self.z * x - self.r * y, self.b + self.z * y + self.r * x], axis=-1)


def fit(flows: Sequence[Flow]) -> list[Camera]:
  """The similarity that most of the textured picture follows, for each of several flows of one size."""
  height, width = flows[0].trust_HW.shape
  y, x = np.mgrid[0:height:STEP, 0:width:STEP].astype(np.float64)
  x, y = (x - (width - 1) / 2).ravel(), (y - (height - 1) / 2).ravel()
  zero, one = np.zeros_like(x), np.ones_like(x)
  rows_2NP = np.concatenate([np.stack([one, zero, x, -y], -1), np.stack([zero, one, y, x], -1)])
  squares = (rows_2NP[:, :, None] * rows_2NP[:, None, :]).reshape(-1, 16)  # of each row with itself, for A' W A
  grid = (slice(None, None, STEP), slice(None, None, STEP))
  uv_F2N = np.stack([np.moveaxis(flow.flow_HWC[grid], -1, 0).reshape(-1) for flow in flows]).astype(np.float64)
  trust_FN = np.stack([flow.trust_HW[grid].ravel() for flow in flows]).astype(np.float64) ** 2 + 1e-6
  count = len(x)
  # The median displacement is where the search begins: least squares over everything may lie between two motions.
  start = [_median(uv_F2N[:, :count], trust_FN), _median(uv_F2N[:, count:], trust_FN)]
  answer_F4 = np.stack([*start, np.zeros(len(flows)), np.zeros(len(flows))], -1)
  for _ in range(ITERATIONS):
    off_F2N = answer_F4 @ rows_2NP.T - uv_F2N
    residual_FN = np.hypot(off_F2N[:, :count], off_F2N[:, count:])
    scale_F1 = np.maximum(1.4826 * _median(residual_FN, trust_FN), LEAST_SCALE)[:, None]
    weight_FN = trust_FN * np.clip(1 - (residual_FN / (TUKEY * scale_F1)) ** 2, 0, None) ** 2
    weight_F2N = np.concatenate([weight_FN, weight_FN], -1)
    left_F44 = (weight_F2N @ squares).reshape(-1, 4, 4) + 1e-9 * np.eye(4)
    right_F4 = (weight_F2N * uv_F2N) @ rows_2NP
    answer_F4 = np.linalg.solve(left_F44, right_F4[..., None])[..., 0]
  return [Camera(*map(float, answer)) for answer in answer_F4]


def _median(values_FN: np.ndarray, weight_FN: np.ndarray) -> np.ndarray:
  """The weighted median of each row."""
  order = np.argsort(values_FN, axis=-1)
  heap = np.cumsum(np.take_along_axis(weight_FN, order, -1), axis=-1)
  middle = (heap < heap[:, -1:] / 2).sum(-1, keepdims=True)
  return np.take_along_axis(np.take_along_axis(values_FN, order, -1), middle, -1)[:, 0]


def camera(sample: Sample) -> dict[str, float]:
  """The camera's scores; {} where there are not two frames at different times.

  Returns:
    camera_pan, camera_tilt: diagonals per second; positive when the camera turns right, up.
    camera_zoom: relative growth of the picture per second (d log scale / dt); positive when it zooms in.
    camera_roll: degrees per second; positive when the camera rolls clockwise (the picture the other way round).
    camera_shake: diagonals per second: root mean square change of the picture's speed from one tenth of a second to
      the next, by sqrt(2), so that a white jitter of the speed reads as its deviation; absent without three frames.
    camera_motion: mean speed of the fitted motion over frame and places, diagonals per second.
    object_motion: mean speed of what the fitted motion leaves, over the textured part of the frame.
  """
  return of_flows(sample, sample.flows)


def of_flows(sample: Sample, flows: Mapping[tuple[int, int], Flow]) -> dict[str, float]:
  """`camera`, for the flows of a sample's steps, whoever found them."""
  if not sample.pairs:
    return {}
  fits = dict(zip(flows, fit(list(flows.values())), strict=True))
  speeds_P4 = np.array([_speed(fits[pair], flows[pair]) for pair in sample.pairs])
  pan, tilt, zoom, roll = (_trimmed(speeds_P4[:, k]) for k in range(4))
  camera_motion, object_motion = [], []
  for pair in sample.pairs:
    flow = flows[pair]
    field = fits[pair].field(flow.trust_HW.shape, STEP)
    unit = 1 / (flow.diagonal * flow.gap_s)
    camera_motion.append(np.hypot(*np.moveaxis(field, -1, 0)).mean() * unit)
    rest = np.hypot(*np.moveaxis(flow.flow_HWC[::STEP, ::STEP] - field, -1, 0))
    object_motion.append(np.average(rest, weights=flow.trust_HW[::STEP, ::STEP] + 1e-6) * unit)
  scores = {
    "camera_motion": float(np.mean(camera_motion)),
    "object_motion": float(np.mean(object_motion)),
    "camera_pan": pan,
    "camera_tilt": tilt,
    "camera_zoom": zoom,
    "camera_roll": roll,
  }
  if sample.triples:
    changes = [_speed(fits[j, k], flows[j, k])[:2] - _speed(fits[i, j], flows[i, j])[:2] for i, j, k in sample.triples]
    scores["camera_shake"] = float(np.sqrt(np.mean(np.square(changes).sum(-1)) / 2))
  return scores


def _speed(found: Camera, flow: Flow) -> np.ndarray:
  """(pan, tilt, zoom, roll) of one fit, a second; the picture moves against the camera."""
  unit = flow.diagonal * flow.gap_s
  roll = -np.degrees(found.r) / flow.gap_s
  return np.array([-found.a / unit, found.b / unit, np.log1p(max(found.z, -0.9)) / flow.gap_s, roll])


def _trimmed(values: Sequence[float] | np.ndarray) -> float:
  """Mean without the least and the greatest where there are five or more: one wrong fit does not count."""
  ordered = np.sort(values)
  return float(np.mean(ordered[1:-1] if len(ordered) >= 5 else ordered))


def label(scores: Mapping[str, float]) -> str:
  """One word for what the camera does, from its scores: one of `LABELS`; "" where they are missing.

  Args:
    scores: values by name, as `camera` gives them (others are ignored).
  """
  if any(name not in scores for name in CONDITIONS[2:6]):
    return ""
  parts = {
    "pan": abs(scores["camera_pan"]),
    "tilt": abs(scores["camera_tilt"]),
    "zoom": abs(scores["camera_zoom"]) * MEAN_RADIUS,
    "roll": abs(np.radians(scores["camera_roll"])) * MEAN_RADIUS,
  }
  name, steady = max(parts.items(), key=lambda part: part[1])
  shake = scores.get("camera_shake", 0.0)
  if shake > max(SHAKES, steady):
    return "shake"
  if shake > max(TREMBLES, steady):
    return "handheld"
  return name if steady > MOVES else "static"
