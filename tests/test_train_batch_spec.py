"""What a task says of its batches without data is what its data then are."""

import numpy as np
import pytest

from kling_jax import config as config_lib
from kling_jax.errors import ConfigError
from kling_jax.train import task


@pytest.mark.parametrize("name", ["video_dit", "owl", "vae"])
def test_batch_spec_is_the_shape_of_a_real_batch(name: str) -> None:
  config = config_lib.load(f"configs/{name}.py:runlocal")
  job = task.make(config)
  batch, spec = job.batches("train", 0, 1, 1)[0], job.batch_spec()
  assert set(spec) == set(batch)
  for key, leaf in spec.items():
    assert (leaf.shape, leaf.dtype) == (np.shape(batch[key]), batch[key].dtype), key


def test_a_task_without_one_says_so() -> None:
  with pytest.raises(ConfigError, match="'shot_net' has no batch_spec"):
    task.make(config_lib.load("configs/shot_net.py:runlocal")).batch_spec()
