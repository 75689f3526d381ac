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
# # Scaling laws: spend FLOPs well
#
# Train many small models, fit how the loss falls, and read off the next run: how large, how long, at which learning
# rate and batch. First with laws in print, then with runs of your own.

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
# ## Laws in print
#
# Each is an object that states its units, its source, the range it was fitted in, and where its paper contradicts
# itself.

# %%
from kling_jax.scaling import published

law = published.get("yin2024")
print(law.source)
for warning in law.notes[:2]:
  print("*", warning)
params, tokens = 1e9, 4e9
print(f"loss {law('loss', params=params, tokens=tokens):.4f}, rate {law('lr', params=params, tokens=tokens):.2e}")

# %%
import matplotlib.pyplot as plt
import numpy as np

surface = law.surface
plt.figure(figsize=(6, 3.5))
for flops in (1e18, 1e19, 1e20):
  best = surface.optimum(flops, law.rule)
  sizes = best.params * np.geomspace(0.1, 10, 40)
  lengths = flops / law.rule.per_token(sizes)
  plt.plot(sizes, surface(sizes, lengths), label=f"{flops:.0e} FLOPs")
  plt.plot(best.params, best.loss, "ko", markersize=4)
plt.xscale("log")
plt.xlabel("parameters")
plt.ylabel("loss")
plt.legend()
plt.show()

# %% [markdown]
# The curves are flat: a model of half the best size costs a tenth of a percent, and is twice as cheap to use.
#
# ## From a law to a run

# %%
# !kling sweep predict --law yin2024 --flops 1e20 --devices 8

# %% [markdown]
# ## Fit one
#
# A table of runs has columns `params, tokens, loss`. Papers publish such tables; put the file's path into
# `KLING_TABLE` (Gemstones' `wandb_df_for_fitting_hot.jsonl`, arXiv 2502.06857, is a good one). Without it, runs are
# drawn from the law above with the noise that the paper reports, so that you can see whether the fit finds its way
# back.

# %%
import csv

TABLE = os.environ.get("KLING_TABLE", "")
if not TABLE:
  TABLE = "runs.csv"
  noise = np.random.default_rng(0)
  with open(TABLE, "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(["params", "tokens", "loss"])
    for flops in np.geomspace(3e17, 6e18, 5):
      best = surface.optimum(flops, law.rule)
      for size in best.params * np.geomspace(1 / 8, 8, 7):
        length = flops / law.rule.per_token(size)
        writer.writerow([size, length, surface(size, length) * (1 + noise.normal(0, 5e-4))])

# %%
from kling_jax.scaling import fit, table

runs = table.read(TABLE)
found = fit.fit(runs, fit.Options(draws=50 if SMALL else 1000))
low_high = found.intervals()
for name in ("E", "alpha", "beta"):
  low, high = low_high[name]
  print(f"{name:6} {getattr(found.surface, name):.4f}   90 %: {low:.4f} to {high:.4f}")

# %% tags=["check"]
if TABLE == "runs.csv":
  for name in ("alpha", "beta"):
    low, high = low_high[name]
    assert low - 0.1 < getattr(surface, name) < high + 0.1, (name, low, high)

# %%
plt.figure(figsize=(6, 3))
plt.semilogx(runs.tokens, 100 * (found.surface(runs.params, runs.tokens) / runs.loss - 1), "o")
plt.axhline(0, color="k", linewidth=0.5)
plt.xlabel("tokens")
plt.ylabel("law over run, %")
plt.show()

# %% [markdown]
# The command does the same, checks the law on runs that it held out, and writes a page with pictures:

# %%
# !kling sweep fit --table {TABLE} --draws 50 --out law

# %% [markdown]
# ## A sweep of your own
#
# A sweep is a Python file: a config, and a generator of what differs. Runs go through a ledger, so workers may come
# and go, on one machine or many. This one is far too small for a law: it shows the machinery. `shapes_tiny` is a real
# one, 17 minutes of a core.

# %%
import pathlib

_ = pathlib.Path("my_sweep.py").write_text(f"""
from kling_jax import config
from kling_jax.scaling import design


def get_config():
  c = config.load("video_dit:runlocal")
  c.model.conditions = ()
  c.codec.channels = 4
  c.text.width, c.text.depth, c.text.tokens = 16, 1, 32
  c.data.sources = ("worlds:shapes-v1?count={64 if SMALL else 1024}&seed=0",)
  c.data.fps = 3.6
  c.optimizer.warmup = 2
  c.validation.rows = 16
  c.checkpoint.every = 0
  c.log.every = 1000
  return c


def sweep():
  for size in {("d16x2",) if SMALL else ("d16x2", "d32x2")}:
    yield from design.grid(get_config(), size, horizons={(3840.0, 7680.0) if SMALL else (2e4, 4e4, 8e4)},
                           batches=(8,), rates={(6e-3,) if SMALL else (3e-3, 6e-3)})
""")

# %%
# !kling sweep design my_sweep.py
# !kling sweep run my_sweep.py --workdir sweep --workers 1
# !kling sweep status my_sweep.py --workdir sweep --points points.csv

# %%
points = table.read("points.csv")
plt.figure(figsize=(6, 3))
for size in np.unique(points.params):
  mine = points.take(points.params == size)
  plt.loglog(mine.tokens, mine.loss, "o-", label=f"{size:.0f} parameters")
plt.xlabel("tokens")
plt.ylabel("validation loss")
plt.legend()
plt.show()

# %% tags=["check"]
assert len(points) >= 2 and np.isfinite(points.loss).all()
assert points.loss[points.tokens.argmax()] < points.loss[points.tokens.argmin()], "more tokens, less loss"
