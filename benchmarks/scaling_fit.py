"""Time of fitting a loss surface with its bootstrap, beside SciPy's L-BFGS from a full grid of starts, in one run.

  python benchmarks/scaling_fit.py [--table RUNS] [--draws 1000] [--starts 4500] [--json FILE]

Without a table the 770 points are made from a known law in the shape of Gemstones' `hot_100b+` (22 models, 35 token
counts each) with noise of 1 %, one point in twenty of 5 %. The other side is what papers do: the same log-Huber
objective (delta 1e-3, summed), with its analytic gradient and SciPy's default tolerances, from the grid of 4,500 starts
of arXiv 2502.06857; fewer `--starts` take an even part of the grid and the time of the full one is that in proportion.
"""

import argparse
import itertools
import pathlib
import time

import numpy as np
from scipy import optimize, special

from kling_jax import files
from kling_jax.scaling import fit, huber, projection, table
from kling_jax.scaling.laws import Surface

TRUTH = Surface(1.95, 134.5, 3.8e5, 0.259, 0.597)
FULL = 4500
DELTA = 1e-3


def synthetic() -> table.RunTable:
  """22 models x 35 token counts, in random order of size."""
  rng = np.random.default_rng(0)
  n = np.repeat(np.geomspace(5e7, 2e9, 22), 35)
  t = np.tile(np.linspace(1e10, 3.5e11, 35), 22)
  sigma = np.where(rng.random(len(n)) < 0.05, 0.05, 0.01)
  loss = TRUTH(n, t) * np.exp(sigma * rng.standard_normal(len(n)))
  return table.from_columns({"params": n, "tokens": t, "loss": loss})


def scipy_grid(data: table.RunTable, starts: int) -> tuple[float, Surface, int]:
  """(lowest objective, its law, starts used) of L-BFGS-B over (log A, log B, log E, alpha, beta) in raw logs."""
  x, z, y = np.log(data.params), np.log(data.tokens), np.log(data.loss)
  axes = (
    [0, 5, 10, 15, 20, 25],
    [0, 5, 10, 15, 20, 25],
    [-1, -0.5, 0, 0.5, 1],
    [0, 0.5, 1, 1.5, 2],
    [0, 0.5, 1, 1.5, 2],
  )
  grid = list(itertools.product(*axes))[:: max(1, FULL // starts)]

  def objective(q: np.ndarray) -> tuple[float, np.ndarray]:
    a, b, e, alpha, beta = q
    logs = np.stack([a - alpha * x, b - beta * z, np.full_like(x, e)])
    model = special.logsumexp(logs, axis=0)
    share = np.exp(logs - model)
    r = model - y
    slope = np.clip(r, -DELTA, DELTA)
    gradient = [slope @ share[0], slope @ share[1], slope @ share[2], -(slope * x) @ share[0], -(slope * z) @ share[1]]
    return huber.huber(r, DELTA).sum(), np.array(gradient)

  results = [optimize.minimize(objective, start, jac=True, method="L-BFGS-B") for start in grid]
  best = min(results, key=lambda result: result.fun)
  a, b, e, alpha, beta = best.x
  return float(best.fun), Surface(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), alpha, beta), len(grid)


def timed(run):
  start = time.perf_counter()
  result = run()
  return result, time.perf_counter() - start


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--table", type=pathlib.Path, help="runs to fit instead of the synthetic ones")
  parser.add_argument("--draws", type=int, default=1000)
  parser.add_argument("--starts", type=int, default=FULL, help="of SciPy's grid")
  parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
  arguments = parser.parse_args()
  data = table.read(arguments.table) if arguments.table else synthetic()
  rows = projection.Rows.of(data.params, data.tokens)
  figures: dict[str, dict[str, float]] = {}
  for method in fit.METHODS:
    options = fit.Options(method, DELTA, arguments.draws)
    (law, objective), one = timed(lambda options=options: fit.point(data, options))
    _, whole = timed(lambda options=options: fit.fit(data, options))
    drawn = whole - one
    figures[method] = {
      "objective": objective, "alpha": law.alpha, "beta": law.beta, "one_fit_s": one, "with_draws_s": whole,
      "draw_s": drawn / arguments.draws,
    }  # fmt: skip
  (lowest, law, used), spent = timed(lambda: scipy_grid(data, arguments.starts))
  figures["scipy"] = {
    "objective": lowest, "alpha": law.alpha, "beta": law.beta, "one_fit_s": spent * FULL / used, "starts": used,
  }  # fmt: skip
  print(f"{len(data)} points, {arguments.draws} draws")
  print("                     objective   alpha    beta   one fit s   with draws s   a draw s")
  for name, row in figures.items():
    times = f"{row['one_fit_s']:11.3f}" + (
      f"{row['with_draws_s']:15.2f} {row['draw_s']:10.5f}" if "draw_s" in row else ""
    )
    print(f"{name:18} {row['objective']:11.8f} {row['alpha']:7.4f} {row['beta']:7.4f} {times}")
  for name in fit.METHODS:
    ours, theirs = figures[name], figures["scipy"]["one_fit_s"]
    ratio, of_draw = theirs / ours["one_fit_s"], theirs / ours["draw_s"]
    print(f"{name}: one fit is {ratio:.0f}x faster than one by SciPy's grid, a draw {of_draw:.0f}x")
  theta = rows.theta(law)
  agree = huber.objective(theta[None], rows, data.loss, data.weight, DELTA)[0]
  print(f"the two sides minimise the same function: {lowest:.8f} by SciPy's code, {agree:.8f} by ours at its law")
  if arguments.json:
    files.write_json(arguments.json, {"benchmark": "scaling_fit", "points": len(data), "figures": figures})


if __name__ == "__main__":
  main()
