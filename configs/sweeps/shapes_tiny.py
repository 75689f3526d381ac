"""The study of arXiv 2411.17470 in small: six sizes of 4e3 to 9e5 parameters on `shapes-v1`, for 2 cores.

Models have a thousandth of the paper's parameters, runs a 30,000th of its tokens. (At a millionth of its 8e20 FLOPs the
grids alone would take 2 cores half a day.)

Stage 1: learning rate x batch grids at the four smaller sizes, each run read at four T. Stage 2, when those have
finished: laws of learning rate and batch are fitted to them; where these say, the four sizes are trained four times
longer, for the loss surface, and the two larger sizes, held out of every fit, once. Beside the tuned arm stand those
that the paper argues against, with the constants that the same stage-1 runs give them:

  kaplan      small batch with more steps: the smallest batch of the grid, at its best learning rate for the size
              (at this scale the best batch is below two clips, so that this and the tuned arm ask for the same runs)
  chinchilla  one learning rate and batch for every run: the ones that are best on average over stage 1
  deepseek    learning rate and batch as power laws of C alone

Expected: docs/results.md, "A sweep on two cores". Hardware: 2 cores, no accelerator; 99 runs of 4.7e13 FLOPs, an hour
and a half with two workers.

  kling sweep run shapes_tiny --workdir runs/shapes_tiny
  kling sweep status shapes_tiny --workdir runs/shapes_tiny --points points.csv
  kling sweep fit --table points.csv --least_tokens 390000 --out law
"""

import ml_collections

from kling_jax import config
from kling_jax.scaling import arms

STUDY = arms.Study(
  horizons=(98_304, 196_608, 393_216),  # tokens; 2,048 to 8,192 clips of 48
  batches={"d16": (2, 4, 8, 16), "d32": (2, 4, 8, 16), "d48": (2, 4, 8, 16), "d64": (2, 4, 8, 16, 32)},
  rates={
    "d16": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "d32": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "d48": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "d64": (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2),
  },
  repeats={"d16": (16, 8e-3), "d32": (16, 4e-3), "d48": (16, 4e-3), "d64": (16, 3e-3)},
  holdouts=(("d80", 786_432, 2, 4), ("d96", 393_216, 1, 4)),
  memory=24_576,
  longer=(1_572_864, 8),
  multiple=2,
)


def get_config() -> ml_collections.ConfigDict:
  c = config.load("video_dit:runlocal")
  c.model.conditions = ()  # scores would add parameters that the law does not count
  c.codec.channels = 4  # 16 numbers a patch: no wider than the narrowest model
  c.text.width, c.text.depth, c.text.tokens = 16, 1, 32
  c.history.probability = c.drop.text = 0.0
  c.data.sources = ("worlds:shapes-v1?count=9216&seed=0",)
  c.data.buckets = ((9, 32, 32),)
  c.data.fps = 3.6  # a clip's whole 2.5 s, so that it is always shown from its start and stays in memory
  c.data.memory_gib = 1.0
  c.data.threads = 1
  c.data.validation_fraction = 1 / 9
  c.optimizer.warmup = 20
  c.validation.rows = 1024
  c.checkpoint.every = 0  # runs of seconds: one that is killed starts again
  c.log.every = 1000
  return c


def sweep(points):
  yield from STUDY.runs(get_config(), points)
