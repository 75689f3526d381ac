"""The study of arXiv 2411.17470, shrunk about 1e5-fold: six sizes of 3e4 to 2e6 parameters on `shapes-v1`.

The same stages and arms as `shapes_tiny`, in the paper's own family of models (two blocks at 32 wide, eight at 128),
with grids of up to 5e7 tokens and hold-outs of 1e8: days on 2 cores, an afternoon on one accelerator. It is made to be
stopped and gone on with, wherever the ledger is carried:

  kling sweep run shapes_small --workdir runs/shapes_small
  git add runs/shapes_small/ledger.jsonl    # all that the laws and the next start need; work directories may go

Expected: not run yet. Cost: `kling sweep design shapes_small --flops_per_s 2e10`.
"""

import math

import ml_collections

from kling_jax.scaling import arms
from kling_jax.scaling import sweep as sweep_lib

GRID = ("d32", "d48", "d64", "d80")
STUDY = arms.Study(
  horizons=(6_291_456, 12_582_912, 25_165_824, 50_331_648),  # tokens; 131,072 to 1,048,576 clips of 48
  batches=dict.fromkeys(GRID, (16, 32, 64, 128)),
  rates=dict.fromkeys(GRID, (1e-3, 2e-3, 4e-3, 8e-3)),
  repeats=dict.fromkeys(GRID, (32, 4e-3)),
  holdouts=(("d112", 100_663_296, 4, 4), ("d128", 50_331_648, 2, 4)),
  memory=math.inf,
  again=1,
)


def get_config() -> ml_collections.ConfigDict:
  c = sweep_lib.load("shapes_tiny").module.get_config()
  c.data.sources = ("worlds:shapes-v1?count=147456&seed=0",)
  c.data.memory_gib = 5.0
  c.optimizer.warmup = 100
  c.validation.rows = 8192
  c.checkpoint.every, c.checkpoint.keep = 2000, 1
  c.log.every = 500
  return c


def sweep(points):
  yield from STUDY.runs(get_config(), points)
