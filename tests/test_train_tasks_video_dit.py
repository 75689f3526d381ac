"""The ways in which the Video DiT learns scores: through AdaLN, or as numbers behind the caption."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from kling_jax import config as config_lib
from kling_jax.data import encode, mixture, records
from kling_jax.data.record import ClipRecord
from kling_jax.data.tokens import ByteTokenizer
from kling_jax.errors import ConfigError, DataError
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


def test_the_table_may_be_of_other_sources_that_nobody_trains_on(tmp_path) -> None:
  """The sets of a study hold parts of the same videos; a table of the whole set compares them row by row."""
  media = encode.encode([np.full((32, 32, 3), 90, np.uint8)] * 9, fps=8)
  for name, count in (("whole", 40), ("part", 25)):
    with records.RecordWriter(tmp_path / name, "test") as writer:
      for k in range(count):
        writer.write(ClipRecord(f"c{k}", f"v{k}", "v", 0, 9, "1/8", 8.0, 32, 32, 9, caption=f"clip {k}"), media)
  changes = {
    "model.conditions": (), "data.sources": (str(tmp_path / "part"),), "data.validation_fraction": 0.2,
    "data.validation_sources": (str(tmp_path / "whole"),),
  }  # fmt: skip
  read = lambda batch: {ByteTokenizer(280).decode(row) for row in batch["tokens"]}
  job = task.make(small(**changes))
  whole = task.make(small(**changes | {"data.sources": (str(tmp_path / "whole"),), "data.validation_sources": ()}))
  shown = read(job.batches("validation", 0, 1, 1).fixed_rows(16)[0])
  assert shown == read(whole.batches("validation", 0, 1, 1).fixed_rows(16)[0]) and len(shown) > 2
  assert not shown & {text for step in range(12) for text in read(job.batches("train", 0, 1, 1)[step])}
  every = {f"v{k}" for k in range(40)}
  trained = sorted(every - mixture.held_out(every, 0.02))
  with records.RecordWriter(tmp_path / "few", "test") as writer:  # it holds out what the whole set trains on
    for k, name in enumerate(trained[:2]):
      writer.write(ClipRecord(f"d{k}", name, "v", 0, 9, "1/8", 8.0, 32, 32, 9), media)
  other = changes | {"data.sources": (str(tmp_path / "whole"),), "data.validation_sources": (str(tmp_path / "few"),)}
  with pytest.raises(DataError, match=r"1 held-out videos are trained on in data.sources, first 'v\d+'"):
    task.make(small(**other | {"data.validation_fraction": 0.02})).batches("validation", 0, 1, 1)
