"""The loop on the real text-to-video task: resume is exact, meshes agree, mistakes cost one clear line."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import pytest

from kling_jax import config as config_lib
from kling_jax.errors import ConfigError, DataError, MeshError, WeightsError
from kling_jax.train import loop, metrics, sharding, task
from kling_jax.train.checkpoint import Checkpoints
from kling_jax.train.state import Update

ROOT = pathlib.Path(__file__).parents[1]
OVERRIDES = {
  "steps": 8, "mesh.fsdp": 1, "mesh.replica": 1, "log.every": 1, "checkpoint.every": 3, "validation.every": 4,
  "validation.rows": 8, "text.tokens": 48, "data.batch": 4, "sample.steps": 2, "optimizer.warmup": 2,
  "data.sources": ("worlds:shapes-v1?count=24&seed=0",), "data.validation_fraction": 0.2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
  """Runs of the loop use one device, so that they compile small; meshes are tested by name below."""
  monkeypatch.setattr(jax, "devices", lambda *_: [jax.local_devices()[0]])


def config(**changes) -> ml_collections.ConfigDict:
  c = config_lib.load(str(ROOT / "configs" / "video_dit.py") + ":runlocal")
  c.update_from_flattened_dict({**OVERRIDES, **{key.replace("__", "."): value for key, value in changes.items()}})
  return c


def losses(folder: pathlib.Path) -> list[tuple[int, float, float | None]]:
  return [(row["step"], row["loss"], row.get("val_loss")) for row in metrics.read(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("whole")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda *_: [jax.local_devices()[0]])
    summary = loop.run(config(), folder)
  assert summary.finished and summary.step == 8
  return folder


def test_rows_carry_what_the_house_promises(uninterrupted: pathlib.Path) -> None:
  rows = metrics.read(uninterrupted / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(1, 9))
  assert {"loss", "grad_norm", "lr", "tokens", "flops", "seconds", "tokens_per_s", "data_wait", "mfu"} <= set(rows[0])
  assert [row["step"] for row in rows if "val_loss" in row] == [4, 8]
  assert rows[3]["table_id"] == rows[7]["table_id"] and rows[3]["val_stderr"] > 0
  tokens = 4 * 3 * (8 // 2) ** 2
  assert [row["tokens"] for row in rows] == [tokens * n for n in range(1, 9)]
  assert Checkpoints(uninterrupted).latest() == 8
  assert json.loads((uninterrupted / "config.json").read_text())["task"] == "video_dit"


def test_sigterm_saves_and_the_resumed_curve_is_bitwise_the_same(
  uninterrupted: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  original = Update.step

  def terminated(self, state, batch):
    if not (tmp_path / "sent").exists() and int(state["step"]) == 4:
      (tmp_path / "sent").touch()
      os.kill(os.getpid(), signal.SIGTERM)
    return original(self, state, batch)

  monkeypatch.setattr(Update, "step", terminated)
  first = loop.run(config(), tmp_path / "run")
  assert not first.finished and first.step == 5 and Checkpoints(tmp_path / "run").latest() == 5
  second = loop.run(config(data__threads=1), tmp_path / "run")
  assert second.finished
  # A validation also happens where the run was told to leave; the curve itself is the same to the last bit.
  assert [row[:2] for row in losses(tmp_path / "run")] == [row[:2] for row in losses(uninterrupted)]
  assert losses(tmp_path / "run")[-1] == losses(uninterrupted)[-1]


def test_sigkill_at_a_random_moment_and_resume_is_bitwise_the_same(
  uninterrupted: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  script = (
    "import sys, jax; from absl import flags; flags.FLAGS.mark_as_parsed()\n"
    f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
    "import test_train_loop as t\n"
    "jax_devices = jax.devices; jax.devices = lambda *_: [jax_devices()[0]]\n"
    "t.loop.run(t.config(), sys.argv[1])\n"
  )
  folder = tmp_path / "run"
  target = random.randint(2, 7)
  process = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT)
  deadline = time.monotonic() + 240
  while len(metrics.read(folder / "metrics.jsonl")) < target and process.poll() is None:
    assert time.monotonic() < deadline, "the run never reached its step"
    time.sleep(0.01)
  process.kill()
  process.wait()
  loop.run(config(), folder)
  assert losses(folder) == losses(uninterrupted), f"killed after row {target}"


def test_metrics_beyond_the_checkpoint_and_torn_lines_are_cut(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
  writer = metrics.JsonLines(path, resume_step=1)
  writer.write(2, {"loss": 2.5})
  writer.close()
  assert metrics.read(path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2.5}]


def test_validation_depends_on_the_row_alone(uninterrupted: pathlib.Path, tmp_path: pathlib.Path) -> None:
  """The same weights give the same validation loss when the table is cut into other batches."""
  whole = losses(uninterrupted)[-1][2]
  c = config(data__batch=8)
  job = task.make(c)
  update = Update(job, sharding.make_mesh(c.mesh))
  params = Checkpoints(uninterrupted).restore_params(8, job.shapes)
  table = job.validation_rows(0, 1, 1)
  assert [batch["index"].tolist() for batch in table] == [list(range(8))]
  again = np.asarray(update.evaluate(params, sharding.put_batch(update.mesh, table[0])))
  assert again.mean() == pytest.approx(whole, rel=1e-5)


def test_used_work_directory_refuses_another_config(uninterrupted: pathlib.Path) -> None:
  with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.002 -> 0\.1"):
    loop.run(config(optimizer__lr=0.1), uninterrupted)


def test_batch_that_does_not_divide_names_the_legal_sizes(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ConfigError, match="3"):
    loop.run(config(optimizer__accumulate=3), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_mesh_that_does_not_divide_is_refused_before_anything_is_written(tmp_path: pathlib.Path) -> None:
  with pytest.raises(MeshError, match="needs 3 devices, there are 1"):
    loop.run(config(mesh__tensor=3), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_empty_folder_and_folder_of_broken_files(tmp_path: pathlib.Path, shared: pathlib.Path) -> None:
  (tmp_path / "empty").mkdir()
  for folder in (tmp_path / "empty", shared / "videos" / "broken" / ".." / "broken"):
    broken = folder == tmp_path / "empty"
    if not broken:
      folder = tmp_path / "broken"
      folder.mkdir()
      for name in ("zero_bytes.mp4", "random_bytes.mkv", "text_renamed.mp4"):
        (folder / name).write_bytes((shared / "videos" / "broken" / name).read_bytes())
    with pytest.raises(DataError):
      loop.run(config(data__sources=(str(folder),), model__conditions=()), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_model_is_refused(uninterrupted: pathlib.Path, tmp_path: pathlib.Path) -> None:
  import shutil

  shutil.copytree(uninterrupted / "checkpoints", tmp_path / "run" / "checkpoints")
  with pytest.raises(WeightsError, match=r"of another model: '.*' is float32"):
    loop.run(config(text__width=32), tmp_path / "run")


def test_warm_start_loads_by_name_and_reports(uninterrupted: pathlib.Path, tmp_path: pathlib.Path) -> None:
  loop.run(config(init_from=str(uninterrupted), steps=1, optimizer__lr=0.0), tmp_path / "run")
  report = json.loads((tmp_path / "run" / "init_report.json").read_text())[0]
  assert report["step"] == 8 and not report["missing"] and not report["unexpected"]
  job = task.make(config())
  before = Checkpoints(uninterrupted).restore_params(8, job.shapes)
  after = Checkpoints(tmp_path / "run").restore_params(1, job.shapes)
  jax.tree.map(np.testing.assert_array_equal, dict(after), dict(before))
  changed = config(init_from=str(uninterrupted), model__conditions=("motion", "aesthetic", "clarity", "vtss"))
  with pytest.raises((WeightsError, DataError), match="vtss"):
    loop.run(changed, tmp_path / "other")


def test_restore_on_another_mesh(uninterrupted: pathlib.Path) -> None:
  job = task.make(config())
  mesh = sharding.make_mesh({"replica": 1, "fsdp": 4, "context": 2, "tensor": 1}, jax.local_devices())
  update = Update(job, mesh)
  checkpoints = Checkpoints(uninterrupted)
  state = checkpoints.restore(8, update.abstract, update.shardings)
  plain = checkpoints.restore_params(8, job.shapes)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), dict(state["ema"]), dict(plain)
  )
  assert int(state["step"]) == 8
  kernel = state["params"]["dit.blocks.mlp.up.kernel"]
  assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
