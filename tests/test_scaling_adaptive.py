"""The next best runs: information that adds up, and choices that shrink real errors of refits more than others do."""

import numpy as np
import pytest

from kling_jax.errors import DataError
from kling_jax.scaling import adaptive
from kling_jax.scaling.adaptive import Candidate, Response

SIGMA = 1e-3
TRUTH = Response(
  np.array([np.log(0.4), np.log(0.15), np.log(0.35), np.log(0.2), np.log(0.4),
            np.log(6e-3), -0.2, -0.05, np.log(500.0), 0.1, 0.6, 0.05, 0.03, -0.01]), 6e4, 2e5,
)  # fmt: skip


def grid(seed: int | None = None) -> tuple[np.ndarray, ...]:
  """(n, t, lr, batch, loss) of a first grid; with noise where a seed is given."""
  points = [
    (n, t, lr, batch)
    for n in (4e3, 3.3e4, 2.6e5)
    for t in (1e5, 4e5)
    for lr in (3e-3, 6e-3, 1.2e-2)
    for batch in (250.0, 500.0, 1000.0)
  ]
  n, t, lr, batch = np.array(points).T
  loss = TRUTH.loss(TRUTH.theta, n, t, lr, batch)
  if seed is not None:
    loss = loss + SIGMA * np.random.default_rng(seed).normal(size=loss.size)
  return n, t, lr, batch, loss


def test_the_response_is_lowest_where_it_says_and_is_the_surface_there() -> None:
  n, t = 1e5, 3e5
  lr, batch = TRUTH.best(n, t)
  at = lambda a, b: float(TRUTH.loss(TRUTH.theta, *map(np.array, ([n], [t], [lr * a], [batch * b])))[0])
  surface = 0.4 + 0.15 * (n / 6e4) ** -0.35 + 0.2 * (t / 2e5) ** -0.4
  assert at(1, 1) == pytest.approx(surface, rel=1e-12)
  assert min(at(a, b) for a, b in ((1.3, 1), (0.7, 1), (1, 1.3), (1, 0.7), (1.2, 1.2))) > at(1, 1)


def test_the_fit_finds_the_truth_and_its_stated_errors_are_those_of_repeated_fits() -> None:
  fits = [adaptive.fit(*grid(seed), SIGMA) for seed in range(60)]
  n, t, lr, batch, _ = grid()
  J = TRUTH.jacobian(n, t, lr, batch)
  stated = adaptive.covariance(TRUTH, [J], SIGMA)
  (direction,) = adaptive.predicted_loss(2.6e5, 4e5)(TRUTH)
  at = [np.array([value]) for value in (2.6e5, 4e5, *TRUTH.best(2.6e5, 4e5))]
  spread = np.std([fit.loss(fit.theta, *at)[0] for fit in fits], ddof=1)
  assert spread == pytest.approx(np.sqrt(direction @ stated @ direction), rel=0.35)
  found = np.log([fit.best(6e4, 2e5) for fit in fits])  # hardly touched by the prior
  np.testing.assert_allclose(found.mean(0), np.log(TRUTH.best(6e4, 2e5)), atol=0.01)


def candidates() -> list[Candidate]:
  return [
    Candidate(n, lr, batch, (t,), 6 * n * t)
    for n in (4e3, 6.4e4, 2.6e5, 8e5)
    for t in (1e5, 4e5, 1.6e6)
    for lr, batch in [TRUTH.best(n, t)]
  ]


def test_the_chosen_runs_shrink_the_error_of_a_prediction_more_than_random_ones_of_the_same_cost() -> None:
  n, t, lr, batch, _ = grid()
  now = adaptive.covariance(TRUTH, [TRUTH.jacobian(n, t, lr, batch)], SIGMA)
  aim = adaptive.predicted_loss(3e6, 3e6)
  (direction,) = aim(TRUTH)

  def error(chosen: list[Candidate]) -> float:
    J = [
      TRUTH.jacobian(*(np.array([value]) for value in (c.params, c.tokens[0], c.lr, c.batch_tokens))) for c in chosen
    ]
    return float(
      np.sqrt(direction @ np.linalg.inv(np.linalg.inv(now) + sum(j.T @ j for j in J) / SIGMA**2) @ direction)
    )

  best = [choice.candidate for choice in adaptive.choose(TRUTH, now, candidates(), 3, SIGMA, aim=aim)]
  cost = sum(c.cost for c in best)
  draw = np.random.default_rng(0)
  others = []
  for _ in range(200):
    some = [candidates()[k] for k in draw.choice(len(candidates()), 3, replace=False)]
    if sum(c.cost for c in some) <= cost:
      others.append(error(some))
  assert error(best) < error([]) and len(others) > 5
  assert error(best) < np.quantile(others, 0.1)


def test_gains_are_those_of_the_determinant_and_fall_as_runs_repeat() -> None:
  n, t, lr, batch, _ = grid()
  now = adaptive.covariance(TRUTH, [TRUTH.jacobian(n, t, lr, batch)], SIGMA)
  twice = [candidates()[5]] * 2
  first, second = adaptive.choose(TRUTH, now, twice, 2, SIGMA)
  c = first.candidate
  j = TRUTH.jacobian(*(np.array([value]) for value in (c.params, c.tokens[0], c.lr, c.batch_tokens)))
  after = np.linalg.inv(np.linalg.inv(now) + j.T @ j / SIGMA**2)
  expected = 0.5 * (np.linalg.slogdet(now)[1] - np.linalg.slogdet(after)[1])
  assert first.gain == pytest.approx(expected, rel=1e-6) and second.gain < first.gain
  assert first.gain_per_cost == pytest.approx(first.gain / c.cost)


def test_too_few_points_say_what_to_do() -> None:
  with pytest.raises(DataError, match="do a first grid"):
    adaptive.fit(*(column[:5] for column in grid()), SIGMA)
