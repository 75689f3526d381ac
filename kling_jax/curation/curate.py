"""Raw videos to a clip set: admit, split, cut, measure, select; resumable per clip, one line a broken file."""

import collections
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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kling_jax import files, measure, progress
from kling_jax.curation import engine, inputs, journal, merge, ray_engine, report, select, staging
from kling_jax.curation import split as split_lib
from kling_jax.curation import video as video_lib
from kling_jax.curation.funnel import Funnel
from kling_jax.curation.rules import Rule
from kling_jax.curation.video import Recipe
from kling_jax.data import clip_table, folder, quarantine, record, records
from kling_jax.errors import ConfigError, DataError, NoRoom, UsageError, nearest, no_room

STAGING, OPTIONS = "work", "curation.json"
ENGINES: dict[str, Callable[..., Iterator[engine.Answer]]] = {"local": engine.run, "ray": ray_engine.run}
AHEAD = 64  # videos a worker may be ahead of the first one that is not done: bounds the staging folder
COMMIT_SHARE = 0.02  # of the set's media that a commit waits for, because each one rewrites the table
WORK = "kling_jax.curation.video:work"
_REASONS = {
  "died": "decode_error",
  "killed": "out_of_memory",
  "memory": "out_of_memory",
  "deadline": "timeout",
  "raised": "decode_error",
}


@dataclasses.dataclass(frozen=True)
class Options:
  """How to curate.

  Attributes:
    recipe: what decides the clips; a set has one.
    rules: what is kept, see `select`; None: the rules that the set was last selected with, else `DEFAULT_RULES`.
    engine: local (processes of this machine) or ray (the CPUs of a Ray cluster; all paths on shared storage).
    workers: processes; None: one a core.
    seconds_per_video, memory_gib: a video that takes longer or needs more is quarantined (timeout, out_of_memory);
      None: no limit.
    videos: folder with the videos of an input that is a table; None: the table's own.
    cache: folder where splits are kept for other sets of the same videos; None: until this set is done.
    report: write report/index.html.
  """

  recipe: Recipe = dataclasses.field(default_factory=Recipe)
  rules: Sequence[Rule] | None = None
  engine: str = "local"
  workers: int | None = None
  seconds_per_video: float | None = 3600.0
  memory_gib: float | None = 8.0
  videos: str | None = None
  cache: str | None = None
  report: bool = True


def curate(input: str | os.PathLike[str], output: str | os.PathLike[str], options: Options | None = None) -> Funnel:
  """Turns a folder of videos into a clip set.

  Writes clips.parquet, records/*.array_record, quarantine.jsonl, conditions.json, videos.jsonl (one object a video),
  curation.json (the recipe), select.json (the rules) and report/index.html. Killed at any line and started again it
  goes on: a finished video is not done again, the set comes out the same. New videos in the input are added.

  Args:
    input: folder of videos (searched below it too), with captions beside them (`data.folder`), one video, WebDataset
      tars, or a table of videos on this disk (`inputs`).
    output: the set's folder.
    options: see `Options`.

  Raises:
    UsageError: an option is wrong.
    DataError: no videos; not one of them gives a clip; a video changed since it was curated.
    ConfigError: the set was made with another recipe.
  """
  options = options or Options()
  _check(options)
  output = pathlib.Path(os.path.abspath(output))
  if output == pathlib.Path(os.path.abspath(input)):
    raise UsageError(f"--output {output} is the input folder; name another one")
  clock = time.perf_counter()
  found = inputs.find(input, output / STAGING, method=options.recipe.method, videos=options.videos)
  if found.counts is not None and (found.counts.absent or found.counts.damaged):
    print(f"kling: {found.counts.text(found.table)}", file=sys.stderr)
  if found.captions:
    folder.Captions(found.captions)  # a damaged table is an error now, not a quarantined video each
  with _locked(output):
    _claim(output, options.recipe)
    run = _Run(output, found, options)
    try:
      run.process()
      run.finish()
    except Exception as error:
      if not no_room(error):
        raise
      raise NoRoom(f"{output}: the disk is full; make room and start again: what is done is kept") from error
  funnel = Funnel.of_set(output, wall_s=time.perf_counter() - clock)
  if not (output / clip_table.TABLE).exists():
    reasons = ", ".join(f"{count} {reason}" for reason, count in funnel.quarantined.items())
    where = f"{output / 'quarantine.jsonl'} tells why each was refused" if reasons else "all shots are too short"
    raise DataError(f"{input}: none of {len(found.paths)} videos gives a clip ({reasons or 'no reason'}); {where}")
  if options.report:
    report.write(output, funnel)
  return funnel


def _check(options: Options) -> None:
  recipe = options.recipe
  methods = (*split_lib.METHODS, inputs.TABLE)
  if recipe.method not in methods:
    raise UsageError(f"unknown method {recipe.method!r} to split videos{nearest(recipe.method, methods)}")
  if not 0 < recipe.min_seconds <= recipe.max_seconds:
    raise UsageError(f"clips of {recipe.min_seconds:g} to {recipe.max_seconds:g} s: wants 0 < least <= most")
  if recipe.max_seconds < 2 * recipe.min_seconds:
    # Equal pieces of a shot slightly longer than the most are about half as long.
    raise UsageError(f"max_seconds {recipe.max_seconds:g} must be at least twice min_seconds {recipe.min_seconds:g}")
  if not 0 <= recipe.crf <= 51 or (recipe.short_side is not None and recipe.short_side < 16):
    raise UsageError(f"crf {recipe.crf:g} (0 to 51) or short_side {recipe.short_side} (at least 16) is out of range")
  measure.judged_by(
    measure.chosen([word.strip() for word in recipe.scorers.split(",")]), recipe.model
  )  # an unknown one is an error now
  merge.embedding(recipe.embedding)
  if recipe.merge is not None and not 0 < recipe.merge <= 1:
    raise UsageError(f"merge {recipe.merge:g}: a cosine of embeddings is wanted, in (0, 1]")
  if options.engine not in ENGINES:
    raise UsageError(f"unknown engine {options.engine!r}{nearest(options.engine, ENGINES)}")
  if options.workers is not None and options.workers < 1:
    raise UsageError(f"workers must be at least 1, got {options.workers}")


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

  def __init__(self, output: pathlib.Path, found: inputs.Inputs, options: Options):
    self._output, self._top, self._inputs, self._options = output, found.top, found, options
    self._staging = output / STAGING
    self._staging.mkdir(parents=True, exist_ok=True)
    for leftover in self._staging.rglob(".*"):
      leftover.unlink()
    self._log = quarantine.Log(output / "quarantine.jsonl")
    self._log.path.touch()
    for verdict in found.refused:
      assert verdict.reason is not None
      self._log.add(verdict.source, verdict.reason, verdict.detail)
      print(f"kling: quarantined {verdict.source!r}: {verdict.reason}: {verdict.detail}", file=sys.stderr)
    videos, top = found.paths, found.top
    self._names = {video: os.path.relpath(video, top).replace(os.sep, "/") for video in videos}
    self._journal = {entry["name"]: entry for entry in journal.read(output)}
    self._todo = [video for video in videos if self._is_new(video)]
    self._known = {entry["content"]: entry["name"] for entry in self._journal.values() if entry["content"]}
    self._moved: list[tuple[str, dict[str, Any]]] = []  # videos whose clips wait for a commit

  def process(self) -> None:
    """Runs every video that is not done, and moves videos into the set in their order as soon as they are.

    A killed run leaves finished clips and videos in the staging folder, where the next one finds them.
    """
    summaries = {path: self._place(path).summary() for path in self._todo}
    done = {path for path, held in summaries.items() if held is not None and _same_file(held, path)}
    done |= {path for path in self._todo if path not in done and self._refuse(path)}
    options = self._options
    jobs = [self._job(path) for path in self._in_turn() if path not in done]
    seconds = options.seconds_per_video
    # The decoder looks at the clock between packets; the deadline ends what hangs inside one.
    deadline_s = None if seconds is None else 1.5 * seconds + 30
    memory = None if options.memory_gib is None else options.memory_gib * 2**30
    answers = ENGINES[options.engine](WORK, jobs, options.workers, deadline_s, memory)
    waiting = collections.deque(self._todo)
    with _Writer(self._output, options.recipe.media, self._committed()) as writer, contextlib.ExitStack() as stack:
      line = stack.enter_context(progress.bar("curate", len(self._todo)))
      line.advance(len(done))
      self._move(waiting, done, writer)
      for index, answer in answers:
        name, path = str(jobs[index]["name"]), str(jobs[index]["path"])
        if isinstance(answer, engine.Failure):
          answer = _refusal(path, name, _REASONS[answer.kind], answer.detail)
          self._place(path).finish(answer)
        if "no_room" in answer:
          raise NoRoom(answer["no_room"])
        if answer["reason"]:
          print(f"kling: quarantined {name!r}: {answer['reason']}: {answer['detail']}", file=sys.stderr)
        done.add(path)
        line.advance(1, note=name)
        self._move(waiting, done, writer)
      writer.commit()
      self._enter(self._moved)

  def finish(self) -> None:
    """Judges the clips and clears what is no longer needed."""
    self._select()
    shutil.rmtree(self._staging)

  def _in_turn(self) -> list[str]:
    """The videos in the order in which they are begun: of each stretch of the input the largest files first.

    The file's size stands for its cost. A film that is begun last would keep one worker busy while all others idle;
    the stretches bound how far the staging folder runs ahead of the set.
    """
    size = AHEAD * (self._options.workers or os.cpu_count() or 1)
    turns: list[str] = []
    for start in range(0, len(self._todo), size):
      turns += sorted(self._todo[start : start + size], key=lambda path: -inputs.file_state(path)[0])
    return turns

  def _job(self, path: str) -> dict[str, Any]:
    options = self._options
    return {
      "path": path,
      "name": quarantine.printable(self._names[path]),
      "staging": str(self._staging),
      "stem": self._place(path).stem,
      "splits": os.path.abspath(options.cache or self._staging / "splits"),
      "recipe": dataclasses.asdict(options.recipe),
      "seconds": options.seconds_per_video,
    } | self._inputs.job(path)

  def _committed(self) -> int:
    """Bytes of media that are in the set by the journal, which so decide the places of commits in every run alike."""
    return sum(entry.get("media_bytes", 0) for entry in self._journal.values())

  def _move(self, waiting: collections.deque[str], done: set[str], writer: "_Writer") -> None:
    """Moves the finished videos at the head of the queue into the set."""
    while waiting and waiting[0] in done:
      path = waiting.popleft()
      answer = self._place(path).summary()
      assert answer is not None  # it is done
      answer["duplicate_of"] = self._known.get(answer["content"], "")
      if answer["content"]:
        self._known.setdefault(answer["content"], answer["name"])
      if answer["reason"]:
        self._log.add(path, answer["reason"], answer["detail"])
      elif not answer["duplicate_of"]:
        for held in self._place(path).clips(answer):
          writer.add(held.clip, held.media)
      else:
        answer["media_bytes"] = 0
      self._moved.append((path, answer))
      if writer.is_due():
        writer.commit()
        self._enter(self._moved)

  def _select(self) -> None:
    """Judges all clips, those of earlier runs as well."""
    if (self._output / clip_table.TABLE).exists():
      select.select(self._output, self._options.rules, strict=self._options.rules is not None)

  def _enter(self, answers: list[tuple[str, dict[str, Any]]]) -> None:
    """Journals videos whose clips are committed, then frees their staging."""
    journal.add(self._output, [answer for _, answer in answers])
    for path, _ in answers:
      self._place(path).clear()
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
    if not detail and not self._inputs.holds(path):
      reason, detail = "unreadable", "there is no such file"
    if detail:
      name = quarantine.printable(self._names[path])
      self._place(path).finish(_refusal(path, name, reason, detail))
      print(f"kling: quarantined {name!r}: {reason}: {detail}", file=sys.stderr)
    return bool(detail)

  def _place(self, path: str) -> staging.Place:
    name = os.path.relpath(path, self._top)
    return staging.Place(self._staging, hashlib.sha256(os.fsencode(name)).hexdigest()[:24])


class _Writer:
  """RecordWriter that passes over clips that an earlier, killed run has already committed.

  Args:
    output, recipe: see `records.RecordWriter`. committed: bytes of media in the set.
  """

  def __init__(self, output: pathlib.Path, recipe: str, committed: int):
    self._writer = records.RecordWriter(output, recipe)
    self._added, self._committed, self._size = False, committed, 0

  def __enter__(self) -> "_Writer":
    return self

  def __exit__(self, *_: object) -> None:
    self._writer.close()

  def add(self, clip: record.ClipRecord, media: bytes) -> None:
    self._size += len(media)  # also of known clips: the places of commits, and so the shards, stay the same
    if clip.clip_id not in self._writer:
      self._writer.write(clip, media)
      self._added = True

  def is_due(self) -> bool:
    """Whether so much is new that a commit is worth rewriting the table."""
    return self._size >= max(records.SHARD_BYTES, COMMIT_SHARE * self._committed)

  def commit(self) -> None:
    if self._added:
      self._writer.commit()
    self._committed += self._size
    self._size, self._added = 0, False


def _refusal(path: str, name: str, reason: str, detail: str) -> dict[str, Any]:
  return video_lib.summary(path, name) | {"reason": reason, "detail": detail}


def _same_file(entry: dict[str, Any], path: str) -> bool:
  return (entry["bytes"], entry["modified"]) == inputs.file_state(path)
