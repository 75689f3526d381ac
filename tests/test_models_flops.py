"""FLOPs by formula against the products in the traced program, against XLA's own count, and against the paper's law."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from kling_jax.models import flops
from kling_jax.models.video_dit import VideoDiT, VideoDiTConfig, preset
from kling_jax.nn import params

CONFIG = VideoDiTConfig(width=1024, depth=2, heads=8, mlp_width=3072, latent_channels=8, text_width=512, state_width=64)
FRAMES, HEIGHT, WIDTH, TEXT, STATE, CONTEXT = 2, 16, 16, 24, 6, 1


def _forward(config, *, batch, scan, state):
  """A function of abstract arguments, and those: no array is made."""
  graph, shapes, _ = params.abstract(lambda: VideoDiT(config, rngs=nnx.Rngs(0)))
  array = lambda *shape: jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
  inputs = {
    "x_BTHWC": array(FRAMES, HEIGHT, WIDTH, config.latent_channels),
    "time": array(FRAMES),
    "text_BLD": array(TEXT, config.text_width),
    "scores_BM": array(len(config.conditions)),
    "context_BTHWC": array(CONTEXT, HEIGHT, WIDTH, config.latent_channels),
  }
  if state:
    inputs["state_BQD"] = array(STATE, config.state_width)
  run = lambda weights, inputs: params.merge(graph, weights)(**inputs, scan=scan)
  return run, (shapes, inputs)


def _by_formula(config, state):
  return flops.video_dit_forward(
    config, FRAMES, HEIGHT, WIDTH, TEXT, context_frames=CONTEXT, state_len=STATE * state, times=FRAMES + CONTEXT
  )


def _products(jaxpr) -> int:
  """FLOPs of every dot_general of a jaxpr, those inside a scan once per turn."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracting, _), _ = equation.params["dimension_numbers"]
      lhs = equation.invars[0].aval.shape
      total += 2 * math.prod(lhs[axis] for axis in contracting) * equation.outvars[0].aval.size
    turns = equation.params["length"] if equation.primitive.name == "scan" else 1
    total += turns * sum(_products(sub) for sub in jaxprs_in_params(equation.params))
  return total


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("scan", [False, True])
def test_formula_is_every_product_of_the_program(scan, state):
  run, arguments = _forward(CONFIG, batch=2, scan=scan, state=state)
  assert _products(jax.make_jaxpr(run)(*arguments).jaxpr) == 2 * _by_formula(CONFIG, state)


def test_formula_is_within_a_percent_of_what_xla_counts():
  """XLA adds elementwise work, and counts the body of a scan once; so the layers are unrolled, and wide."""
  run, arguments = _forward(CONFIG, batch=1, scan=False, state=True)
  counted = jax.jit(run).lower(*arguments).compile().cost_analysis()["flops"]
  assert counted == pytest.approx(_by_formula(CONFIG, True), rel=0.01)


def test_scaling_family_costs_what_the_paper_charges():
  """C_token = 3/4 N (7 + n/d) of arXiv 2411.17470, which leaves out text keys, cross scores, ends and modulation."""
  config = preset("n0.13b")
  frames, height, width = 5, 32, 32
  tokens = frames * (height // 2) * (width // 2)
  parts = flops.video_dit_parts(config, frames, height, width, 77)
  charged = sum(parts[part] for part in ("self_projections", "self_attention", "cross_projections", "mlp"))
  law = 0.75 * config.width**3 * (7 + tokens / config.width)
  assert flops.TRAINING * charged == pytest.approx(tokens * law, rel=1e-12)


def test_what_is_not_given_is_not_charged():
  plain = dataclasses.replace(CONFIG, state_width=None)
  sizes = (FRAMES, HEIGHT, WIDTH, TEXT)
  assert flops.video_dit_forward(CONFIG, *sizes) == flops.video_dit_forward(plain, *sizes)
  assert flops.video_dit_parts(CONFIG, *sizes, state_len=STATE)["state"] > 0
