"""Edited films from footage, with exact truth: transitions of every kind, and decoys that look like one and are none.

`plan` draws a film (shots, edits, decoys) as a pure function of (seed, index); `frames` renders it at any size. The
splitter's network is trained on such films and the benchmark measures on others.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import cv2
import numpy as np

from kling_jax.data import effects
from kling_jax.errors import DataError, nearest

KINDS = ("cut", "dissolve", "fade", "wipe")
DECOYS = (
  "flash", "strobe", "dropout", "exposure", "light", "pan", "shake", "zoom", "explosion", "occluder", "title",
  "defocus", "freeze",
)  # fmt: skip
_LENGTHS = {
  "flash": (1, 6), "strobe": (6, 24), "dropout": (1, 3), "exposure": (8, 40), "light": (10, 60), "pan": (5, 26),
  "shake": (5, 24), "zoom": (4, 60), "explosion": (10, 40), "occluder": (4, 32), "title": (8, 50),
  "defocus": (8, 40), "freeze": (3, 16),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mixture:
  """What films are made of.

  Attributes:
    kinds: weight of each kind of transition.
    lengths: mixed frames of a gradual transition: (least, most), drawn with a uniform logarithm; a fade has as many on
      either side. choices: lengths to choose from instead, where there are any.
    hold: frames wholly of one shot, (least, most), drawn likewise.
    decoys: weight of each kind of decoy; share: of the shots that hold one (a second one half as often).
    rough: share of films with grain, pulsing quality, bars, subtitles, held frames or without colour.
  """

  kinds: Mapping[str, float] = dataclasses.field(
    default_factory=lambda: {"cut": 0.3, "dissolve": 0.27, "fade": 0.13, "wipe": 0.3}
  )
  lengths: tuple[int, int] = (3, 60)
  choices: tuple[int, ...] = ()
  hold: tuple[int, int] = (8, 100)
  decoys: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(DECOYS, 1.0))
  share: float = 0.45
  rough: float = 0.5

  def __post_init__(self) -> None:
    for name, known in [(k, KINDS) for k in self.kinds] + [(k, DECOYS) for k in self.decoys]:
      if name not in known:
        raise DataError(f"unknown kind {name!r}{nearest(name, known)}")


@dataclasses.dataclass(frozen=True)
class Shot:
  """What a stretch of the film shows: frames [start, stop), mixed ones included.

  Attributes:
    footage: index of the footage; -1 for a plain colour.
    first: its frame at `start`; the footage runs on from there at `speed` frames a frame, back and forth.
    hold: each of its pictures is shown that often (animation "on twos").
    zoom, x, y, angle: window at the start: share of the picture's height, centre (0..1), radians. flip: mirrored.
    drift: change of (log zoom, x, y) a frame.
    gain, gamma, saturation: of its colours. colour: of a plain one.
  """

  start: int
  stop: int
  footage: int
  first: float = 0.0
  speed: float = 1.0
  hold: int = 1
  zoom: float = 1.0
  x: float = 0.5
  y: float = 0.5
  angle: float = 0.0
  flip: bool = False
  drift: tuple[float, float, float] = (0.0, 0.0, 0.0)
  gain: float = 1.0
  gamma: float = 1.0
  saturation: float = 1.0
  colour: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Edit:
  """A transition from shot k to shot k + 1: start_frame is the last frame wholly old, end_frame the first wholly new.

  Attributes:
    style: of a wipe or dissolve; see `effects`. manner: how progress runs, see `effects.ease`.
    draws: eight numbers in [0, 1) that choose the rest.
    dark: frames at the middle of a fade that show only its colour.
    fall, rise: mixed frames of a fade before and after them.
  """

  start_frame: int
  end_frame: int
  kind: str
  style: str = ""
  manner: str = "linear"
  draws: tuple[float, ...] = ()
  fall: int = 0
  dark: int = 0
  rise: int = 0
  colour: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Decoy:
  """Frames [start_frame, end_frame) of a shot that look like a transition; `draws` choose what happens in them."""

  start_frame: int
  end_frame: int
  kind: str
  shot: int
  draws: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Finish:
  """What lies over the whole film: bars (share of height, of width), grain and pulse (levels), grey, subtitles."""

  bars: tuple[float, float] = (0.0, 0.0)
  grain: float = 0.0
  pulse: float = 0.0
  group: int = 24  # frames after which the pulse changes, as at a codec's key frames
  grey: bool = False
  subtitles: tuple[tuple[int, int, int], ...] = ()  # (start, stop, seed)
  logo: int = -1  # seed; -1: none


@dataclasses.dataclass(frozen=True)
class Film:
  """The plan of a film; its pixels and its truth are functions of it."""

  seed: tuple[int, int]
  num_frames: int
  shots: tuple[Shot, ...]
  edits: tuple[Edit, ...]
  decoys: tuple[Decoy, ...]
  finish: Finish

  def transitions(self) -> list[dict[str, int | str]]:
    """The truth as `transitions.json` has it, with the style."""
    return [
      {"start_frame": e.start_frame, "end_frame": e.end_frame, "kind": e.kind, "style": e.style} for e in self.edits
    ]


# ---- plan ------------------------------------------------------------------------------------------------------------


def plan(seed: int, index: int, num_frames: int, footage: Sequence[int], mixture: Mixture | None = None) -> Film:
  """Draws film `index` of a seed.

  Args:
    num_frames: length of the film.
    footage: number of frames of each piece of footage; at least two pieces, neighbouring shots show different ones.
    mixture: what it is made of.

  Raises:
    DataError: fewer than two pieces of footage.
  """
  if len(footage) < 2:
    raise DataError(f"a film needs at least two pieces of footage, got {len(footage)}")
  mixture = mixture or Mixture()
  rng = np.random.Generator(np.random.PCG64([seed, index]))
  shots, edits = _cutting(rng, num_frames, footage, mixture)
  decoys = _decoys(rng, num_frames, shots, edits, mixture)
  return Film((seed, index), num_frames, tuple(shots), tuple(edits), tuple(decoys), _finish(rng, num_frames, mixture))


def _cutting(
  rng: np.random.Generator, num_frames: int, footage: Sequence[int], mixture: Mixture
) -> tuple[list[Shot], list[Edit]]:
  blank = rng.random() < 0.15
  shots = [_blank(rng, 0)] if blank else [_shot(rng, 0, footage, -1)]
  edits: list[Edit] = []
  whole = 0  # first frame wholly of the last shot
  names = list(mixture.kinds)
  weights = np.array([mixture.kinds[name] for name in names], float)
  while True:
    old = shots[-1]
    start = whole + (int(rng.integers(1, 12)) if old.footage < 0 else _log_uniform(rng, *mixture.hold)) - 1
    kind = str(rng.choice(names, p=weights / weights.sum()))
    if old.footage < 0:
      kind = "fade" if (edits and edits[-1].kind == "cut") or rng.random() < 0.7 else "cut"
      kind = "cut" if edits and edits[-1].kind == "fade" else kind
    to_blank = old.footage >= 0 and kind in ("cut", "fade") and rng.random() < 0.08
    edit = _edit(rng, start, kind, mixture, from_blank=old.footage < 0, to_blank=to_blank)
    if edit.end_frame > num_frames - 3:
      shots[-1] = dataclasses.replace(old, stop=num_frames)
      return shots, edits
    if old.footage < 0:
      edit = dataclasses.replace(edit, colour=old.colour)
    fresh = edit.end_frame - edit.rise if kind == "fade" else start + 1
    shots[-1] = dataclasses.replace(old, stop=start + 1 + edit.fall if kind == "fade" else edit.end_frame)
    new = _blank(rng, fresh) if to_blank else _shot(rng, fresh, footage, old.footage)
    if to_blank and kind == "fade":
      new = dataclasses.replace(new, colour=edit.colour)
    shots.append(new)
    edits.append(edit)
    whole = edit.end_frame


def _edit(
  rng: np.random.Generator, start: int, kind: str, mixture: Mixture, *, from_blank: bool, to_blank: bool
) -> Edit:
  draws = tuple(rng.random(8).tolist())
  manner = str(rng.choice(["linear", "smooth", "fast", "slow"], p=[0.6, 0.25, 0.075, 0.075]))
  if kind == "cut":
    return Edit(start, start + 1, kind)
  length = _length(rng, mixture)
  if kind == "fade":
    white = rng.random() < 0.2
    colour = (255.0, 255.0, 255.0) if white else (0.0, 0.0, 0.0)
    if rng.random() < 0.1:
      colour = tuple((rng.random(3) * 255).tolist())
    fall = 0 if from_blank else length
    rise = 0 if to_blank else (length if rng.random() < 0.6 else _length(rng, mixture))
    dark = 0 if from_blank or to_blank else int(rng.choice([0, 1, 2, 6, 14], p=[0.3, 0.3, 0.15, 0.15, 0.1]))
    return Edit(start, start + fall + dark + rise + 1, kind, "", manner, draws, fall, dark, rise, colour)
  style = "plain" if rng.random() < 0.85 else "blurred"
  if kind == "wipe":
    style = str(rng.choice(effects.WIPES + effects.MOVES, p=[0.36, 0.14, 0.08, 0.06, 0.05, 0.03, 0.16, 0.06, 0.06]))
  return Edit(start, start + length + 1, kind, style, manner, draws)


def _shot(rng: np.random.Generator, start: int, footage: Sequence[int], before: int) -> Shot:
  index = int(rng.integers(len(footage) - (before >= 0)))
  index += before >= 0 and index >= before
  still = rng.random() < 0.1
  moving = rng.random() < 0.45
  zoom = rng.uniform(0.5, 1.0)
  room = (1 - zoom) / 2
  return Shot(
    start=start, stop=start, footage=index, first=float(rng.uniform(0, max(1, footage[index] - 1))),
    speed=0.0 if still else float(np.exp(rng.uniform(np.log(0.4), np.log(2.5)))),
    hold=int(rng.choice([1, 2, 3], p=[0.88, 0.09, 0.03])),
    zoom=float(zoom), x=0.5 + float(rng.uniform(-room, room)), y=0.5 + float(rng.uniform(-room, room)),
    angle=float(rng.normal(0, 0.04)), flip=bool(rng.random() < 0.5),
    drift=tuple((rng.normal(0, 1, 3) * [0.004, 0.004, 0.003] * moving).tolist()),
    gain=float(np.exp(rng.normal(0, 0.2))), gamma=float(np.exp(rng.normal(0, 0.2))),
    saturation=float(rng.uniform(0.4, 1.4)),
  )  # fmt: skip


def _blank(rng: np.random.Generator, start: int) -> Shot:
  level = float(rng.choice([0.0, 255.0], p=[0.85, 0.15]))
  return Shot(start=start, stop=start, footage=-1, colour=(level, level, level))


def _decoys(
  rng: np.random.Generator, num_frames: int, shots: Sequence[Shot], edits: Sequence[Edit], mixture: Mixture
) -> list[Decoy]:
  names = list(mixture.decoys)
  weights = np.array([mixture.decoys[name] for name in names], float)
  begins = [0] + [edit.end_frame for edit in edits]
  ends = [edit.start_frame for edit in edits] + [num_frames - 1]
  found: list[Decoy] = []
  for k, (shot, begin, end) in enumerate(zip(shots, begins, ends, strict=True)):
    for chance in (mixture.share, mixture.share / 2):
      draws = tuple(rng.random(8).tolist())
      kind = str(rng.choice(names, p=weights / weights.sum())) if names else ""
      length = _log_uniform(rng, *_LENGTHS[kind]) if names else 0
      room = end - begin - length
      if shot.footage < 0 or not names or room < 2 or rng.random() > chance:
        continue
      start = begin + 1 + int(rng.integers(room - 1)) if room > 1 else begin + 1
      if all(start >= d.end_frame or start + length <= d.start_frame for d in found):
        found.append(Decoy(start, start + length, kind, k, draws))
  return found


def _finish(rng: np.random.Generator, num_frames: int, mixture: Mixture) -> Finish:
  if rng.random() > mixture.rough:
    return Finish()
  bars = (0.0, 0.0)
  if rng.random() < 0.35:
    bars = (float(rng.uniform(0.03, 0.16)), 0.0) if rng.random() < 0.7 else (0.0, float(rng.uniform(0.05, 0.25)))
  subtitles: list[tuple[int, int, int]] = []
  if rng.random() < 0.25:
    start = int(rng.integers(20))
    while start < num_frames:
      stop = start + int(rng.integers(12, 60))
      subtitles.append((start, stop, int(rng.integers(2**31))))
      start = stop + int(rng.integers(1, 40))
  return Finish(
    bars=bars,
    grain=float(rng.choice([0.0, rng.uniform(1, 12)])),
    pulse=float(rng.choice([0.0, rng.uniform(0.5, 4)])),
    group=int(rng.integers(6, 60)),
    grey=bool(rng.random() < 0.2),
    subtitles=tuple(subtitles),
    logo=int(rng.integers(2**31)) if rng.random() < 0.25 else -1,
  )


def _length(rng: np.random.Generator, mixture: Mixture) -> int:
  return int(rng.choice(mixture.choices)) if mixture.choices else _log_uniform(rng, *mixture.lengths)


def _log_uniform(rng: np.random.Generator, least: int, most: int) -> int:
  return round(math.exp(rng.uniform(math.log(least), math.log(most))))


# ---- pixels ----------------------------------------------------------------------------------------------------------


def frames(film: Film, footage: Sequence[np.ndarray], height: int, width: int) -> Iterator[np.ndarray]:
  """Yields the film's frames, uint8 (height, width, 3).

  Args:
    footage: uint8 RGB (T, H, W, 3) each, of the lengths that the film was planned with.
  """
  last = -1
  for number in range(film.num_frames):
    while last + 1 < len(film.edits) and film.edits[last + 1].start_frame < number:
      last += 1
    edit = film.edits[last] if last >= 0 and number < film.edits[last].end_frame else None
    if edit is None:
      picture = _picture(film, last + 1, number, footage, height, width)
    else:
      picture = _edited(film, edit, last, number, footage, height, width)
    yield _finished(film, number, picture)


def _edited(
  film: Film, edit: Edit, k: int, number: int, footage: Sequence[np.ndarray], height: int, width: int
) -> np.ndarray:
  """A mixed frame of the edit between shots k and k + 1."""
  done = number - edit.start_frame
  show = lambda shot: _picture(film, shot, number, footage, height, width)
  gamma = 1.0 if edit.draws[6] < 0.7 else 2.2
  if edit.kind == "fade":
    plain = np.broadcast_to(np.array(edit.colour, np.float32), (height, width, 3))
    if done <= edit.fall:
      return effects.mix(show(k), plain, effects.ease(done / (edit.fall + 1), edit.manner), gamma)
    if done <= edit.fall + edit.dark:
      return plain
    share = (done - edit.fall - edit.dark) / (edit.rise + 1)
    return effects.mix(plain, show(k + 1), effects.ease(share, edit.manner), gamma)
  share = effects.ease(done / (edit.end_frame - edit.start_frame), edit.manner)
  old, new = show(k), show(k + 1)
  if edit.style in effects.MOVES:
    return effects.move(old, new, edit.style, int(edit.draws[0] * 4), share)
  if edit.style in effects.WIPES:
    when = effects.arrival(edit.style, height, width, np.array(edit.draws))
    return effects.wipe(old, new, when, share, 0.0 if edit.draws[7] < 0.5 else 0.25 * edit.draws[6])
  if edit.style == "blurred":
    sigma = 0.001 + 0.12 * height * edit.draws[5] * math.sin(math.pi * share)
    old, new = (cv2.GaussianBlur(p, (0, 0), sigma, borderType=cv2.BORDER_REFLECT) for p in (old, new))
  return effects.mix(old, new, share, gamma)


def _picture(film: Film, k: int, number: int, footage: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
  """What shot k alone shows at a frame: float32 (H, W, 3), its decoys included."""
  shot = film.shots[k]
  if shot.footage < 0:
    return np.broadcast_to(np.array(shot.colour, np.float32), (height, width, 3))
  decoys = [decoy for decoy in film.decoys if decoy.shot == k]
  age = number - shot.start
  zoom, x, y, angle = shot.zoom * math.exp(shot.drift[0] * age), shot.x, shot.y, shot.angle
  x, y = x + shot.drift[1] * age, y + shot.drift[2] * age
  blur = (0.0, 0.0)
  for decoy in decoys:
    share = (number - decoy.start_frame + 1) / (decoy.end_frame - decoy.start_frame)
    inside = 0 < share <= 1
    if decoy.kind == "freeze" and share > 0:
      age -= min(number - decoy.start_frame, decoy.end_frame - decoy.start_frame - 1)
    elif decoy.kind == "zoom" and share > 0:
      zoom *= (1.25 + 1.6 * decoy.draws[0]) ** ((1 if decoy.draws[1] < 0.5 else -1) * _settle(share, decoy))
    elif decoy.kind == "pan" and share > 0:
      way = (0.4 + 2.4 * decoy.draws[0]) * zoom * (1 if decoy.draws[1] < 0.5 else -1)
      turn = 2 * math.pi * decoy.draws[2] if decoy.draws[3] < 0.3 else (0, math.pi / 2)[decoy.draws[4] < 0.25]
      now, before = _settle(share, decoy), _settle(share - 1 / (decoy.end_frame - decoy.start_frame), decoy)
      x, y = x + way * math.cos(turn) * now, y + way * math.sin(turn) * now
      step = 0.5 * abs(now - before) * way / zoom * width
      blur = (step * math.cos(turn), step * math.sin(turn))
    elif decoy.kind == "shake" and inside:
      rng = np.random.Generator(np.random.PCG64([int(decoy.draws[0] * 2**31), number]))
      jolt = rng.normal(0, 1, 3) * (0.01 + 0.05 * decoy.draws[1])
      x, y, angle = x + jolt[0] * zoom, y + jolt[1] * zoom, angle + jolt[2]
  picture = _window(footage[shot.footage], shot, age, zoom, x, y, angle, height, width)
  picture = effects.directional_blur(picture, *blur)
  for decoy in decoys:
    picture = _event(picture, decoy, number, footage, film)
  return picture


def _settle(share: float, decoy: Decoy) -> float:
  return effects.ease(min(max(share, 0.0), 1.0), "smooth" if decoy.draws[5] < 0.7 else "linear")


def _window(
  source: np.ndarray, shot: Shot, age: int, zoom: float, x: float, y: float, angle: float, height: int, width: int
) -> np.ndarray:
  """The part of the footage that the camera sees, in the shot's colours."""
  count, rows, columns = source.shape[:3]
  place = shot.first + shot.speed * (age // shot.hold * shot.hold)
  place = int(place) % max(1, 2 * count - 2)
  image = np.asarray(source[place if place < count else 2 * count - 2 - place])
  scale = zoom * min(rows / height, columns / width)
  cos, sin = scale * math.cos(angle), scale * math.sin(angle)
  mirror = -1.0 if shot.flip else 1.0
  u, v = x * columns, y * rows
  inverse = np.array(
    [
      [mirror * cos, -sin, u - mirror * cos * width / 2 + sin * height / 2],
      [mirror * sin, cos, v - mirror * sin * width / 2 - cos * height / 2],
    ]
  )
  flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
  seen = cv2.warpAffine(image, inverse, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT)
  levels = 255 * np.clip(shot.gain * (np.arange(256) / 255) ** shot.gamma, 0, 1)
  picture = levels.astype(np.float32)[seen]
  grey = picture @ np.array([0.299, 0.587, 0.114], np.float32)
  return grey[..., None] + np.float32(shot.saturation) * (picture - grey[..., None])


def _event(picture: np.ndarray, decoy: Decoy, number: int, footage: Sequence[np.ndarray], film: Film) -> np.ndarray:
  """What a decoy lays over a picture."""
  length, since = decoy.end_frame - decoy.start_frame, number - decoy.start_frame
  height, width = picture.shape[:2]
  d = decoy.draws
  if since < 0 or (since >= length and (decoy.kind not in ("exposure", "light") or d[4] < 0.6)):
    return picture
  share = min((since + 0.5) / length, 1.0)
  if decoy.kind in ("flash", "strobe"):
    strength = (0.35 + 0.65 * d[0]) * (1.0 if decoy.kind == "strobe" or d[1] < 0.5 else 1 - since / length)
    if decoy.kind == "strobe" and since // (1 + int(d[2] * 3)) % 2:
      return picture
    colour = np.array([255, 255, 255] if d[3] < 0.7 else [255, 120 + 135 * d[4], 255 * d[5]], np.float32)
    where = np.ones((height, width, 1), np.float32)
    if d[6] > 0.65:
      where = effects.spot(height, width, d[5], d[2], 0.3 + d[7])
    return effects.flash(picture, strength, colour, d[7] < 0.6, where)
  if decoy.kind == "dropout":
    return np.broadcast_to(np.float32(0 if d[0] < 0.7 else 255 * d[1]), picture.shape)
  if decoy.kind in ("exposure", "light"):
    gain = (0.3 + 0.5 * d[0]) if d[1] < 0.5 else (1.2 + 0.8 * d[0])
    if decoy.kind == "exposure":
      back = math.sin(math.pi * share) if d[4] < 0.6 else effects.ease(share, "smooth")
      gain = 1 + (gain - 1) * back
    return picture * np.float32(gain)
  if decoy.kind == "explosion":
    rng = np.random.Generator(np.random.PCG64(int(d[0] * 2**31)))
    grain = cv2.resize(rng.random((6, 8)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return effects.explosion(picture, share, d[1], 0.3 + 0.5 * d[2], 0.25 + 0.75 * d[3], grain[..., None])
  if decoy.kind == "occluder":
    other = footage[int(d[5] * len(footage))]
    texture = cv2.resize(np.asarray(other[0][::2, ::2]), (width, height)).astype(np.float32)
    texture = texture * np.float32(0.3 + 0.5 * d[6]) if d[7] < 0.5 else np.full_like(texture, 200 * d[6])
    return effects.occluder(picture, share, np.array(d), texture)
  if decoy.kind == "title":
    return _lettered(picture, int(d[0] * 2**31), min(1.0, 4 * share, 4 * (1 - share)) if d[1] < 0.6 else 1.0)
  if decoy.kind == "defocus":
    sigma = 0.001 + 0.1 * d[0] * height * math.sin(math.pi * share)
    return cv2.GaussianBlur(picture, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
  return picture


def _lettered(picture: np.ndarray, seed: int, strength: float) -> np.ndarray:
  """Some words laid over a picture; one in three on a plate."""
  rng = np.random.Generator(np.random.PCG64(seed))
  height, width = picture.shape[:2]
  layer, cover = np.zeros((height, width), np.uint8), np.zeros((height, width), np.float32)
  lines, size = int(rng.integers(1, 4)), float(rng.uniform(0.08, 0.28)) * height
  top = float(rng.uniform(0.25, 0.9)) * height
  left = float(rng.uniform(0, 0.4)) * width
  for line in range(lines):
    words = "".join(rng.choice(list("ABDEGHKLMNORSTXYZaeiost  "), int(rng.integers(3, 14))))
    place = int(left), int(top + line * size * 1.3)
    cv2.putText(layer, words, place, cv2.FONT_HERSHEY_SIMPLEX, size / 30, 255, max(1, round(size / 10)), cv2.LINE_AA)
  if rng.random() < 0.33:
    first, last = (int(np.clip(v, 0, height)) for v in (top - size, top + lines * size * 1.3))
    cover[first:last] = 0.7
  colour = np.array([255, 255, 255], np.float32) if rng.random() < 0.7 else (rng.random(3) * 255).astype(np.float32)
  picture = picture - strength * cover[..., None] * picture
  return picture + strength * (layer.astype(np.float32) / 255)[..., None] * (colour - picture)


def _finished(film: Film, number: int, picture: np.ndarray) -> np.ndarray:
  finish = film.finish
  height, width = picture.shape[:2]
  if finish.pulse:
    rng = np.random.Generator(np.random.PCG64([*film.seed, number // finish.group]))
    cells = rng.normal(0, finish.pulse, (8, 12, 3)).astype(np.float32)
    picture = picture + cv2.resize(cells, (width, height), interpolation=cv2.INTER_NEAREST)
  if finish.grain:
    rng = np.random.Generator(np.random.PCG64([*film.seed, 1, number]))
    picture = picture + finish.grain * rng.standard_normal(picture.shape, np.float32)
  if finish.logo >= 0:
    rng = np.random.Generator(np.random.PCG64(finish.logo))
    top, left = (0.04 + 0.8 * rng.integers(2), 0.04 + 0.8 * rng.integers(2))
    rows = slice(int(top * height), max(int((top + 0.1) * height), int(top * height) + 1))
    columns = slice(int(left * width), max(int((left + 0.12) * width), int(left * width) + 1))
    picture = np.array(picture)
    picture[rows, columns] += 0.7 * (np.array(rng.random(3) * 255, np.float32) - picture[rows, columns])
  for start, stop, seed in finish.subtitles:
    if start <= number < stop:
      picture = _lettered(picture, seed, 1.0)
  if finish.grey:
    picture = np.broadcast_to((picture @ np.array([0.299, 0.587, 0.114], np.float32))[..., None], picture.shape)
  rows, columns = round(finish.bars[0] * height), round(finish.bars[1] * width)
  if rows or columns:
    picture = np.array(picture)
    picture[:rows], picture[height - rows :] = 0, 0
    picture[:, :columns], picture[:, width - columns :] = 0, 0
  return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
