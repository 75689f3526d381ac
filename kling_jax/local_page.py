"""A page that a verb serves to this machine alone: a token in its address, JSON requests, media in parts.

Python's own HTTP server on 127.0.0.1. It answers only those who know the token, and only under the machine's own name,
so that no page from elsewhere reaches it through the user's browser.
"""

import hmac
import http.server
import json
import re
import signal
import sys
import urllib.parse
from collections.abc import Callable
from typing import Any

from kling_jax.errors import DataError, KlingError, UsageError

HOST = "127.0.0.1"
LARGEST_BODY = 4096  # bytes of a request
SLOWEST_S = 60  # of silence within a request
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


class Server(http.server.ThreadingHTTPServer):
  """Threads that answer on 127.0.0.1; `address` is what the user opens."""

  daemon_threads = True

  def __init__(self, verb: str, token: str, port: int, handler: type["Handler"]):
    """Binds.

    Args:
      verb: whose page it is, for messages.
      port: 0 for a free one.

    Raises:
      UsageError: the port is taken.
    """
    self.verb, self.token = verb, token
    try:
      super().__init__((HOST, port), handler)
    except OSError as error:
      raise UsageError(f"port {port} of {HOST} cannot be used ({error.strerror}); give another --port") from error

  @property
  def address(self) -> str:
    return f"http://{HOST}:{self.server_port}/?token={self.token}"

  def handle_error(self, request: Any, client_address: Any) -> None:
    """A client that goes away is no error."""
    if not isinstance(sys.exception(), ConnectionError | TimeoutError):
      super().handle_error(request, client_address)

  def serve_until_ended(self) -> None:
    """Prints the address on standard output and serves until Ctrl-C or SIGTERM. For the main thread."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs start with the first one ignored
      signal.signal(number, signal.default_int_handler)
    print(self.address, flush=True)
    try:
      self.serve_forever()
    except KeyboardInterrupt:
      return


class Handler(http.server.BaseHTTPRequestHandler):
  """One connection; what is asked goes to `answer` and `action`, which a page defines."""

  server: Server
  protocol_version = "HTTP/1.1"
  timeout = SLOWEST_S
  server_version, sys_version = "kling", ""

  def answer(self, path: str, fields: dict[str, str]) -> None:
    """Answers a GET by `say`, `json` or `media`; a KlingError becomes a 400."""
    raise NotImplementedError

  def action(self, path: str) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """What a POST to `path` does, from JSON object to JSON object; None where there is nothing."""
    raise NotImplementedError

  def do_GET(self) -> None:
    """Answers those who are allowed."""
    address = urllib.parse.urlsplit(self.path)
    fields = urllib.parse.parse_qs(address.query, keep_blank_values=True)
    if not self._allowed(fields):
      return
    try:
      self.answer(address.path, {name: values[0] for name, values in fields.items()})
    except KlingError as error:
      self.json(400, {"error": str(error)})

  do_HEAD = do_GET

  def do_POST(self) -> None:
    """Acts, and says what came of it."""
    address = urllib.parse.urlsplit(self.path)
    length = self.headers.get("Content-Length", "")
    if (
      not re.fullmatch(r"\d{1,18}", length, re.ASCII)
      or int(length) > LARGEST_BODY
      or "Transfer-Encoding" in self.headers
    ):
      self.close_connection = True  # what it sends is not read
      self.json(413, {"error": f"a request has a length of at most {LARGEST_BODY} bytes"})
      return
    body = self.rfile.read(int(length))
    if not self._allowed(urllib.parse.parse_qs(address.query)):
      return
    act = self.action(address.path)
    if act is None:
      self.nothing()
      return
    try:
      asked = json.loads(body)
      if not isinstance(asked, dict):
        raise DataError("a request is a JSON object")
      self.json(200, act(asked))
    except (ValueError, RecursionError):
      self.json(400, {"error": "a request is a JSON object"})
    except KlingError as error:
      self.json(400, {"error": str(error)})

  def _allowed(self, fields: dict[str, list[str]]) -> bool:
    """Whether the token is right, and the browser asked this machine by its own name (no page elsewhere does)."""
    host = self.headers.get("Host", "").rpartition(":")[0]
    given = fields.get("token", [""])[0]
    if host in (HOST, "localhost") and hmac.compare_digest(given.encode(), self.server.token.encode()):
      return True
    self.close_connection = True
    self.json(403, {"error": f"open the whole address that `{self.server.verb}` printed"})
    return False

  # ---- answers -----------------------------------------------------------------------------------------------------

  def page(self, html: str) -> None:
    """Sends a page."""
    self.say(200, html.encode(), "text/html; charset=utf-8")

  def media(self, media: bytes, kind: str = "video/mp4") -> None:
    """Sends a file that never changes, or the part of it that a player asks for."""
    span = _span(self.headers.get("Range"), len(media))
    if span is None:
      self.say(416, b"", kind, {"Content-Range": f"bytes */{len(media)}"})
      return
    start, end = span
    more = {"Accept-Ranges": "bytes", "Cache-Control": "private, max-age=3600"}
    if "Range" in self.headers:
      more["Content-Range"] = f"bytes {start}-{end - 1}/{len(media)}"
    self.say(206 if "Range" in self.headers else 200, media[start:end], kind, more)

  def nothing(self, what: str = "there is nothing here") -> None:
    """Sends a 404."""
    self.json(404, {"error": what})

  def json(self, status: int, value: dict[str, Any]) -> None:
    """Sends a JSON object."""
    self.say(status, json.dumps(value).encode(), "application/json")

  def say(self, status: int, body: bytes, kind: str, more: dict[str, str] | None = None) -> None:
    """Sends an answer of a content type, with `more` headers."""
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
