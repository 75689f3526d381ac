"""The world model's network: what the state does, adapters, null conditions, cuts, and shapes that cannot be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import owl_model
import pytest
from owl_model import CONFIG, ROWS, quick_jit

from kling_jax.errors import ConfigError
from kling_jax.models import owl
from kling_jax.models.owl import ClipConditions, Owl
from kling_jax.nn import params as params_lib
from kling_jax.nn.params import Params

REPLACE = dataclasses.replace(CONFIG, injection="replace", slots=5, lora_rank=2, lora=("q", "v"))
draw = np.random.default_rng(2)
normal = lambda *shape: draw.standard_normal((ROWS, *shape)).astype(np.float32)
X, TIME = normal(2, 4, 4, 4), np.array([0.3, 0.8], np.float32)


def conditions(slots: int) -> ClipConditions:
  return ClipConditions(
    state_BQD=normal(slots, 16), text_BLD=normal(4, 16), text_mask_BL=np.ones((ROWS, 4), bool), fps_B=owl_model.FPS,
    context_BTHWC=normal(1, 4, 4, 4), context_time_B=np.zeros(ROWS, np.float32),
    context_mask_BT=np.ones((ROWS, 1), bool),
  )  # fmt: skip


GIVEN = conditions(CONFIG.slots)


def predict(weights: Params, given: ClipConditions, config=CONFIG) -> jax.Array:
  model: Owl = params_lib.merge(owl_model.described(config)[0], weights)
  return model.predict(jnp.asarray(X), TIME, given)


def run(weights, given, config=CONFIG) -> np.ndarray:
  return np.asarray(quick_jit(lambda w, g: predict(w, g, config))(weights, given))


def test_an_untrained_state_leaves_the_base_video_dit_as_it_is() -> None:
  """The stream's output is zero at the start, so the text-to-video model of the same weights films the same."""
  weights = {k: v * (not k.startswith("video.dit.blocks.state_attn.out")) for k, v in owl_model.weights().items()}
  model: Owl = params_lib.merge(owl_model.described()[0], weights)
  base = quick_jit(
    lambda w, x: params_lib.merge(owl_model.described()[0], w).video.dit(
      x, TIME, GIVEN.text_BLD, text_mask_BL=GIVEN.text_mask_BL, fps_B=GIVEN.fps_B,
      context_BTHWC=GIVEN.context_BTHWC, context_time=GIVEN.context_time_B, causal_frames=2,
    )
  )  # fmt: skip
  np.testing.assert_array_equal(run(weights, GIVEN), base(weights, X))
  assert model.config.dit.state_width == 16
  assert np.abs(run(owl_model.weights(), GIVEN) - base(weights, X)).max() > 1e-3


def test_in_replace_mode_the_state_is_all_that_is_heard() -> None:
  weights, given = owl_model.weights(REPLACE), conditions(REPLACE.slots)
  plain = run(weights, given, REPLACE)
  np.testing.assert_array_equal(run(weights, dataclasses.replace(given, text_BLD=given.text_BLD + 1), REPLACE), plain)
  moved = run(weights, dataclasses.replace(given, state_BQD=given.state_BQD + 1), REPLACE)
  assert np.abs(moved - plain).max() > 1e-3
  assert not any("state_attn" in name for name in weights)


def test_gradient_through_a_cut_is_exactly_zero() -> None:
  cut = dataclasses.replace(GIVEN, context_mask_BT=np.array([[False], [True]]))
  weigh = lambda context: jnp.sum(predict(owl_model.weights(), dataclasses.replace(cut, context_BTHWC=context)) ** 2)
  slope = np.abs(quick_jit(jax.grad(weigh))(GIVEN.context_BTHWC)).max(axis=(1, 2, 3, 4))
  assert slope[0] == 0 and slope[1] > 1e-3


def test_dropped_conditions_are_the_learned_nulls() -> None:
  model: Owl = params_lib.merge(owl_model.described()[0], owl_model.weights())
  row = np.array([True, False])
  dropped = model.drop(GIVEN, row, row, row)
  np.testing.assert_array_equal(dropped.state_BQD[0], owl_model.weights()["null_state"])
  np.testing.assert_array_equal(dropped.text_BLD[0, 0], owl_model.weights()["video.null_text"][0])
  assert dropped.text_mask_BL[0].tolist() == [True, False, False, False] and not dropped.context_mask_BT[0].any()
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[1], b[1]), dropped, GIVEN)


def test_adapters_add_their_product_to_the_kernels_that_are_named() -> None:
  _, shapes, axes = owl_model.described(REPLACE)
  weights = owl_model.weights(REPLACE)
  found = owl.adapted(weights)
  name = "layers.attention.q.kernel"
  product = weights[f"lora.{name}.lora_a"] @ weights[f"lora.{name}.lora_b"]
  np.testing.assert_allclose(found[f"lm.{name}"], weights[f"lm.{name}"] + 2 * product, rtol=1e-5, atol=1e-6)
  changed = {key for key in weights if not np.array_equal(found[key], weights[key])}
  assert changed == {"lm.layers.attention.q.kernel", "lm.layers.attention.v.kernel"}
  for adapter in (key for key in shapes if key.startswith("lora.")):
    kernel = f"lm.{adapter.removeprefix('lora.').rpartition('.')[0]}"
    ours, theirs = axes[adapter], axes[kernel]
    assert ours[:-2] == theirs[:-2] and (ours[-2:] == (theirs[-2], None) or ours[-2:] == (None, theirs[-1]))
  assert owl.adapted({"lm.x": 1}) == {"lm.x": 1}


@pytest.mark.parametrize(
  ("change", "message"),
  [({"injection": "ad"}, "did you mean 'add'"), ({"queries": 0}, "at least 1 state query")],
)
def test_configs_that_cannot_be(change, message) -> None:
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(CONFIG, **change)


def test_frames_that_do_not_divide_into_patches() -> None:
  with pytest.raises(ConfigError, match="20 x 16 do not divide into patches of 8 pixels"):
    CONFIG.frame_tokens(20, 16)
