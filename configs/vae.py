"""Causal video VAE: frames to latents at 1/4 of the frames and 1/8 of the rows and columns, and back.

Trains: models/video_vae.py (Wan 2.1's structure) on L1, an L1 on the bands of a Laplacian pyramid, and a faint KL term.
The per-channel moments of the latents are learned beside it, so that latents come out with about unit variance.
Expected: docs/guide/latents.md holds the measured PSNR by step.
Hardware: `preset=small` two CPU cores or anything better; `preset=wan2.1` 8 or more GPUs or TPU chips.

  kling train --config configs/vae.py:runlocal --workdir runs/vae-local
  kling train --config configs/vae.py:preset=small,res=64 --workdir runs/vae --config.data.sources="('clips/',)"
  kling train --config configs/video_dit.py --workdir runs/dit --config.codec.name=vae --config.codec.preset=small \
    --config.codec.weights=runs/vae

Arguments: preset = small wan2.1 xs; res = 64 128 256 (pixels); runlocal shrinks everything to a CPU run of seconds.
This file is also the schema: its keys and types are the legal ones.
"""

import ml_collections

from kling_jax.config import parse_arg
from kling_jax.train.defaults import trainer

# name: (pixel frames, height, width). Short clips suffice: the network is causal and its memory of the past is finite.
RESOLUTIONS = {"64": (9, 64, 64), "128": (17, 128, 128), "256": (17, 256, 256)}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  args = parse_arg(arg, preset="small", res="64", runlocal=False)
  if args.runlocal:
    args.preset, args.res = "xs", "64"

  c = trainer()
  c.task = "video_vae"

  c.model = ml_collections.ConfigDict()
  c.model.preset = args.preset  # shape: wan2.1, small, xs

  c.loss = ml_collections.ConfigDict()
  c.loss.pyramid = 1.0  # weight of the L1 on Laplacian bands: edges, which plain L1 leaves soft
  c.loss.levels = 3  # bands, each of half the size of the one before
  c.loss.kl = 1e-6  # per latent element, against a standard normal: keeps latents bounded, no more

  c.data = ml_collections.ConfigDict()
  c.data.sources = ("worlds:shapes-v1?count=512&seed=0",)  # folders, tables, clip sets, TFDS folders, worlds
  c.data.weights = ()  # of the sources in the mixture; () = by their number of clips
  c.data.buckets = (RESOLUTIONS[args.res],)  # (frames, height, width) in pixels; frames = 1 + 4k, pixels by 8
  c.data.fps = 8.0
  c.data.batch = 8  # clips a step, over all devices
  c.data.validation_fraction = 0.1  # of the videos, held out by a hash of their id
  c.data.threads = 4
  c.data.workers = 0  # processes beside the threads

  c.steps = 2000
  c.optimizer.lr = 1e-3 if args.preset != "wan2.1" else 1e-4
  c.validation.rows = 16
  c.ema.decay = 0.995
  if args.runlocal:
    c.steps = 60
    c.data.sources = ("worlds:shapes-v1?count=64&seed=0",)
    c.data.buckets = ((5, 32, 32),)
    c.optimizer.lr, c.optimizer.warmup = 3e-3, 10
    c.ema.decay = 0.95
    c.checkpoint.every = c.validation.every = 30
  return c
