"""What the metrics of `kling_jax.evals` say of memory-v1 itself: the values that an ideal model would reach.

python benchmarks/memory_metrics.py [--walks 8] [--clips 12] [--frames 4] [--size 32] [--seed 1] [--json OUT]
"""

import argparse

import numpy as np

from kling_jax import files
from kling_jax.data import memory_world
from kling_jax.data.memory_world_frames import walk_frames
from kling_jax.evals import following, motion, reappearance, repetition, seams, smoothness

NOISE = 25.0  # levels: deviation of the noise under which events are read


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name, value in (("walks", 8), ("clips", 12), ("frames", 4), ("size", 32), ("seed", 1)):
    parser.add_argument(f"--{name}", type=int, default=value)
  parser.add_argument("--json")
  args = parser.parse_args()
  stories = [memory_world.story(args.seed, index, args.clips) for index in range(args.walks)]
  times_s = np.arange(1, args.clips * args.frames + 1) / args.frames
  shape = (args.clips, args.frames, args.size, args.size, 3)
  films = [walk_frames(story, times_s, args.size, args.size).reshape(shape) for story in stories]
  found = measured(stories, films, float(args.frames))
  for name, value in found.items():
    print(f"{name:28s} {value:.4g}")
  if args.json:
    files.write_json(args.json, found)


def measured(stories: list[memory_world.Story], films: list[np.ndarray], fps: float) -> dict[str, float]:
  """The metrics over all walks."""
  cuts = np.array([story.cuts for story in stories])
  smooth = [smoothness.transition_smoothness(film, story.cuts) for film, story in zip(films, stories, strict=True)]
  noise = np.random.default_rng(0)
  clear, noisy, choices = [], [], []
  for film, story in zip(films, stories, strict=True):
    grainy = np.clip(film + noise.normal(0, NOISE, film.shape), 0, 255).astype(np.uint8)
    for frames, into in ((film, clear), (grainy, noisy)):
      verdicts, _ = following.judge(frames, story.states[0], story.sentences)
      into += verdicts
    choices += [verdict.choices for verdict in verdicts]
  returned = [reappearance.reappearance(film, story.states) for film, story in zip(films, stories, strict=True)]
  clips = [clip for film in films for clip in film]
  said = [story.sentences for story in stories]
  return {
    "determined": float(np.mean([story.determined for story in stories])),
    "seam_ratio": seams.seams(np.stack(films), cuts).ratio,
    "smoothness_joins": float(np.nanmean([one.joins for one in smooth])),
    "smoothness_elsewhere": float(np.nanmean([one.elsewhere for one in smooth])),
    "dynamic_degree_of_clips": motion.dynamic_degree(clips, fps),
    "temporal_flickering": float(np.mean([motion.temporal_flickering(clip) for clip in clips])),
    "following": following.share(clear),
    "following_noisy": following.share(noisy),
    "following_by_chance": float(np.mean(1 / np.array(choices))),
    "returns_a_walk": float(np.mean([one.count for one in returned])),
    "reappearance": float(np.mean([one.both for one in returned])),
    "distinct_2": float(np.mean([repetition.distinct(texts, 2) for texts in said])),
    "repeat_rate": float(np.mean([repetition.repeat_rate(texts) for texts in said])),
  }


if __name__ == "__main__":
  main()
