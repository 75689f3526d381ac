"""`kling sweep design`: plans that add up, sweep files for budgets, the next runs, and mistakes that cost one line."""

import json
import math
import pathlib

import numpy as np
import pytest

from kling_jax import cli
from kling_jax.scaling import planning, published
from kling_jax.scaling.ledger import Ledger
from kling_jax.train import peak


def answer(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
  assert cli.main(["sweep", "design", *words, "--json"]) == 0
  return json.loads(capsys.readouterr().out)


@pytest.mark.drill
def test_the_papers_study_is_planned_run_by_run(capsys: pytest.CaptureFixture[str]) -> None:
  words = ["video_dit_paper", "--device", "TPU v5p", "--devices", "8", "--mfu", "0.4", "--price", "4"]
  found = answer(words, capsys)
  runs = found["runs"]
  assert found["adaptive"] and found["total"]["runs"] == len(runs) == 107
  sizes = {run["size"]: run["params"] for run in runs if "tuned" in run["arms"]}
  assert sizes == {"n0.017b": 256**3, "n0.057b": 384**3, "n0.13b": 512**3, "n0.26b": 640**3}
  grid = [run for run in runs if run["size"] == "n0.26b" and "tuned" in run["arms"]]
  assert len(grid) == 16 and {run["tokens"] for run in grid} == {grid[0]["tokens"]} and grid[0]["reads"] == 6
  assert grid[0]["tokens"] == pytest.approx(12e9, rel=1e-4)
  budgets = sorted({float(f"{run['flops']:.1g}") for run in runs if "isoflop" in run["arms"]})
  assert budgets == [3e17, 6e17, 1e18, 3e18, 6e18]
  hours = found["total"]["flops"] / (peak.DEVICE_PEAKS["TPU v5p"] * 0.4) / 3600
  assert found["total"]["device_hours"] == pytest.approx(hours)
  assert found["total"]["dollars"] == pytest.approx(4 * hours)
  assert runs[0]["hours"] == pytest.approx(runs[0]["device_hours"] / 8)


def test_budgets_become_a_sweep_file_around_a_law(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
  path = tmp_path / "made.py"
  words = ["--flops", "1e16,1e17", "--sizes", "3", "--spread", "4", "--device", "TPU v5e", "--multiple", "2"]
  assert cli.main(["sweep", "design", *words, "--dry_run", "--out", str(path)]) == 0
  assert "6 runs" in capsys.readouterr().out and not path.exists()
  made = answer([*words, "--out", str(path)], capsys)
  again = answer([str(path), "--device", "TPU v5e"], capsys)
  assert [run["run"] for run in made["runs"]] == [run["run"] for run in again["runs"]]
  law = published.get("yin2024")
  for budget in (1e16, 1e17):
    mine = [run for run in made["runs"] if 0.5 < run["flops"] / budget < 2]
    middle = math.exp(np.mean([math.log(run["params"]) for run in mine]))
    assert len(mine) == 3 and middle == pytest.approx(float(law("params", flops=budget)), rel=0.2)
    assert max(run["params"] for run in mine) / min(run["params"] for run in mine) == pytest.approx(16, rel=0.5)
  hours = 1e17 / (peak.DEVICE_PEAKS["TPU v5e"] * 0.5) / 3600
  paid = answer(["--device_hours", str(hours), "--mfu", "0.5", *words[2:]], capsys)
  assert [run["run"] for run in paid["runs"]] == [run["run"] for run in made["runs"] if run["flops"] > 5e16]


def _ledger(folder: pathlib.Path) -> pathlib.Path:
  """A ledger of made-up results around a known optimum, with one repeat."""
  ledger = Ledger(folder)
  draw = np.random.default_rng(0)
  for n in (16**3, 32**3, 48**3):
    for lr in (3e-3, 6e-3, 1.2e-2):
      for batch, seed in ((384, 0), (768, 0), (768, 1), (1536, 0)):
        points = []
        for t in (1e5, 2e5, 4e5):
          loss = 0.3 + 3.0 * n**-0.3 + 20 * t**-0.4
          loss *= 1 + 0.03 * math.log(lr / 6e-3) ** 2 + 0.03 * math.log(batch / 768) ** 2
          loss += 1e-3 * draw.normal()
          points.append({"step": t / batch, "tokens": t, "flops": 6 * n * t, "loss": loss, "stderr": 0.01})
        run = f"{n}-{lr}-{batch}-{seed}"
        ledger.claim([run])
        shared = {"params": n, "lr": lr, "batch_tokens": batch, "seed": seed, "flop_rule": "exact", "table_id": "x"}
        rest = dict.fromkeys(("width", "depth", "context", "ema_decay", "wall_s"), 1)
        ledger.end(run, "finished", {**shared, **rest, "arms": ["tuned"], "split": "fit", "points": points})
  return folder


def test_the_next_runs_are_chosen_by_what_the_ledger_holds(tmp_path: pathlib.Path, capsys) -> None:
  folder = str(_ledger(tmp_path))
  found = answer(["shapes_tiny", "--workdir", folder, "--next", "4", "--aim", "1e6,1e6"], capsys)
  assert 5e-4 < found["sigma"] < 2e-3, "measured on the repeats"
  assert len(found["runs"]) == 4
  per_flop = [run["gain_per_flop"] for run in found["runs"]]
  assert per_flop == sorted(per_flop, reverse=True) and all(run["gain"] > 0 for run in found["runs"])
  assert all(2e-3 < run["lr"] < 2.5e-2 for run in found["runs"])
  assert cli.main(["sweep", "design", "shapes_tiny", "--workdir", folder, "--next", "2"]) == 0
  assert "gain" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([], "give a sweep file, or budgets by --flops or --device_hours"),
    (["--flops", "1e17,lots"], "--flops '1e17,lots' is not of the form"),
    (["--flops", "-1"], "give some positive numbers"),
    (["--flops", "1e17", "--device", "TPU v5q"], "did you mean"),
    (["--flops", "1e17", "--device", "TPU v5p", "--sizes", "2"], "--sizes must be at least 3"),
    (["--flops", "1e17", "--device", "TPU v5p", "--out", "x.txt"], "a sweep is a .py file"),
    (["--next", "3"], "--next needs the sweep file"),
    (["nothing_like_it", "--device", "TPU v5p"], "no sweep file at nothing_like_it"),
  ],
)
def test_mistakes_cost_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
  assert cli.main(["sweep", "design", *words]) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and message in lines[0]


def test_noise_without_repeats_is_a_stated_guess() -> None:
  row = {"params": 1, "tokens": 1, "lr": 1, "batch_tokens": 1, "loss": 0.5}
  assert planning.noise([row, row | {"lr": 2}]) == pytest.approx(0.5 * planning.NOISE)
  assert planning.noise([row, row | {"loss": 0.52}]) == pytest.approx(0.02 / math.sqrt(2))
