"""A trained TSA as a model that scores: its weights, what it reads, and a calibration on clips that it has not seen.

    python -m kling_jax.train.tsa_export RUN FOLDER --name weak-label [--on SET] [--beside FOLDER]

Writes FOLDER/model.safetensors, FOLDER/vtss.json and FOLDER/report.html. Without --on the clips of the run's held-out
source videos are what it is calibrated and measured on; --beside names a model of sub-metrics alone to compare with.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from kling_jax import page, progress
from kling_jax.data import records
from kling_jax.errors import DataError
from kling_jax.interop import safetensors
from kling_jax.measure import fragments, vtss, vtss_calibration, vtss_labels, vtss_network, vtss_order
from kling_jax.measure import sample as sample_lib
from kling_jax.measure.vtss_calibration import Calibration
from kling_jax.measure.vtss_labels import Rated
from kling_jax.nn import params as params_lib
from kling_jax.train import task as task_lib
from kling_jax.train import warm_start, workdir
from kling_jax.train.tasks.tsa import TSATask

IDENTITY = Calibration("affine", 1.0, 0.0, (), (), 0)
WELL = 50  # well-rated clips that the usual vectors are means of


def export(run: str, folder: str, name: str, on: str | None = None) -> vtss.Model:
  """Writes the model of a work directory's newest checkpoint; see the module.

  Raises:
    WeightsError: there is no checkpoint. DataError: no clips to calibrate on, or too few.
  """
  job = task_lib.make(workdir.read_config(pathlib.Path(run)))
  assert isinstance(job, TSATask)
  params, loaded = warm_start.load(pathlib.Path(run), job.shapes, ())
  safetensors.write(folder, params)
  config = job.config
  plan = dataclasses.replace(job.plan, mosaics=config.sampling.mosaics)
  train = job.split("train")
  spec = vtss.Spec(
    name, config.model.preset, tuple(config.model.branches), config.model.fusion, plan, job.features, IDENTITY, 2.5, {},
    {"step": loaded["step"], "clips": len(train), "videos": len({row.video_id for row in train})},
  )  # fmt: skip
  spec.save(folder)
  source, rows = (job.source, job.split("validation")) if on is None else rated(on)
  raw_R = raw_scores(vtss.Model(folder), source, rows)
  rating_R = np.array([row.rating for row in rows])
  calibration = vtss_calibration.fit(raw_R, rating_R)
  threshold = vtss_calibration.suggested(vtss_calibration.trade_off(calibration.values(raw_R), rating_R))
  spec = dataclasses.replace(spec, calibration=calibration, threshold=threshold, usual=_usual(folder, spec, job))
  spec.save(folder)
  return vtss.Model(folder)


def rated(folder: str) -> tuple[records.RecordSource, list[Rated]]:
  """A set and its ratings.parquet."""
  source = records.RecordSource(folder, status=None)
  return source, vtss_labels.read(pathlib.Path(folder) / "ratings.parquet", source)


def raw_scores(model: vtss.Model, source: records.RecordSource, rows: Sequence[Rated]) -> np.ndarray:
  """Raw scores of rated clips."""
  if not rows:
    raise DataError("no clips to measure on: the run held out no source videos; name a rated set with --on")
  found = []
  with progress.bar("score", len(rows)) as line:
    for row in rows:
      found.append(model.raw(clip_inputs(model, source, row)))
      line.advance(1)
  return np.array(found)


def clip_inputs(model: vtss.Model, source: records.RecordSource, row: Rated) -> dict[str, np.ndarray]:
  """What the model reads of a clip of a set."""
  scores = source.info(row.clip).scores
  if model.spec.branches == ("label",):
    return {"features": vtss_labels.values(model.spec.features, scores)}
  sample = sample_lib.of_media(source.media(row.clip), (model.spec.plan, fragments.seed_of(row.clip_id)))
  return model.inputs(sample, scores)


def _usual(folder: str, spec: vtss.Spec, job: TSATask) -> dict[str, list[float]]:
  """Mean vectors of the branches over well-rated clips of the training split."""
  if spec.branches == ("label",):
    return {}
  graph, shapes = vtss_network.described(vtss_network.of_spec(spec))
  loaded, _ = safetensors.load_into(shapes, folder)
  network = params_lib.merge(graph, loaded)
  good = [row for row in job.split("train") if row.rating >= vtss_labels.GOOD][:WELL]
  model = vtss.Model(folder)
  sums: dict[str, list[np.ndarray]] = {}
  for row in good:
    prepared = vtss_network.prepared(clip_inputs(model, job.source, row))
    for branch, vector in vtss_network.branches(network, prepared).items():
      sums.setdefault(branch, []).append(np.asarray(vector)[0])
  return {branch: np.mean(vectors, axis=0).tolist() for branch, vectors in sums.items()}


# ---- report ----------------------------------------------------------------------------------------------------------


def figures(vtss_R: np.ndarray, rows: Sequence[Rated]) -> dict[str, Any]:
  """Agreement with ratings, its intervals over source videos, and the order of weak labels."""
  rating_R = np.array([row.rating for row in rows])
  videos = [row.video_id for row in rows]
  found: dict[str, Any] = {
    "clips": len(rows),
    "videos": len(set(videos)),
    "agreement": vtss_calibration.agreement(vtss_R, rating_R),
    "intervals": vtss_calibration.intervals(lambda i: vtss_calibration.agreement(vtss_R[i], rating_R[i]), videos),
  }
  if rows[0].reference:
    found["order"] = {name: dataclasses.asdict(value) for name, value in vtss_order.order(rows, vtss_R).items()}
  return found


def report(
  model: vtss.Model, source: records.RecordSource, rows: Sequence[Rated], beside: vtss.Model | None = None
) -> tuple[dict[str, Any], page.Page]:
  """Figures of a model on rated clips, and a page of them; `beside` is a model to compare with."""
  rating_R = np.array([row.rating for row in rows])
  answer: dict[str, Any] = {}
  sheet = page.Page(f"Suitability score {model.spec.name}", f"{len(rows)} rated clips that it has not seen")
  for each in (model, beside) if beside else (model,):
    vtss_R = each.spec.calibration.values(raw_scores(each, source, rows))
    answer[each.spec.name] = found = figures(vtss_R, rows)
    sheet.section(f"{each.spec.name} ({' + '.join(each.spec.branches)})")
    spans = found["intervals"]
    sheet.table(
      ["", "value", "95 % over source videos, from", "to"],
      [[name.upper(), value, *spans[name]] for name, value in found["agreement"].items()],
    )
    if "order" in found:
      sheet.table(
        ["degradation", "original above degraded", "SRCC with strength", "pairs"],
        [[n, f"{100 * o['pairs']:.1f} %", f"{o['srcc']:.3f}", o["count"]] for n, o in found["order"].items()],
      )
    if each is model:
      answer["reliability"] = bins = vtss_calibration.reliability(vtss_R, rating_R)
      answer["trade_off"] = trade = vtss_calibration.trade_off(vtss_R, rating_R)
      sheet.section("Reliability", "Mean rating of clips of about the same VTSS, a tenth each, and its deviation.")
      sheet.widget(_plot(bins), None, "")
      sheet.section("Threshold", f"Fewest mistakes against ratings of 2.5 and more: VTSS >= {model.spec.threshold:g}.")
      percent = lambda value: f"{100 * value:.1f} %"
      sheet.table(
        ["least VTSS", "kept", "kept wrongly", "dropped wrongly"],
        [[r["threshold"], percent(r["kept"]), percent(r["mis_kept"]), percent(r["mis_dropped"])] for r in trade[::5]],
      )
  return answer, sheet


def _plot(bins: Sequence[dict[str, Any]]) -> str:
  """Reliability as SVG: VTSS 1 to 5 to the right, rating 1 to 5 upwards."""
  x = lambda value: 40 + 80 * (value - 1)
  y = lambda value: 340 - 80 * (value - 1)
  marks = [
    f'<line x1="{x(b["vtss"]):.1f}" x2="{x(b["vtss"]):.1f}" y1="{y(b["rating"] - b["deviation"]):.1f}" '
    f'y2="{y(b["rating"] + b["deviation"]):.1f}" stroke="#9ab"/>'
    f'<circle cx="{x(b["vtss"]):.1f}" cy="{y(b["rating"]):.1f}" r="4" fill="#246"/>'
    for b in bins
  ]
  ticks = [
    f'<text x="{x(k)}" y="362" text-anchor="middle">{k}</text><text x="22" y="{y(k) + 4}">{k}</text>'
    f'<line x1="40" x2="360" y1="{y(k)}" y2="{y(k)}" stroke="#ddd"/>'
    for k in range(1, 6)
  ]
  return (
    '<svg viewBox="0 0 400 390" width="400" font-size="12" role="img" aria-label="mean rating by VTSS">'
    + "".join(ticks)
    + f'<line x1="{x(1)}" y1="{y(1)}" x2="{x(5)}" y2="{y(5)}" stroke="#c33" stroke-dasharray="4"/>'
    + "".join(marks)
    + '<text x="200" y="385" text-anchor="middle">VTSS</text></svg>'
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("run", help="work directory of task tsa")
  parser.add_argument("folder", help="model to write")
  parser.add_argument("--name", default="mine", help="written beside every value")
  parser.add_argument("--on", help="rated set to calibrate and measure on (default: the run's held-out videos)")
  parser.add_argument("--beside", help="model to compare with")
  args = parser.parse_args()
  model = export(args.run, args.folder, args.name, args.on)
  if args.on:
    source, rows = rated(args.on)
  else:
    job = task_lib.make(workdir.read_config(pathlib.Path(args.run)))
    assert isinstance(job, TSATask)
    source, rows = job.source, job.split("validation")
  answer, sheet = report(model, source, rows, args.beside and vtss.load(args.beside))
  sheet.write(pathlib.Path(args.folder) / "report.html")
  for name, value in answer.items():
    if "agreement" in value:
      print(name, value["agreement"], *(f"\n  {k}: {o}" for k, o in value.get("order", {}).items()))


if __name__ == "__main__":
  main()
