"""Sweep files: what a run's id depends on, what is refused, grids that meet, costs that the trainer agrees with."""

import math
import pathlib

import numpy as np
import pytest

from kling_jax import config as config_lib
from kling_jax.errors import ConfigError
from kling_jax.scaling import arms, design, sweep

ROOT = pathlib.Path(__file__).parents[1]
FILE = """
from kling_jax import config

def get_config():
  c = config.load("video_dit:runlocal")
  c.model.size, c.model.conditions = "d16", ()
  c.codec.channels = 4
  c.text.width, c.text.depth, c.text.tokens = 16, 1, 16
  c.data.buckets = ((5, 16, 16),)
  return c

"""


def written(folder: pathlib.Path, body: str) -> sweep.Sweep:
  path = folder / "some_sweep.py"
  path.write_text(FILE + body)
  return sweep.load(str(path))


def test_runs_are_complete_configs_of_their_own(tmp_path: pathlib.Path) -> None:
  loaded = written(tmp_path, "def sweep():\n  for lr in (1e-3, 2e-3): yield {'optimizer.lr': lr, 'data.batch': 4}\n")
  first, second = loaded.runs()
  assert (first.config.optimizer.lr, second.config.optimizer.lr) == (1e-3, 2e-3)
  assert first.config.data.batch == 4 and first.config.model.size == "d16"
  assert first.id != second.id and first.program == second.program
  assert [run.id for run in loaded.runs()] == [first.id, second.id]


@pytest.mark.parametrize(
  ("key", "value", "same"),
  [
    ("data.sources", ("/elsewhere/clips",), True),
    ("data.sources", ("tfds:/elsewhere/clips",), False),
    ("data.sources", ("/data/other",), False),
    ("init_from", "/b/run7", True),
    ("mesh.fsdp", 4, True),
    ("log.every", 3, True),
    ("checkpoint.every", 3, True),
    ("data.memory_gib", 3.0, True),
    ("seed", 1, False),
    ("steps", 61, False),
    ("optimizer.lr", 2.1e-3, False),
    ("validation.every", 10, False),
  ],
)
def test_an_id_is_what_a_run_learns_and_not_where_or_how(key: str, value: object, same: bool) -> None:
  base = config_lib.load("video_dit:runlocal")
  base.data.sources, base.init_from = ("/data/clips",), "/a/run7"
  other = base.copy_and_resolve_references()
  other.update_from_flattened_dict({key: value})
  assert (sweep.run_id(base) == sweep.run_id(other)) == same


def test_a_new_key_at_its_default_leaves_ids_alone(monkeypatch: pytest.MonkeyPatch) -> None:
  base = config_lib.load("video_dit:runlocal")
  before = sweep.run_id(base)
  reference = config_lib.reference("video_dit")
  for config in (base, reference):
    with config.unlocked():
      config.data.jitter = 0.5
  monkeypatch.setattr(sweep, "_reference", lambda _: reference)
  assert sweep.run_id(base) == before
  base.data.jitter = 0.6
  assert sweep.run_id(base) != before


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ("def sweep():\n  yield {'optimizer.rl': 1e-3}\n", "'optimizer.rl' is unknown; did you mean 'optimizer.lr'"),
    ("def sweep():\n  yield {'optimizer.lr': 'fast'}\n", "run 1"),
    ("def sweep():\n  yield {'sweep.arms': 'x'}\n", "did you mean 'sweep.arm'"),
    ("def sweep():\n  yield {'sweep.split': 'test'}\n", "legal: fit, holdout"),
    ("def sweep():\n  yield {}\n  yield {'sweep.split': 'holdout'}\n", "asked for as fit and as holdout"),
    ("def sweep():\n  return ()\n", "yields no runs"),
    ("sweep = 3\n", "has no sweep()"),
  ],
)
def test_mistakes_in_a_sweep_file_name_the_run_and_the_key(tmp_path: pathlib.Path, body: str, message: str) -> None:
  with pytest.raises(ConfigError) as caught:
    written(tmp_path, body).runs()
  assert message in str(caught.value)


def test_a_run_that_two_arms_ask_for_is_one_run(tmp_path: pathlib.Path) -> None:
  body = "def sweep():\n  for arm in 'ab': yield {'seed': 1, 'sweep.arm': arm}\n  yield {'seed': 2, 'sweep.arm': 'b'}\n"
  assert [run.arms for run in written(tmp_path, body).runs()] == [("a", "b"), ("b",)]


def test_later_runs_may_depend_on_the_results_of_earlier_ones(tmp_path: pathlib.Path) -> None:
  loaded = written(tmp_path, "def sweep(points):\n  yield {}\n  yield from ({'seed': 1} for _ in points[:1])\n")
  assert loaded.adaptive
  assert [len(loaded.runs(points)) for points in ([], [{"loss": 1.0}])] == [1, 2]


def test_packaged_sweeps_are_found_by_name() -> None:
  assert sweep.load("shapes_tiny").path == ROOT / "configs" / "sweeps" / "shapes_tiny.py"
  with pytest.raises(ConfigError, match="did you mean 'shapes_tiny'"):
    sweep.load("shape_tiny")


@pytest.fixture(scope="module")
def base():
  c = config_lib.load("video_dit:runlocal")
  c.model.conditions, c.codec.channels = (), 4
  c.text.width, c.text.depth, c.text.tokens = 16, 1, 16
  c.data.buckets = ((5, 16, 16),)
  return c


def test_cost_is_what_the_parameters_are(base) -> None:
  for size, width in (("d16", 16), ("d48", 48)):
    found = design.sized(base, size)
    assert found.params == found.params_by_part["blocks"] == width**3
    assert (found.width, found.depth, found.clip_tokens) == (width, width // 16, 2 * 2 * 2)
    assert found.flops(1000, "6nt") == 6000 * width**3
    assert found.flops(1000, "cross_dit") == pytest.approx(1000 * 0.75 * width**3 * (7 + 8 / width))
    # Blocks alone, by hand: 6 FLOPs a parameter that a token meets; text keys and values, ends and time come on top.
    assert found.flops(1) > 6 * (width**3 - 2 * width**2 * found.depth)


def test_grids_meet_at_the_same_tokens_and_remember_the_same(base) -> None:
  runs = design.grid(base, "d16", horizons=(1000, 4000), batches=(4, 8, 16), rates=(1e-3, 2e-3), seeds=(0, 1))
  assert len(runs) == 3 * 2 * 2
  tokens = {run["data.batch"] * 8 * run["steps"] for run in runs}
  reads = {run["data.batch"] * 8 * run["validation.every"] for run in runs}
  assert tokens == {4096} and reads == {1024}
  memory = [-1 / math.log(run["ema.decay"]) * run["data.batch"] * 8 for run in runs]
  assert memory[0] == pytest.approx(102.4, rel=1e-3)
  assert max(memory) <= 2 * 16 * 8 + 1, "never less than two steps"
  with pytest.raises(ConfigError, match="divide the largest"):
    design.grid(base, "d16", horizons=(1000,), batches=(4, 6), rates=(1e-3,))
  with pytest.raises(ConfigError, match="common step of 100 tokens"):
    design.grid(base, "d16", horizons=(1000, 4100), batches=(16,), rates=(1e-3,))


def test_a_tuned_run_is_read_at_equal_parts(base) -> None:
  hyper = design.Hyper(lambda n, t, b: 1e-3 * b, lambda n, t: 100.0, multiple=4)
  run = design.tuned(base, "d32", 50_000, hyper, reads=3, split="holdout")
  assert run["data.batch"] == 12 and run["optimizer.lr"] == pytest.approx(0.096), "the rate is that of the legal batch"
  assert run["steps"] == 3 * run["validation.every"] and abs(run["steps"] * 96 / 50_000 - 1) < 0.01


def test_isoflop_runs_cost_their_budget_around_the_law(base) -> None:
  hyper = design.Hyper(lambda n, t, b: 1e-2 * (n / 1e4) ** -0.2, lambda n, t: 40.0, multiple=2)
  runs = design.isoflop(base, (1e9, 1e10), lambda flops: 3e4 * (flops / 1e9) ** 0.5, hyper, sizes=5, spread=8.0)
  for budget, centre in ((1e9, 3e4), (1e10, 9.5e4)):
    mine = [run for run in runs if abs(math.log(_flops(base, run) / budget)) < 0.2]
    widths = sorted(int(run["model.size"][1:]) for run in mine)
    assert len(mine) >= 3 and widths[0] ** 3 < centre < widths[-1] ** 3
    assert all(run["data.batch"] % 2 == 0 for run in mine)
    assert all(width % 16 == 0 for width in widths)
  rates = {run["model.size"]: run["optimizer.lr"] for run in runs}
  assert rates["d48"] == pytest.approx(1e-2 * (48**3 / 1e4) ** -0.2, rel=5e-3)


def _flops(base, run: design.Overrides) -> float:
  model = design.sized(base, run["model.size"])
  return model.flops(run["steps"] * run["data.batch"] * model.clip_tokens)


def test_a_study_asks_for_its_later_runs_where_its_grids_say(base) -> None:
  grid = {"d16": (1e-3, 2e-3, 4e-3, 8e-3), "d32": (1e-3, 2e-3, 4e-3, 8e-3)}
  study = arms.Study(
    horizons=(4096, 8192, 16384), batches=dict.fromkeys(grid, (4, 8, 16)), rates=grid, repeats={"d16": (8, 2e-3)},
    holdouts=(("d48", 65536, 2, 2),), memory=math.inf, longer=(32768, 2), between=("d48",), again=1,
  )  # fmt: skip
  first = list(study.runs(base, []))
  assert len(first) == 2 * 3 * 4 + 1 and {run["ema.decay"] for run in first} == {1.0}
  points = []
  for number, run in enumerate(first):
    n, batch, lr = int(run["model.size"][1:]) ** 3, run["data.batch"] * 8, run["optimizer.lr"]
    for t in study.horizons:
      off = math.log(lr / 3e-3) ** 2 + math.log(batch / 64) ** 2
      point = {"params": n, "tokens": t, "loss": 0.3 + 9 * t**-0.4 + 3 * n**-0.4, "lr": lr, "batch_tokens": batch}
      point |= {"arm": run["sweep.arm"], "split": "fit", "run": str(number)}
      points.append(point | {"loss": point["loss"] * (1 + 0.01 * off)})
  assert list(study.runs(base, points[:-3])) == first, "one run has not finished"
  later = list(study.runs(base, points))[len(first) :]
  assert [run["model.size"] for run in later if run["sweep.arm"] == arms.LONG] == ["d16", "d32", "d48"]
  held = [run for run in later if run["sweep.split"] == "holdout"]
  assert [(run["sweep.arm"], run["seed"]) for run in held] == [
    ("tuned", 0), ("kaplan", 0), ("tuned", 1), ("kaplan", 1)
  ]  # fmt: skip
  assert [run["data.batch"] for run in held[:2]] == [8, 4]
  assert all(run["optimizer.lr"] == pytest.approx(3e-3, rel=0.02) for run in held)


def test_a_study_whose_grids_show_no_curvature_is_refused() -> None:
  """Else its later runs could not be asked for, hours after it began."""
  rates = {"d16": (1e-3, 2e-3, 4e-3), "d32": (1e-3, 2e-3)}
  study = lambda batches: arms.Study(
    horizons=(4096,), batches=batches, rates=rates, repeats={}, holdouts=(), memory=math.inf
  )
  for batches in ({"d16": (4, 8), "d32": (4, 8, 16)}, {"d16": (4, 4, 8), "d32": (4, 8, 16)}):
    with pytest.raises(ConfigError, match="one grid of 3 x 3"):
      study(batches)
  study({"d16": (4, 8, 16), "d32": (4,)})


def test_a_plan_adds_up(tmp_path: pathlib.Path) -> None:
  loaded = written(tmp_path, "def sweep():\n  yield {'steps': 100, 'validation.every': 25, 'data.batch': 4}\n")
  hardware = design.Hardware(flops_per_s=1e9, mfu=0.5, devices=4, price=3.0)
  (planned,) = design.plan(loaded.runs(), hardware)
  assert planned.tokens == 100 * 4 * 8 and planned.reads == 4
  assert planned.device_hours == pytest.approx(planned.flops / 5e8 / 3600)
  assert planned.hours == pytest.approx(planned.device_hours / 4)
  assert planned.dollars == pytest.approx(3 * planned.device_hours)
  assert hardware.flops(planned.device_hours) == pytest.approx(planned.flops)


def test_cooldowns_keep_the_run_and_end_it_slowly(base) -> None:
  runs = design.grid(base, "d16", horizons=(4096,), batches=(8,), rates=(1e-3,))
  (cooled,) = design.cooldown(runs, share=0.1)
  assert cooled["optimizer.schedule"] == "wsd" and cooled["optimizer.decay"] == 0.1
  assert {key: cooled[key] for key in ("steps", "data.batch", "optimizer.lr")} == {
    key: runs[0][key] for key in ("steps", "data.batch", "optimizer.lr")
  }
  assert np.isclose(cooled["validation.every"], cooled["steps"])
