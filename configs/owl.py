"""Owl-1, the world model: it keeps a state, writes its next action as text, and films it, clip after clip.

Trains: language model + Video DiT on walks of clips (arXiv 2412.09600; models/owl.py, train/tasks/owl.py), in stages:
  align         states learn the features of a trained text encoder (the base Video DiT's)
  generate      denoising of clips from states and from the clip before
  world         the same, and the text of the next clip
  self_rollout  the same, on a past that the model has filmed itself
Expected: `:runlocal` takes the loss of any stage down in 40 steps; docs/guide/owl.md holds what was measured.
Hardware: `preset=tiny` two CPU cores; `small` one GPU or TPU chip; `owl1` and `modern` a slice of 16 or more.

  kling train --config configs/video_dit.py:size=XS --workdir runs/base \
    --config.data.buckets="((5,32,32),(1,32,32))" --config.data.sources="('worlds:memory-v1?count=256&seed=0',)"
  kling train --config configs/owl.py:stage=align --workdir runs/align --config.video.weights=runs/base
  kling train --config configs/owl.py:stage=generate --workdir runs/generate --config.init_from=runs/align
  kling train --config configs/owl.py:stage=world --workdir runs/world --config.init_from=runs/generate
  kling rollout --workdir runs/world --prompt "a red circle, in a cyan room" --clips 8 --out film

Arguments: preset = tiny small owl1 modern; stage = align generate world self_rollout; runlocal shrinks everything to a
CPU run of seconds. `owl1` has the paper's shapes: 128 queries, 2 key frames a clip, LoRA of rank 8, 10K, 10K and 1K
steps; `modern` is what later work does (PAN, arXiv 2511.09057): 256 queries, a stream of their own, a frozen language
model, noise of its own for each frame. Both have the language model's shape, with patches of pixels in place of its own
image tokens. This file is also the schema: its keys and types are legal.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from kling_jax.config import parse_arg
from kling_jax.errors import ConfigError, nearest
from kling_jax.train.defaults import trainer

PRESETS = ("tiny", "small", "owl1", "modern")
STEPS = {"align": 10_000, "generate": 10_000, "world": 1_000, "self_rollout": 500}  # the paper's three, and ours
READER = ("queries", "places", "head.*")  # the state's side of the language model
FILMER = ("null_state", "video.dit.*", "video.null_text")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  args = parse_arg(arg, preset="tiny", stage="world", runlocal=False)
  for key, legal in (("preset", PRESETS), ("stage", tuple(STEPS))):
    if args[key] not in legal:
      raise ConfigError(f"config argument {key}={args[key]!r} is unknown{nearest(args[key], legal)}")
  if args.runlocal:
    args.preset = "tiny"
  large = args.preset in ("owl1", "modern")
  pick = lambda *values: values[PRESETS.index(args.preset)]

  c = trainer()
  c.task = "owl"
  c.stage = args.stage

  c.lm = ml_collections.ConfigDict()
  c.lm.size = pick("tiny", "small", "chameleon-7b", "qwen3-vl-2b")  # models/language_model.py
  c.lm.tokens = "bytes"  # what texts are cut into: bytes, or memory-v1 (the words of that world and no others)
  c.lm.patch = pick(8, 16, 64, 64)  # pixels (each way) of a frame patch that is one token
  c.lm.context = pick(65_536, 65_536, 4_096, 262_144)  # positions that it knows
  c.lm.places = False  # a learned vector for each place of a clip, so that small models soon find the same place again
  c.lm.lora_rank = 8 if large else 0  # adapters; 0 = none
  c.lm.lora = ("q", "k", "v", "out", "gate", "up", "down") if large else ()
  c.lm.remat = "full" if large else "none"

  c.state = ml_collections.ConfigDict()
  c.state.queries = pick(8, 32, 128, 256)
  c.state.injection = pick("add", "add", "replace", "add")  # add: a stream of its own; replace: in the text's place
  c.state.slots = pick(0, 0, 77, 0)  # state tokens that the Video DiT gets; 0 = one a query, else a resampler
  c.state.mutual = pick(False, False, False, True)  # whether the queries of a clip see one another

  c.video = ml_collections.ConfigDict()  # the Video DiT; the keys of configs/video_dit.py's `model`
  c.video.size = pick("XS", "S", "1.3b", "1.3b")
  c.video.conditions = ("motion", "aesthetic", "clarity")  # of the base run; walks leave them unsaid
  c.video.weights = placeholder(str)  # work directory of the base video_dit run; not with init_from
  c.video.remat = "full" if large else "none"

  c.codec = ml_collections.ConfigDict()
  c.codec.name = pick("haar", "haar", "haar", "vae")
  c.codec.spatial = pick(4, 4, 8, 8)
  c.codec.channels = 16
  c.codec.preset = "wan2.1"  # of the vae
  c.codec.weights = placeholder(str)

  c.text = ml_collections.ConfigDict()  # the byte encoder of the Video DiT, frozen
  c.text.width = pick(256, 256, 1024, 1024)
  c.text.depth = 2
  c.text.tokens = 160  # longest text; those of the base run

  c.context = ml_collections.ConfigDict()
  c.context.frames = pick(1, 1, 1, 2)  # last latent frames of the clip before that the Video DiT sees
  c.context.noise = pick(0.1, 0.1, 0.0, 1.0)  # in training each row's level is drawn up to this, and told

  c.history = ml_collections.ConfigDict()
  c.history.window = pick(4, 4, 2, 10)  # clips before the present one that the language model sees in full
  c.history.states = pick(16, 16, 4, 64)  # clips before those of which it sees the states

  c.data = ml_collections.ConfigDict()
  c.data.sources = ("worlds:memory-v1?count=256&seed=0",)  # worlds, clip sets, folders: anything with several clips
  c.data.weights = ()
  c.data.captions = placeholder(
    str
  )  # dense captions of the videos: docs/guide/walks.md; None = the clips' own captions
  c.data.shots = placeholder(str)  # what `kling split --json` printed of them; clip sets know their cuts
  c.data.clips = pick(5, 5, 4, 8)  # a row
  c.data.frames = pick(5, 9, 17, 17)  # a clip: 1 + 4k
  c.data.height, c.data.width = pick((32, 32), (64, 64), (576, 1024), (576, 1024))
  c.data.fps = pick(5.0, 9.0, 4.25, 4.25)  # clips of memory-v1 last a second, the paper's four
  c.data.key_frames = 2  # of a clip that the language model sees
  c.data.prompt_tokens = 96  # places of the prompt and of a clip's dynamics in the sequence, marks included
  c.data.dynamics_tokens = pick(64, 64, 152, 152)
  c.data.dynamics = "dense" if args.stage in ("world", "self_rollout") else "caption"  # a text a clip, or one for all
  c.data.target = "next"  # d_t tells the clip after it; current: the clip before it (figure 3 of the paper)
  c.data.batch = pick(16, 32, 64, 64)
  c.data.validation_fraction = 0.1
  c.data.memory_gib = 0.0
  c.data.threads = 4
  c.data.workers = 0

  c.diffusion = ml_collections.ConfigDict()
  c.diffusion.process = pick("flow", "flow", "v", "flow")
  c.diffusion.time = "logit_normal"
  c.diffusion.shift = pick(1.0, 1.0, 3.0, 3.0)
  c.diffusion.per_frame = pick(False, False, False, True)  # a time of its own for each latent frame (diffusion forcing)

  c.loss = ml_collections.ConfigDict()
  c.loss.text = 0.5  # lambda: weight of the next-token loss beside the denoising loss

  c.loss.clips = 1  # clips of a row that are filmed a step; more cost what the Video DiT costs

  c.own = ml_collections.ConfigDict()  # of self_rollout
  c.own.clips = 1  # clips that the model films before the one that it is trained on
  c.own.steps = 4  # of their sampler

  c.drop = ml_collections.ConfigDict()  # probabilities in training, for guidance
  c.drop.state = 0.1
  c.drop.text = 0.1
  c.drop.context = 0.15  # as at a cut, so that cuts work anywhere
  c.drop.both = 0.05

  adapters = ("lora.*", "lm.patches.*") + (("lm.table", "lm.head.*") if args.preset == "owl1" else ())
  language = adapters if large else ("lm.*",)
  c.trainable = READER + language + (() if args.stage == "align" else FILMER)  # patterns of parameters
  c.frozen = ("video.text.*", "video.codec.*")  # wins over trainable

  c.lr_scale = ml_collections.ConfigDict()  # times optimizer.lr
  c.lr_scale.state = 1.0  # queries, head, null state
  c.lr_scale.lm = 1.0
  c.lr_scale.video = 0.1 if large else 1.0

  c.sample = ml_collections.ConfigDict()  # defaults of `kling rollout`
  c.sample.steps = 20
  c.sample.method = "dpmpp_2m"
  c.sample.state = 2.0  # guidance scale of state and text; 1 = off
  c.sample.history = 1.0  # of the context
  c.sample.history_form = "vanilla"  # vanilla, stabilised, fractional
  c.sample.history_level = 0.0  # noise level of the context in the last two
  c.sample.rescale = 0.0
  c.sample.context_noise = pick(0.05, 0.05, 0.0, 0.055)
  c.sample.temperature = 0.0  # of written dynamics; 0 = the likeliest
  c.sample.top_p = pick(1.0, 1.0, 0.9, 0.9)
  c.sample.repetition = 1.0

  c.steps = STEPS[args.stage] if args.preset == "owl1" else 2_000
  c.optimizer.lr = 1e-4 if large else 1e-3
  c.validation.rows = 32
  if args.runlocal:
    c.steps = 40
    c.lm.patch = 8
    c.state.queries = 4
    c.text.width, c.text.depth = 64, 1
    c.data.sources = ("worlds:memory-v1?count=24&seed=0",)
    c.data.clips, c.data.batch = 3, 8
    c.history.window, c.history.states = 2, 2
    c.optimizer.lr, c.optimizer.warmup = 2e-3, 10
    c.ema.decay = 0.95
    c.checkpoint.every = c.validation.every = 20
    c.validation.rows = 8
    c.sample.steps = 4
  return c
