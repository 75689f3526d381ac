"""One web address to one local file: resumed after cuts, checked, atomic, and never from where it should not be.

A download lies in a hidden part file until it is whole. When it was cut, the next try asks for the rest (Range), on the
condition that the file is still the same (If-Range with the ETag or the date); servers that cannot do that send it all
again. `s3://` and `gs://` go through fsspec under the same rules.
"""

import dataclasses
import errno
import hashlib
import ipaddress
import json
import os
import pathlib
import re
import shutil
import socket
import threading
import time
import urllib.parse
from typing import Any

import requests

from kling_jax import errors, files, web
from kling_jax.data import folder
from kling_jax.data.reasons import MediaError

WEB, CLOUD = ("http", "https"), ("s3", "gs")
MOST_REDIRECTS = 5
_SUFFIX_OF = {  # content type -> suffix, where the address has none
  "video/mp4": ".mp4", "video/webm": ".webm", "video/quicktime": ".mov", "video/x-matroska": ".mkv",
  "video/x-msvideo": ".avi", "video/ogg": ".ogv", "image/gif": ".gif", "video/3gpp": ".3gp", "video/mpeg": ".mpg",
  "video/mp2t": ".ts",
}  # fmt: skip


class DiskFullError(errors.DataError):
  """There is no room for more; the run ends, nothing is lost."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What downloads may cost.

  Attributes:
    timeout_s: silence after which a server is given up. seconds: longest time of one file, with all tries.
    file_bytes: most bytes of a file. total_bytes: most bytes in the folder; None: no limit.
    reserve_bytes: of the disk that stay free.
    private: addresses of private networks and of this machine may be fetched; else they are refused.
  """

  timeout_s: float = 60.0
  seconds: float = 3600.0
  file_bytes: int = 64 * 2**30
  total_bytes: int | None = None
  reserve_bytes: int = 2**30
  private: bool = False


@dataclasses.dataclass(frozen=True)
class Fetched:
  """A file that is whole: its name in the folder, bytes, SHA-256."""

  file: str
  bytes: int
  sha256: str


class Room:
  """The bytes in a folder, shared by all downloads into it."""

  def __init__(self, folder: pathlib.Path, limits: Limits):
    self._folder, self._limits = folder, limits
    self._lock = threading.Lock()
    self._used = sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())

  def take(self, count: int) -> None:
    """Claims bytes (gives them back where negative).

    Raises:
      DiskFullError: there is no room for them.
    """
    with self._lock:
      most = self._limits.total_bytes
      if count > 0 and most is not None and self._used + count > most:
        raise DiskFullError(f"{self._folder} would hold more than {most} bytes; raise --most_gb or make room")
      self._used += count
    if count > 0 and shutil.disk_usage(self._folder).free < self._limits.reserve_bytes:
      raise DiskFullError(
        f"the disk of {self._folder} has less than {self._limits.reserve_bytes} bytes left; make room"
      )


def key(url: str) -> str:
  """16 hexadecimal digits that stand for an address, in file names and tables."""
  return hashlib.sha256(url.encode("utf-8", "replace")).hexdigest()[:16]


class Download:
  """Fetches one address into `folder`.

  Args:
    url: http, https, s3 or gs.
    checksum: ("sha256" or "md5", hexadecimal digits), or None.
    pace: of the host. bandwidth: counts bytes, for all.
    room: of the folder.
  """

  def __init__(
    self,
    url: str,
    folder: pathlib.Path,
    limits: Limits,
    patience: web.Patience,
    pace: web.Pace,
    room: Room,
    bandwidth: web.Pace | None = None,
    checksum: tuple[str, str] | None = None,
  ):
    self.url, self._folder, self._limits = url, folder, limits
    self._patience, self._pace, self._room, self._bandwidth = patience, pace, room, bandwidth
    self._checksum = checksum
    self.name = web.shown(url)
    self._part = folder / f".{key(url)}.part"
    self._note = folder / f".{key(url)}.json"  # the validator of the part

  def run(self) -> Fetched:
    """Fetches it.

    Raises:
      MediaError: it cannot be had, or is not what was promised. DiskFullError: there is no room.
    """
    scheme = check_scheme(self.url, self.name)
    once = self._once_web if scheme in WEB else self._once_cloud
    self._deadline = time.monotonic() + self._limits.seconds
    try:
      kind = web.persist(once, self._patience, self._pace, self.url, self._size)
    except web.TransientError as error:
      raise MediaError(self.name, "timeout" if web.SILENT in str(error) else "unreadable", str(error)) from error
    except MediaError as error:
      if error.reason != "timeout":
        self._forget()
      raise
    except OSError as error:
      if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DiskFullError(f"the disk of {self._folder} is full; make room and start again") from error
      raise
    sha256 = self._check()
    target = self._folder / (file_stem(self.url) + self._suffix(kind))
    size = self._size()
    with self._part.open("rb") as file:
      os.fsync(file.fileno())
    self._part.replace(target)
    self._note.unlink(missing_ok=True)
    return Fetched(target.name, size, sha256)

  def _size(self) -> int:
    return self._part.stat().st_size if self._part.exists() else 0

  def _forget(self) -> None:
    """Removes the part."""
    self._room.take(-self._size())
    self._part.unlink(missing_ok=True)
    self._note.unlink(missing_ok=True)

  def _validator(self) -> str:
    """What the part is known by; "" where it must be fetched anew."""
    try:
      return str(json.loads(self._note.read_text(encoding="utf-8"))["validator"]) if self._part.exists() else ""
    except (OSError, ValueError, KeyError, TypeError):
      return ""

  # ---- http ----------------------------------------------------------------------------------------------------------

  def _once_web(self) -> str:
    """One try; returns the content type."""
    validator, have = self._validator(), self._size()
    headers = {"User-Agent": web.USER_AGENT, "Accept-Encoding": "identity"}
    if validator and have:
      headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    with requests.Session() as session, self._follow(session, headers) as response:
      status = response.status_code
      if status == 416:
        if validator and response.headers.get("Content-Range") == f"bytes */{have}":
          return ""  # the part is the whole file: an earlier run was killed before it could name it
        self._forget()
        raise web.TransientError("the server has no such range any more")
      if status in web.TRANSIENT:
        raise web.TransientError(f"the server answered {status} {response.reason}", web.retry_after_s(response))
      if status not in (200, 206):
        raise MediaError(self.name, "unreadable", f"the server answered {status} {response.reason}")
      kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
      if kind in ("text/html", "application/xhtml+xml"):
        raise MediaError(self.name, "unreadable", "the address is a web page, not a video file")
      if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise MediaError(self.name, "unreadable", "the server packs what was asked for as it is")
      start, total = _range(response) if status == 206 else (0, _length(response))
      if start != have and status == 206:
        self._forget()
        raise web.TransientError("the server sent another range than was asked for")
      if start == 0:
        self._forget()
      self._keep_validator(response.headers.get("ETag", ""), response.headers.get("Last-Modified", ""))
      self._write(web.body(response), total)
    return kind

  def _keep_validator(self, etag: str, modified: str) -> None:
    # A weak ETag does not promise equal bytes.
    validator = etag if etag and not etag.startswith("W/") else modified
    files.write_json(self._note, {"url": self.name, "validator": validator})

  def _follow(self, session: requests.Session, headers: dict[str, str]) -> requests.Response:
    """The first answer that is no redirection."""
    url, seen = self.url, set()
    for _ in range(MOST_REDIRECTS + 1):
      self._check_host(url)
      try:
        response = session.get(
          url, headers=headers, auth=_auth(url), timeout=self._limits.timeout_s, stream=True, allow_redirects=False
        )
      except requests.exceptions.InvalidURL as error:
        raise MediaError(self.name, "unreadable", f"no address that can be asked ({web.reason(error)})") from error
      except requests.RequestException as error:
        raise web.TransientError(web.reason(error)) from error
      if not response.is_redirect:
        return response
      response.close()
      seen.add(url)
      url = urllib.parse.urljoin(url, response.headers["Location"])
      if url in seen:
        raise MediaError(self.name, "unreadable", "the server redirects in a circle")
      self._check_redirect(url)
    raise MediaError(self.name, "unreadable", f"more than {MOST_REDIRECTS} redirections")

  def _check_redirect(self, url: str) -> None:
    check_scheme(url, self.name)
    here, there = urllib.parse.urlsplit(self.url), urllib.parse.urlsplit(url)
    if there.scheme not in WEB or (here.scheme == "https" and there.scheme == "http"):
      raise MediaError(self.name, "hostile_name", f"the server redirects to {there.scheme}, which is not followed")
    if there.hostname != here.hostname and _private(url):
      raise MediaError(self.name, "hostile_name", "the server redirects into a private network")

  def _check_host(self, url: str) -> None:
    if not self._limits.private and _private(url):
      raise MediaError(self.name, "hostile_name", "an address in a private network; --private allows them")

  # ---- s3, gs --------------------------------------------------------------------------------------------------------

  def _once_cloud(self) -> str:
    filesystem, path = _cloud(self.url)
    try:
      facts = filesystem.info(path)
      size, etag = int(facts["size"]), str(facts.get("ETag") or facts.get("etag") or facts.get("mtime") or "")
      if not etag or etag != self._validator() or self._size() > size:
        self._forget()
      files.write_json(self._note, {"url": self.name, "validator": etag})
      with filesystem.open(path, "rb") as file:
        file.seek(self._size())
        self._write(iter(lambda: file.read(2**20), b""), size)
    except (FileNotFoundError, PermissionError) as error:
      raise MediaError(self.name, "unreadable", f"{type(error).__name__}: {self.name}") from error
    except OSError as error:
      if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise
      raise web.TransientError(f"{type(error).__name__}: {str(error)[:200]}") from error
    return ""

  # ---- both ----------------------------------------------------------------------------------------------------------

  def _write(self, chunks: Any, total: int | None) -> None:
    """Appends to the part.

    Raises:
      TransientError: it was cut. MediaError: it is too large.
    """
    if total is not None:
      self._check_bytes(total)
    with self._part.open("ab") as file:
      size = file.tell()
      for chunk in chunks:
        self._room.take(len(chunk))
        file.write(chunk)
        size += len(chunk)
        self._check_bytes(size)
        if self._bandwidth is not None:
          self._bandwidth.wait(len(chunk))
        if time.monotonic() > self._deadline:
          raise MediaError(self.name, "timeout", f"took longer than {self._limits.seconds:g} s")
        self._pace.rest(0)  # raises where the run ends
    if total is not None and size != total:
      if size > total:
        self._forget()
      raise web.TransientError(f"{size} bytes came of {total}")

  def _check_bytes(self, count: int) -> None:
    if count > self._limits.file_bytes:
      self._forget()
      raise MediaError(self.name, "unreadable", f"more than {self._limits.file_bytes} bytes")

  def _check(self) -> str:
    """The SHA-256 of the whole part."""
    digests = {"sha256": hashlib.sha256()}
    if self._checksum is not None:
      digests.setdefault(self._checksum[0], hashlib.new(self._checksum[0], usedforsecurity=False))
    with self._part.open("rb") as file:
      while chunk := file.read(2**20):
        for digest in digests.values():
          digest.update(chunk)
    if self._checksum is not None and digests[self._checksum[0]].hexdigest() != self._checksum[1].lower():
      found = digests[self._checksum[0]].hexdigest()
      self._forget()
      raise MediaError(
        self.name, "unreadable", f"its {self._checksum[0]} is {found}, the table says {self._checksum[1]}"
      )
    return digests["sha256"].hexdigest()

  def _suffix(self, kind: str) -> str:
    suffix = os.path.splitext(urllib.parse.urlsplit(self.url).path)[1].lower()
    # Videos are opened by their content; a name only has to be found by a scan for videos.
    return suffix if suffix in folder.SUFFIXES else _SUFFIX_OF.get(kind, ".mp4")


def file_stem(url: str) -> str:
  """The name without suffix that the file of an address gets: what is harmless of its last part, and its key."""
  last = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rstrip("/").rpartition("/")[2]
  stem = re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.splitext(last)[0]).strip("-")[:60]
  return f"{stem}-{key(url)}" if stem else key(url)


def check_scheme(url: str, name: str) -> str:
  """The scheme of an address that may be fetched.

  Raises:
    MediaError: it may not, or is none.
  """
  try:
    parts = urllib.parse.urlsplit(url)
    scheme, host, _ = parts.scheme.lower(), parts.hostname, parts.port
  except ValueError as error:
    raise MediaError(name, "unreadable", f"no address ({error})") from error
  if scheme not in (*WEB, *CLOUD):
    legal = ", ".join((*WEB, *CLOUD))
    raise MediaError(name, "hostile_name", f"addresses of the kind {scheme!r} are not fetched; legal: {legal}")
  if not host:
    raise MediaError(name, "unreadable", "the address names no host")
  return scheme


def _auth(url: str) -> Any:
  """The password of the address itself; never one of ~/.netrc."""
  parts = urllib.parse.urlsplit(url)
  if parts.username is not None:
    return urllib.parse.unquote(parts.username), urllib.parse.unquote(parts.password or "")
  return lambda request: request


def _private(url: str) -> bool:
  """Whether a host is, or resolves to, an address that is not public.

  Behind a proxy names are the proxy's business, and only addresses in figures are looked at. A name that changes its
  address between this question and the connection is not seen.
  """
  host, port = urllib.parse.urlsplit(url).hostname or "", urllib.parse.urlsplit(url).port
  try:
    return not _public(host)
  except ValueError:
    pass  # a name
  if requests.utils.get_environ_proxies(url):
    return False
  try:
    found = socket.getaddrinfo(host, port or 443, type=socket.SOCK_STREAM)
  except (OSError, UnicodeError) as error:
    raise web.TransientError(f"the host {host} is not known ({getattr(error, 'strerror', error)})") from error
  return not all(_public(str(address[4][0]).partition("%")[0]) for address in found)


def _public(address: str) -> bool:
  place = ipaddress.ip_address(address)
  mapped = getattr(place, "ipv4_mapped", None)
  place = mapped or place
  return place.is_global and not place.is_multicast


def _length(response: requests.Response) -> int | None:
  text = response.headers.get("Content-Length", "")
  return int(text) if text.isascii() and text.isdigit() else None


def _range(response: requests.Response) -> tuple[int, int | None]:
  """(first byte, length of the whole) of a partial answer; (-1, None) where it does not say."""
  match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", response.headers.get("Content-Range", ""))
  if not match:
    return -1, None
  return int(match[1]), None if match[2] == "*" else int(match[2])


def _cloud(url: str) -> tuple[Any, str]:
  try:
    import fsspec

    return fsspec.url_to_fs(url)
  except ImportError as error:
    raise errors.UsageError(f"s3:// and gs:// need fsspec: pip install 'kling_jax[cloud]' ({error})") from error
