"""Pixels of edits: blends of two pictures (dissolves, wipes, pushes), and events within a shot."""

import cv2
import numpy as np

WIPES = ("linear", "iris", "clock", "barn", "blinds", "blocks")  # pixels switch one after another
MOVES = ("push", "cover", "uncover")  # a picture travels
SHAPES = ("circle", "diamond", "box")


def ease(x: float, manner: str) -> float:
  """Progress 0..1 of an edit over its time 0..1: "linear", "smooth" (slow at both ends), "fast" or "slow" start."""
  if manner == "smooth":
    return x * x * (3 - 2 * x)
  if manner == "fast":
    return 1 - (1 - x) ** 2
  return x * x if manner == "slow" else x


def mix(a_HWC: np.ndarray, b_HWC: np.ndarray, share: float, gamma: float) -> np.ndarray:
  """(1 - share) a + share b, taken in light of exponent `gamma` (1: in the pixels' own values)."""
  if gamma == 1:
    return a_HWC + share * (b_HWC - a_HWC)
  old, new = (np.clip(picture / 255, 0, 1) ** gamma for picture in (a_HWC, b_HWC))
  return 255 * (old + share * (new - old)) ** (1 / gamma)


def arrival(style: str, height: int, width: int, draws: np.ndarray) -> np.ndarray:
  """When the new picture arrives at each pixel of a wipe: (H, W) float32, 0 first, 1 last.

  Args:
    style: one of WIPES.
    draws: at least 6 numbers in [0, 1) that choose direction, shape, centre and number of stripes.
  """
  aspect = width / height
  y, x = np.meshgrid(
    (np.arange(height, dtype=np.float32) + 0.5) / height - 0.5,
    ((np.arange(width, dtype=np.float32) + 0.5) / width - 0.5) * np.float32(aspect),
    indexing="ij",
  )
  turn = draws[0] * 8
  angle = float(np.round(turn) if draws[1] < 0.6 else turn) * np.pi / 4
  if style == "linear":
    when = np.cos(angle) * x + np.sin(angle) * y
  elif style == "barn":
    when = np.abs(np.cos(angle) * x + np.sin(angle) * y)
  elif style == "iris":
    u, v = x - (draws[2] - 0.5) * 0.5 * aspect, y - (draws[3] - 0.5) * 0.5
    shape = SHAPES[int(draws[4] * len(SHAPES))]
    when = np.hypot(u, v) if shape == "circle" else np.abs(u) + np.abs(v)
    when = np.maximum(np.abs(u) / aspect, np.abs(v)) if shape == "box" else when
  elif style == "clock":
    when = np.mod(np.arctan2(y - (draws[2] - 0.5) * 0.2, x - (draws[3] - 0.5) * 0.2) + angle, 2 * np.pi)
  elif style == "blinds":
    along = np.cos(angle) * x + np.sin(angle) * y
    along = (along - along.min()) / np.ptp(along)
    when = np.mod(along * (3 + int(draws[2] * 6)), 1)
  else:
    rows = 3 + int(draws[2] * 6)
    cells = np.random.Generator(np.random.PCG64(int(draws[3] * 2**32))).random((rows, round(rows * aspect)))
    when = cv2.resize(cells.astype(np.float32), (width, height), interpolation=cv2.INTER_NEAREST)
  when = (when - when.min()) / max(float(np.ptp(when)), 1e-6)
  return 1 - when if draws[5] < 0.5 else when


def wipe(a_HWC: np.ndarray, b_HWC: np.ndarray, arrival_HW: np.ndarray, progress: float, softness: float) -> np.ndarray:
  """The wipe at `progress` 0..1; `softness` is the share of the whole time that a pixel takes to change."""
  edge = max(softness, 0.75 / min(arrival_HW.shape))
  share = np.clip((progress * (1 + edge) - arrival_HW) / edge, 0, 1)[..., None]
  return a_HWC + share * (b_HWC - a_HWC)


def move(a_HWC: np.ndarray, b_HWC: np.ndarray, style: str, side: int, progress: float) -> np.ndarray:
  """A push, cover or uncover: the pictures travel towards side 0 left, 1 right, 2 up, 3 down."""
  height, width = a_HWC.shape[:2]
  axis, sign = (1, -1 if side == 0 else 1) if side < 2 else (0, -1 if side == 2 else 1)
  size = width if axis == 1 else height
  way = round(progress * size)
  old = np.roll(a_HWC, sign * way, axis) if style != "cover" else a_HWC
  new = np.roll(b_HWC, sign * (way - size), axis) if style != "uncover" else b_HWC
  place = np.arange(size)
  fresh = place >= size - way if sign < 0 else place < way
  return np.where(fresh[None, :, None] if axis == 1 else fresh[:, None, None], new, old)


# ---- events that are no transition -----------------------------------------------------------------------------------


def flash(frame_HWC: np.ndarray, strength: float, colour: np.ndarray, additive: bool, where: np.ndarray) -> np.ndarray:
  """Light of `strength` 0..1 of a colour (3,), falling off as `where` (H, W, 1) says; burnt in or laid over."""
  weight = strength * where
  return frame_HWC + weight * colour if additive else frame_HWC + weight * (colour - frame_HWC)


def spot(height: int, width: int, x: float, y: float, radius: float) -> np.ndarray:
  """A soft disc (H, W, 1) of values 0..1; centre and radius in frame widths and heights."""
  rows = ((np.arange(height, dtype=np.float32) + 0.5) / height - y)[:, None]
  columns = (((np.arange(width, dtype=np.float32) + 0.5) / width - x) * np.float32(width / height))[None]
  distance = np.sqrt(rows * rows + columns * columns)
  return np.clip(1.5 - distance / max(radius, 1e-3), 0, 1)[..., None]


def explosion(frame_HWC: np.ndarray, age: float, x: float, y: float, size: float, grain: np.ndarray) -> np.ndarray:
  """A ball of fire that bursts (age 0 to 0.15), and burns out into smoke (to 1); `grain` (H, W, 1) in 0..1 tears it."""
  height, width = frame_HWC.shape[:2]
  heat = min(age / 0.15, 1.0) * max(0.0, 1 - age) ** 1.5
  ball = spot(height, width, x, y, size * (0.3 + 0.9 * min(age / 0.5, 1.0))) * (0.5 + grain)
  smoke = np.clip(ball * min(2 * age, 1.0) * (1 - age), 0, 0.8)
  frame_HWC = frame_HWC + smoke * (np.array([90, 85, 80], np.float32) * (0.5 + grain) - frame_HWC)
  return frame_HWC + np.clip(1.6 * heat * ball, 0, 1) * (np.array([255, 205, 110], np.float32) - frame_HWC) + 60 * heat


def occluder(frame_HWC: np.ndarray, age: float, draws: np.ndarray, texture_HWC: np.ndarray) -> np.ndarray:
  """Something close to the camera passes through the frame while age goes from 0 to 1.

  Args:
    draws: at least 5 numbers in [0, 1): direction, width, softness, lean, whether it is upright.
    texture_HWC: what its surface shows.
  """
  height, width = frame_HWC.shape[:2]
  rows = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
  columns = ((np.arange(width, dtype=np.float32) + 0.5) / width)[None]
  along, across = (columns, rows) if draws[4] < 0.75 else (rows, columns)
  extent, soft, lean = 0.25 + 1.1 * draws[1], 0.02 + 0.12 * draws[2], 0.5 * (draws[3] - 0.5)
  middle = -extent / 2 - 0.3 + age * (1.6 + extent)
  middle = 1 - middle if draws[0] < 0.5 else middle
  cover = np.clip((extent / 2 - np.abs(along - middle + lean * (across - 0.5))) / soft, 0, 1)[..., None]
  return frame_HWC + cover * (texture_HWC - frame_HWC)


def directional_blur(frame_HWC: np.ndarray, dx: float, dy: float) -> np.ndarray:
  """Blur of a camera that moved by (dx, dy) pixels while the shutter was open."""
  length = round(float(np.hypot(dx, dy)))
  if length < 2:
    return frame_HWC
  size = length | 1
  kernel = np.zeros((size, size), np.float32)
  middle = size // 2
  step = np.array([dx, dy]) / np.hypot(dx, dy) * middle
  end = tuple(int(v) for v in np.rint(middle + step))
  start = tuple(int(v) for v in np.rint(middle - step))
  cv2.line(kernel, start, end, 1.0)
  return cv2.filter2D(frame_HWC, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT)
