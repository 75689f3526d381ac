"""The file that ratings are collected in: SQLite, one transaction a rating, every press of a key kept for ever.

`events` is what happened, in order: a rating, or the undoing of one. `ratings` is what holds now. Each event carries
the id that the page gave it, so that a request that is sent twice (its answer was lost, the server was killed) happens
once.
"""

import os
import pathlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable

from kling_jax.curation.ratings import Rating
from kling_jax.errors import DataError

FORMAT = "kling-ratings-1"
_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (
  number INTEGER PRIMARY KEY AUTOINCREMENT, request TEXT NOT NULL UNIQUE, rater TEXT NOT NULL, clip_id TEXT NOT NULL,
  rating REAL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS ratings (
  rater TEXT NOT NULL, clip_id TEXT NOT NULL, video_id TEXT NOT NULL, rating REAL NOT NULL, at REAL NOT NULL,
  number INTEGER NOT NULL, PRIMARY KEY (rater, clip_id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS ratings_by_age ON ratings (rater, number);
"""


class RatingStore:
  """An open file of ratings; may be used from several threads, and by several processes.

  Args:
    path: made where it is missing, for the user alone (it holds the token of the page).

  Raises:
    DataError: it is no such file, or cannot be opened.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)
    self._lock = threading.RLock()
    try:
      self.path.parent.mkdir(parents=True, exist_ok=True)
      os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
      self._base = sqlite3.connect(self.path, timeout=60, check_same_thread=False, isolation_level=None)
      self._base.execute("PRAGMA journal_mode=WAL")
      self._base.execute("PRAGMA synchronous=FULL")  # a rating that was answered survives a power cut
      self._base.executescript(_TABLES)
      if self.fact("format", FORMAT) != FORMAT:
        raise DataError(f"{path} was written by another release ({self.fact('format', '')}); export it there")
    except (sqlite3.Error, OSError) as error:
      raise DataError(f"{path} cannot be used for ratings: {error}") from error

  def close(self) -> None:
    self._base.close()

  def __enter__(self) -> "RatingStore":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def fact(self, name: str, default: str) -> str:
    """A stored text; `default` is stored where there is none yet."""
    with self._lock, self._base:
      self._base.execute("INSERT OR IGNORE INTO facts VALUES (?, ?)", (name, default))
      return self._base.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()[0]

  def set_fact(self, name: str, value: str) -> None:
    with self._lock, self._base:
      self._base.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

  @property
  def token(self) -> str:
    """The secret of the page's address; the same as long as the file lives, so that a page outlives its server."""
    return self.fact("token", secrets.token_urlsafe(24))

  def rate(self, request: str, rating: Rating) -> bool:
    """Stores a rating; a later one of the same rater and clip replaces it. False where `request` was done already."""
    with self._lock:
      self._base.execute("BEGIN IMMEDIATE")
      try:
        number = self._event(request, rating.rater, rating.clip_id, rating.rating)
        if number is not None:
          self._base.execute(
            "INSERT OR REPLACE INTO ratings VALUES (?, ?, ?, ?, ?, ?)",
            (rating.rater, rating.clip_id, rating.video_id, rating.rating, rating.at or time.time(), number),
          )
        self._base.execute("COMMIT")
        return number is not None
      except BaseException:
        self._base.execute("ROLLBACK")
        raise

  def undo(self, request: str, rater: str) -> str | None:
    """Takes the rater's newest rating back; returns its clip. None where there is none, or `request` was done."""
    with self._lock:
      self._base.execute("BEGIN IMMEDIATE")
      try:
        newest = self._base.execute(
          "SELECT clip_id FROM ratings WHERE rater = ? ORDER BY number DESC LIMIT 1", (rater,)
        ).fetchone()
        done = newest is not None and self._event(request, rater, newest[0], None) is not None
        if done:
          self._base.execute("DELETE FROM ratings WHERE rater = ? AND clip_id = ?", (rater, newest[0]))
        self._base.execute("COMMIT")
        return newest[0] if done else None
      except BaseException:
        self._base.execute("ROLLBACK")
        raise

  def _event(self, request: str, rater: str, clip_id: str, rating: float | None) -> int | None:
    """The number of a new event; None where one with this id is there."""
    cursor = self._base.execute(
      "INSERT OR IGNORE INTO events (request, rater, clip_id, rating, at) VALUES (?, ?, ?, ?, ?)",
      (request, rater, clip_id, rating, time.time()),
    )
    return cursor.lastrowid if cursor.rowcount else None

  def add(self, ratings: Iterable[Rating], source: str) -> int:
    """Imports ratings, all or none; returns how many were new. The same import twice changes nothing.

    Raises:
      DataError: a rater scored a clip otherwise already.
    """
    with self._lock:
      self._base.execute("BEGIN IMMEDIATE")
      try:
        held = {(one.rater, one.clip_id): one.rating for one in self.all()}
        added = 0
        for one in ratings:
          before = held.get((one.rater, one.clip_id))
          if before is not None and before != one.rating:
            raise DataError(
              f"{source}: {one.rater!r} rated clip {one.clip_id!r} {before:g} here and {one.rating:g} there"
            )
          number = (
            self._event(f"import {secrets.token_hex(12)}", one.rater, one.clip_id, one.rating)
            if before is None
            else None
          )
          if number is not None:
            self._base.execute(
              "INSERT INTO ratings VALUES (?, ?, ?, ?, ?, ?)",
              (one.rater, one.clip_id, one.video_id, one.rating, one.at or time.time(), number),
            )
            added += 1
        self._base.execute("COMMIT")
        return added
      except BaseException:
        self._base.execute("ROLLBACK")
        raise

  def all(self) -> list[Rating]:
    """What holds now, by rater and clip."""
    with self._lock:
      rows = self._base.execute("SELECT clip_id, video_id, rater, rating, at FROM ratings ORDER BY rater, clip_id")
      return [Rating(*row) for row in rows]

  def of(self, rater: str) -> dict[str, float]:
    """{clip_id: rating} of one rater."""
    with self._lock:
      return dict(self._base.execute("SELECT clip_id, rating FROM ratings WHERE rater = ?", (rater,)).fetchall())

  def counts(self) -> dict[str, int]:
    """{rater: number of ratings}."""
    with self._lock:
      return dict(self._base.execute("SELECT rater, COUNT(*) FROM ratings GROUP BY rater ORDER BY rater").fetchall())
