"""`kling split`: many videos in parallel processes; answers as JSON, text, or lists for other programs."""

import collections
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kling_jax import progress
from kling_jax.curation import engine, shot_lists
from kling_jax.curation import split as split_lib
from kling_jax.data import container, reasons
from kling_jax.errors import DataError, UsageError, nearest

WORK = "kling_jax.curation.split_command:work"
FIT_FRAMES = 200  # neighbouring pairs of a video that the SVM may see
FIT_PAIRS = 2000  # of each class


def command(
  videos: Sequence[str],
  *,
  method: str = "default",
  as_json: bool = False,
  weights: str | None = None,
  output: str | None = None,
  formats: Sequence[str] = (),
  workers: int | None = None,
) -> int:
  """Splits videos and prints one JSON list, or a readable list; a broken file costs a line on standard error.

  Args:
    videos: files.
    method, weights: see `split.split`.
    as_json: the list of `Split.to_json` on standard output, and nothing else.
    output, formats: folder that gets a file for each video and format of `shot_lists.WRITERS`.
    workers: processes; None: one a core. A single video is decoded by several threads instead.

  Returns:
    Exit code: 1 where a video could not be read.
  """
  split_lib.detector(method, weights)  # refuses an unknown method or damaged weights before anything is decoded
  _check_outputs(videos, output, formats, workers)
  jobs = [
    {"video": video, "method": method, "weights": weights, "output": output, "formats": list(formats)}
    for video in videos
  ]
  done: dict[int, dict[str, Any]] = {}
  with progress.bar("split", len(jobs)) as line:
    for index, answer in answers(jobs, workers):
      done[index] = answer
      line.advance(1, note=pathlib.PurePath(videos[index]).name)
  for index in range(len(jobs)):
    if "error" in done[index]:
      print(f"kling: {done[index]['error']}", file=sys.stderr)
  good = [done[index] for index in range(len(jobs)) if "error" not in done[index]]
  if as_json:
    print(json.dumps([answer["split"] for answer in good], indent=1))
  else:
    for answer in good:
      print(_text(answer["split"]))
      for path in answer["written"]:
        print(f"  wrote {path}")
  return 1 if len(good) < len(jobs) else 0


def _check_outputs(videos: Sequence[str], output: str | None, formats: Sequence[str], workers: int | None) -> None:
  for name in formats:
    if name not in shot_lists.WRITERS:
      raise UsageError(f"unknown format {name!r} of a shot list{nearest(name, shot_lists.WRITERS)}")
  if (output is None) != (not formats):
    raise UsageError("--output DIR and --format belong together: where to write, and what")
  if workers is not None and workers < 1:
    raise UsageError(f"workers must be at least 1, got {workers}")
  names = collections.Counter(pathlib.PurePath(video).name for video in videos)
  twice = next((name for name, count in names.items() if count > 1), None)
  if formats and twice is not None:
    raise UsageError(f"two videos are called {twice!r} and would write the same files; split them one folder at a time")


def answers(jobs: list[dict[str, Any]], workers: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
  if len(jobs) == 1 or workers == 1:
    for index, job in enumerate(jobs):
      yield index, work(job | {"threads": 0})
    return
  for index, answer in engine.run(WORK, [job | {"threads": 1} for job in jobs], workers):
    if isinstance(answer, engine.Failure):
      answer = {"error": f"{jobs[index]['video']}: {answer.detail}"}
    yield index, answer


def work(job: dict[str, Any]) -> dict[str, Any]:
  """Splits one video: {split: `Split.to_json`, written: [paths]}, or {error: what is wrong with the file}."""
  limits = container.Limits(threads=job["threads"])
  try:
    video = split_lib.split(job["video"], job["method"], limits, weights=job["weights"])
  except reasons.MediaError as error:
    return {"error": str(error)}
  written = shot_lists.write(video, job["output"], job["formats"]) if job["formats"] else []
  return {"split": video.to_json(), "written": [str(path) for path in written]}


def _text(video: dict[str, Any]) -> str:
  count = f"{len(video['shots'])} shot{'s' * (len(video['shots']) != 1)}"
  lines = [f"{video['video']}: {video['num_frames']} frames, {video['fps']:.3f} fps, {count}"]
  for t in video["transitions"]:
    span = f"{t['start_s']:9.3f} s - {t['end_s']:9.3f} s"
    lines.append(
      f"  {t['kind']:<9}{span}   frames {t['start_frame']} - {t['end_frame']}   confidence {t['confidence']:.2f}"
    )
  return "\n".join(lines)


def fit(videos: Sequence[str], target: str, *, seed: int = 0, as_json: bool = False) -> int:
  """`kling split --fit F.json VIDEO...`: trains Color-Struct SVM on pairs that nobody labelled, and saves it.

  Neighbouring frames of one video count as one shot, frames of two videos as a transition.

  Raises:
    DataError: fewer than two of the videos can be read and have two frames.
  """
  from kling_jax.curation import color_struct  # it starts JAX

  seen, skipped = [], 0
  for video in progress.track(videos, "look at videos"):
    try:
      first, second = _neighbours(video)
    except reasons.MediaError as error:
      skipped += 1
      print(f"kling: {error}", file=sys.stderr)
      continue
    if first:
      seen.append((color_struct.Frames.of(first), color_struct.Frames.of(second)))
  if len(seen) < 2:
    raise DataError(f"--fit needs at least two readable videos of two frames or more, got {len(seen)}")
  similarities, labels = color_struct.free_pairs(seen, FIT_PAIRS, seed)
  weights = color_struct.fit(similarities, labels)
  weights.save(target)
  right = float((np.sign(weights.margins(similarities)) == labels).mean())
  facts = {"weights": target, "videos": len(seen), "pairs": len(labels), "accuracy": round(right, 4)}
  if as_json:
    print(json.dumps(facts, indent=1))
  else:
    print(f"{target}: from {len(labels)} pairs of {len(seen)} videos; {100 * right:.1f} % of them on the right side")
  return 1 if skipped else 0


def _neighbours(video: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Up to FIT_FRAMES frames spread over a video, and the frame after each."""
  from kling_jax.curation import color_struct

  with container.open_video(video, container.Limits(threads=0)) as opened:
    count = sum(1 for _ in opened.frames())
  wanted = set(np.unique(np.linspace(0, count - 2, FIT_FRAMES).astype(int)).tolist()) if count > 1 else set()
  first, second = [], []
  with container.open_video(video, container.Limits(threads=0)) as opened:
    for index, (_, frame) in enumerate(itertools.islice(opened.frames(), count)):
      if index in wanted or index - 1 in wanted:
        pixels = color_struct.shrunk(color_struct.bgr(frame))
        first += [pixels] if index in wanted else []
        second += [pixels] if index - 1 in wanted else []
  return first, second
