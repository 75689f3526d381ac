"""Orders without history: permutations, rounds and draws that any process can ask for at any place."""

import collections
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_jax.data import order
from kling_jax.data.order import Schedule
from kling_jax.errors import ConfigError


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 3000), epoch=st.integers(0, 10**9), stream=st.text(max_size=8))
def test_every_epoch_is_a_permutation(size, epoch, stream):
  places = range(epoch * size, (epoch + 1) * size)
  assert sorted(order.shuffled(stream, place, size) for place in places) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 5, 8, 20])
def test_permutations_are_even_handed_also_for_few_clips(size):
  """Each clip at each place, and each clip after each other, about equally often over the epochs."""
  epochs = 3000
  rows = np.array([[order.shuffled("s", e * size + i, size) for i in range(size)] for e in range(epochs)])
  at = np.stack([np.bincount(rows[:, place], minlength=size) for place in range(size)])
  assert np.abs(at - epochs / size).max() < 5.5 * math.sqrt(epochs / size)
  if size > 2:
    pairs = np.zeros((size, size))
    np.add.at(pairs, (rows[:, :-1].ravel(), rows[:, 1:].ravel()), 1)
    mean = epochs * (size - 1) / (size * (size - 1))
    assert np.abs(pairs[~np.eye(size, dtype=bool)] - mean).max() < 5.5 * math.sqrt(mean)


def test_large_sets_are_shuffled_without_a_table():
  size = 36_000_000_000
  items = np.array([order.shuffled("s", place, size) for place in range(2000)]) / size
  assert len(set(items)) == 2000 and abs(items.mean() - 0.5) < 0.03
  assert abs(np.corrcoef(items[:-1], items[1:])[0, 1]) < 0.1


def test_orders_are_pinned():
  """Another value here means that every run resumes on other data: bump nothing, find out why."""
  assert [order.shuffled("0/5x16x16@8/0", place, 20) for place in (0, 1, 2, 19, 20, 10**9)] == [1, 19, 3, 7, 11, 18]


@settings(max_examples=20, deadline=None)
@given(
  weights=st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=6),
  seed=st.text(max_size=4),
  start=st.integers(0, 10**9),
)
def test_the_schedule_counts_what_came_before_and_keeps_shares(weights, seed, start):
  schedule = Schedule(weights, seed)
  period = schedule.period
  seen = collections.Counter()
  for step in range(period):  # the oracle walks; `at` does not
    bucket, k = schedule.at(step)
    assert k == seen[bucket]
    seen[bucket] += 1
  assert tuple(seen[b] for b in range(len(weights))) == schedule.counts and min(schedule.counts) >= 1
  for weight, count in zip(weights, schedule.counts, strict=True):
    assert abs(count - weight / math.fsum(weights) * period) <= len(weights)
  # Any later round: k goes on from the rounds before.
  bucket, k = schedule.at(start)
  assert start // period * schedule.counts[bucket] <= k < (start // period + 1) * schedule.counts[bucket]
  assert Schedule(weights, seed).at(start) == (bucket, k)


def test_rounds_and_seeds_differ_in_order_and_weight_zero_never_comes():
  weights = [3.0, 0.0, 1.0]
  schedule = Schedule(weights, "0")
  sequence = lambda s, r: [s.at(step)[0] for step in range(r * s.period, (r + 1) * s.period)]
  assert sequence(schedule, 0) != sequence(schedule, 1) != sequence(Schedule(weights, "1"), 1)
  assert set(sequence(schedule, 0)) == {0, 2}
  with pytest.raises(IndexError):
    schedule.at(-1)
  for wrong in ([], [0.0], [1.0, -1.0], [math.nan], [math.inf]):
    with pytest.raises(ConfigError, match="weights are"):
      Schedule(wrong, "0")


def test_draws_are_pinned():
  """Another value here means that every run resumes on other data: bump nothing, find out why."""
  assert order.draws("0/17x64x64@8/row", 12345, 2).tolist() == [5468694645061097641, 2001761928566351773]
  many = np.concatenate([order.draws("s", position, 4) for position in range(2000)]) / 2**64
  assert abs(many.mean() - 0.5) < 0.02 and abs(many.var() - 1 / 12) < 0.005 and len(np.unique(many)) == many.size
