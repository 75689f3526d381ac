"""The study of arXiv 2411.17470 in small: five models of 8e3 to 1.3e5 parameters on `shapes-v1`, for 2 cores.

Models have an 8,000th to a 2,000th of the paper's parameters, runs a 20,000th of its tokens. (At a millionth of its
FLOPs the grids alone would take 2 cores half a day.) All models have two blocks: in the paper's family, as deep as wide
/ 16, sizes this small would differ in kind (one block, two, three) and not in size alone.

Stage 1: learning rate x batch grids at three sizes, each run read at four T. Stage 2, when those have finished: laws of
learning rate and batch are fitted to them; where these say, four sizes are trained as long, for the loss surface, and a
larger one, held out of every fit, twice as long, with two seeds. Beside the tuned arm stand those that the
paper argues against, with the constants that the same stage-1 runs give them:

  kaplan      small batch with more steps: the smallest batch of the grid, at its best learning rate for the size
  chinchilla  one learning rate and batch for every run: the ones that are best on average over stage 1
  deepseek    learning rate and batch as power laws of C alone

The weights that are judged are averaged over the last ninth of a run's steps, whatever T: that keeps two seeds of a run
within half a percent of one another, where an average over a fixed count of tokens left up to 2.4 %.

Expected: 33 runs in 17 minutes of one core; by the hold-out no power law holds yet at these T (docs/results.md, "A
sweep on two cores"). Hardware: 2 cores, no accelerator.

  kling sweep run shapes_tiny --workdir runs/shapes_tiny
  kling sweep status shapes_tiny --workdir runs/shapes_tiny --points points.csv
  kling sweep fit --table points.csv --out law
"""

import math

import ml_collections

from kling_jax import config
from kling_jax.scaling import arms

STUDY = arms.Study(
  horizons=(98_304, 196_608, 393_216),  # tokens; 2,048, 4,096 and 8,192 clips of 48
  batches={"d16x2": (4, 8), "d32x2": (4, 8), "d48x2": (4, 8, 16)},
  rates={"d16x2": (3e-3, 6e-3, 1.2e-2), "d32x2": (2e-3, 4e-3, 8e-3), "d48x2": (1.5e-3, 3e-3, 6e-3)},
  repeats={"d32x2": (8, 4e-3), "d48x2": (8, 3e-3)},
  holdouts=(("d64x2", 786_432, 4, 4),),
  memory=math.inf,
  longer=(393_216, 4),
  between=("d24x2",),
  again=1,
  multiple=4,
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
  c.validation.rows = 512
  c.checkpoint.every = 0  # runs of seconds: one that is killed starts again
  c.log.every = 1000
  return c


def sweep(points):
  yield from STUDY.runs(get_config(), points)
