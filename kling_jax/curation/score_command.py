"""`kling score`: measures the clips of a set, or loose files, in parallel processes; a set gets what it lacks.

On a set, finished clips are kept in SET/scores.jsonl until all are done; then the set is rewritten at once. A run that
was killed goes on where it was; a clip that has a scorer's values in the scorer's version is not measured again.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

import cv2

from kling_jax import answers as answers_lib
from kling_jax import measure, progress
from kling_jax.curation import engine
from kling_jax.data import clip_table, conditions, folder, reasons, record, records
from kling_jax.data.record import ClipRecord
from kling_jax.data.source import Score
from kling_jax.errors import DataError, UsageError
from kling_jax.measure import camera, vtss

WORK = "kling_jax.curation.score_command:work"
JOURNAL = "scores.jsonl"


@dataclasses.dataclass(frozen=True)
class Wanted:
  """Which scorers are to measure, in the form that goes to workers.

  Attributes:
    words: see `measure.chosen`.
    aesthetic: safetensors of CLIP's image tower and LAION's head, or none for the classical stand-in.
    model: suitability model (`measure.vtss.load`) whose VTSS every clip gets; none: the shipped one of sub-metrics, for
      sets without VTSS from elsewhere.
  """

  words: tuple[str, ...] = ("default",)
  aesthetic: str | None = None
  model: str | None = None

  def scorers(self) -> tuple[measure.Scorer, ...]:
    return _scorers(self)


@functools.lru_cache(maxsize=8)
def _scorers(wanted: Wanted) -> tuple[measure.Scorer, ...]:
  """The scorers; one instance a process, for learned ones hold weights.

  Raises:
    UsageError: an unknown score. WeightsError: weights that are none.
  """
  chosen = measure.judged_by(measure.chosen(wanted.words), wanted.model)
  if wanted.aesthetic is None:
    return chosen
  from kling_jax.measure.laion import scorer  # it starts JAX

  learned = scorer(wanted.aesthetic)
  return (*(one for one in chosen if one.conditions != learned.conditions), learned)


def command(
  inputs: Sequence[str],
  *,
  wanted: Wanted | None = None,
  workers: int | None = None,
  as_json: bool = False,
  why: bool = False,
) -> int:
  """Scores a set in place, or prints the scores of files; see the module.

  Args:
    inputs: one clip set, or video files and folders of them.
    wanted: who measures.
    workers: processes; None: one a core. With 1 this process does it, and a file that kills it ends the run.
    as_json: [{clip, vtss, scores: {name: {value, scorer, version}}}] on standard output, and nothing else. A score
      that was asked for and is not defined for the clip has the value null, as has safety where nobody measures it.
    why: tells of loose files what moved their VTSS; in JSON `why`: [{name, value, effect}].

  Returns:
    Exit code: 1 where a clip could not be measured.

  Raises:
    UsageError: unknown scores, no input. DataError: a damaged set, or one that another process is scoring.
  """
  wanted = wanted or Wanted()
  scorers = wanted.scorers()
  if workers is not None and workers < 1:
    raise UsageError(f"workers must be at least 1, got {workers}")
  if why:
    return _explain(_files(inputs), wanted, as_json)
  if len(inputs) == 1 and _is_set(inputs[0]):
    rows, failed = _score_set(clip_table.set_folder(inputs[0]), wanted, workers)
  else:
    rows, failed = _score_files(_files(inputs), wanted, workers)
  if as_json:
    print(json.dumps([_row(name, vtss, scores, scorers) for name, vtss, scores in rows], indent=1))
  else:
    for name, vtss, scores in rows:
      print(_text(name, vtss, scores))
  return 1 if failed else 0


def _is_set(name: str) -> bool:
  path = pathlib.Path(name)
  return (path / clip_table.TABLE).exists() or (
    path.name == clip_table.RECORDS and (path.parent / clip_table.TABLE).exists()
  )


def _files(inputs: Sequence[str]) -> list[str]:
  found = [path for name in inputs for path in (folder.find_videos(name) if os.path.isdir(name) else [name])]
  if not found:
    raise UsageError("--input wants a clip set, a folder of videos, or video files")
  return found


def work(job: dict[str, Any]) -> dict[str, Any]:
  """Measures one clip: {scores: {name: {value, scorer, version}}}, or {error: what is wrong}.

  Args:
    job: words, aesthetic and model (`Wanted`), keys (of the scorers that are missing), and either file, or shard and
      position.
  """
  cv2.setNumThreads(1)
  wanted = Wanted(tuple(job["words"]), job["aesthetic"], job["model"])
  scorers = [one for one in wanted.scorers() if one.key in job["keys"]]
  clip_id, known = "", dict[str, Score]()
  try:
    if "file" in job:
      media: str | bytes = job["file"]
    else:
      data = clip_table.read_record(clip_table.open_reader(pathlib.Path(job["shard"])), job["shard"], job["position"])
      clip, media = record.unpack(data)
      clip_id, known = clip.clip_id, clip.scores
    scores = measure.score_media(media, scorers, clip_id=clip_id, known=known)
  except reasons.MediaError as error:
    return {"error": f"{error.reason}: {error.detail}"}
  except (DataError, UsageError) as error:
    return {"error": str(error)}
  return {"scores": {name: dataclasses.asdict(score) for name, score in scores.items()}}


def _answers(jobs: list[dict[str, Any]], names: list[str], workers: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
  """(index, answer of `work`) as they come, under a progress bar; what fails is also told on standard error."""
  with progress.bar("score", len(jobs)) as line:
    alone = len(jobs) == 1 or workers == 1
    for index, answer in ((i, work(job)) for i, job in enumerate(jobs)) if alone else engine.run(WORK, jobs, workers):
      if isinstance(answer, engine.Failure):
        answer = {"error": answer.detail}
      if "error" in answer:
        print(f"kling: {names[index]}: {answer['error']}", file=sys.stderr)
      line.advance(1, note=pathlib.PurePath(names[index]).name)
      yield index, answer


Row = tuple[str, float | None, dict[str, Score]]


def _score_files(paths: list[str], wanted: Wanted, workers: int | None) -> tuple[list[Row], int]:
  """Scores of files in their order, and how many could not be measured."""
  every = [scorer.key for scorer in wanted.scorers()]
  jobs = [dataclasses.asdict(wanted) | {"file": path, "keys": every} for path in paths]
  found = dict(_answers(jobs, paths, workers))
  good = [index for index in sorted(found) if "scores" in found[index]]
  rows = [(paths[i], _parsed(found[i]["scores"])) for i in good]
  return [(path, _vtss(scores), scores) for path, scores in rows], len(paths) - len(good)


def _vtss(scores: dict[str, Score]) -> float | None:
  return scores["vtss"].value if "vtss" in scores else None


def _explain(paths: list[str], wanted: Wanted, as_json: bool) -> int:
  """Prints the VTSS of files with what moved it, most harmful first."""
  model = vtss.load(wanted.model or vtss.SHIPPED)
  scorers = measure.judged_by(measure.chosen(wanted.words), wanted.model or vtss.SHIPPED)
  answers: list[dict[str, Any]] = []
  failed = 0
  for path in paths:
    try:
      sample = measure.sampled(path, scorers)
    except reasons.MediaError as error:
      print(f"kling: {path}: {error.reason}: {error.detail}", file=sys.stderr)
      failed += 1
      continue
    scores = measure.measured(sample, scorers)
    found = [{"name": n, "value": v, "effect": e} for n, v, e in model.why(model.inputs(sample, scores))]
    answers.append({"clip": path, "vtss": _vtss(scores), "why": found})
  if as_json:
    answers_lib.show(answers)
  for answer in [] if as_json else answers:
    print(f"{answer['clip']}  vtss {answer['vtss']:.2f}")
    for row in answer["why"]:
      if abs(row["effect"]) >= 0.05:
        value = "" if math.isnan(row["value"]) else f"  {row['value']:.4g}"
        print(f"  {row['effect']:+.2f}  {row['name']}{value}")
  return 1 if failed else 0


def _parsed(values: dict[str, Any]) -> dict[str, Score]:
  return {name: Score(**value) for name, value in values.items()}


# ---- a set -----------------------------------------------------------------------------------------------------------


def _score_set(top: pathlib.Path, wanted: Wanted, workers: int | None) -> tuple[list[Row], int]:
  """Measures what the clips of a set lack; returns all clips with their scores, and how many could not be measured."""
  scorers = wanted.scorers()
  with _journal(top) as journal:
    index = clip_table.Index.load(top)
    clips = [index.clip(row) for row in range(len(index.table))]
    places = index.table.select(["shard", "position"]).to_pylist()
    done = _read_journal(journal)
    # VTSS of a table that somebody else made: a set must not mix two kinds, so the shipped model stands back.
    foreign = any(clip.vtss is not None and "vtss" not in clip.scores for clip in clips)
    fresh = {clip.clip_id: clip.scores for clip in (_with(clip, done.get(clip.clip_id, []), scorers) for clip in clips)}
    jobs, ids = [], []
    for clip, place in zip(clips, places, strict=True):
      due = [scorer for scorer in scorers if not scorer.done(fresh[clip.clip_id])]
      if foreign and not wanted.model:
        due = [scorer for scorer in due if scorer.conditions != ("vtss",)]
      missing = [scorer.key for scorer in due]
      # What was measured and is not defined left no score behind, but a line in the journal.
      missing = [key for key in missing if not any(key in entry["keys"] for entry in done.get(clip.clip_id, []))]
      if missing:
        where = {"shard": str(top / clip_table.RECORDS / place["shard"]), "position": place["position"]}
        jobs.append(dataclasses.asdict(wanted) | where | {"keys": missing})
        ids.append(clip.clip_id)
    failed = 0
    for number, answer in _answers(jobs, ids, workers):
      if "error" in answer:
        failed += 1
        continue
      entry = {"clip": ids[number], "keys": jobs[number]["keys"], "scores": answer["scores"]}
      done.setdefault(ids[number], []).append(entry)
      journal.write(json.dumps(entry) + "\n")
      journal.flush()
    if done:
      _rewrite(top, done, scorers)
    journal.truncate(0)
    index = clip_table.Index.load(top)
    clips = [index.clip(row) for row in range(len(index.table))]
  (top / JOURNAL).unlink(missing_ok=True)
  return [(clip.clip_id, clip.vtss, clip.scores) for clip in clips], failed


@contextlib.contextmanager
def _journal(top: pathlib.Path) -> Iterator[IO[str]]:
  """The open journal of a set, locked; the lock ends with the process, however it ends."""
  with (top / JOURNAL).open("a+", encoding="utf-8") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise DataError(f"{top}: another `kling score` is at work on this set; wait until it is done") from error
    yield file


def _read_journal(file: IO[str]) -> dict[str, list[dict[str, Any]]]:
  """{clip_id: entries}; a last line that a kill cut off is dropped from the file too."""
  file.seek(0)
  text = file.read()
  whole = text[: text.rfind("\n") + 1]
  if whole != text:
    file.truncate(len(whole.encode("utf-8")))
  done: dict[str, list[dict[str, Any]]] = {}
  for line in whole.splitlines():
    entry = json.loads(line)
    done.setdefault(entry["clip"], []).append(entry)
  return done


def _with(clip: ClipRecord, entries: list[dict[str, Any]], scorers: Sequence[measure.Scorer]) -> ClipRecord:
  """The clip with what the journal knows of it: all that a scorer had measured before is replaced."""
  scores = dict(clip.scores)
  for entry in entries:
    for scorer in scorers:
      if scorer.key in entry["keys"]:
        for condition in scorer.conditions:
          scores.pop(condition, None)
    scores |= _parsed(entry["scores"])
  return dataclasses.replace(clip, scores=scores, vtss=scores["vtss"].value if "vtss" in scores else clip.vtss)


def _rewrite(top: pathlib.Path, done: dict[str, list[dict[str, Any]]], scorers: Sequence[measure.Scorer]) -> None:
  """The set with its new scores, at once; then the percentiles of its conditions, where it has any."""
  records.rewrite(top, lambda clip: _with(clip, done.get(clip.clip_id, []), scorers))
  path = top / conditions.FILE
  if path.exists():
    names = list(conditions.load(path).names)
    index = clip_table.Index.load(top)
    infos = [index.clip(row).info() for row, status in enumerate(index.table["status"].to_pylist()) if status == "kept"]
    conditions.fit(infos, names).save(path)


# ---- what is printed -------------------------------------------------------------------------------------------------


def _row(name: str, vtss: float | None, scores: dict[str, Score], scorers: Sequence[measure.Scorer]) -> dict[str, Any]:
  asked = {condition: scorer for scorer in scorers for condition in scorer.conditions}
  nothing = {name: {"value": None, "scorer": one.name, "version": one.version} for name, one in asked.items()}
  unmeasured = {"safety": {"value": None, "scorer": "", "version": ""}}
  found = {name: dataclasses.asdict(score) for name, score in scores.items()}
  return {"clip": name, "vtss": vtss, "scores": unmeasured | nothing | found}


def _text(name: str, vtss: float | None, scores: dict[str, Score]) -> str:
  label = camera.label({key: score.value for key, score in scores.items()})
  head = f"{name}{f'  vtss {vtss:.2f}' if vtss is not None else ''}{f'  camera: {label}' if label else ''}"
  words = [f"{key} {score.value:.4g}" for key, score in sorted(scores.items())]
  rows = ["  " + "   ".join(f"{word:<28}" for word in words[k : k + 4]).rstrip() for k in range(0, len(words), 4)]
  return "\n".join([head, *rows])
