"""`kling fetch`: the videos that a table names by address become files of a folder that `kling curate` reads.

Started again it goes on: whole files are not fetched twice, parts are resumed. What cannot be had costs one line and
one row of quarantine.jsonl; the next run tries it again.
"""

import concurrent.futures
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from kling_jax import errors, progress, web
from kling_jax.data import columns, download, folder, quarantine, record
from kling_jax.data.download import Download, Fetched, Limits
from kling_jax.data.reasons import MediaError

FETCHED, QUARANTINE = "fetched.jsonl", "quarantine.jsonl"
CHECKSUMS = ("sha256", "md5", "checksum")  # columns; in `checksum` stands "sha256:..." or "md5:..."


@dataclasses.dataclass(frozen=True)
class Options:
  """How to fetch.

  Attributes:
    column: of the table, with the addresses.
    concurrency: downloads at a time. per_host: of one host. rate: most requests a minute to one host.
    megabytes_per_second: of all downloads together; None: no limit.
    tries: that bring nothing new, until an address is given up.
    limits: what downloads may cost.
  """

  column: str = "url"
  concurrency: int = 8
  per_host: int = 4
  rate: float | None = None
  megabytes_per_second: float | None = None
  tries: int = 5
  limits: Limits = dataclasses.field(default_factory=Limits)


@dataclasses.dataclass
class Summary:
  """What a run did: rows of the table, different addresses, files fetched now and before, failures by reason.

  `local` counts rows that name no address but a file.
  """

  rows: int = 0
  addresses: int = 0
  local: int = 0
  fetched: int = 0
  kept_before: int = 0
  bytes: int = 0
  failed: dict[str, int] = dataclasses.field(default_factory=dict)

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def text(self) -> str:
    failed = sum(self.failed.values())
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(self.failed.items()))
    head = f"{self.addresses} addresses in {self.rows} rows: {self.fetched} fetched ({self.bytes} bytes)"
    return f"{head}, {self.kept_before} were there, {failed} failed{f' ({listed})' if listed else ''}"


@dataclasses.dataclass(frozen=True)
class Entry:
  """One line of fetched.jsonl: `key` stands for the address, `url` is the address without password and query."""

  key: str
  url: str
  file: str
  bytes: int
  sha256: str


def fetch(table: str | os.PathLike[str], output: str | os.PathLike[str], options: Options | None = None) -> Summary:
  """Fetches every address of a table into a folder.

  Raises:
    UsageError: an option is wrong, or a part for s3 and gs is missing. DataError: no table; another run is at work in
      the folder; no room on the disk.
  """
  options = options or Options()
  if min(options.concurrency, options.per_host, options.tries) < 1:
    raise errors.UsageError("concurrency, per_host and tries must be at least 1")
  names = columns.column_names(table)
  if options.column not in names:
    raise errors.DataError(f"{table}: no column {options.column!r}{errors.nearest(options.column, names)}")
  output = pathlib.Path(output)
  output.mkdir(parents=True, exist_ok=True)
  with (output / ".lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
    except OSError as error:
      raise errors.DataError(f"{output}: another `kling fetch` is at work here; wait until it is done") from error
    return _Run(output, options).run(table)


class _Run:
  """The state of one call."""

  def __init__(self, output: pathlib.Path, options: Options):
    self._output, self._options = output, options
    self._book = quarantine.Log(output / QUARANTINE)
    self._entries = {entry.key: entry for entry in read(output)}
    self._room = download.Room(output, options.limits)
    self._hosts: dict[str, tuple[web.Pace, threading.BoundedSemaphore]] = {}
    megabytes = options.megabytes_per_second
    self._bandwidth = web.Pace(megabytes * 60e6) if megabytes else None
    self._patience = web.Patience(tries=options.tries)
    self._stop = threading.Event()
    self.summary = Summary()

  def run(self, table: str | os.PathLike[str]) -> Summary:
    pool = concurrent.futures.ThreadPoolExecutor(self._options.concurrency)
    running: dict[concurrent.futures.Future[Fetched], str] = {}
    waiting = self._waiting(table)
    try:
      with progress.bar("fetch", None) as line:
        while True:
          for url, checksum in waiting:
            running[pool.submit(self._fetch, url, checksum)] = url
            if len(running) >= 2 * self._options.concurrency:
              break
          if not running:
            return self.summary
          for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
            self._note(running.pop(future), future)
            line.advance()
    finally:
      self._stop.set()
      for pace, _ in list(self._hosts.values()):
        pace.stop()
      if self._bandwidth is not None:
        self._bandwidth.stop()
      pool.shutdown(cancel_futures=True)

  def _waiting(self, table: str | os.PathLike[str]) -> Iterator[tuple[str, tuple[str, str] | None]]:
    """Every address that is not there yet, once, with its checksum; the table is streamed."""
    seen: set[bytes] = set()
    wanted = {name: pa.string() for name in (self._options.column, *CHECKSUMS)}
    for row in columns.rows(table, wanted):
      url = (row[self._options.column] or "").strip()
      self.summary.rows += 1
      if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url):
        self.summary.local += bool(url)
        continue
      name = download.key(url)
      if bytes.fromhex(name) in seen:
        continue
      seen.add(bytes.fromhex(name))
      self.summary.addresses += 1
      try:
        checksum = _checksum(row, web.shown(url))
        download.check_scheme(url, web.shown(url))
        if self._is_here(name, url, checksum):
          self.summary.kept_before += 1
        else:
          yield url, checksum
      except MediaError as error:
        self._fail(url, error)

  def _is_here(self, name: str, url: str, checksum: tuple[str, str] | None) -> bool:
    """Whether an earlier run fetched it; a file that it could not note any more is taken over."""
    entry = self._entries.get(name)
    if entry is not None:
      path = self._output / entry.file
      if path.is_file() and path.stat().st_size == entry.bytes:
        return checksum is None or checksum[0] != "sha256" or checksum[1] == entry.sha256
      return False
    if checksum is not None and checksum[0] != "sha256":
      return False
    stem = download.file_stem(url)
    for path in (self._output / (stem + suffix) for suffix in folder.SUFFIXES):
      if path.is_file():
        found = Fetched(path.name, path.stat().st_size, record.content_hash(path))
        if checksum is None or found.sha256 == checksum[1]:
          self._enter(url, found)
          return True
    return False

  def _fetch(self, url: str, checksum: tuple[str, str] | None) -> Fetched:
    host = urllib.parse.urlsplit(url).netloc.rpartition("@")[2].lower()
    pace, places = self._hosts.setdefault(
      host, (web.Pace(self._options.rate), threading.BoundedSemaphore(self._options.per_host))
    )
    with places:
      if self._stop.is_set():
        raise web.StoppedError
      return Download(
        url, self._output, self._options.limits, self._patience, pace, self._room, self._bandwidth, checksum
      ).run()

  def _note(self, url: str, future: concurrent.futures.Future[Fetched]) -> None:
    try:
      found = future.result()
    except MediaError as error:
      self._fail(url, error)
      return
    self._enter(url, found)
    self.summary.fetched += 1
    self.summary.bytes += found.bytes

  def _enter(self, url: str, found: Fetched) -> None:
    entry = Entry(download.key(url), web.shown(url), found.file, found.bytes, found.sha256)
    self._entries[entry.key] = entry
    with (self._output / FETCHED).open("ab") as file:
      file.write(json.dumps(dataclasses.asdict(entry)).encode() + b"\n")
      file.flush()
      os.fsync(file.fileno())

  def _fail(self, url: str, error: MediaError) -> None:
    name = quarantine.printable(web.shown(url))
    print(f"kling: not fetched {name!r}: {error.reason}: {error.detail}", file=sys.stderr)
    self._book.add(name, error.reason, error.detail)
    self.summary.failed[error.reason] = self.summary.failed.get(error.reason, 0) + 1


def read(folder: str | os.PathLike[str]) -> list[Entry]:
  """The entries of a folder's fetched.jsonl, [] where there is none; a line that a kill cut short is removed.

  Raises:
    DataError: a line is no such object.
  """
  path = pathlib.Path(folder) / FETCHED
  if not path.exists():
    return []
  data = path.read_bytes()
  whole = data.rfind(b"\n") + 1
  if whole < len(data):
    os.truncate(path, whole)
  entries = []
  for number, line in enumerate(data[:whole].splitlines(), start=1):
    try:
      entries.append(Entry(**json.loads(line)))
    except (ValueError, TypeError) as error:
      raise errors.DataError(f"{path}, line {number}: no entry of a fetched file ({error})") from error
  return entries


def _checksum(row: dict[str, Any], name: str) -> tuple[str, str] | None:
  """(algorithm, digits) that a row promises."""
  for column in CHECKSUMS:
    text = (row.get(column) or "").strip().lower()
    if text:
      algorithm, _, digits = text.rpartition(":") if column == "checksum" else (column, "", text)
      lengths = {"sha256": 64, "md5": 32}
      if not re.fullmatch(r"[0-9a-f]+", digits) or len(digits) != lengths.get(algorithm):
        raise MediaError(name, "unreadable", f"{column} {text[:80]!r}: wants sha256:<64 digits> or md5:<32 digits>")
      return algorithm, digits
  return None
