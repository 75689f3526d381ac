"""Text-to-video Video DiT that is told the motion, aesthetic and clarity scores of each clip.

Trains: rectified flow over latent video, text by cross-attention, scores through AdaLN (Koala-36M, section 5).
Expected: `:runlocal` takes the loss from 2.46 to 0.85 in 60 steps, a minute on two CPU cores with compilation.
Hardware: `size=S` one GPU or TPU chip; `size=XL` 8 to 32 chips; `size=14b` a v5p-64 slice or larger.

  kling train --config configs/video_dit.py:runlocal --workdir runs/local
  kling train --config configs/video_dit.py:size=S,res=256 --workdir runs/s \
    --config.data.sources="('clips/',)" --config.precision=bfloat16

Arguments: size = XS S B L XL 1.3b 14b 30b n0.017b n0.057b n0.13b n0.26b n0.72b n1.07b, or d96:
the scaling family's member of any width that is a multiple of 16, with width^3 parameters (d96x2: that width with two
blocks); res = 64 128 256 480p 720p;
runlocal shrinks everything to a CPU run of seconds. This file is also the schema: its keys and types are legal.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from kling_jax.config import parse_arg
from kling_jax.train.defaults import trainer

# name: (pixel frames, height, width), frame rate, and the shift of the noise schedule that its token count asks for.
RESOLUTIONS = {
  "64": ((17, 64, 64), 8.0, 1.0),
  "128": ((17, 128, 128), 8.0, 1.5),
  "256": ((17, 256, 256), 8.0, 2.0),
  "480p": ((81, 480, 832), 16.0, 3.0),
  "720p": ((81, 720, 1280), 16.0, 5.0),
}
WAN_SIZES = ("1.3b", "14b", "30b")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  args = parse_arg(arg, size="S", res="64", runlocal=False)
  if args.runlocal:
    args.size, args.res = "XS", "64"
  bucket, fps, shift = RESOLUTIONS[args.res]
  large = args.size in WAN_SIZES

  c = trainer()
  c.task = "video_dit"

  c.model = ml_collections.ConfigDict()
  c.model.size = args.size
  c.model.conditions = ("motion", "aesthetic", "clarity")  # scores that the model is told, in this order
  c.model.told = "adaln"  # adaln, or caption: their numbers behind the caption (Open-Sora's way)
  c.model.remat = "none" if args.size in ("XS", "S", "B") else "full"  # what the backward pass recomputes
  c.model.quantize = "none"  # products of the blocks' kernels: int8 or fp8 through qwix (nn/quantized.py)

  c.codec = ml_collections.ConfigDict()
  c.codec.name = "vae" if large else "haar"  # haar needs no weights; vae is models/video_vae.py
  c.codec.spatial = 8 if large else 4  # pixels a latent row or column
  c.codec.channels = 16
  c.codec.preset = "wan2.1"  # of the vae
  c.codec.weights = placeholder(str)  # vae: work directory that trained it, or a folder of safetensors

  c.text = ml_collections.ConfigDict()
  c.text.encoder = "cached" if large else "bytes"  # bytes: trained with the model; cached: read from the text cache
  c.text.width = 4096 if large else 256
  c.text.depth = 2  # layers of the byte encoder
  c.text.tokens = 512 if large else 160  # longest caption
  c.text.padding = large  # the network sees the zeros behind a text, as Wan 2.1 was trained; False hides them
  c.text.weights = placeholder(str)  # cached: folder of a T5, umT5 or CLIP, or work directory of a byte encoder

  c.lora = ml_collections.ConfigDict()
  c.lora.rank = 0  # above 0 the transformer is frozen and adapters of this rank are trained, for a start from init_from
  c.lora.match = r"(self|cross)_attn\.(q|k|v|out)\.kernel$"  # the kernels that get one

  c.diffusion = ml_collections.ConfigDict()
  c.diffusion.process = "flow"  # flow, v, x
  c.diffusion.time = "logit_normal"  # logit_normal, uniform
  c.diffusion.shift = shift  # more tokens, more noise

  c.drop = ml_collections.ConfigDict()  # probabilities in training, for classifier-free guidance
  c.drop.text = 0.1
  c.drop.scores = 0.1  # each score on its own

  c.history = ml_collections.ConfigDict()
  c.history.probability = 0.2  # of giving the first latent frames clean, so that images and videos can be continued
  c.history.frames = 2  # at most this many latent frames

  c.data = ml_collections.ConfigDict()
  c.data.sources = ("worlds:shapes-v1?count=512&seed=0",)  # folders, tables, clip sets, TFDS folders, worlds
  c.data.weights = ()  # of the sources in the mixture; () = by their number of clips
  c.data.validation_sources = ()  # whose held-out videos are validated on; () = those of the sources
  c.data.buckets = (bucket,)  # (frames, height, width) in pixels
  c.data.fps = fps
  c.data.batch = 64  # clips a step, over all devices
  c.data.validation_fraction = 0.05  # of the videos, held out by a hash of their id
  c.data.cached_latents = False  # read SET/cache/latents instead of decoding
  c.data.memory_gib = 0.0  # of decoded clips that stay in memory; for small sets that are seen many times
  c.data.threads = 4
  c.data.workers = 0  # processes beside the threads

  c.sample = ml_collections.ConfigDict()  # defaults of `kling sample` and of the samples during training
  c.sample.steps = 30
  c.sample.method = "dpmpp_2m"  # euler, heun, ddim, dpmpp_2m
  c.sample.text = 4.0  # guidance scales; 1 = off
  c.sample.scores = 1.0
  c.sample.image = 1.0
  c.sample.rescale = 0.0

  c.optimizer.lr = 1e-4 if large else 3e-4
  if args.runlocal:
    c.steps = 60
    c.data.sources = ("worlds:shapes-v1?count=64&seed=0",)
    c.data.buckets = ((9, 32, 32),)
    c.data.batch = 8
    c.text.width, c.text.depth, c.text.tokens = 64, 1, 96
    c.optimizer.lr, c.optimizer.warmup = 2e-3, 10
    c.ema.decay = 0.98
    c.checkpoint.every = c.validation.every = 30
    c.validation.rows = 16
    c.sample.steps = 8
  return c
