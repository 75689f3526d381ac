"""The step cache on made-up blocks: what is computed, what stands in, and which calls the schedule leaves out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kling_jax.diffusion import process as process_lib
from kling_jax.diffusion import sampler as sampler_lib
from kling_jax.diffusion import step_cache

SHAPE = (2, 3, 4)


def run(compute: list[bool], ran: list[int]) -> tuple[np.ndarray, np.ndarray]:
  """States after each call of tanh blocks, and the ratios; `ran` is told each run of the blocks."""

  def blocks(x):
    jax.debug.callback(lambda: ran.append(1))
    return x + jnp.tanh(x)

  def body(carry, _):
    x, memory = carry
    y, memory = step_cache.around(blocks, x, memory, jnp.asarray(compute))
    return (0.5 * y, memory), y

  x = jax.random.normal(jax.random.key(0), SHAPE)
  memory = step_cache.start(SHAPE, x.dtype, len(compute))
  (_, memory), y = jax.jit(lambda: jax.lax.scan(body, (x, memory), length=len(compute)))()
  jax.effects_barrier()
  return np.asarray(y), np.asarray(memory.ratio_CB)


def plainly(compute: list[bool]) -> tuple[np.ndarray, np.ndarray]:
  """The same as a loop in NumPy."""
  x = np.asarray(jax.random.normal(jax.random.key(0), SHAPE))
  added, states, ratios = np.zeros(SHAPE), [], []
  for wanted in compute:
    ratio = np.ones(SHAPE[0])
    if wanted:
      before, added = added, np.tanh(x)
      lengths = [np.linalg.norm(r, axis=-1) for r in (added, before)]
      ratio = (lengths[0] / lengths[1]).mean(-1) if states else ratio
    states.append(x + added)
    ratios.append(ratio)
    x = 0.5 * states[-1]
  return np.stack(states), np.stack(ratios)


@pytest.mark.parametrize("compute", [[True] * 5, [True, True, False, False, True]])
def test_a_skipped_call_adds_what_was_added_before_and_runs_nothing(compute: list[bool]) -> None:
  ran: list[int] = []
  states, ratios = run(compute, ran)
  expected, expected_ratios = plainly(compute)
  np.testing.assert_allclose(states, expected, rtol=1e-5)
  np.testing.assert_allclose(ratios, expected_ratios, rtol=1e-5)
  assert len(ran) == sum(compute)


@given(st.lists(st.floats(0.5, 1.5), min_size=1, max_size=60), st.floats(0, 1))
def test_a_schedule_keeps_its_bounds(ratios: list[float], threshold: float) -> None:
  compute = step_cache.schedule(ratios, threshold)
  assert compute[: max(1, len(ratios) // 5)].all()
  assert threshold > 0 or compute.all()
  stretches = np.split(np.arange(len(ratios)), np.flatnonzero(compute))[1:]
  for first, *skipped in map(list, stretches):
    assert len(skipped) <= step_cache.MOST
    errors = [abs(1 - np.prod(ratios[first + 1 : call + 1])) for call in skipped]
    assert sum(errors) < threshold or not skipped
    after = first + len(skipped) + 1
    if after < len(ratios) and after > step_cache.FIRST * len(ratios) and len(skipped) < step_cache.MOST:
      assert sum(errors) + abs(1 - np.prod(ratios[first + 1 : after + 1])) >= threshold * (1 - 1e-9), "one too few"


def test_constant_residuals_are_computed_every_fifth_time() -> None:
  compute = step_cache.schedule([1.0] * 30, 1e-3)
  assert compute.sum() == 6 + 4 and compute[6:11].tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("method", ["euler", "heun", "ddim", "dpmpp_2m"])
def test_the_memory_goes_through_every_network_call(method: str) -> None:
  process = process_lib.make("flow")
  predict = lambda x, time, memory: (x * memory, memory + 1)
  sample = functools.partial(sampler_lib.sample_remembering, process=process, method=method, memory=jnp.int32(0))
  _, count = jax.jit(lambda x: sample(predict, x, sampler_lib.times(5)))(jnp.ones((1, 1, 1, 1, 1)))
  assert int(count) == sampler_lib.calls(5, method)
