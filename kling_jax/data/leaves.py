"""Moving scenes of dead leaves: overlapping shapes of all sizes, with the statistics of natural pictures.

Shapes whose radii follow a power law with exponent -3 and hide each other give the edges, the contrast and the
spectrum of photographs (Lee, Mumford & Huang, Occlusion models for natural images, IJCV 2001). Small networks that look
at thumbnails train on them where footage is scarce.
"""

import math

import cv2
import numpy as np


def scene(seed: tuple[int, ...], frames: int, height: int, width: int) -> np.ndarray:
  """A shot of a scene of its own: a backdrop under a drifting camera, and up to five things that move before it.

  Returns:
    uint8 (frames, height, width, 3), RGB; a pure function of the arguments.
  """
  rng = np.random.Generator(np.random.PCG64(list(seed)))
  palette = _palette(rng)
  backdrop = _canvas(rng, palette, 2 * height, 2 * width)
  things = [_Thing(rng, height, width) for _ in range(int(rng.integers(0, 6)))]
  calm = rng.random() < 0.4
  drift = rng.normal(0, 0.0 if calm else 0.006 * width, 2)
  sway, phase = rng.uniform(0, 0.03 * width, 2), rng.uniform(0, 2 * math.pi, 2)
  growth = 0.0 if calm else rng.normal(0, 0.003)
  out = np.empty((frames, height, width, 3), np.uint8)
  for t in range(frames):
    zoom = math.exp(growth * t) * 0.8
    at = np.array([width, height]) + drift * t + sway * np.sin(phase + 0.1 * t)
    inverse = np.array([[zoom, 0, at[0] - zoom * width / 2], [0, zoom, at[1] - zoom * height / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    picture = cv2.warpAffine(backdrop, inverse, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT)
    for thing in things:
      picture = thing.drawn(picture, t)
    out[t] = picture
  return out


def _palette(rng: np.random.Generator) -> np.ndarray:
  """A few colours around one mood, uint8 range, float (n, 3)."""
  mood = rng.uniform(20, 235, 3)
  grey = mood.mean()
  mood = grey + (mood - grey) * rng.uniform(0.0, 0.7)
  return np.clip(mood + rng.normal(0, rng.uniform(20, 80), (12, 1)) + rng.normal(0, 18, (12, 3)), 0, 255)


def _canvas(rng: np.random.Generator, palette: np.ndarray, height: int, width: int) -> np.ndarray:
  canvas = np.empty((height, width, 3), np.uint8)
  top, bottom = palette[0], palette[1]
  canvas[:] = (top + np.linspace(0, 1, height)[:, None, None] * (bottom - top)).astype(np.uint8)
  least, most = rng.uniform(0.015, 0.05) * height, rng.uniform(0.2, 0.6) * height
  count = round(math.exp(rng.uniform(math.log(15), math.log(600))))
  # Inverse of the distribution function of r^-3 between the limits.
  radii = least / np.sqrt(1 - rng.random(count) * (1 - (least / most) ** 2))
  for radius in radii:
    middle = rng.uniform(0, 1, 2) * (width, height)
    colour = np.clip(palette[rng.integers(len(palette))] + rng.normal(0, 12), 0, 255)
    _leaf(canvas, rng, middle, float(radius), colour.tolist())
  light = cv2.resize(rng.normal(1, rng.uniform(0.02, 0.2), (4, 6)).astype(np.float32), (width, height), interpolation=2)
  grain = rng.normal(0, rng.uniform(0, 9), (height, width, 1))
  return np.clip(canvas * light[..., None] + grain, 0, 255).astype(np.uint8)


def _leaf(canvas: np.ndarray, rng: np.random.Generator, middle: np.ndarray, radius: float, colour: list[float]) -> None:
  stretch, angle = float(rng.uniform(0.3, 1.0)), float(rng.uniform(0, 180))
  if rng.random() < 0.5:
    axes = (max(1, round(radius)), max(1, round(radius * stretch)))
    at = (round(float(middle[0])), round(float(middle[1])))
    cv2.ellipse(canvas, at, axes, angle, 0, 360, colour, -1, cv2.LINE_AA)
  else:
    turns = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 6))))
    corners = middle + radius * np.stack([np.cos(turns), stretch * np.sin(turns)], 1)
    cv2.fillPoly(canvas, [np.rint(corners).astype(np.int32)], colour, cv2.LINE_AA)


class _Thing:
  """A leafy patch with an outline of its own that moves along a line and sways."""

  def __init__(self, rng: np.random.Generator, height: int, width: int):
    size = rng.uniform(0.15, 0.7) * height
    self._rows, self._columns = max(4, round(size)), max(4, round(size * rng.uniform(0.4, 1.3)))
    self._picture = _canvas(rng, _palette(rng), self._rows, self._columns)
    cover = np.zeros((self._rows, self._columns), np.uint8)
    middle = np.array([self._columns, self._rows]) / 2
    turns = np.linspace(0, 2 * math.pi, 9)[:-1]
    reach = rng.uniform(0.6, 1.0, 8)[:, None] * middle
    outline = middle + reach * np.stack([np.cos(turns), np.sin(turns)], 1)
    cv2.fillPoly(cover, [np.rint(outline).astype(np.int32)], 255, cv2.LINE_AA)
    self._cover = cover
    self._start = rng.uniform(-0.2, 1.0, 2) * (width, height)
    speed = 0.0 if rng.random() < 0.2 else abs(rng.normal(0, 0.018)) * width
    way = rng.uniform(0, 2 * math.pi)
    self._velocity = speed * np.array([math.cos(way), 0.4 * math.sin(way)])
    self._sway, self._phase, self._pace = rng.uniform(0, 0.06) * height, rng.uniform(0, 6), rng.uniform(0.05, 0.5)

  def drawn(self, picture: np.ndarray, t: int) -> np.ndarray:
    at = self._start + self._velocity * t + (0, self._sway * math.sin(self._phase + self._pace * t))
    shift = np.array([[1, 0, at[0]], [0, 1, at[1]]], np.float64)
    size = (picture.shape[1], picture.shape[0])
    cover = cv2.warpAffine(self._cover, shift, size).astype(np.float32)[..., None] / 255
    moved = cv2.warpAffine(self._picture, shift, size, borderMode=cv2.BORDER_REPLICATE)
    return (picture + cover * (moved.astype(np.float32) - picture)).astype(np.uint8)
