"""`kling eval` on checkpoints: samples against held-out clips, a world model in memory-v1, and VBench's suites."""

import json
import pathlib

import numpy as np
import pytest
import test_generate_rollout

from kling_jax import cli
from kling_jax import config as config_lib
from kling_jax.data import decode, grid
from kling_jax.evals import fidelity
from kling_jax.train import loop

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
  """A video_dit work directory after two steps, with held-out clips."""
  c = config_lib.load("video_dit:runlocal")
  c.update_from_flattened_dict({
    "steps": 2, "validation.every": 0, "data.batch": 8, "sample.steps": 2, "data.validation_fraction": 0.5,
    "data.sources": ("worlds:shapes-v1?count=16&seed=0",), "text.tokens": 48,
  })  # fmt: skip
  folder = tmp_path_factory.mktemp("run")
  loop.run(c, folder)
  return folder


def answer(capsys, *words: str) -> dict:
  capsys.readouterr()
  assert cli.main(["eval", *words, "--json"]) == 0
  return json.loads(capsys.readouterr().out)


def test_samples_are_compared_with_held_out_clips_and_a_given_image_is_their_first_frame(run, capsys):
  words = ["run", "--workdir", str(run), "--count", "3", "--steps", "2"]
  found = answer(capsys, *words)
  assert found["videos"] == {"made": 3, "true": 3} and found["distances"]["low_frequency_frechet"] > 0
  assert "psnr" not in found["figures"]["made"] and found["notes"][0].startswith("3 held-out clips at step 2")
  paired = answer(capsys, *words, "--given", "image", "--out", str(run / "pairs"))
  assert 0 < paired["figures"]["made"]["psnr"]["mean"] < 60 and -1 <= paired["figures"]["made"]["ssim"]["mean"] <= 1
  ids = lambda one, kind: [row["name"] for row in one["rows"] if row["set"] == kind]
  assert ids(found, "made") == ids(found, "true") == ids(paired, "made")
  page = (run / "pairs" / "index.html").read_text()
  assert page.count("<video") == 3 and "half of their difference" in page
  again = answer(capsys, *words, "--out", str(run / "again"))
  assert again["distances"] == found["distances"], "equal seeds, equal samples"
  assert cli.main(["eval", *words, "--given", "video"]) == 2


def test_vbench_videos_of_a_run_start_with_the_suites_pictures(run, tmp_path, capsys):
  suite = [{"prompt_en": "a red circle", "dimension": ["i2v_subject"], "image_name": "a.png"}]
  (tmp_path / "i2v.json").write_text(json.dumps(suite))
  words = ["vbench", "--workdir", str(run), "--suite", str(tmp_path / "i2v.json"), "--out", str(tmp_path / "out"),
           "--steps", "1"]  # fmt: skip
  assert cli.main(["eval", *words]) == 2, "no pictures"
  words += ["--images", str(tmp_path)]
  assert cli.main(["eval", *words]) == 1, "a picture is missing"
  grid.write_png(tmp_path / "a.png", np.full((64, 64, 3), (200, 40, 40), np.uint8))
  found = answer(capsys, *words)
  assert found["videos"] == 5 and "evaluate_i2v.py" in found["command"] and "i2v_subject" in found["command"]
  files = sorted((tmp_path / "out").glob("*.mp4"))
  assert [path.name for path in files] == [f"a red circle-{k}.mp4" for k in range(5)]
  first = [next(decode.iterate(path))[2] for path in files]
  assert all(fidelity.psnr(frame[None], np.full_like(frame, (200, 40, 40))[None])[0] > 20 for frame in first)
  scores = {name: 0.9 for name in ("i2v_subject", "i2v_background", "subject_consistency", "background_consistency",
                                   "motion_smoothness", "dynamic_degree", "aesthetic_quality", "imaging_quality",
                                   "camera_motion")}  # fmt: skip
  (tmp_path / "scores.json").write_text(json.dumps({name: [score, []] for name, score in scores.items()}))
  total = answer(capsys, "vbench", "--scores", str(tmp_path / "scores.json"), "--total", "i2v")
  assert total["total"] == pytest.approx((total["quality"] + total["other"]) / 2)
  assert cli.main(["eval", "vbench", "--scores", str(tmp_path / "scores.json"), "--total", "long"]) == 2
  assert cli.main(["eval", "vbench", "--suite", "x"]) == 2


def test_a_world_model_is_told_stories_and_its_rollouts_fill_vbench_long(tmp_path, capsys):
  folder = test_generate_rollout.write_run(tmp_path / "world", data__prompt_tokens=120, data__dynamics_tokens=80)
  found = answer(capsys, "world", "--workdir", str(folder), "--worlds", "1", "--clips", "2", "--steps", "1")
  following = {kind: figures["following"]["mean"] for kind, figures in found["figures"].items()}
  assert following["true"] == 1 and 0 <= following["made"] <= 1
  assert (folder / "report" / "world" / "index.html").read_text().count("<video") == 1
  (tmp_path / "full.json").write_text(json.dumps([{"prompt_en": "a red circle", "dimension": ["dynamic_degree"]}]))
  out = tmp_path / "out"
  found = answer(capsys, "vbench", "--workdir", str(folder), "--suite", str(tmp_path / "full.json"), "--out", str(out),
                 "--clips", "2")  # fmt: skip
  assert found["videos"] == 5
  assert decode.probe(out / "a red circle-0.mp4").num_frames == 2 * 5
