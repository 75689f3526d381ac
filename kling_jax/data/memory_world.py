"""memory-v1: the rules of a procedural world that has to be remembered; one event a clip, told in one sentence.

A room is a strip of 9 x 2 cells; the camera shows three columns of it at a time (view -1, 0 or 1; home is 0). Things
stand in cells and are told apart by colour and shape. A wall in the home view hides whatever stands behind it. What
goes away comes back: a thing that hides comes out in the next clip, a thing that leaves the view returns after one
other event, a camera that pans away waits for a clip and pans back, a cut to another room is followed by its thing
crossing it and by the cut back. These returns are debts of the state, so the next sentence is a function of what was
seen and said wherever a debt is due (`Story.determined`), and a draw elsewhere.

Every draw is a hash of (world, seed, index, name); clip n of walk (seed, index) is the same whatever else is asked.
The state is a value and `apply` a pure function of it, so that a sentence given by somebody else has a true outcome.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

from kling_jax.data.named import Draws, article
from kling_jax.errors import DataError, nearest

WORLD = "memory-v1"
SHAPES = ("circle", "square", "triangle")
THING_COLOURS = ("red", "yellow", "green", "blue", "white", "black")
ROOM_COLOURS = ("orange", "cyan", "purple", "pink")
SLOTS = 4  # things that ground truth has room for: three of the first room, one of the other
OTHER = 3  # slot of the thing in the room that a cut leads to
HOME, LIMIT = 0, 4  # home view; outermost column
COLUMNS = {"left": -1, "right": 1}
ROWS = {"up": -1, "down": 1}
PLACES = {-1: " left", 0: "", 1: " right"}
LEVELS = ("top", "bottom")
# Shares of drawn events, among the kinds that the state allows.
SHARES = {"move": 0.24, "turn": 0.1, "hide": 0.2, "leave": 0.17, "pan": 0.16, "cut": 0.13}
QUIET = ("move", "turn")  # all that is drawn while something is away
# Every word of `sentence` and `scene`; their places are tokens of trained models, so new ones go to the end.
WORDS = (
  *(",", "a", "an", "back", "behind", "black", "blue", "bottom", "camera", "circle", "comes", "crosses", "cut", "cyan"),
  *("down", "first", "from", "green", "grey", "hides", "in", "leaves", "left", "moves", "nothing", "on", "orange"),
  *("out", "pans", "pink", "purple", "red", "right", "room", "square", "the", "to", "top", "triangle", "turns", "up"),
  *("wall", "white", "with", "yellow"),
)


@dataclasses.dataclass(frozen=True)
class Thing:
  """A thing in cell (column, row): column -4 .. 4 from the left, row 0 (top) or 1 (bottom)."""

  slot: int
  shape: str
  colour: str
  column: int
  row: int

  @property
  def name(self) -> str:
    return f"{self.colour} {self.shape}"


@dataclasses.dataclass(frozen=True)
class Room:
  """What one room holds: the row of its wall (in column 0) or None, its things, and the view that the camera has."""

  background: str
  wall: int | None
  things: tuple[Thing, ...]
  view: int = HOME

  def thing(self, slot: int | None) -> Thing:
    """Raises: StopIteration: no such thing in this room."""
    return next(thing for thing in self.things if thing.slot == slot)

  def hidden(self, thing: Thing) -> bool:
    """Whether the thing stands behind the wall."""
    return thing.column == 0 and thing.row == self.wall

  def visible(self, thing: Thing) -> bool:
    """Whether the camera sees the thing."""
    return abs(thing.column - 3 * self.view) <= 1 and not self.hidden(thing)

  def with_thing(self, thing: Thing) -> "Room":
    """The room with `thing` in place of the one of its slot."""
    return dataclasses.replace(self, things=tuple(thing if t.slot == thing.slot else t for t in self.things))

  def seen(self) -> tuple[Thing, ...]:
    """The things that the camera sees."""
    return tuple(thing for thing in self.things if self.visible(thing))


@dataclasses.dataclass(frozen=True)
class Action:
  """One event.

  Attributes:
    kind: still; move, hide, out, leave, return, turn, cross (of the thing in `slot`); pan, pan back; cut, cut back.
    direction: left, right, up or down; of `return` the side that the thing comes from; empty where there is none.
    colour: that a thing turns into.
    room: that a cut leads to.
  """

  kind: str
  slot: int | None = None
  direction: str = ""
  colour: str = ""
  room: Room | None = None


@dataclasses.dataclass(frozen=True)
class Debt:
  """An event that is bound to come in clip `due`."""

  action: Action
  due: int


@dataclasses.dataclass(frozen=True)
class State:
  """Everything there is before clip `clip`.

  Attributes:
    rooms: the first room, and the one that was last cut to.
    room: which of them is shown.
    debts: what is bound to come, the latest promise last; it is due first.
  """

  rooms: tuple[Room, ...]
  room: int = 0
  debts: tuple[Debt, ...] = ()
  clip: int = 0

  @property
  def shown(self) -> Room:
    return self.rooms[self.room]


# ---------------------------------------------------------------------------------------------------------- events


def legal(state: State) -> tuple[Action, ...]:
  """All events that may come next and that a camera would see, but for cuts to another room (see `other_rooms`)."""
  room = state.shown
  actions = [Action("still")]
  for thing in room.things:
    if room.visible(thing):
      actions += _moves(state, thing)
      actions += [Action("turn", thing.slot, colour=colour) for colour in _free_colours(room)]
    elif room.hidden(thing) and room.view == HOME:
      for word, step in COLUMNS.items():
        if _free(state, step, thing.row):
          actions.append(Action("out", thing.slot, word))
  for debt in state.debts:
    if debt.action.kind == "return" and _can_return(state, debt.action):
      actions.append(debt.action)
  if state.room == 1:
    actions.append(Action("cut back"))
    actions += [action for action in (_crossing(room),) if action]
  elif room.view == HOME:
    actions += [Action("pan", direction=word) for word in COLUMNS]
  else:
    actions.append(Action("pan back", direction="right" if room.view < 0 else "left"))
  return tuple(actions)


def _moves(state: State, thing: Thing) -> Iterator[Action]:
  """Where a visible thing may go: to a free cell next to it, behind the wall, or out of the view."""
  room = state.shown
  for word, step in COLUMNS.items():
    column = thing.column + step
    if not _free(state, column, thing.row):
      continue
    if column == 0 and thing.row == room.wall:
      yield Action("hide", thing.slot, word)
    elif abs(column - 3 * room.view) > 1:
      if state.room == 0:
        yield Action("leave", thing.slot, word)
    else:
      yield Action("move", thing.slot, word)
  word = "up" if thing.row else "down"
  if _free(state, thing.column, 1 - thing.row) and not (thing.column == 0 and room.wall == 1 - thing.row):
    yield Action("move", thing.slot, word)


def _free(state: State, column: int, row: int) -> bool:
  """Whether a cell is within the strip, empty, and not kept for a thing that will come back to it."""
  room = state.shown
  taken = {(thing.column, thing.row) for thing in room.things}
  if state.room == 0:
    away = (room.thing(debt.action.slot) for debt in state.debts if debt.action.kind == "return")
    taken |= {(thing.column + (1 if thing.column < 0 else -1), thing.row) for thing in away}
  return abs(column) <= LIMIT and (column, row) not in taken


def _free_colours(room: Room) -> list[str]:
  used = {thing.colour for thing in room.things}
  return [colour for colour in THING_COLOURS if colour not in used]


def _can_return(state: State, action: Action) -> bool:
  if state.room:
    return False
  thing = state.shown.thing(action.slot)
  return thing.column - 3 * state.shown.view == 2 * COLUMNS[action.direction]


def _crossing(room: Room) -> Action | None:
  """The thing of the other room goes to its other side, where it stands at one."""
  thing = room.things[0]
  if thing.column not in (-1, 1):
    return None
  return Action("cross", thing.slot, "right" if thing.column < 0 else "left")


def _may_cut(state: State) -> bool:
  return state.room == 0 and state.shown.view == HOME


def other_rooms(state: State) -> Iterator[Action]:
  """All cuts to another room that may come next."""
  if not _may_cut(state):
    return
  for background in ROOM_COLOURS:
    if background != state.shown.background:
      for colour in THING_COLOURS:
        for shape in SHAPES:
          for column in (-1, 1):
            room = Room(background, None, (Thing(OTHER, shape, colour, column, 1),))
            yield Action("cut", room=room)


def apply(state: State, action: Action) -> State:
  """The state after `action`.

  Raises:
    DataError: the state does not allow it; the message lists what it allows.
  """
  if action not in (other_rooms(state) if action.kind == "cut" else legal(state)):
    allowed = "; ".join(sentence(state, other) for other in legal(state))
    raise DataError(f"clip {state.clip} cannot show {action}; possible here: {allowed}; or a cut to another room")
  room, rooms, shown = state.shown, list(state.rooms), state.room
  kind, slot, now = action.kind, action.slot, state.clip
  step = COLUMNS.get(action.direction, 0)
  new: list[Debt] = []
  if kind in ("move", "hide", "out", "leave", "return", "cross"):
    thing = room.thing(slot)
    by = {"return": -step, "cross": 2 * step}.get(kind, step)
    moved = dataclasses.replace(thing, column=thing.column + by, row=thing.row + ROWS.get(action.direction, 0))
    rooms[shown] = room.with_thing(moved)
    if kind == "hide":
      new = [Debt(Action("out", slot, action.direction), now + 1)]
    if kind == "leave":
      new = [Debt(Action("return", slot, action.direction), now + 2)]
  elif kind == "turn":
    rooms[shown] = room.with_thing(dataclasses.replace(room.thing(slot), colour=action.colour))
  elif kind in ("pan", "pan back"):
    rooms[shown] = dataclasses.replace(room, view=room.view + step)
    if kind == "pan":
      back = Action("pan back", direction="right" if step < 0 else "left")
      new = [Debt(back, now + 2), Debt(Action("still"), now + 1)]
  elif kind == "cut" and action.room is not None:
    rooms, shown = [rooms[0], action.room], 1
    crossing = _crossing(action.room)
    new = [Debt(Action("cut back"), now + 2)] + ([Debt(crossing, now + 1)] if crossing else [])
  elif kind == "cut back":
    shown = 0
  kept = tuple(debt for debt in state.debts if not _settled(debt, action, now))
  return State(tuple(rooms), shown, kept + tuple(new), now + 1)


def _settled(debt: Debt, action: Action, clip: int) -> bool:
  """Whether a debt is paid or void: its thing or camera moved, or its moment is over."""
  if debt.action.kind in ("still", "cross"):
    return debt.due <= clip
  if debt.action.slot is not None:
    return debt.action.slot == action.slot and action.kind != "turn"
  return debt.action.kind == action.kind


def forced(state: State) -> Action | None:
  """The event that is bound to come next, or None where anything may."""
  allowed = legal(state)
  for debt in reversed(state.debts):
    if debt.due <= state.clip:
      turned = dataclasses.replace(debt.action, direction="left" if debt.action.direction == "right" else "right")
      for action in (debt.action, turned) if debt.action.kind == "out" else (debt.action,):
        if action in allowed:
          return action
  return None


# ------------------------------------------------------------------------------------------------------------ texts


def sentence(state: State, action: Action) -> str:
  """What a clip shows that starts in `state` and in which `action` happens."""
  name = "the " + state.shown.thing(action.slot).name if action.slot is not None else "the camera"
  way = action.direction
  match action.kind:
    case "still":
      return "nothing moves"
    case "move":
      return f"{name} moves {way}"
    case "hide":
      return f"{name} hides behind the wall"
    case "out":
      return f"{name} comes out on the {way}"
    case "leave":
      return f"{name} leaves to the {way}"
    case "return":
      return f"{name} comes back from the {way}"
    case "turn":
      return f"{name} turns {action.colour}"
    case "cross":
      return f"{name} crosses to the {way}"
    case "pan" | "pan back":
      return f"{name} {action.kind.replace('pan', 'pans')} {way}"
    case "cut" if action.room is not None:
      thing = action.room.things[0]
      place = PLACES[thing.column].strip()
      return f"cut to {article(action.room.background)} room with {article(thing.name)} on the {place}"
    case _:
      return "cut back to the first room"


def parse(state: State, text: str) -> Action:
  """The event that a sentence names; capitals, spaces at the ends and a full stop are overlooked.

  Raises:
    DataError: no event that may come next; the message has the nearest one that may.
  """
  wanted = " ".join(text.lower().strip().rstrip(".").split())
  known = {sentence(state, action): action for action in legal(state)}
  if wanted.startswith("cut to"):
    known |= {sentence(state, action): action for action in other_rooms(state)}
  if wanted not in known:
    raise DataError(f"clip {state.clip} cannot show {text!r}{nearest(wanted, known)}")
  return known[wanted]


def scene(state: State) -> str:
  """What the camera sees: things with their places, the wall, the room."""
  room = state.shown
  words = [article(t.name) + f" {LEVELS[t.row]}{PLACES[t.column - 3 * room.view]}" for t in room.seen()]
  if room.wall is not None and room.view == HOME:
    words.append(f"a grey wall {LEVELS[room.wall]}")
  return ", ".join([*words, f"in {article(room.background)} room"])


# ---------------------------------------------------------------------------------------------------------- stories


@dataclasses.dataclass(frozen=True)
class Story:
  """A walk of `len(actions)` clips.

  Attributes:
    states: before each clip, and after the last one.
    actions: of each clip.
    determined: for each clip, whether its event follows from what was before.
  """

  states: tuple[State, ...]
  actions: tuple[Action, ...]
  determined: tuple[bool, ...]

  @property
  def sentences(self) -> tuple[str, ...]:
    return tuple(sentence(state, action) for state, action in zip(self.states, self.actions, strict=False))

  @property
  def cuts(self) -> tuple[bool, ...]:
    """Whether a scene cut lies directly before each clip."""
    return tuple(action.kind in ("cut", "cut back") for action in self.actions)


@functools.lru_cache(maxsize=8192)
def story(seed: int, index: int, clips: int) -> Story:
  """The first `clips` clips of walk `index`; a pure function, of which a longer story is a continuation."""
  return play(beginning(seed, index), Draws(WORLD, seed, index), clips, {})


def told(seed: int, index: int, clips: int, given: Mapping[int, str]) -> Story:
  """The walk with the sentences `given` (by clip) in place of its own.

  Raises:
    DataError: a sentence that the world does not allow there.
  """
  return play(beginning(seed, index), Draws(WORLD, seed, index), clips, given)


def beginning(seed: int, index: int) -> State:
  """The state before the first clip."""
  draw = Draws(WORLD, seed, index)
  background = draw.choice("background", ROOM_COLOURS)
  wall = draw.choice("wall row", (0, 1)) if draw.uniform("wall") < 0.75 else None
  cells = [(column, row) for column in (-1, 0, 1) for row in (0, 1) if not (column == 0 and row == wall)]
  colours = list(THING_COLOURS)
  things = []
  for slot in range(2 + (draw.uniform("third") < 0.7)):
    colour = colours.pop(int(draw.uniform(f"colour {slot}") * len(colours)))
    cell = cells.pop(int(draw.uniform(f"cell {slot}") * len(cells)))
    if slot == 2:  # the third stands out of view
      cell = (draw.choice("side", (-1, 1)) * draw.choice("distance", (3, 4)), draw.choice("row", (0, 1)))
    things.append(Thing(slot, draw.choice(f"shape {slot}", SHAPES), colour, *cell))
  return State((Room(background, wall, tuple(things)),))


def play(state: State, draw: Draws, clips: int, given: Mapping[int, str]) -> Story:
  """What happens in `clips` clips from `state` on: given sentences first, then what is bound to come, then draws."""
  states, actions, determined = [state], [], []
  for _ in range(clips):
    bound = forced(state)
    told_ = parse(state, given[state.clip]) if state.clip in given else None
    action = told_ or bound or _drawn(state, draw)
    determined.append(told_ is None and bound is not None)
    state = apply(state, action)
    actions.append(action)
    states.append(state)
  return Story(tuple(states), tuple(actions), tuple(determined))


def _drawn(state: State, draw: Draws) -> Action:
  kinds = QUIET if state.debts else tuple(SHARES)
  options: dict[str, list[Action]] = {}
  for action in legal(state):
    options.setdefault(action.kind, []).append(action)
  possible = [kind for kind in kinds if kind in options or (kind == "cut" and _may_cut(state))]
  if not possible:
    return Action("still")
  point = draw.uniform(f"kind {state.clip}") * sum(SHARES[kind] for kind in possible)
  for kind in possible:  # the last one takes what rounding leaves
    point -= SHARES[kind]
    if point < 0:
      break
  return draw.choice(f"event {state.clip}", list(other_rooms(state)) if kind == "cut" else options[kind])
