"""Raw videos to a clip set: admit, split, cut, measure, select; resumable per video, one line a broken file."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from kling_jax import files, progress
from kling_jax.curation import engine, report, select
from kling_jax.curation import split as split_lib
from kling_jax.curation import video as video_lib
from kling_jax.curation.funnel import Funnel
from kling_jax.curation.rules import Rule
from kling_jax.curation.video import Recipe
from kling_jax.data import clip_table, columns, folder, quarantine, record, records
from kling_jax.errors import ConfigError, DataError, UsageError, nearest

STAGING, JOURNAL, OPTIONS = "work", "videos.jsonl", "curation.json"
_REASONS = {"died": "decode_error", "memory": "out_of_memory", "deadline": "timeout", "raised": "decode_error"}


@dataclasses.dataclass(frozen=True)
class Options:
  """How to curate.

  Attributes:
    recipe: what decides the clips; a set has one.
    rules: what is kept, see `select`; None: the rules that the set was last selected with, else `DEFAULT_RULES`.
    workers: processes; None: one a core.
    seconds_per_video: a video that takes longer is quarantined (timeout); None: no limit.
    report: write report/index.html (needs the extra `demo`).
  """

  recipe: Recipe = dataclasses.field(default_factory=Recipe)
  rules: Sequence[Rule] | None = None
  workers: int | None = None
  seconds_per_video: float | None = 3600.0
  report: bool = True


def curate(input: str | os.PathLike[str], output: str | os.PathLike[str], options: Options | None = None) -> Funnel:
  """Turns a folder of videos into a clip set.

  Writes clips.parquet, records/*.array_record, quarantine.jsonl, conditions.json, videos.jsonl (one object a video),
  curation.json (the recipe), select.json (the rules) and report/index.html. Killed at any line and started again it
  goes on: a finished video is not done again, the set comes out the same. New videos in the input are added.

  Args:
    input: folder of videos (searched below it too), with captions beside them (`data.folder`), or one video.
    output: the set's folder.
    options: see `Options`.

  Raises:
    UsageError: an option is wrong, or a part for the report is missing.
    DataError: no videos; not one of them gives a clip; a video changed since it was curated.
    ConfigError: the set was made with another recipe.
  """
  options = options or Options()
  _check(options)
  if options.report:
    report.require()
  top, videos, captions = _videos(input)
  folder.Captions(captions)  # a damaged table is an error now, not a quarantined video each
  output = pathlib.Path(os.path.abspath(output))
  if output == top:
    raise UsageError(f"--output {output} is the input folder; name another one")
  clock = time.perf_counter()
  with _locked(output):
    _claim(output, options.recipe)
    run = _Run(output, top, videos, captions, options)
    run.process()
    run.finish()
  funnel = Funnel.of_set(output, wall_s=time.perf_counter() - clock)
  if not (output / clip_table.TABLE).exists():
    reasons = ", ".join(f"{count} {reason}" for reason, count in funnel.quarantined.items())
    where = f"{output / 'quarantine.jsonl'} tells why each was refused" if reasons else "all shots are too short"
    raise DataError(f"{input}: none of {len(videos)} videos gives a clip ({reasons or 'no reason'}); {where}")
  if options.report:
    report.write(output, funnel)
  return funnel


def _check(options: Options) -> None:
  recipe = options.recipe
  if recipe.method not in split_lib.METHODS:
    raise UsageError(f"unknown method {recipe.method!r} to split videos{nearest(recipe.method, split_lib.METHODS)}")
  if not 0 < recipe.min_seconds <= recipe.max_seconds:
    raise UsageError(f"clips of {recipe.min_seconds:g} to {recipe.max_seconds:g} s: wants 0 < least <= most")
  if recipe.max_seconds < 2 * recipe.min_seconds:
    # Equal pieces of a shot slightly longer than the most are about half as long.
    raise UsageError(f"max_seconds {recipe.max_seconds:g} must be at least twice min_seconds {recipe.min_seconds:g}")
  if not 0 <= recipe.crf <= 51 or (recipe.short_side is not None and recipe.short_side < 16):
    raise UsageError(f"crf {recipe.crf:g} (0 to 51) or short_side {recipe.short_side} (at least 16) is out of range")
  if options.workers is not None and options.workers < 1:
    raise UsageError(f"workers must be at least 1, got {options.workers}")


def _videos(input: str | os.PathLike[str]) -> tuple[pathlib.Path, list[str], str]:
  """(top folder, paths of the videos in order, folder or table with the captions)."""
  path = pathlib.Path(os.path.abspath(input))
  if path.is_file() and path.suffix.lower() in columns.SUFFIXES:
    table = columns.read_table(path)
    if "file" not in table.column_names:
      names = ", ".join(table.column_names)
      raise DataError(f"{path}: wants a column file (and, if you like, caption, start_s, end_s); it has {names}")
    listed = dict.fromkeys(name for name in table["file"].to_pylist() if name)
    captions = path if "caption" in table.column_names else path.parent
    return path.parent, [os.path.abspath(path.parent / name) for name in listed], str(captions)
  if path.is_file():
    return path.parent, [str(path)], str(path.parent)
  return path, [os.path.abspath(found) for found in folder.find_videos(path)], str(path)


@contextlib.contextmanager
def _locked(output: pathlib.Path) -> Iterator[None]:
  """Keeps a second run out of the folder; the lock ends with the process, however it ends."""
  output.mkdir(parents=True, exist_ok=True)
  with (output / ".lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise DataError(f"{output}: another `kling curate` is at work on this set; wait until it is done") from error
    yield


def _claim(output: pathlib.Path, recipe: Recipe) -> None:
  """Makes the output folder this recipe's, or says what differs."""
  path = output / OPTIONS
  wanted = dataclasses.asdict(recipe)
  if path.exists():
    held = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    differ = [f"{k}: {held.get(k)!r} there, {v!r} now" for k, v in wanted.items() if held.get(k) != v]
    if differ:
      raise ConfigError(f"{output} was curated with another recipe ({'; '.join(differ)}); name another output folder")
    return
  if (output / clip_table.TABLE).exists():
    raise ConfigError(f"{output} holds a clip set that `kling curate` did not make; name another output folder")
  files.write_json(path, {"recipe": wanted})


class _Run:
  """The state of one call: which videos are done, which wait, and the writer of the set."""

  def __init__(self, output: pathlib.Path, top: pathlib.Path, videos: list[str], captions: str, options: Options):
    self._output, self._top, self._captions, self._options = output, top, captions, options
    self._staging = output / STAGING
    self._staging.mkdir(parents=True, exist_ok=True)
    for leftover in self._staging.glob(".*"):
      leftover.unlink()
    self._log = quarantine.Log(output / "quarantine.jsonl")
    self._log.path.touch()
    self._names = {video: os.path.relpath(video, top).replace(os.sep, "/") for video in videos}
    self._journal = {entry["name"]: entry for entry in read_journal(output)}
    self._todo = [video for video in videos if self._is_new(video)]

  def process(self) -> None:
    """Runs every video that is not done; answers lie in the staging folder."""
    waiting = []
    for path in self._todo:
      done = video_lib.read_summary(self._stem(path))
      if done is None or not _same_file(done, path):
        waiting.append(path)
    seconds = self._options.seconds_per_video
    jobs: list[dict[str, Any]] = [
      {
        "path": path,
        "name": quarantine.printable(self._names[path]),
        "captions": self._captions,
        "stem": str(self._stem(path)),
        "recipe": dataclasses.asdict(self._options.recipe),
        "seconds": seconds,
      }
      for path in waiting
      if not self._refuse(path)
    ]
    # The decoder looks at the clock between packets; the deadline ends what hangs inside one.
    deadline_s = None if seconds is None else 1.5 * seconds + 30
    with progress.bar("curate", len(self._todo)) as line:
      line.advance(len(self._todo) - len(jobs))
      for index, answer in engine.run("kling_jax.curation.video:work", jobs, self._options.workers, deadline_s):
        name, path = str(jobs[index]["name"]), str(jobs[index]["path"])
        if isinstance(answer, engine.Failure):
          answer = _refusal(path, name, _REASONS[answer.kind], answer.detail)
          files.write_json(self._stem(path).with_suffix(".json"), answer)
        if answer["reason"]:
          print(f"kling: quarantined {name!r}: {answer['reason']}: {answer['detail']}", file=sys.stderr)
        line.advance(1, note=name)

  def finish(self) -> None:
    """Moves the staged clips into the set in the order of the videos, and the answers into the journal."""
    waiting: list[tuple[str, dict[str, Any]]] = []
    known = {entry["content"]: entry["name"] for entry in self._journal.values() if entry["content"]}
    with _Writer(self._output, self._options.recipe.media) as writer:
      for path in self._todo:
        answer = video_lib.read_summary(self._stem(path))
        assert answer is not None  # `process` left one for every video
        answer["duplicate_of"] = known.get(answer["content"], "")
        if answer["content"]:
          known.setdefault(answer["content"], answer["name"])
        waiting.append((path, answer))
        if answer["reason"]:
          self._log.add(path, answer["reason"], answer["detail"])
        elif not answer["duplicate_of"]:
          for clip, media in video_lib.staged(self._stem(path)):
            writer.add(clip, media)
        if writer.size >= records.SHARD_BYTES:
          writer.commit()
          self._enter(waiting)
      writer.commit()
      self._enter(waiting)
    self._select()
    shutil.rmtree(self._staging)

  def _select(self) -> None:
    """Judges all clips, those of earlier runs as well."""
    if (self._output / clip_table.TABLE).exists():
      select.select(self._output, self._options.rules, strict=self._options.rules is not None)

  def _enter(self, answers: list[tuple[str, dict[str, Any]]]) -> None:
    """Journals videos whose clips are committed, then frees their staging."""
    self._journal |= {answer["name"]: answer for _, answer in answers}
    text = "".join(json.dumps(entry) + "\n" for entry in self._journal.values())
    files.write_text(self._output / JOURNAL, text)
    for path, _ in answers:
      self._stem(path).with_suffix(".clips").unlink(missing_ok=True)
      self._stem(path).with_suffix(".json").unlink(missing_ok=True)
    answers.clear()

  def _is_new(self, path: str) -> bool:
    entry = self._journal.get(quarantine.printable(self._names[path]))
    if entry is None:
      return True
    if entry["reason"] and not _same_file(entry, path):
      return True  # a mended file
    if not _same_file(entry, path):
      raise DataError(f"{path} changed since {self._output} was made of it; curate into another folder")
    return False

  def _refuse(self, path: str) -> bool:
    """Names that cannot go into tables and messages, or that are no files, never reach a worker."""
    reason, detail = "hostile_name", quarantine.hostile(self._names[path])
    if not detail and self._names[path].split("/")[0] == "..":
      detail = f"the name leads out of {self._top}"
    if not detail and not os.path.isfile(path):
      reason, detail = "unreadable", "there is no such file"
    if detail:
      name = quarantine.printable(self._names[path])
      files.write_json(self._stem(path).with_suffix(".json"), _refusal(path, name, reason, detail))
      print(f"kling: quarantined {name!r}: {reason}: {detail}", file=sys.stderr)
    return bool(detail)

  def _stem(self, path: str) -> pathlib.Path:
    name = os.path.relpath(path, self._top)
    return self._staging / hashlib.sha256(os.fsencode(name)).hexdigest()[:24]


class _Writer:
  """RecordWriter that passes over clips that an earlier, killed run has already committed."""

  def __init__(self, output: pathlib.Path, recipe: str):
    self._writer = records.RecordWriter(output, recipe)
    self._added = False
    self.size = 0

  def __enter__(self) -> "_Writer":
    return self

  def __exit__(self, *_: object) -> None:
    self._writer.close()

  def add(self, clip: record.ClipRecord, media: bytes) -> None:
    self.size += len(media)  # also of known clips: the places of commits, and so the shards, stay the same
    if clip.clip_id not in self._writer:
      self._writer.write(clip, media)
      self._added = True

  def commit(self) -> None:
    if self._added:
      self._writer.commit()
    self.size, self._added = 0, False


def _refusal(path: str, name: str, reason: str, detail: str) -> dict[str, Any]:
  return video_lib.summary(path, name) | {"reason": reason, "detail": detail}


def _same_file(entry: dict[str, Any], path: str) -> bool:
  return (entry["bytes"], entry["modified"]) == video_lib.file_state(path)


def read_journal(output: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The objects of a set's videos.jsonl, [] where there is none: `video.work`'s answers with duplicate_of."""
  path = pathlib.Path(output) / JOURNAL
  return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
