"""Targets of the stages: pooled text, padded text, and the text of the next clip, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from owl_model import quick_jit

from kling_jax.world import objectives
from kling_jax.world.sequence import Walk

draw = np.random.default_rng(0)


@pytest.mark.parametrize("slots", [1, 3, 5, 8])
def test_pooled_text_is_the_mean_of_its_parts(slots) -> None:
  text, counts = draw.standard_normal((3, 6, 2)).astype(np.float32), (6, 4, 2)
  mask = np.arange(6) < np.array(counts)[:, None]
  found = np.asarray(quick_jit(lambda *given: objectives.pooled(*given, slots))(text, mask))
  for row, count in enumerate(counts):
    for q in range(slots):
      part = [n for n in range(count) if (n + 1) * slots > q * count and n * slots < (q + 1) * count]
      np.testing.assert_allclose(found[row, q], text[row, part].mean(0), atol=1e-6)


def test_aligned_states_have_no_loss_and_padding_does_not_count() -> None:
  text = draw.standard_normal((2, 4, 3)).astype(np.float32)
  mask = np.array([[True, True, False, False], [True] * 4])
  state = np.where(mask[..., None], text, 9.0).astype(np.float32)
  loss, cosine = quick_jit(objectives.align)(jnp.asarray(state), jnp.asarray(text), jnp.asarray(mask))
  np.testing.assert_allclose(loss, 0, atol=1e-6)
  np.testing.assert_allclose(cosine, 1, atol=1e-5)
  loss, _ = quick_jit(objectives.align)(jnp.asarray(state + 2), jnp.asarray(text), jnp.asarray(mask))
  np.testing.assert_allclose(loss, 4, rtol=1e-5)
  pooled = quick_jit(lambda *given: objectives.pooled(*given, 2))(text, mask)
  loss, _ = quick_jit(objectives.align)(pooled - 1, jnp.asarray(text), jnp.asarray(mask))
  np.testing.assert_allclose(loss, 1, rtol=1e-5)


def test_next_token_loss_counts_tokens_and_closing_marks_alone() -> None:
  tokens = np.array([[[1, 5, 2, 0], [1, 4, 6, 2]]], np.int32)
  mask = np.array([[[True, True, True, False], [True] * 4]])
  walk = Walk(None, None, None, jnp.asarray(tokens), jnp.asarray(mask), None)
  logits = draw.standard_normal((1, 2, 3, 7)).astype(np.float32)
  logits[0, 1, 0, 4] = 20.0
  loss, right = quick_jit(objectives.next_token)(logits, walk)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  places = [(0, 0, 5), (0, 1, 2), (1, 0, 4), (1, 1, 6), (1, 2, 2)]
  np.testing.assert_allclose(loss[0], -np.mean([log_p[0, o, n, token] for o, n, token in places]), rtol=1e-5)
  hits = [logits[0, o, n].argmax() == token for o, n, token in places]
  np.testing.assert_allclose(right[0], np.mean(hits), rtol=1e-6)


def test_next_token_clip_by_clip_is_the_same_loss_with_the_same_gradients() -> None:
  tokens, mask = draw.integers(0, 7, (2, 3, 5)).astype(np.int32), draw.random((2, 3, 5)) < 0.7
  walk = Walk(None, None, None, jnp.asarray(tokens), jnp.asarray(mask), None)
  hidden, head = (draw.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 4, 6), (6, 7)))

  def whole(hidden, head):
    loss_B, right_B = objectives.next_token(hidden @ head, walk)
    return loss_B.sum(), right_B

  def by_clip(hidden, head):
    loss_B, right_B = objectives.next_token_by_clip(lambda x: x @ head, hidden, walk)
    return loss_B.sum(), right_B

  (loss, right), gradients = quick_jit(jax.value_and_grad(whole, (0, 1), has_aux=True))(hidden, head)
  (other, other_right), others = quick_jit(jax.value_and_grad(by_clip, (0, 1), has_aux=True))(hidden, head)
  np.testing.assert_allclose(other, loss, rtol=1e-6)
  np.testing.assert_allclose(other_right, right, rtol=1e-6)
  for gradient, one in zip(gradients, others, strict=True):
    np.testing.assert_allclose(one, gradient, rtol=1e-5, atol=1e-6)
  # Nothing of the size of a walk's logits (B, O, L - 1, V) is left for the backward pass.
  backward = lambda *given: jax.vjp(lambda *g: by_clip(*g)[0], *given)[1]
  residuals = jax.tree.leaves(jax.eval_shape(backward, hidden, head))
  assert max(leaf.size for leaf in residuals) < 2 * 3 * 4 * 7


def test_clips_of_rows() -> None:
  x = draw.standard_normal((2, 3, 4)).astype(np.float32)
  clip = jnp.array([2, 0])
  np.testing.assert_array_equal(objectives.of_clip(jnp.asarray(x), clip), x[[0, 1], [2, 0]])
  changed = np.asarray(objectives.with_clip(jnp.asarray(x), clip, jnp.zeros((2, 4))))
  expected = x.copy()
  expected[[0, 1], [2, 0]] = 0
  np.testing.assert_array_equal(changed, expected)
