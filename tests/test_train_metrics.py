"""Trackers: TensorBoard's files read back, W&B offline, histograms against NumPy, traces that are always closed."""

import json
import pathlib
import struct

import av
import jax
import numpy as np
import pytest

from kling_jax import config as config_lib
from kling_jax.data import decode, encode
from kling_jax.errors import ConfigError
from kling_jax.train import histograms, loop, metrics, validation
from kling_jax.train.trace import Trace

ROOT = pathlib.Path(__file__).parents[1]
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)


def events(folder: pathlib.Path) -> list:
  """The events of a TensorBoard folder, in order."""
  from tensorboardX.proto import event_pb2

  found = []
  for path in sorted(folder.glob("events.*")):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event()
      event.ParseFromString(data[12 : 12 + length])
      found.append(event)
      data = data[16 + length :]
  return found


def values(folder: pathlib.Path) -> dict:
  """{(tag, step): value} of a TensorBoard folder."""
  return {(value.tag, event.step): value for event in events(folder) for value in event.summary.value}


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("film") / "a.mp4"
  encode.write(path, FRAMES, fps=4, crf=0)
  return path


def test_tensorboard_holds_figures_histograms_and_moving_pictures(tmp_path, film):
  writer = metrics.TensorBoard(tmp_path, 0)
  counts, edges = np.array([1, 0, 3]), np.array([-1.0, 0.0, 1.0, 2.0])
  writer.write(3, {"loss": 0.5, "table_id": "no number"})
  writer.histograms(3, {"parameters/x": (counts, edges)})
  writer.video(4, "samples", film)
  writer.close()
  held = values(tmp_path)
  assert set(held) == {("loss", 3), ("parameters/x", 3), ("samples", 4)}
  assert held["loss", 3].simple_value == 0.5
  histogram = held["parameters/x", 3].histo
  assert (histogram.min, histogram.max, histogram.num, list(histogram.bucket)) == (-1, 2, 4, [1, 0, 3])
  assert list(histogram.bucket_limit) == [0, 1, 2] and histogram.sum == -0.5 + 3 * 1.5
  image = held["samples", 4].image
  assert (image.height, image.width) == (16, 24)
  (tmp_path / "a.gif").write_bytes(image.encoded_image_string)
  with av.open(str(tmp_path / "a.gif")) as container:
    shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
  frames = np.stack([frame for _, _, frame in decode.iterate(film)]).astype(int)
  assert len(shown) == len(frames) and np.abs(np.stack(shown) - frames).mean() < 24, "3, 3 and 2 bits a colour"
  metrics.TensorBoard(tmp_path, 7).close()
  assert events(tmp_path)[-1].session_log.status == 1 and events(tmp_path)[-1].step == 8, "later steps are hidden"


def test_histograms_are_numpy_s_and_leave_out_what_is_not_finite():
  value = np.random.default_rng(1).normal(size=(7, 50)).astype(np.float32)
  counts, edges = histograms.histogram(value)
  expected, limits = np.histogram(value, histograms.BINS)
  np.testing.assert_allclose(edges, limits, rtol=1e-5, atol=1e-6)
  assert counts.sum() == value.size and np.abs(np.asarray(counts) - expected).sum() <= 2  # rounding at an edge
  value[0, :5] = [np.nan, np.inf, -np.inf, np.nan, np.inf]
  assert histograms.histogram(value)[0].sum() == value.size - 5
  for same in (np.full(4, 2.5, np.float32), np.zeros(4, np.float32)):
    counts, edges = histograms.histogram(same)
    assert counts.sum() == counts[0] == 4 and edges[0] == same[0] < edges[-1]
  assert histograms.histogram(np.full(3, np.nan, np.float32))[0].sum() == 0


def test_losses_are_told_apart_by_their_time():
  place = np.array([0.05, 0.1, 0.2, 0.95, 1.0])
  found = validation.by_time(np.array([1.0, 3.0, 5.0, 7.0, 9.0], np.float32), place)
  assert found == {"val_loss_at_0.0625": 2.0, "val_loss_at_0.1875": 5.0, "val_loss_at_0.9375": 8.0}


def test_a_trace_is_closed_where_its_span_or_the_run_ends(tmp_path):
  for name, (span, steps) in {
    "inside": ((1, 2), range(4)),
    "beyond": ((1, 9), range(3)),
    "late": ((0, 9), [5]),
  }.items():
    trace = Trace(span, tmp_path / name)
    for step in steps:
      trace.at(step)
      jax.block_until_ready(jax.numpy.ones(3) * step)
    trace.close()
    trace.close()
    assert len(list((tmp_path / name / "profile").rglob("*.xplane.pb"))) == 1, name
  Trace((), tmp_path / "none").close()
  assert not (tmp_path / "none").exists()
  for span in ((3, 3), (4, 2), (1,), (-1, 2)):
    with pytest.raises(ConfigError, match="first < last"):
      Trace(span, tmp_path)


def small(**changes):
  c = config_lib.load(str(ROOT / "configs" / "video_dit.py") + ":runlocal")
  c.update_from_flattened_dict({
    "steps": 4, "text.tokens": 24, "data.batch": 8, "sample.steps": 1, "log.every": 1, "validation.every": 2,
    "validation.rows": 8, "validation.samples": 1, "data.sources": ("worlds:shapes-v1?count=16&seed=0",), **changes,
  })  # fmt: skip
  return c


def test_histograms_without_a_tracker_are_refused(tmp_path):
  with pytest.raises(ConfigError, match=r"log\.histograms.*needs log\.tensorboard or log\.wandb"):
    histograms.Watch(small(**{"log.histograms": 2}), None)


def wandb_records(data: bytes) -> list:
  """The records of an offline run's file: LevelDB's log format behind a header of 7 bytes."""
  from wandb.proto import wandb_internal_pb2

  found, parts, place, block = [], [], 7, 32768
  while place + 7 <= len(data):
    if block - place % block < 7:
      place += block - place % block
      continue
    _, length, kind = struct.unpack("<IHB", data[place : place + 7])
    parts.append(data[place + 7 : place + 7 + length])
    place += 7 + length
    if kind in (1, 4):  # whole, or the last part
      found.append(wandb_internal_pb2.Record())
      found[-1].ParseFromString(b"".join(parts))
      parts = []
  return found


@pytest.mark.drill
def test_wandb_offline_keeps_rows_that_come_late_and_goes_on_under_its_id(tmp_path, monkeypatch, film):
  pytest.importorskip("wandb", reason="W&B is not installed: pip install 'kling_jax[track]'")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  identities = []
  for start in (0, 2):
    writer = metrics.WandB("tests", tmp_path, {"lr": 0.1})
    writer.histograms(start, {"gradients/x": (np.array([1, 2]), np.array([0.0, 1.0, 2.0]))})
    writer.video(start + 2, "samples", film)
    writer.write(start + 1, {"loss": 0.5 + start})  # a step late, as the loop writes it
    writer.close()
    identities.append(json.loads((tmp_path / "wandb.json").read_text()))
  assert identities[0] == identities[1] and identities[0]["project"] == "tests"
  logs = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
  assert logs and all(identities[0]["id"] in log.name for log in logs)
  rows = []
  for log in logs:
    for record in wandb_records(log.read_bytes()):
      row = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
      rows += [row] if row else []
  seen = {name: [int(row["step"]) for row in rows if name in row] for name in ("loss", "samples", "gradients/x")}
  assert seen == {"loss": [1, 3], "samples": [2, 4], "gradients/x": [0, 2]}, "nothing is dropped for its order"
  assert [json.loads(row["loss"]) for row in rows if "loss" in row] == [0.5, 2.5]


@pytest.mark.drill
def test_a_run_shows_its_samples_gradients_and_losses_by_time(tmp_path, monkeypatch):
  """TensorBoard and W&B offline in one run, whose trace lies beyond its end."""
  changes = {"log.tensorboard": True, "log.histograms": 2, "log.profile": (2, 99)}
  try:
    import wandb
  except ImportError:
    wandb = None
  else:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    changes["log.wandb"] = "tests"
  assert loop.run(small(**changes), tmp_path).finished
  held = values(tmp_path / "tensorboard")
  steps = lambda tag: sorted(step for name, step in held if name == tag)
  assert steps("loss") == [1, 2, 3, 4] and steps("samples") == [2, 4] and steps("failed_clips") == [1, 2, 3, 4]
  paths = {tag.partition("/")[2] for tag, _ in held if tag.startswith("gradients/")}
  assert paths == {tag.partition("/")[2] for tag, _ in held if tag.startswith("parameters/")} and len(paths) > 10
  assert all(steps(f"gradients/{path}") == [0, 2] for path in paths)
  rows = metrics.read(tmp_path / "metrics.jsonl")
  by_time = {name: value for name, value in rows[-1].items() if name.startswith("val_loss_at_")}
  assert len(by_time) >= 4 and min(by_time.values()) <= rows[-1]["val_loss"] <= max(by_time.values())
  # The gradients' largest histogram edges are theirs: their sum of squares is the step's gradient norm.
  squares = sum(v.histo.sum_squares for (tag, step), v in held.items() if tag.startswith("gradients/") and step == 2)
  assert np.sqrt(squares) == pytest.approx(rows[2]["grad_norm"], rel=0.2), "read off bins"
  assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
  if wandb is None:
    pytest.skip("W&B is not installed: pip install 'kling_jax[track]'")
  [log] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
  identity = json.loads((tmp_path / "wandb.json").read_text())
  assert identity["id"] in log.name and identity["project"] == "tests"
