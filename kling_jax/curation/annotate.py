"""`kling annotate`: a web page on this machine on which people score the clips of a set from 1 to 5.

The server binds to 127.0.0.1 and answers only those who know the token of its address. Every rating is committed to
SQLite before it is answered (`rating_store`); the page repeats what was not answered under the same request id, so that
a killed server loses and doubles nothing. Each rater sees the clips in an order of their own, a function of their name.
"""

import functools
import os
import pathlib
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

from kling_jax import local_page
from kling_jax.curation import annotate_page, ratings
from kling_jax.curation.rating_store import RatingStore
from kling_jax.curation.ratings import Rating
from kling_jax.data import clip_table, order, record
from kling_jax.errors import DataError, UsageError

LONGEST_REQUEST = 64  # characters of a request's id
AHEAD = 3  # clips that the page may load in advance


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


class Server(local_page.Server):
  """The page and what it asks for."""

  def __init__(self, clips: Clips, store: RatingStore, port: int = 0):
    """Binds to 127.0.0.1; see `local_page.Server`."""
    self.clips, self.store = clips, store
    self._agreed: tuple[int, float] = (0, float("nan"))
    self._reached: dict[str, int] = {}
    self._lock = threading.RLock()  # of the two above
    super().__init__("kling annotate", store.token, port, Handler)

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


class Handler(local_page.Handler):
  """One connection."""

  server: Server

  def answer(self, path: str, fields: dict[str, str]) -> None:
    """The page, a clip, or a rater's state."""
    if path == "/":
      self.page(annotate_page.html())
    elif path == "/state":
      self.json(200, self.server.state(_name({"rater": fields.get("rater", "")})))
    elif path == "/everybody":
      self.json(200, self.server.everybody())
    elif match := re.fullmatch(r"/clip/(\d{1,9})", path, re.ASCII):
      if int(match[1]) >= len(self.server.clips):
        self.nothing("there is no such clip")
      else:
        self.media(self.server.clips.media(int(match[1])))
    else:
      self.nothing()

  def action(self, path: str) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """A rating, or the undoing of one."""
    return {"/rate": self.server.rate, "/undo": self.server.undo}.get(path)


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
      done = ", ".join(f"{name} {count}" for name, count in store.counts().items()) or "none yet"
      print(f"{len(clips)} clips; ratings: {done}. Ctrl-C ends; ratings are in {db}", file=sys.stderr)
      server.serve_until_ended()
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
