"""Laws of learning rate and batch, power laws and IsoFLOP parabolas, against published fits and known truths."""

import csv
import json
import math

import numpy as np
import pytest
from scipy import stats

from kling_jax.errors import DataError
from kling_jax.scaling import analysis, loglinear, lr_batch, published, table
from kling_jax.scaling import fit as fit_lib

ETA, BATCH = (3.0, -0.7, 0.3), (0.6, -0.1, 0.6)  # coefficient, exponents of N and T
BOWL = np.array([[0.02, -0.006], [-0.006, 0.012]])


def optimum(law, n, t):
  return law[0] * n ** law[1] * t ** law[2]


def sweep(noise=0.0, seed=0, cells=((1e8, 2e9), (1e8, 8e9), (4e8, 2e9), (4e8, 8e9), (1e9, 2e10)), width=5):
  """Grids of five rates and five batches, half an octave apart, about optima that are off the grid."""
  rng = np.random.default_rng(seed)
  columns = {name: [] for name in ("params", "tokens", "lr", "batch_tokens", "loss")}
  steps = np.log(2) / 2 * (np.arange(width) - width // 2)
  for n, t in cells:
    shift = rng.uniform(-0.1, 0.1, 2)
    for x in steps:
      for y in steps:
        away = np.array([x, y]) + shift
        columns["params"].append(n)
        columns["tokens"].append(t)
        columns["lr"].append(optimum(ETA, n, t) * math.exp(away[0]))
        columns["batch_tokens"].append(optimum(BATCH, n, t) * math.exp(away[1]))
        floor = 1.5 + 400 / n**0.35 + 500 / t**0.3
        columns["loss"].append(floor * (1 + away @ BOWL @ away / 2) + noise * rng.standard_normal())
  return columns


def test_exact_bowls_give_the_laws_back():
  laws = lr_batch.fit(table.from_columns(sweep()))
  np.testing.assert_allclose(laws.lr.estimate, [math.log(ETA[0]), *ETA[1:]], rtol=1e-6)
  np.testing.assert_allclose(laws.batch_tokens.estimate, [math.log(BATCH[0]), *BATCH[1:]], rtol=1e-6)
  np.testing.assert_allclose(laws.curvature, BOWL, rtol=1e-6)
  given = {"params": 3e8, "tokens": 5e9}
  best = laws.batch_tokens.law(**given)
  assert laws.penalty(laws.lr.law(**given), best, **given) == pytest.approx(0, abs=1e-12)
  # eta(B | N, T): no other rate is better at twice the best batch.
  rate = laws.lr_given_batch(2 * best, **given)
  others = [laws.penalty(rate * factor, 2 * best, **given) for factor in (0.9, 0.99, 1, 1.01, 1.1)]
  assert np.argmin(others) == 2 and rate / laws.lr.law(**given) == pytest.approx(2**0.3, rel=1e-6)


def test_errors_of_the_minimum_are_those_of_many_repetitions():
  runs = [lr_batch.cells(table.from_columns(sweep(2e-3, seed, cells=((1e8, 2e9),))))[0] for seed in range(300)]
  found = np.log([[cell.lr, cell.batch_tokens] for cell in runs if not cell.reason])
  assert len(found) > 290
  claimed = np.mean([np.sqrt(np.diag(cell.covariance)) for cell in runs if not cell.reason], axis=0)
  np.testing.assert_allclose(found.std(axis=0), claimed, rtol=0.2)


def test_cells_without_a_minimum_are_left_out_with_the_reason():
  columns = sweep()
  saddle = {name: list(values[:25]) for name, values in columns.items()}
  lr, batch = (np.log(saddle[name]) for name in ("lr", "batch_tokens"))
  saddle["loss"] = (2 + 1e-3 * ((lr - lr.mean()) ** 2 - (batch - batch.mean()) ** 2)).tolist()
  edge = {name: list(values[:25]) for name, values in columns.items()}
  edge["loss"] = (2 + 1e-3 * ((lr - lr.max() - 3) ** 2 + (batch - batch.mean()) ** 2)).tolist()
  few = {name: list(values[:6]) for name, values in columns.items()}
  for part, reason in ((saddle, "not positive definite"), (edge, "outside its grid"), (few, "a quadratic needs 7")):
    (cell,) = lr_batch.cells(table.from_columns(part))
    assert reason in cell.reason
    assert cell.loss == min(part["loss"]) and cell.hessian is None
  with pytest.raises(DataError, match="laws of N and T need four"):
    lr_batch.fit(table.from_columns(saddle))
  with pytest.raises(DataError, match="columns lr and batch_tokens"):
    lr_batch.fit(table.from_columns({"params": [1e8] * 3, "tokens": [2e9] * 3, "loss": [2.0, 2.1, 2.2]}))


def test_small_grids_are_used_with_a_warning():
  laws = lr_batch.fit(table.from_columns(sweep(width=3)))
  assert "as few as 7" in laws.warnings[0]
  assert laws.lr.estimate[1] == pytest.approx(ETA[1], rel=1e-6)
  assert not lr_batch.fit(table.from_columns(sweep())).warnings


def test_tuned_table_holds_the_minima_and_keeps_hold_outs_apart():
  columns = sweep()
  columns["split"] = ["train"] * 100 + ["test"] * 25
  tuned = lr_batch.tuned(table.from_columns(columns))
  assert tuned.holdout.tolist() == [False] * 4 + [True]
  np.testing.assert_allclose(tuned.loss, 1.5 + 400 / tuned.params**0.35 + 500 / tuned.tokens**0.3, rtol=1e-9)
  np.testing.assert_allclose(tuned.lr, optimum(ETA, tuned.params, tuned.tokens), rtol=1e-6)
  runs = table.from_columns(columns)
  one = lr_batch.fixed(runs, float(runs.lr[12]), float(runs.batch_tokens[12]))
  assert len(one) == 5 and one.loss[0] == runs.loss[12] and (one.loss >= tuned.loss * (1 - 1e-12)).all()


def test_held_out_runs_that_differ_in_their_seed_count_as_one():
  columns = sweep()
  columns["split"] = ["train"] * 100 + ["test"] * 25
  again = {name: [*values, *values[100:]] for name, values in columns.items()}
  again["loss"][125:] = [loss * 1.02 for loss in again["loss"][125:]]
  once, twice = (lr_batch.tuned(table.from_columns(c)).held_out for c in (columns, again))
  assert len(once) == len(twice) == 1
  np.testing.assert_allclose(twice.loss, once.loss * 1.01, rtol=1e-9)


def test_repeated_seeds_are_no_grid_and_token_counts_of_one_run_stay_together():
  columns = {name: [values[0], values[0], values[1]] for name, values in sweep(width=3).items()}
  columns["lr"], columns["batch_tokens"], columns["params"] = [1e-3] * 3, [1e5] * 3, [1e8, 1e8, 2e8]
  assert not lr_batch.has_grids(table.from_columns(columns))
  columns["lr"] = [1e-3, 2e-3, 1e-3]
  assert lr_batch.has_grids(table.from_columns(columns))
  whole = sweep()
  whole["run"] = [str(k % 25) for k in range(125)]  # every (rate, batch) is one run, read at each (N, T)
  tuned = lr_batch.tuned(table.from_columns(whole))
  assert len(tuned) == 5 and tuned.runs < 5


# ---- published tables


def steplaw(shared, kind):
  with open(shared / f"scaling_data/scalebench/lr_bsz_scaling_law.{kind}.csv", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  names = {"lr": "lr", "data_size": "tokens", "non_embedding_param_size": "params", "lm_loss": "loss"}
  columns = {ours: [float(row[theirs]) for row in rows] for theirs, ours in names.items()}
  return table.from_columns(columns | {"batch_tokens": [2048 * float(row["bsz"]) for row in rows]})


def test_steplaw_runs_give_the_law_and_the_held_out_optimum(shared):
  laws = lr_batch.fit(steplaw(shared, "train"))
  assert (len(laws.cells), len(laws.left_out)) == (38, 3)
  lr, batch = laws.lr.law, laws.batch_tokens.law
  assert (lr.coefficient, *lr.exponents.values()) == pytest.approx((2.955, -0.726, 0.294), rel=2e-3)
  assert (batch.coefficient, *batch.exponents.values()) == pytest.approx((13.07, -0.188, 0.595), rel=3e-3)
  alone = loglinear.fit(np.array([cell.batch_tokens for cell in laws.cells]),
                        {"tokens": np.array([cell.tokens for cell in laws.cells])})  # fmt: skip
  assert alone.law.exponents["tokens"] == pytest.approx(0.562, abs=1e-3)
  step = published.get("steplaw2025").quantities
  for name, fitted in (("lr", laws.lr), ("batch_tokens", alone)):  # StepLaw's own exponents, from the same runs
    for argument, value in step[name].exponents.items():
      low, high = fitted.intervals()[argument]
      assert low - 0.01 <= value <= high + 0.01
  held = steplaw(shared, "test")
  given = {"params": held.params[0], "tokens": held.tokens[0]}
  away = np.hypot(np.log(held.lr / lr(**given)), np.log(held.batch_tokens / batch(**given)))
  regret = held.loss[away.argmin()] / held.loss.min() - 1
  assert regret <= 1e-3 and held.loss.min() == 2.0762


def porian(shared):
  folder = shared / "scaling_data/porian"
  with open(folder / "optimal_points.csv", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  for there in json.loads((folder / "published_fits.json").read_text()):
    mine = [r for r in rows if (r["file"], r["setting"]) == (there["file"], str(there["setting"]))]
    columns = (np.array([float(r[name] or "nan") for r in mine]) for name in ("flops", "n", "n_star_std"))
    flops, n, std = columns
    yield there, flops, n, std


def test_porian_exponents_weighted_and_not(shared):
  seen = 0
  for there, flops, n, std in porian(shared):
    known, told = np.isfinite(n), np.isfinite(n) & np.isfinite(std)
    basic = loglinear.fit(n[known], {"flops": flops[known]})
    weighted = loglinear.fit(n[told], {"flops": flops[told]}, std[told] ** -2.0)
    assert basic.estimate[1] == pytest.approx(there["basic"]["n_exponent"], abs=1e-3)
    assert weighted.estimate[1] == pytest.approx(there["weighted"]["n_exponent"], abs=1e-3)
    low, high = weighted.intervals(0.95)["flops"]
    bottom, top = there["bootstrap_weighted_n_exponent_ci95"]
    assert low < top and bottom < high
    seen += 1
  assert seen == 15


# ---- power laws and parabolas


def test_power_fit_is_linear_regression():
  rng = np.random.default_rng(0)
  x = np.geomspace(1e17, 1e21, 9)
  y = 0.1 * x**0.5 * np.exp(0.05 * rng.standard_normal(9))
  ours, theirs = loglinear.fit(y, {"flops": x}), stats.linregress(np.log(x), np.log(y))
  assert ours.estimate[1] == pytest.approx(theirs.slope) and ours.estimate[0] == pytest.approx(theirs.intercept)
  assert math.sqrt(ours.covariance[1, 1]) == pytest.approx(theirs.stderr)
  assert math.sqrt(ours.covariance[0, 0]) == pytest.approx(theirs.intercept_stderr)
  low, high = ours.intervals(0.9)["flops"]
  assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.95, 7) * theirs.stderr)
  at = 1e22
  low, high = ours.interval(0.9, flops=at)
  assert low < ours.law(flops=at) < high
  middle = math.exp(np.log(x).mean())
  narrow = np.subtract(*np.log(ours.interval(0.9, flops=middle))[::-1])
  assert narrow / 2 == pytest.approx(stats.t.ppf(0.95, 7) * ours.residual / 3)


def test_measured_errors_are_not_shrunk_by_luck():
  x = np.geomspace(1e17, 1e21, 6)
  exact = loglinear.fit(2 * x**0.5, {"flops": x}, np.full(6, 100.0), measured=True)
  assert exact.dof == np.inf
  assert exact.covariance[1, 1] == pytest.approx(1 / (100 * np.sum((np.log(x) - np.log(x).mean()) ** 2)))


def test_power_laws_that_cannot_be_told_are_refused():
  x = np.geomspace(1e7, 1e9, 5)
  with pytest.raises(DataError, match="2 points cannot show its error"):
    loglinear.fit(x[:2], {"params": x[:2]})
  with pytest.raises(DataError, match="do not vary independently"):
    loglinear.fit(x, {"params": x, "tokens": 20 * x})


def test_parabolas_find_exact_vertices_and_their_law():
  budgets = np.array([1e18, 1e19, 1e20])
  n = np.concatenate([1e-2 * c**0.5 * np.geomspace(1 / 6, 6, 6) for c in budgets])
  c = np.repeat(budgets, 6)
  loss = 2 + 0.01 * np.log(n / (1e-2 * c**0.5)) ** 2 - 0.01 * np.log(c)
  found = loglinear.valleys(n, c / 6 / n, c, loss)
  assert len(found) == 3 and all(valley.inside and abs(valley.lean) < 1e-6 for valley in found)
  np.testing.assert_allclose([valley.params for valley in found], 1e-2 * budgets**0.5, rtol=1e-6)
  np.testing.assert_allclose([valley.tokens for valley in found], budgets / 6 / (1e-2 * budgets**0.5), rtol=1e-2)
  law = loglinear.valley_law(found)
  assert law.estimate[1] == pytest.approx(0.5)
  with pytest.raises(DataError, match="needs three"):
    loglinear.valley_law(found[:2])


def test_parabolas_are_near_the_surface_on_a_nearly_symmetric_law():
  """Bias of about 1.5 % of N at grids of +-8x, found by others; a few percent is allowed."""
  truth = published.get("yin2024").surface
  budgets = (3e17, 1e18, 6e18)
  n = np.concatenate([truth.optimum(c).params * np.geomspace(1 / 8, 8, 7) for c in budgets])
  c = np.repeat(budgets, 7)
  for valley in loglinear.valleys(n, c / 6 / n, c, truth(n, c / 6 / n)):
    assert valley.params == pytest.approx(truth.optimum(valley.flops).params, rel=0.04)
  scattered = c * np.geomspace(0.3, 3, 21)
  assert not loglinear.valleys(n, scattered / 6 / n, scattered, truth(n, scattered / 6 / n))


# ---- one curvature for all -------------------------------------------------------------------------------------------


def coarse(noise: float, seed: int = 0, below: float = 0.0) -> dict:
  """Grids of an octave, four by four, of 3 x 3 (N, T), in the logs of the loss; `below`: how far under them B* lies."""
  rng = np.random.default_rng(seed)
  columns: dict = {name: [] for name in ("params", "tokens", "lr", "batch_tokens", "loss", "run")}
  for n in (1e8, 3e8, 9e8):
    for x in (-1, 0, 1, 2):
      for y in (-1, 0, 1, 2):
        own = noise * rng.standard_normal() / math.sqrt(2)  # shared by the T of a run
        for t in (2e9, 6e9, 2e10):
          lr = optimum(ETA, n, 6e9) * 2.0**x  # one grid for all T, as runs read at many T have it
          batch = optimum(BATCH, n, 6e9) * 2.0 ** (y + below)
          away = np.log([lr / optimum(ETA, n, t), batch / optimum(BATCH, n, t)])
          level = math.log(1.5 + 400 / n**0.35 + 500 / t**0.3)
          columns["loss"].append(
            math.exp(level + 2 * away @ BOWL @ away / 2 + own + noise * rng.standard_normal() / math.sqrt(2))
          )
          for name, value in (("params", n), ("tokens", t), ("lr", lr), ("batch_tokens", batch), ("run", f"{n}{x}{y}")):
            columns[name].append(value)
  return columns


def test_one_curvature_gives_exact_laws_back():
  laws = lr_batch.joint(table.from_columns(coarse(0.0)), within=0.2)
  np.testing.assert_allclose(laws.lr.estimate, [math.log(ETA[0]), *ETA[1:]], rtol=1e-6)
  np.testing.assert_allclose(laws.batch_tokens.estimate, [math.log(BATCH[0]), *BATCH[1:]], rtol=1e-6)
  np.testing.assert_allclose(laws.curvature, 2 * BOWL, rtol=1e-6)
  for cell in laws.cells:
    level = 1.5 + 400 / cell.params**0.35 + 500 / cell.tokens**0.3
    assert cell.loss == pytest.approx(level, rel=1e-9)


def test_one_curvature_covers_the_truth_where_cells_alone_say_nothing():
  """Noise of half a percent on octave grids: no quadratic of its own; the intervals of the common fit hold."""
  inside = []
  for seed in range(120):
    runs = table.from_columns(coarse(0.005, seed))
    if seed == 0:
      assert sum(not cell.reason for cell in lr_batch.cells(runs)) < 4
      assert "share one curvature" in lr_batch.fit(runs).warnings[0]
    laws = lr_batch.joint(runs)
    for law, truth in ((laws.lr, ETA), (laws.batch_tokens, BATCH)):
      pairs = law.intervals(0.9)
      inside.append([pairs["params"][0] <= truth[1] <= pairs["params"][1],
                     pairs["tokens"][0] <= truth[2] <= pairs["tokens"][1]])  # fmt: skip
  covered = np.mean(inside)
  assert 0.8 <= covered <= 0.97, covered


def test_a_best_batch_below_the_grid_is_said_and_the_border_taken():
  runs = table.from_columns(coarse(0.0, below=3.0))
  laws = lr_batch.joint(runs, within=0.5)
  assert "lies below all that were run" in laws.warnings[1]
  for cell in laws.cells:
    assert cell.batch_tokens == pytest.approx(runs.batch_tokens[cell.rows].min())
    assert cell.lr == pytest.approx(laws.lr_given_batch(cell.batch_tokens, cell.params, cell.tokens))
  tuned = lr_batch.tuned(runs)
  np.testing.assert_allclose(sorted(tuned.loss), sorted(cell.loss for cell in lr_batch.joint(runs).cells))


def valley(noise: float, seed: int = 0) -> dict:
  """`coarse`, with a loss that falls with smaller batches down to the smallest."""
  columns, rng = coarse(0.0), np.random.default_rng(seed)
  own = {name: noise * rng.standard_normal() for name in sorted(set(columns["run"]))}
  columns["loss"] = []
  rows = zip(*(columns[name] for name in ("params", "tokens", "lr", "batch_tokens", "run")), strict=True)
  for n, t, lr, batch, run in rows:
    x = math.log(lr / optimum(ETA, n, t)) - 0.6 * math.log(batch / 1e5)
    floor = math.log(1.5 + 400 / n**0.35 + 500 / t**0.3)
    columns["loss"].append(math.exp(floor + 0.02 * x * x + 0.01 * math.log(batch / 1e5) + own[run]))
  return columns


def test_where_smaller_batches_are_always_better_the_smallest_has_the_law_of_the_rate():
  runs = table.from_columns(valley(0.0))
  laws = lr_batch.fit(runs, within=0.5)
  smallest = runs.batch_tokens.min()
  assert laws.batch_tokens.law(params=1e8, tokens=1e10) == pytest.approx(smallest)
  assert laws.tilt == pytest.approx(0.6) and "the smaller the better" in laws.warnings[1]
  np.testing.assert_allclose(laws.curvature, 0.04 * np.array([[1, -0.6], [-0.6, 0.36]]), rtol=1e-6)
  for cell in laws.cells:
    batch = runs.batch_tokens[cell.rows].min()
    best = optimum(ETA, cell.params, cell.tokens) * (batch / 1e5) ** 0.6
    assert (cell.batch_tokens, cell.lr) == pytest.approx((batch, best))
    assert laws.lr_given_batch(batch, cell.params, cell.tokens) == pytest.approx(best)
    floor = 1.5 + 400 / cell.params**0.35 + 500 / cell.tokens**0.3
    assert cell.loss == pytest.approx(floor * (batch / 1e5) ** 0.01)
  columns = valley(0.0)
  columns["loss"] = [1 / loss for loss in columns["loss"]]
  with pytest.raises(DataError, match="smaller batches are not always better"):
    lr_batch.fit(table.from_columns(columns), within=5.0)


def test_intervals_of_the_rate_at_the_smallest_batch_hold_the_truth():
  inside = []
  for seed in range(120):
    pairs = lr_batch.fit(table.from_columns(valley(0.003, seed)), within=0.06).lr.intervals(0.9)
    inside.append([pairs[name][0] <= truth <= pairs[name][1] for name, truth in (("params", -0.7), ("tokens", 0.3))])
  covered = np.mean(inside)
  assert 0.8 <= covered <= 0.97, covered


def test_runs_without_a_common_minimum_are_an_error_and_the_lowest_losses_stand():
  columns = coarse(0.0)
  columns["loss"] = [3 - 0.01 * math.log(lr) for lr in columns["lr"]]
  runs = table.from_columns(columns)
  with pytest.raises(DataError, match="Hessian|span"):
    lr_batch.fit(runs)
  lowest = [runs.loss[group].min() for group in lr_batch.groups(runs)]
  np.testing.assert_allclose(lr_batch.tuned(runs).loss, lowest)


def test_early_readings_can_be_left_out_of_the_surface_alone():
  """Losses far above the law before T = 5e9 spoil the surface; left out of it, they still tell lr and batch."""
  columns = coarse(1e-5)
  columns["loss"] = [
    loss * (1.5 if tokens < 5e9 else 1) for loss, tokens in zip(columns["loss"], columns["tokens"], strict=True)
  ]
  for n in (1e8, 3e8, 9e8):  # lone runs of later T, without a grid
    for t in (6e10, 2e11):
      level = 1.5 + 400 / n**0.35 + 500 / t**0.3
      for name, value in (("params", n), ("tokens", t), ("loss", level), ("run", f"{n}{t}"),
                          ("lr", optimum(ETA, n, t)), ("batch_tokens", optimum(BATCH, n, t))):  # fmt: skip
        columns[name].append(value)
  runs = table.from_columns(columns)
  options = fit_lib.Options(draws=20)
  spoiled, clean = (analysis.analyse(runs, options, least_tokens=least) for least in (0, 5e9))
  assert len(spoiled.fit.table) == 15 and len(clean.fit.table) == 12
  assert abs(clean.fit.surface.beta - 0.3) < 0.01 < abs(spoiled.fit.surface.beta - 0.3)
  assert clean.hyper is not None and clean.hyper.lr.law.exponents["tokens"] == pytest.approx(0.3, abs=0.01)
  assert any("left out" in warning for warning in clean.warnings)
