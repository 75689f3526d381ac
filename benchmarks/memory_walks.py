"""A contact sheet of memory-v1: walks in rows, a sentence above each clip; "=" where it follows from what was before.

python benchmarks/memory_walks.py --out walks.png [--size 64] [--walks 6] [--clips 6] [--frames 4] [--seed 0]
"""

import argparse

import cv2
import numpy as np

from kling_jax.data import memory_world
from kling_jax.data.memory_world_frames import walk_frames

LINE = 14  # pixels, of a line of text
RED, BLACK, GREY = (170, 0, 0), (0, 0, 0), (120, 120, 120)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", required=True)
  for name, value in (("size", 64), ("walks", 6), ("clips", 6), ("frames", 4), ("seed", 0), ("first", 0)):
    parser.add_argument(f"--{name}", type=int, default=value)
  args = parser.parse_args()
  scale = max(1, 64 // args.size)  # small frames are shown as they are, in larger pixels
  rows = [walk_row(args, args.first + number, scale) for number in range(args.walks)]
  cv2.imwrite(args.out, np.concatenate(rows)[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])


def walk_row(args: argparse.Namespace, index: int, scale: int) -> np.ndarray:
  """One walk: what its first picture shows, then per clip a sentence and its frames; uint8 (rows, columns, 3)."""
  story = memory_world.story(args.seed, index, args.clips)
  times_s = np.arange(args.clips * args.frames + 1) / args.frames
  frames = walk_frames(story, times_s, args.size, args.size).repeat(scale, 1).repeat(scale, 2)
  frames = np.pad(frames, [(0, 0), (0, 0), (0, 1), (0, 0)], constant_values=255)
  gap = np.full((frames.shape[1], 4, 3), 255, np.uint8)
  width = frames.shape[2]
  strips, labels = [frames[0], gap], [label("", BLACK, width + 4)]
  for clip, said in enumerate(story.sentences):
    strips += [*frames[1 + clip * args.frames : 1 + (clip + 1) * args.frames], gap]
    mark = "= " if story.determined[clip] else ""
    labels.append(label(mark + said, RED if story.cuts[clip] else BLACK, width * args.frames + 4))
  text, picture = np.concatenate(labels, 1), np.concatenate(strips, 1)
  return np.concatenate([label(memory_world.scene(story.states[0]), GREY, picture.shape[1]), text, picture])


def label(words: str, colour: tuple[int, int, int], columns: int) -> np.ndarray:
  """One line of text on white; what does not fit is cut."""
  box = np.full((LINE, columns, 3), 255, np.uint8)
  cv2.putText(box, words, (2, LINE - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.36, colour, 1, cv2.LINE_AA)
  return box


if __name__ == "__main__":
  main()
