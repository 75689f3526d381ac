"""What a program has to do on one device, by formula: FLOPs, those done twice, bytes through the memory bus."""

import dataclasses
import math
from collections.abc import Mapping

from kling_jax.diffusion import guidance as guidance_lib
from kling_jax.diffusion import sampler as sampler_lib
from kling_jax.models import flops, language_model, video_vae
from kling_jax.models.video_dit import VideoDiTConfig
from kling_jax.plan import roofline
from kling_jax.plan.programs import largest_bucket
from kling_jax.train.task import Task
from kling_jax.train.tasks.owl import OwlTask
from kling_jax.train.tasks.video_dit import VideoDiTTask

# What a remat policy does not compute again: parts of `flops.video_dit_parts` that need nothing else.
KEPT = {"qkv": ("cross_text",), "attention": ("self_attention", "cross_attention"), "mlp_hidden": ()}
BLOCK = ("self_projections", "self_attention", "cross_projections", "cross_text", "cross_attention", "state", "mlp")


@dataclasses.dataclass(frozen=True)
class Stack:
  """A stack of equal transformer blocks that is scanned, as one training step runs it.

  Attributes:
    prefix: of the paths of its parameters.
    tokens: of a row. rows: of a row of the batch, e.g. clips.
    width, mlp_width, heads, head_size, depth: of a block. gated: whether its MLP has two hidden arrays (SwiGLU).
    text: tokens of a row that cross-attention asks; 0 for a stack without.
    remat: its policy.
    products, attention: forward FLOPs of one row of the batch: of all blocks, and of attention's two products in them.
    kept: FLOPs of the forward that the backward pass finds saved.
  """

  prefix: str
  tokens: int
  width: int
  mlp_width: int
  heads: int
  head_size: int
  depth: int
  gated: bool
  text: int
  remat: str
  products: float
  attention: float
  kept: float


def stacks(job: Task) -> list[Stack]:
  """The stacks of a task's training step at its largest bucket; [] for networks that are no transformers."""
  c = job.config
  if isinstance(job, VideoDiTTask):
    frames, height, width, _ = job.geometry.latent_shape(*c.data.buckets[largest_bucket(job)])
    parts = flops.video_dit_parts(job.dit, frames, height, width, c.text.tokens)
    return [_dit_stack(job.dit, "dit.blocks.", math.prod(job.dit.grid(frames, height, width)), c.text.tokens, parts)]
  if not isinstance(job, OwlTask):
    return []
  lm, length = job.owl.lm, job.layout.length(c.data.clips)
  products = language_model.forward_flops(lm, length, predicted=0)
  attention = lm.depth * 2.0 * length**2 * lm.heads * lm.head_size
  kept = attention if "attention" in lm.remat else 0.0
  found = [
    Stack("lm.layers.", length, lm.width, lm.mlp_width, lm.heads, lm.head_size, lm.depth, True, 0, lm.remat, products,
          attention, kept)
  ]  # fmt: skip
  if c.stage != "align":
    frames, height, width, _ = job.latent_shape
    given = {"context_frames": c.context.frames, "state_len": job.owl.slots}
    parts = flops.video_dit_parts(job.owl.dit, frames, height, width, job.layout.dynamics, **given)
    tokens = math.prod(job.owl.dit.grid(frames + c.context.frames, height, width))
    found.append(_dit_stack(job.owl.dit, "video.dit.blocks.", tokens, job.layout.dynamics, parts))
  return found


def _dit_stack(dit: VideoDiTConfig, prefix: str, tokens: int, text: int, parts: Mapping[str, float]) -> Stack:
  block = sum(parts[name] for name in BLOCK)
  attention = parts["self_attention"] + parts["cross_attention"]
  names = dit.remat.partition(":")[2].split(",")
  kept = block if dit.remat == "none" else sum(parts[part] for name in names for part in KEPT.get(name, ()))
  if "qkv" in names:  # three of the four projections of self-attention, the queries of cross-attention
    kept += 0.75 * parts["self_projections"] + 0.5 * parts["cross_projections"]
  if "mlp_hidden" in names:
    kept += 0.5 * parts["mlp"]
  return Stack(prefix, tokens, dit.width, dit.mlp_width, dit.heads, dit.head_size, dit.depth, False, text, dit.remat,
               block, attention, kept)  # fmt: skip


def of(name: str, job: Task, mesh: Mapping[str, int], state_bytes: int, activation_bytes: int) -> roofline.Work:
  """What program `name` has to do on one device.

  Args:
    mesh: sizes of its axes.
    state_bytes: what the step reads and writes of parameters, moments and averages.
    activation_bytes: what the forward pass leaves for the backward.
  """
  return {"train": _train, "sample": _sample, "rollout": _rollout}[name](job, mesh, state_bytes, activation_bytes)


def _train(job: Task, mesh: Mapping[str, int], state_bytes: int, activation_bytes: int) -> roofline.Work:
  devices = math.prod(mesh.values())
  batch = job.batch_spec(largest_bucket(job))
  rows = next(iter(batch.values())).shape[0]
  total = job.step_cost(batch)[1]
  again = sum(0.0 if one.remat == "none" else one.products - one.kept for one in stacks(job)) * rows
  # Attention's products: twice forward where done again, and five in the kernels' backward, which is 2.5 forwards.
  attention = (
    sum(one.attention * (3 + (one.remat != "none" and "attention" not in one.remat)) for one in stacks(job)) * rows
  )
  head = max((one.head_size for one in stacks(job)), default=128)
  traffic = 2.0 * (state_bytes + activation_bytes)  # each once in and once out
  return roofline.Work(total / devices, again / devices, attention / devices, head, traffic)


def _sample(job: Task, mesh: Mapping[str, int], state_bytes: int, activation_bytes: int) -> roofline.Work:
  del activation_bytes
  assert isinstance(job, VideoDiTTask)
  c, bucket = job.config, job.config.data.buckets[largest_bucket(job)]
  recipe = job.recipe(*bucket)
  calls = sampler_lib.calls(recipe.steps, recipe.method) * len(guidance_lib.branches(recipe.guidance))
  latent = job.geometry.latent_shape(*bucket)[:3]
  parts = flops.video_dit_parts(job.dit, *latent, c.text.tokens)
  shared = mesh["context"] * mesh["tensor"]
  decode = 0.0
  if isinstance(job.geometry, video_vae.VideoVAEConfig):  # every device of a row decodes all of it
    decode = video_vae.forward_flops(job.geometry, *bucket)[1]
  attention = calls * (parts["self_attention"] + parts["cross_attention"]) / shared
  total = calls * sum(parts.values()) / shared + decode
  return roofline.Work(total, 0.0, attention, job.dit.head_size, float(calls * state_bytes))


def _rollout(job: Task, mesh: Mapping[str, int], state_bytes: int, activation_bytes: int) -> roofline.Work:
  """The Video DiT's calls and one pass of the language model over a clip; each written byte reads its weights."""
  del activation_bytes
  assert isinstance(job, OwlTask)
  camera, layout = job.camera(), job.layout
  calls = sampler_lib.calls(camera.steps, camera.method) * len(guidance_lib.branches(camera.guidance))
  dit, shared = job.owl.dit, mesh["context"] * mesh["tensor"]
  parts = flops.video_dit_parts(dit, *job.latent_shape[:3], layout.dynamics, state_len=job.owl.slots)
  reading = language_model.forward_flops(job.owl.lm, layout.clip, predicted=layout.dynamics)
  attention = calls * (parts["self_attention"] + parts["cross_attention"]) / shared
  total = (calls * sum(parts.values()) + reading) / shared
  return roofline.Work(total, 0.0, attention, dit.head_size, float((calls + layout.dynamics) * state_bytes))
