"""The curation chain on a folder of videos: clips a second, time by stage, peak memory; and on films of any length.

    python benchmarks/curate.py ../shared/videos                a folder, as `kling curate` does it
    python benchmarks/curate.py ../shared/videos --no_copy      the same, with every clip encoded anew
    python benchmarks/curate.py --minutes 5 60                  one synthetic film of each length: does memory grow?

A film is one 30-second film of the procedural world (320 x 180, 25 fps), its packets repeated. Peak memory is the
largest resident size (VmHWM) of any one process; the sum over the driver and its workers stands beside it.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import av

from kling_jax.curation.funnel import Funnel
from kling_jax.data import films


def curate(videos: pathlib.Path, workers: int, flags: list[str]) -> dict:
  """Runs `kling curate` in a process of its own; returns what it cost."""
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder) / "set"
    command = [sys.executable, "-m", "kling_jax", "curate", "--input", str(videos), "--output", str(output)]
    clock = time.perf_counter()
    process = subprocess.Popen([*command, "--workers", str(workers), "--no_report", *flags], stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    peaks: dict[int, int] = {}
    watcher = threading.Thread(target=_watch, args=(process, peaks))
    watcher.start()
    code = process.wait()
    wall_s = time.perf_counter() - clock
    watcher.join()
    if code:
      raise SystemExit(f"kling curate failed with exit code {code}")
    funnel = Funnel.of_set(output, wall_s)
    return {
      "videos": funnel.videos,
      "quarantined": sum(funnel.quarantined.values()),
      "clips": funnel.clips,
      "seconds_of_video": round(funnel.seconds, 1),
      "wall_s": round(wall_s, 1),
      "clips_per_s": round(funnel.clips / wall_s, 3),
      "video_seconds_per_s": round(funnel.seconds / wall_s, 2),
      "stage_s": {stage: round(seconds, 1) for stage, seconds in funnel.timings.items()},
      "peak_mib": round(max(peaks.values()) / 1024),
      "peak_mib_of_all": round(sum(peaks.values()) / 1024),
      "set_mib": round(sum(path.stat().st_size for path in (output / "records").iterdir()) / 2**20, 1),
    }


def _watch(process: subprocess.Popen, peaks: dict[int, int]) -> None:
  """Keeps the peak resident size (KiB) of a process and its children while it lives."""
  while process.poll() is None:
    for status in pathlib.Path("/proc").glob("[0-9]*/status"):
      try:
        values = dict(line.split(":", 1) for line in status.read_text().splitlines())
      except (FileNotFoundError, ProcessLookupError):
        continue
      pid = int(status.parent.name)
      if "VmHWM" in values and (pid == process.pid or int(values["PPid"]) == process.pid):
        peaks[pid] = max(peaks.get(pid, 0), int(values["VmHWM"].split()[0]))
    time.sleep(0.1)


def film(path: pathlib.Path, minutes: float) -> None:
  """A film of so many minutes, by repeating the packets of one of half a minute."""
  with tempfile.TemporaryDirectory() as folder:
    films.render_films(pathlib.Path(folder), count=1, seconds=30.0, size=(180, 320), seed=0)
    [source] = pathlib.Path(folder).glob("*.mp4")
    with av.open(str(path), "w") as out:
      stream, at = None, 0
      for _ in range(round(2 * minutes)):
        with av.open(str(source)) as file:
          track = file.streams.video[0]
          stream = stream or out.add_stream_from_template(track, opaque=True)
          end = 0
          for packet in file.demux(track):
            if packet.dts is None or packet.pts is None:
              continue
            end = max(end, packet.pts + (packet.duration or 0))
            packet.pts, packet.dts, packet.stream = packet.pts + at, packet.dts + at, stream
            out.mux(packet)
          at += end


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("videos", nargs="?", type=pathlib.Path)
  parser.add_argument("--minutes", type=float, nargs="*", default=[])
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--no_copy", action="store_true")
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  flags = ["--no_copy"] if args.no_copy else []
  rows = {}
  if args.videos:
    rows[str(args.videos.name)] = curate(args.videos, args.workers, flags)
  for minutes in args.minutes:
    with tempfile.TemporaryDirectory() as folder:
      film(pathlib.Path(folder) / "film.mp4", minutes)
      rows[f"{minutes:g} min"] = curate(pathlib.Path(folder), 1, flags)
  for name, row in rows.items():
    print(name, json.dumps(row))
  if args.json:
    args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
  main()
