"""Re-appearance in memory-v1: a thing leaves the picture and returns; does it have its colour, shape and place still?

Colour and shape are read off the pixels by rule: the colour of the palette nearest to the mean over the middle of the
thing, and the shape whose outline, drawn at any place near by, explains best where the picture differs from the room.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from kling_jax.data.memory_world import SHAPES, THING_COLOURS, Room, State, Thing
from kling_jax.data.memory_world_frames import RADIUS, middle, render
from kling_jax.data.named import COLOURS, GREY
from kling_jax.errors import DataError

CORE = 0.5  # of the radius: the part of a thing whose colour is read
NEAR = 0.08  # longer sides: how far from its place a thing may stand


@dataclasses.dataclass(frozen=True)
class Look:
  """What stands at a place: colour ("room" or "wall" where no thing is seen) and, for a thing, its shape."""

  colour: str
  shape: str
  error: float  # mean absolute difference to the true picture over the thing's square, levels of 255


@dataclasses.dataclass(frozen=True)
class Reappearance:
  """Shares in [0, 1] over `count` things; nan where there are none."""

  colour: float
  shape: float
  both: float
  error: float
  count: int


def look(frame_HWC: np.ndarray, state: State, thing: Thing) -> Look:
  """What a picture has where `thing` should stand, when the camera rests.

  Args:
    frame_HWC: uint8 RGB.
    state: the true state; its shown room has the thing.
  """
  room = state.shown
  height, width, _ = frame_HWC.shape
  size = max(height, width)
  x, y = middle(thing) - [room.view, 0]
  rows, columns = np.mgrid[0:height, 0:width]
  u, v = (columns + 0.5 - width / 2) / size - x, (rows + 0.5 - height / 2) / size - y
  picture = frame_HWC.astype(np.float64)
  true = _draw(state, room, height, width)
  square = np.maximum(np.abs(u), np.abs(v)) <= RADIUS
  empty = _draw(state, _without(room, thing), height, width)
  core = np.hypot(u, v) <= max(CORE * RADIUS, 0.75 / size)
  mean = picture[core].mean(0)
  palette = {name: 255 * np.array(COLOURS[name]) for name in THING_COLOURS}
  palette |= {"room": empty[core].mean(0), "wall": 255 * np.array(GREY)}
  colour = min(palette, key=lambda name: float(np.square(palette[name] - mean).sum()))
  shape = "" if colour in ("room", "wall") else _shape(picture, state, thing, colour)
  return Look(colour, shape, float(np.abs(picture - true)[square].mean()))


def _shape(picture: np.ndarray, state: State, thing: Thing, colour: str) -> str:
  """The shape that explains the picture around a thing best, at the best place within NEAR."""
  height, width, _ = picture.shape
  reach = int(np.ceil(NEAR * max(height, width)))
  best: dict[str, float] = {}
  for shape in SHAPES:
    drawn = dataclasses.replace(thing, shape=shape, colour=colour)
    film = _draw(state, state.shown.with_thing(drawn), height, width)
    window = _window(state.shown, thing, height, width, reach)
    patch = film[window]
    top, left = window[0].start, window[1].start
    errors = [
      np.square(picture[top + dy : top + dy + patch.shape[0], left + dx : left + dx + patch.shape[1]] - patch).mean()
      for dy in range(max(-reach, -top), min(reach, height - top - patch.shape[0]) + 1)
      for dx in range(max(-reach, -left), min(reach, width - left - patch.shape[1]) + 1)
    ]
    best[shape] = float(min(errors))
  return min(best, key=lambda shape: best[shape])


def _window(room: Room, thing: Thing, height: int, width: int, reach: int) -> tuple[slice, slice]:
  """The pixels of a thing's square with one more around."""
  size = max(height, width)
  x, y = middle(thing) - [room.view, 0]
  half = RADIUS + 1 / size

  def span(place: float, side: int) -> slice:
    low, high = (place - half) * size + side / 2, (place + half) * size + side / 2
    return slice(max(int(np.floor(low)), 0), min(int(np.ceil(high)), side))

  return span(y, height), span(x, width)


def _draw(state: State, room: Room, height: int, width: int) -> np.ndarray:
  rooms = tuple(room if number == state.room else other for number, other in enumerate(state.rooms))
  shown = dataclasses.replace(state, rooms=rooms)
  return render(shown, shown, np.ones(1), height, width)[0].astype(np.float64)


def _without(room: Room, thing: Thing) -> Room:
  return dataclasses.replace(room, things=tuple(other for other in room.things if other.slot != thing.slot))


def returns(states: Sequence[State]) -> list[tuple[int, int]]:
  """(clip, slot) of things that are in the picture after a clip, were not before it, and had been at some time."""
  seen: set[int] = set()
  found = []
  now: set[int] = set()
  for number, state in enumerate(states):
    before, now = now, {thing.slot for thing in state.shown.seen()}
    if state.room == 1:  # the other room's thing is another one each time
      now -= {thing.slot for thing in state.shown.things}
    if number:
      found += [(number - 1, slot) for slot in sorted(now - before) if slot in seen]
    seen |= now
  return found


def stayed(states: Sequence[State]) -> list[tuple[int, int]]:
  """(clip, slot) of things that are in the picture before a clip and after it: what memory is not needed for."""
  return [
    (number, thing.slot)
    for number, (before, after) in enumerate(itertools.pairwise(states))
    for thing in after.shown.seen()
    if before.room == after.room == 0 and before.shown.visible(before.shown.thing(thing.slot))
  ]


def reappearance(
  frames_OTHWC: np.ndarray, states: Sequence[State], which: Sequence[tuple[int, int]] | None = None
) -> Reappearance:
  """Looks at the last frame of the clips in which things return (or those of `which`, such as `stayed`).

  Args:
    frames_OTHWC: uint8, O clips.
    states: the O + 1 true states.

  Raises:
    DataError: another number of states.
  """
  if len(states) != len(frames_OTHWC) + 1:
    raise DataError(f"{len(states)} states for {len(frames_OTHWC)} clips; give one before each and one after the last")
  looks = []
  for clip, slot in returns(states) if which is None else which:
    state = states[clip + 1]
    thing = state.shown.thing(slot)
    found = look(frames_OTHWC[clip, -1], state, thing)
    looks.append((found.colour == thing.colour, found.shape == thing.shape, found.error))
  if not looks:
    return Reappearance(float("nan"), float("nan"), float("nan"), float("nan"), 0)
  colour, shape, error = (np.array(column, float) for column in zip(*looks, strict=True))
  return Reappearance(
    float(colour.mean()), float(shape.mean()), float((colour * shape).mean()), float(error.mean()), len(looks)
  )
