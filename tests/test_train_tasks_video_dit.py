"""The ways in which the Video DiT learns scores: through AdaLN, or as numbers behind the caption."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from kling_jax import config as config_lib
from kling_jax.data.tokens import ByteTokenizer
from kling_jax.errors import ConfigError
from kling_jax.nn import rng
from kling_jax.train import task


def small(**changes) -> ml_collections.ConfigDict:
  c = config_lib.load("video_dit:runlocal")
  c.update_from_flattened_dict({
    "model.size": "d16", "text.width": 16, "text.tokens": 280, "data.batch": 4,
    "data.sources": ("worlds:shapes-v1?count=12&seed=0",), **changes,
  })  # fmt: skip
  return c


def test_scores_in_the_caption_are_text_and_nothing_else() -> None:
  job = task.make(small(**{"model.told": "caption"}))
  other = task.make(small())
  extra = {name for name in other.shapes if name not in job.shapes}
  assert extra and all("conditions" in name for name in extra), "the same model but for the embeddings of scores"
  batch = job.batches("train", 0, 1, 1)[0]
  same = other.batches("train", 0, 1, 1)[0]
  np.testing.assert_array_equal(batch["frames"], same["frames"])
  np.testing.assert_array_equal(batch["scores"], same["scores"])
  read = ByteTokenizer(280)
  for row in range(4):
    caption, told = read.decode(same["tokens"][row]), read.decode(batch["tokens"][row])
    clip = next(info for info in job.sources.infos() if info.caption == caption)
    numbers = {name: float(f"{score.value:.3g}") for name, score in clip.scores.items()}
    words = told.removeprefix(caption).strip(" .").replace(" score", "").split(", ")
    assert {name: float(value) for name, value in (word.split(": ") for word in words)} == numbers

  params = {name: 0.3 * jax.random.normal(jax.random.key(1), leaf.shape) for name, leaf in job.shapes.items()}
  keys_B = rng.sample_keys(jax.random.key(0), 0, jnp.arange(4))
  quick = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}  # it runs three times
  loss = jax.jit(lambda batch: job.losses(params, batch, keys_B, False)[0], compiler_options=quick)
  without = {**batch, "scores": batch["scores"] * 0, "scores_known": ~batch["scores_known"]}
  np.testing.assert_array_equal(loss(batch), loss(without))
  assert np.abs(np.asarray(loss(batch)) - loss({**batch, "tokens": same["tokens"]})).max() > 0


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"model.told": "captoin"}, "did you mean 'caption'"),
    ({"model.told": "caption", "text.encoder": "cached"}, "needs text.encoder = 'bytes'"),
  ],
)
def test_a_way_that_there_is_not_is_refused(changes, message) -> None:
  with pytest.raises(ConfigError, match=message):
    task.make(small(**changes))
