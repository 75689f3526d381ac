"""Edited films: their truth holds in their pixels, and everything is a function of the seed."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kling_jax.data import edited, edits, effects, leaves
from kling_jax.errors import ConfigError, DataError

LEVELS = (40, 90, 140, 190, 230)
PLAIN = [np.full((20, 36, 64, 3), level, np.uint8) for level in LEVELS]
QUIET = edits.Mixture(share=0.0, rough=0.0, hold=(8, 30), lengths=(3, 20))


@given(st.integers(0, 10**6), st.integers(2, 300))
@settings(max_examples=60)
def test_plans_are_sound(seed, frames):
  film = edits.plan(seed, 3, frames, [20] * 5)
  assert film == edits.plan(seed, 3, frames, [20] * 5)
  last = 0
  for edit, old, new in zip(film.edits, film.shots, film.shots[1:], strict=False):
    assert last <= edit.start_frame < edit.end_frame <= frames - 1
    assert (edit.end_frame - edit.start_frame == 1) == (edit.kind == "cut")
    assert old.footage != new.footage and new.start <= edit.end_frame and old.stop >= edit.start_frame + 1
    last = edit.end_frame
  assert len(film.shots) == len(film.edits) + 1 and film.shots[-1].stop == frames
  for decoy in film.decoys:
    assert all(decoy.end_frame <= e.start_frame + 1 or decoy.start_frame >= e.end_frame for e in film.edits)


@pytest.mark.parametrize("seed", range(6))
def test_pixels_are_those_of_one_shot_outside_transitions_and_mixed_within(seed):
  film = edits.plan(seed, 0, 150, [len(p) for p in PLAIN], QUIET)
  frames = np.stack(list(edits.frames(film, PLAIN, 36, 64))).astype(int)
  assert film.edits
  flat = frames.reshape(150, -1, 3).std(1).max(1) < 0.01
  inside = np.zeros(150, bool)
  for e in film.edits:
    inside[e.start_frame + 1 : e.end_frame] = True
    old, new = frames[e.start_frame, 0, 0], frames[e.end_frame, 0, 0]
    assert np.abs(old - new).max() > 3
    if e.kind in ("dissolve", "wipe"):  # within rounding no pixel leaves the interval between the two
      part = frames[e.start_frame : e.end_frame + 1]
      assert (part >= np.minimum(old, new) - 1).all() and (part <= np.maximum(old, new) + 1).all()
      share = ((part - old) @ (new - old) / ((new - old) @ (new - old))).mean((1, 2))
      assert (np.diff(share) > -0.02).all() and share[0] == 0 and share[-1] == 1
  assert flat[~inside].all()
  shots = np.split(np.flatnonzero(~inside), np.flatnonzero(np.diff(np.flatnonzero(~inside)) > 1) + 1)
  for frames_of_shot in shots:  # constant footage under a constant look: cuts apart, nothing changes in a shot
    steps = np.abs(np.diff(frames[frames_of_shot, 0, 0], axis=0)).max(1, initial=0)
    cuts = [e.start_frame for e in film.edits if e.kind == "cut"]
    assert all(frames_of_shot[k] in cuts for k in np.flatnonzero(steps))


def test_fades_reach_their_colour():
  mixture = dataclasses.replace(QUIET, kinds={"fade": 1.0})
  film = edits.plan(4, 1, 200, [len(p) for p in PLAIN], mixture)
  frames = list(edits.frames(film, PLAIN, 36, 64))
  for e in film.edits:
    for k in range(e.dark):
      np.testing.assert_allclose(frames[e.start_frame + 1 + e.fall + k][0, 0], e.colour, atol=1)


def test_decoys_leave_the_scene_after_them_as_it_was():
  wavy = [np.random.default_rng(k).integers(0, 256, (1, 36, 64, 3)).astype(np.uint8) for k in range(2)]
  for kind in ("flash", "strobe", "dropout", "shake", "explosion", "occluder", "title", "defocus"):
    mixture = edits.Mixture(share=1.0, rough=0.0, decoys={kind: 1.0}, hold=(200, 220))
    film = next(f for f in (edits.plan(s, 0, 120, [1, 1], mixture) for s in range(50)) if f.decoys)
    film = dataclasses.replace(film, shots=tuple(dataclasses.replace(s, drift=(0.0, 0.0, 0.0)) for s in film.shots))
    frames = [f.astype(int) for f in edits.frames(film, wavy, 36, 64)]
    decoy = film.decoys[0]
    others = [d for d in film.decoys[1:]]
    before, after = frames[decoy.start_frame - 1], frames[decoy.end_frame]
    if not others:
      np.testing.assert_array_equal(before, after)
    change = max(np.abs(f - before).mean() for f in frames[decoy.start_frame : decoy.end_frame])
    assert change > 1, kind


@pytest.mark.parametrize("style", effects.WIPES)
def test_arrival_runs_from_first_to_last(style):
  for seed in range(5):
    when = effects.arrival(style, 36, 64, np.random.default_rng(seed).random(8))
    assert when.shape == (36, 64) and when.min() == 0 and when.max() == pytest.approx(1)
    a, b = np.zeros((36, 64, 3)), np.ones((36, 64, 3))
    assert effects.wipe(a, b, when, 0.0, 0.1).max() == 0 and effects.wipe(a, b, when, 1.0, 0.1).min() == 1


@pytest.mark.parametrize("side", range(4))
def test_a_push_brings_the_new_picture_in_from_the_other_side(side):
  a, b = np.random.default_rng(0).random((2, 8, 12, 3))
  half = effects.move(a, b, "push", side, 0.5)
  want = {
    0: np.concatenate([a[:, 6:], b[:, :6]], 1), 1: np.concatenate([b[:, 6:], a[:, :6]], 1),
    2: np.concatenate([a[4:], b[:4]], 0), 3: np.concatenate([b[4:], a[:4]], 0),
  }[side]  # fmt: skip
  np.testing.assert_array_equal(half, want)
  np.testing.assert_array_equal(effects.move(a, b, "cover", side, 1.0), b)
  np.testing.assert_array_equal(effects.move(a, b, "uncover", side, 0.0), a)


def test_unknown_kinds_and_too_little_footage_are_refused():
  with pytest.raises(DataError, match="flash"):
    edits.Mixture(decoys={"flasch": 1.0})
  with pytest.raises(DataError, match="two pieces"):
    edits.plan(0, 0, 50, [10])


def test_batches_are_a_function_of_seed_and_step_and_split_over_processes():
  films = lambda: edited.Films((), 3, 24, 5, scenes=4)
  whole = edited.Batches(films(), 4, 7)[2]
  assert whole["thumbnails"].shape == (4, 24, 3072) and whole["kind"].max() < 4
  parts = [edited.Batches(films(), 4, 7, process_index=p, process_count=2)[2] for p in range(2)]
  for name, value in whole.items():
    np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)
  steps = dict(edited.Batches(films(), 4, 7).iterate(2, threads=1, stop=4))
  assert sorted(steps) == [2, 3]
  np.testing.assert_array_equal(steps[2]["thumbnails"], whole["thumbnails"])
  with pytest.raises(ConfigError, match="multiple"):
    edited.Batches(films(), 3, 7, process_count=2)
  with pytest.raises(DataError, match="no such file"):
    edited.Films(("/nowhere/x.mp4",), 1, 10, 0)


def test_labels_mark_steps_and_turn_with_the_film():
  edit = lambda start, end, kind: edits.Edit(start, end, kind)
  labels = edited.Labels.of([edit(3, 4, "cut"), edit(10, 20, "wipe")], 30)
  assert np.flatnonzero(labels.inside).tolist() == [3, *range(10, 20)]
  assert labels.middle[3] == 1 and labels.middle[[14, 15]].min() > 0.7 and labels.middle[10] == 0
  assert (labels.kind >= 0).tolist() == (labels.inside == 1).tolist()
  back = labels.reversed()
  np.testing.assert_array_equal(back.inside[::-1], labels.inside)


def test_mirroring_and_recolouring_thumbnails():
  shown = np.random.default_rng(0).integers(0, 256, (2, 3072)).astype(np.uint8)
  np.testing.assert_array_equal(edited.mirrored(edited.mirrored(shown)), shown)
  luma, _ = edited.planes(edited.mirrored(shown))
  np.testing.assert_array_equal(luma, edited.planes(shown)[0][:, :, ::-1])
  np.testing.assert_array_equal(edited.recoloured(shown, 1.0, False), shown)
  _, chroma = edited.planes(edited.recoloured(shown, 0.0, True))
  assert (chroma == 128).all()


def test_leaves_are_a_function_of_the_seed_and_move():
  a = leaves.scene((1, 2), 6, 54, 96)
  np.testing.assert_array_equal(a, leaves.scene((1, 2), 6, 54, 96))
  assert a.shape == (6, 54, 96, 3) and a.std() > 5
  assert np.abs(a[0].astype(int) - leaves.scene((1, 3), 6, 54, 96)[0]).mean() > 10
