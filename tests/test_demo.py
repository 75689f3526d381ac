"""The demo from rendered films to the page, with a handful of steps; run again, nothing is repeated."""

import json
import pathlib

import pytest

from kling_jax import cli
from kling_jax.data import records
from kling_jax.train import metrics


@pytest.mark.drill
def test_the_whole_chain(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  folder = tmp_path / "demo"
  assert cli.main(["demo", "--workdir", str(folder), "--steps", "12"]) == 0
  assert "motion, told high" in capsys.readouterr().out
  truth = json.loads((folder / "films" / "films.json").read_text())
  shots = sum(len(film["shots"]) for film in truth["films"])
  kept = len(records.RecordSource(folder / "set"))
  assert 0.8 * shots <= kept <= shots
  rows = metrics.read(folder / "train" / "metrics.jsonl")
  assert rows[-1]["step"] == 12 and rows[-1]["loss"] < rows[0]["loss"]
  assert len(list((folder / "samples").glob("motion-*.mp4"))) == 24
  page = (folder / "report" / "index.html").read_text()
  assert page.count("<video") >= 12 and "http" not in page.split("<script>")[0].split("</style>")[1]

  before = (folder / "train" / "metrics.jsonl").read_bytes()
  assert cli.main(["demo", "--workdir", str(folder), "--steps", "12"]) == 0
  assert (folder / "train" / "metrics.jsonl").read_bytes() == before


def test_a_folder_that_is_none_is_refused_before_anything_is_written(
  tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
  assert cli.main(["demo", "--workdir", str(tmp_path / "d"), "--videos", str(tmp_path / "none")]) == 2
  assert "is no folder" in capsys.readouterr().err and not (tmp_path / "d").exists()
