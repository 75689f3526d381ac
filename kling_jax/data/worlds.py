"""Procedural worlds: seeded moving shapes with scripted captions and known true scores, rendered at any size and time.

A world is versioned by its name and never changes under it, so that ledgers and results stay comparable. Every choice
of a clip is drawn by name from SHA-256 of (world, seed, index, name of the choice): no generator state, no dependence
on NumPy's streams, and a new choice in a new version leaves the others alone.

Plane: x to the right, y down, origin in the middle of the frame, unit = the longer side of the frame (the world is
square; a frame of another shape is its central crop). Camera at time t: centre c(t) = velocity * (t - D/2) and scale
s(t) = exp(zoom * (t - D/2)); a world point w is seen at s * (w - c).
"""

import dataclasses
import functools
import hashlib

import numpy as np

from kling_jax.data import raster
from kling_jax.data.named import COLOURS, GREY, LUMA, Draws, article
from kling_jax.data.source import ClipInfo, Score
from kling_jax.errors import ConfigError, nearest

WORLDS = ("shapes-v1",)
DURATION_S = 2.5
FPS = 24.0
NATIVE_SIZE = 256  # pixels; only what `info` reports, frames are analytic
SCORER, SCORER_VERSION = "shapes-v1", "1"

SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"to the right": (1.0, 0.0), "to the left": (-1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
# Speeds in longer sides per second; the adverb of the caption names the range.
OBJECT_SPEEDS = {"slowly ": (0.04, 0.08), "": (0.10, 0.15), "quickly ": (0.20, 0.26)}
PAN_SPEEDS = {" slowly": (0.04, 0.08), "": (0.09, 0.13), " quickly": (0.16, 0.22)}
ZOOM_RATES = {" slowly": (0.08, 0.14), "": (0.18, 0.26), " quickly": (0.32, 0.42)}  # d log(scale) / dt
PANS = {"pans left": (-1.0, 0.0), "pans right": (1.0, 0.0), "pans up": (0.0, -1.0), "pans down": (0.0, 1.0)}
ZOOMS = {"zooms in": 1.0, "zooms out": -1.0}
TEXTURES = ("checkered", "dotted", "rippled", "gradient")
BLURS = (0.0, 0.0, 0.004, 0.008, 0.016)  # standard deviation of the Gaussian, in longer sides
CLARITY_HALF = 0.006  # the blur at which the clarity score is a half


@dataclasses.dataclass(frozen=True)
class Thing:
  """One moving shape: it is at `middle` (x, y) at half time and moves at `velocity` (longer sides per second)."""

  shape: str
  colour: str
  radius: float  # half height of the shape, longer sides
  middle: tuple[float, float]
  velocity: tuple[float, float]
  manner: str  # "moves quickly to the right", "stays still"


@dataclasses.dataclass(frozen=True)
class Script:
  """Everything that happens in one clip; frames, caption and true scores are functions of it."""

  things: tuple[Thing, ...]
  background: str
  texture: str
  frequency: float  # texture periods per longer side
  contrast: float  # of the texture, 0..1
  saturation: float  # 0 grey .. 1 full palette
  camera: str
  pan: tuple[float, float]  # camera velocity, longer sides per second
  zoom: float  # d log(scale) / dt
  pillar: float | None  # x of the occluder's middle in the world, or none
  blur: float

  @property
  def caption(self) -> str:
    """States the objects, their motion, the background, the occluder and the camera, in this order."""
    phrases = [f"{article(thing.colour)} {thing.shape} {thing.manner}" for thing in self.things]
    objects = " and ".join([", ".join(phrases[:-1])] * (len(phrases) > 1) + phrases[-1:])
    pillar = ", behind a grey pillar" if self.pillar is not None else ""
    return f"{objects} over {article(f'{self.texture} {self.background}')} background{pillar}; the camera {self.camera}"

  @property
  def parts(self) -> dict[str, str]:
    """The same in parts: what a teacher who sees everything says. Objects and their motions stand in one order."""
    return {
      "subject": ", ".join(f"{article(thing.colour)} {thing.shape}" for thing in self.things),
      "action": ", ".join(f"the {thing.shape} {thing.manner}" for thing in self.things),
      "environment": f"{article(f'{self.texture} {self.background}')} background"
      + (", a grey pillar in front" if self.pillar is not None else ""),
      "camera": f"the camera {self.camera}",
    }


@functools.lru_cache(maxsize=4096)
def script(world: str, seed: int, index: int) -> Script:
  """The script of clip `index`: a pure function of its arguments.

  Raises:
    ConfigError: an unknown world.
  """
  if world not in WORLDS:
    raise ConfigError(f"unknown procedural world {world!r}{nearest(world, WORLDS)}")
  draw = Draws(world, seed, index)
  colours = list(COLOURS)
  background = colours.pop(int(draw.uniform("background") * len(colours)))
  count = 1 + (draw.uniform("count") > 0.5) + (draw.uniform("third") > 0.8)
  camera, pan, zoom = _camera(draw)
  things = []
  for k in range(count):
    colour = colours.pop(int(draw.uniform(f"colour {k}") * len(colours)))
    things.append(_thing(draw, k, count, colour))
  return Script(
    things=tuple(things),
    background=background,
    texture=draw.choice("texture", TEXTURES),
    frequency=draw.uniform("frequency", 3.0, 6.0),
    contrast=draw.uniform("contrast", 0.35, 0.9),
    saturation=draw.choice("saturation", (0.3, 0.65, 1.0)) * draw.uniform("saturation jitter", 0.9, 1.0),
    camera=camera,
    pan=pan,
    zoom=zoom,
    pillar=draw.uniform("pillar x", -0.2, 0.2) if draw.uniform("pillar") < 0.2 else None,
    blur=draw.choice("blur", BLURS),
  )


def _camera(draw: Draws) -> tuple[str, tuple[float, float], float]:
  kind = draw.uniform("camera")
  if kind < 0.3:
    return "is still", (0.0, 0.0), 0.0
  if kind < 0.75:
    words = draw.choice("pan", tuple(PANS))
    adverb = draw.choice("camera speed", tuple(PAN_SPEEDS))
    speed = draw.uniform("camera speed value", *PAN_SPEEDS[adverb])
    return words + adverb, (PANS[words][0] * speed, PANS[words][1] * speed), 0.0
  words = draw.choice("zoom", tuple(ZOOMS))
  adverb = draw.choice("camera speed", tuple(ZOOM_RATES))
  return words + adverb, (0.0, 0.0), ZOOMS[words] * draw.uniform("camera speed value", *ZOOM_RATES[adverb])


def _thing(draw: Draws, k: int, count: int, colour: str) -> Thing:
  """Thing k of `count`; several share the frame in lanes of the vertical axis, so that they overlap seldom."""
  still = draw.uniform(f"still {k}") < 0.15
  direction = draw.choice(f"direction {k}", tuple(DIRECTIONS))
  adverb = draw.choice(f"speed {k}", tuple(OBJECT_SPEEDS))
  speed = 0.0 if still else draw.uniform(f"speed value {k}", *OBJECT_SPEEDS[adverb])
  lane = (k + 0.5) / count - 0.5
  return Thing(
    shape=draw.choice(f"shape {k}", SHAPES),
    colour=colour,
    radius=draw.uniform(f"radius {k}", 0.09, 0.17) / count**0.25,
    middle=(draw.uniform(f"x {k}", -0.2, 0.2), 0.7 * lane + draw.uniform(f"y {k}", -0.2, 0.2) / count),
    velocity=(DIRECTIONS[direction][0] * speed, DIRECTIONS[direction][1] * speed),
    manner="stays still" if still else f"moves {adverb}{direction}",
  )


# ---------------------------------------------------------------------------------------------------- true scores


def true_scores(clip: Script, height: int = NATIVE_SIZE, width: int = NATIVE_SIZE) -> dict[str, Score]:
  """The scores of a clip by construction, as scorer `shapes-v1`.

  motion: mean speed of what the frame shows, in frame diagonals per second (see `true_motion`).
  aesthetic: 0..10, `true_aesthetic`. clarity: 1 / (1 + blur / 0.006), in (0, 1], blur in longer sides.
  """
  values = {
    "motion": true_motion(clip, height, width),
    "aesthetic": true_aesthetic(clip),
    "clarity": 1.0 / (1.0 + clip.blur / CLARITY_HALF),
  }
  return {name: Score(float(value), SCORER, SCORER_VERSION) for name, value in values.items()}


def true_motion(clip: Script, height: int = NATIVE_SIZE, width: int = NATIVE_SIZE) -> float:
  """Mean image-plane speed over the frame and over time, in frame diagonals per second.

  A pixel of the background moves at |pan| (or |zoom| * its distance from the middle), a pixel of a thing at the speed
  of its middle, |zoom * p + s * (v - pan)|. Weights are areas: a thing has the part of its area whose bounding box
  lies in the frame, the background the rest; things and pillar are taken as not covering each other. The mean over
  time is the trapezoid rule on 33 times (exact while everything stays in the frame and the camera does not zoom).
  """
  box = np.array([width, height], float) / max(height, width)
  diagonal = float(np.hypot(*box))
  t = np.linspace(-DURATION_S / 2, DURATION_S / 2, 33)
  weight = np.full(t.size, 1.0 / (t.size - 1))
  weight[[0, -1]] /= 2
  background = abs(clip.zoom) * _mean_radius(*box) + float(np.hypot(*clip.pan))
  scale = np.exp(clip.zoom * t)
  total = np.full(t.size, background)
  for thing in clip.things:
    relative = np.subtract(thing.velocity, clip.pan)
    p = scale[:, None] * (np.array(thing.middle) + relative * t[:, None])
    radius = scale[:, None] * thing.radius
    speed = np.hypot(*(clip.zoom * p + scale[:, None] * relative).T)
    inside = np.clip(np.minimum(p + radius, box / 2) - np.maximum(p - radius, -box / 2), 0, None) / (2 * radius)
    area = _AREAS[thing.shape] * radius[:, 0] ** 2 * inside.prod(1) / box.prod()
    total += area * (speed - background)
  return float(total @ weight) / diagonal


_AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0}  # of a shape of half height 1


def _mean_radius(width: float, height: float) -> float:
  """Mean distance of a rectangle's points from its middle (the integral of r over two right triangles a quadrant)."""
  a, b = width / 2, height / 2
  return float((np.hypot(a, b) + (a**2 / (2 * b)) * np.arcsinh(b / a) + (b**2 / (2 * a)) * np.arcsinh(a / b)) / 3)


def true_aesthetic(clip: Script) -> float:
  """A score in 0..10 of palette and composition: 10 * (0.5 colour + 0.3 contrast + 0.2 thirds).

  colour: mean chroma (largest minus smallest RGB component) of background and things, half weight each. contrast:
  mean luma difference between things and background. thirds: 1 at a crossing of the lines of thirds, 0 at a distance
  of half a side from the nearest, for the first thing at half time.
  """
  background = _rgb(clip, clip.background)
  colours = [_rgb(clip, thing.colour) for thing in clip.things]
  colour = 0.5 * float(np.ptp(background)) + 0.5 * float(np.mean([np.ptp(c) for c in colours]))
  contrast = float(np.mean([abs((c - background) @ LUMA) for c in colours]))
  x, y = clip.things[0].middle
  thirds = 1 - min(float(np.hypot(abs(x) - 1 / 6, abs(y) - 1 / 6)) / 0.5, 1.0)
  return 10 * (0.5 * colour + 0.3 * contrast + 0.2 * thirds)


def _rgb(clip: Script, colour: str) -> np.ndarray:
  """The palette's colour after the clip's saturation, float (3,) in [0, 1]."""
  rgb = np.array(COLOURS[colour])
  grey = rgb @ LUMA
  return grey + (rgb - grey) * clip.saturation


# -------------------------------------------------------------------------------------------------------- rendering


def render(clip: Script, times_s: np.ndarray, height: int, width: int) -> np.ndarray:
  """Draws the clip at any times (also beyond its nominal duration) and any size, anti-aliased over one pixel.

  Returns:
    uint8 (T, height, width, 3) RGB.
  """
  frames_THWC = np.empty((len(times_s), height, width, 3), np.uint8)
  step = max(1, 2**16 // (height * width))  # keeps the temporaries in the processor's cache
  for start in range(0, len(times_s), step):
    chunk = slice(start, start + step)
    frames_THWC[chunk] = _render(clip, np.asarray(times_s[chunk], np.float64), height, width)
  return frames_THWC


def _render(clip: Script, times_s: np.ndarray, height: int, width: int) -> np.ndarray:
  t = times_s - DURATION_S / 2
  pixel = 1.0 / max(height, width)
  scale_T = np.exp(clip.zoom * t)
  x_TW = (np.arange(width) + 0.5 - width / 2) * pixel / scale_T[:, None] + clip.pan[0] * t[:, None]
  y_TH = (np.arange(height) + 0.5 - height / 2) * pixel / scale_T[:, None] + clip.pan[1] * t[:, None]
  x_THW, y_THW = x_TW[:, None, :].astype(np.float32), y_TH[:, :, None].astype(np.float32)
  sharp_T11 = (scale_T / pixel).astype(np.float32)[:, None, None]  # pixels per unit of the world

  light = _rgb(clip, clip.background).astype(np.float32)
  dark = light * np.float32(1 - 0.6 * clip.contrast) + np.float32(0.1 * clip.contrast)
  pattern_THW = raster.texture(clip.texture, clip.frequency, x_THW, y_THW, sharp_T11)
  picture = dark + (light - dark) * pattern_THW[..., None]
  for thing in clip.things:
    middle_TC = np.add(thing.middle, np.outer(t, thing.velocity)).astype(np.float32)
    u, v = x_THW - middle_TC[:, 0, None, None], y_THW - middle_TC[:, 1, None, None]
    distance_THW = raster.distance(thing.shape, u, v, np.float32(thing.radius))
    raster.paint(picture, distance_THW, sharp_T11, _rgb(clip, thing.colour))
  if clip.pillar is not None:
    distance_THW = np.abs(x_THW - np.float32(clip.pillar)) - np.float32(0.05)
    raster.paint(picture, distance_THW, sharp_T11, GREY)
  if clip.blur > 0:
    picture = raster.blur(picture, clip.blur / pixel)
  return raster.to_uint8(picture)


# ----------------------------------------------------------------------------------------------------------- source


@dataclasses.dataclass(frozen=True)
class WorldSource:
  """A `ClipSource` of `count` clips of a procedural world; clip i is a pure function of (name, seed, i).

  Clips have a nominal duration of 2.5 s at 24 fps; frames are drawn analytically at any time and size.

  Raises:
    ConfigError: an unknown world, or a count below 1.
  """

  name: str = "shapes-v1"
  count: int = 1024
  seed: int = 0

  def __post_init__(self) -> None:
    if self.name not in WORLDS:
      raise ConfigError(f"unknown procedural world {self.name!r}{nearest(self.name, WORLDS)}")
    if self.count < 1:
      raise ConfigError(f"a procedural world needs a count of at least 1, got {self.count}")

  @property
  def fingerprint(self) -> str:
    return hashlib.sha256(f"{self.name}/{self.seed}/{self.count}".encode()).hexdigest()[:16]

  def __len__(self) -> int:
    return self.count

  def script(self, index: int) -> Script:
    """The script of clip `index`. Raises: IndexError."""
    if not 0 <= index < self.count:
      raise IndexError(f"clip {index} of {self.name}: there are {self.count}")
    return script(self.name, self.seed, index)

  def info(self, index: int) -> ClipInfo:
    clip = self.script(index)
    identity = f"{self.name}-{self.seed}-{index}"
    return ClipInfo(
      clip_id=identity,
      caption=clip.caption,
      duration_s=DURATION_S,
      fps=FPS,
      num_frames=round(DURATION_S * FPS),
      width=NATIVE_SIZE,
      height=NATIVE_SIZE,
      scores=true_scores(clip),
      video_id=identity,
      parts=clip.parts,
    )

  def frames(self, index: int, times_s: np.ndarray, height: int, width: int) -> np.ndarray:
    return render(self.script(index), times_s, height, width)
