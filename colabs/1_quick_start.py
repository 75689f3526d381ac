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
# # Quick start: train a video model, then turn its motion knob
#
# A small Video DiT learns a world of moving shapes, in minutes on a CPU. It is told the motion of every clip it sees,
# so at the end you can ask for much or little of it. On a GPU take more steps and a larger size; nothing else
# changes.

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
# ## A config is a Python function
#
# `video_dit` is packaged; `size=XS` is its smallest. What follows the load are plain values, and a key that does not
# exist is refused with the nearest one that does.

# %%
from kling_jax import config

c = config.load("video_dit:runlocal")  # XS, 9 frames of 32 x 32 pixels, the procedural world `shapes-v1`
c.data.fps = 4.0
c.steps = 12 if SMALL else 800
c.data.sources = (f"worlds:shapes-v1?count={32 if SMALL else 512}&seed=0",)
c.optimizer.schedule = "wsd"
c.ema.decay = 0.98 if SMALL else 0.995
c.drop.text = 0.2
c.validation.every = c.checkpoint.every = 6 if SMALL else 200
c.log.every = 2 if SMALL else 10
if SMALL:
  c.model.size, c.codec.channels, c.optimizer.warmup = "d32x2", 4, 2
for group in ("model", "data", "optimizer"):
  print(group, config.plain(c)[group])

# %% [markdown]
# ## What it learns from
#
# Batch *i* is a pure function of the sources, the seed and *i*: that is why a run can be killed anywhere and goes on
# exactly.

# %%
import numpy as np

from kling_jax.data import show
from kling_jax.data.open import open_source

world = open_source(c.data.sources[0])
times_s = np.arange(9) / c.data.fps
show.videos({world.info(k).caption: world.frames(k, times_s, 64, 64) for k in range(4)}, fps=4)

# %% [markdown]
# ## Train
#
# The same as `kling train --config ... --workdir quick_start`. Run this cell again and nothing happens: it is done.

# %%
from kling_jax.train import loop, metrics

summary = loop.run(c, "quick_start")
print(f"step {summary.step}, loss {summary.metrics['loss']:.3f}, {summary.metrics['tokens_per_s']:.0f} tokens a second")

# %%
import matplotlib.pyplot as plt

rows = metrics.read("quick_start/metrics.jsonl")
checked = [row for row in rows if "val_loss" in row]
plt.figure(figsize=(6, 3))
plt.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="training")
plt.plot([row["step"] for row in checked], [row["val_loss"] for row in checked], "o-", label="held-out, EMA weights")
plt.xlabel("step")
plt.ylabel("loss")
plt.legend()
plt.show()

# %% tags=["check"]
assert summary.finished and summary.step == c.steps
assert rows[-1]["loss"] < rows[0]["loss"], "the loss falls"
assert checked and np.isfinite(checked[-1]["val_loss"])

# %% [markdown]
# ## Sample
#
# The model is loaded once; a request is a text, a seed, and scores in raw units or as `low`, `mid`, `high` (the 1st
# percentile, the middle and the 99th of what it was trained on).

# %%
from kling_jax.generate import sample

model = sample.Model("quick_start")
settings = sample.Settings(steps=4 if SMALL else 24, text=1.5, scores_scale=2.0, batch=2)  # two at a time
prompts = ["a red circle moves right", "a blue square moves up"]
made = model([sample.Request(prompt, seed=1) for prompt in prompts], settings)
show.videos(dict(zip(prompts, made, strict=True)), fps=4)

# %% [markdown]
# ## The knob
#
# The same noise, told low and high motion. Below each video stands what the motion scorer measures in it.

# %%
from kling_jax.measure import clip as measure

scorers = measure.chosen(["motion"])
told = [sample.Request("", seed=seed, scores={"motion": level}) for level in ("low", "high") for seed in range(2)]
moving = model(told, settings)
measured = [measure.score(frames, times_s, scorers)["motion"].value for frames in moving]
show.videos(
  {f"{r.scores['motion']}, seed {r.seed}: {m:.3f}": f for r, m, f in zip(told, measured, moving, strict=True)}, fps=4
)

# %% tags=["check"]
assert [frames.shape for frames in made] == [(9, 32, 32, 3)] * 2 and made[0].dtype == np.uint8
assert np.abs(made[0].astype(int) - made[1]).max() > 0, "texts change samples"
assert np.abs(moving[0].astype(int) - moving[2]).max() > 0, "told motion changes samples"
assert np.array_equal(model(told[:1], settings)[0], moving[0]), "a seed gives the same bits, in any batch"

# %% [markdown]
# ## From the shell
#
# Everything above is also a command. A picture or a video may be what it begins with: `--image`, `--video`.

# %%
# !kling sample --workdir quick_start --prompt "a red circle moves right" --motion high --steps 4 --out kite.mp4

# %% tags=["check"]
assert os.path.getsize("kite.mp4") > 500

# %% [markdown]
# Next: your own footage, in the second notebook; a larger model, `video_dit:size=S,res=128` and up.
