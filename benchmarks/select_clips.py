"""Seconds and memory of selection among made-up clips with ten scores and captions of 500 characters.

python benchmarks/select_clips.py --rows 1000000              what rules would do
python benchmarks/select_clips.py --rows 1000000 --write      and doing it
"""

import argparse
import pathlib
import resource
import tempfile
import time

import numpy as np
import pyarrow as pa

from kling_jax.curation import rules, select
from kling_jax.data import clip_table

SCORES = (
  "motion", "clarity", "aesthetic", "text", "noise", "blur", "contrast", "duplicates", "camera_motion", "saturation"
)  # fmt: skip
RULES = (
  "vtss >= 2.5", "quantile(motion, 0.05) <= motion <= quantile(motion, 0.95)", "clarity >= 0.1 or aesthetic > 0.9",
  "min(width, height) >= 256", "cap(10, video_id)", "temper(0.5, bins(motion, 0.1, 0.5, 0.9))",
)  # fmt: skip


def table(rows: int) -> pa.Table:
  rng = np.random.default_rng(0)
  count = rows * len(SCORES)
  made_by = pa.array(["flow"]).take(pa.array(np.zeros(count, np.int64)))
  version = pa.array(["1"]).take(pa.array(np.zeros(count, np.int64)))
  items = pa.StructArray.from_arrays([pa.array(rng.random(count)), made_by, version], ["value", "scorer", "version"])
  names = pa.array(SCORES).take(pa.array(np.tile(np.arange(len(SCORES)), rows)))
  scores = pa.MapArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * len(SCORES)), names, items)
  some: dict[str, pa.Array] = {
    "scores": scores,
    "clip_id": pa.array([f"{row:032x}" for row in range(rows)]),
    "video_id": pa.array([f"video-{row // 20}" for row in range(rows)]),
    "caption": pa.array(["word " * 100]).take(pa.array(np.zeros(rows, np.int64))),
    "start_s": pa.array(np.zeros(rows)),
    "end_s": pa.array(rng.uniform(1, 10, rows)),
    "vtss": pa.array(rng.uniform(1, 5, rows)),
    "status": pa.array(["kept"]).take(pa.array(np.zeros(rows, np.int64))),
  }
  plain = {pa.int64(): np.full(rows, 720), pa.float64(): np.full(rows, 24.0), pa.bool_(): np.zeros(rows, bool)}
  columns = []
  for field in clip_table.SCHEMA:
    if field.name in some:
      columns.append(some[field.name].cast(field.type))
    elif field.type in plain:
      columns.append(pa.array(plain[field.type]))
    else:
      empty = "" if pa.types.is_string(field.type) else []
      columns.append(pa.array([empty], field.type).take(pa.array(np.zeros(rows, np.int64))))
  return pa.table(columns, schema=clip_table.SCHEMA)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--rows", type=int, default=100_000)
  parser.add_argument("--write", action="store_true", help="select the set as well")
  args = parser.parse_args()
  chosen = rules.parse_all(RULES)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    clip_table.write_table(folder, table(args.rows), "made up", [])
    steps = {"what_if": lambda: select.evaluate(select.load(folder, chosen), chosen)}
    if args.write:
      steps["select"] = lambda: select.select(folder, chosen)
    for step, run in steps.items():
      clock, before = time.perf_counter(), time.process_time()
      kept = int(run().kept.sum())
      memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
      seconds, worked = time.perf_counter() - clock, time.process_time() - before
      print(f"{step}: {args.rows} clips, {kept} kept, {seconds:.1f} s ({worked:.1f} of work), peak {memory:.2f} GiB")


if __name__ == "__main__":
  main()
