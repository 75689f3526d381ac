"""The page of runs: it says what metrics.jsonl holds, warns where that is due, and draws in a browser."""

import json
import math
import pathlib

import numpy as np
import pytest
from browser import launch

from kling_jax import cli
from kling_jax import config as config_lib
from kling_jax.data import encode
from kling_jax.errors import UsageError
from kling_jax.generate import run_report
from kling_jax.train import workdir

STEPS = 1500


def made(folder: pathlib.Path, **changes) -> pathlib.Path:
  """A work directory as training leaves it: 1500 rows, validation every 500, one sample."""
  c = config_lib.load("video_dit")
  c.update_from_flattened_dict({"steps": STEPS, "optimizer.lr": 1e-3, **changes})
  (folder / "checkpoints").mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config_lib.plain(c)))
  rows = []
  for step in range(1, STEPS + 1):
    row = {"step": step, "loss": 2 / step**0.5, "grad_norm": 1.0, "lr": 1e-3, "skipped": 0.0, "failed_clips": 0,
           "tokens": 100 * step, "flops": 1e6 * step, "seconds": 0.5 * step, "steps_per_s": 2.0, "tokens_per_s": 200.0,
           "data_wait": 0.01}  # fmt: skip
    if step % 500 == 0:
      row |= {"val_loss": 1 / step, "val_stderr": 1e-5, "table_id": "t", "val_loss_at_0.0625": 0.5 / step,
              "val_loss_at_0.9375": 1.5 / step}  # fmt: skip
    rows.append(row)
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  encode.write(folder / "samples" / "00001500.mp4", np.zeros((3, 16, 16, 3), np.uint8), fps=4)
  return folder


def change(folder: pathlib.Path, edit) -> run_report.Run:
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  for row in rows:
    edit(row)
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return run_report.Run.read(folder, "r")


def test_curves_are_the_rows_thinned_to_means(tmp_path):
  run = run_report.Run.read(made(tmp_path / "a"), "a")
  steps, values = run.curve("loss")
  assert len(steps) == len(values) == run_report.POINTS and steps[-1] == STEPS
  whole = [2 / step**0.5 for step in range(1, STEPS + 1)]
  assert np.mean(np.repeat(values, np.diff([0, *steps]).astype(int))) == pytest.approx(np.mean(whole))
  assert run.curve("val_loss") == ([500, 1000, 1500], [1 / 500, 1 / 1000, 1 / 1500])
  assert run_report.warnings(run) == [] and run_report.among([run, run]) == []
  assert run_report.figures([run]) == [
    "loss",
    "val_loss",
    "grad_norm",
    "lr",
    "tokens_per_s",
    "steps_per_s",
    "data_wait",
  ]


@pytest.mark.parametrize(
  ("edit", "message"),
  [
    (lambda row: row.update(loss=math.nan) if row["step"] in (7, 9) else None, "not finite at update 7, and in 2 rows"),
    (lambda row: row.update(skipped=3.0 if row["step"] > 900 else 0.0), "3 updates were skipped"),
    (lambda row: row.update(failed_clips=2), "2 clips could not be decoded"),
    (lambda row: row.update(data_wait=0.4 if row["step"] > 700 else 0.0), "waits for data 40 % of the time"),
    (lambda row: row.update(val_loss=0.9) if row["step"] == 1500 else None, "has risen since update 1000"),
    (lambda row: row.update(table_id="u") if row["step"] == 1500 else None, "validation table changed"),
  ],
)
def test_what_is_wrong_with_a_run_is_said(tmp_path, edit, message):
  [found] = run_report.warnings(change(made(tmp_path / "a"), edit))
  assert message in found


def test_runs_of_other_tables_do_not_compare_and_stopped_or_empty_ones_say_so(tmp_path):
  a = run_report.Run.read(made(tmp_path / "a"), "a")
  b = change(made(tmp_path / "b", steps=2000), lambda row: row.update(table_id="u") if "table_id" in row else None)
  assert "do not compare" in run_report.among([a, b])[0]
  assert run_report.warnings(b) == ["it stands at update 1500 of 2000"]
  (tmp_path / "b" / "metrics.jsonl").unlink()
  assert run_report.warnings(run_report.Run.read(tmp_path / "b", "b")) == ["it has written no figures yet"]


def test_names_tell_folders_apart(tmp_path):
  top = tmp_path
  assert run_report.names([top / "a", top / "b"]) == ["a", "b"]
  assert run_report.names([top / "x" / "run", top / "y" / "run"]) == ["x/run", "y/run"]
  with pytest.raises(UsageError, match="given twice"):
    run_report.names([top / "a", top / "x" / ".." / "a"])


def test_the_verb_puts_runs_side_by_side_and_the_page_draws(tmp_path, capsys):
  pytest.importorskip("plotly")
  a, b = made(tmp_path / "a"), made(tmp_path / "b", **{"optimizer.lr": 2e-3, "data.fps": 3.0})
  assert cli.main(["report", str(a)]) == 0
  assert capsys.readouterr().out.strip() == str(a / "report" / "index.html")
  out = tmp_path / "both.html"
  assert cli.main(["report", str(a), "--input", str(b), "--out", str(out)]) == 0
  with launch(tmp_path / "profile") as browser:
    for path, runs in ((a / "report" / "index.html", 1), (out, 2)):
      browser.open(path)
      drawn = browser.run("document.querySelectorAll('.js-plotly-plot .main-svg').length")
      assert drawn >= 3 * 8 and browser.problems == []
      traces = browser.run("CHARTS[0].data.map(curve => [curve.name, curve.x.length])")
      assert traces == [[name, run_report.POINTS] for name in "ab"[:runs]]
      assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}
      text = browser.run("document.body.textContent")
      assert ("optimizer.lr0.0010.002" in text) == (runs == 2)
  for words, message in (
    ([str(a), str(b)], "--out"), ([str(a), str(tmp_path)], "no work directory"), ([], "needs a clip set"),
    ([str(a), str(a), "--out", str(out)], "given twice"),
  ):  # fmt: skip
    assert cli.main(["report", *words]) == 2
    assert message in capsys.readouterr().err


def test_keys_of_the_trainer_that_came_later_have_their_defaults(tmp_path):
  folder = made(tmp_path / "a")
  config = json.loads((folder / "config.json").read_text())
  del config["log"]["histograms"], config["validation"]["rows"]
  (folder / "config.json").write_text(json.dumps(config))
  read = workdir.read_config(folder)
  assert read.log.histograms == 0 and "rows" not in read.validation, "what decides what is learned is not made up"
