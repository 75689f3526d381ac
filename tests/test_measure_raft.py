"""Scores by RAFT's flow: units by closed form, the road from a word of --scorers to values, weights that are none."""

import numpy as np
import parity_fixture
import pytest

from kling_jax import measure
from kling_jax.errors import WeightsError
from kling_jax.interop import safetensors
from kling_jax.measure import camera, motion, raft
from kling_jax.measure import sample as sample_lib

TIMES = np.arange(4) / 10


def frames(height=96, width=136):
  rough = np.random.default_rng(1).integers(0, 256, (4, height // 8, width // 8, 3), np.uint8)
  return rough.repeat(8, 1).repeat(8, 2)


def test_a_known_flow_gives_known_scores():
  calls = []

  def find(first_BHWC, second_BHWC):  # everything moves 3 pixels to the right and 4 up, whatever is seen
    calls.append(first_BHWC.shape)
    return np.broadcast_to(np.float32([3, -4]), (*first_BHWC.shape[:3], 2)).copy()

  sample = sample_lib.of_frames(frames(), TIMES)
  flows = raft.of_sample(sample, find)
  assert list(flows) == sample.steps and {shape[0] for shape in calls} == {raft.PAIRS}
  speed = motion.mean_speed([flows[pair] for pair in sample.pairs])
  assert speed == pytest.approx(5 / np.hypot(96, 136) / 0.1, rel=1e-3)  # diagonals a second
  found = camera.of_flows(sample, flows)
  assert found["camera_pan"] == pytest.approx(-3 / np.hypot(96, 136) / 0.1, rel=1e-3)  # the picture moves against it
  assert found["camera_tilt"] == pytest.approx(-4 / np.hypot(96, 136) / 0.1, rel=1e-3)
  assert found["object_motion"] == pytest.approx(0, abs=1e-4)


def test_a_word_with_a_folder_asks_for_it(tmp_path):
  parity_fixture.load("raft", tmp_path)
  scorers = measure.chosen(["default", f"raft:{tmp_path}"])
  by = {condition: scorer for scorer in scorers for condition in scorer.conditions}
  assert by["flow_motion"].name == "raft" and by["camera_pan"].name == "raft+similarity"
  assert by["motion"].name == motion.NAME  # the rest stays
  ours = [scorer for scorer in scorers if scorer.name.startswith("raft")]
  scores = measure.score(frames(), TIMES, ours)
  assert set(scores) == {"flow_motion", *camera.CONDITIONS}
  assert {score.version for score in scores.values()} == {safetensors.fingerprint(tmp_path)}
  find, _ = raft.finder(tmp_path)
  sample = sample_lib.of_frames(frames(), TIMES)
  steps = sample.steps
  assert len(steps) <= raft.PAIRS
  whole = steps + steps[-1:] * (raft.PAIRS - len(steps))
  flow_BHWC = find(*(sample.frames_THWC[[step[k] for step in whole]] for k in (0, 1)))
  assert flow_BHWC.shape == (raft.PAIRS, 96, 136, 2)  # in the pixels of the frames, though the network saw 128 rows
  lengths = np.hypot(*np.moveaxis(flow_BHWC, -1, 0))
  byhand = np.mean([lengths[steps.index(pair)].mean() / np.hypot(96, 136) / 0.1 for pair in sample.pairs])
  assert scores["flow_motion"].value == pytest.approx(byhand, rel=0.02)  # measured at 160 pixels


def test_other_weights_are_refused(tmp_path):
  with pytest.raises(WeightsError, match="no .safetensors"):
    measure.chosen([f"raft:{tmp_path}"])
  safetensors.write(tmp_path, {"layers.0.weight": np.ones((2, 2), np.float32)})
  with pytest.raises(WeightsError, match="does not fit"):
    measure.chosen([f"raft:{tmp_path}"])
