"""Parity of every imported network with its reference in PyTorch, live: a table of errors, cosines and times.

  python benchmarks/parity.py [--only clip_vision,siglip] [--json OUT] [--write]
  python benchmarks/parity.py --fixtures [--only clip_vision]

Random weights of a small config are made by the reference, saved in its own layout, loaded by our importer, and both
forward passes run on the same inputs. `--write` puts the table into docs/weights.md (rows of parts that did not run
stay). The exit code is 1 where a bound is passed, a part fails, or a fixture is not what its script makes.

Parts stand in files beside this one, `parity_<room>.py`, which define

  CASES: dict[str, Callable[[], dict]]          part -> its row of the table (see `Row`)
  FIXTURES: dict[str, Callable[[], Fixture]]    part -> what the test suite compares with (agreement.Fixture)

and import their libraries inside these functions. `--fixtures` writes tests/fixtures/parity/<part>.safetensors, at most
300 KiB each, which tests read with tests/parity_fixture.py; without it every fixture of the chosen parts is made afresh
and compared with the committed file.
"""

import argparse
import importlib
import importlib.util
import json
import os
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import NotRequired, TypedDict

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here downloads

import agreement

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parent / "docs" / "weights.md"
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"
HEAD = (
  "| part | reference | largest relative error, float32 | bound | cosine, bfloat16 | time / PyTorch's | what ran |\n"
  "|---|---|---|---|---|---|---|"
)
LIBRARIES = ("torch", "torchvision", "transformers", "diffusers", "peft")


class Row(TypedDict):
  """What a case returns.

  Attributes:
    part, reference: names for the table.
    max_rel_error: largest of `agreement.relative_error` over all that was compared, float32.
    cosine_bf16: smallest `agreement.cosine` of our bfloat16 answers and the float32 reference; None where there is
      no bfloat16 road.
    note: the config and what was compared: masks, odd sizes, caches.
    bound: of max_rel_error; `agreement.BOUND` where absent.
    seconds, reference_seconds: of one forward pass, both in this process.
  """

  part: str
  reference: str
  max_rel_error: float
  cosine_bf16: float | None
  note: str
  bound: NotRequired[float]
  seconds: NotRequired[float]
  reference_seconds: NotRequired[float]


def modules() -> list[str]:
  """The files of cases."""
  return sorted(path.stem for path in HERE.glob("parity_*.py"))


def collected(kind: str) -> dict[str, Callable]:
  """All entries of `kind` (CASES or FIXTURES) by part.

  Raises:
    ValueError: two files have the same part.
  """
  found: dict[str, Callable] = {}
  for name in modules():
    entries = getattr(importlib.import_module(name), kind, {})
    twice = sorted(set(found) & set(entries))
    if twice:
      raise ValueError(f"{name}.py has parts that another file has: {', '.join(twice)}")
    found |= entries
  return found


def failure(row: Row) -> str | None:
  """Why a row does not pass; None where it does."""
  bound = row.get("bound", agreement.BOUND)
  if not row["max_rel_error"] <= bound:
    return f"relative error {row['max_rel_error']:.1e} above {bound:.0e}"
  if row["cosine_bf16"] is not None and not row["cosine_bf16"] >= agreement.LEAST_COSINE:
    return f"cosine in bfloat16 {row['cosine_bf16']:.4f} below {agreement.LEAST_COSINE}"
  return None


def line(row: Row) -> str:
  """A row of the table in docs/weights.md."""
  cosine = "-" if row["cosine_bf16"] is None else f"{row['cosine_bf16']:.5f}"
  times = row.get("seconds"), row.get("reference_seconds")
  ratio = f"{times[0] / times[1]:.2f}" if times[0] and times[1] else "-"
  cells = (
    row["part"], row["reference"], f"{row['max_rel_error']:.1e}", f"{row.get('bound', agreement.BOUND):.0e}",
    cosine, ratio, row["note"],
  )  # fmt: skip
  return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def written(page: str, rows: list[Row]) -> str:
  """The page with these rows in its table, in the order of their names; others stay.

  Raises:
    ValueError: the page lacks the marks around the table.
  """
  match = re.search(f"{BEGIN}\n(.*?){END}", page, re.DOTALL)
  if not match:
    raise ValueError(f"{PAGE} has no lines {BEGIN} and {END}")
  body = [old for old in match[1].splitlines()[2:] if old.startswith("|")]
  lines = {old.split("|")[1].strip(): old for old in body} | {row["part"]: line(row) for row in rows}
  table = "\n".join([HEAD, *(lines[part] for part in sorted(lines, key=str.casefold))])
  return page[: match.start()] + f"{BEGIN}\n{table}\n{END}" + page[match.end() :]


def run(cases: dict[str, Callable[[], Row]]) -> tuple[list[Row], dict[str, str]]:
  """The rows of all cases, and {part: why} of those that do not pass; each is told as it ends."""
  rows, failed = [], {}
  for name, case in cases.items():
    start = time.perf_counter()
    try:
      row = case()
    except Exception as error:  # noqa: BLE001  one part that cannot run must not hide the others; it fails the run
      traceback.print_exc()
      failed[name] = f"{type(error).__name__}: {error}"
      print(f"{name:24} FAILED", flush=True)
      continue
    rows.append(row)
    why = failure(row)
    if why:
      failed[name] = why
    cosine = "       -" if row["cosine_bf16"] is None else f"{row['cosine_bf16']:8.5f}"
    ratio = f"{row['seconds'] / row['reference_seconds']:6.2f}" if "seconds" in row else "     -"
    taken = time.perf_counter() - start
    print(f"{name:24} {row['max_rel_error']:9.1e} {cosine} {ratio} {taken:7.1f} s {why or ''}", flush=True)
  return rows, failed


def missing() -> list[str]:
  return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--only", help="parts, by commas")
  parser.add_argument("--json", help="file to write the rows to")
  parser.add_argument("--write", action="store_true", help="put the rows into docs/weights.md")
  parser.add_argument("--fixtures", action="store_true", help="write the fixtures of the test suite; run no comparison")
  args = parser.parse_args()
  if missing():
    print(
      f"parity needs {', '.join(missing())}, which is not installed: pip install 'kling_jax[parity]' (Python 3.11, "
      "where PyTorch 2.13 for CPU is to be had)",
      file=sys.stderr,
    )
    return 1
  cases, fixtures = collected("CASES"), collected("FIXTURES")
  if args.only:
    wanted = args.only.split(",")
    unknown = [part for part in wanted if part not in cases and part not in fixtures]
    if unknown:
      print(f"no part {', '.join(unknown)}; there are: {', '.join(sorted({*cases, *fixtures}))}", file=sys.stderr)
      return 2
    cases = {part: case for part, case in cases.items() if part in wanted}
    fixtures = {part: make for part, make in fixtures.items() if part in wanted}
  if args.fixtures:
    for part, make in fixtures.items():
      path = agreement.write_fixture(part, make())
      print(f"{path.relative_to(HERE.parent)}  {path.stat().st_size / 1024:.0f} KiB")
    return 0
  print(f"{'part':24} {'error':>9} {'bf16 cos':>8} {'ratio':>6} {'taken':>9}")
  rows, failed = run(cases)
  for part, make in fixtures.items():
    why = agreement.fixture_error(part, make())
    if why:
      failed[f"fixture {part}"] = why
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
  if args.write:
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
  for name, why in failed.items():
    print(f"FAILED {name}: {why}", file=sys.stderr)
  print(f"{len(rows)} parts compared, {len(fixtures)} fixtures made afresh, {len(failed)} failures")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
