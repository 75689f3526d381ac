"""A real HTTP server on loopback whose answers tests script, well-behaved and not."""

import http.server
import socket
import threading
import time
from collections.abc import Callable
from typing import Any


class Server(http.server.ThreadingHTTPServer):
  """Calls `answer(handler, body)` for every request; `seen` lists (method, path, headers, body, time)."""

  daemon_threads = True
  request_queue_size = 64

  def __init__(self, answer: Callable[["Handler", bytes], None], host: str = "127.0.0.1"):
    super().__init__((host, 0), Handler)
    self.answer, self.seen = answer, []
    self.lock = threading.Lock()
    self.busy = self.busiest = 0
    threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

  def address(self, path: str = "") -> str:
    return f"http://{self.server_address[0]}:{self.server_port}{path}"

  def __exit__(self, *_: Any) -> None:
    self.shutdown()
    self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
  """One request; `say` answers it, `cut` breaks the connection."""

  protocol_version = "HTTP/1.1"

  def do_GET(self) -> None:
    length = int(self.headers.get("Content-Length") or 0)
    body = self.rfile.read(length)
    server = self.server
    with server.lock:
      server.seen.append((self.command, self.path, dict(self.headers), body, time.monotonic()))
      server.busy += 1
      server.busiest = max(server.busiest, server.busy)
    try:
      server.answer(self, body)
    except (BrokenPipeError, ConnectionResetError):
      self.close_connection = True  # the client left; tests see what it did instead
    finally:
      with server.lock:
        server.busy -= 1

  do_POST = do_GET

  def say(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
    """A whole answer; `length` lies about its size. Underscores in header names become dashes."""
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace("_", "-"), value)
    self.send_header("Content-Length", str(len(body) if length is None else length))
    self.end_headers()
    self.wfile.write(body)

  def cut(self) -> None:
    """Breaks the connection."""
    self.close_connection = True
    self.wfile.flush()
    self.connection.shutdown(socket.SHUT_RDWR)

  def log_message(self, *_: Any) -> None:
    return
