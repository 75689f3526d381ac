"""What captions, tables, tars and downloads cost on this side of the wire.

  python benchmarks/curation_files.py [--rows 200000] [--clips 64] [--megabytes 256] [--json OUT]

Everything runs against servers on loopback and files in a temporary folder: a released table streamed into its index of
spans (rows/s, peak memory of a process), `kling caption` against a server that answers at once (clips/s: 8 frames of
512 pixels sampled and sent), a set written as WebDataset and read back (MB/s), a file fetched (MB/s).
"""

import argparse
import csv
import dataclasses
import http.server
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import cv2
import numpy as np

from kling_jax.curation import caption
from kling_jax.data import encode, export, fetch, koala, record, records
from kling_jax.data.download import Limits
from kling_jax.data.webdataset import WebDatasetSource


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers chat completions with six parts, and everything else with the server's payload."""

  protocol_version = "HTTP/1.1"

  def do_POST(self) -> None:
    self.rfile.read(int(self.headers["Content-Length"]))
    parts = json.dumps(dict.fromkeys(record.CAPTION_FIELDS, "A sentence of some length, as models write them."))
    usage = {"prompt_tokens": 4000, "completion_tokens": 200}
    self.say(json.dumps({"choices": [{"message": {"content": parts}}], "usage": usage}).encode())

  def do_GET(self) -> None:
    self.say(self.server.payload)

  def say(self, body: bytes) -> None:
    self.send_response(200)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_: object) -> None:
    return


def table(where: pathlib.Path, rows: int) -> dict[str, Any]:
  """Streams a table of Koala's form; one row in ten names a video that is here."""
  (where / "videos").mkdir()
  for k in range(10):
    (where / "videos" / f"here{k}.mp4").write_bytes(b"")
  words = "The camera follows a red kite over the sea while the light of the evening fades. " * 15
  with (where / "Koala.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow(koala.COLUMNS)
    for k in range(rows):
      name = f"here{k % 10}" if k % 10 == 0 else f"gone{k % 1000}"
      span = koala.format_span(k % 600, k % 600 + 8.5)
      writer.writerow([f"{name}_{k}", "https://www.youtube.com/watch?v=x", span, words, 0.9, 5.1, 12.0, 3.9])
  code = (
    "import pathlib, resource, sys, time; from kling_jax.curation import inputs\n"
    "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; clock = time.perf_counter()\n"
    "found = inputs.find(sys.argv[1], pathlib.Path(sys.argv[2]), method='table', videos=sys.argv[3])\n"
    "print(found.counts.rows, time.perf_counter() - clock, base, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
  )
  command = [sys.executable, "-c", code, str(where / "Koala.csv"), str(where / "index"), str(where / "videos")]
  told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
  count, seconds, before, peak = map(float, told)
  megabytes = (where / "Koala.csv").stat().st_size / 1e6
  return {"rows": int(count), "table_mb": megabytes, "rows_per_s": count / seconds, "mb_per_s": megabytes / seconds,
          "import_mib": before / 1024, "peak_mib": peak / 1024}  # fmt: skip


def clip_set(where: pathlib.Path, clips: int) -> pathlib.Path:
  """A set of `clips` clips of 4 s at 720p (one clip under different names)."""
  rng = np.random.default_rng(0)
  texture = cv2.resize(rng.integers(0, 255, (51, 86, 3), np.uint8), (1376, 816), interpolation=cv2.INTER_CUBIC)
  media = encode.encode((texture[k : k + 720, k : k + 1280] for k in range(96)), fps=24)
  with records.RecordWriter(where / "set", "benchmark") as writer:
    for k in range(clips):
      span = 96 * k, 96 * k + 96
      writer.write(record.ClipRecord(f"{k:032x}", "v", "/v.mp4", *span, "1/24", 24.0, 1280, 720, 96, k), media)
  return where / "set"


def captions(folder: pathlib.Path, address: str, clips: int) -> dict[str, Any]:
  """`kling caption` with a server that answers at once, and again from its journal."""
  options = caption.Options(captioners=["server"], server=address, model="m", concurrency=4)
  clock = time.perf_counter()
  summary = caption.run(folder, options)
  first = time.perf_counter() - clock
  assert summary.captioned == {"server": clips}, summary
  clock = time.perf_counter()
  caption.run(folder, dataclasses.replace(options, again=True))
  again = time.perf_counter() - clock
  return {"clips": clips, "clips_per_s": clips / first, "from_journal_clips_per_s": clips / again}


def tars(folder: pathlib.Path, where: pathlib.Path) -> dict[str, Any]:
  """Writes the set as WebDataset and opens it."""
  clock = time.perf_counter()
  done = export.webdataset(folder, where / "tars")
  write = time.perf_counter() - clock
  clock = time.perf_counter()
  source = WebDatasetSource(where / "tars")
  for index in range(len(source)):
    source.media(index)
  return {"mb": done.bytes / 1e6, "write_mb_per_s": done.bytes / 1e6 / write,
          "read_mb_per_s": done.bytes / 1e6 / (time.perf_counter() - clock)}  # fmt: skip


def downloads(where: pathlib.Path, address: str) -> dict[str, Any]:
  """Fetches four files at once."""
  (where / "t.csv").write_text("url\n" + "".join(f"{address}/{k}.mp4\n" for k in range(4)))
  clock = time.perf_counter()
  summary = fetch.fetch(where / "t.csv", where / "fetched", fetch.Options(limits=Limits(private=True)))
  assert summary.fetched == 4, summary
  return {"mb": summary.bytes / 1e6, "mb_per_s": summary.bytes / 1e6 / (time.perf_counter() - clock)}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rows", type=int, default=200_000)
  parser.add_argument("--clips", type=int, default=64)
  parser.add_argument("--megabytes", type=int, default=256, help="of the four files that are fetched")
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  server.payload = bytes(args.megabytes * 250_000)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  address = f"http://127.0.0.1:{server.server_port}"
  answers: dict[str, dict[str, Any]] = {}
  with tempfile.TemporaryDirectory() as temporary:
    where = pathlib.Path(temporary)
    answers["table"] = table(where, args.rows)
    folder = clip_set(where, args.clips)
    answers["captions"] = captions(folder, address, args.clips)
    answers["webdataset"] = tars(folder, where)
    answers["fetch"] = downloads(where, address)
  answers["process"] = {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
  for name, values in answers.items():
    print(f"{name:>12}: " + ", ".join(f"{key} {value:,.1f}" for key, value in values.items()))
  if args.json:
    args.json.write_text(json.dumps(answers, indent=1))


if __name__ == "__main__":
  main()
