"""`kling demo`: the whole chain in minutes: films (or your footage), curate, train, sample, and a page about it."""

import contextlib
import pathlib
import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from kling_jax import config as config_lib
from kling_jax import page
from kling_jax.curation import curate
from kling_jax.curation import report as curation_report
from kling_jax.curation.video import Recipe
from kling_jax.data import encode, films, records
from kling_jax.errors import UsageError
from kling_jax.generate import sample
from kling_jax.measure import clip as measure
from kling_jax.train import loop, metrics

FILMS, FILM_SECONDS, FILM_SIZE, SHOT_SECONDS = 10, 16.0, (144, 256), (2.8, 3.6)
MEDIA_SIDE = 144  # shorter side of the clips that are kept, in pixels
FRAMES, SIDE, FPS = 9, 32, 4.0  # what the model sees: two seconds of 32 x 32 pixels, so that motion spans pixels
STEPS = 1000
PROMPTS = 4  # samples under captions of the set
PAIRS = 12  # samples without text, told low and high motion from the same noise; the page shows the first four
LEVELS = ("low", "high")


def run(workdir: pathlib.Path, videos: str | None = None, steps: int | None = None) -> str:
  """Runs the chain in `workdir`; called again, finished parts are not repeated.

  Args:
    workdir: gets films/ (where none are given), set/, train/, samples/ and report/index.html.
    videos: folder of your own videos, with captions beside them where there are any; None renders films.
    steps: training steps.

  Returns:
    A few lines that say what happened and where the page is.
  """
  page.require()
  clock: dict[str, float] = {}
  if videos is not None and not pathlib.Path(videos).is_dir():
    raise UsageError(f"--videos {videos} is no folder")
  if videos is None:
    with _timed(clock, "render films"):
      if not (workdir / "films" / "films.json").exists():
        films.render_films(workdir / "films", FILMS, FILM_SECONDS, FILM_SIZE, shot_seconds=SHOT_SECONDS)
    videos = str(workdir / "films")
  with _timed(clock, "curate"):
    funnel = curate.curate(videos, workdir / "set", curate.Options(Recipe(short_side=MEDIA_SIDE), report=False))
  with _timed(clock, "train"):
    loop.run(_config(workdir / "set", STEPS if steps is None else steps), workdir / "train")
  with _timed(clock, "sample"):
    model = sample.Model(workdir / "train")
    captioned = _captioned(workdir / "set")
    told = [sample.Request("", seed=seed, scores={"motion": level}) for level in LEVELS for seed in range(PAIRS)]
    clips = model(captioned), model(told, sample.Settings(text=1.0, scores_scale=2.0))
    sample.write(clips[0], workdir / "samples" / "captions.mp4", FPS)
    sample.write(clips[1], workdir / "samples" / "motion.mp4", FPS)
  motion = _motion(told, clips[1])
  rows = metrics.read(workdir / "train" / "metrics.jsonl")
  facts = {
    "clips kept": funnel.kept,
    "first loss": f"{rows[0]['loss']:.3f}",
    "last loss": f"{rows[-1]['loss']:.3f}",
    "motion, told low": motion["low"],
    "motion, told high": motion["high"],
    "minutes": f"{sum(clock.values()) / 60:.1f}",
  }
  _report(workdir, funnel, facts, rows, (captioned, told), clips, clock)
  lines = [f"{name}: {value}" for name, value in facts.items()]
  return "\n".join([*lines, f"page: {workdir / 'report' / 'index.html'}"])


def _config(clip_set: pathlib.Path, steps: int) -> Any:
  """A small text-to-video run on the set: XS, two seconds of 32 x 32 pixels."""
  c = config_lib.load("video_dit:size=XS")
  kept = len(records.RecordSource(clip_set))
  c.update_from_flattened_dict({
    "steps": steps, "data.sources": (str(clip_set),), "data.buckets": ((FRAMES, SIDE, SIDE),), "data.fps": FPS,
    "data.batch": min(16, kept), "data.threads": 2, "text.width": 128, "text.depth": 1, "text.tokens": 96,
    "optimizer.lr": 2e-3, "optimizer.schedule": "wsd", "optimizer.warmup": min(40, steps), "ema.decay": 0.99,
    "validation.every": max(steps // 4, 1), "validation.rows": 32, "checkpoint.every": max(steps // 2, 1),
    "data.validation_fraction": 0.1, "log.every": 5, "sample.steps": 24, "sample.text": 1.5, "drop.text": 0.3,
  })  # fmt: skip
  return c


def _captioned(clip_set: pathlib.Path) -> list[sample.Request]:
  """Prompts are captions of the set."""
  source = records.RecordSource(clip_set)
  captions = list(dict.fromkeys(source.info(number).caption for number in range(len(source))))[:PROMPTS]
  captions = (captions * PROMPTS)[:PROMPTS]
  return [sample.Request(caption, seed=seed) for seed, caption in enumerate(captions)]


def _motion(requests: list[sample.Request], clips: list[np.ndarray]) -> dict[str, str]:
  """Measured motion of the samples of each level in the unit of the scorer: mean and standard error."""
  times_s = np.arange(FRAMES) / FPS
  found: dict[str, list[float]] = {level: [] for level in LEVELS}
  motion = measure.chosen(["motion"])
  for request, frames in zip(requests, clips, strict=True):
    found[str(request.scores["motion"])].append(measure.score(frames, times_s, motion)["motion"].value)
  return {
    level: f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}"
    for level, values in found.items()
  }


def _report(
  workdir: pathlib.Path,
  funnel: Any,
  facts: dict[str, Any],
  rows: list[dict[str, Any]],
  requests: tuple[list[sample.Request], list[sample.Request]],
  clips: tuple[list[np.ndarray], list[np.ndarray]],
  clock: dict[str, float],
) -> None:
  document = page.Page("kling_jax demo", "From footage to a trained, sampled Video DiT on this machine.")
  document.section("In short")
  document.facts(facts)
  tile = lambda request, frames, note: page.Tile(encode.encode(frames, fps=FPS), request.prompt or "no text", note=note)
  document.section("Samples", "Under captions of the set.")
  document.gallery([tile(request, frames, "") for request, frames in zip(requests[0], clips[0], strict=True)])
  document.section(
    "Motion", "Without text, from the same noise, told low and high motion (the set's 1st and 99th percentile)."
  )
  told = list(zip(requests[1], clips[1], strict=True))
  pairs = [item for low, high in zip(told[:PAIRS], told[PAIRS:], strict=True) for item in (low, high)]
  document.gallery([tile(request, frames, f"{request.scores['motion']} motion") for request, frames in pairs[:8]])
  document.section("Training")
  steps, loss = [row["step"] for row in rows], [row["loss"] for row in rows]
  checked = [row for row in rows if "val_loss" in row]
  curves = {"training": (steps, loss)}
  if checked:
    curves["validation (EMA, fixed table)"] = ([row["step"] for row in checked], [row["val_loss"] for row in checked])
  document.chart(page.lines(curves, "step", "loss", log_y=True), "Loss")
  last = rows[-1]
  document.facts({
    "steps": last["step"], "tokens": f"{last['tokens']:,}", "tokens a second": f"{last['tokens_per_s']:,.0f}",
    "share of peak": f"{last.get('mfu', float('nan')):.1%}", "waiting for data": f"{last['data_wait']:.2%}",
  })  # fmt: skip
  curation_report.add(document, workdir / "set", funnel)
  document.section("Time and memory")
  document.table(("part", "seconds"), [(name, round(seconds, 1)) for name, seconds in clock.items()])
  peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
  document.facts({"peak memory of one process": f"{peak / 2**20:.2f} GiB"})
  document.write(workdir / "report" / "index.html")


@contextlib.contextmanager
def _timed(clock: dict[str, float], name: str) -> Iterator[None]:
  start = time.perf_counter()
  yield
  clock[name] = time.perf_counter() - start
