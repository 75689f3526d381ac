"""`kling annotate`: a web page on this machine on which people score the clips of a set from 1 to 5.

The server binds to 127.0.0.1 and answers only those who know the token of its address. Every rating is committed to
SQLite before it is answered (`rating_store`); the page repeats what was not answered under the same request id, so that
a killed server loses and doubles nothing. Each rater sees the clips in an order of their own, a function of their name.
"""

import functools
import hmac
import http.server
import json
import os
import pathlib
import re
import signal
import sys
import threading
import urllib.parse
from typing import Any

from kling_jax.curation import annotate_page, ratings
from kling_jax.curation.rating_store import RatingStore
from kling_jax.curation.ratings import Rating
from kling_jax.data import clip_table, order, record
from kling_jax.errors import DataError, KlingError, UsageError

HOST = "127.0.0.1"
LARGEST_BODY = 4096  # bytes of a request
LONGEST_REQUEST = 64  # characters of a request's id
SLOWEST_S = 60  # of silence within a request
AHEAD = 3  # clips that the page may load in advance
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


class Clips:
  """The clips of a set, whatever their status, and their media."""

  def __init__(self, folder: str | os.PathLike[str]):
    """Reads the table.

    Raises:
      DataError: no set.
    """
    index = clip_table.Index.load(folder)
    self._folder = index.folder
    columns = ("clip_id", "video_id", "shard", "position", "start_s", "end_s")
    self._rows = index.table.select(columns).to_pylist()
    self.ids = [row["clip_id"] for row in self._rows]
    self.videos = {row["clip_id"]: row["video_id"] for row in self._rows}
    self._media = functools.lru_cache(maxsize=8)(self._read)

  def __len__(self) -> int:
    return len(self._rows)

  def seconds(self, number: int) -> float:
    return self._rows[number]["end_s"] - self._rows[number]["start_s"]

  def media(self, number: int) -> bytes:
    """The MP4 of a clip. Raises: DataError."""
    return self._media(number)

  def _read(self, number: int) -> bytes:
    row = self._rows[number]
    path = self._folder / clip_table.RECORDS / row["shard"]
    return record.unpack(clip_table.read_record(clip_table.open_reader(path), path, row["position"]))[1]


class Server(http.server.ThreadingHTTPServer):
  """The page and what it asks for; `address` is what the user opens."""

  daemon_threads = True

  def __init__(self, clips: Clips, store: RatingStore, port: int = 0):
    """Binds to 127.0.0.1.

    Args:
      port: 0 for a free one.

    Raises:
      UsageError: the port is taken.
    """
    self.clips, self.store, self.token = clips, store, store.token
    self._agreed: tuple[int, float] = (0, float("nan"))
    self._reached: dict[str, int] = {}
    self._lock = threading.RLock()  # of the two above
    try:
      super().__init__((HOST, port), Handler)
    except OSError as error:
      raise UsageError(f"port {port} of {HOST} cannot be used ({error.strerror}); give another --port") from error

  @property
  def address(self) -> str:
    return f"http://{HOST}:{self.server_port}/?token={self.token}"

  def handle_error(self, request: Any, client_address: Any) -> None:
    """A client that goes away is no error."""
    if not isinstance(sys.exception(), ConnectionError | TimeoutError):
      super().handle_error(request, client_address)

  # ---- what the page asks for ----------------------------------------------------------------------------------------

  def state(self, rater: str) -> dict[str, Any]:
    """How far a rater is, which clips come next, and how well all agree."""
    with self._lock:
      return self._state(rater)

  def _state(self, rater: str) -> dict[str, Any]:
    rated = self.store.of(rater)
    done = sum(clip in self.clips.videos for clip in rated)
    coming: list[dict[str, Any]] = []
    place = self._reached.get(rater, 0)  # everything before it is rated
    while place < len(self.clips) and len(coming) < min(AHEAD, len(self.clips) - done):
      number = order.shuffled(f"annotate/{rater}", place, len(self.clips))
      if self.clips.ids[number] not in rated:
        coming.append({"number": number, "clip": self.clips.ids[number], "seconds": self.clips.seconds(number)})
      elif not coming:
        self._reached[rater] = place + 1
      place += 1
    return {"rater": rater, "done": done, "total": len(self.clips), "next": coming, **self.everybody()}

  def everybody(self) -> dict[str, Any]:
    """Raters with their counts, and Krippendorff's alpha: worked out anew when a hundredth more ratings are there."""
    counts = self.store.counts()
    total = sum(counts.values())
    with self._lock:
      if abs(total - self._agreed[0]) >= max(1, total // 100):
        self._agreed = total, ratings.agreement((one.clip_id, one.rating) for one in self.store.all())
      alpha = self._agreed[1]
    return {"raters": counts, "alpha": None if alpha != alpha else alpha}

  def rate(self, asked: dict[str, Any]) -> dict[str, Any]:
    rater, clip, value = _name(asked), asked.get("clip"), asked.get("rating")
    if not isinstance(clip, str) or clip not in self.clips.videos:
      raise DataError("there is no such clip in the set")
    if type(value) is not int or not ratings.LOWEST <= value <= ratings.HIGHEST:
      raise DataError(f"a rating is a whole number from {ratings.LOWEST} to {ratings.HIGHEST}")
    self.store.rate(_request(asked), Rating(clip, self.clips.videos[clip], rater, float(value)))
    return self.state(rater)

  def undo(self, asked: dict[str, Any]) -> dict[str, Any]:
    rater = _name(asked)
    with self._lock:
      undone = self.store.undo(_request(asked), rater)
      self._reached.pop(rater, None)
      return {"undone": undone, **self.state(rater)}


def _name(asked: dict[str, Any]) -> str:
  name = asked.get("rater")
  return ratings.name_of(name if isinstance(name, str) else "", "request")


def _request(asked: dict[str, Any]) -> str:
  request = asked.get("request")
  if not isinstance(request, str) or not 8 <= len(request) <= LONGEST_REQUEST or not request.isprintable():
    raise DataError(f"a request needs an id of 8 to {LONGEST_REQUEST} printable characters")
  return request


class Handler(http.server.BaseHTTPRequestHandler):
  """One connection."""

  server: Server
  protocol_version = "HTTP/1.1"
  timeout = SLOWEST_S
  server_version, sys_version = "kling", ""

  def do_GET(self) -> None:
    """The page, a clip, or a rater's state."""
    address = urllib.parse.urlsplit(self.path)
    fields = urllib.parse.parse_qs(address.query, keep_blank_values=True)
    if not self._allowed(fields):
      return
    try:
      if address.path == "/":
        self._say(200, annotate_page.html().encode(), "text/html; charset=utf-8")
      elif address.path == "/state":
        self._json(200, self.server.state(_name({"rater": fields.get("rater", [""])[0]})))
      elif address.path == "/everybody":
        self._json(200, self.server.everybody())
      elif match := re.fullmatch(r"/clip/(\d{1,9})", address.path, re.ASCII):
        self._clip(int(match[1]))
      else:
        self._json(404, {"error": "there is nothing here"})
    except KlingError as error:
      self._json(400, {"error": str(error)})

  do_HEAD = do_GET

  def do_POST(self) -> None:
    """A rating, or the undoing of one."""
    address = urllib.parse.urlsplit(self.path)
    length = self.headers.get("Content-Length", "")
    if (
      not re.fullmatch(r"\d{1,18}", length, re.ASCII)
      or int(length) > LARGEST_BODY
      or "Transfer-Encoding" in self.headers
    ):
      self.close_connection = True  # what it sends is not read
      self._json(413, {"error": f"a request has a length of at most {LARGEST_BODY} bytes"})
      return
    body = self.rfile.read(int(length))
    if not self._allowed(urllib.parse.parse_qs(address.query)):
      return
    act = {"/rate": self.server.rate, "/undo": self.server.undo}.get(address.path)
    if act is None:
      self._json(404, {"error": "there is nothing here"})
      return
    try:
      asked = json.loads(body)
      if not isinstance(asked, dict):
        raise DataError("a request is a JSON object")
      self._json(200, act(asked))
    except (ValueError, RecursionError):
      self._json(400, {"error": "a request is a JSON object"})
    except KlingError as error:
      self._json(400, {"error": str(error)})

  def _allowed(self, fields: dict[str, list[str]]) -> bool:
    """Whether the token is right, and the browser asked this machine by its own name (no page elsewhere does)."""
    host = self.headers.get("Host", "").rpartition(":")[0]
    given = fields.get("token", [""])[0]
    if host in (HOST, "localhost") and hmac.compare_digest(given.encode(), self.server.token.encode()):
      return True
    self.close_connection = True
    self._json(403, {"error": "open the whole address that `kling annotate` printed"})
    return False

  def _clip(self, number: int) -> None:
    """A clip, or the part of it that a player asks for."""
    if number >= len(self.server.clips):
      self._json(404, {"error": "there is no such clip"})
      return
    media = self.server.clips.media(number)
    span = _span(self.headers.get("Range"), len(media))
    if span is None:
      self._say(416, b"", "video/mp4", {"Content-Range": f"bytes */{len(media)}"})
      return
    start, end = span
    more = {"Accept-Ranges": "bytes", "Cache-Control": "private, max-age=3600"}
    if "Range" in self.headers:
      more["Content-Range"] = f"bytes {start}-{end - 1}/{len(media)}"
    self._say(206 if "Range" in self.headers else 200, media[start:end], "video/mp4", more)

  def _json(self, status: int, value: dict[str, Any]) -> None:
    self._say(status, json.dumps(value).encode(), "application/json")

  def _say(self, status: int, body: bytes, kind: str, more: dict[str, str] | None = None) -> None:
    self.send_response(status)
    headers = {
      "Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store",
      "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
      "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    }  # fmt: skip
    for name, value in (headers | (more or {})).items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  def log_message(self, *_: Any) -> None:
    return


def _span(header: str | None, size: int) -> tuple[int, int] | None:
  """The bytes [start, end) of a Range header; all without one; None where there are no such bytes."""
  if header is None:
    return 0, size
  match = _RANGE.fullmatch(header.strip())
  if not match or not (match[1] or match[2]):
    return None  # several ranges, other units
  if not match[1]:  # the last so many bytes
    return (max(0, size - int(match[2])), size) if int(match[2]) else None
  start = int(match[1])
  end = min(int(match[2]) + 1, size) if match[2] else size
  return (start, end) if start < end else None


# ---- the verb --------------------------------------------------------------------------------------------------------


def serve(folder: str, db: str, port: int | None = None) -> None:
  """Serves until Ctrl-C or SIGTERM; prints the address on standard output. For the main thread.

  Args:
    port: None: the one of the last time, so that an open page goes on; a free one where that is taken.
  """
  with RatingStore(db) as store:
    clips = Clips(folder)
    if not len(clips):
      raise DataError(f"{folder} holds no clips")
    with _bound(clips, store, port) as server:
      store.set_fact("port", str(server.server_port))
      for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs start with the first one ignored
        signal.signal(number, signal.default_int_handler)
      print(server.address, flush=True)
      done = ", ".join(f"{name} {count}" for name, count in store.counts().items()) or "none yet"
      print(f"{len(clips)} clips; ratings: {done}. Ctrl-C ends; ratings are in {db}", file=sys.stderr)
      try:
        server.serve_forever()
      except KeyboardInterrupt:
        print("ended; every rating is stored", file=sys.stderr)


def _bound(clips: Clips, store: RatingStore, port: int | None) -> Server:
  if port is not None:
    return Server(clips, store, port)
  try:
    return Server(clips, store, int(store.fact("port", "0")))
  except UsageError:
    return Server(clips, store)


def export(db: str, path: str) -> tuple[ratings.Labels, pathlib.Path]:
  """Writes labels and raw ratings; see `ratings.write`."""
  with RatingStore(_there(db)) as store:
    return ratings.write(path, store.all())


def take(folder: str, db: str, path: str, skip_unknown: bool) -> int:
  """Imports raw ratings of a table into the file; returns how many were new. See `ratings.read`."""
  found = ratings.read(path, Clips(folder).videos, skip_unknown)
  with RatingStore(db) as store:
    return store.add(found, path)


def _there(db: str) -> str:
  if not pathlib.Path(db).is_file():
    raise DataError(f"there is no file of ratings at {db}")
  return db
