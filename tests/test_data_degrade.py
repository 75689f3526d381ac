"""Degradations: strength 0 is the original, stronger is further away, and nothing depends on chance."""

import itertools

import numpy as np
import pytest

from kling_jax.curation import weak_labels
from kling_jax.data import degrade, leaves, records
from kling_jax.errors import DataError, UsageError
from kling_jax.measure import vtss_labels

SHOT = leaves.scene((1, 2), 120, 40, 64)
OTHERS = [leaves.scene((5, k), 60, 40, 64) for k in range(2)]


def made(kind, strength, seed=3):
  return degrade.degraded(SHOT, kind, strength, seed, OTHERS)


@pytest.mark.parametrize("kind", sorted(degrade.KINDS))
def test_strength_is_distance_from_the_original(kind):
  original = made(kind, 0)
  assert np.array_equal(original, SHOT[: degrade.FRAMES])
  levels = [made(kind, strength) for strength in degrade.STRENGTHS]
  assert all(level.shape == original.shape and level.dtype == np.uint8 for level in levels)
  assert np.array_equal(levels[1], made(kind, 2))
  if kind in ("static", "speed_up"):  # how far the last frame is from the first in the shot says it
    place = lambda frames: int(np.abs(SHOT.astype(int) - frames[12]).mean((1, 2, 3)).argmin())
    distances = [abs(place(level) - 12) for level in levels]
  elif kind == "shake":
    distances = [np.abs(np.diff(level.astype(float), axis=0)).mean() for level in levels]
  elif kind == "freeze":
    distances = [(np.abs(np.diff(level.astype(int), axis=0)).max((1, 2, 3)) == 0).sum() for level in levels]
  elif kind == "transition":
    distances = [(np.abs(level.astype(int) - original).mean((1, 2, 3)) > 1).sum() for level in levels[:1]]
  else:
    distances = [np.abs(level.astype(float) - original).mean() for level in levels]
  assert distances[0] > 0 and all(a < b for a, b in itertools.pairwise(distances)), distances


def jumps(kind: str, strength: int, seed: int) -> int:
  """Stretches of steps between frames that are far larger than any of the shot itself."""
  step = lambda frames: np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))
  large = step(made(kind, strength, seed)) > 3 * step(made(kind, 0, seed)).max()
  return int(large[0]) + int((large[1:] & ~large[:-1]).sum())


def test_the_number_of_cuts_is_the_strength():
  seed = next(seed for seed in range(20) if jumps("transition", 1, seed))  # one whose changes are cuts
  assert [jumps("transition", strength, seed) for strength in degrade.STRENGTHS] == [1, 2, 3, 4]


def test_bad_requests_say_what_is_wrong():
  with pytest.raises(DataError, match="blur"):
    degrade.degraded(SHOT, "blurr", 1, 0)
  with pytest.raises(DataError, match="strengths are 0 to 4"):
    degrade.degraded(SHOT, "blur", 5, 0)
  with pytest.raises(DataError, match="at least two frames"):
    degrade.degraded(SHOT[:1], "blur", 1, 0)
  with pytest.raises(DataError, match="wants other shots"):
    degrade.degraded(SHOT, "transition", 1, 0)


def test_a_short_shot_is_walked_to_and_fro():
  frames = np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(3, -1)
  assert degrade.walked(frames, 1.0)[:8, 0, 0, 0].tolist() == [0, 1, 2, 3, 2, 1, 0, 1]


def test_a_weak_set_is_a_clip_set_with_its_ratings_and_goes_on(tmp_path, monkeypatch):
  scorers = [scorer for scorer in weak_labels.SCORERS if scorer.conditions in (("borders",), ("clarity",))]
  assert weak_labels.make([], tmp_path / "set", scenes=1, kinds=("borders",), scorers=scorers) == 5
  source = records.RecordSource(tmp_path / "set", status=None)
  rows = vtss_labels.read(tmp_path / "set" / weak_labels.TABLE, source)
  assert [(row.degradation, row.strength, row.rating) for row in rows[:3]] == [
    ("original", 0, 5.0), ("borders", 1, 4.0), ("borders", 2, 3.0),
  ]  # fmt: skip
  assert len({row.reference for row in rows}) == 1 and {row.video_id for row in rows} == {"leaves-0"}
  borders = [source.info(row.clip).scores["borders"].value for row in rows]
  assert borders[0] == 0 and all(a < b for a, b in itertools.pairwise(borders[:5]))
  monkeypatch.setattr(weak_labels, "_write", lambda *_: pytest.fail("made again"))
  assert weak_labels.make([], tmp_path / "set", scenes=1, kinds=("borders",), scorers=scorers) == 5
  with pytest.raises(UsageError, match="name at least one"):
    weak_labels.make([], tmp_path / "none")
