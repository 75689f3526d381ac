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
# # Rate clips, train a suitability network
#
# What is good footage? Koala-36M asked people, and trained a network on their answers (VTSS). Nobody's ratings are
# public, so a lab collects its own. Here is the whole loop: rate, agree, train, calibrate, score.

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
# ## Clips worth arguing about
#
# Good shots, and the same shots damaged in known ways at four strengths. (With footage of yours: curate it, and skip
# this.)

# %%
from kling_jax.curation import weak_labels
from kling_jax.measure import clip as measure

kinds = ("blur", "noise", "borders")
names = ("blur", "noise", "borders", "clarity")  # sub-metrics that the network will read
scorers = measure.chosen(names)
if SMALL:
  weak_labels.SIDES = (96,)  # pixels of the shorter side
count = weak_labels.make([], "set", scenes=4 if SMALL else 8, kinds=kinds, scorers=scorers)
print(count, "clips")

# %%
import pyarrow.parquet as pq

from kling_jax.data import show
from kling_jax.data.records import RecordSource

source = RecordSource("set")
rows = pq.read_table("set/ratings.parquet").to_pylist()
number = {source.info(k).clip_id: k for k in range(len(source))}
ladder = [row for row in rows if row["video_id"] == rows[0]["video_id"] and row["degradation"] in ("original", "blur")]
show.videos({f"{row['degradation']} {row['strength']}": source.media(number[row["clip_id"]]) for row in ladder})

# %% [markdown]
# ## Rating
#
# `kling annotate --input set --db ratings.db` opens a page: clips in loops, keys 1 to 5. A hosted notebook cannot
# show it, so two formulas stand in for people here: both mark damage down, one is strict, and both are moody. Replace
# this cell by a table of your own with `clip_id, rater, rating`.

# %%
import csv

import numpy as np

mood = np.random.default_rng(0)
with open("ratings.csv", "w", newline="") as file:
  writer = csv.writer(file)
  writer.writerow(["clip_id", "rater", "rating"])
  for row in rows:
    for rater, strictness in (("formula-mild", 0.7), ("formula-strict", 1.1)):
      wish = 4.8 - strictness * row["strength"] + mood.normal(0, 0.3)
      writer.writerow([row["clip_id"], rater, int(np.clip(round(wish), 1, 5))])

# %%
# !kling annotate --input set --db ratings.db --import ratings.csv
# !kling annotate --db ratings.db --export labels.parquet

# %% [markdown]
# The export brings raters to one scale (their own mean and spread taken out, the paper's appendix B). Do they agree?

# %%
import matplotlib.pyplot as plt

from kling_jax.curation import ratings

labels = pq.read_table("labels.parquet").to_pylist()
raw = pq.read_table("labels_raw.parquet").to_pylist()
alpha = ratings.agreement([(row["clip_id"], row["rating"]) for row in raw])
strength = {row["clip_id"]: row["strength"] for row in rows}
plt.figure(figsize=(5, 3))
plt.scatter([strength[row["clip_id"]] for row in labels], [row["rating"] for row in labels], alpha=0.4)
plt.xlabel("strength of the damage")
plt.ylabel("label")
plt.title(f"Krippendorff's alpha {alpha:.2f}")
plt.show()

# %% tags=["check"]
assert len(labels) == count and len(raw) == 2 * count
assert 0.3 < alpha < 1

# %% [markdown]
# ## Train
#
# The smallest network: it reads sub-metrics, not pixels. `branches=dynamic+static+label` has the whole one, for a
# GPU. Source videos are split, never clips, so that no scene stands on both sides.

# %%
from kling_jax import config
from kling_jax.train import loop, metrics

c = config.load("tsa:runlocal,set=set,table=labels.parquet,fold=0", ["--config.labels.fold=0"])
c.steps = 40 if SMALL else 400
c.labels.folds = 2  # half of the scenes is held out
c.data.batch = 24
c.optimizer.warmup = 5
c.log.every = 2
summary = loop.run(c, "tsa")
curve = metrics.read("tsa/metrics.jsonl")
plt.figure(figsize=(5, 3))
plt.plot([row["step"] for row in curve], [row["loss"] for row in curve])
plt.xlabel("step")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# ## Calibrate, and look how good it is
#
# On the held-out scenes: a monotone map to the scale of the raters, and a report with intervals.

# %%
# !python -m kling_jax.train.tsa_export tsa vtss --name mine

# %%
from kling_jax.measure import vtss

mine = vtss.load("vtss")
held = [row for row in labels if row["clip_id"] in strength]
scored = [mine.vtss(measure.sampled(source.media(number[row["clip_id"]]), scorers, row["clip_id"]),
                    source.info(number[row["clip_id"]]).scores) for row in held]  # fmt: skip
plt.figure(figsize=(4, 4))
plt.scatter([row["rating"] for row in held], scored, alpha=0.4)
plt.xlabel("label")
plt.ylabel("VTSS of the network")
plt.show()

# %% tags=["check"]
losses = [row["loss"] for row in curve]
assert summary.finished and np.mean(losses[-5:]) < np.mean(losses[:5])
agreement = np.corrcoef([row["rating"] for row in held], scored)[0, 1]
assert agreement > 0.5, agreement

# %% [markdown]
# ## Use it
#
# In place of the shipped model. `vtss` stands in the table then, and rules may use it: `kling select --keep "vtss >=
# 3"`.

# %%
# !kling score --input set --scorers blur,noise,borders,clarity --model vtss | tail -4
# !kling select --input set --keep "vtss >= 3"

# %% tags=["check"]
table = pq.read_table("set/clips.parquet").to_pylist()
dropped = [strength[row["clip_id"]] for row in table if row["status"] == "dropped"]
kept = [strength[row["clip_id"]] for row in table if row["status"] == "kept"]
assert dropped and kept and np.mean(dropped) > np.mean(kept), "damage is what goes"
