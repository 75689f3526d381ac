"""A source behind a memory gives the same frames, reads each once, and stays below its limit."""

import pickle

import numpy as np

from kling_jax.data.memory import MemorySource, remembered
from kling_jax.data.mixture import Mixture
from kling_jax.data.worlds import WorldSource

TIMES = np.array([0.0, 0.25])
SIZE = 2 * 8 * 8 * 3


class Counting(WorldSource):
  reads = 0

  def frames(self, *given) -> np.ndarray:
    type(self).reads += 1
    return super().frames(*given)


def test_frames_are_read_once_and_are_those_of_the_source() -> None:
  source = Counting(count=4)
  memory = MemorySource(source, limit_bytes=3 * SIZE)
  for _ in range(3):
    for clip in range(3):
      np.testing.assert_array_equal(memory.frames(clip, TIMES, 8, 8), WorldSource(count=4).frames(clip, TIMES, 8, 8))
  assert Counting.reads == 3
  assert memory.info(2) == source.info(2) and len(memory) == 4 and memory.fingerprint == source.fingerprint
  memory.frames(0, TIMES + 1e-9, 8, 8)
  assert Counting.reads == 3, "a time that differs by rounding is the same time"
  memory.frames(0, TIMES + 1e-3, 8, 8)
  memory.frames(0, TIMES + 1e-3, 8, 8)
  assert Counting.reads == 5, "beyond the limit frames pass through"
  assert not memory.frames(0, TIMES, 8, 8).flags.writeable


def test_a_worker_process_receives_it_empty() -> None:
  memory = MemorySource(WorldSource(count=2), limit_bytes=10 * SIZE)
  frames = memory.frames(1, TIMES, 8, 8)
  copy = pickle.loads(pickle.dumps(memory))
  assert not copy._frames
  np.testing.assert_array_equal(copy.frames(1, TIMES, 8, 8), frames)


def test_later_runs_of_a_process_find_it_filled() -> None:
  spec = "worlds:shapes-v1?count=3&seed=5"
  first = Mixture.open([spec], memory_gib=0.001)
  again = Mixture.open([spec], memory_gib=0.001)
  assert first.sources[0] is again.sources[0] is remembered(spec, int(0.001 * 2**30))
  assert isinstance(Mixture.open([spec]).sources[0], WorldSource)
