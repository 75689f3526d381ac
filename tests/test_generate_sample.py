"""Sampling from a work directory: seeds, batches, known frames, scores and files."""

import dataclasses
import json
import pathlib

import av
import jax
import numpy as np
import pytest

from kling_jax import config as config_lib
from kling_jax.data import encode, grid
from kling_jax.errors import ConfigError, UsageError, WeightsError
from kling_jax.generate import sample
from kling_jax.train import loop

ROOT = pathlib.Path(__file__).parents[1]
QUICK = sample.Settings(steps=2, text=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A work directory after a few large steps, so that conditions have some effect."""
  c = config_lib.load(str(ROOT / "configs" / "video_dit.py") + ":runlocal")
  c.update_from_flattened_dict({
    "steps": 4, "validation.every": 0, "text.tokens": 24, "data.batch": 8, "optimizer.warmup": 0, "optimizer.lr": 0.02,
    "ema.decay": 0.1, "sample.steps": 2, "data.sources": ("worlds:shapes-v1?count=16&seed=0",),
  })  # fmt: skip
  path = tmp_path_factory.mktemp("trained")
  loop.run(c, path)
  return path


@pytest.fixture(scope="module")
def model(folder: pathlib.Path) -> sample.Model:
  return sample.Model(folder)


def test_a_video_depends_on_its_own_request_alone(model: sample.Model) -> None:
  """Eight devices, other rows and another place in the batch change nothing but float rounding."""
  requests = [sample.Request(f"a red circle {seed}", seed=seed) for seed in range(3)]
  together = model(requests, QUICK)
  backwards = model(requests[::-1], QUICK)[::-1]
  for a, b in zip(together, backwards, strict=True):
    assert a.shape == (9, 32, 32, 3) and a.dtype == np.uint8
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
  assert np.abs(together[0].astype(int) - together[1].astype(int)).max() > 20
  assert len(jax.local_devices()) == 8


def test_scores_and_text_steer(model: sample.Model) -> None:
  plain, low, high, other = model(
    [
      sample.Request("a red circle"),
      sample.Request("a red circle", scores={"motion": "low"}),
      sample.Request("a red circle", scores={"motion": "high"}),
      sample.Request("two blue squares"),
    ],
    QUICK,
  )
  for video in (low, high, other):
    assert np.abs(video.astype(int) - plain.astype(int)).max() > 0


def test_raw_scores_go_through_the_stored_percentiles(model: sample.Model) -> None:
  condition = model.percentiles.conditions[0]
  raw = np.expm1(condition.q99) if condition.transform == "log1p" else condition.q99
  u_M, known_M = model._scores({condition.name: float(raw)})
  assert u_M[0] == pytest.approx(1000.0) and known_M.tolist() == [True, False, False]
  np.testing.assert_array_equal(model._scores({condition.name: "high"})[0], [1000, 0, 0])
  with pytest.raises(UsageError, match="not told 'motoin'; did you mean 'motion'"):
    model._scores({"motoin": 1.0})
  with pytest.raises(UsageError, match="neither a number nor one of low, mid, high"):
    model._scores({"motion": "fast"})


def test_an_image_and_the_end_of_a_video_come_back_as_given(model: sample.Model, tmp_path: pathlib.Path) -> None:
  rows, columns = np.mgrid[:48, :64]
  picture = np.stack([4 * columns, 5 * rows, 128 + 0 * rows], -1).astype(np.uint8)
  grid.write_png(tmp_path / "p.png", picture)
  shown, rest = model([sample.Request("x", image=str(tmp_path / "p.png")), sample.Request("x")], QUICK)
  expected, _ = model._given(sample.Request("x", image=str(tmp_path / "p.png")), (9, 32, 32), 8.0)
  first = np.asarray(model.task.geometry.decode(model.task.geometry.encode(expected[None, :1] / np.float32(127.5) - 1)))
  coded = np.clip((first[0, 0] + 1) * 127.5, 0, 255)
  assert np.abs(shown[0] - coded).max() <= 1, "the known frame is the codec's image of the picture"
  assert np.abs(rest[0] - coded).mean() > 10

  moving = [np.roll(picture, 3 * t, axis=1) for t in range(24)]
  encode.write(tmp_path / "v.mp4", moving, fps=8)
  frames, known = model._given(sample.Request("x", video=str(tmp_path / "v.mp4")), (9, 32, 32), 8.0)
  assert known.tolist() == [True, True, False]  # history.frames = 2 latent frames are 5 pixel frames
  tail = sample.tail(str(tmp_path / "v.mp4"), 5, 8.0, 32, 32)
  np.testing.assert_array_equal(frames[:5], tail)


def test_files_of_a_call(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
  paths = sample.run(str(folder), [{"prompt": "a"}, {"prompt": "b", "seed": 3}], str(tmp_path / "o" / "v.mp4"), QUICK)
  assert [path.name for path in paths] == ["v-000.mp4", "v-001.mp4", "v.png"]
  with av.open(str(paths[0])) as video:
    assert sum(1 for _ in video.decode(video=0)) == 9
    assert float(video.streams.video[0].average_rate) == 8.0


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (sample.Settings(frames=10), r"--frames 10 must be 1 \+ a multiple of 4, e.g. 9 or 13"),
    (sample.Settings(width=33), "width 33 must be a multiple of 8, e.g. 32 or 40"),
    (sample.Settings(method="eular"), "did you mean 'euler'"),
    (sample.Settings(steps=0), "at least 1 step"),
  ],
)
def test_wrong_settings_name_the_legal_ones(model: sample.Model, settings: sample.Settings, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    model([sample.Request("x")], settings)


def test_a_step_cache_skips_what_its_calibration_allows(model: sample.Model, tmp_path: pathlib.Path) -> None:
  """Nothing at error 0, to the bit; the second of two calls at error 9: the residual of the first stands for it."""
  requests = [sample.Request(f"a red circle {seed}", seed=seed) for seed in range(3)]
  dense = model(requests, QUICK)
  cached = lambda error: dataclasses.replace(QUICK, cache=str(tmp_path / "cache.json"), cache_error=error)
  np.testing.assert_array_equal(model.calibrate(requests, QUICK, tmp_path / "cache.json"), dense)
  np.testing.assert_array_equal(model(requests, cached(0.0)), dense)
  skipped = model(requests, cached(9.0))
  np.testing.assert_array_equal(skipped, model(requests, cached(9.0)))
  assert np.abs(np.stack(skipped).astype(int) - dense).max() > 0
  held = json.loads((tmp_path / "cache.json").read_text())
  assert held["videos"] == 3 and held["ratio"][0] == 1.0 and held["ratio"][1] != 1.0

  with pytest.raises(WeightsError, match="another sampler: shift 1.0 there and 2.0 here; calibrate again"):
    model(requests, dataclasses.replace(cached(0.1), shift=2.0))
  params = model.params
  try:
    model.params = {**params, "null_text": params["null_text"] + 1}
    with pytest.raises(WeightsError, match="another checkpoint"):
      model(requests, cached(0.1))
  finally:
    model.params = params
  (tmp_path / "cache.json").write_text(json.dumps({**held, "ratio": [1.0]}))
  with pytest.raises(WeightsError, match=r"is damaged \(ratios of shape \(1,\), not 2 finite ones\); calibrate again"):
    model(requests, cached(0.1))
  (tmp_path / "cache.json").write_text("{}")
  with pytest.raises(WeightsError, match="is no step cache .*--calibrate_cache FILE"):
    model(requests, cached(0.1))


def test_branches_of_one_video_share_the_devices(model: sample.Model, monkeypatch: pytest.MonkeyPatch) -> None:
  """Guided, a video is two rows of a network call: four videos fill eight devices, and are what eight give."""
  made = []
  monkeypatch.setattr(
    sample.Model, "_keys", lambda self, rows, keys=sample.Model._keys: made.append(len(rows)) or keys(self, rows)
  )
  guided = dataclasses.replace(QUICK, text=3.0)
  requests = [sample.Request("a red circle", seed=seed) for seed in range(8)]
  alone = model(requests[5:6], guided)
  among = model(requests, guided)
  assert made == [4, 8] and np.abs(alone[0].astype(int) - among[5]).max() <= 1
