"""The layout of a sequence and what a clip remembers: against a memory that is kept by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_jax.errors import ConfigError
from kling_jax.world.history import HistoryPolicy
from kling_jax.world.layout import DYNAMICS, IMAGE, OBSERVATION, PROMPT, QUERY, Layout

layouts = st.builds(
  Layout,
  frame=st.integers(1, 3),
  prompt=st.integers(3, 4),
  dynamics=st.integers(3, 5),
  queries=st.integers(1, 3),
  key_frames=st.integers(1, 2),
  mutual=st.booleans(),
)
policies = st.builds(HistoryPolicy, window=st.integers(0, 3), states=st.integers(0, 3))


@settings(max_examples=40)
@given(layout=layouts, policy=policies, clips=st.integers(1, 8))
def test_pairs_are_what_a_memory_kept_by_hand_shows(layout, policy, clips) -> None:
  """One clip after the other: a list of whole clips, a list of states, and what is pinned."""
  kinds, clip_of = layout.kinds(clips), layout.clip_of(clips)
  places = lambda clip, *wanted: set(np.flatnonzero((clip_of == clip) & np.isin(kinds, wanted)).tolist())
  pinned = set(np.flatnonzero(clip_of < 0).tolist())
  whole: list[int] = []
  states: list[int] = []
  expected = np.zeros((len(kinds), len(kinds)), bool)
  for n in sorted(pinned):
    expected[n, : n + 1] = True
  for clip in range(clips):
    if len(whole) > policy.window:
      leaving = whole.pop(0)
      if leaving == 0:
        pinned |= places(0, QUERY)
      else:
        states.append(leaving)
        states = states[max(len(states) - policy.states, 0) :]
    whole.append(clip)
    memory = pinned.union(
      *(places(c, QUERY) for c in states), *(places(c, DYNAMICS, QUERY, OBSERVATION) for c in whole)
    )
    for n in np.flatnonzero(clip_of == clip):
      seen = {place for place in memory if place <= n}
      if layout.mutual and kinds[n] == QUERY:
        seen |= places(clip, QUERY)
      expected[n, sorted(seen)] = True
  found = policy.pairs(layout, clips)
  if found is None:  # the plain causal rule
    found = np.tril(np.ones_like(expected))[None]
  np.testing.assert_array_equal(np.asarray(found)[0], expected)


@given(layout=layouts, clips=st.integers(1, 5))
def test_parts_follow_each_other_and_positions_count_places(layout, clips) -> None:
  kinds = layout.kinds(clips)
  assert len(kinds) == layout.length(clips) == len(layout.clip_of(clips))
  assert (kinds == IMAGE).sum() == layout.frame and (kinds == PROMPT).sum() == layout.prompt
  for clip in range(clips):
    places = np.flatnonzero(layout.clip_of(clips) == clip)
    np.testing.assert_array_equal(layout.positions(clip, 0, layout.clip), places)
    queries = layout.positions(clip, layout.dynamics, layout.queries)
    np.testing.assert_array_equal(kinds[np.asarray(queries)], QUERY)
  assert jnp.asarray(layout.positions(jnp.int32(2), 1, 3)).tolist() == [
    layout.prefix + 2 * layout.clip + k for k in (1, 2, 3)
  ]


def test_key_frames_are_spread_with_both_ends() -> None:
  layout = Layout(frame=1, prompt=3, dynamics=3, queries=1, key_frames=3)
  assert layout.key_frame_indices(9).tolist() == [0, 4, 8]
  assert Layout(frame=1, prompt=3, dynamics=3, queries=1, key_frames=1).key_frame_indices(9).tolist() == [8]
  with pytest.raises(ConfigError, match="3 key frames of a clip of 2 frames; at most 2"):
    layout.key_frame_indices(2)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Layout(frame=0, prompt=3, dynamics=3, queries=1), "frame is 0"),
    (lambda: Layout(frame=1, prompt=2, dynamics=3, queries=1), "prompt is 2"),
    (lambda: HistoryPolicy(window=-1), "window=-1"),
    (lambda: HistoryPolicy(window=1, states=-2), "states=-2"),
  ],
)
def test_sizes_that_cannot_be(make, message) -> None:
  with pytest.raises(ConfigError, match=message):
    make()
