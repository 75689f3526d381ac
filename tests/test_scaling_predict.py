"""`kling sweep fit` and `predict`: answers that others rely on, predictions, the config file, pages and pictures."""

import csv
import dataclasses
import json
import re

import cv2
import numpy as np
import pytest
from test_scaling_lr_batch import BATCH, BOWL, ETA, optimum, sweep

from kling_jax import cli, config
from kling_jax.errors import ConfigError, DataError, UsageError
from kling_jax.models.flop_rules import FlopRule
from kling_jax.scaling import analysis, fit, plots, predict, published, ready, report, table

CELLS = tuple((n, t) for n in (5e7, 1e8, 2e8, 4e8) for t in (1e9, 4e9, 1.6e10, 6.4e10))
QUICK = fit.Options(draws=60)


@pytest.fixture(scope="module")
def grid_table(tmp_path_factory):
  """A CSV of LR x B grids with noise, as `kling sweep fit` reads it."""
  path = tmp_path_factory.mktemp("sweep") / "runs.csv"
  columns = sweep(2e-4, cells=CELLS)
  with path.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
  return path


@pytest.fixture(scope="module")
def found(grid_table):
  return analysis.analyse(table.read(grid_table), QUICK)


@pytest.fixture(scope="module")
def page_folder(found, tmp_path_factory):
  folder = tmp_path_factory.mktemp("page")
  report.write(found, folder)
  return folder


def kling(capsys, *words, code=0):
  assert cli.main(["sweep", *map(str, words)]) == code
  return capsys.readouterr()


# ---- fit


def test_fit_answers_the_promised_keys(grid_table, capsys):
  said = kling(capsys, "fit", "--table", grid_table, "--draws", 40, "--json", "--flops", 1e20)
  answer = json.loads(said.out)
  assert list(answer) == ["E", "A", "B", "alpha", "beta", "objective", "intervals", "holdout", "verdict"]
  assert answer["alpha"] == pytest.approx(0.35, abs=0.05) and answer["verdict"] == "pass"
  assert all(low <= answer[name] <= high for name, (low, high) in answer["intervals"].items() if name in answer)
  assert {"params_opt", "tokens_opt", "loss_opt"} < set(answer["intervals"])
  assert "tuned loss of 16 (N, T), from 400 runs" in said.err


def test_huber_and_its_delta(grid_table, capsys):
  words = ("fit", "--table", grid_table, "--draws", 20, "--method", "huber", "--json")
  narrow, wide = (json.loads(kling(capsys, *words, "--delta", delta).out) for delta in (1e-5, 1e-3))
  assert 0 < narrow["objective"] < wide["objective"]
  assert narrow["alpha"] != wide["alpha"]


def test_text_says_what_matters(found):
  said = analysis.text(found)
  for words in ("90 % intervals", "params_exponent", "lr = ", "batch_tokens = ", "hold-out", "verdict: pass"):
    assert words in said


@pytest.mark.parametrize(
  ("words", "code", "message"),
  [
    (["fit", "--table", "none.csv"], 1, "no such file"),
    (["fit", "--table", "none.csv", "--method", "lsq"], 2, "method 'lsq' is unknown"),
    (["fit", "--table", "none.csv", "--units", "tokens"], 2, "not of the form COLUMN=COUNT"),
    (["fit"], 2, "--table"),
    (["fti"], 2, "fti"),
    (["predict"], 2, "a prediction needs params and tokens, or flops"),
    (["predict", "--params", "1e9", "--tokens", "10"], 2, "raw counts are needed"),
    (["predict", "--flops", "1e22", "--law", "yin"], 2, "no published law"),
    (["predict", "--flops", "1e22", "--law", "steplaw2025"], 2, "no loss surface"),
    (["predict", "--flops", "1e22", "--fit", "none.json"], 1, "no fit that can be read"),
    (["predict", "--flops", "1e22", "--flop_rule", "8nt"], 2, "FLOP rule '8nt' is unknown"),
    (["predict", "--device_hours", "10"], 2, "needs --device"),
    (["predict", "--device_hours", "10", "--device", "TPU v5q"], 2, "did you mean 'TPU v5"),
    (["predict", "--device_hours", "10", "--device", "TPU v5p", "--mfu", "40"], 2, "--mfu must lie"),
    (["predict", "--flops", "1e22", "--out", "x.yaml"], 2, "a config is a .py file"),
  ],
)
def test_mistakes_are_named(words, code, message, capsys):
  assert message in kling(capsys, *words, code=code).err.splitlines()[-1]


def test_a_bad_table_is_one_line(tmp_path, capsys):
  (tmp_path / "t.csv").write_text("params,tokens,loss\n0.1,2,3\n0.2,4,2.9\n")
  said = kling(capsys, "fit", "--table", tmp_path / "t.csv", code=1)
  assert said.err.count("\n") == 1 and "--units params=1e9" in said.err and not said.out


# ---- predict


def test_a_law_in_print_predicts_its_papers_points(capsys):
  answer = json.loads(kling(capsys, "predict", "--params", 1.07e9, "--tokens", 1e10, "--json").out)
  assert answer["loss"] == pytest.approx(0.51268, abs=1e-5)
  assert answer["lr"] == pytest.approx(1.78e-4, rel=3e-3) and answer["batch_tokens"] == pytest.approx(1.42e5, rel=3e-3)
  assert answer["steps"] == -(-(10**10) // answer["batch_tokens"])
  assert answer["extrapolation"]["params"] == pytest.approx(1.07 / 0.26) and answer["extrapolation"]["tokens"] == 1
  assert answer["intervals"]["loss"][0] < 0.5125 < answer["intervals"]["loss"][1]  # the measured one
  assert answer["flop_rule"] == "cross_dit:640"


def test_smaller_models_for_the_same_budget():
  """The paper's 40 % cheaper inference, as this surface sees it: 0.03 % of the loss at 1e22 FLOPs."""
  source = predict.from_published("yin2024")
  answer = predict.predict(source, flops=1e22)
  rows = {row["share"]: row for row in answer.trade_off}
  assert rows[1.0]["penalty"] == 0 and rows[0.6]["inference"] == pytest.approx(0.606, abs=2e-3)
  assert rows[0.6]["penalty"] == pytest.approx(2.8e-4, rel=0.03) and rows[0.5]["penalty"] < 6e-4
  surface, rule = source.law.surface, source.rule
  for size in answer.within_params:
    assert surface(size, rule.tokens(size, 1e22)) == pytest.approx(answer.optimum["loss"] * 1.001, rel=1e-9)
  assert answer.within_params[0] < answer.params < answer.within_params[1]
  assert "far beyond" in answer.warnings[0] and answer.extrapolation["flops"] == pytest.approx(1e22 / 6e18)


def test_exactly_counted_flops_become_the_nearest_rule():
  n, t = (part.ravel() for part in np.meshgrid([1e5, 1e6, 1e7], [1e8, 1e9, 1e10], indexing="ij"))
  exact = 1.02 * FlopRule("cross_dit", 1280).flops(n, t)
  loss = 0.5 + 6 / n**0.3 + 15 / t**0.3
  columns = {"params": n, "tokens": t, "loss": loss, "flops": exact, "flop_rule": ["exact"] * 9}
  found = analysis.analyse(table.from_columns(columns), QUICK)
  assert found.rule.name == "cross_dit" and found.rule.context == pytest.approx(1280, rel=0.1)
  assert "nearest to cross_dit" in found.warnings[0]
  forced = analysis.analyse(table.from_columns(columns), QUICK, rule=FlopRule())
  assert str(forced.rule) == "6nt" and not any("nearest" in warning for warning in forced.warnings)


def test_budget_with_a_given_size_and_with_device_hours(capsys):
  source = predict.from_published("yin2024")
  given = predict.predict(source, params=1e9, flops=1e21)
  assert given.tokens == pytest.approx(source.rule.tokens(1e9, 1e21)) and given.penalty > 0
  answer = json.loads(kling(capsys, "predict", "--device_hours", 1000, "--device", "TPU v5p", "--json").out)
  assert answer["flops"] == pytest.approx(1000 * 3600 * 459e12 * 0.4)
  six = json.loads(kling(capsys, "predict", "--flops", 1e22, "--flop_rule", "6nt", "--json").out)
  assert six["params"] == pytest.approx(3.35e9, rel=1e-3)


def test_batches_are_legal_and_rounding_costs_what_the_bowl_says(found):
  source = predict.from_analysis(found)
  given = {"params": 2e8, "tokens": 1e10}
  best = float(source.law("batch_tokens", **given))
  rounded = predict.predict(source, **given, batching=predict.Batching(1280, 300))
  assert rounded.batch_tokens % (1280 * 300) == 0 and rounded.batch_tokens > 0
  away = np.log([rounded.lr / rounded.best_lr, rounded.batch_tokens / best])
  assert rounded.regret == pytest.approx(away @ found.hyper.curvature @ away / 2)
  assert away[0] / away[1] == pytest.approx(found.hyper.tilt)
  assert away[0] / away[1] == pytest.approx(-BOWL[0, 1] / BOWL[0, 0], rel=0.2)
  whole = predict.predict(source, **given, batching=predict.Batching(1280, 10**6))
  assert whole.batch_tokens == 1280 * 10**6 and whole.regret > rounded.regret
  assert predict.predict(source, **given).regret < 1e-9


def test_a_fit_predicts_its_truth_with_intervals(found):
  source = predict.from_analysis(found)
  answer = predict.predict(source, params=1e9, tokens=1e11)
  truth = 1.5 + 400 / 1e9**0.35 + 500 / 1e11**0.3
  low, high = answer.intervals["loss"]
  inner, outer = answer.intervals["expected_loss"]
  assert low <= inner <= answer.loss <= outer <= high and low < truth < high
  for name, law in (("lr", ETA), ("batch_tokens", BATCH)):
    low, high = answer.intervals[name]
    assert low < getattr(answer, f"best_{name}") < high
    assert getattr(answer, f"best_{name}") == pytest.approx(optimum(law, 1e9, 1e11), rel=0.1)


def test_fit_json_predicts_like_the_fit(found, page_folder, capsys):
  direct = predict.predict(predict.from_analysis(found), flops=1e20)
  loaded = predict.predict(predict.load(page_folder), flops=1e20)
  assert dataclasses.replace(loaded, law=direct.law) == direct
  said = kling(capsys, "predict", "--fit", page_folder / "fit.json", "--flops", 1e20)
  assert "learning rate" in said.out and "90 % intervals" in said.out
  (page_folder / "other.json").write_text("{}")
  with pytest.raises(DataError, match=r"is not a fit\.json"):
    predict.load(page_folder / "other.json")


def test_a_law_without_hyper_parameters_says_so(capsys):
  said = kling(capsys, "predict", "--flops", 1e23, "--law", "epoch2024")
  assert "this law states none" in said.out
  source = predict.from_published("epoch2024")
  model = ready.Base("video_dit:size=d64", 64.0**3, 1280, 1e9)
  with pytest.raises(UsageError, match="no config can be written"):
    ready.write("x.py", predict.predict(source, flops=1e23), model, "kling")


# ---- the config file


def test_ready_config_is_a_config_that_trains_what_was_predicted(tmp_path, capsys, monkeypatch):
  out = tmp_path / "run.py"
  words = [
    "predict",
    "--params",
    2e6,
    "--tokens",
    1e9,
    "--config",
    "video_dit:res=64",
    "--devices",
    4,
    "--out",
    out,
    "--json",
  ]
  answer = json.loads(kling(capsys, *words).out)
  c = config.load(str(out))
  config.check(c, config.reference("video_dit"))
  tokens, flops = ready.cost(c)
  assert c.model.size == "d128" and answer["params"] == 128**3
  assert c.data.batch % 4 == 0 and c.data.batch * tokens == answer["batch_tokens"] and answer["multiple"] == 4 * tokens
  assert c.steps == answer["steps"] and c.optimizer.lr == pytest.approx(answer["lr"], rel=1e-3)
  assert c.steps * c.data.batch * tokens == pytest.approx(1e9, rel=0.05)
  assert c.optimizer.schedule == "constant" and flops / tokens > 6 * 128**3
  small = config.load(f"{out}:runlocal")
  assert small.steps < 1000 and small.model.size == "XS"
  with pytest.raises(ConfigError, match="leave size out"):
    ready.base("video_dit:size=S", 1e6)
  assert [ready.width(n) for n in (1e3, 1e6, 0.057e9, 1e9, 30e9)] == [16, 96, 384, 1024, 3136]


@pytest.mark.drill
def test_ready_config_trains(tmp_path):
  out = tmp_path / "run.py"
  words = ["sweep", "predict", "--params", "3e4", "--tokens", "1e6", "--config", "video_dit:res=64", "--out", str(out)]
  assert cli.main(words) == 0
  overrides = ["--config.steps=2", "--config.data.batch=8", "--config.validation.every=0"]
  assert cli.main(["train", "--config", str(out), "--workdir", str(tmp_path / "w"), *overrides]) == 0
  rows = [json.loads(line) for line in (tmp_path / "w/metrics.jsonl").read_text().splitlines()]
  assert np.isfinite(rows[-1]["loss"])


# ---- page and pictures


def test_page_holds_every_picture_and_reaches_for_nothing(found, page_folder):
  html = (page_folder / "index.html").read_text(encoding="utf-8")
  names = {"surface", "residuals", "optimum", "trade_off", "lr_batch", "fixed"}
  assert {path.stem for path in page_folder.glob("*.png")} == names
  assert html.count("data:image/png;base64,") == len(names)
  assert not re.search(r"""(src|href)=["'](https?:)?//""", html)
  for words in ("verdict: pass", "Learning rate and batch", "What it rests on"):
    assert words in html
  saved = json.loads((page_folder / "fit.json").read_text())
  assert (
    saved["alpha"] == found.fit.surface.alpha
    and len(saved["draws"]["E"]) == 60
    and saved["fixed_hyper"]["mean_regret"] > 0
  )


def test_pictures_are_drawn(found, page_folder):
  for path in page_folder.glob("*.png"):
    image = cv2.imread(str(path))
    assert min(image.shape[:2]) > 300 and image.std() > 5


def test_isoflop_picture_for_budgets():
  truth = published.get("yin2024").surface
  n = np.concatenate([truth.optimum(c).params * np.geomspace(1 / 6, 6, 5) for c in (1e18, 3e18, 1e19, 3e19)])
  t = np.repeat((1e18, 3e18, 1e19, 3e19), 5) / 6 / n
  loss = truth(n, t) + 1e-4 * np.random.default_rng(0).standard_normal(20)
  found = analysis.analyse(table.from_columns({"params": n, "tokens": t, "loss": loss}), QUICK, 1e21, FlopRule())
  assert found.valley_law is not None and "IsoFLOP parabolas: N_opt ~ C^0.4" in analysis.text(found)
  image = cv2.imdecode(np.frombuffer(plots.png(plots.isoflop(found)), np.uint8), cv2.IMREAD_COLOR)
  assert image.std() > 5


def test_untuned_runs_cost_what_the_bowl_says(found):
  """One (lr, B) for all is that of the cheapest (N, T), where it costs nothing; elsewhere the nearest run is far."""
  other = found.fixed
  cheapest = int((found.fit.table.params * found.fit.table.tokens).argmin())
  assert other.table.loss[cheapest] / found.fit.table.loss[cheapest] < 1.001
  assert other.regret > 0.001
