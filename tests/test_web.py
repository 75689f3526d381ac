"""Tries, pauses and pace of requests, and what of an address is shown."""

import email.utils
import threading
import time

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from kling_jax import web
from kling_jax.errors import UsageError


@given(st.integers(1, 40), st.text(max_size=5), st.floats(0.01, 10), st.floats(0.01, 100))
def test_pauses_double_within_bounds_and_can_be_repeated(number: int, key: str, first_s: float, most_s: float) -> None:
  patience = web.Patience(first_s=first_s, most_s=most_s)
  pause_s, full_s = patience.pause_s(number, key), min(most_s, first_s * 2.0 ** (number - 1))
  assert full_s / 2 <= pause_s <= full_s and pause_s == patience.pause_s(number, key)


@pytest.mark.parametrize(
  ("header", "least", "most"),
  [
    ("7", 7, 7),
    ("0", 0, 0),
    (email.utils.formatdate(time.time() + 10_000, usegmt=True), 9_000, 10_001),
    ("soon", None, None),
  ],
)
def test_retry_after_is_seconds_or_a_date(header: str, least: float | None, most: float | None) -> None:
  response = requests.Response()
  response.headers["Retry-After"] = header
  asked = web.retry_after_s(response)
  assert asked is None if least is None or most is None else least <= asked <= most
  assert web.retry_after_s(requests.Response()) is None


def test_tries_that_come_further_do_not_count() -> None:
  reached = iter([1, 2, 2, 3, 3, 3, 99])
  state = {"at": 0, "calls": 0}

  def call() -> str:
    state["calls"] += 1
    state["at"] = next(reached)
    raise web.TransientError("cut")

  quick = web.Patience(tries=3, first_s=0.001, most_s=0.001)
  with pytest.raises(web.TransientError, match=r"cut \(3 tries\)"):
    web.persist(call, quick, web.Pace(), "", lambda: state["at"])
  assert state == {"at": 3, "calls": 6}


def test_a_server_that_asks_for_too_long_a_pause_is_given_up() -> None:
  def call() -> None:
    raise web.TransientError("busy", retry_after_s=3600)

  with pytest.raises(web.TransientError, match="asks for a pause of 3600 s"):
    web.persist(call, web.Patience(), web.Pace(), "")


def test_a_pause_holds_those_who_already_wait() -> None:
  pace, starts = web.Pace(per_minute=600), []

  def start() -> None:
    pace.wait()
    starts.append(time.monotonic())

  threads = [threading.Thread(target=start) for _ in range(4)]
  clock = time.monotonic()
  for thread in threads:
    thread.start()
  time.sleep(0.05)  # the first has started, the others wait for their turns
  pace.hold(0.5)
  for thread in threads:
    thread.join()
  starts.sort()
  assert starts[0] - clock < 0.1 and starts[1] - clock >= 0.5


def test_a_stopped_pace_ends_all_waiting() -> None:
  pace = web.Pace(per_minute=1)
  pace.wait()
  threading.Timer(0.05, pace.stop).start()
  with pytest.raises(web.StoppedError):
    pace.wait()
  with pytest.raises(web.StoppedError):
    pace.rest(0)
  with pytest.raises(UsageError, match="more than 0"):
    web.Pace(per_minute=0)


def test_passwords_and_queries_are_not_shown() -> None:
  assert web.shown("https://u:p@host:8/a/b.mp4?token=x#y") == "https://host:8/a/b.mp4"
  assert web.shown("http://[::1") == "an address that cannot be read"
