"""What each part of Owl-1 is good for: the ablation that the paper lacks, on `memory-v1`, at most 8 minutes a run.

Eleven arms, three seeds. All begin with one Video DiT that was trained before, without any state; the language model,
the state queries and the connector start at random in each run, and everything is trained together.

  base                the recommended one: 16 queries, `add`, d_t tells the next clip, noise on the context
  state_off           the Video DiT is never given a state
  dynamics_off        no dynamics: the prompt in place of every text, no text loss
  queries_4, _64      fewer and more state queries
  replace             the state in the place of the text, as the paper has it
  current             d_t tells the clip before it (figure 3 of the paper)
  no_context_noise    without the first counter-measure against drift
  per_frame           with another one: noise of its own for each latent frame
  text_dropped        half of the texts dropped: the state must say what happens, too
  no_context_drop     the context dropped as seldom as texts, so that the state is seldom all there is

Expected: not run yet, and whether 8 minutes are enough is not known. Steps of the language model alone (8 walks of 6
clips) took 0.26 s of one shared core, with 4 tokens a frame and 4 queries 0.12 s; after 500 of the latter 54 % of the
determined sentences of unseen walks were right (one seed). As many need no name, so names may be what is missing.
Hardware: one core a run, no accelerator.

  kling train --config configs/sweeps/owl_evidence.py:base --workdir runs/owl_evidence/base     # once, 15 minutes
  kling sweep run owl_evidence --workdir runs/owl_evidence
  python benchmarks/owl_evidence.py measure --workdir runs/owl_evidence    # what finished runs have learnt
  python benchmarks/owl_evidence.py table --workdir runs/owl_evidence      # arms against `base`, paired by seed
"""

from typing import Any

import ml_collections

from kling_jax import config

BASE = "runs/owl_evidence/base"
SEEDS = (0, 1, 2)
FILMER = ("video.dit.*", "video.text.*", "video.null_text")
STATE = ("video.dit.state.*", "video.dit.blocks.state_attn.*")
ARMS: dict[str, dict[str, Any]] = {
  "base": {},
  "state_off": {"drop.state": 1.0},
  "dynamics_off": {"data.dynamics": "caption", "loss.text": 0.0},
  "queries_4": {"state.queries": 4},
  "queries_64": {"state.queries": 64},
  "replace": {"state.injection": "replace"},
  "current": {"data.target": "current"},
  "no_context_noise": {"context.noise": 0.0, "sample.context_noise": 0.0},
  "per_frame": {"diffusion.per_frame": True},
  "text_dropped": {"drop.text": 0.5},
  "no_context_drop": {"drop.context": 0.1},
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  args = config.parse_arg(arg, base=False, runlocal=False)
  c = config.load(f"owl:stage={'generate' if args.base else 'world'}")
  c.lm.size, c.lm.tokens = "nano", "memory-v1"
  c.lm.places = True
  c.state.queries = 16
  c.video.size, c.video.conditions = "d64", ()
  c.text.width, c.text.depth, c.text.tokens = 64, 1, 26
  c.history.window, c.history.states = 4, 8
  c.data.sources = ("worlds:memory-v1?count=768&seed=0",)
  c.data.memory_gib, c.data.threads = 2.0, 1  # 768 walks of 24 clips of 5 frames are 0.28 GB
  c.data.clips, c.data.frames, c.data.key_frames = 6, 5, 1
  c.data.prompt_tokens, c.data.dynamics_tokens = 26, 14  # no scene has more than 21 words, no sentence more than 12
  c.data.batch = 8
  c.loss.clips = 3
  c.loss.text = 1.0
  c.drop.context = 0.3  # where it is dropped the state is all that knows the picture
  c.trainable = ("queries", "places", "head.*", "lm.*", "null_state", *FILMER)
  c.frozen = ("video.codec.*",)
  c.optimizer.lr, c.optimizer.warmup, c.optimizer.schedule, c.optimizer.decay = 3e-3, 50, "wsd", 0.3
  c.ema.decay = 0.99
  c.sample.steps, c.sample.state = 12, 1.5
  c.steps = 1000
  c.log.every, c.checkpoint.every, c.checkpoint.keep = 50, 250, 1
  c.validation.every, c.validation.rows = 500, 256
  if args.base:
    c.data.dynamics = "dense"
    c.data.clips = c.loss.clips = 2
    c.data.batch = 32
    c.drop.state, c.drop.both = 1.0, 0.0
    c.trainable, c.frozen = FILMER, (*c.frozen, *STATE)
    c.optimizer.lr = 2e-3
    c.steps = 2000
  else:
    c.init_from = BASE
    c.init_skip = ("lm.*", "queries", "places", "head.*", "null_state", *STATE)
  if args.runlocal:
    c.init_from = None
    c.steps = 4
    c.data.sources = ("worlds:memory-v1?count=16&seed=0",)
    c.data.batch = c.validation.rows = 4
    c.optimizer.warmup = 1
    c.log.every = c.checkpoint.every = c.validation.every = 2
  return c


def sweep():
  for seed in SEEDS:
    for arm, changes in ARMS.items():
      yield {"sweep.arm": arm, "seed": seed, **changes}
