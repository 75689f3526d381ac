"""A captioner of our own: a vision tower and a small language model that write a teacher's six-part captions.

Trains: models/captioner.py on pictures and videos alike (Koala-36M, section 2). The teacher is whoever wrote the
captions of the set: a server through `kling caption`, or, in the procedural world, the script of the clip.
Expected: docs/results.md, "Captioner"; `:runlocal` takes the loss from 5.6 to below 3 nats a byte in 60 steps.
Hardware: one CPU core for `size=tiny`; one GPU or TPU chip for `size=small`.

  kling train --config configs/captioner.py:runlocal --workdir runs/captioner-local
  kling train --config configs/captioner.py --workdir runs/captioner --config.data.sources="('clips/',)"
  python -m kling_jax.train.tasks.captioner runs/captioner weights/captioner
  kling caption --input clips/ --captioner local:weights/captioner

Arguments: size = tiny small; stills = share of the rows that are shown as pictures; runlocal shrinks everything to a
CPU run of seconds. This file is also the schema: its keys and types are legal.
"""

import ml_collections

from kling_jax.config import parse_arg
from kling_jax.train.defaults import trainer


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  args = parse_arg(arg, size="tiny", stills=0.3, runlocal=False)
  small = args.size == "small"

  c = trainer()
  c.task = "captioner"

  c.model = ml_collections.ConfigDict()  # models/captioner.py: Shape
  c.model.language = args.size  # the language model: tiny, small
  c.model.tower_width = 512 if small else 64
  c.model.tower_depth = 8 if small else 2
  c.model.patch = 14 if small else 6  # pixels
  c.model.frames = 8 if small else 4
  c.model.size = 448 if small else 48  # pixels of a side
  c.model.fps = 2.5 if small else 1.6  # of the frames that it looks at
  c.model.max_text = 2048 if small else 208  # bytes of a caption, begin and end included

  c.data = ml_collections.ConfigDict()
  c.data.sources = ("worlds:shapes-v1?count=20000&seed=0",)  # clip sets, tables, worlds
  c.data.weights = ()  # of the sources in the mixture; () = by their number of clips
  c.data.batch = 16  # clips a step
  c.data.stills = args.stills  # share of the rows that are shown as pictures
  c.data.validation_fraction = 0.02  # of the videos, held out by a hash of their id
  c.data.memory_gib = 0.0  # of decoded clips that stay in memory
  c.data.threads = 1
  c.data.workers = 0

  c.steps = 3000
  c.optimizer.lr = 3e-4 if small else 2e-3
  c.optimizer.schedule = "cosine"
  c.optimizer.warmup = 100
  c.optimizer.weight_decay = 1e-2
  c.ema.decay = 0.99
  if args.runlocal:
    c.steps = 60
    c.data.sources = ("worlds:shapes-v1?count=64&seed=0",)
    c.data.batch = 8
    c.model.tower_depth, c.model.frames, c.model.size, c.model.patch = 1, 2, 32, 8
    c.model.max_text = 160
    c.optimizer.warmup = 10
    c.ema.decay = 0.9
    c.checkpoint.every = c.validation.every = 30
    c.validation.rows = 8
  return c
