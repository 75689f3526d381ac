"""A small Video DiT that is told the scores of `shapes-v1`, for the control matrix: does a raised score raise itself?

Trains: the task of `video_dit` on 9 frames of 16 x 16, once with scores through AdaLN and once with their numbers
behind the caption (Open-Sora's way), everything else equal. Both read the first 30 bytes of a caption: what it says of
the camera, most of a clip's motion, would tell the score a second time.
Expected: docs/results.md, "Control matrix". Hardware: 2 cores, no accelerator.

  kling train --config configs/control.py --workdir runs/control/adaln
  kling train --config configs/control.py:told=caption --workdir runs/control/caption
  kling eval control --workdir runs/control/adaln --baseline runs/control/caption --out runs/control/matrix

Arguments: told = adaln or caption; runlocal shrinks it to a CPU run of seconds.
"""

import ml_collections

from kling_jax import config

CAPTION, SCORES = 30, 68  # bytes


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  args = config.parse_arg(arg, told="adaln", runlocal=False)
  c = config.load("video_dit:runlocal")
  c.model.size = "d128x2"
  c.model.told = args.told
  c.codec.spatial, c.codec.channels = 8, 32  # one token a latent frame, 128 numbers: no wider than the model
  c.text.width, c.text.depth = 64, 1
  c.text.tokens = 2 + CAPTION + (SCORES if args.told == "caption" else 0)
  c.history.probability = 0.0
  c.data.sources = ("worlds:shapes-v1?count=4096&seed=0",)
  c.data.buckets = ((9, 16, 16),)
  c.data.fps = 3.6  # a clip's whole 2.5 s, so that it is always shown from its start and stays in memory
  c.data.memory_gib = 1.0
  c.data.threads = 1
  c.data.batch = 32
  c.steps = 60 if args.runlocal else 1500
  c.optimizer.lr = 3e-3
  c.optimizer.schedule = "wsd"
  c.optimizer.warmup = 10 if args.runlocal else 100
  c.ema.decay = 0.98 if args.runlocal else 0.99
  c.validation.every = 30 if args.runlocal else 500
  c.validation.rows = 16 if args.runlocal else 128
  c.checkpoint.every = 30 if args.runlocal else 300
  c.sample.steps = 16
  c.sample.text = 1.0  # what is measured is the model, not the guidance
  return c
