"""The control matrix against samples whose answer to every told score is known."""

import pathlib

import numpy as np
import pytest
import scipy.stats

from kling_jax import cli
from kling_jax import config as config_lib
from kling_jax.data.tokens import ByteTokenizer
from kling_jax.errors import DataError, UsageError
from kling_jax.evals import control, control_page
from kling_jax.generate import sample
from kling_jax.measure import Scorer
from kling_jax.train import loop

FPS, SIZE = 4.0, 8


def channel(name: str, number: int) -> Scorer:
  return Scorer(f"mean-{name}", "1", (name,), lambda s: {name: float(s.frames_THWC[..., number].mean())})


def sometimes(s) -> dict[str, float]:
  """Not defined for dark videos."""
  blue = float(s.frames_THWC[..., 2].mean())
  return {"blue": blue} if s.frames_THWC[..., 0].mean() > 70 else {}


SCORERS = (channel("red", 0), channel("green", 1), Scorer("mean-blue", "1", ("blue",), sometimes))


def flat(red: float, green: float, blue: float) -> np.ndarray:
  frames = np.zeros((5, SIZE, SIZE, 3), np.uint8)
  frames[...] = np.rint((red, green, blue))
  return frames


@pytest.fixture(scope="module")
def yardstick() -> control.Yardstick:
  return control.Yardstick.of_clips([flat(v, 2 * v, 100 + v) for v in range(101)], FPS, SCORERS)


def sampler(asked: list):
  """Red follows "red" by 60 levels, green follows it by 20 and "green" by -30; seeds shift all videos of a pair."""

  def make(asks):
    asked.extend(asks)
    made = []
    for ask in asks:
      told, rng = dict(ask.told), np.random.default_rng(ask.seed)
      shift, tilt = rng.integers(0, 20), rng.normal(0, 5)
      made.append(flat(30 + shift + (60 + tilt) * told["red"], 60 + shift + 20 * told["red"] - 30 * told["green"], 150))
    return made

  return make


def test_slopes_p_values_and_intervals_are_those_of_the_formula(yardstick) -> None:
  asked: list[control.Ask] = []
  prompts = [f"text {k}" for k in range(12)]
  found = control.matrix(sampler(asked), ("red", "green"), prompts, yardstick, seed=5)
  assert found.measured == ("red", "green", "blue") and found.scorers["red"] == "mean-red 1"
  # Each pair: the middle, and both scores low and high; seed and text are the pair's.
  assert len(asked) == len(set(asked)) == 12 * 5
  assert {(ask.prompt, ask.seed) for ask in asked} == {(f"text {k}", 5 + k) for k in range(12)}
  assert all(sum(value != 0.5 for _, value in ask.told) <= 1 for ask in asked)

  make = sampler([])
  for told in ("red", "green"):
    for number, measured, q1, q99 in ((0, "red", 1, 99), (1, "green", 2, 198)):
      slopes = []
      for k in range(12):
        y = []
        for level in (0.0, 0.5, 1.0):
          scores = tuple((name, level if name == told else 0.5) for name in ("red", "green"))
          (video,) = make([control.Ask(f"text {k}", 5 + k, scores)])
          y.append((float(video[..., number].mean()) - q1) / (q99 - q1))
        slopes.append(scipy.stats.linregress((0, 0.5, 1), y).slope)
      cell = found.cell(told, measured)
      expected = scipy.stats.ttest_1samp(slopes, 0.0)
      assert cell.slope == pytest.approx(np.mean(slopes), abs=1e-9) and cell.pairs == 12
      if np.std(slopes) > 1e-12:
        assert cell.p == pytest.approx(expected.pvalue, rel=1e-6)
        interval = expected.confidence_interval(0.95)
        assert (cell.low, cell.high) == pytest.approx((interval.low, interval.high), rel=1e-6)
  assert found.cell("red", "red").slope == pytest.approx(60 / 98, abs=0.05)
  assert found.cell("green", "red").slope == 0 and found.cell("green", "red").p == 1
  assert found.cell("red", "red").levels[2] > found.cell("red", "red").levels[0]
  verdict = found.verdict("red")
  assert verdict.strongest == "green" and verdict.cross_talk == pytest.approx(20 / 196, abs=0.01)
  assert verdict.p < 1e-9 and verdict.p_over_cross_talk < 1e-9
  backwards = found.verdict("green")
  assert backwards.slope < 0 and backwards.p > 0.99, "a score that goes the wrong way is not in control"


def test_a_score_that_some_videos_do_not_define_counts_where_it_is_defined(yardstick) -> None:
  found = control.matrix(sampler([]), ("red", "green"), ["x"] * 16, yardstick)
  make = sampler([])
  bright = 0
  for seed in range(16):  # with "green" raised, "red" stays in the middle
    (video,) = make([control.Ask("x", seed, (("red", 0.5), ("green", 0.5)))])
    bright += video[..., 0].mean() > 70
  assert 0 < bright < 16 and found.cell("green", "blue").pairs == bright
  assert found.cell("green", "blue").slope == 0 and found.cell("green", "blue").p == 1
  assert found.cell("red", "blue").pairs == 0 and np.isnan(found.cell("red", "blue").slope), "dark at the low level"
  page = control_page.build({"m": found}, {"pairs": 16}, FPS).html()
  assert "<td></td>" in page and "http://" not in page
  assert page.count("<video") == 2 * 3 and page.count("<img") == 2 * 3


def test_what_cannot_be_answered_is_refused(yardstick) -> None:
  ask = lambda **changes: control.matrix(
    sampler([]), changes.pop("told", ("red", "green")), changes.pop("prompts", ["x"] * 8), yardstick, **changes
  )
  with pytest.raises(UsageError, match="at least 8 prompts, got 3"):
    ask(prompts=["x"] * 3)
  with pytest.raises(UsageError, match="needs a told score"):
    ask(told=())
  for levels in ((0.5,), (0.0, 0.0), (1.0, 0.0), (0.0, 2.0)):
    with pytest.raises(UsageError, match="ascend"):
      ask(levels=levels)
  with pytest.raises(DataError, match="no scorer measures the told score 'vtss'"):
    ask(told=("red", "vtss"))
  with pytest.raises(DataError, match="no scale"):
    control.Yardstick.of_clips([flat(1, 1, 1)] * 3, FPS, SCORERS[:2])


@pytest.mark.drill
def test_the_verb_on_two_trained_models(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
  for told in ("adaln", "caption"):
    c = config_lib.load(f"control:told={told},runlocal")
    loop.run(c, tmp_path / told)
  model = sample.Model(tmp_path / "caption")
  batch = model._batch([sample.Request("a cat", scores={"motion": "low"})], (9, 16, 16), 3.6, False, False)
  low = model.percentiles.conditions[0]
  told = f"{np.expm1(low.q1):.3g}"
  assert ByteTokenizer(100).decode(batch["tokens"][0]) == f"a cat. motion score: {told}."
  words = ["eval", "control", "--workdir", str(tmp_path / "adaln"), "--baseline", str(tmp_path / "caption"),
           "--pairs", "8", "--steps", "4", "--scorers", "motion,aesthetic,clarity"]  # fmt: skip
  assert cli.main(words) == 0
  shown = capsys.readouterr().out
  assert "scores through AdaLN" in shown and "scores in the caption" in shown
  folder = tmp_path / "adaln" / "report" / "control"
  text = (folder / "index.html").read_text()
  assert text.count("<video") == 2 * 3 * 3 and (folder / "control.json").exists()
  assert cli.main([*words, "--levels", "high"]) == 2 and cli.main([*words, "--pairs", "9999"]) == 1
