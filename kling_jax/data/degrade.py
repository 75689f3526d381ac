"""Good footage made worse on purpose, in known order: thirteen degradations of strength 0 (none) to 4.

Who has no ratings can train a suitability score on these: of one shot, a stronger degradation of the same kind is
worse, and every one is worse than the original. What is drawn at random (places, words, phases) depends on the seed and
not on the strength, so that the strengths of a kind differ in nothing else.
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from kling_jax.errors import DataError, nearest

STRENGTHS = (1, 2, 3, 4)
FRAMES = 48  # of a degraded clip: two seconds
SPEEDS = (1, 2, 3, 5, 8)  # by strength, of speed_up
MOST_FRAMES = FRAMES * SPEEDS[-1]  # of a shot that are looked at
WORDS = ("SUBSCRIBE NOW", "BREAKING: live update", "episode 12 - part 3", "www.example.com", "HALF PRICE TODAY ONLY")

Make = Callable[[np.ndarray, int, np.random.Generator, Sequence[np.ndarray]], np.ndarray]


def degraded(
  shot_THWC: np.ndarray, kind: str, strength: int, seed: int, others: Sequence[np.ndarray] = ()
) -> np.ndarray:
  """`FRAMES` frames of a shot, degraded.

  Args:
    shot_THWC: uint8 RGB, at least two frames; a shot that is too short is walked to and fro.
    kind: a name of `KINDS`. strength: 0 (the original) to 4.
    seed: of what is random.
    others: other shots, of any size, that a transition leads to; only `transition` wants them.

  Returns:
    uint8 (FRAMES, H, W, 3).

  Raises:
    DataError: an unknown kind or strength, a shot of another form, or no other shots for a transition.
  """
  if kind not in KINDS or strength not in (0, *STRENGTHS):
    raise DataError(f"no degradation {kind!r} of strength {strength!r}{nearest(kind, KINDS)}; strengths are 0 to 4")
  if shot_THWC.ndim != 4 or shot_THWC.shape[-1] != 3 or shot_THWC.dtype != np.uint8 or len(shot_THWC) < 2:
    found = f"{shot_THWC.dtype} {shot_THWC.shape}"
    raise DataError(f"a shot is uint8 of shape (T, H, W, 3) with at least two frames; got {found}")
  if kind == "transition" and not others:
    raise DataError("a transition wants other shots to lead to")
  rng = np.random.Generator(np.random.PCG64([seed, sorted(KINDS).index(kind)]))
  if strength == 0:
    return walked(shot_THWC, 1.0)
  return KINDS[kind](shot_THWC, strength, rng, others)


def walked(shot_THWC: np.ndarray, speed: float) -> np.ndarray:
  """`FRAMES` frames at `speed` frames a step from the first on, to and fro where the shot ends; a copy."""
  place = np.floor(np.arange(FRAMES) * speed).astype(int)
  last = len(shot_THWC) - 1
  return shot_THWC[last - np.abs(last - place % (2 * last))]


def _each(frames_THWC: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
  return np.stack([change(frame) for frame in frames_THWC])


def _by_frame(change: Callable[[np.ndarray, int], np.ndarray]) -> Make:
  """A degradation of single frames: (frame, strength) -> frame."""
  return lambda shot, strength, rng, others: _each(walked(shot, 1.0), lambda frame: change(frame, strength))


def _blur(frame: np.ndarray, strength: int) -> np.ndarray:
  """Out of focus: Gaussian of 0.4, 0.7, 1.2, 2 % of the shorter side."""
  sigma = (0.004, 0.007, 0.012, 0.02)[strength - 1] * max(min(frame.shape[:2]), 150)
  return cv2.GaussianBlur(frame, (0, 0), sigma)


def _blocking(frame: np.ndarray, strength: int) -> np.ndarray:
  """Coarse quantisation of 8 x 8 blocks: JPEG of quality 30, 16, 9, 4."""
  quality = (30, 16, 9, 4)[strength - 1]
  _, data = cv2.imencode(".jpg", np.ascontiguousarray(frame[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
  picture = cv2.imdecode(data, cv2.IMREAD_COLOR)
  assert picture is not None  # it was just written
  return picture[..., ::-1]


def _noise(shot, strength, rng, others):
  """New white noise in every frame, of 6, 12, 22, 36 levels."""
  sigma = (6, 12, 22, 36)[strength - 1]
  frames = walked(shot, 1.0)
  draws = rng.standard_normal((4, *frames.shape[1:]), np.float32)
  turns = rng.integers(0, min(frames.shape[1:3]), (len(frames), 2))
  shifted = (np.roll(draws[t % 4], tuple(turns[t]), (0, 1)) for t in range(len(frames)))
  return np.stack([_levels(frame + sigma * noise) for frame, noise in zip(frames, shifted, strict=True)])


def _shake(shot, strength, rng, others):
  """A trembling hand: jumps of about 0.4, 0.9, 1.8, 3.5 % of the width a frame, turns beside them; cropped to fit."""
  share = (0.004, 0.009, 0.018, 0.035)[strength - 1]
  frames = walked(shot, 1.0)
  height, width = frames.shape[1:3]
  path = np.cumsum(rng.standard_normal((len(frames), 3)), 0)
  smooth = np.stack([np.convolve(axis, np.ones(5) / 5, "same") for axis in path.T], -1)
  path = np.clip(path - smooth, -2.5, 2.5) * share * np.array([width, width, 0.6])
  zoom = 1 + 6 * share
  out = []
  for frame, (x, y, turn) in zip(frames, path, strict=True):
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), math.degrees(turn), zoom)
    matrix[:, 2] += (x, y)
    out.append(cv2.warpAffine(frame, matrix, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))
  return np.stack(out)


def _freeze(shot, strength, rng, others):
  """The picture stands for 20, 40, 60, 85 % of the clip, then jumps to where the shot is by then."""
  length = round((0.2, 0.4, 0.6, 0.85)[strength - 1] * FRAMES)
  start = int(rng.random() * (FRAMES - length))
  frames = walked(shot, 1.0)
  frames[start : start + length] = frames[start]
  return frames


def _text(shot, strength, rng, others):
  """One to four lines of burnt-in words, white on a dark outline, larger from strength to strength."""
  frames = walked(shot, 1.0)
  height, width = frames.shape[1:3]
  letters = np.zeros((height, width), np.uint8)
  scale = height / 480 * (0.9, 1.2, 1.5, 1.9)[strength - 1]
  first = rng.uniform(0.55, 0.8) if rng.random() < 0.7 else rng.uniform(0.15, 0.3)
  words = rng.permutation(len(WORDS))
  for line in range(strength):
    place = (round(0.06 * width), round(((first + line * 0.11) % 0.95) * height))
    thick = max(1, round(2 * scale))
    cv2.putText(letters, WORDS[words[line]], place, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thick, cv2.LINE_AA)
  return _printed(frames, letters, 1.0)


def _logo(shot, strength, rng, others):
  """A mark in a corner: a ring with two letters, of 8 to 26 % of the height, from half to wholly opaque."""
  frames = walked(shot, 1.0)
  height, width = frames.shape[1:3]
  radius = (0.04, 0.06, 0.09, 0.13)[strength - 1] * height
  letters = np.zeros((height, width), np.uint8)
  corner = rng.integers(0, 2, 2)
  margin = radius + 0.05 * height
  x, y = (width - margin if corner[0] else margin), (height - margin if corner[1] else margin)
  cv2.circle(letters, (round(x), round(y)), round(radius), 255, max(1, round(radius / 6)), cv2.LINE_AA)
  scale = radius / 26
  place = (round(x - 0.75 * radius), round(y + 0.35 * radius))
  cv2.putText(letters, "TV", place, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, max(1, round(3 * scale)), cv2.LINE_AA)
  return _printed(frames, letters, (0.5, 0.65, 0.8, 1.0)[strength - 1])


def _printed(frames: np.ndarray, letters_HW: np.ndarray, opacity: float) -> np.ndarray:
  """White ink where `letters` are, with a dark outline."""
  outline = cv2.dilate(letters_HW, np.ones((3, 3), np.uint8)).astype(np.float32)[..., None] / 255 * opacity
  ink = letters_HW.astype(np.float32)[..., None] / 255 * opacity
  return _each(frames, lambda frame: _levels(frame * (1 - outline) * (1 - ink) + 250 * ink))


def _borders(shot, strength, rng, others):
  """The picture shrunk between black bars that take 10, 20, 35, 50 % of the height or width, or of both."""
  share = (0.1, 0.2, 0.35, 0.5)[strength - 1]
  frames = walked(shot, 1.0)
  height, width = frames.shape[1:3]
  which = int(rng.integers(3))
  rows = round(height * (1 - share)) if which != 1 else height
  columns = round(width * (1 - share)) if which != 0 else width
  out = np.zeros_like(frames)
  top, left = (height - rows) // 2, (width - columns) // 2
  for t, frame in enumerate(frames):
    out[t, top : top + rows, left : left + columns] = cv2.resize(frame, (columns, rows), interpolation=cv2.INTER_AREA)
  return out


def _over_exposure(frame: np.ndarray, strength: int) -> np.ndarray:
  """Light times 1.5, 2.2, 3.5, 6 before clipping (gamma 2.2)."""
  light = np.power(np.arange(256) / 255, 2.2) * (1.5, 2.2, 3.5, 6.0)[strength - 1]
  return cv2.LUT(frame, _levels(255 * np.power(np.clip(light, 0, 1), 1 / 2.2)))


def _strobing(shot, strength, rng, others):
  """Brightness that beats five to eight times a second (at 24 frames a second) by 8, 16, 30, 50 %."""
  depth = (0.08, 0.16, 0.3, 0.5)[strength - 1]
  period, phase = rng.uniform(3, 5), rng.uniform(0, 2 * math.pi)
  frames = walked(shot, 1.0)
  gains = 1 - depth * (0.5 + 0.5 * np.sign(np.sin(2 * math.pi * np.arange(len(frames)) / period + phase)))
  return np.stack([_levels(frame * gain) for frame, gain in zip(frames, gains.astype(np.float32), strict=True)])


def _transition(shot, strength, rng, others):
  """One to four cuts (through one mixed frame) or dissolves of eight frames to other shots and back, spread evenly."""
  frames = walked(shot, 1.0)
  height, width = frames.shape[1:3]
  fitted = [
    walked(_each(other[:: max(1, len(other) // FRAMES)], lambda f: cv2.resize(f, (width, height))), 1.0)
    for other in others[: (strength + 1) // 2]
  ]
  shots = [frames if part % 2 == 0 else fitted[(part // 2) % len(fitted)] for part in range(strength + 1)]
  dissolve = bool(rng.integers(2))
  borders = [round((k + rng.uniform(0.3, 0.7)) * FRAMES / strength) for k in range(strength)]
  out = np.empty_like(frames)
  half = 4.0 if dissolve else 0.01
  for t in range(FRAMES):
    shares = [min(max((t - border) / (2 * half) + 0.5, 0.0), 1.0) for border in borders]
    frame = shots[0][t].astype(np.float32)
    for share, other in zip(shares, shots[1:], strict=True):
      frame = (1 - share) * frame + share * other[t]
    out[t] = _levels(frame)
  return out


def _static(shot, strength, rng, others):
  """Hardly anything moves: the shot at a half, a quarter, a tenth of its speed, and stopped."""
  return walked(shot, (0.5, 0.25, 0.1, 0.0)[strength - 1])


def _speed_up(shot, strength, rng, others):
  """The shot at 2, 3, 5, 8 times its speed."""
  return walked(shot, SPEEDS[strength])


def _levels(values: np.ndarray) -> np.ndarray:
  return np.clip(np.rint(values), 0, 255).astype(np.uint8)


KINDS: dict[str, Make] = {
  "blur": _by_frame(_blur),
  "blocking": _by_frame(_blocking),
  "noise": _noise,
  "shake": _shake,
  "freeze": _freeze,
  "text": _text,
  "logo": _logo,
  "borders": _borders,
  "over_exposure": _by_frame(_over_exposure),
  "strobing": _strobing,
  "transition": _transition,
  "static": _static,
  "speed_up": _speed_up,
}
