"""Errors of means over a fixed table, against the spread of many tables drawn anew."""

import numpy as np
import pytest

from kling_jax.diffusion import table

ROWS, SAMPLES = 512, 128
PLACES = (np.arange(ROWS) * 0.6180339887 + 0.5) % 1


def draw(rng: np.random.Generator, of_sample: float, of_row: float) -> np.ndarray:
  """Values that depend steeply on time, on the sample and on chance; rows go round the samples."""
  per_sample = rng.normal(size=SAMPLES)[np.arange(ROWS) % SAMPLES]
  return 3 + 2 * np.sin(3 * PLACES) + of_sample * per_sample + of_row * rng.normal(size=ROWS)


@pytest.mark.parametrize(("of_sample", "of_row"), [(0.0, 0.1), (0.3, 0.0), (0.2, 0.2)])
def test_stated_error_is_the_spread_of_repeated_tables(of_sample: float, of_row: float) -> None:
  rng = np.random.default_rng(0)
  sample = np.arange(ROWS) % SAMPLES
  found = np.array([table.mean(draw(rng, of_sample, of_row), PLACES, sample) for _ in range(400)])
  spread = found[:, 0].std(ddof=1)
  assert np.sqrt(np.mean(found[:, 1] ** 2)) == pytest.approx(spread, rel=0.12)
  assert found[:, 0].mean() == pytest.approx(3 + 2 * (1 - np.cos(3)) / 3, abs=4 * spread / 20 + 2e-3)


def test_what_time_explains_is_no_error() -> None:
  """A value that time alone decides has an error far below that of rows taken as independent."""
  values = 2 * np.sin(3 * PLACES)
  mean, stderr = table.mean(values, PLACES, np.arange(ROWS))
  assert mean == pytest.approx(2 * (1 - np.cos(3)) / 3, abs=3e-3)  # 2 log(n) / n
  assert stderr < 0.05 * values.std() / np.sqrt(ROWS)


def test_one_sample_or_three_rows_have_no_error() -> None:
  assert np.isnan(table.mean(np.ones(4), PLACES[:4], np.zeros(4))[1])
  assert np.isnan(table.mean(np.ones(3), PLACES[:3], np.arange(3))[1])
