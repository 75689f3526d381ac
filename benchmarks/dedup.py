"""How well copies are found and others left alone, and what a search among many clips costs.

  python benchmarks/dedup.py --videos ../shared/videos            recall by kind of change, wrong pairs
  python benchmarks/dedup.py --scale 100000,1000000               seconds and memory of the search

Changes are made of the first seconds of each video and go through H.264. Pairs of videos that show the same footage by
MANIFEST.csv (column `group`) are left out of the count of wrong pairs.
"""

import argparse
import csv
import itertools
import json
import pathlib
import resource
import time
from collections.abc import Callable

import cv2
import numpy as np

from kling_jax.curation import neighbours, signature
from kling_jax.data import container, encode, picture, reasons, worlds

SECONDS, SIDE = 5.0, 240  # of each video, and its shorter side
WORLD = 150  # clips of the procedural world
FRAMES = 5  # distinct frames of a clip in the search

Film = tuple[list[np.ndarray], np.ndarray]  # frames, and their times


def load(path: pathlib.Path) -> Film:
  frames, times_s = [], []
  with container.open_video(path) as video:
    for pts, frame in video.frames():
      seconds = video.seconds(pts)
      if times_s and seconds - times_s[0] > SECONDS:
        break
      scale = min(1.0, SIDE / min(frame.height, frame.width))
      size = [max(16, round(side * scale / 2) * 2) for side in picture.upright_size(frame)]
      frames.append(picture.to_rgb(frame, (size[0], size[1])))
      times_s.append(seconds)
  return frames, np.array(times_s) - times_s[0]


def at(film: Film, times_s: np.ndarray) -> list[np.ndarray]:
  return [film[0][max(0, k)] for k in np.searchsorted(film[1], times_s + 1e-6) - 1]


def even(frame: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])


def crop(top: float, bottom: float, left: float, right: float) -> Callable[[np.ndarray], np.ndarray]:
  def cut(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    inner = frame[int(height * top) : height - int(height * bottom), int(width * left) : width - int(width * right)]
    return cv2.resize(inner, (width, height))

  return cut


def levels(curve: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
  table = np.clip(np.rint(curve(np.arange(256) / 255) * 255), 0, 255).astype(np.uint8)
  return lambda frame: table[frame]


def pad(rows: float, columns: float) -> Callable[[np.ndarray], np.ndarray]:
  def around(frame: np.ndarray) -> np.ndarray:
    y, x = int(frame.shape[0] * rows), int(frame.shape[1] * columns)
    return even(np.pad(frame, ((y, y), (x, x), (0, 0))))

  return around


def logo(frame: np.ndarray) -> np.ndarray:
  shown, (height, width) = frame.copy(), frame.shape[:2]
  cv2.rectangle(shown, (int(width * 0.78), int(height * 0.05)), (int(width * 0.95), int(height * 0.15)), (255,) * 3, -1)
  return shown


def subtitle(frame: np.ndarray) -> np.ndarray:
  shown, (height, width) = frame.copy(), frame.shape[:2]
  cv2.putText(shown, "HELLO OUT THERE", (int(width * 0.15), int(height * 0.92)), 0, height / 260, (255,) * 3, 2)
  return shown


def turn(degrees: float) -> Callable[[np.ndarray], np.ndarray]:
  def turned(frame: np.ndarray) -> np.ndarray:
    height, width = frame.shape[:2]
    return cv2.warpAffine(frame, cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1.08), (width, height))

  return turned


def hue(frame: np.ndarray) -> np.ndarray:
  hsv = cv2.cvtColor(frame, cv2.COLOR_RGB2HSV)
  hsv[..., 0] = (hsv[..., 0].astype(int) + 12) % 180
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def noise(frame: np.ndarray) -> np.ndarray:
  draws = np.random.default_rng(int(frame.sum()) % 2**31).normal(0, 14, frame.shape)
  return np.clip(frame + draws, 0, 255).astype(np.uint8)


def resized(x: float, y: float) -> Callable[[np.ndarray], np.ndarray]:
  return lambda frame: even(cv2.resize(frame, None, fx=x, fy=y, interpolation=cv2.INTER_AREA))


PICTURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  "half the size": resized(0.5, 0.5), "squeezed 2 : 3": resized(0.6, 0.9),
  "5 % off each side": crop(0.05, 0.05, 0.05, 0.05), "10 % off each side": crop(0.1, 0.1, 0.1, 0.1),
  "12 % off the bottom": crop(0, 0.12, 0, 0), "15 % off the left": crop(0, 0, 0.15, 0),
  "20 % off the left": crop(0, 0, 0.2, 0), "letterbox": pad(0.13, 0), "pillarbox": pad(0, 0.16),
  "brighter": levels(lambda x: x + 0.15), "darker": levels(lambda x: 0.6 * x), "gamma 1.6": levels(lambda x: x**1.6),
  "grey": lambda f: cv2.cvtColor(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB), "hue by 24 degrees": hue,
  "mirrored": lambda f: np.ascontiguousarray(f[:, ::-1]), "logo": logo, "subtitle": subtitle,
  "blurred": lambda f: cv2.GaussianBlur(f, (0, 0), 2.5), "noisy": noise, "turned by 2 degrees": turn(2),
  "turned by 5 degrees": turn(5),
}  # fmt: skip


def changes(film: Film) -> dict[str, tuple[list[np.ndarray], float, float]]:
  """{kind: (frames, frames a second, crf)}."""
  frames, times_s = film
  rate = float(np.clip(round((len(frames) - 1) / times_s[-1]), 8, 30))
  end = float(times_s[-1])
  some = {
    "same": (frames, rate, 18), "crf 40": (frames, rate, 40),
    "10 frames a second": (at(film, np.arange(0, end, 0.1)), 10, 23),
    "starts 0.11 s later": (at(film, np.arange(0.11, end, 1 / rate)), rate, 23),
    "starts 0.37 s later": (at(film, np.arange(0.37, end, 1 / rate)), rate, 23),
    "its middle half": (at(film, np.arange(0.25 * end, 0.75 * end, 1 / rate)), rate, 23),
    "10 % faster": (at(film, np.arange(0, end, 1.1 / rate)), rate, 23),
    "20 % faster": (at(film, np.arange(0, end, 1.2 / rate)), rate, 23),
    "crop, light, 20 fps, crf 34": (
      [crop(0.04, 0.04, 0.04, 0.04)(levels(lambda x: 0.85 * x + 0.05)(f)) for f in at(film, np.arange(0.2, end, 0.05))],
      20, 34),
  }  # fmt: skip
  return some | {name: ([change(f) for f in frames], rate, 23) for name, change in PICTURES.items()}  # type: ignore


def quality(folder: pathlib.Path, share: int) -> dict:
  with (folder / "MANIFEST.csv").open(encoding="utf-8") as file:
    listed = [row for row in csv.DictReader(file) if "/" not in row["file"]][::share]
  base: dict[str, signature.Signature] = {}
  found: dict[str, list[bool]] = {}
  group = {row["file"]: row.get("group") or row["file"] for row in listed}
  for row in listed:
    try:
      frames, times_s = load(folder / row["file"])
    except reasons.MediaError:
      continue
    if len(frames) < 12:
      continue
    film = [even(frame) for frame in frames], times_s
    shown = changes(film)
    base[row["file"]] = signature.of_media(encode.encode(film[0], fps=shown["same"][1], crf=12))
    for name, (pictures, rate, crf) in shown.items():
      copy = signature.of_media(encode.encode(pictures, fps=rate, crf=crf))
      found.setdefault(name, []).append(signature.match(base[row["file"]], copy).copy)
  pairs = [(a, b) for a, b in itertools.combinations(base, 2) if group[a] != group[b]]
  matches = [signature.match(base[a], base[b]) for a, b in pairs]
  return {
    "videos": len(base), "recall": {name: [sum(hits), len(hits)] for name, hits in found.items()},
    "unrelated": len(pairs), "wrong": [p for p, m in zip(pairs, matches, strict=True) if m.copy],
    "highest": max(m.similarity for m in matches), "world": world(),
  }  # fmt: skip


def world() -> dict:
  """Wrong pairs among clips of the procedural world, which share four textures and three shapes."""
  signatures = []
  for index in range(WORLD):
    frames = worlds.render(worlds.script("shapes-v1", 11, index), np.arange(20) / 8, 96, 128)
    signatures.append(signature.of_media(encode.encode(list(frames), fps=8)))
  pairs = itertools.combinations(range(WORLD), 2)
  wrong = [(i, j) for i, j in pairs if signature.match(signatures[i], signatures[j]).copy]
  return {"pairs": WORLD * (WORLD - 1) // 2, "wrong": len(wrong), "clips": len({k for pair in wrong for k in pair})}


def scale(clips: int) -> dict:
  """Search among made-up clips of FRAMES vectors, one in a hundred of which is a copy (cosine 0.85) of another."""
  rng = np.random.default_rng(0)
  themes = rng.normal(size=(4096, signature.DEPTH)).astype(np.float32)
  vectors = np.empty((clips * FRAMES, signature.DEPTH), np.int8)
  for start in range(0, len(vectors), 100_000):
    count = min(100_000, len(vectors) - start)
    some = 0.6 * themes[rng.integers(len(themes), size=count)]
    some += rng.normal(size=some.shape).astype(np.float32)
    vectors[start : start + count] = np.rint(127 * some / np.abs(some).max(1, keepdims=True))
  copies = rng.choice(clips // 2, clips // 100, replace=False)
  targets = clips // 2 + rng.choice(clips // 2, len(copies), replace=False)
  for source, target in zip(copies, targets, strict=True):
    units = neighbours.units(vectors[source * FRAMES : (source + 1) * FRAMES])
    other = neighbours.units(rng.normal(size=units.shape))
    other = neighbours.units(other - (other * units).sum(1, keepdims=True) * units)
    near = 0.85 * units + np.sqrt(1 - 0.85**2) * other
    vectors[target * FRAMES : (target + 1) * FRAMES] = np.rint(127 * near / np.abs(near).max(1, keepdims=True))
  owners = np.repeat(np.arange(clips), FRAMES)
  clock = time.perf_counter()
  found = {tuple(pair) for pair in np.sort(neighbours.pairs(vectors, owners, vectors, owners, 0.6), axis=1).tolist()}
  seconds = time.perf_counter() - clock
  planted = {tuple(sorted(pair)) for pair in zip(copies.tolist(), targets.tolist(), strict=True)}
  return {
    "clips": clips, "vectors": len(vectors), "seconds": round(seconds, 1), "candidates": len(found),
    "recall": round(len(planted & found) / len(planted), 4),
    "memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
  }  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--videos", type=pathlib.Path, help="folder with MANIFEST.csv")
  parser.add_argument("--every", type=int, default=1, help="take every n-th video")
  parser.add_argument("--scale", help="numbers of clips, by commas")
  parser.add_argument("--json", type=pathlib.Path, help="writes the figures there too")
  args = parser.parse_args()
  cv2.setNumThreads(1)
  answer: dict = {}
  if args.videos:
    answer["quality"] = found = quality(args.videos, args.every)
    for name, (hits, count) in found["recall"].items():
      print(f"{name:30} {hits} / {count}")
    print(f"{len(found['wrong'])} of {found['unrelated']} unrelated pairs wrong: {found['wrong']}")
    print(f"highest similarity of an unrelated pair {found['highest']:.2f}; procedural world: {found['world']}")
  for count in map(int, args.scale.split(",") if args.scale else []):
    answer.setdefault("scale", []).append(scale(count))
    print(answer["scale"][-1])
  if args.json:
    args.json.write_text(json.dumps(answer, indent=1) + "\n")


if __name__ == "__main__":
  main()
