"""What a config costs before it runs: parameters by part, tokens of a sample, FLOPs a token; Video DiTs and Owl."""

import dataclasses
import functools
import json

import jax
import ml_collections

from kling_jax import config as config_lib
from kling_jax.errors import ConfigError
from kling_jax.models.flop_rules import EXACT, FlopRule
from kling_jax.train import task
from kling_jax.train.tasks.owl import OwlTask
from kling_jax.train.tasks.video_dit import VideoDiTTask

# Where a trained parameter is counted, by the start of its name; the law's N is `blocks` alone.
PARTS = {
  "dit.blocks.": "blocks", "dit.patch.": "ends", "dit.head.": "ends", "dit.time.": "conditions",
  "dit.conditions.": "conditions", "dit.fps.": "conditions", "dit.modulation.": "conditions", "dit.text.": "text",
  "null_text": "text", "text.": "text",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cost:
  """The size of a run's model and clip. Of a world model: all that is trained, and a walk in place of a clip.

  Attributes:
    params: N of the laws: the matrices of the blocks, 16 width^2 depth in the scaling family (embeddings, modulation,
      norms, biases and text encoder are not in it).
    params_by_part: all trained parameters: blocks (the matrices), vectors (norms, biases, tables of the blocks), ends,
      conditions, text.
    width, depth: of the model. clip_tokens: tokens of a clip, which is also n_ctx, what a token attends to.
    flops_per_token: training FLOPs a token, all matrix products of the Video DiT (rule "exact").
  """

  params: int
  params_by_part: dict[str, int]
  width: int
  depth: int
  clip_tokens: int
  flops_per_token: float

  def flops(self, tokens: float, rule: str = EXACT) -> float:
    """Training FLOPs of `tokens` by a rule: exact, 6nt, cross_dit."""
    if rule == EXACT:
      return tokens * self.flops_per_token
    context = self.clip_tokens if rule == "cross_dit" else None
    return float(FlopRule(rule, context).flops(self.params, tokens, self.width))


def of(config: ml_collections.ConfigDict) -> Cost:
  """The cost of an `owl` config, or of a `video_dit` config with one bucket.

  Raises:
    ConfigError: another task, several buckets, or a size that does not exist.
  """
  if config.get("task") not in ("video_dit", "owl"):
    raise ConfigError(f"sweeps count tokens of the tasks 'video_dit' and 'owl', not {config.get('task')!r}")
  if config.task == "video_dit" and len(config.data.buckets) != 1:
    raise ConfigError(f"data.buckets has {len(config.data.buckets)} buckets; a law of tokens needs one size of clip")
  values = config_lib.plain(config) | {"seed": 0, "steps": 1}  # what runs of one size differ in
  values["optimizer"] |= {"lr": 1e-3, "warmup": 0}
  values["ema"] |= {"decay": 0.9}
  values["data"] |= {"batch": 1}
  return _of(json.dumps(values, sort_keys=True))


@functools.lru_cache(maxsize=256)
def _of(values: str) -> Cost:
  config = config_lib.restore(json.loads(values))
  job = task.make(config)
  if isinstance(job, OwlTask):
    return _of_world(job)
  assert isinstance(job, VideoDiTTask)
  counts = {"blocks": 0, "vectors": 0, "ends": 0, "conditions": 0, "text": 0}
  for name, leaf in job.shapes.items():
    if job.trainable(name):
      part = next(part for start, part in PARTS.items() if name.startswith(start))
      counts["vectors" if part == "blocks" and not name.endswith("kernel") else part] += leaf.size
  frames, height, width = config.data.buckets[0]
  tokens, flops = job.step_cost({"frames": jax.ShapeDtypeStruct((1, frames, height, width, 3), "uint8")})
  return Cost(
    params=counts["blocks"],
    params_by_part=counts,
    width=job.dit.width,
    depth=job.dit.depth,
    clip_tokens=tokens,
    flops_per_token=flops / tokens,
  )


def _of_world(job: OwlTask) -> Cost:
  counts = {"language": 0, "state": 0, "video": 0}
  for name, leaf in job.shapes.items():
    if job.trainable(name):
      part = {"lm": "language", "lora": "language", "video": "video"}.get(name.partition(".")[0], "state")
      counts[part] += leaf.size
  d, dit = job.config.data, job.owl.dit
  shape = (1, d.clips, d.frames, d.height, d.width, 3)
  tokens, flops = job.step_cost({"frames": jax.ShapeDtypeStruct(shape, "uint8")})
  return Cost(sum(counts.values()), counts, dit.width, dit.depth, tokens, flops / tokens)
