"""memory-v1 as pictures: frames at any time and size, what is true in each of them, and the world as a clip source.

Plane: x to the right, y down, origin in the middle of the frame, unit = the longer side of the frame. The middle of
cell (column, row) of a room is seen at (column / 3 - view, 0.3 * (row - 1/2)) while the camera rests at `view`. A clip
lasts one second; everything in it moves at a constant speed. At a clip's time 0 the picture is that of the state
before it, at its end that of the state after it; a cut shows the new room at once. Frames wider than high, up to 16:9,
show all that the camera should see.
"""

import dataclasses
import hashlib

import numpy as np

from kling_jax.data import memory_world, raster
from kling_jax.data.memory_world import SHAPES, SLOTS, THING_COLOURS, WORLD, Room, State, Story, Thing
from kling_jax.data.named import COLOURS, GREY
from kling_jax.data.source import ClipInfo, Score
from kling_jax.errors import ConfigError

CLIP_S = 1.0
FPS = 24.0  # only what `info` reports, as the size is; frames are analytic
NATIVE_SIZE = 256
RADIUS = 0.12
CELL, LEVEL = 1 / 3, 0.3  # distances of columns and of rows
WALL = (0.15, 0.145)  # half width and half height
TEXTURE, FREQUENCY, CONTRAST = "gradient", 3.0, 0.45
VERSION = "1"
AREAS = {"circle": np.pi, "square": 4.0, "triangle": 2.0}  # of a shape of half height 1


def middle(thing: Thing) -> np.ndarray:
  """Where a thing stands in its room, (x, y)."""
  return np.array([thing.column * CELL, (thing.row - 0.5) * LEVEL])


def _rooms(before: State, after: State) -> tuple[Room, Room]:
  """The shown room at the start and at the end of a clip; both the new one at a cut."""
  return (before.shown if before.room == after.room else after.shown), after.shown


def render(before: State, after: State, progress_T: np.ndarray, height: int, width: int) -> np.ndarray:
  """The pictures of a clip that leads from one state to another.

  Args:
    progress_T: moments of the clip, 0 (start) to 1 (end).

  Returns:
    uint8 (T, height, width, 3) RGB, anti-aliased over one pixel.
  """
  old, new = _rooms(before, after)
  p_T = np.clip(np.asarray(progress_T, np.float64), 0, 1)
  pixel = 1.0 / max(height, width)
  camera_T = old.view + (new.view - old.view) * p_T
  x_TW = (np.arange(width) + 0.5 - width / 2) * pixel + camera_T[:, None]
  y_H = (np.arange(height) + 0.5 - height / 2) * pixel
  x_TW, y_H = x_TW.astype(np.float32), y_H.astype(np.float32)
  x_THW, y_THW = (np.broadcast_to(a, (len(p_T), height, width)) for a in (x_TW[:, None, :], y_H[None, :, None]))
  sharp = np.full((1, 1, 1), 1 / pixel, np.float32)
  light = np.array(COLOURS[new.background], np.float32)
  dark = light * np.float32(1 - 0.6 * CONTRAST)
  picture = dark + (light - dark) * raster.texture(TEXTURE, FREQUENCY, x_THW, y_THW, sharp)[..., None]
  for start, end in zip(old.things, new.things, strict=True):
    at_TC = (middle(start) + np.outer(p_T, middle(end) - middle(start))).astype(np.float32)
    u, v = x_THW - at_TC[:, 0, None, None], y_THW - at_TC[:, 1, None, None]
    first, last = (np.array(COLOURS[thing.colour], np.float32) for thing in (start, end))
    rgb = first + (last - first) * p_T.astype(np.float32)[:, None, None, None]
    raster.paint(picture, raster.distance(end.shape, u, v, np.float32(RADIUS)), sharp, rgb)
  if new.wall is not None:
    u, v = np.abs(x_THW), np.abs(y_THW - np.float32((new.wall - 0.5) * LEVEL))
    raster.paint(picture, np.maximum(u - np.float32(WALL[0]), v - np.float32(WALL[1])), sharp, GREY)
  return raster.to_uint8(picture)


@dataclasses.dataclass(frozen=True)
class Truth:
  """What is true in each of T pictures, for SLOTS things.

  Attributes:
    exists_TN: bool, there is such a thing (also in the room that is not shown).
    xy_TNC: float32, its middle, relative to the middle of the view that its room's camera has; longer sides.
    cell_TNC: int32, the cell it goes to: column -4 .. 4, row 0 or 1.
    visible_TN: float32, share of its bounding box that is in the frame, not behind the wall, and in the shown room.
    colour_TN, shape_TN: int32, places in THING_COLOURS and SHAPES; a turning thing has its new colour from half time.
    camera_T: float32, where the shown room's camera is, -1 to 1. room_T: int32, which room is shown.
  Entries of things that do not exist are 0.
  """

  exists_TN: np.ndarray
  xy_TNC: np.ndarray
  cell_TNC: np.ndarray
  visible_TN: np.ndarray
  colour_TN: np.ndarray
  shape_TN: np.ndarray
  camera_T: np.ndarray
  room_T: np.ndarray


def truth(before: State, after: State, progress_T: np.ndarray, height: int = 1, width: int = 1) -> Truth:
  """The truth about what `render` draws with the same arguments."""
  p_T = np.clip(np.asarray(progress_T, np.float64), 0, 1)
  steps = len(p_T)
  old_shown, new_shown = _rooms(before, after)
  half_C = np.array([width, height]) / max(width, height) / 2
  found = Truth(
    np.zeros((steps, SLOTS), bool),
    np.zeros((steps, SLOTS, 2), np.float32),
    np.zeros((steps, SLOTS, 2), np.int32),
    np.zeros((steps, SLOTS), np.float32),
    np.zeros((steps, SLOTS), np.int32),
    np.zeros((steps, SLOTS), np.int32),
    (old_shown.view + (new_shown.view - old_shown.view) * p_T).astype(np.float32),
    np.full(steps, after.room, np.int32),
  )
  for number, room in enumerate(after.rooms):
    shown = number == after.room
    old = old_shown if shown else room
    camera_T = found.camera_T.astype(np.float64) if shown else np.full(steps, float(room.view))
    for start, end in zip(old.things, room.things, strict=True):
      n = end.slot
      xy_TC = middle(start) + np.outer(p_T, middle(end) - middle(start)) - camera_T[:, None] * [1, 0]
      found.exists_TN[:, n] = True
      found.xy_TNC[:, n] = xy_TC
      found.cell_TNC[:, n] = end.column, end.row
      found.colour_TN[:, n] = np.where(p_T < 0.5, THING_COLOURS.index(start.colour), THING_COLOURS.index(end.colour))
      found.shape_TN[:, n] = SHAPES.index(end.shape)
      if shown:
        inside = _overlap(xy_TC, RADIUS, np.zeros(2), half_C)
        wall = np.array([0, ((room.wall or 0) - 0.5) * LEVEL]) - camera_T[:, None] * [1, 0]
        behind = _overlap(xy_TC, RADIUS, wall, np.array(WALL)) if room.wall is not None else 0.0
        found.visible_TN[:, n] = np.clip(inside - behind, 0, 1)
  return found


def _overlap(xy_TC: np.ndarray, radius: float, middle_C: np.ndarray, half_C: np.ndarray) -> np.ndarray:
  """Share of the squares of half side `radius` around `xy` that lies in a box."""
  low = np.maximum(xy_TC - radius, middle_C - half_C)
  high = np.minimum(xy_TC + radius, middle_C + half_C)
  return np.clip(high - low, 0, None).prod(-1) / (2 * radius) ** 2


def true_motion(before: State, after: State, height: int = NATIVE_SIZE, width: int = NATIVE_SIZE) -> float:
  """Mean speed over a clip and the frame, in frame diagonals per second: a pan moves it all, a thing its own area."""
  old, new = _rooms(before, after)
  box_C = np.array([width, height]) / max(width, height)
  speed = abs(new.view - old.view) / CLIP_S
  for start, end in zip(old.things, new.things, strict=True):
    path = float(np.hypot(*(middle(end) - middle(start)))) / CLIP_S
    if path:
      seen = float(truth(before, after, np.linspace(0, 1, 33), height, width).visible_TN[:, end.slot].mean())
      speed += path * seen * AREAS[end.shape] * RADIUS**2 / float(box_C.prod())
  return speed / float(np.hypot(*box_C))


def walk_frames(walk: Story, times_s: np.ndarray, height: int, width: int) -> np.ndarray:
  """Frames of a whole walk at any seconds from its start; clip n fills (n, n + 1], and time 0 is the first picture.

  Returns:
    uint8 (T, height, width, 3).
  """
  times_s = np.asarray(times_s, np.float64)
  clips = np.clip(np.ceil(times_s / CLIP_S - 1e-9).astype(int) - 1, 0, len(walk.actions) - 1)
  frames_THWC = np.empty((len(times_s), height, width, 3), np.uint8)
  clips[times_s <= 0] = -1
  for clip in np.unique(clips):
    at = clips == clip
    before, after = walk.states[max(clip, 0)], walk.states[clip + 1]
    frames_THWC[at] = render(before, after, times_s[at] / CLIP_S - clip, height, width)
  return frames_THWC


@dataclasses.dataclass(frozen=True)
class MemoryWorld:
  """A `ClipSource` of `count` walks of `clips` clips each; clip n is clip n % clips of walk n // clips.

  A clip's caption is what its first picture shows and what happens; its video is its walk.

  Raises:
    ConfigError: no walks, or no clips.
  """

  count: int = 256
  seed: int = 0
  clips: int = 24

  def __post_init__(self) -> None:
    if min(self.count, self.clips) < 1:
      raise ConfigError(f"{WORLD} needs at least 1 walk of 1 clip, got count={self.count}, clips={self.clips}")

  @property
  def fingerprint(self) -> str:
    return hashlib.sha256(f"{WORLD}/{self.seed}/{self.count}/{self.clips}".encode()).hexdigest()[:16]

  def __len__(self) -> int:
    return self.count * self.clips

  def story(self, walk: int) -> Story:
    """The walk as it goes. Raises: IndexError."""
    if not 0 <= walk < self.count:
      raise IndexError(f"walk {walk} of {WORLD}: there are {self.count}")
    return memory_world.story(self.seed, walk, self.clips)

  def _clip(self, index: int) -> tuple[Story, int]:
    if not 0 <= index < len(self):
      raise IndexError(f"clip {index} of {WORLD}: there are {len(self)}")
    return self.story(index // self.clips), index % self.clips

  def info(self, index: int) -> ClipInfo:
    walk, clip = self._clip(index)
    before, after = walk.states[clip], walk.states[clip + 1]
    start = before if not walk.cuts[clip] else after
    video = f"{WORLD}-{self.seed}-{index // self.clips}"
    return ClipInfo(
      clip_id=f"{video}-{clip}",
      caption=f"{memory_world.scene(start)}; {walk.sentences[clip]}",
      duration_s=CLIP_S,
      fps=FPS,
      num_frames=round(CLIP_S * FPS),
      width=NATIVE_SIZE,
      height=NATIVE_SIZE,
      scores={"motion": Score(true_motion(before, after), WORLD, VERSION)},
      video_id=video,
      index=clip,
      cut_before=clip == 0 or walk.cuts[clip],
    )

  def frames(self, index: int, times_s: np.ndarray, height: int, width: int) -> np.ndarray:
    walk, clip = self._clip(index)
    progress_T = np.asarray(times_s, np.float64) / CLIP_S
    return render(walk.states[clip], walk.states[clip + 1], progress_T, height, width)

  def dynamics(self, index: int) -> str:
    """The sentence of clip `index`. Raises: IndexError."""
    walk, clip = self._clip(index)
    return walk.sentences[clip]

  def scene(self, index: int) -> str:
    """What is seen where clip `index` starts. Raises: IndexError."""
    walk, clip = self._clip(index)
    return memory_world.scene(walk.states[clip])

  def determined(self, index: int) -> bool:
    """Whether the sentence of clip `index` follows from what was before. Raises: IndexError."""
    walk, clip = self._clip(index)
    return walk.determined[clip]

  def fresh(self, index: int) -> bool:
    """Whether nothing is away before clip `index`, so that a row may begin there. Raises: IndexError."""
    walk, clip = self._clip(index)
    return not walk.states[clip].debts and not walk.cuts[clip]

  def truth(self, index: int, times_s: np.ndarray, height: int, width: int) -> Truth:
    """See `truth`. Raises: IndexError."""
    walk, clip = self._clip(index)
    return truth(walk.states[clip], walk.states[clip + 1], np.asarray(times_s, np.float64) / CLIP_S, height, width)
