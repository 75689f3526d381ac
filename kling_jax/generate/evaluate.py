"""`kling eval videos` and `kling eval run`: folders of videos, pairs, or a checkpoint's samples, against real ones.

Both write `eval.json`, and `index.html` with the videos side by side.
"""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kling_jax import answers, files, progress
from kling_jax.data import decode, folder, grid
from kling_jax.errors import DataError, UsageError
from kling_jax.evals import compare, compare_page

SHOWN = 12  # rows of videos on the page
EMPTY: Mapping[str, Any] = {}
MADE, TRUE = "made", "true"


@dataclasses.dataclass(frozen=True)
class Reading:
  """How videos are read; None: as they are.

  Attributes:
    frames: most frames. size: (height, width), covered and cropped. fps: frames a second.
  """

  frames: int | None = None
  size: tuple[int, int] | None = None
  fps: float | None = None

  def __call__(self, path: str) -> tuple[np.ndarray, float]:
    """(frames uint8 (T, H, W, 3), fps) of a file.

    Raises:
      MediaError: it cannot be decoded.
    """
    info = decode.probe(path)
    if self.fps is None:
      shown = itertools.islice(decode.iterate(path, size=self.size), self.frames)
      return np.stack([frame for _, _, frame in shown]), info.fps
    count = max(1, math.floor(info.duration_s * self.fps + 1e-6))
    times_s = np.arange(min(count, self.frames or count)) / self.fps
    return decode.frames_at(path, times_s, *(self.size or (info.height, info.width))), self.fps


@dataclasses.dataclass(frozen=True)
class Entry:
  """One video: its name, and what gives its frames and rate; asked for more than once."""

  name: str
  load: Callable[[], tuple[np.ndarray, float]]


def entries(where: Sequence[str], reading: Reading) -> list[Entry]:
  """The videos of folders (all below them) and files, named by their path below the folder.

  Raises:
    DataError: a folder without videos. UsageError: no such file.
  """
  found = []
  for place in where:
    if os.path.isdir(place):
      paths = folder.find_videos(place)
      names = [pathlib.Path(os.path.relpath(path, place)).as_posix() for path in paths]
    elif os.path.isfile(place):
      paths, names = [place], [os.path.basename(place)]
    else:
      raise UsageError(f"there is no file or folder {place}")
    found += [Entry(name, functools.partial(reading, path)) for path, name in zip(paths, names, strict=True)]
  return found


def videos(
  made: Sequence[str], true: Sequence[str], out: str, reading: Reading, *, paired: bool, video_mae: str | None
) -> tuple[dict[str, Any], str]:
  """Evaluates videos of folders and files; see `evaluate`."""
  by = compare.extractor(video_mae)
  real = entries(true, reading) if true else []
  title = f"Evaluation of {', '.join(pathlib.PurePath(place).name for place in made)}"
  return evaluate(entries(made, reading), real, out, by, paired=paired, title=title)


def evaluate(
  made: Sequence[Entry], true: Sequence[Entry], out: str, by: compare.Extractor, *, paired: bool, title: str,
  subtitle: str = "", notes: Sequence[str] = (),
) -> tuple[dict[str, Any], str]:  # fmt: skip
  """All figures of the videos, as JSON and as text; writes both and the page into the folder `out`.

  Args:
    made: what is judged. true: real videos; [] where there are none.
    by: features of the distances between the two sets; left out below two videos each.
    paired: each video has its truth of the same name (but for its suffix).

  Raises:
    DataError: a video has no truth or another shape than it; a file that cannot be decoded.
  """
  partners = _partners(made, true) if paired else {}
  sets = {MADE: made} | ({TRUE: true} if true else {})
  rows: dict[str, list[dict[str, float]]] = {name: [] for name in sets}
  features: dict[str, list[np.ndarray]] = {name: [] for name in sets}
  todo = [(kind, entry) for kind, held in sets.items() for entry in held]
  for kind, entry in progress.track(todo, "evaluate", len(todo)):
    frames_THWC, fps = entry.load()
    figures = compare.alone(frames_THWC, fps) if len(frames_THWC) > 2 else {}
    if kind == MADE and paired:
      figures |= _pair(entry, frames_THWC, partners[entry.name])
    rows[kind].append(figures)
    if true:
      features[kind].append(by.of(frames_THWC))
  enough = bool(true) and min(len(made), len(true)) > 1
  stacked = {kind: np.stack(found) for kind, found in features.items() if found}
  return write(
    out, title, subtitle, rows, {kind: [entry.name for entry in held] for kind, held in sets.items()},
    _beside(made, partners, rows[MADE]) if paired else _unpaired(made, true),
    features={"name": by.name, "version": by.version},
    distances=compare.sets(stacked[MADE], stacked[TRUE], by) if enough else {},
    notes=notes,
  )  # fmt: skip


def write(
  out: str, title: str, subtitle: str, rows: Mapping[str, Sequence[Mapping[str, float]]],
  names: Mapping[str, Sequence[str]], shown: Sequence[compare_page.Shown], *,
  features: Mapping[str, str] = EMPTY, distances: Mapping[str, float] = EMPTY, notes: Sequence[str] = (),
) -> tuple[dict[str, Any], str]:  # fmt: skip
  """Writes `eval.json` and `index.html` into the folder `out`; returns what the first holds, and a table as text.

  Args:
    rows: {set: figures of each video}. names: {set: names of the videos}. shown: videos of the page.
    features: name and version of what the distances are taken of. distances: of the two sets.
  """
  columns = {kind: compare.summary(found) for kind, found in rows.items()}
  answer = {
    "title": title, "subtitle": subtitle, "videos": {kind: len(found) for kind, found in rows.items()},
    "figures": {kind: {n: dataclasses.asdict(f) for n, f in column.items()} for kind, column in columns.items()},
    "features": dict(features), "distances": dict(distances), "notes": list(notes),
    "rows": [
      {"set": kind, "name": name, "figures": dict(figures)}
      for kind, found in rows.items()
      for name, figures in zip(names[kind], found, strict=True)
    ],
  }  # fmt: skip
  files.write_json(pathlib.Path(out) / "eval.json", answers.plain(answer))
  compare_page.build(answer, columns, shown).write(pathlib.Path(out) / "index.html")
  lines = [compare.text(columns), *(f"{name}: {value:.6g}" for name, value in distances.items()), *notes]
  return answer, "\n".join(lines)


def _partners(made: Sequence[Entry], true: Sequence[Entry]) -> dict[str, Entry]:
  """{name of a made video: its truth}."""
  stem = lambda entry: os.path.splitext(entry.name)[0]
  for held in (made, true):
    twice = [name for name in map(stem, held) if sum(stem(other) == name for other in held) > 1]
    if twice:
      raise DataError(f"two videos are called {twice[0]!r}; pairs go by their names")
  real = {stem(entry): entry for entry in true}
  missing = [entry.name for entry in made if stem(entry) not in real]
  if missing:
    raise DataError(
      f"{len(missing)} of {len(made)} videos have no truth of their name, first {missing[0]!r}; leave --paired away to "
      "compare the sets"
    )
  return {entry.name: real[stem(entry)] for entry in made}


def _pair(entry: Entry, frames_THWC: np.ndarray, partner: Entry) -> dict[str, float]:
  true_THWC, _ = partner.load()
  if true_THWC.shape != frames_THWC.shape:
    one, two = ("x".join(map(str, x.shape[:3])) for x in (frames_THWC, true_THWC))
    raise DataError(
      f"{entry.name} is {one} (frames x height x width), its truth {two}; give --size, --fps and --frames that fit both"
    )
  return compare.pair(frames_THWC, true_THWC)


def _beside(
  made: Sequence[Entry], partners: dict[str, Entry], rows: Sequence[dict[str, float]]
) -> list[compare_page.Shown]:
  """The worst half and an even sample of the others, with their truth and what differs."""
  order = sorted(range(len(made)), key=lambda k: -rows[k]["gmsd"])
  worst = order[: SHOWN // 2]
  rest = order[SHOWN // 2 :]
  picks = worst + [rest[k] for k in _even(len(rest), SHOWN - len(worst))]
  found = []
  for k in picks:
    (made_THWC, fps), (true_THWC, _) = made[k].load(), partners[made[k].name].load()
    figures = ", ".join(f"{name} {rows[k][name]:.4g}" for name in compare.PAIR)
    trio = [true_THWC, made_THWC, compare_page.difference(made_THWC, true_THWC)]
    what = "True, made, and half of their difference around grey; the worst by GMSD first, then an even sample."
    found.append(compare_page.Shown(f"{made[k].name}: {figures}", what, trio, fps))
  return found


def _unpaired(made: Sequence[Entry], true: Sequence[Entry]) -> list[compare_page.Shown]:
  """An even sample of each set, each video for itself."""
  what = "An even sample of each set." if true else "An even sample."
  kinds = [(MADE, made)] + ([(TRUE, true)] if true else [])
  most = SHOWN // len(kinds)
  picks = [[(kind, held[k]) for k in _even(len(held), most)] for kind, held in kinds]
  rows = [one for row in itertools.zip_longest(*picks) for one in row if one is not None]
  return [compare_page.Shown(f"{kind}: {entry.name}", what, [(got := entry.load())[0]], got[1]) for kind, entry in rows]


def _even(count: int, most: int) -> list[int]:
  """At most `most` of the numbers below `count`, evenly spread."""
  return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist() if count else []


# ---- a work directory ----------------------------------------------------------------------------------------------


def run(
  workdir: str, out: str | None, *, count: int, given: str, seed: int, step: int | None, settings: Any,
  video_mae: str | None,
) -> tuple[dict[str, Any], str]:  # fmt: skip
  """Samples of a checkpoint under the captions and scores of held-out clips, against these clips.

  Args:
    count: clips, at most as many as are held out and long enough.
    given: "text": the sets are compared; "image": each clip's first frame is given too, and pairs are compared.
    settings: `sample.Settings`.

  Raises:
    UsageError: an unknown `given`. DataError: fewer than two clips are held out.
  """
  from kling_jax.generate import held_out, sample

  if given not in ("text", "image"):
    raise UsageError(f"--given {given!r}: text, or image")
  by = compare.extractor(video_mae)
  model = sample.Model(workdir, step)
  fps = settings.fps or model.config.data.fps
  names, requests, real = held_out.examples(model, settings, count, seed)
  with tempfile.TemporaryDirectory(prefix="kling-") as pictures:
    if given == "image":
      for k, frames_THWC in enumerate(real):
        path = os.path.join(pictures, f"{k}.png")
        grid.write_png(path, frames_THWC[0])
        requests[k] = dataclasses.replace(requests[k], image=path)
    sampled = model(requests, settings)
  made = [_in_memory(name, video, fps) for name, video in zip(names, sampled, strict=True)]
  true = [_in_memory(name, video, fps) for name, video in zip(names, real, strict=True)]
  where = pathlib.Path(workdir)
  notes = [f"{len(made)} held-out clips at step {model.step}, seed {seed}; {given} given."]
  return evaluate(
    made, true, out or str(where / "report" / "eval"), by, paired=given == "image",
    title=f"Evaluation of {where.name}", subtitle=f"step {model.step}", notes=notes,
  )  # fmt: skip


def _in_memory(name: str, frames_THWC: np.ndarray, fps: float) -> Entry:
  return Entry(name, lambda: (frames_THWC, fps))
