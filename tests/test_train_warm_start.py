"""Warm starts: what is loaded, and what keeps its random start."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from kling_jax.errors import WeightsError
from kling_jax.train import warm_start
from kling_jax.train.defaults import trainer


def test_what_is_skipped_keeps_its_start_and_all_else_is_loaded(tmp_path) -> None:
  held = {"reader.kernel": np.ones((2, 3), np.float32), "filmer.kernel": np.full((4,), 2, np.float32)}
  safetensors.numpy.save_file(held, tmp_path / "model.safetensors")
  params = {"reader.kernel": jax.numpy.zeros((5, 3)), "filmer.kernel": jax.numpy.zeros(4)}
  one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shardings = dict.fromkeys(params, one)
  c = trainer()
  c.init_from = str(tmp_path)
  with pytest.raises(WeightsError, match="reader.kernel"):  # another shape
    warm_start.apply(params, c, tmp_path, shardings, {})
  c.init_skip = ("reader.*",)
  found = warm_start.apply(params, c, tmp_path, shardings, {})
  np.testing.assert_array_equal(found["reader.kernel"], np.zeros((5, 3)))
  np.testing.assert_array_equal(found["filmer.kernel"], held["filmer.kernel"])
  report = json.loads((tmp_path / warm_start.REPORT).read_text())[0]
  assert report["unexpected"] == ["reader.kernel"] and report["missing"] == []
