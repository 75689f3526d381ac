"""Every committed config runs at `:runlocal`, to the end, with a falling loss where it trains long enough."""

import pathlib

import pytest

from kling_jax import config as config_lib
from kling_jax.models import video_dit
from kling_jax.nn import params as params_lib
from kling_jax.train import loop, metrics, task

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if not path.stem.startswith("_"))


@pytest.mark.drill
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_runs_locally(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
  summary = loop.run(
    config_lib.load(f"{path}:runlocal", ["--config.log.profile=(2, 4)", "--config.log.every=1"]), tmp_path
  )
  assert list((tmp_path / "profile").rglob("*.xplane.pb")), "the steps that log.profile names are traced"
  rows = metrics.read(tmp_path / "metrics.jsonl")
  assert summary.finished and rows[-1]["step"] == summary.step
  losses = [row["loss"] for row in rows]
  assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("size", sorted(video_dit.PRESETS))
def test_every_size_of_the_video_dit_describes_itself_without_memory(size: str) -> None:
  c = config_lib.load(f"{ROOT / 'configs' / 'video_dit.py'}:size={size}")
  with c.unlocked():
    c.codec.weights = "nowhere"
  job = task.make(c)
  assert params_lib.count(job.shapes) > 1e6
  assert set(job.axes) == set(job.shapes)
