"""`kling fetch` against a real HTTP server: ranges, cuts, checksums, redirections, private addresses, limits."""

import collections
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import ClassVar

import fsspec
import loopback
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from kling_jax import cli, web
from kling_jax.data import download, fetch, quarantine
from kling_jax.data.download import DiskFullError, Limits
from kling_jax.errors import DataError, UsageError

BODY = bytes(range(256)) * 4096  # 1 MiB
SHA = hashlib.sha256(BODY).hexdigest()
LIMITS = Limits(private=True, timeout_s=1.0)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(web.Patience, "pause_s", lambda self, number, key: 0.01)


@pytest.fixture
def serve() -> Iterator[Callable[..., loopback.Server]]:
  running = []

  def start(answer: Callable[[loopback.Handler, bytes], None], host: str = "127.0.0.1") -> loopback.Server:
    running.append(loopback.Server(answer, host))
    return running[-1]

  yield start
  for server in running:
    server.__exit__()


def ranged(handler: loopback.Handler, stop: int = len(BODY), etag: str = '"v1"', body: bytes = BODY) -> None:
  """What a good file server does; sends no byte from `stop` on, and then cuts the connection."""
  start, status, headers = 0, 200, {"ETag": etag}
  match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
  if match and handler.headers.get("If-Range") == etag:
    start, status = int(match[1]), 206
    headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
  handler.say(status, body[start:stop], length=len(body) - start, **headers)
  if stop < len(body):
    handler.cut()


def run(tmp_path: pathlib.Path, rows: list[dict[str, str]], **changes: object) -> fetch.Summary:
  (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  options = {"limits": LIMITS, "tries": 3}
  return fetch.fetch(tmp_path / "t.jsonl", tmp_path / "out", fetch.Options(**(options | changes)))


def files(tmp_path: pathlib.Path) -> dict[str, bytes]:
  top = tmp_path / "out"
  return {p.name: p.read_bytes() for p in top.iterdir() if p.name not in (".lock", "fetched.jsonl", "quarantine.jsonl")}


def why(tmp_path: pathlib.Path) -> tuple[str, str]:
  [entry] = quarantine.read(tmp_path / "out" / "quarantine.jsonl")
  return entry.reason, entry.detail


def test_files_come_whole_once_and_under_harmless_names(tmp_path, serve) -> None:
  server = serve(lambda handler, body: ranged(handler))
  names = ["/a/film.mp4", "/a/film.mp4?v=2", "/..%2f..%2fetc/%3Cb%3E%00.webm", "/watch?v=1", "/x" * 300]
  rows = [{"url": server.address(name), "sha256": SHA} for name in names] + [{"url": "local.mp4", "sha256": ""}]
  summary = run(tmp_path, rows + rows)
  assert (summary.rows, summary.addresses, summary.local, summary.fetched) == (12, 5, 2, 5)
  assert summary.bytes == 5 * len(BODY) and len(server.seen) == 5
  found = files(tmp_path)
  assert set(found.values()) == {BODY} and len(found) == 5
  assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}\.(mp4|webm)", name) for name in found)
  entries = fetch.read(tmp_path / "out")
  assert {(entry.file, entry.sha256) for entry in entries} == {(name, SHA) for name in found}
  assert run(tmp_path, rows).kept_before == 5 and len(server.seen) == 5
  (tmp_path / "out" / "fetched.jsonl").unlink()  # a kill between the rename and the note
  assert run(tmp_path, rows).kept_before == 5 and len(server.seen) == 5


def test_a_cut_download_goes_on_where_it_was(tmp_path, serve) -> None:
  """Six cuts with three tries: a try that brings something new does not count."""
  stops = iter([*(150_000 * k for k in range(1, 7)), len(BODY)])
  server = serve(lambda handler, body: ranged(handler, next(stops)))
  assert run(tmp_path, [{"url": server.address("/f.mp4"), "sha256": SHA}]).fetched == 1
  assert list(files(tmp_path).values()) == [BODY]
  starts = [int(headers.get("Range", "bytes=0-")[6:-1]) for _, _, headers, _, _ in server.seen]
  assert starts[0] == 0 and len(starts) == 7
  assert all(0 < after - before <= 150_000 for before, after in itertools.pairwise(starts))


def test_a_file_that_changed_meanwhile_is_fetched_anew(tmp_path, serve) -> None:
  new, turns = BODY[::-1], collections.Counter()

  def answer(handler: loopback.Handler, body: bytes) -> None:
    turns["all"] += 1
    ranged(handler, 300_000) if turns["all"] == 1 else ranged(handler, etag='"v2"', body=new)

  server = serve(answer)
  run(tmp_path, [{"url": server.address("/f.mp4")}])
  assert server.seen[1][2]["If-Range"] == '"v1"' and list(files(tmp_path).values()) == [new]


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}])
def test_without_a_strong_validator_nothing_is_pieced_together(headers, tmp_path, serve) -> None:
  turns = collections.Counter()

  def answer(handler: loopback.Handler, body: bytes) -> None:
    turns["all"] += 1
    handler.say(200, BODY[:99] if turns["all"] == 1 else BODY, length=len(BODY), **headers)
    if turns["all"] == 1:
      handler.cut()

  server = serve(answer)
  run(tmp_path, [{"url": server.address("/f.mp4")}])
  assert "Range" not in server.seen[1][2] and list(files(tmp_path).values()) == [BODY]


def test_a_server_that_ignores_or_misreads_ranges_does_no_harm(tmp_path, serve) -> None:
  def answer(handler: loopback.Handler, body: bytes) -> None:
    turn = len(handler.server.seen)
    if turn == 1:
      ranged(handler, 300_000)
    elif turn == 2:  # another range than was asked for
      handler.say(206, BODY[100:], ETag='"v1"', Content_Range=f"bytes 100-{len(BODY) - 1}/{len(BODY)}")
    elif turn == 3:
      ranged(handler, 200_000)
    elif turn == 4:
      handler.say(416, ETag='"v1"', Content_Range=f"bytes */{len(BODY)}")
    else:
      handler.say(200, BODY, ETag='"v1"')

  server = serve(answer)
  assert run(tmp_path, [{"url": server.address("/f.mp4"), "sha256": SHA}], tries=5).fetched == 1


def test_a_part_that_was_whole_is_not_fetched_again(tmp_path, serve) -> None:
  """A kill between the last byte and the rename."""

  def answer(handler: loopback.Handler, body: bytes) -> None:
    if handler.headers.get("Range") == f"bytes={len(BODY)}-" and handler.headers.get("If-Range") == '"v1"':
      handler.say(416, Content_Range=f"bytes */{len(BODY)}")
    else:
      handler.cut()

  server = serve(answer)
  url = server.address("/f.mp4")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / f".{download.key(url)}.part").write_bytes(BODY)
  (tmp_path / "out" / f".{download.key(url)}.json").write_text('{"validator": "\\"v1\\""}')
  assert run(tmp_path, [{"url": url, "sha256": SHA}]).fetched == 1 and len(server.seen) == 1
  assert list(files(tmp_path).values()) == [BODY]


FAILURES = {
  "404": (lambda h: h.say(404, b"gone"), "unreadable", "answered 404"),
  "403": (lambda h: h.say(403, b"no"), "unreadable", "answered 403"),
  "500": (lambda h: h.say(500, b"no"), "unreadable", r"answered 500 .* \(3 tries\)"),
  "page": (lambda h: h.say(200, b"<html>", Content_Type="text/html; charset=utf-8"), "unreadable", "a web page"),
  "packed": (lambda h: h.say(200, b"xx", Content_Encoding="gzip"), "unreadable", "packs"),
  "cut": (lambda h: h.cut(), "unreadable", "3 tries"),
  "silent": (lambda h: time.sleep(0.5), "timeout", r"no answer in time \(3 tries\)"),
  "loop": (lambda h: h.say(302, Location="/f.mp4"), "unreadable", "redirects in a circle"),
  "chain": (lambda h: h.say(302, Location=h.path + "x"), "unreadable", "more than 5 redirections"),
  "to file": (lambda h: h.say(302, Location="file:///etc/passwd"), "hostile_name", "kind 'file'"),
  "to cloud": (lambda h: h.say(302, Location="s3://b/k"), "hostile_name", "redirects to s3"),
  "to metadata": (lambda h: h.say(302, Location="http://169.254.169.254/x"), "hostile_name", "private network"),
  "to nowhere": (lambda h: h.say(302, Location="http://a:99999/"), "unreadable", "no address"),
}


@pytest.mark.parametrize("how", sorted(FAILURES))
def test_what_cannot_be_had_costs_one_line_and_one_row(how, tmp_path, serve, capsys) -> None:
  act, reason, words = FAILURES[how]
  bad = serve(lambda handler, body: act(handler))
  good = serve(lambda handler, body: ranged(handler))
  limits = dataclasses.replace(LIMITS, timeout_s=0.2)
  rows = [{"url": bad.address("/f.mp4").replace("//", "//u:pa%3Ass@") + "?token=sec"}, {"url": good.address("/g.mp4")}]
  summary = run(tmp_path, rows, limits=limits)
  assert summary.failed == {reason: 1} and summary.fetched == 1
  assert why(tmp_path)[0] == reason and re.search(words, why(tmp_path)[1])
  told = capsys.readouterr().err
  assert (
    told.count("kling: not fetched") == 1
    and "sec" not in told
    and "pa" not in told.replace("packs", "").replace("page", "")
  )
  assert [name for name in files(tmp_path) if "part" in name] == []


def test_wrong_checksums_are_refused_and_forgotten(tmp_path, serve) -> None:
  server = serve(lambda handler, body: ranged(handler))
  assert run(tmp_path, [{"url": server.address("/f.mp4"), "sha256": "0" * 64}]).failed == {"unreadable": 1}
  assert "the table says 0000" in why(tmp_path)[1] and files(tmp_path) == {}
  md5 = hashlib.md5(BODY).hexdigest().upper()
  assert run(tmp_path, [{"url": server.address("/f.mp4"), "checksum": f"MD5:{md5}"}]).fetched == 1
  assert run(tmp_path, [{"url": server.address("/h.mp4"), "md5": "zz"}]).failed == {"unreadable": 1}


@pytest.mark.parametrize(
  ("url", "words"),
  [
    ("file:///etc/passwd", "kind 'file'"),
    ("ftp://host/x", "kind 'ftp'"),
    ("http:///x", "no host"),
    ("http://[::1/x", "no address"),
    ("http://127.0.0.1/x", "private network"),
    ("http://localhost/x", "private network"),
    ("http://10.0.0.1/x", "private network"),
    ("http://169.254.169.254/latest", "private network"),
    ("http://[::ffff:192.168.0.1]/x", "private network"),
    ("http://224.0.0.1/x", "private network"),
    ("http://0.0.0.0/x", "private network"),
  ],
)
def test_addresses_that_tables_of_strangers_must_not_reach(url, words, tmp_path) -> None:
  run(tmp_path, [{"url": url}], limits=Limits())
  assert words in why(tmp_path)[1]


def test_private_addresses_are_not_even_asked(tmp_path, serve) -> None:
  server = serve(lambda handler, body: ranged(handler))
  assert run(tmp_path, [{"url": server.address("/f.mp4")}], limits=Limits()).failed == {"hostile_name": 1}
  assert server.seen == []


def test_the_disk_is_bounded(tmp_path, serve) -> None:
  server = serve(lambda handler, body: ranged(handler))
  rows = [{"url": server.address(f"/{k}.mp4")} for k in range(4)]
  limits = dataclasses.replace(LIMITS, total_bytes=int(2.5 * len(BODY)))
  with pytest.raises(DiskFullError, match="more than 2621440 bytes"):
    run(tmp_path, rows, limits=limits, concurrency=1)
  assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) < 2.6 * len(BODY)
  with pytest.raises(DiskFullError, match="bytes left"):
    run(tmp_path, rows, limits=dataclasses.replace(LIMITS, reserve_bytes=2**60))
  assert run(tmp_path, rows).fetched == 2
  small = dataclasses.replace(LIMITS, file_bytes=1000)
  assert run(tmp_path, [{"url": server.address("/large.mp4")}], limits=small).failed == {"unreadable": 1}
  assert why(tmp_path) == ("unreadable", "more than 1000 bytes")


def test_drop_by_drop_ends_at_the_time_limit(tmp_path, serve) -> None:
  def answer(handler: loopback.Handler, body: bytes) -> None:
    handler.say(200, b"", length=10**6, ETag='"v"')
    for _ in range(40):
      time.sleep(0.05)
      handler.wfile.write(b"x")
      handler.wfile.flush()

  server = serve(answer)
  clock = time.monotonic()
  run(tmp_path, [{"url": server.address("/f.mp4")}], limits=dataclasses.replace(LIMITS, seconds=0.5))
  assert why(tmp_path) == ("timeout", "took longer than 0.5 s") and time.monotonic() - clock < 2


def test_hosts_are_treated_politely(tmp_path, serve) -> None:
  def answer(handler: loopback.Handler, body: bytes) -> None:
    time.sleep(0.03)
    handler.say(429, Retry_After="1") if len(handler.server.seen) == 1 else ranged(handler)

  one, two = serve(answer), serve(answer, "127.0.0.2")
  rows = [{"url": server.address(f"/{k}.mp4")} for k in range(5) for server in (one, two)]
  summary = run(tmp_path, rows, concurrency=8, per_host=2, rate=600.0)
  assert summary.fetched == 10 and one.busiest <= 2 and two.busiest <= 2
  times = sorted(seen[-1] for seen in one.seen)
  assert times[-1] - times[0] >= 1.0  # Retry-After held the others too
  later = [b - a for a, b in itertools.pairwise(times) if a > times[0] + 0.9]
  assert min(later) >= 0.05


def test_bandwidth_is_bounded(tmp_path, serve) -> None:
  server = serve(lambda handler, body: ranged(handler))
  clock = time.monotonic()
  run(tmp_path, [{"url": server.address("/f.mp4")}], megabytes_per_second=2.0)
  assert time.monotonic() - clock > 0.8 * len(BODY) / 2e6


def test_a_killed_fetch_resumes_its_part(tmp_path, serve) -> None:
  state = {"hang": True}

  def answer(handler: loopback.Handler, body: bytes) -> None:
    if state["hang"]:
      handler.say(200, BODY[:400_000], length=len(BODY), ETag='"v1"')
      time.sleep(20)
    else:
      ranged(handler)

  server = serve(answer)
  (tmp_path / "t.csv").write_text(f"videoID,url,sha256\nv_0,{server.address('/f.mp4')},{SHA}\n")
  flags = ["fetch", "--table", str(tmp_path / "t.csv"), "--output", str(tmp_path / "out"), "--private", "--json"]
  process = subprocess.Popen([sys.executable, "-m", "kling_jax", *flags], env=os.environ)
  deadline = time.monotonic() + 60
  parts = lambda: [path for path in (tmp_path / "out").glob(".*.part") if path.stat().st_size >= 390_000]
  while not parts() and time.monotonic() < deadline:
    time.sleep(0.02)
  with pytest.raises(DataError, match="another `kling fetch`"):
    fetch.fetch(tmp_path / "t.csv", tmp_path / "out")
  process.send_signal(signal.SIGKILL)
  process.wait()
  [part] = parts()
  have = part.stat().st_size
  with (tmp_path / "out" / "fetched.jsonl").open("w") as file:
    file.write('{"key": "torn')
  state["hang"] = False
  assert cli.main(flags) == 0
  assert server.seen[-1][2]["Range"] == f"bytes={have}-" and len(server.seen) == 2
  assert list(files(tmp_path).values()) == [BODY]


def test_cloud_addresses_go_through_fsspec(tmp_path, monkeypatch) -> None:
  """The protocol s3 is bound to fsspec's file system in memory: what is tested is our side of fsspec, not S3."""

  class File(io.BytesIO):
    """Breaks twice on its way, further on each time."""

    breaks: ClassVar[list[int]] = [300_000, 600_000]

    def read(self, count=-1):
      if self.breaks and self.tell() + count > self.breaks[0]:
        data = super().read(self.breaks[0] - self.tell())
        if data:
          return data
        self.breaks.pop(0)
        raise ConnectionError("cut")
      return super().read(count)

  class Bucket(MemoryFileSystem):
    protocol = "s3"

    @classmethod
    def _strip_protocol(cls, path):
      return "/" + path.removeprefix("s3://").lstrip("/")

    def info(self, path, **options):
      return super().info(path, **options) | {"ETag": "e1"}

    def _open(self, path, *args, **options):
      return File(super()._open(path, *args, **options).getvalue())

  monkeypatch.setattr(Bucket, "store", {})
  fsspec.register_implementation("s3", Bucket, clobber=True)
  try:
    Bucket.store["/bucket/film.mp4"] = MemoryFile(None, "/bucket/film.mp4", BODY)
    rows = [{"url": "s3://bucket/film.mp4", "sha256": SHA}, {"url": "s3://bucket/none.mp4", "sha256": ""}]
    summary = run(tmp_path, rows)
    assert summary.fetched == 1 and summary.failed == {"unreadable": 1}
    assert File.breaks == [] and list(files(tmp_path).values()) == [BODY] and "FileNotFoundError" in why(tmp_path)[1]
  finally:
    fsspec.register_implementation("s3", "s3fs.S3FileSystem", clobber=True)


def test_tables_that_are_none_are_named(tmp_path) -> None:
  (tmp_path / "t.csv").write_text("videoID,link\na,b\n")
  with pytest.raises(DataError, match="no column 'url'"):
    fetch.fetch(tmp_path / "t.csv", tmp_path / "out")
  with pytest.raises(UsageError, match="at least 1"):
    fetch.fetch(tmp_path / "t.csv", tmp_path / "out", fetch.Options(tries=0))
