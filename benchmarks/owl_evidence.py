"""What the runs of `configs/sweeps/owl_evidence.py` have learnt, and what that says of Owl's parts.

python benchmarks/owl_evidence.py measure --workdir runs/owl_evidence [--walks 16] [--readings 128]
python benchmarks/owl_evidence.py table --workdir runs/owl_evidence [--json OUT]

`measure` looks at every finished run that it has not looked at before and appends a line to WORKDIR/evidence.jsonl,
which is all that `table` reads: it belongs to the ledger, and is committed with it. Values are means over seeds with
95 % intervals (Student's t); differences are paired by seed.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from kling_jax import files
from kling_jax.generate import world_metrics
from kling_jax.generate.rollout import Model
from kling_jax.scaling.ledger import Ledger

NAME = "evidence.jsonl"
Line = Mapping[str, Any]
# What the table shows: name, where it stands in a line, aim.
COLUMNS: dict[str, tuple[Callable[[Line], float | None], str]] = {
  "determined texts right": (lambda line: line["text"]["determined"], "> 0.9"),
  "events followed": (lambda line: line["film"]["true"]["following"], "> 0.8"),
  "re-appearance": (lambda line: line["film"]["true"]["reappearance"]["both"], ""),
  "... from null states": (lambda line: line["film"]["null"]["reappearance"]["both"], "less"),
  "... from shuffled states": (lambda line: line["film"]["shuffled"]["reappearance"]["both"], "less"),
  "probe of hidden columns": (lambda line: line["probe"]["true"]["column"]["hidden"], ""),
  "... of shuffled states": (lambda line: line["probe"]["shuffled"]["column"]["hidden"], "less"),
  "seam ratio": (lambda line: line["film"]["true"]["seam_ratio"], "<= 1.2"),
  "dynamic degree / data's": (lambda line: _share(line["film"]["true"], line["data"], "dynamic_degree"), "0.9 to 1.1"),
  "late error, levels": (lambda line: line["film"]["true"]["rmse_late"], ""),
  "late drift of saturation": (lambda line: line["film"]["true"]["drift"]["saturation"], ""),
  "late drift of colours": (lambda line: line["film"]["true"]["drift"]["histogram"], ""),
}


def _share(made: Line, true: Line, name: str) -> float | None:
  return made[name] / true[name] if true[name] else None


def measure(folder: pathlib.Path, options: world_metrics.Options) -> int:
  """Measures what was not measured yet; returns how many runs that were."""
  ledger, done = Ledger(folder), {line["run"] for line in read(folder)}
  waiting = [record for record in ledger.finished() if record["run"] not in done]
  for record in waiting:
    found = world_metrics.measure(Model(ledger.workdir(record["run"])), options)
    facts = {name: record[name] for name in ("run", "arms", "seed", "steps", "wall_s", "cpu_s", "commit", "loss")}
    with (folder / NAME).open("a", encoding="utf-8") as file:
      file.write(json.dumps(facts | found) + "\n")
    print(f"{record['run']} {'+'.join(record['arms'])} seed {record['seed']}: {found['seconds']:.0f} s")
  return len(waiting)


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of the runs that were measured."""
  path = folder / NAME
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def summary(lines: Sequence[Line], reference: str = "base") -> list[dict[str, Any]]:
  """One dict an arm and column: mean and half width over seeds, and the paired difference to `reference`."""
  by_arm: dict[str, dict[int, Line]] = {}
  for line in lines:
    for arm in line["arms"]:
      by_arm.setdefault(arm, {})[line["seed"]] = line
  rows = []
  for arm, seeds in by_arm.items():
    for name, (value, aim) in COLUMNS.items():
      against = by_arm.get(reference, {})
      pairs = [(value(seeds[seed]), value(against[seed])) for seed in seeds if seed in against]
      differences = [a - b for a, b in pairs if a is not None and b is not None]
      values = [found for seed in seeds if (found := value(seeds[seed])) is not None]
      rows.append(
        {"arm": arm, "what": name, "aim": aim, "seeds": len(values), **interval(values, ""),
         **interval(differences if arm != reference else [], "difference")}
      )  # fmt: skip
  return rows


def interval(values: Sequence[float], name: str) -> dict[str, float | None]:
  """Mean and half width of its 95 % interval by Student's t; None where there are none, or a single one."""
  prefix = f"{name}_" if name else ""
  if not values:
    return {f"{prefix}mean": None, f"{prefix}half": None}
  half = None
  if len(values) > 1:
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
  return {f"{prefix}mean": float(np.mean(values)), f"{prefix}half": half}


def markdown(rows: Sequence[Line]) -> str:
  """A table of arms down and columns across; below each value the difference to the reference."""
  arms = list(dict.fromkeys(row["arm"] for row in rows))
  text = f"| what (aim) | {' | '.join(arms)} |\n|{'---|' * (len(arms) + 1)}\n"
  for name, (_, aim) in COLUMNS.items():
    cells = []
    for arm in arms:
      row = next(row for row in rows if row["arm"] == arm and row["what"] == name)
      cell = _written(row["mean"], row["half"])
      if row["difference_mean"] is not None:
        cell += f" ({_written(row['difference_mean'], row['difference_half'], '+')})"
      cells.append(cell)
    text += f"| {name}{f' ({aim})' if aim else ''} | {' | '.join(cells)} |\n"
  return text


def _written(mean: float | None, half: float | None, sign: str = "") -> str:
  if mean is None:
    return "-"
  return f"{mean:{sign}.3g}" + (f" ± {half:.2g}" if half is not None else "")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("action", choices=("measure", "table"))
  parser.add_argument("--workdir", required=True, type=pathlib.Path)
  for name in ("readings", "walks", "clips"):
    parser.add_argument(f"--{name}", type=int, default=getattr(world_metrics.Options(), name))
  parser.add_argument("--json", help="table: file to write the rows to")
  args = parser.parse_args()
  if args.action == "measure":
    measure(args.workdir, world_metrics.Options(args.readings, args.walks, args.clips))
    return
  rows = summary(read(args.workdir))
  print(markdown(rows))
  if args.json:
    files.write_json(args.json, rows)


if __name__ == "__main__":
  main()
