"""The rating page in a real browser, with a server that is killed; and what strangers and slips may send to it."""

import http.client
import json
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import Browser, launch
from test_curation_ratings import by_formula

from kling_jax import cli
from kling_jax.curation import annotate
from kling_jax.curation.rating_store import RatingStore
from kling_jax.curation.ratings import Rating
from kling_jax.data import encode, records
from kling_jax.data.record import ClipRecord

CLIPS, RATINGS = 70, {"Ada": 67, "Bo <b>'; DROP TABLE ratings; --": 67, "Čeněk": 66}
PATIENCE_S = 240


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("annotate") / "set"
  frames = [np.full((48, 64, 3), 5 * k, np.uint8) for k in range(40)]
  media = encode.encode(frames, fps=20)
  with records.RecordWriter(folder, "test") as writer:
    for k in range(CLIPS):
      writer.write(ClipRecord(f"clip {k}", f"video {k // 3}", "v", 0, 40, "1/20", 20.0, 64, 48, 40), media)
  return folder


class Served:
  """`kling annotate` as a process of its own."""

  def __init__(self, clips: pathlib.Path, db: pathlib.Path):
    words = [sys.executable, "-m", "kling_jax", "annotate", "--input", str(clips), "--db", str(db)]
    self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    self.address = self.process.stdout.readline().strip()
    assert self.address.startswith("http://127.0.0.1:"), self.address

  def end(self, how: int) -> None:
    self.process.send_signal(how)
    self.process.wait(PATIENCE_S)
    self.process.stdout.close()


def until(page: Browser, script: str) -> None:
  deadline = time.monotonic() + PATIENCE_S
  while not page.run(script):
    assert time.monotonic() < deadline, (script, page.run("JSON.stringify(rating())"), page.problems)
    time.sleep(0.01)


def test_200_ratings_by_three_raters_survive_a_kill_and_none_is_doubled(clips, tmp_path):
  db, rng = tmp_path / "ratings.db", np.random.default_rng(0)
  served = Served(clips, db)
  first = served.address
  pressed: dict[str, dict[str, float]] = {name: {} for name in RATINGS}
  kills = {("Ada", 30): signal.SIGKILL, (list(RATINGS)[1], 40): signal.SIGKILL, ("Čeněk", 20): signal.SIGTERM}
  orders = []
  try:
    with launch(tmp_path / "profile") as page:
      for name, count in RATINGS.items():
        page.open(served.address)
        until(page, "!document.querySelector('.who').hidden")
        page.run(f"document.querySelector('#name').value = {json.dumps(name)}")
        page.run("document.querySelector('.who button').click()")
        until(page, "rating().rater !== null && rating().done === 0")
        until(
          page, "(v => v.videoWidth === 64 && v.currentTime > 0 && !v.error)(document.querySelector('.screen video'))"
        )
        orders.append([])
        for done in range(count):
          clip, value = page.run("rating().clip"), int(rng.integers(1, 6))
          assert clip not in pressed[name]
          orders[-1].append(clip)
          kill = kills.get((name, done))
          if kill is not None:  # the rating is on its way, or was stored and its answer is lost
            page.press(str(value))
            served.end(kill)
            served = Served(clips, db)
            assert served.address == first, "an open page goes on"
          else:
            page.press(str(value))
          pressed[name][clip] = float(value)
          until(page, f"!rating().busy && rating().done === {done + 1}")
          if done % 25 == 7:  # a slip, taken back
            slip = page.run("rating().clip")
            page.press("1")
            until(page, f"!rating().busy && rating().done === {done + 2}")
            page.press("u")
            until(page, f"!rating().busy && rating().done === {done + 1}")
            assert page.run("rating().clip") == slip, "the clip comes again"
      # One is pressed while nobody answers, and the page is closed: it is sent when the page is open again.
      served.end(signal.SIGKILL)
      last = page.run("rating().clip")
      page.press("5")
      until(page, "rating().busy && !document.querySelector('.trouble').hidden")
      served = Served(clips, db)
      page.open(f"{served.address}&rater={urllib.parse.quote('Čeněk')}")
      until(page, "rating().rater !== null && !rating().busy && rating().done === 67")
      pressed["Čeněk"][last] = 5.0
      assert not page.problems, page.problems
      assert all(address.startswith(("http://127.0.0.1:", "data:", "about:")) for address in page.requests)
      assert page.run("document.querySelector('.alpha').textContent").endswith("(3 raters)")
      text = page.run("document.body.textContent")
      assert "Dynamic quality" in text and "Static quality" in text and "Naturalness" in text
      page.open(f"{served.address}&rater=Ada")
      until(page, "rating().rater === 'Ada' && rating().done === 67")
  finally:
    served.end(signal.SIGINT)
  assert served.process.returncode == 0
  assert orders[0] != orders[1] and orders[1] != orders[2] and len(set(map(tuple, orders))) == 3

  with RatingStore(db) as store:
    held = store.all()
  assert sum(len(one) for one in pressed.values()) == 201 == len(held)
  assert {name: {one.clip_id: one.rating for one in held if one.rater == name} for name in RATINGS} == pressed
  out = tmp_path / "labels.parquet"
  assert cli.main(["annotate", "--db", str(db), "--export", str(out)]) == 0
  expected = by_formula(
    [Rating(clip, "", name, value) for name, rated in pressed.items() for clip, value in rated.items()]
  )
  rows = pq.read_table(out).to_pylist()
  assert {row["clip_id"]: row["raters"] for row in rows} == {
    clip: sum(clip in rated for rated in pressed.values()) for clip in expected
  }
  for row in rows:
    assert row["rating"] == pytest.approx(expected[row["clip_id"]], rel=1e-12)
    assert row["video_id"] == f"video {int(row['clip_id'].split()[1]) // 3}"


@pytest.fixture(scope="module")
def server(clips, tmp_path_factory):
  with (
    RatingStore(tmp_path_factory.mktemp("store") / "r.db") as store,
    annotate.Server(annotate.Clips(clips), store) as made,
  ):
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()


def ask(server, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
  connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=PATIENCE_S)
  connection.request(method, path, body, headers)
  answer = connection.getresponse()
  found = answer.status, dict(answer.getheaders()), answer.read()
  connection.close()
  return found


def rated(server, **fields) -> int:
  asked = {"request": "request-1", "rater": "a", "clip": "clip 1", "rating": 3} | fields
  return ask(server, "POST", f"/rate?token={server.token}", json.dumps(asked).encode())[0]


def test_clips_come_in_the_parts_that_a_player_asks_for(server):
  address = f"/clip/3?token={server.token}"
  status, headers, whole = ask(server, "GET", address)
  assert status == 200 and headers["Content-Type"] == "video/mp4" and headers["Accept-Ranges"] == "bytes"
  assert whole == server.clips.media(3) and whole[4:8] == b"ftyp"
  size = len(whole)
  for asked, start, end in (
    ("bytes=0-", 0, size), ("bytes=10-19", 10, 20), (f"bytes=5-{size + 99}", 5, size), ("bytes=-7", size - 7, size),
    (f"bytes=-{2 * size}", 0, size), (f"bytes={size - 1}-{size - 1}", size - 1, size),
  ):  # fmt: skip
    status, headers, part = ask(server, "GET", address, Range=asked)
    assert (status, headers["Content-Range"], part) == (206, f"bytes {start}-{end - 1}/{size}", whole[start:end]), asked
  for asked in (f"bytes={size}-", "bytes=9-3", "bytes=-0", "bytes=-", "bytes=0-1,3-4", "lines=1-2", "bytes=x-"):
    status, headers, _ = ask(server, "GET", address, Range=asked)
    assert (status, headers["Content-Range"]) == (416, f"bytes */{size}"), asked
  status, headers, body = ask(server, "HEAD", address)
  assert status == 200 and not body and int(headers["Content-Length"]) == size


def test_strangers_get_nothing(server):
  token = server.token
  for path in (
    "/",
    "/?token=",
    f"/?token={token[:-1]}",
    f"/?token={token}x",
    "/?token=%00%ff",
    "/state?rater=a",
    "/clip/0",
  ):
    assert ask(server, "GET", path)[0] == 403, path
  assert ask(server, "POST", "/rate?token=wrong", b"{}")[0] == 403
  for host in ("evil.example", f"evil.example:{server.server_port}", ""):
    assert ask(server, "GET", f"/?token={token}", Host=host)[0] == 403, "a name that points here from elsewhere"
  status, headers, body = ask(server, "GET", f"/?token={token}")
  assert status == 200 and token.encode() not in body and "frame-ancestors 'none'" in headers["Content-Security-Policy"]
  for path in (
    "/clip/../../../etc/passwd",
    "/clip/%2e%2e%2fx",
    "/clip/-1",
    f"/clip/{CLIPS}",
    "/clip/1e3",
    "/clip/٣",
    "/x",
  ):
    assert ask(server, "GET", urllib.parse.quote(path, safe="/%") + f"?token={token}")[0] == 404, path
  assert server.server_address[0] == "127.0.0.1"


def test_what_is_no_rating_is_refused_and_stores_nothing(server):
  before = server.store.counts()
  wrong = [{"rating": value} for value in (0, 6, 3.5, "3", True, None)]
  wrong += [{"clip": value} for value in ("no such", ["clip 1"])]
  wrong += [{"rater": value} for value in ("", " ", "x" * 65, "a\nb", 7)]
  wrong += [{"request": value} for value in ("", "x" * 65, None)]
  for fields in wrong:
    assert rated(server, **fields) == 400, fields
  address = f"/rate?token={server.token}"
  for body in (b"", b"[]", b"{", b"\xff\xfe", b"[" * 4000, b'{"rating": 1e999}'):
    assert ask(server, "POST", address, body)[0] == 400, body[:20]
  assert ask(server, "POST", address, b"x" * 5000)[0] == 413
  assert ask(server, "POST", address, b"{}", **{"Content-Length": "1e9"})[0] == 413
  assert ask(server, "POST", address, b"{}", **{"Content-Length": "-1"})[0] == 413
  assert ask(server, "POST", f"/drop?token={server.token}", b"{}")[0] == 404
  assert server.store.counts() == before
  assert rated(server, request="request-2") == 200 == rated(server, request="request-2", rating=5)
  assert server.store.of("a") == {"clip 1": 3.0}


def test_the_order_is_the_raters_own_and_every_clip_comes(server):
  def coming(name: str) -> list[str]:
    seen = []
    while following := server.state(name)["next"]:
      assert following[0]["clip"] not in seen and len(following) == min(3, CLIPS - len(seen))
      seen.append(following[0]["clip"])
      server.rate(
        {"request": f"{name} {len(seen)} xxxxxx", "rater": name, "clip": seen[-1], "rating": 1 + len(seen) % 5}
      )
    return seen

  first, second = coming("one"), coming("two")
  assert sorted(first) == sorted(second) == sorted(server.clips.ids) and first != second
  back = server.undo({"request": "undo of one", "rater": "one"})
  assert back["undone"] == first[-1] == back["next"][0]["clip"] and back["done"] == CLIPS - 1
  assert re.fullmatch(r"\d+\.\d+", f"{server.everybody()['alpha']:.2f}".lstrip("-"))
