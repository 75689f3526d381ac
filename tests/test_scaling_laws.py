"""Laws in print against every constant and check value that is known of them; optima against brute force."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kling_jax.errors import UsageError
from kling_jax.models.flop_rules import FlopRule
from kling_jax.scaling import published
from kling_jax.scaling.laws import LOG_PARAMS, SIX_NT, PowerLaw, Surface

YIN = published.get("yin2024")
BUDGETS = (3e17, 6e17, 1e18, 3e18, 6e18)
CROSS = FlopRule("cross_dit", 640)


# ---- arXiv 2411.17470


@pytest.mark.parametrize(
  ("params", "tokens", "loss"),
  [(1.07e9, 10e9, 0.51268), (1.0737e9, 10e9, 0.51267), (1.07e9, 4e9, 0.51852), (0.72e9, 140e9, 0.50353),
   (0.72e9, 140.57e9, 0.50352)],
)  # fmt: skip
def test_video_law_gives_the_losses_of_its_paper(params, tokens, loss):
  assert YIN("loss", params=params, tokens=tokens) == pytest.approx(loss, abs=6e-6)


def test_printed_form_with_the_constants_inside_the_power_would_be_wrong():
  inside = (0.0373e9 / 10e9) ** 0.2917 + (0.0082e9 / 1.07e9) ** 0.3188 + 0.4856
  assert inside == pytest.approx(0.9, abs=0.1)
  assert YIN("loss", params=1.07e9, tokens=10e9) < 0.52


@pytest.mark.parametrize(("tokens", "batch", "lr"), [(4e9, 6.77e4, 1.86e-4), (10e9, 1.42e5, 1.78e-4)])
def test_hyper_parameter_laws_take_billions_and_give_tokens(tokens, batch, lr):
  given = {"params": 1.0737e9, "tokens": tokens}
  assert YIN("batch_tokens", **given) == pytest.approx(batch, rel=3e-3)
  assert YIN("lr", **given) == pytest.approx(lr, rel=3e-3)


def test_steps_of_the_study_lie_where_the_paper_trains():
  for params in (0.017e9, 1.07e9):
    for tokens in (2e9, 140e9):
      steps = tokens / YIN("batch_tokens", params=params, tokens=tokens)
      assert 5e4 < steps < 2.6e5


@pytest.mark.parametrize(
  ("name", "millions"),
  [("yin2024", (27.8, 37.1, 45.8, 72.3, 96.3)), ("yin2024-eq18", (27.8, 37.5, 46.7, 74.8, 100.7))],
)
def test_equations_14_and_18(name, millions):
  found = published.get(name)("params", flops=np.array(BUDGETS)) / 1e6
  np.testing.assert_allclose(found, millions, rtol=2e-3)


def test_figure_says_equation_18():
  assert published.get("yin2024-eq18")("params", flops=1e22) == pytest.approx(2.435e9, rel=1e-3)
  assert YIN("params", flops=1e22) == pytest.approx(2.09e9, rel=2e-3)


def test_surface_of_the_paper_does_not_give_equation_18():
  """The contradiction that the law's notes name: Table 3 minimised has 0.478, and 3.35e9 parameters at 1e22."""
  law = YIN.surface
  assert law.params_exponent == pytest.approx(0.4778, abs=1e-4)
  found = law.optimum(np.array(BUDGETS)).params / 1e6
  np.testing.assert_allclose(found, (23.1, 32.2, 41.1, 69.5, 96.7), rtol=2e-3)
  assert law.optimum(1e22).params == pytest.approx(3.35e9, rel=1e-3)
  for context, most in ((640, 3.59e9), (1280, 3.72e9)):
    pair = law.optimum(np.array([1e18, 1e22]), FlopRule("cross_dit", context)).params
    assert 3.35e9 < pair[1] < most
    assert math.log(pair[1] / pair[0]) / math.log(1e4) == pytest.approx(0.4785, abs=0.0025)


@pytest.mark.parametrize(
  ("flops", "penalties"), [(1e18, (0.82, 0.20, 0.05, 0.20, 0.80)), (1e22, (0.22, 0.053, 0.014, 0.052, 0.21))]
)
def test_optimum_is_as_flat_as_computed(flops, penalties):
  law, best = YIN.surface, YIN.surface.optimum(flops)
  for share, percent in zip((1 / 4, 1 / 2, 0.7, 2, 4), penalties, strict=True):
    size = share * best.params
    assert 100 * (law(size, flops / 6 / size) / best.loss - 1) == pytest.approx(percent, rel=0.06)


# ---- other laws


def test_kaplan_critical_batch_and_chinchilla_optimum():
  kaplan = published.get("kaplan2020")
  assert kaplan("critical_batch_tokens", loss=2.0) == pytest.approx(2.1e8 / 2**4.76)
  assert kaplan("loss", params=8.8e13, tokens=1e30) == pytest.approx(1.0, rel=1e-6)
  assert kaplan("params", flops=8.64e19) == pytest.approx(1.3e9)
  assert published.get("epoch2024").surface.optimum(5.76e23).params == pytest.approx(
    70e9, rel=0.05
  )  # Chinchilla's size
  assert published.get("hoffmann2022-unrounded").surface.params_exponent == pytest.approx(0.46, abs=0.005)


def test_units_of_the_others():
  """Budgets that a law hands out must be spent by its own N and T."""
  for name, cost, within in (
    ("liang2024", 6.0, 0.02),
    ("hunyuan2024-image", 6.0, 0.02),
    ("hunyuan2024-video", 6.0, 0.15),
  ):
    law = published.get(name)
    assert cost * law("params", flops=1e20) * law("tokens", flops=1e20) == pytest.approx(1e20, rel=within)
  deepseek = published.get("deepseek2024")
  assert deepseek("flops_per_token", flops=1e20) * deepseek("tokens", flops=1e20) == pytest.approx(1e20, rel=1e-3)
  assert deepseek("lr", flops=1e20) == pytest.approx(0.3118 * 1e20**-0.125)
  steps = published.get("steplaw2025")
  assert steps("lr", params=1073741824, tokens=1e11) == pytest.approx(1.55e-3, rel=5e-3)
  assert steps("batch_tokens", tokens=1e11) / 2048 == pytest.approx(541, rel=2e-3)


def test_every_law_names_its_source_and_what_it_lacks():
  for name, law in published.LAWS.items():
    assert law.name == name and "arXiv" in law.source and law.units and law.quantities
    with pytest.raises(UsageError, match="states"):
      law("colour", params=1e9)
  with pytest.raises(UsageError, match="tokens is not given"):
    YIN("loss", params=1e9)
  with pytest.raises(UsageError, match="flops is not given"):
    YIN("params", params=1e9)
  with pytest.raises(UsageError, match="no loss surface"):
    _ = published.get("steplaw2025").surface
  with pytest.raises(UsageError, match="did you mean 'yin2024'"):
    published.get("yin24")


def test_constants_of_curvature_come_from_figure_4(shared):
  from kling_jax.scaling import lr_batch, table

  data = np.genfromtxt(shared / "scaling_data/video_dit/fig4_1p07B_lr_bs_grid.csv", delimiter=",", names=True)
  data = data[data["tokens"] == 1e10]
  columns = {name: data[name].tolist() for name in data.dtype.names} | {"params": [1.0737e9] * len(data)}
  (cell,) = lr_batch.cells(table.from_columns(columns))
  np.testing.assert_allclose(cell.hessian, YIN.curvature, atol=5e-5)
  nearest = np.abs(np.log(data["lr"] / YIN("lr", params=1.0737e9, tokens=1e10))).argsort()[:3]
  best = data["val_loss"].min()
  assert best == 0.5125 and data["val_loss"][nearest].min() == best


# ---- forms


@given(
  st.floats(0.15, 0.9), st.floats(0.15, 0.9), st.floats(10, 1e4), st.floats(10, 1e4), st.floats(17, 25),
  st.sampled_from([SIX_NT, CROSS, FlopRule("cross_dit", 77824)]),
)  # fmt: skip
def test_optimum_is_the_lowest_of_a_fine_search(alpha, beta, a, b, digits, rule):
  law, flops = Surface(1.0, a, b, alpha, beta), 10**digits
  best = law.optimum(flops, rule)
  sizes = np.geomspace(max(best.params / 1e3, 1), min(best.params * 1e3, np.exp(LOG_PARAMS[1])), 4001)
  losses = law(sizes, rule.tokens(sizes, flops))
  assert best.loss <= losses.min() * (1 + 1e-12)
  assert rule.flops(best.params, best.tokens) == pytest.approx(flops, rel=1e-9)


def test_gradient_is_that_of_the_loss():
  law = Surface(0.5, 6.0, 15.0, 0.32, 0.29)
  params, tokens = np.array([2e7, 1e9]), np.array([2e9, 1e11])
  for k, name in enumerate(("E", "A", "B", "alpha", "beta")):
    step = 1e-6 * getattr(law, name)
    up, down = (Surface(**{**vars(law), name: getattr(law, name) + s * step})(params, tokens) for s in (1, -1))
    np.testing.assert_allclose(law.gradient(params, tokens)[:, k], (up - down) / (2 * step), rtol=1e-6)


def test_draws_broadcast_against_points():
  draws = Surface(*(np.array(pair) for pair in ((0.5, 0.4), (6.0, 7.0), (15.0, 9.0), (0.32, 0.3), (0.29, 0.25))))
  n = np.array([1e7, 1e8, 1e9])
  table = draws(n[:, None], 20 * n[:, None])
  assert table.shape == (3, 2)
  one = Surface(0.4, 7.0, 9.0, 0.3, 0.25)
  np.testing.assert_allclose(table[:, 1], one(n, 20 * n))
  np.testing.assert_allclose(draws.optimum(np.array([[1e20]]), CROSS).params[0, 1], one.optimum(1e20, CROSS).params)


def test_a_surface_without_one_term_has_an_optimum_at_the_end():
  assert Surface(1.0, 0.0, 10.0, 0.3, 0.3).optimum(1e20).params == 1
  assert np.isfinite(Surface(1.0, 10.0, 0.0, 0.3, 0.3).optimum(1e20).loss)


def test_flop_rules():
  assert FlopRule.parse("6nt") == SIX_NT and str(CROSS) == "cross_dit:640" and FlopRule.parse(str(CROSS)) == CROSS
  for width, ratio in ((256, 1.19), (1024, 0.95)):
    assert CROSS.per_token(width**3) / SIX_NT.per_token(width**3) == pytest.approx(ratio, abs=0.005)
  # The paper's third point: 5.85e20 FLOPs for 0.72e9 parameters and "1.4e+02" billion tokens ask for n_ctx = 640.
  assert CROSS.tokens(896**3, 5.85e20) == pytest.approx(140.57e9, rel=1e-3)
  assert FlopRule("cross_dit", 1280).tokens(896**3, 5.85e20) == pytest.approx(128.7e9, rel=2e-3)
  n = 1e8
  numeric = (math.log(CROSS.per_token(n * 1.001)) - math.log(CROSS.per_token(n / 1.001))) / (2 * math.log(1.001))
  assert CROSS.slope(n) == pytest.approx(numeric, rel=1e-6)
  for text, message in (("6n", "unknown"), ("cross_dit", "attention context"), ("6nt:3", "attention context"),
                        ("cross_dit:x", "no number")):  # fmt: skip
    with pytest.raises(UsageError, match=message):
      FlopRule.parse(text)


def test_power_law_units():
  law = PowerLaw(2.0, {"tokens": 0.5}, {"tokens": 1e9}, unit=1e3)
  assert law(tokens=4e9, params=7) == pytest.approx(4e3)
