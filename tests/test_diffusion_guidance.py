"""Guidance: the nested formula, the identity at scale 1, which network calls are made, interval and rescale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_jax.diffusion import guidance as guidance_lib
from kling_jax.diffusion import process as process_lib
from kling_jax.diffusion.guidance import FULL, Guidance
from kling_jax.errors import ConfigError

TEXT, SCORES, ALL = frozenset({"text"}), frozenset({"text", "scores"}), frozenset({"text", "scores", "image"})
generator = np.random.default_rng(5)
OUTPUT = {drop: generator.standard_normal((2, 3, 4, 4, 2)).astype(np.float32) for drop in (FULL, TEXT, SCORES, ALL)}
x = generator.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
scales = st.one_of(st.sampled_from([0.0, 1.0, 6.0]), st.floats(-2, 12))


def combined(guidance, time=0.5):
  return guidance_lib.combine([OUTPUT[drop] for drop in guidance_lib.branches(guidance)], guidance, time)


def counting_predict():
  calls = []

  def predict(x, time, drop):
    jax.debug.callback(lambda: calls.append(drop))
    return jnp.asarray(OUTPUT[drop]) + time

  return predict, calls


@settings(max_examples=100, deadline=None)
@given(text=scales, scores=scales, image=scales)
def test_is_the_nested_composition(text, scores, image):
  expected = OUTPUT[ALL].astype(np.float64)
  expected = expected + image * (OUTPUT[SCORES].astype(np.float64) - OUTPUT[ALL])
  expected = expected + scores * (OUTPUT[TEXT].astype(np.float64) - OUTPUT[SCORES])
  expected = expected + text * (OUTPUT[FULL].astype(np.float64) - OUTPUT[TEXT])
  np.testing.assert_allclose(combined(Guidance(text, scores, image)), expected, atol=2e-4)


@settings(max_examples=50, deadline=None)
@given(text=scales, scores=scales, image=scales)
def test_agreeing_branches_are_left_alone(text, scores, image):
  guidance = Guidance(text, scores, image)
  same = [OUTPUT[FULL]] * len(guidance_lib.branches(guidance))
  np.testing.assert_allclose(guidance_lib.combine(same, guidance, 0.5), OUTPUT[FULL], atol=2e-4)


def test_scale_one_is_one_call_and_the_identity():
  predict, calls = counting_predict()
  for guidance in (Guidance(), Guidance(rescale=0.7), Guidance(interval=(0.2, 0.8))):
    calls.clear()
    found = guidance_lib.guided(predict, guidance)(x, 0.5)
    jax.effects_barrier()
    assert calls == [FULL]
    np.testing.assert_array_equal(found, OUTPUT[FULL] + np.float32(0.5))


@pytest.mark.parametrize(
  ("guidance", "expected"),
  [
    (Guidance(), (FULL,)),
    (Guidance(text=6), (FULL, TEXT)),
    (Guidance(text=6, scores=6), (FULL, SCORES)),
    (Guidance(text=3, scores=3, image=3), (FULL, ALL)),
    (Guidance(text=6, scores=2), (FULL, TEXT, SCORES)),
    (Guidance(text=6, scores=2, image=1.5), (FULL, TEXT, SCORES, ALL)),
    (Guidance(text=0), (TEXT,)),
    (Guidance(text=0, rescale=0.5), (FULL, TEXT)),
    (Guidance(text=0, interval=(0.1, 0.9)), (FULL, TEXT)),
    (Guidance(text=0, scores=0, image=0), (ALL,)),
  ],
)
def test_only_calls_that_count_are_made(guidance, expected):
  assert guidance_lib.branches(guidance) == expected


@pytest.mark.parametrize(
  ("guidance", "drop"),
  [
    (Guidance(text=0), TEXT),
    (Guidance(text=0, scores=0), SCORES),
    (Guidance(text=0, scores=0, image=0), ALL),
  ],
)
def test_scale_zero_is_a_dropped_condition(guidance, drop):
  np.testing.assert_array_equal(combined(guidance), OUTPUT[drop])


def test_interval_limits_guidance_and_network_calls():
  predict, calls = counting_predict()
  guidance = Guidance(text=6, interval=(0.2, 0.8))
  wrapped = jax.jit(guidance_lib.guided(predict, guidance))
  always = guidance_lib.guided(predict, Guidance(text=6))
  for time, inside in ((1.0, False), (0.81, False), (0.8, True), (0.5, True), (0.2, True), (0.1, False)):
    calls.clear()
    found = wrapped(x, jnp.float32(time))
    jax.effects_barrier()
    assert sorted(calls, key=len) == ([FULL, TEXT] if inside else [FULL])
    expected = always(x, time) if inside else OUTPUT[FULL] + np.float32(time)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_interval_is_decided_for_each_sample():
  found = combined(Guidance(text=6, interval=(0.2, 0.8)), jnp.array([0.9, 0.5]))
  np.testing.assert_array_equal(found[0], OUTPUT[FULL][0])
  np.testing.assert_allclose(found[1], combined(Guidance(text=6))[1], atol=1e-6)


def test_rescale_restores_the_deviation_of_each_sample():
  plain, full = combined(Guidance(text=6)), combined(Guidance(text=6, rescale=1.0))
  np.testing.assert_allclose(full.std((1, 2, 3, 4)), OUTPUT[FULL].std((1, 2, 3, 4)), rtol=1e-5)
  np.testing.assert_allclose(combined(Guidance(text=6, rescale=0.7)), 0.7 * full + 0.3 * plain, atol=1e-5)
  single = guidance_lib.combine([OUTPUT[FULL][:1], OUTPUT[TEXT][:1]], Guidance(text=6, rescale=1.0), 0.5)
  np.testing.assert_allclose(single, full[:1], rtol=1e-5)


def test_branches_may_run_in_one_network_call():
  guidance = Guidance(text=6, scores=2, rescale=0.3)
  seen = []

  def predict_many(x, time, drops):
    seen.append(drops)
    return jnp.stack([OUTPUT[drop] for drop in drops]) + time

  predict, _ = counting_predict()
  found = guidance_lib.guided(predict, guidance, predict_many=predict_many)(x, 0.5)
  assert seen == [guidance_lib.branches(guidance)]
  np.testing.assert_allclose(found, guidance_lib.guided(predict, guidance)(x, 0.5), atol=1e-5)


NOISED = SCORES | {"detail"}  # history alone, at the level of the guidance
OUTPUT |= {drop: generator.standard_normal((2, 3, 4, 4, 2)).astype(np.float32) for drop in (NOISED, TEXT | {"detail"})}
OUTPUT[frozenset({"detail"})] = generator.standard_normal((2, 3, 4, 4, 2)).astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(text=scales, scores=scales, image=scales)
def test_fractional_history_exaggerates_what_the_noisy_history_says(text, scores, image):
  expected = OUTPUT[ALL].astype(np.float64)
  expected = expected + (OUTPUT[SCORES].astype(np.float64) - OUTPUT[ALL])
  expected = expected + (image - 1) * (OUTPUT[NOISED].astype(np.float64) - OUTPUT[ALL])
  expected = expected + scores * (OUTPUT[TEXT].astype(np.float64) - OUTPUT[SCORES])
  expected = expected + text * (OUTPUT[FULL].astype(np.float64) - OUTPUT[TEXT])
  guidance = Guidance(text, scores, image, history="fractional", level=0.4)
  np.testing.assert_allclose(combined(guidance), expected, atol=2e-4)


@settings(max_examples=50, deadline=None)
@given(text=scales, scores=scales, image=scales)
def test_stabilised_history_is_the_plain_composition_of_noisy_histories(text, scores, image):
  plain = Guidance(text, scores, image)
  noisy = Guidance(text, scores, image, history="stabilised", level=0.1)
  shown = {branch if "image" in branch else branch | {"detail"} for branch in guidance_lib.branches(plain)}
  assert set(guidance_lib.branches(noisy)) == shown
  outputs = [OUTPUT[branch - {"detail"}] for branch in guidance_lib.branches(noisy)]
  np.testing.assert_array_equal(guidance_lib.combine(outputs, noisy, 0.5), combined(plain))


def test_the_fullest_call_of_stabilised_history_is_a_noisy_one():
  predict, calls = counting_predict()
  full = frozenset({"detail"})
  for guidance in (Guidance(history="stabilised"), Guidance(history="stabilised", interval=(0.2, 0.8), text=6)):
    calls.clear()
    found = guidance_lib.guided(predict, guidance)(x, 0.9)
    jax.effects_barrier()
    assert calls == [full]
    np.testing.assert_array_equal(found, OUTPUT[full] + np.float32(0.9))


@pytest.mark.parametrize("name", ["flow", "v", "x"])
def test_guiding_the_prediction_is_guiding_the_estimates(name):
  process, guidance = process_lib.make(name), Guidance(text=4, scores=2, image=1.5)
  estimates = [process.estimate(OUTPUT[drop], x, 0.4) for drop in guidance_lib.branches(guidance)]
  together = process.estimate(combined(guidance), x, 0.4)
  for found, parts in zip(together, zip(*estimates, strict=True), strict=True):
    np.testing.assert_allclose(found, guidance_lib.combine(parts, guidance, 0.4), atol=1e-4)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"text": float("nan")}, "scale text"),
    ({"interval": (0.8, 0.2)}, "interval"),
    ({"interval": (0.0, 1.5)}, "interval"),
    ({"rescale": 1.1}, "rescale"),
    ({"history": "fraction"}, "did you mean 'fractional'"),
    ({"level": 1.5}, "noise level"),
  ],
)
def test_wrong_settings_are_named(options, message):
  with pytest.raises(ConfigError, match=message):
    Guidance(**options)
