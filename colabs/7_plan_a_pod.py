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
# # Plan a pod before you rent it
#
# Which slice does a model need, how is it laid out, and how fast can it be at best? Memory is predicted in a second;
# then the real TPU compiler compiles the real training step, here, on a CPU. No TPU and no account are needed.

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
  wanted = f"kling_jax[demo,sweep,tpu] @ {SOURCE}" if "://" in SOURCE else f"{SOURCE}[demo,sweep,tpu]"
  subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", wanted], check=True)
logging.getLogger("absl").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "os.fork")  # `!` starts programs beside JAX, which is harmless

# %% [markdown]
# ## Does it fit?
#
# Wan 2.1's shapes on a few slices. FSDP takes all devices unless the config says otherwise. What cannot fit is
# refused with what would.

# %%
from kling_jax.plan import topology

topology.compiler()  # before JAX is imported: this process plans, it does not compute

from kling_jax import config
from kling_jax.errors import ConfigError, MeshError
from kling_jax.plan import plan

MODELS = {"1.3b at 480p": "video_dit:size=1.3b,res=480p", "14b at 720p": "video_dit:size=14b,res=720p"}
SLICES = ("v5e:4x4", "v5p:2x2x4", "v6e:8x8", "v5p:4x4x4")


def predicted(spec, name, **mesh):
  """The plan of a config on a slice, nothing compiled."""
  where = topology.Topology.parse(name)
  c = config.load(spec, ["--config.codec.weights=WAN/vae", "--config.precision=bfloat16"])
  c.mesh.update(mesh)
  c.data.batch = where.size // c.mesh.context  # a clip for each part of the mesh that holds whole clips
  return plan.plan(c, where, compile_=False)


plans = {}
for model, spec in MODELS.items():
  for name in SLICES:
    try:
      plans[model, name] = predicted(spec, name)
    except (MeshError, ConfigError) as error:
      print(f"{error!s}\n")

# %% [markdown]
# The 14b at 720p has 75,600 tokens a clip. Cut them over four devices, and it fits.

# %%
plans["14b at 720p, context 4", "v5p:4x4x4"] = predicted(MODELS["14b at 720p"], "v5p:4x4x4", context=4)

# %%
import matplotlib.pyplot as plt

GIB = 2**30
kinds = list(dict.fromkeys(kind for one in plans.values() for kind in one.predicted.by_kind))
labels = [f"{model}\n{name}" for model, name in plans]
bottom = [0.0] * len(plans)
plt.figure(figsize=(10, 3.5))
for kind in kinds:
  sizes = [one.predicted.by_kind.get(kind, 0) / GIB for one in plans.values()]
  plt.bar(labels, sizes, bottom=bottom, label=kind)
  bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
for place, one in enumerate(plans.values()):
  plt.hlines(one.topology.chip.hbm / GIB, place - 0.4, place + 0.4, color="k")
plt.ylabel("GiB a device; line: what there is")
plt.legend(fontsize=8)
plt.show()

# %% tags=["check"]
assert plans, "something fits somewhere"
assert all(one.predicted.total <= one.topology.chip.hbm for one in plans.values()), "what does not fit is refused"
assert all(sum(one.predicted.by_kind.values()) == one.predicted.total for one in plans.values())

# %% [markdown]
# ## Which mesh?
#
# Long videos have many tokens: cutting them over `context` leaves less on each device. `search` tries every mesh that
# divides the model and orders them by an estimate of the step; of those that are alike, the one that needs least
# memory is first.

# %%
best = plan.search(
  config.load("video_dit:size=1.3b,res=480p", ["--config.codec.weights=WAN/vae", "--config.precision=bfloat16"]),
  topology.Topology.parse("v5p:2x2x4"), compile_=0,
)  # fmt: skip
for one in best[:5]:
  mesh = " x ".join(f"{axis} {size}" for axis, size in one.mesh.items() if size > 1)
  print(f"{mesh:32} {one.predicted.total / GIB:6.1f} GiB   about {one.estimate_s:6.2f} s a step")

# %% tags=["check"]
assert best[0].estimate_s <= 1.03 * min(one.estimate_s for one in best), "what differs by less counts as equal"

# %% [markdown]
# ## Ask the compiler
#
# A prediction is a formula; this is XLA for the TPU. It says what the program really needs, what it sends over which
# axis, and what the roofline allows. (A small model here; the 14b takes minutes. In the small mode of this notebook
# nothing is compiled.)

# %%
WORDS = "--predict" if SMALL else "--programs train"
# !kling plan --config video_dit:size=S,res=128 --topology v5p:2x2x1 {WORDS}

# %% [markdown]
# ## How long, and what will it cost?
#
# FLOPs of a run over what the slice can do. Put in the share of the peak that you expect (30 % is what others
# published for 14b at 720p on v5p) and your own price.

# %%
from kling_jax.scaling import published

law, flops, share = published.get("yin2024"), 1e21, 0.3
best_size = law.surface.optimum(flops, law.rule)
for name in SLICES:
  where = topology.Topology.parse(name)
  days = flops / (where.chips * where.chip.flops * share) / 86_400
  print(f"{name:12} {where.chips:4} chips   {days:7.2f} days   for {best_size.params:.2e} parameters")

# %% tags=["check"]
fast, slow = (topology.Topology.parse(name) for name in ("v5p:4x4x4", "v5p:2x2x4"))
assert fast.chips == 4 * slow.chips and fast.chip == slow.chip
