"""The suitability network of Koala-36M (TSA), from ratings (`kling annotate`) or from weak labels.

Trains: models/tsa.py on the clips of a set that a table rates; without arguments the smallest network of sub-metrics
alone. Expected: docs/results.md, "Suitability score". Hardware: CPU for xs; an accelerator for tiny, the paper's size.

  python -m kling_jax.curation.weak_labels --videos DIR --scenes 10 --output SET
  kling train --config configs/tsa.py:set=SET,size=xs --workdir runs/tsa
  kling score --model runs/tsa/vtss --input OTHER_SET

Arguments: set = clip set, table = ratings of its clips (default: SET/ratings.parquet), size = xs tiny, branches =
dynamic+static+label and any part of it, fold = source videos held out, of 5 parts (-1: none); runlocal makes a small
set of weak labels of its own under ~/.cache/kling_jax and takes seconds once that is there.
This file is also the schema: its keys and types are the legal ones.
"""

import ml_collections

from kling_jax.config import parse_arg
from kling_jax.train.defaults import trainer

FEATURES = (
  "motion", "camera_shake", "clarity", "blur", "noise", "blockiness", "bright", "borders", "static", "duplicates",
  "brightness_change", "text", "watermark", "scene_change", "scene_unrest",
)  # fmt: skip
SAMPLING = {  # (grid, patch, frames, stride, image)
  "tiny": ((7, 7), 32, 32, 2, 224),
  "xs": ((4, 4), 16, 8, 2, 96),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  args = parse_arg(arg, set="", table="", size="xs", branches="dynamic+static+label", fold=0, runlocal=False)

  c = trainer()
  c.task = "tsa"

  c.model = ml_collections.ConfigDict()
  c.model.preset = args.size  # of models/tsa.py
  c.model.branches = tuple(args.branches.split("+"))
  c.model.fusion = "gate"  # gate: cross-gating and weighted sum; concat: side by side (the paper's third row)
  c.model.backbone_lr = 0.1 if args.size == "tiny" else 1.0  # pretrained backbones move slower

  c.sampling = ml_collections.ConfigDict()
  grid, patch, frames, stride, image = SAMPLING[args.size]
  c.sampling.grid, c.sampling.patch = grid, patch  # cells and pixels of a mosaic
  c.sampling.frames, c.sampling.stride = frames, stride
  c.sampling.mosaics = 4 if args.size == "tiny" else 2  # of a clip that is scored; training takes one
  c.sampling.image = image  # pixels of the static branch's sides
  c.sampling.small_video_bug = False  # see measure/fragments.py

  c.labels = ml_collections.ConfigDict()
  c.labels.table = args.table or (f"{args.set}/ratings.parquet" if args.set else "")
  c.labels.features = FEATURES  # sub-metrics of the label branch
  c.labels.drop = 0.05  # share of sub-metrics hidden in training, so that missing ones are known
  c.labels.folds = 5  # parts that source videos are split into
  c.labels.fold = args.fold  # the part that is held out; -1: none
  c.labels.plcc = 1.0  # weights of the losses
  c.labels.rank = 0.3
  c.labels.pair = 1.0

  c.data = ml_collections.ConfigDict()
  c.data.set = args.set
  c.data.batch = 40 if args.size == "xs" else 16
  c.data.views = 2  # draws of fragments of a clip, kept in memory
  c.data.threads = 2
  c.data.workers = 0

  c.steps = 1500
  c.optimizer.lr = 1e-3
  c.optimizer.schedule = "cosine"
  c.optimizer.warmup = 100
  c.optimizer.weight_decay = 0.05
  c.ema.decay = 0.99 if args.size == "xs" else 0.999
  c.guard.spike_sigmas = 0.0  # the loss is bounded
  c.validation.every = 250
  c.validation.rows = 200
  c.checkpoint.every = 250
  if args.runlocal:
    c.model.branches = ("label",)
    c.labels.features = ("blur", "noise", "borders", "clarity")
    c.labels.fold = -1
    c.steps = 60
    c.optimizer.lr, c.optimizer.warmup = 3e-3, 5
    c.data.batch = 40
    c.ema.decay = 0.9
    c.checkpoint.every = 30
  return c
