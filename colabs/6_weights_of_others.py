# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Weights of others: load, adapt, hand back
#
# Wan 2.1 loads by configuration alone: the Video DiT here has its block, the VAE its structure. This notebook loads a
# folder in diffusers' layout, samples it, trains LoRA adapters and score embeddings on top, and exports the result.

# %%
import importlib.util
import logging
import os
import subprocess
import sys
import warnings

SOURCE = os.environ.get("KLING_JAX_SOURCE", "..")  # the folder of a clone, or git+https://... of one
SMALL = os.environ.get("KLING_SMALL") == "1"  # a smoke test in seconds; nothing to look at
if importlib.util.find_spec("kling_jax") is None:
  wanted = f"kling_jax[demo,sweep,caption] @ {SOURCE}" if "://" in SOURCE else f"{SOURCE}[demo,sweep,caption]"
  subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", wanted], check=True)
logging.getLogger("absl").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "os.fork")  # `!` starts programs beside JAX, which is harmless

# %% [markdown]
# ## The folder
#
# Point `WAN` at a download of `Wan-AI/Wan2.1-T2V-1.3B-Diffusers` (and read its licence). Nothing is downloaded here.
# Without one, a thimble of the same layout is filled with random numbers: names, shapes and arithmetic are Wan's, the
# pictures are noise.

# %%
import pathlib

WAN = os.environ.get("KLING_WAN", "")
THIMBLE = not WAN
if THIMBLE:
  import numpy as np
  from flax import nnx

  from kling_jax.interop import outward
  from kling_jax.models import video_dit, video_vae
  from kling_jax.nn import params

  def drawn(init, seed):
    """Random weights of a network, none at a start of zero."""
    shapes, draw = params.abstract(init)[1], np.random.default_rng(seed)
    return {name: draw.normal(scale=0.1, size=leaf.shape).astype(np.float32) for name, leaf in shapes.items()}

  WAN = "thimble"
  shape = video_dit.preset("d16", latent_channels=4, text_width=32, conditions=())
  dit = drawn(lambda: video_dit.VideoDiT(shape, rngs=nnx.Rngs(0)), 0)
  outward.write_diffusers(pathlib.Path(WAN, "transformer"), "video_dit", shape, dit)
  vae = drawn(lambda: video_vae.VideoVAE.preset("xs", rngs=nnx.Rngs(0)), 1)
  outward.write_diffusers(pathlib.Path(WAN, "vae"), "video_vae", video_vae.preset("xs"), vae)
print(sorted(str(path.relative_to(WAN)) for path in pathlib.Path(WAN).rglob("*") if path.is_file()))

# %% [markdown]
# ## What is it?
#
# Files are recognised by the names and shapes of their tensors. What is unknown is refused in one line, and nothing
# is unpickled.

# %%
from kling_jax.interop import detect

found = detect.recognise(pathlib.Path(WAN, "transformer"))
print(found.kind, found.naming, found.config)

# %% [markdown]
# ## Into a work directory
#
# It holds a checkpoint like one of our own training, and the SHA-256 of every file that it came from.

# %%
# !kling import {WAN} --out wan

# %%
import json

from kling_jax.train.checkpoint import Checkpoints

about = Checkpoints(pathlib.Path("wan")).meta(0)["constants"]["sources"]
print(json.dumps(about, indent=1)[:400])

# %% tags=["check"]
assert found.kind == "video_dit"
assert len(about["dit"]["sha256"]) == 1, "each file that it came from has its SHA-256"

# %% [markdown]
# ## Adapt it to your clips
#
# The transformer stays frozen. What is trained: adapters in attention, the embeddings of motion, aesthetic and
# clarity, which Wan never had and which start as no-ops, and (in the thimble, which brings no text encoder) a
# byte-level text encoder. With the real weights take `video_dit:size=1.3b,res=480p`, its text encoder and caches: see
# "Weights in and out" in the guide.

# %%
from kling_jax import config
from kling_jax.train import loop, metrics

c = config.load("video_dit:size=d16,res=64" if THIMBLE else "video_dit:size=1.3b,res=480p")
c.init_from = f"{WAN}/transformer"
c.codec.name, c.codec.weights = "vae", f"{WAN}/vae"
c.lora.rank = 4
c.steps = 6 if SMALL else 200
c.optimizer.lr, c.optimizer.warmup = 3e-3, 2
c.log.every = 1 if SMALL else 10
c.validation.every = 0
c.checkpoint.every = c.steps
if THIMBLE:
  c.codec.preset, c.codec.channels, c.codec.spatial = "xs", 4, 8
  c.text.encoder, c.text.width, c.text.depth, c.text.tokens = "bytes", 32, 1, 32
  c.init_allow_missing = ("text.*",)
  c.data.sources = ("worlds:shapes-v1?count=64&seed=0",)
  c.data.buckets = ((5, 32, 32),)
  c.data.batch = 8
else:
  c.text.weights, c.precision = f"{WAN}/text_encoder", "bfloat16"
  c.data.sources, c.data.cached_latents = (os.environ["KLING_SET"],), True  # a clip set after `kling encode`
summary = loop.run(c, "adapted")
report = json.loads(pathlib.Path("adapted/init_report.json").read_text())
for part in report:  # what was loaded, and what starts fresh
  print({name: f"{len(value)}: {value[:3]}" if isinstance(value, list) else value for name, value in part.items()})

# %%
import matplotlib.pyplot as plt

rows = metrics.read("adapted/metrics.jsonl")
plt.figure(figsize=(6, 3))
plt.plot([row["step"] for row in rows], [row["loss"] for row in rows])
plt.xlabel("step")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# ## Sample, told little and much motion

# %%
from kling_jax.data import show
from kling_jax.generate import sample

model = sample.Model("adapted")
settings = sample.Settings(steps=2 if SMALL else 30, scores_scale=2.0)
asked = [sample.Request("a red circle moves right", seed=1, scores={"motion": level}) for level in ("low", "high")]
made = model(asked, settings)
show.videos({f"motion {request.scores['motion']}": frames for request, frames in zip(asked, made, strict=True)}, fps=8)

# %% [markdown]
# ## Hand it back
#
# In diffusers' names, so that other programs open it; what those have no place for (score embeddings, adapters) lies
# beside it.

# %%
# !kling export --workdir adapted --out shared --naming diffusers

# %%
files = sorted(str(path.relative_to("shared")) for path in pathlib.Path("shared").rglob("*.safetensors"))
print(files)

# %% tags=["check"]
assert summary.finished and all(row["loss"] == row["loss"] for row in rows)
assert any("transformer" in name for name in files) and any("vae" in name for name in files)
assert any("lora" in name for name in files), files
back = detect.recognise(pathlib.Path("shared/transformer"))
assert back.kind == "video_dit" and back.config.width == found.config.width
