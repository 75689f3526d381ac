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
# # Curate your own videos
#
# From a folder of raw footage to a set of clips that training reads: cuts found, about thirty scores measured, and
# every clip that is left out has a reason. Nothing is deleted on the way.

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
# ## Footage
#
# Point `VIDEOS` at a folder of yours (in Colab: upload, or mount Drive). Without one, films with known cuts are
# rendered, and a broken file is put among them, since real folders have some.

# %%
import pathlib

VIDEOS = os.environ.get("KLING_VIDEOS", "")
if not VIDEOS:
  from kling_jax.data import films

  VIDEOS = "films"
  films.render_films(VIDEOS, count=2 if SMALL else 6, seconds=4.0 if SMALL else 12.0, size=(72, 128), seed=1)
  pathlib.Path(VIDEOS, "half_a_download.mp4").write_bytes(b"\x00\x00\x00\x18ftypisom")
print(sorted(path.name for path in pathlib.Path(VIDEOS).iterdir()))

# %% [markdown]
# ## Where are the cuts?

# %%
from kling_jax.curation import split
from kling_jax.data import folder

first = folder.find_videos(VIDEOS)[0]
video = split.split(first)
for t in video.to_json()["transitions"]:  # the same that `kling split --json` prints
  print("{kind:9} frames {start_frame:4} to {end_frame:4}, {start_s:6.2f} s, confidence {confidence:.2f}".format(**t))

# %% [markdown]
# ## Curate
#
# One command; started again after a kill it goes on at the clip where it was.

# %%
# !kling curate --input {VIDEOS} --output set

# %% [markdown]
# ## What came out
#
# `set/clips.parquet` has a row for every clip, kept or dropped. It is a table like any other.

# %%
import json

import pyarrow.parquet as pq

table = pq.read_table("set/clips.parquet").to_pylist()
for row in table[:6]:
  print(row["status"], row["videoID"], row["timestamp"], "|", row["caption"][:60], "|", row["status_reason"])
refused = [json.loads(line) for line in open("set/quarantine.jsonl")]
print("refused:", [(pathlib.Path(row["source"]).name, row["reason"]) for row in refused])

# %% tags=["check"]
assert table and any(row["status"] == "kept" for row in table)
if VIDEOS == "films":
  truth = json.loads(pathlib.Path("films/films.json").read_text())["films"]
  assert len(video.transitions) == len(truth[0]["transitions"]), "every cut of the first film is found, and no other"
  assert [row["reason"] for row in refused] == ["truncated"] or [row["reason"] for row in refused] == ["unreadable"]

# %%
from kling_jax.data import show
from kling_jax.data.records import RecordSource

source = RecordSource("set", status=None)  # dropped clips, too
shown = {}
for k in range(min(len(source), 6)):
  value = {name: score.value for name, score in source.info(k).scores.items()}
  label = f"{k}: motion {value['motion']:.3f}, clarity {value['clarity']:.2f}, vtss {value['vtss']:.1f}"
  shown[label] = source.media(k)
show.videos(shown, width=200)

# %% [markdown]
# ## Scores
#
# Raw values in stated units. Rules look at them; conditions of the Video DiT are made of them.

# %%
import matplotlib.pyplot as plt

names = ("motion", "camera_motion", "clarity", "aesthetic")
figure, axes = plt.subplots(1, len(names), figsize=(12, 2.5))
for axis, name in zip(axes, names, strict=True):
  values = [info.scores[name].value for info in map(source.info, range(len(source))) if name in info.scores]
  axis.hist(values, bins=12)
  axis.set_title(name)
plt.show()

# %% [markdown]
# ## What would a rule do?
#
# Ask first, then do it. A rule is an expression that is true for clips to keep.

# %%
# !kling select --input set --keep "motion >= quantile(motion, 0.3)" --keep "clarity >= 0.3" --what_if
# !kling select --input set --keep "motion >= quantile(motion, 0.3)" --keep "clarity >= 0.3"

# %%
kept = pq.read_table("set/clips.parquet").to_pylist()
for row in kept:
  if row["status"] != "kept":
    print(row["videoID"], "|", row["status_reason"])

# %% tags=["check"]
assert len(kept) == len(table), "selection deletes nothing"
assert 0 < sum(row["status"] == "kept" for row in kept) < len(kept)
assert all(row["status_reason"] for row in kept if row["status"] != "kept"), "and says why"

# %% [markdown]
# `set/report/index.html` has the funnel, histograms with limits to drag, contact sheets, and copies. Whole? Ask:

# %%
# !kling data verify --input set

# %% [markdown]
# Train on it: `kling train --config configs/video_dit.py:size=S,res=64 --workdir run
# --config.data.sources="('set/',)"`.
