"""The splitter's network: thumbnails of a video to transitions, learnt on edited films that are made up as it goes.

Trains: models/shot_net.py (0.2 M parameters) on films of data/edits.py: cuts, dissolves, fades and wipes of many forms,
and events that are no transition, cut from footage, scenes of dead leaves and the procedural world.
Expected: docs/results.md, "Splitting"; kling_jax/assets/shot_net/card.json names the run that made the shipped weights.
Hardware: one CPU core.

  kling train --config configs/shot_net.py:runlocal --workdir runs/shot-local
  kling train --config configs/shot_net.py:footage=DIR --workdir runs/shot
  python -m kling_jax.train.tasks.shot_net runs/shot kling_jax/assets/shot_net

Arguments: footage = folder of videos of one shot each; runlocal shrinks everything to a CPU run of seconds.
This file is also the schema: its keys and types are the legal ones.
"""

import pathlib

import ml_collections

from kling_jax.config import parse_arg
from kling_jax.train.defaults import trainer


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  args = parse_arg(arg, footage="", runlocal=False)

  c = trainer()
  c.task = "shot_net"

  c.loss = ml_collections.ConfigDict()
  c.loss.middle = 2.0  # weight of "this step is a transition's middle"
  c.loss.kind = 0.2  # weight of the kind, within transitions

  c.data = ml_collections.ConfigDict()
  c.data.footage = _videos(args.footage)  # paths of videos, each one shot; () uses procedural scenes alone
  c.data.films = 4000  # different ones; each is rendered once and kept in memory (0.4 MB)
  c.data.frames = 128  # of a film
  c.data.scenes = 200  # of dead leaves, a quarter as many of the procedural world
  c.data.batch = 16  # films a step
  c.data.threads = 1
  c.data.workers = 0

  c.steps = 1500
  c.optimizer.lr = 2e-3
  c.optimizer.schedule = "cosine"
  c.optimizer.warmup = 100
  c.optimizer.weight_decay = 1e-2
  c.ema.decay = 0.99
  c.validation.every = 0
  if args.runlocal:
    c.steps = 60
    c.data.films, c.data.frames, c.data.scenes, c.data.batch = 24, 64, 8, 8
    c.optimizer.warmup = 10
    c.ema.decay = 0.9
    c.checkpoint.every = 30
  return c


def _videos(folder: str) -> tuple[str, ...]:
  if not folder:
    return ()
  return tuple(sorted(str(path) for path in pathlib.Path(folder).iterdir() if path.suffix in _SUFFIXES))


_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".gif", ".avi")
