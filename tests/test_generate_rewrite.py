"""Prompt rewriting against a real HTTP server on loopback that speaks the OpenAI protocol, well and badly."""

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from kling_jax.errors import DataError, UsageError
from kling_jax.generate import rewrite


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      self.server.seen.append((self.path, dict(self.headers), body))
      status, answer = self.server.answers.pop(0)
      self.send_response(status)
      self.end_headers()
      self.wfile.write(answer.encode())

    def log_message(self, *_: object) -> None:
      pass

  httpd = http.server.HTTPServer(("127.0.0.1", 0), Handler)
  httpd.seen, httpd.answers = [], []
  thread = threading.Thread(target=httpd.serve_forever, daemon=True)
  thread.start()
  yield httpd
  httpd.shutdown()
  httpd.server_close()


def base(server: http.server.HTTPServer) -> str:
  return f"http://127.0.0.1:{server.server_port}/v1/"


def test_the_answer_replaces_the_prompt(server, monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("OPENAI_API_KEY", "secret")
  server.answers = [(200, json.dumps({"choices": [{"message": {"content": " A red kite\n over  the sea. "}}]}))]
  assert rewrite.rewrite("kite", base(server), "small") == "A red kite over the sea."
  path, headers, body = server.seen[0]
  assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
  assert body["model"] == "small" and body["messages"][1] == {"role": "user", "content": "kite"}


@pytest.mark.parametrize(
  ("status", "answer", "error", "message"),
  [
    (500, "busy", UsageError, "500"),
    (200, "not json", DataError, "did not answer in JSON"),
    (200, '{"choices": []}', DataError, "without choices"),
    (200, '{"choices": [{"message": {"content": "  "}}]}', DataError, "empty text"),
  ],
)
def test_bad_answers_are_clear_errors(server, status: int, answer: str, error: type, message: str) -> None:
  server.answers = [(status, answer)]
  with pytest.raises(error, match=message):
    rewrite.rewrite("kite", base(server), "small")


def test_no_server_is_a_clear_error(server) -> None:
  address = base(server)
  server.shutdown()
  server.server_close()
  with pytest.raises(UsageError, match="check --rewrite"):
    rewrite.rewrite("kite", address, "small", timeout_s=2)
