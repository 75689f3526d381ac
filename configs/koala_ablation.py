"""The study of Koala-36M (arXiv 2410.08260, table 2) as one sweep on any raw footage: what do re-splitting, captions,
selection and conditions each bring? Seven arms with equal steps and three seeds, on one table of held-out clips.

  panda            Panda-70M's way: cuts at 25, pieces of 5 s, stitching, short captions
  unfiltered       our splitter and whole captions, every clip
  manual, vtss     of these, by limits of three scores, or by VTSS
  ..._conditions   unfiltered, manual and vtss with scores told through AdaLN; the paper lacks manual_conditions

Expected: not run yet at scale. The paper's totals on VBench are 0.649 (panda), 0.714, 0.707, 0.716, and with conditions
0.743 (unfiltered) and 0.746 (vtss), single runs. Hardware: `size=S,res=256` one accelerator a run.

  python -m kling_jax.curation.ablation --input VIDEOS --output runs/koala/sets
  kling caption --input runs/koala/sets/unfiltered    # and .../panda; kling score --model for VTSS; then the line above
  kling sweep run koala_ablation --workdir runs/koala/sweep
  kling sweep status koala_ablation --workdir runs/koala/sweep --html curves.html

Arguments of the config: size, res = of `video_dit`; runlocal shrinks it, on a procedural world.
"""

import ml_collections

from kling_jax import config

SETS = "runs/koala/sets"
CONDITIONS = ("motion", "aesthetic", "clarity")
SEEDS = (0, 1, 2)
# arm: (set, scores that the model is told)
ARMS = {
  "panda": ("panda", ()),
  "unfiltered": ("unfiltered", ()),
  "manual": ("manual", ()),
  "vtss": ("vtss", ()),
  "unfiltered_conditions": ("unfiltered", CONDITIONS),
  "manual_conditions": ("manual", CONDITIONS),
  "vtss_conditions": ("vtss", CONDITIONS),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  args = config.parse_arg(arg, size="S", res="256", runlocal=False)
  c = config.load("video_dit:runlocal" if args.runlocal else f"video_dit:size={args.size},res={args.res}")
  if args.runlocal:
    return c
  c.steps = 100_000
  c.optimizer.lr = 1e-4  # as in the paper
  c.data.batch = 32
  c.checkpoint.every = c.validation.every = 2000  # the points of the convergence curves
  c.validation.rows = 512
  return c


def sweep():
  yield from runs(SETS)


def runs(sets: str, seeds=SEEDS, arms=tuple(ARMS)):
  """The runs on the sets below the folder `sets`; all are validated on the held-out videos of the unfiltered set."""
  for seed in seeds:
    for arm in arms:
      name, conditions = ARMS[arm]
      yield {
        "sweep.arm": arm,
        "seed": seed,
        "model.conditions": conditions,
        "data.sources": (f"{sets}/{name}",),
        "data.validation_sources": (f"{sets}/unfiltered",),
      }
