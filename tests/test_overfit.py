"""The smallest model learns eight real clips by heart, and its samples show them."""

import csv
import pathlib
import time

import jax
import numpy as np
import pytest

from kling_jax import config as config_lib
from kling_jax.data import decode, encode
from kling_jax.nn import rng
from kling_jax.train import loop, sharding, task
from kling_jax.train.checkpoint import Checkpoints
from kling_jax.train.state import Update

ROOT = pathlib.Path(__file__).parents[1]
CLIPS = (
  "stream_of_water.mp4", "turtle_tiny.flv", "carphone_qcif.mp4", "plant_window_short.mp4",
  "asl_sign_eat.mkv", "wolf_turns_head.mp4", "street_protest_sign.mp4", "film_office_bw.mp4",
)  # fmt: skip
STEPS, FRAMES, SIDE, FPS = 600, 5, 32, 8


@pytest.fixture(scope="module")
def footage(shared: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("footage")
  with (shared / "videos" / "MANIFEST.csv").open(encoding="utf-8") as file:
    captions = {row["file"]: row["caption"] for row in csv.DictReader(file)}
  times_s = 0.5 + np.arange(FRAMES) / FPS
  for name in CLIPS:
    clip = (folder / name).with_suffix(".mp4")
    encode.write(clip, decode.frames_at(shared / "videos" / name, times_s, 64, 64), fps=FPS)
    clip.with_suffix(".txt").write_text(captions[name], encoding="utf-8")
  return folder


def test_eight_real_clips_are_learnt_by_heart(
  footage: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(jax, "devices", lambda *_: [jax.local_devices()[0]])
  c = config_lib.load(str(ROOT / "configs" / "video_dit.py") + ":runlocal")
  c.update_from_flattened_dict({
    "data.sources": (str(footage),), "data.buckets": ((FRAMES, SIDE, SIDE),), "data.batch": 8, "steps": STEPS,
    "model.conditions": (), "data.validation_fraction": 0.0, "validation.every": 0, "checkpoint.every": STEPS,
    "text.tokens": 20, "optimizer.lr": 5e-3, "optimizer.schedule": "wsd", "optimizer.decay": 0.3, "drop.text": 0.0,
    "history.probability": 0.0, "ema.decay": 0.97, "log.every": 50, "sample.text": 1.0, "sample.steps": 16,
  })  # fmt: skip
  job = task.make(c)
  update = Update(job, sharding.make_mesh(c.mesh))
  table = job.batches("train", 0, 1, 1).fixed_rows(32)

  def table_loss(params) -> float:
    losses = [update.evaluate(params, sharding.put_batch(update.mesh, batch)) for batch in table]
    return float(np.concatenate(losses).mean())

  start = time.monotonic()
  loop.run(c, tmp_path)
  seconds = time.monotonic() - start
  trained = Checkpoints(tmp_path).restore_params(STEPS, job.shapes)
  # The head starts at zero: the untrained prediction is 0, its loss the mean square of the velocity.
  fresh = {name: np.zeros_like(value) if name.startswith("dit.head") else value for name, value in trained.items()}
  first, last = table_loss(fresh), table_loss(trained)
  print(f"fixed table: {first:.3f} -> {last:.3f} ({last / first:.1%}) in {seconds:.0f} s")
  assert last < 0.25 * first

  # Samples under the clips' captions, against noise that went through the same codec.
  rows = {name: value for name, value in table[0].items() if name != "frames"}
  shown = table[0]["frames"].astype(np.float32) / 255
  keys_B = rng.sample_keys(jax.random.key(5), 0, np.arange(len(shown)))
  sampled = np.asarray(job.sampler(job.recipe(FRAMES, SIDE, SIDE))(trained, rows, keys_B)).astype(np.float32) / 255
  noise = np.random.default_rng(0).normal(size=(len(shown), *job.geometry.latent_shape(FRAMES, SIDE, SIDE)))
  noise = (np.clip(np.asarray(job.geometry.decode(noise.astype(np.float32))), -1, 1) + 1) / 2
  distance = lambda videos: np.sqrt([((video - shown) ** 2).mean((1, 2, 3, 4)).min() for video in videos])
  print(f"distance to the nearest clip (RMS of pixels in [0, 1]): samples {distance(sampled).mean():.3f}, "
        f"noise {distance(noise).mean():.3f}")  # fmt: skip
  assert distance(sampled).mean() < 0.8 * distance(noise).mean()
