"""`kling caption`: captions for a set's clips or loose files, by a server or own weights, from facts, from sidecars.

Captioners are asked in the order given; the first that has something to say about a clip speaks. A set is changed at
once at the end; what a server answered stands in its journal from the moment it came.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import pyarrow as pa

from kling_jax import chat, errors, files, progress, web
from kling_jax.curation.caption_facts import Facts
from kling_jax.curation.caption_journal import Journal
from kling_jax.curation.caption_server import FORMATS, Question, Server
from kling_jax.data import caption as caption_lib
from kling_jax.data import clip_table, folder, records
from kling_jax.data.caption import Caption
from kling_jax.data.record import ClipRecord
from kling_jax.data.source import ClipSource

CAPTIONERS = ("server", "local:DIR", "facts", "sidecar")
LOCAL = "local:"
JOURNALS = "captions"  # folder in a set
GIVE_UP = 5  # clips in a row that cannot reach the server end the run
HOPELESS = 8  # clips that all fail, before one succeeds, end the run: the fault is not theirs

__all__ = ["CAPTIONERS", "FORMATS", "Captioner", "Options", "Sidecar", "Summary", "run"]


class Captioner(Protocol):
  """Writes captions; called by several threads at once."""

  @property
  def name(self) -> str: ...

  def caption(self, source: ClipSource, index: int) -> Caption:
    """The caption of clip `index`; empty where there is nothing to say.

    Raises:
      DataError: this clip cannot be captioned.
    """
    ...


class Sidecar:
  """Captions that lie beside the source videos (`data.folder`).

  Args:
    top: folder or caption table that is searched; None: the folder that the clip's name starts from.
  """

  name = "sidecar"

  def __init__(self, top: str | os.PathLike[str] | None = None):
    self._top = None if top is None else os.fspath(top)
    self._captions: dict[str, folder.Captions] = {}

  def caption(self, source: ClipSource, index: int) -> Caption:
    info = source.info(index)
    span: tuple[float, float] | None = None
    if isinstance(source, records.RecordSource):
      clip = source.record(index)
      path, span = clip.source, (clip.start_s - clip.source_start_s, clip.end_s - clip.source_start_s)
    elif isinstance(source, folder.FileClips):
      path = source.path(index)
    else:
      raise errors.UsageError("sidecar captions need clips that came from files")
    top = self._top or path.removesuffix(info.video_id).rstrip("/") or os.path.dirname(path)
    if top not in self._captions:
      self._captions[top] = folder.Captions(top)
    return self._captions[top].of(path, info.video_id, span)


@dataclasses.dataclass(frozen=True)
class Options:
  """How to caption.

  Attributes:
    captioners: of `CAPTIONERS`, in the order they are asked; DIR holds the weights of a captioner of ours.
    server, model: address and model name, for the captioner `server`.
    question: what is asked of it.
    concurrency: clips at a time. rate: requests a minute; None: no limit.
    timeout_s, tries: of a request that gets no answer.
    prices: dollars per million prompt and completion tokens, for the bill.
    tokenizer: a tokenizer.json whose tokens are counted; None: our bytes.
    sidecar: folder or table with captions.
    again: also clips that have a caption. dropped: also clips that selection dropped.
  """

  captioners: Sequence[str] = ("facts",)
  server: str = ""
  model: str = ""
  question: Question = dataclasses.field(default_factory=Question)
  concurrency: int = 8
  rate: float | None = None
  timeout_s: float = 120.0
  tries: int = 6
  prices: tuple[float, float] | None = None
  tokenizer: str | os.PathLike[str] | None = None
  sidecar: str | os.PathLike[str] | None = None
  again: bool = False
  dropped: bool = False


@dataclasses.dataclass
class Summary:
  """What a run did.

  Attributes:
    clips: that were looked at. skipped: had a caption already, or are dropped. captioned: {captioner: clips}.
    unsaid: clips that nobody had anything to say about. failed: {clip_id or file: why}.
    tokens: of all new captions, as counted by `tokenizer`.
    answers, prompt_tokens, completion_tokens: of the server, over all runs with this model and question; useless
      answers count. uncounted: answers whose server did not tell. dollars: what that costs, where prices are given.
    ignored_fields: fields of answers beside the six.
    captions: rows of the caption table, of loose files.
  """

  clips: int = 0
  skipped: int = 0
  captioned: dict[str, int] = dataclasses.field(default_factory=dict)
  unsaid: int = 0
  failed: dict[str, str] = dataclasses.field(default_factory=dict)
  tokenizer: str = ""
  tokens: int = 0
  answers: int = 0
  prompt_tokens: int = 0
  completion_tokens: int = 0
  uncounted: int = 0
  dollars: float | None = None
  ignored_fields: int = 0
  captions: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def text(self) -> str:
    """A few lines for the terminal."""
    done = ", ".join(f"{count} by {name}" for name, count in self.captioned.items()) or "none"
    rest = f"{self.unsaid} unsaid, {len(self.failed)} failed"
    lines = [f"{self.clips} clips: {self.skipped} left alone, captioned {done}, {rest}"]
    if self.answers:
      price = "" if self.dollars is None else f" = ${self.dollars:.4f}"
      blind = f" ({self.uncounted} answers did not tell)" if self.uncounted else ""
      tokens = f"{self.prompt_tokens} prompt and {self.completion_tokens} completion tokens"
      lines.append(f"server: {self.answers} answers in all runs, {tokens}{blind}{price}")
    lines += [f"  {clip}: {why}" for clip, why in list(self.failed.items())[:10]]
    return "\n".join(lines)


def run(
  input: str | os.PathLike[str], options: Options | None = None, output: str | os.PathLike[str] | None = None
) -> Summary:
  """Captions a clip set, a folder of videos, or one video.

  A set is rewritten at once, when every clip had its turn; started again after a kill it asks nothing twice. Captions
  of loose files go to `output`, a table that `data.folder` reads.

  Args:
    output: FILE.jsonl, for loose files; None: only the summary has the captions.

  Raises:
    UsageError: an option is wrong; the server refuses everything. DataError: no clips; the server cannot be reached
      (what it answered before is kept).
  """
  options = options or Options()
  counter = caption_lib.token_count(options.tokenizer)
  path = pathlib.Path(input)
  is_set = path.is_dir() and ((path / clip_table.TABLE).exists() or (path.parent / clip_table.TABLE).exists())
  if is_set and output is not None:
    raise errors.UsageError(f"--output is for loose files; {path} is a clip set, which takes its captions itself")
  source = _open(path, is_set)
  target = pathlib.Path(output) if output is not None else None
  journals = clip_table.set_folder(path) / JOURNALS if is_set else target.parent / f".{JOURNALS}" if target else None
  pace = web.Pace(options.rate)
  captioners = _captioners(options, journals, pace)
  servers = [captioner for captioner in captioners if isinstance(captioner, Server)]
  summary = Summary(clips=len(source), tokenizer=counter.name)
  said: dict[str, Caption] = {}
  try:
    todo = _wanted(source, clip_table.Index.load(path).table if is_set else None, options)
    summary.skipped = len(source) - len(todo)
    for index, caption, failure in _captions(source, todo, captioners, options, pace):
      info = source.info(index)
      if caption:
        said[info.clip_id] = caption
        summary.captioned[caption.captioner] = summary.captioned.get(caption.captioner, 0) + 1
        summary.tokens += counter.of(caption.text)
      elif failure:
        summary.failed[info.clip_id if is_set else info.video_id] = failure
      else:
        summary.unsaid += 1
    if is_set and said:
      records.rewrite(path, lambda clip: _put(clip, said, counter))
    elif not is_set:
      summary.captions = list(_rows(source, said, target))
      if target is not None:
        files.write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in summary.captions))
  finally:
    for server in servers:
      _bill(summary, server, options.prices)
      server.journal.close()
  return summary


def _open(path: pathlib.Path, is_set: bool) -> ClipSource:
  if is_set:
    return records.RecordSource(path, status=None)
  if path.is_file() and path.suffix.lower() in folder.SUFFIXES:
    return folder.one_file(path)
  if not path.is_dir():
    raise errors.UsageError(f"{path}: captions go to clip sets, folders of videos and single videos")
  return folder.FolderSource(path)


def _captioners(options: Options, journals: pathlib.Path | None, pace: web.Pace) -> list[Captioner]:
  if not options.captioners:
    raise errors.UsageError(f"no captioner; legal: {', '.join(CAPTIONERS)}")
  if options.concurrency < 1 or options.tries < 1 or options.timeout_s <= 0:
    raise errors.UsageError("concurrency and tries must be at least 1, the time limit above 0")
  made: list[Captioner] = []
  for name in options.captioners:
    if name == "server":
      if not options.server or not options.model:
        raise errors.UsageError("captioner server needs --url, e.g. http://localhost:8000/v1, and --model")
      patience = web.Patience(tries=options.tries)
      client = chat.Client(options.server, options.model, timeout_s=options.timeout_s, patience=patience, pace=pace)
      made.append(Server(client, options.question, Journal(journals, options.model, options.question.digest)))
    elif name.startswith(LOCAL):
      from kling_jax.curation.caption_local import Local  # starts JAX

      made.append(Local(name.removeprefix(LOCAL)))
    elif name == "facts":
      made.append(Facts())
    elif name == "sidecar":
      made.append(Sidecar(options.sidecar))
    else:
      raise errors.UsageError(f"captioner {name!r}{errors.nearest(name, CAPTIONERS)}")
  return made


def _wanted(source: ClipSource, table: pa.Table | None, options: Options) -> list[int]:
  """The clips that are to be captioned; `table` is that of a set, whose rows `source` gives in order."""
  if table is None:
    return [index for index in range(len(source)) if options.again or not source.info(index).caption]
  rows = zip(table["status"].to_pylist(), table["caption"].to_pylist(), strict=True)
  wanted = ((status == "kept" or options.dropped) and (options.again or not caption) for status, caption in rows)
  return [index for index, asked in enumerate(wanted) if asked]


def _captions(
  source: ClipSource, todo: Sequence[int], captioners: Sequence[Captioner], options: Options, pace: web.Pace
) -> Iterator[tuple[int, Caption, str]]:
  """Yields (index, caption or an empty one, why it failed) as they come; a few more than run at a time are waiting."""
  in_a_row, failed, succeeded = 0, 0, False
  pool = concurrent.futures.ThreadPoolExecutor(options.concurrency)
  running: dict[concurrent.futures.Future[tuple[Caption, str, bool]], int] = {}
  waiting = iter(todo)
  try:
    with progress.bar("caption", len(todo)) as line:
      while True:
        for index in waiting:
          running[pool.submit(_speak, captioners, source, index)] = index
          if len(running) >= 2 * options.concurrency:
            break
        if not running:
          return
        for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
          index = running.pop(future)
          caption, why, unreachable = future.result()
          in_a_row = in_a_row + 1 if unreachable else 0
          if in_a_row >= GIVE_UP:
            raise errors.DataError(f"{why}; {in_a_row} clips in a row: start again when the server is back")
          failed, succeeded = failed + bool(why and not caption), succeeded or not why
          if failed >= HOPELESS and not succeeded:
            raise errors.DataError(f"the first {failed} clips failed, the last: {why}")
          if why and not caption:
            print(f"kling: no caption for {source.info(index).video_id!r} {index}: {why}", file=sys.stderr)
          line.advance()
          yield index, caption, why
  finally:
    pace.stop()
    pool.shutdown(cancel_futures=True)


def _speak(captioners: Sequence[Captioner], source: ClipSource, index: int) -> tuple[Caption, str, bool]:
  """(the first caption that is not empty, why others failed, whether a server was out of reach)."""
  failures, unreachable = [], False
  for captioner in captioners:
    try:
      caption = captioner.caption(source, index)
    except errors.DataError as error:
      failures.append(f"{captioner.name}: {error}")
      unreachable |= isinstance(error, web.TransientError)
      continue
    if caption:
      return caption, "; ".join(failures), unreachable
  return Caption(), "; ".join(failures), unreachable


def _put(clip: ClipRecord, said: dict[str, Caption], counter: caption_lib.TokenCount) -> ClipRecord:
  return caption_lib.put(clip, said[clip.clip_id], counter) if clip.clip_id in said else clip


def _rows(source: ClipSource, said: dict[str, Caption], target: pathlib.Path | None) -> Iterator[dict[str, Any]]:
  """Rows of a caption table that lies at `target`."""
  assert isinstance(source, folder.FileClips)
  for index in range(len(source)):
    caption = said.get(source.info(index).clip_id)
    if caption is None:
      continue
    path = source.path(index)
    row = {"file": path if target is None else os.path.relpath(path, target.parent), "caption": caption.text}
    row |= caption.parts
    yield row | {"captioner": caption.captioner, "caption_model": caption.model, "caption_prompt": caption.prompt}


def _bill(summary: Summary, server: Server, prices: tuple[float, float] | None) -> None:
  journal = server.journal
  summary.answers, summary.uncounted = journal.answers, journal.uncounted
  summary.prompt_tokens, summary.completion_tokens = journal.prompt_tokens, journal.completion_tokens
  summary.ignored_fields = server.ignored_fields
  if prices is not None:
    summary.dollars = (journal.prompt_tokens * prices[0] + journal.completion_tokens * prices[1]) / 1e6
