"""Koala-36M's study as a sweep: its sets out of raw footage, its arms, and two of them run."""

import collections
import dataclasses
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest

from kling_jax import cli
from kling_jax.curation import ablation
from kling_jax.curation.video import Recipe
from kling_jax.data import clip_table, conditions, encode, records, worlds
from kling_jax.errors import DataError
from kling_jax.scaling import sweep

QUICK = {"min_seconds": 0.5, "short_side": None, "scorers": "motion,aesthetic,clarity"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
  """Films of two and three shots of shapes-v1, with captions beside them."""
  folder = tmp_path_factory.mktemp("koala") / "videos"
  folder.mkdir()
  source = worlds.WorldSource(count=20)
  for k in range(6):
    shots = [source.frames(3 * k + j, np.arange(24) / 12, 64, 96) for j in range(2 + k % 2)]
    encode.write(folder / f"film{k}.mp4", np.concatenate(shots), fps=12)
    (folder / f"film{k}.txt").write_text(f"A film of shapes, number {k}, over a background. It has more than one shot.")
  return folder


@pytest.fixture(scope="module")
def sets(videos) -> pathlib.Path:
  """Built, scored (by a stand-in for the suitability model: twice the clarity and one) and built to the end."""
  output = videos.parent / "sets"
  kept = {"unfiltered": Recipe(**QUICK), "panda": Recipe(**QUICK | {"method": "content", "max_seconds": 1.0})}
  made = ablation.build(videos, output, **kept, suitable=("vtss >= 1.9",), workers=1)
  assert "have no VTSS" in made.missing and set(made.clips) == {"panda", "unfiltered", "manual"}
  rate = lambda clip: dataclasses.replace(clip, vtss=1 + 2 * clip.scores["clarity"].value)
  records.rewrite(output / "unfiltered", rate)
  made = ablation.build(videos, output, **kept, suitable=("vtss >= 1.9",), workers=1)
  assert not made.missing and set(made.clips) == {"panda", "unfiltered", "manual", "vtss"}
  return output


def rows(folder: pathlib.Path) -> list[dict]:
  return pq.read_table(folder / clip_table.TABLE).to_pylist()


def test_the_sets_are_what_the_study_says(sets):
  whole, panda = rows(sets / "unfiltered"), rows(sets / "panda")
  assert all(row["status"] == "kept" for row in [*whole, *panda])
  assert all(row["end_s"] - row["start_s"] <= 1.05 for row in panda) and len(panda) > len(whole)
  assert {row["caption"].count(" ") < 13 and "more than one" not in row["caption"] for row in panda} == {True}
  assert all(row["caption"].endswith("It has more than one shot.") for row in whole)
  for name in ("manual", "vtss"):
    derived = rows(sets / name)
    assert [row["clip_id"] for row in derived] == [row["clip_id"] for row in whole]
    assert records.verify(sets / name).ok and (sets / name / conditions.FILE).exists()
  suited = {row["clip_id"] for row in rows(sets / "vtss") if row["status"] == "kept"}
  assert suited == {row["clip_id"] for row in whole if row["vtss"] >= 1.9} and 0 < len(suited) < len(whole)
  limits = {name: np.quantile([row[f"{name}_score"] for row in whole], 0.085) for name in ("clarity", "motion")}
  for row in rows(sets / "manual"):
    if row["status"] == "kept":
      assert all(row[f"{name}_score"] >= limit - 1e-12 for name, limit in limits.items())
  with pytest.raises(DataError, match="no clip of .* is kept by vtss >= 9"):
    ablation.derive(sets / "unfiltered", sets / "none", ("vtss >= 9",))


def test_the_sweep_has_the_arms_of_the_paper_and_the_one_it_lacks():
  study = sweep.load("koala_ablation")
  found = study.runs()
  assert len(found) == 21
  arms = collections.Counter(run.arms[0] for run in found)
  assert set(arms.values()) == {3} and set(arms) == {
    "panda", "unfiltered", "manual", "vtss", "unfiltered_conditions", "manual_conditions", "vtss_conditions",
  }  # fmt: skip
  for run in found:
    assert (run.arms[0].endswith("_conditions")) == bool(run.config.model.conditions)
    assert run.config.data.validation_sources == ("runs/koala/sets/unfiltered",)
  assert len({(run.config.steps, run.config.data.batch, run.config.model.size) for run in found}) == 1, "equal steps"


@pytest.mark.drill
def test_two_arms_train_from_raw_footage_to_curves(sets, tmp_path):
  (tmp_path / "two.py").write_text(f"""
from kling_jax.scaling import sweep as sweeps

STUDY = sweeps.load("koala_ablation").module


def get_config():
  c = STUDY.get_config("runlocal")
  c.steps, c.data.batch, c.data.fps, c.data.validation_fraction = 20, 8, 12.0, 0.2
  c.validation.every, c.validation.rows = 10, 8
  return c


def sweep():
  yield from STUDY.runs({str(sets)!r}, seeds=(0,), arms=("vtss", "vtss_conditions"))
""")
  words = ["sweep", "run", str(tmp_path / "two.py"), "--workdir", str(tmp_path / "runs"), "--workers", "1"]
  assert cli.main(words) == 0
  status = ["sweep", "status", str(tmp_path / "two.py"), "--workdir", str(tmp_path / "runs")]
  assert cli.main([*status, "--html", str(tmp_path / "curves.html")]) == 0
  text = (tmp_path / "curves.html").read_text()
  assert "vtss_conditions" in text
