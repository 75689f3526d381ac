"""A rollout with its caches beside the same work without them, in one run.

  python benchmarks/rollout.py [--preset tiny] [--parts language,video,whole] [--clips 2,8,24] [--long 100] [--json OUT]

Language model: writing the dynamics of a clip, reading its state and looking at it. `cached` is what `kling rollout`
runs, in full, for every number of clips. `every clip` reads the whole past again at each clip and is cached within it;
`every token` reads it again for each token, too. Both read a sequence that is padded to the clips asked for, as code
without a cache does that compiles once. Their time is the measured time of one such pass times the number of passes
(and, for `every clip`, the cached time of the rest), so it is a product and not a run.
Video: one clip with its context read once, and with the context beside the clip in every call of the sampler.
Weights are random: the language model then writes every clip's dynamics to the last place, the longest case.
"""

import argparse
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kling_jax import config as config_lib
from kling_jax.diffusion import guidance, sampler
from kling_jax.nn import params as params_lib
from kling_jax.nn import rng
from kling_jax.nn.params import Params
from kling_jax.train import task
from kling_jax.train.tasks.owl import OwlTask
from kling_jax.world import film, sequence
from kling_jax.world.rollout import Action, World


def best(run, times: int = 3) -> float:
  """Seconds of the fastest of some runs, after one that compiles."""
  jax.block_until_ready(run())
  spans = []
  for _ in range(times):
    start = time.perf_counter()
    jax.block_until_ready(run())
    spans.append(time.perf_counter() - start)
  return min(spans)


class Bench:
  """One preset with random weights, one row."""

  def __init__(self, preset: str):
    job = task.make(config_lib.load(f"owl:preset={preset}"))
    assert isinstance(job, OwlTask)
    self.job, self.world = job, job.world(job.camera())
    self.params: Params = params_lib.create(lambda: job.init(nnx.Rngs(0)))
    d = job.config.data
    self.image = np.zeros((1, d.height, d.width, 3), np.uint8)
    self.frames = np.zeros((1, d.frames, d.height, d.width, 3), np.uint8)
    empty = lambda places: (np.zeros((1, places), np.int32), np.arange(places)[None] < 2)
    self.prompt = empty(d.prompt_tokens)
    self.action = Action(*map(jnp.asarray, (*empty(d.dynamics_tokens), [False], [False])))
    keys_B = rng.sample_keys(jax.random.key(0), 0, np.arange(1))
    self.begin = lambda: jax.jit(self.world.begin)(
      self.params, self.image, *self.prompt, np.array([d.fps], np.float32), keys_B
    )

  def cached(self, clips: int) -> list[float]:
    """Seconds of the language model's part of each clip."""
    world = self.world

    @jax.jit
    def clip(params, state):
      model = params_lib.merge(world.graph, params)
      cache = world.policy.make_room(world.layout, state.cache, state.clip)
      _, _, states, cache = world.think(model, cache, state, self.action)
      cache = world.look(model, cache, state.clip, self.frames)
      return states, state.__class__(**{**vars(state), "cache": cache, "clip": state.clip + 1})

    state = self.begin()
    jax.block_until_ready(clip(self.params, state))
    spans = []
    for _ in range(clips):
      start = time.perf_counter()
      states, state = jax.block_until_ready(clip(self.params, state))
      spans.append(time.perf_counter() - start)
    assert np.isfinite(np.asarray(states)).all()
    return spans

  def one_pass(self, clips: int) -> float:
    """Seconds of reading a whole sequence of `clips` clips once."""
    d, job = self.job.config.data, self.job
    dynamics = np.zeros((1, clips, d.dynamics_tokens), np.int32)
    shown = np.zeros((1, clips, d.key_frames, d.height, d.width, 3), np.uint8)
    walk = sequence.Walk(self.image, *self.prompt, dynamics, np.ones(dynamics.shape, bool), shown)

    @jax.jit
    def read(params):
      model = params_lib.merge(job.graph, params)
      return sequence.read(model, job.layout, job.policy, walk, dtype=job.dtype, logits=False).state_BOQD

    return best(lambda: read(self.params))

  def video(self) -> dict[str, float]:
    """Seconds of sampling one clip with the context cached, and with it in every call."""
    world, job = self.world, self.job
    t, h, w, c = job.latent_shape
    k, owl = world.context_frames, job.owl
    given = film.ClipConditions(
      state_BQD=jnp.zeros((1, owl.slots, owl.dit.text_width)), text_BLD=jnp.zeros((1, 8, owl.dit.text_width)),
      text_mask_BL=jnp.ones((1, 8), bool), fps_B=jnp.ones(1), context_BTHWC=jnp.zeros((1, k, h, w, c)),
      context_time_B=jnp.zeros(1), context_mask_BT=jnp.ones((1, k), bool),
    )  # fmt: skip
    keys_B, camera = rng.sample_keys(jax.random.key(0), 0, np.arange(1)), world.camera

    def plain(params):
      model = params_lib.merge(world.graph, params)
      branches = guidance.branches(camera.guidance)
      parts = [film.branch_conditions(model, world.process, camera, given, branch, keys_B) for branch in branches]
      stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

      def many(x, time, wanted):
        copies = len(wanted)
        part = jax.tree.map(lambda leaf: leaf[: copies * x.shape[0]], stacked)
        x = jnp.concatenate([x] * copies)
        return jnp.split(model.predict(x, jnp.full(x.shape[:1], time), part), copies)

      predict = guidance.guided(lambda x, time, drop: many(x, time, (drop,))[0], camera.guidance, predict_many=many)
      noise = rng.normal(rng.stream(keys_B, "noise"), (t, h, w, c))
      times = sampler.times(camera.steps, camera.shift)
      return sampler.sample(predict, noise, times, world.process, camera.method)

    def fast(params):
      return film.film(params_lib.merge(world.graph, params), world.process, camera, given, keys_B, t)

    spans = {}
    for name, way in (("cached_s", fast), ("plain_s", plain)):
      compiled = jax.jit(way)
      spans[name] = best(lambda compiled=compiled: compiled(self.params))
    return {**spans, "ratio": spans["plain_s"] / spans["cached_s"]}

  def whole(self) -> dict[str, float]:
    """Seconds to the first clip from image and prompt, cold and warm, and of a later clip."""
    world: World = self.world
    step = jax.jit(world.step)

    def first():
      return step(self.params, self.begin(), self.action)

    start = time.perf_counter()
    _, state = jax.block_until_ready(first())
    cold = time.perf_counter() - start
    later = best(lambda: step(self.params, state, self.action))
    return {"first_clip_cold_s": cold, "first_clip_s": best(first), "later_clip_s": later}


def language(bench: Bench, sizes: list[int], long: int) -> dict[str, Any]:
  """The language model's part, cached and not, printed and returned."""
  length, rows = bench.world.layout.dynamics, []
  spans = bench.cached(max(long, *sizes))
  for clips in sizes:
    one, cached = bench.one_pass(clips), sum(spans[:clips])
    again, token = cached + clips * one, clips * length * one  # a pass for each token that is written, and the state's
    rows.append({"clips": clips, "cached_s": cached, "one_pass_s": one, "every_clip_s": again, "every_token_s": token})
    print(f"{clips:3d} clips: cached {cached:7.2f} s, past again every clip {again:7.2f} s ({again / cached:.1f} x), "
          f"every token {token:8.2f} s ({token / cached:.1f} x)")  # fmt: skip
  early, late = float(np.median(spans[3:13])), float(np.median(spans[-10:]))
  print(f"a clip: {early:.3f} s around clip 8, {late:.3f} s at the end of {len(spans)}")
  return {"rows": rows, "clip_early_s": early, "clip_late_s": late, "long": len(spans)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--preset", default="tiny")
  parser.add_argument("--parts", default="language,video,whole")
  parser.add_argument("--clips", default="2,8,24")
  parser.add_argument("--long", type=int, default=100, help="clips of the rollout that shows whether time stays flat")
  parser.add_argument("--json", help="file to write the figures to")
  args = parser.parse_args()
  bench, parts = Bench(args.preset), args.parts.split(",")
  facts: dict[str, Any] = {"preset": args.preset, "device": jax.devices()[0].device_kind}
  if "language" in parts:
    facts["language"] = language(bench, [int(size) for size in args.clips.split(",")], args.long)
  if "video" in parts:
    facts["video"] = video = bench.video()
    print(f"video: {video['cached_s']:.3f} s a clip with its context cached, {video['plain_s']:.3f} s without "
          f"({video['ratio']:.2f} x)")  # fmt: skip
  if "whole" in parts:
    facts["whole"] = whole = bench.whole()
    print(f"first clip: {whole['first_clip_cold_s']:.1f} s with compiling, {whole['first_clip_s']:.3f} s without; "
          f"a later one {whole['later_clip_s']:.3f} s")  # fmt: skip
  if args.json:
    with open(args.json, "w", encoding="utf-8") as file:
      json.dump(facts, file, indent=2)


if __name__ == "__main__":
  main()
