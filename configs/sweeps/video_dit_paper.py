"""The study of arXiv 2411.17470 at its own size, for a pod: six Video DiTs of 17e6 to 1.07e9 parameters on real clips.

  fit      learning rate x batch grids at 0.017, 0.057, 0.13 and 0.26e9 parameters, each run read at T = 2e9 to 12e9;
           IsoFLOP runs at the paper's five budgets, 3e17 to 6e18 FLOPs; two more seeds in the middle of each grid
  holdout  1.07e9 parameters on 10e9 tokens, in the tuned arm and in the three that the paper argues against (see
           shapes_tiny.py), and 0.72e9 on 140e9 in the tuned one alone; they come last, from laws fitted to the others

FLOPs, all matrix products: 8.3e20 for the 107 runs of the fit, 6.9e19 and 6.6e20 for a run of each hold-out.

Tokens: 17 frames of 256x256, a codec of 4 x 8 x 8 and patches of 2 x 2 are 1,280 tokens a clip, as the paper's 81,920
tokens are 64 clips. Its VAE, text encoder, optimiser and noise schedule are not known; these are ours. Change `DATA` to
your encoded clip set (`kling encode`). What it costs: `kling sweep design video_dit_paper --device "TPU v5p" --devices
8`. Constant learning rate and EMA, as the paper's laws belong to a constant rate.

  kling sweep run video_dit_paper --workdir DIR --executor gke --tpu tpu-v5p-slice:2x2x1 --image IMAGE --claim CLAIM
  kling sweep status video_dit_paper --workdir DIR --points points.csv
  kling sweep fit --table points.csv --out DIR/law
"""

import ml_collections

from kling_jax import config
from kling_jax.scaling import arms, design, published

DATA = ("clips/",)
DEVICES = 8  # of a worker; batches are multiples of it
BUDGETS = (3e17, 6e17, 1e18, 3e18, 6e18)
GRID = ("n0.017b", "n0.057b", "n0.13b", "n0.26b")
STUDY = arms.Study(
  horizons=(2e9, 4e9, 6e9, 8e9, 10e9, 12e9),
  batches=dict.fromkeys(GRID, (32, 64, 128, 256)),  # clips of 1,280 tokens: 41e3 to 328e3 tokens
  rates=dict.fromkeys(GRID, (1e-4, 2e-4, 4e-4, 8e-4)),
  repeats=dict.fromkeys(GRID, (64, 2e-4)),
  holdouts=(("n1.07b", 10e9, 5, 4), ("n0.72b", 140e9, 14, 1)),
  memory=2e8,
  seeds=2,
  within=0.01,
  multiple=DEVICES,
)


def get_config() -> ml_collections.ConfigDict:
  c = config.load("video_dit:res=256")
  c.precision = "bfloat16"
  c.model.conditions = ()
  c.model.remat = "full"
  c.codec.spatial = 8  # 5 x 32 x 32 latents, 5 x 16 x 16 tokens
  c.history.probability = c.drop.text = 0.0
  c.data.sources = DATA
  c.data.cached_latents = True
  c.data.validation_fraction = 0.01
  c.optimizer.warmup = 500
  c.validation.rows = 8192
  c.checkpoint.every, c.checkpoint.keep = 2000, 1
  c.log.every = 50
  return c


def sweep(points):
  base, law = get_config(), published.get("yin2024")
  hyper = design.Hyper(
    lambda n, t, b: float(law("lr", params=n, tokens=t)),
    lambda n, t: float(law("batch_tokens", params=n, tokens=t)),
    multiple=DEVICES,
  )
  best_params = lambda flops: float(law("params", flops=flops))
  yield from STUDY.runs(base, points, more=design.isoflop(base, BUDGETS, best_params, hyper))
