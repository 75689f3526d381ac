"""The trainer's own config keys, shared by every task's config (no JAX import: configs load fast)."""

import ml_collections
from ml_collections.config_dict import placeholder

# Raise it when the same config learns something else than before (another initialisation, sampling or update): runs of
# sweeps are then done again instead of being mixed with old ones. A test compares a short run with pinned losses.
RECIPE = 1


def trainer() -> ml_collections.ConfigDict:
  """Returns the keys that `train.loop.run` reads, with values for a small run; a task's config adds its own."""
  c = ml_collections.ConfigDict()
  c.task = ""  # module under kling_jax/train/tasks
  c.seed = 0
  c.steps = 1000  # optimiser updates in all
  c.precision = "float32"  # compute dtype; master weights, norms and softmax stay float32. bfloat16 on TPU and GPU
  c.init_from = placeholder(str)  # warm start: a work directory or a folder of safetensors
  c.init_allow_missing = ()  # patterns of parameters that may keep their random start under init_from
  c.init_skip = ()  # patterns of parameters that keep it though init_from has them

  c.optimizer = opt = ml_collections.ConfigDict()
  opt.lr = 3e-4  # peak
  opt.schedule = "constant"  # constant, wsd (warm-up, stable, decay), cosine
  opt.warmup = 100  # steps of linear warm-up
  opt.decay = 0.2  # wsd: share of all steps in the final 1-sqrt decay
  opt.b1 = 0.9
  opt.b2 = 0.99
  opt.weight_decay = 0.0  # decoupled, on matrices only
  opt.clip = 1.0  # global gradient norm; 0 = off
  opt.accumulate = 1  # micro-batches per update
  opt.gradient = "float32"  # in which devices add their kernels' gradients; bfloat16: half the bytes, rounded sums
  opt.offload = False  # moments in the hosts' memory between updates: 8 bytes less a parameter, more time a step

  c.ema = ml_collections.ConfigDict()
  c.ema.decay = 0.999  # of the averaged weights; reached as min(decay, (1 + n) / (10 + n))

  c.guard = ml_collections.ConfigDict()
  c.guard.spike_sigmas = 8.0  # skip an update whose loss lies this far above its running mean; 0 = off
  c.guard.after = 100  # updates before the spike guard speaks
  c.guard.max_skipped = 50  # consecutive skips that end the run with an error

  c.mesh = ml_collections.ConfigDict()  # product = number of devices; -1 once: what is left
  c.mesh.replica = 1
  c.mesh.fsdp = -1
  c.mesh.context = 1
  c.mesh.tensor = 1

  c.attention = ml_collections.ConfigDict()
  c.attention.road = "auto"  # auto, reference, blockwise, splash (TPU), cudnn (GPU)
  c.attention.context = "auto"  # auto, ring, ulysses: how tokens cut over mesh.context attend to one another
  c.attention.splash_blocks = ()  # six largest blocks of the TPU kernel (nn/splash.py); () = by generation

  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every = 500  # steps
  c.checkpoint.keep = 3  # newest ones
  c.checkpoint.keep_every = 0  # also keep for ever each multiple of this many steps; 0 = none

  c.validation = ml_collections.ConfigDict()
  c.validation.every = 500  # steps; 0 = never
  c.validation.rows = 64  # rows of the fixed table of (sample, time, noise)
  c.validation.samples = 0  # clips sampled at each validation

  c.log = ml_collections.ConfigDict()
  c.log.every = 10  # steps between lines of metrics.jsonl
  c.log.tensorboard = False  # needs the extra track
  c.log.wandb = placeholder(str)  # project name; needs the extra track
  c.log.histograms = 0  # steps between histograms of parameters and gradients, for these two; 0 = none
  c.log.profile = ()  # (first, last) step to trace into workdir/profile
  return c
