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
# # A world that goes on, and does what you say
#
# Owl-1 writes in words what happens next, keeps a state, and films it, clip after clip. Here a tiny one learns
# `memory-v1`, a room where things move, hide behind walls and come back. Then you direct it.

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
# ## The world
#
# One event a clip, one second long, told in one sentence; 43 % of the sentences follow from what was seen before.

# %%
import numpy as np

from kling_jax.data import memory_world, show
from kling_jax.data.memory_world_frames import walk_frames

story = memory_world.story(seed=0, index=5, clips=6)
for sentence, follows in zip(story.sentences, story.determined, strict=True):
  print("=" if follows else " ", sentence)
show.videos({"six clips": walk_frames(story, np.arange(31) / 5, 64, 64)}, fps=5, width=240)

# %% [markdown]
# ## Your event, its true outcome
#
# States are values and events are functions, so the world can be asked what an event of yours would really have done.

# %%
print([memory_world.sentence(story.states[0], action) for action in memory_world.legal(story.states[0])])

# %% [markdown]
# ## Train
#
# Language model and Video DiT together, on walks of clips. (The paper's way has stages, `align`, `generate`, `world`,
# on a base model; the last one alone does for a small world. A state starts as a no-op, so nothing is lost.)

# %%
from kling_jax import config
from kling_jax.train import loop, metrics

c = config.load("owl:runlocal,stage=world")
c.steps = 12 if SMALL else 1500
c.data.batch = 4 if SMALL else 8
c.data.sources = (f"worlds:memory-v1?count={16 if SMALL else 256}&seed=0",)
c.checkpoint.every = 12 if SMALL else 250
c.validation.every = 0 if SMALL else 250
c.ema.decay = 0.9 if SMALL else 0.995
c.log.every = 1 if SMALL else 10
if SMALL:
  c.video.size, c.codec.channels, c.optimizer.warmup = "d32x2", 4, 2
summary = loop.run(c, "world")
rows = metrics.read("world/metrics.jsonl")
print(rows[0]["loss"], "->", rows[-1]["loss"])

# %%
import matplotlib.pyplot as plt

plt.figure(figsize=(6, 3))
plt.plot([row["step"] for row in rows], [row["loss"] for row in rows])
plt.xlabel("step")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# ## Direct it
#
# A rollout begins with a text and a picture. `next()` lets the model write what happens, `next("...")` is you.

# %%
from kling_jax.generate import rollout

model = rollout.Model("world", settings=rollout.Settings(steps=2 if SMALL else 20))
side = c.data.height
picture = walk_frames(story, np.zeros(1), side, side)[0]
film = rollout.Rollout(model, memory_world.scene(story.states[0]), picture)
yours = film.next(story.sentences[0])
its_own = film.next()
print("it wrote:", its_own.dynamics)
show.videos({clip.dynamics[:60]: clip.frames_THWC for clip in film.clips}, fps=5)

# %% [markdown]
# ## Another future
#
# A moment is a value. Fork it and say something else; go back; ask again with other dice.

# %%
options = [memory_world.sentence(story.states[0], action) for action in memory_world.legal(story.states[0])]
film.rewind(0)
futures = {}
for words in options[:3]:
  branch = film.fork()
  futures[words] = branch.next(words).frames_THWC
again = film.fork().next(options[0]).frames_THWC
dice = film.fork(branch=1).next(options[0]).frames_THWC
show.videos(futures | {"other dice": dice}, fps=5)

# %% tags=["check"]
assert summary.finished and all(np.isfinite(row["loss"]) for row in rows)
assert np.mean([row["loss"] for row in rows[-4:]]) < np.mean([row["loss"] for row in rows[:4]])
assert yours.frames_THWC.shape == (c.data.frames, side, side, 3) and yours.given and not its_own.given
assert np.array_equal(again, futures[options[0]]), "the same moment and words give the same bits"
assert not np.array_equal(dice, again), "other dice do not"
assert len(film.clips) == 0, "we went back to the start"

# %% [markdown]
# ## By hand
#
# Change `SAYS` and run the cell as often as you like; an empty text lets the model write. In a shell, `kling rollout
# --interactive` asks before each clip, and `--serve` opens a page.

# %%
SAYS = options[1]
clip = film.next(SAYS or None)
show.videos({f"clip {clip.number}: {clip.dynamics[:60]}": clip.frames_THWC}, fps=5, width=240)

# %% [markdown]
# ## Did it do what you said?
#
# The true films of all legal events are known; which one is nearest to what it filmed?

# %%
from kling_jax.evals import following

heard = memory_world.told(seed=0, index=5, clips=1, given={0: SAYS})
verdicts, _ = following.judge(clip.frames_THWC[None], heard.states[0], heard.sentences[:1])
print(verdicts[0])

# %% tags=["check"]
assert len(verdicts) == 1 and verdicts[0].choices > 1
film.save("moment.npz")
assert np.array_equal(rollout.Rollout.load(model, "moment.npz").clips[-1].frames_THWC, clip.frames_THWC)
