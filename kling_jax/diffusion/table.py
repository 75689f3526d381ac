"""Means over a fixed table of (sample, time, noise) rows, with standard errors that know how the table was laid out."""

import numpy as np

ROWS_A_STRATUM = 16


def mean(values_R: np.ndarray, place_R: np.ndarray, sample_R: np.ndarray) -> tuple[float, float]:
  """The mean of a value of each row (a loss, or the difference of two models' losses) and its standard error.

  Rows are spread evenly over the times of training (`time.place`), so how the value changes with time is no error of
  the mean: it is taken out, as a straight line through each stratum of rows with neighbouring places. Rows of one
  sample go together: what is left is summed by sample before it is squared. The error is that of another draw of
  samples and noises; below two samples, or four rows, there is none (NaN).

  Args:
    values_R: one value a row.
    place_R: where in (0, 1) each row's time lies.
    sample_R: a number that is the same for rows of one sample.
  """
  values_R = np.asarray(values_R, np.float64)
  rows = values_R.size
  middle = float(values_R.mean()) if rows else float("nan")
  samples, owner_R = np.unique(sample_R, return_inverse=True)
  if samples.size < 2 or rows < 4:
    return middle, float("nan")
  strata = max(1, rows // ROWS_A_STRATUM)
  order = np.argsort(place_R, kind="stable")
  left_R = np.empty(rows)
  for part in np.array_split(order, strata):
    x, y = place_R[part] - place_R[part].mean(), values_R[part] - values_R[part].mean()
    left_R[part] = (y - x * (x @ y) / max(x @ x, 1e-30)) * np.sqrt(part.size / (part.size - 2))
  summed = np.bincount(owner_R, weights=left_R)
  return middle, float(np.sqrt(np.square(summed).sum() * samples.size / (samples.size - 1)) / rows)
