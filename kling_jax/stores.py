"""Folders and files of object stores at hand as local ones: s3://, gs:// and whatever else fsspec knows.

A remote folder has a mirror on the local disk, `~/.cache/kling_jax/mirrors/SCHEME/BUCKET/PATH` (or below KLING_CACHE).
`here` brings it up to date: what is new or other in the store is fetched, what is gone there goes. A `Session` pushes
back what a verb wrote, changed and deleted: now and then while it runs, and when it ends, also by an error. Objects
appear whole, and those that say that others are complete (a checkpoint's metadata, a set's table) come last.

Everything else in this project sees local paths alone. Given up: sets larger than the local disk, and writers on
several machines at once, which need a mounted bucket (gcsfuse, mountpoint-s3) or a shared disk.
"""

import argparse
import contextlib
import fcntl
import functools
import json
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

from kling_jax import files
from kling_jax.errors import DataError, UsageError

SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "memory")
PUSH_S = 60.0  # between two pushes while a verb runs
MANIFEST = ".mirror.json"  # {file: [bytes, the store's tag, local mtime in ns]} as of the last fetch or push
COMMITS = ("_CHECKPOINT_METADATA", "clips.parquet")  # what says that the files beside it are complete
LOCKED = (("sweep", "workdir"), ("annotate", "db"))  # verbs and flags
_ADDRESS = re.compile(rf"({'|'.join(SCHEMES)})://([^/]+)/?(.*)", re.S)
_UNDER_WAY = re.compile(r"(^|/)(\.|[^/]*orbax-checkpoint-tmp)")  # temporary files, hidden files, locks
_CHECKPOINT = re.compile(r"(^|.*/)checkpoints/\d+/")

_mirrors: dict[str, "Mirror"] = {}
_session: "Session | None" = None


def is_remote(place: object) -> bool:
  """Whether a path is an address of an object store."""
  return isinstance(place, str) and _ADDRESS.match(place) is not None


def here(place: str | os.PathLike[str]) -> str:
  """A local path for a path or address; an address is brought up to date at the first use in this process.

  Raises:
    UsageError: fsspec, or its part for the store, is not installed. DataError: the store does not answer, or a file
      was changed in the store and in its mirror.
  """
  address = os.fspath(place)
  if not is_remote(address):
    return address
  address = address.rstrip("/")
  if address not in _mirrors:
    mirror = Mirror(address)
    mirror.fetch()
    _mirrors[address] = mirror
    if _session is not None:
      _session.begin()
  return str(_mirrors[address].place)


def at_hand(args: argparse.Namespace) -> None:
  """Puts local paths in place of the addresses among the arguments of a verb.

  Raises:
    UsageError: of a file that several processes lock.
  """
  for name, value in vars(args).items():
    if (vars(args).get("verb"), name) in LOCKED and is_remote(value):
      raise UsageError(f"--{name} {value}: several processes lock what lies there, which an object store cannot do; "
                       "name a place on a shared disk")  # fmt: skip
    if isinstance(value, str):
      setattr(args, name, _argument(value))
    elif isinstance(value, list):
      setattr(args, name, [_argument(item) if isinstance(item, str) else item for item in value])


def _argument(word: str) -> str:
  """A path, or FILE=SCALE as adapters are given."""
  scale = re.search(r"=[-+.\deE]+$", word) if is_remote(word) else None
  return here(word[: scale.start()]) + scale[0] if scale else here(word)


def push() -> None:
  """Pushes what was written into all mirrors of this process.

  Raises:
    DataError: a store does not answer.
  """
  for mirror in list(_mirrors.values()):
    mirror.push()


def address_of(path: str | os.PathLike[str]) -> str | None:
  """The address whose mirror `path` lies in, None for a path that is no one's mirror."""
  whole = pathlib.Path(path).absolute()
  return next((m.address for m in _mirrors.values() if whole == m.local or m.local in whole.parents), None)


class Session:
  """While the block runs, and when it ends, what was written into mirrors goes to their stores."""

  def __init__(self, every_s: float = PUSH_S):
    self._every_s, self._stop = every_s, threading.Event()
    self._thread: threading.Thread | None = None

  def __enter__(self) -> "Session":
    global _session
    _session = self
    return self

  def begin(self) -> None:
    """Called when there is a first mirror: starts the thread that pushes now and then."""
    if self._thread is None:
      self._thread = threading.Thread(target=self._push_now_and_then, name="push to stores", daemon=True)
      self._thread.start()

  def __exit__(self, *_: object) -> None:
    global _session
    _session = None
    self._stop.set()
    if self._thread is not None:
      self._thread.join()
    push()
    _mirrors.clear()

  def _push_now_and_then(self) -> None:
    while not self._stop.wait(self._every_s):
      with contextlib.suppress(DataError):  # a store that does not answer now may answer at the next push
        push()


class Mirror:
  """One address and its local copy: of a folder, or of one object, whose mirror is a folder of its own.

  Attributes:
    address: as it was given. local: the folder of the mirror. place: the folder, or the file in it.
  """

  def __init__(self, address: str):
    scheme, bucket, path = _ADDRESS.match(address).groups()  # type: ignore[union-attr]
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
      raise UsageError(f"{address}: an address without empty parts, '.' and '..' is wanted")
    self.address = address
    top = pathlib.Path(os.environ.get("KLING_CACHE") or pathlib.Path.home() / ".cache" / "kling_jax").absolute()
    self._fs, self._root = _open(address)
    self._only = ""
    # What is not there yet is a file where its name has a suffix, as paths of outputs have.
    if self._ask(lambda: self._fs.isfile(self._root)) or (
      "." in path.rpartition("/")[2] and not self._ask(lambda: self._fs.find(self._root))
    ):
      self._root, _, self._only = self._root.rpartition("/")
    self.local = top / ("objects" if self._only else "mirrors") / scheme / bucket / path
    self.place = self.local / self._only
    self._held: dict[str, tuple[int, str, int]] = {}
    self._lock = threading.Lock()

  # ---- from the store ------------------------------------------------------------------------------------------------

  def fetch(self) -> None:
    """Brings the mirror up to date; a place where nothing is yet becomes an empty mirror."""
    from kling_jax import progress  # what the help of verbs does not wait for

    found = self._ask(self._listed)
    self.local.mkdir(parents=True, exist_ok=True)
    with self._exclusive():
      before = self._read_manifest()
      wanted = [name for name, (size, tag) in found.items() if self._stale(name, size, tag, before.get(name))]
      for name in progress.track(wanted, f"fetch {self.address}", len(wanted)):
        self._ask(functools.partial(self._get, name))
      for name in before.keys() - found.keys():
        path = self.local / name
        if path.is_file() and path.stat().st_mtime_ns == before[name][2]:
          path.unlink()
      stamp = lambda name: (self.local / name).stat().st_mtime_ns if name in wanted else before[name][2]
      self._held = {name: (size, tag, stamp(name)) for name, (size, tag) in found.items()}
      self._write_manifest()

  def _listed(self) -> dict[str, tuple[int, str]]:
    """{name below the folder: (bytes, tag)} of what is whole."""
    self._fs.invalidate_cache()
    found = {}
    for path, info in self._fs.find(self._remote(self._only), detail=True).items():
      if info.get("type") != "file":
        continue
      name = path.removeprefix(self._root).lstrip("/")
      if ".." in name.split("/") or name.startswith("/") or "\0" in name:
        raise DataError(f"{self.address}: an object is called {name!r}, which no file may be")
      found[name] = int(info["size"]), _tag(info)
    whole = {m[0] for name in found if (m := _CHECKPOINT.match(name)) and f"{m[0]}{COMMITS[0]}" in found}
    kept = {}
    for name, about in found.items():
      checkpoint = _CHECKPOINT.match(name)
      if (checkpoint is None or checkpoint[0] in whole) and not _UNDER_WAY.search(name):
        kept[name] = about
    return kept

  def _stale(self, name: str, size: int, tag: str, held: tuple[int, str, int] | None) -> bool:
    """Whether an object is to be fetched."""
    path = self.local / name
    if not path.is_file():
      return True
    same_there = held is not None and (size, tag) == (held[0], held[1])
    same_here = held is not None and path.stat().st_mtime_ns == held[2]
    if same_there:
      return False  # what was changed here and not pushed stays, and is pushed
    if same_here:
      return True
    raise DataError(
      f"{self.address}/{name} was changed in the store and in its mirror {path}; delete one of the two and run again"
    )

  def _get(self, name: str) -> None:
    with files.whole(self.local / name) as temporary:
      self._fs.get_file(self._remote(name), str(temporary))

  # ---- to the store --------------------------------------------------------------------------------------------------

  def push(self) -> None:
    """Writes what is new or other here to the store, and deletes there what was deleted here since it was fetched.

    Raises:
      DataError: the store does not answer; the next push tries again.
    """
    with self._lock:
      self._push()

  def _push(self) -> None:
    present: dict[str, os.stat_result] = {}
    for folder, below, names in os.walk(self.local):
      inside = pathlib.Path(folder).relative_to(self.local)
      below[:] = [name for name in below if not _UNDER_WAY.search(name)]
      for name in names:
        if not _UNDER_WAY.search(name):
          with contextlib.suppress(FileNotFoundError):  # a checkpoint that is too old goes meanwhile
            present[(inside / name).as_posix()] = os.stat(os.path.join(folder, name))
    changed = [n for n, stat in present.items() if n not in self._held or self._held[n][2] != stat.st_mtime_ns]
    gone = self._held.keys() - present.keys()
    if not changed and not gone:
      return
    with self._exclusive():
      for name in sorted(changed, key=lambda name: (pathlib.PurePosixPath(name).name in COMMITS, name)):
        if (self.local / name).is_file():
          self._ask(functools.partial(self._fs.put_file, str(self.local / name), self._remote(name)))
          self._held[name] = (present[name].st_size, self._tag_of(name), present[name].st_mtime_ns)
      # What says that others are complete goes first.
      for name in sorted(gone, key=lambda name: (pathlib.PurePosixPath(name).name not in COMMITS, name)):
        self._ask(functools.partial(self._delete, name))
        del self._held[name]
      self._write_manifest()

  def _delete(self, name: str) -> None:
    if self._fs.exists(self._remote(name)):
      self._fs.rm_file(self._remote(name))

  def _tag_of(self, name: str) -> str:
    """The store's tag of an object that was just written, from the same listing as everywhere."""
    self._fs.invalidate_cache()
    [info] = self._ask(lambda: self._fs.find(self._remote(name), detail=True)).values()
    return _tag(info)

  # ---- both ----------------------------------------------------------------------------------------------------------

  def _remote(self, name: str) -> str:
    return f"{self._root}/{name}" if name else self._root

  def _ask(self, call: Callable[[], Any]) -> Any:
    try:
      return call()
    except (DataError, UsageError):
      raise
    except Exception as error:  # every store has errors of its own
      said = " ".join(str(error).split())[:300]
      raise DataError(
        f"{self.address}: the store does not answer as it should ({type(error).__name__}: {said})"
      ) from error

  def _read_manifest(self) -> dict[str, tuple[int, str, int]]:
    try:
      held = json.loads((self.local / MANIFEST).read_text(encoding="utf-8"))
      return {name: (int(size), str(tag), int(stamp)) for name, (size, tag, stamp) in held.items()}
    except FileNotFoundError:
      return {}
    except (ValueError, TypeError, AttributeError) as error:
      raise DataError(f"{self.local / MANIFEST} is damaged ({error}); delete the folder {self.local}") from error

  def _write_manifest(self) -> None:
    files.write_json(self.local / MANIFEST, self._held)

  @contextlib.contextmanager
  def _exclusive(self) -> Iterator[None]:
    """One process at a time changes a mirror."""
    with (self.local / ".mirror.lock").open("w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      yield


def _tag(info: dict[str, Any]) -> str:
  """What tells two states of an object apart, as the store lists it."""
  names = ("ETag", "etag", "md5Hash", "mtime", "created", "LastModified")
  return next((str(info[name]) for name in names if info.get(name)), "")


def _open(address: str) -> tuple[Any, str]:
  try:
    import fsspec

    fs, root = fsspec.url_to_fs(address)
  except ImportError as error:
    raise UsageError(f"{address} needs the extra cloud: pip install 'kling_jax[cloud]' ({error})") from error
  return fs, root.rstrip("/")
