"""Films of the procedural world as real H.264 files: shots, cuts, dissolves, sound, and the truth about them."""

import csv
import dataclasses
import fractions
import io
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from kling_jax import files, progress
from kling_jax.data import encode, worlds
from kling_jax.errors import UsageError

WORLD = "shapes-v1"
RATES = (fractions.Fraction(24), fractions.Fraction(30000, 1001))  # film i has rate i % 2
SHOT_S = (1.8, 2.6)  # wished length of a shot
DISSOLVE_S = (0.35, 0.6)
TRUTH, CAPTIONS = "films.json", "captions.csv"


@dataclasses.dataclass(frozen=True)
class FilmShot:
  """One shot of a film: frames [start_frame, end_frame) show it, at the ends mixed with a neighbour in a dissolve."""

  start_frame: int
  end_frame: int
  clip: int  # index in the world
  script: worlds.Script


@dataclasses.dataclass(frozen=True)
class Film:
  """The plan of a film; its frames and its truth are functions of it.

  Attributes:
    shots: in order; neighbours overlap by the length of their dissolve, by nothing at a cut.
  """

  file: str
  rate: fractions.Fraction
  num_frames: int
  shots: tuple[FilmShot, ...]

  def transitions(self) -> list[dict[str, int | str]]:
    """Exact transitions: start_frame is the last frame wholly of the old shot, end_frame the first of the new one."""
    spans: list[dict[str, int | str]] = []
    for old, new in zip(self.shots, self.shots[1:], strict=False):
      kind = "cut" if new.start_frame == old.end_frame else "dissolve"
      spans.append({"start_frame": new.start_frame - 1, "end_frame": old.end_frame, "kind": kind})
    return spans

  def frames(self, height: int, width: int) -> Iterator[np.ndarray]:
    """Yields the film's frames, uint8 (height, width, 3)."""
    for frame in range(self.num_frames):
      showing = [shot for shot in self.shots if shot.start_frame <= frame < shot.end_frame]
      pictures = [self._picture(shot, frame, height, width) for shot in showing]
      if len(pictures) == 1:
        yield pictures[0]
        continue
      first, last = showing[1].start_frame, showing[0].end_frame
      share = (frame - first + 1) / (last - first + 1)
      yield np.rint((1 - share) * pictures[0] + share * pictures[1]).astype(np.uint8)

  def _picture(self, shot: FilmShot, frame: int, height: int, width: int) -> np.ndarray:
    middle = (shot.start_frame + shot.end_frame - 1) / 2
    time_s = worlds.DURATION_S / 2 + (frame - middle) / float(self.rate)
    return worlds.render(shot.script, np.array([time_s]), height, width)[0]


def plan(count: int, seconds: float, seed: int, shot_seconds: tuple[float, float] = SHOT_S) -> list[Film]:
  """The films of a seed: film i is the same whatever the count.

  Args:
    count: number of films. seconds: length of each. seed: of the world and of the cutting.
    shot_seconds: shortest and longest wished length of a shot.
  """
  return [_plan_film(number, seconds, seed, shot_seconds) for number in range(count)]


def _plan_film(number: int, seconds: float, seed: int, shot_seconds: tuple[float, float]) -> Film:
  rate = RATES[number % len(RATES)]
  total = round(seconds * rate)
  rng = np.random.Generator(np.random.PCG64([seed, number]))
  count = max(1, round(seconds / float(np.mean(shot_seconds))))
  lengths = np.array([rng.uniform(*shot_seconds) for _ in range(count)])
  borders = np.round(np.cumsum(lengths) / lengths.sum() * total).astype(int)[:-1]
  overlaps = [_overlap(k + number, float(rate), rng) for k in range(count - 1)]
  starts = [0] + [int(b) - o // 2 for b, o in zip(borders, overlaps, strict=True)]
  ends = [s + o for s, o in zip(starts[1:], overlaps, strict=True)] + [total]
  clip = number * 1000
  shots: list[FilmShot] = []
  for start, end in zip(starts, ends, strict=True):
    # Neighbours differ in background and texture, so that a cut between them can be seen.
    while shots and _alike(shots[-1].script, worlds.script(WORLD, seed, clip)):
      clip += 1
    shots.append(FilmShot(start, end, clip, worlds.script(WORLD, seed, clip)))
    clip += 1
  return Film(f"film-{number:03d}.mp4", rate, total, tuple(shots))


def _overlap(number: int, rate: float, rng: np.random.Generator) -> int:
  """Frames of the dissolve after a shot; every second transition is a cut."""
  length = rng.uniform(*DISSOLVE_S)
  return 0 if number % 2 == 0 else max(4, round(length * rate))


def _alike(a: worlds.Script, b: worlds.Script) -> bool:
  return a.background == b.background or a.texture == b.texture


def render_films(
  folder: str | os.PathLike[str],
  count: int = 6,
  seconds: float = 8.0,
  size: tuple[int, int] = (144, 256),
  seed: int = 0,
  shot_seconds: tuple[float, float] = SHOT_S,
) -> list[pathlib.Path]:
  """Renders films of the procedural world into H.264 MP4 files with an AAC track, at 24 and 30000/1001 frames a second.

  Beside them: `captions.csv` (file, start_s, end_s, caption: one row a shot, read by curation) and `films.json`, the
  truth: {world, seed, films: [{file, fps, num_frames, transitions: [{start_frame, end_frame, kind}], shots:
  [{start_frame, end_frame, start_s, end_s, clip, caption, scores: {name: {value, scorer, version}}}]}]}.
  Equal arguments give equal files on one machine.

  Args:
    folder: made where it is missing; each file appears whole or not at all.
    count: films. seconds: length of each, at least half a second.
    size: (height, width) in pixels, even. seed: of the world and of the cutting.
    shot_seconds: shortest and longest wished length of a shot.

  Raises:
    UsageError: nothing to render, or a size that H.264 cannot hold.
  """
  height, width = size
  if count < 1 or seconds < 0.5:
    raise UsageError(f"films need a count of at least 1 and at least 0.5 s each, got {count} films of {seconds} s")
  if min(size) < 16 or height % 2 or width % 2:
    raise UsageError(f"films need an even height and width of at least 16 pixels, got {height} x {width}")
  folder = pathlib.Path(folder)
  films = plan(count, seconds, seed, shot_seconds)
  for film in progress.track(films, "render films"):
    encode.write(folder / film.file, film.frames(height, width), fps=film.rate, audio="sine")
  files.write_text(folder / CAPTIONS, _captions(films))
  truth = {"world": WORLD, "seed": seed, "films": [_truth(film, height, width) for film in films]}
  files.write_json(folder / TRUTH, truth)
  return [folder / film.file for film in films]


def _truth(film: Film, height: int, width: int) -> dict:
  return {
    "file": film.file,
    "fps": str(film.rate),
    "num_frames": film.num_frames,
    "transitions": film.transitions(),
    "shots": [
      {
        "start_frame": shot.start_frame,
        "end_frame": shot.end_frame,
        "start_s": float(shot.start_frame / film.rate),
        "end_s": float(shot.end_frame / film.rate),
        "clip": shot.clip,
        "caption": shot.script.caption,
        "scores": {n: dataclasses.asdict(s) for n, s in worlds.true_scores(shot.script, height, width).items()},
      }
      for shot in film.shots
    ],
  }


def _captions(films: Sequence[Film]) -> str:
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow(["file", "start_s", "end_s", "caption"])
  for film in films:
    for shot in film.shots:
      start_s, end_s = (float(frame / film.rate) for frame in (shot.start_frame, shot.end_frame))
      writer.writerow([film.file, f"{start_s:.6f}", f"{end_s:.6f}", shot.script.caption])
  return text.getvalue()
