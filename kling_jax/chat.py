"""Chat completions of any OpenAI-compatible server (vLLM, SGLang, llama.cpp, a hosted service)."""

import dataclasses
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

import requests

from kling_jax import errors, web

KEY = "OPENAI_API_KEY"  # environment variable; sent where it is set, never written anywhere
MOST_BYTES = 4 * 2**20  # of an answer
_SHOWN = 300  # letters of a refusal that are told


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a model said.

  Attributes:
    text: its words. finish: why it ended ("stop", "length", ...).
    prompt_tokens, completion_tokens: what the server counted; None where it does not say.
  """

  text: str
  finish: str = "stop"
  prompt_tokens: int | None = None
  completion_tokens: int | None = None


class BadReplyError(errors.DataError):
  """The server answered, and the answer is of no use; `reply` has what it cost."""

  def __init__(self, message: str, reply: Reply | None = None):
    super().__init__(message)
    self.reply = reply or Reply("")


class _Key(requests.auth.AuthBase):
  """Sends the key, and keeps `requests` from looking for passwords in ~/.netrc."""

  def __init__(self, key: str | None):
    self._key = key

  def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
    if self._key:
      request.headers["Authorization"] = f"Bearer {self._key}"
    return request


class Client:
  """Asks one server; may be used by several threads.

  Args:
    server: base address, e.g. http://localhost:8000/v1.
    model: the name that the server knows.
    timeout_s: longest time of one answer.
    patience: tries where the server or the way to it fails.
    pace: shared by all requests.

  Raises:
    UsageError: the address is none.
  """

  def __init__(
    self,
    server: str,
    model: str,
    *,
    timeout_s: float = 60.0,
    patience: web.Patience = web.Patience(tries=1),
    pace: web.Pace | None = None,
  ):
    parts = urllib.parse.urlsplit(server)
    if parts.scheme not in ("http", "https") or not parts.hostname:
      raise errors.UsageError(f"server {server!r}: wants an address such as http://localhost:8000/v1")
    self._url = server.rstrip("/") + "/chat/completions"
    self.server, self.model = web.shown(server), model
    self._timeout_s, self._patience, self.pace = timeout_s, patience, pace or web.Pace()
    self._key = os.environ.get(KEY)
    self._local = threading.local()

  def ask(self, messages: Sequence[dict[str, Any]], key: str = "", **options: Any) -> Reply:
    """One completion.

    Args:
      messages: as the protocol has them.
      key: spreads the pauses of different questions.
      options: further fields of the request (temperature, max_tokens, response_format).

    Raises:
      TransientError: no answer after all tries. RefusedError: the server does not want this request.
      BadReplyError: an answer without words, or not in the form of the protocol.
    """
    request = {"model": self.model, "messages": list(messages), **options}
    return web.persist(lambda: self._post(request), self._patience, self.pace, key)

  def _post(self, request: dict[str, Any]) -> Reply:
    deadline = time.monotonic() + self._timeout_s
    if not hasattr(self._local, "session"):
      self._local.session = requests.Session()
    headers = {"User-Agent": web.USER_AGENT, "Accept-Encoding": "identity"}
    try:
      with self._local.session.post(
        self._url, json=request, headers=headers, auth=_Key(self._key), timeout=self._timeout_s, stream=True,
        allow_redirects=False,
      ) as response:  # fmt: skip
        data = self._read(response, deadline)
    except requests.RequestException as error:
      raise web.TransientError(f"server {self.server} failed: {web.reason(error)}") from error
    except web.TransientError as error:
      raise web.TransientError(f"server {self.server} failed: {error}", error.retry_after_s) from error
    if response.ok and not response.is_redirect:
      return _reply(self.server, data)
    told = " ".join(data.decode("utf-8", "replace").split())[:_SHOWN]
    if self._key:
      told = told.replace(self._key, "***")
    what = f"server {self.server} answered {response.status_code} {response.reason}: {told}"
    if response.status_code in web.TRANSIENT:
      raise web.TransientError(what, web.retry_after_s(response))
    raise web.RefusedError(what, response.status_code)

  def _read(self, response: requests.Response, deadline: float) -> bytes:
    data = bytearray()
    for chunk in web.body(response, deadline):
      data += chunk
      if len(data) > MOST_BYTES:
        raise BadReplyError(f"server {self.server} answered with more than {MOST_BYTES} bytes")
    return bytes(data)


def _reply(server: str, data: bytes) -> Reply:
  try:
    answer = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise BadReplyError(f"server {server} did not answer in JSON: {str(error)[:100]}") from error
  counts = answer.get("usage") if isinstance(answer, dict) else None
  usage: dict[str, Any] = {name: _count(counts, name) for name in ("prompt_tokens", "completion_tokens")}
  try:
    choice = answer["choices"][0]
    text, finish = choice["message"]["content"], str(choice.get("finish_reason") or "stop")
  except (KeyError, IndexError, TypeError, AttributeError) as error:
    raise BadReplyError(f"server {server} answered without choices[0].message.content", Reply("", **usage)) from error
  if not isinstance(text, str) or not text.strip():
    raise BadReplyError(f"server {server} answered with an empty text", Reply("", finish, **usage))
  return Reply(text, finish, **usage)


def _count(usage: Any, name: str) -> int | None:
  value = usage.get(name) if isinstance(usage, dict) else None
  return value if type(value) is int and 0 <= value < 2**40 else None
