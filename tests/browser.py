"""A headless Chromium for tests of pages, driven over its DevTools protocol; skips where there is none."""

import contextlib
import itertools
import json
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
import websockets.sync.client

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def launch(profile: pathlib.Path) -> Iterator["Browser"]:
  """Starts a browser with a fresh profile and ends it."""
  program = next((path for name in NAMES if (path := shutil.which(name))), None)
  if program is None:
    pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
  flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
  process = subprocess.Popen([program, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    port = profile / "DevToolsActivePort"
    deadline = time.monotonic() + 60
    while not (port.exists() and port.read_text().count("\n") >= 1):
      assert process.poll() is None and time.monotonic() < deadline, "the browser does not start"
      time.sleep(0.05)
    number, path = port.read_text().split("\n")[:2]
    with websockets.sync.client.connect(f"ws://127.0.0.1:{number}{path}", max_size=None) as socket:
      yield Browser(socket)
  finally:
    process.terminate()
    process.wait(20)


class Browser:
  """One tab; `requests` and `problems` gather what it asked for and what went wrong in its scripts."""

  def __init__(self, socket: Any):
    self._socket, self._numbers = socket, itertools.count(1)
    self.requests: list[str] = []
    self.problems: list[str] = []
    self._loaded = False
    target = self._send("Target.createTarget", url="about:blank")["targetId"]
    self._session = self._send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Network"):
      self.call(f"{domain}.enable")

  def call(self, method: str, **params: Any) -> dict[str, Any]:
    return self._send(method, self._session, **params)

  def _send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
    number = next(self._numbers)
    message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
    self._socket.send(json.dumps(message))
    while True:
      answer = json.loads(self._socket.recv(timeout=60))
      if answer.get("id") == number:
        assert "error" not in answer, answer
        return answer["result"]
      self._hear(answer)

  def _hear(self, event: dict[str, Any]) -> None:
    if event["method"] == "Network.requestWillBeSent":
      self.requests.append(event["params"]["request"]["url"])
    elif event["method"] == "Runtime.exceptionThrown":
      self.problems.append(json.dumps(event["params"]["exceptionDetails"]))
    elif event["method"] == "Page.javascriptDialogOpening":
      self.problems.append(f"dialog: {event['params']['message']}")
    elif event["method"] == "Page.loadEventFired":
      self._loaded = True

  def open(self, path: pathlib.Path | str, width: int = 1280, height: int = 900) -> None:
    """Shows a file, or an address."""
    self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
    self._loaded = False
    self.call("Page.navigate", url=path if isinstance(path, str) else path.as_uri())
    deadline = time.monotonic() + 60
    while not self._loaded:
      assert time.monotonic() < deadline
      self.run("1")

  def run(self, script: str) -> Any:
    """The value of an expression in the page."""
    answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")

  def drag(self, start: tuple[float, float], end: tuple[float, float], steps: int = 5) -> None:
    for kind, share in (("mousePressed", 0.0), *(("mouseMoved", k / steps) for k in range(1, steps + 1))):
      x, y = (a + share * (b - a) for a, b in zip(start, end, strict=True))
      self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
    self.call("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1], button="left", clickCount=1)

  def press(self, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
      self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)
