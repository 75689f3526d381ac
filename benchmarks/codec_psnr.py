"""PSNR of the weightless Haar codec on real footage, and (--fit) the table of coefficient energies that it is built on.

  python benchmarks/codec_psnr.py --videos DIR [--json FILE]     table of (size, fps, codec) -> PSNR in dB
  python benchmarks/codec_psnr.py --videos DIR --fit             the constants `_RMS` of kling_jax/models/latents.py

From each video file directly in DIR two clips of 17 frames are taken (at 10 % and 60 % of what is left after a clip),
at 8 and 16 frames a second, resized to cover the square and cropped at the centre. PSNR is that of 8-bit RGB after
rounding and clipping, per clip, then averaged over clips; `worst` is the poorest clip.
"""

import argparse
import pathlib
import sys

import av
import cv2
import jax
import numpy as np

from kling_jax import files, progress
from kling_jax.models import latents

SETTINGS = [(4, 2, c) for c in (8, 12, 16)] + [(4, 4, c) for c in (8, 14, 16, 18, 23, 27, 32, 48)]
SETTINGS += [(4, 8, c) for c in (32, 48, 64, 96)]
SIZES, RATES, FRAMES, LARGEST, SECONDS = (64, 96, 128), (8, 16), 17, 128, 40


def read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
  """Decodes the first 40 seconds of a video: presentation times in seconds (N,), frames uint8 (N, 128, 128, 3)."""
  times, frames = [], []
  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    for frame in container.decode(stream):
      if frame.time is None:
        continue
      scale = max(LARGEST / frame.height, LARGEST / frame.width)
      width, height = max(LARGEST, round(frame.width * scale)), max(LARGEST, round(frame.height * scale))
      image = cv2.resize(frame.to_ndarray(format="rgb24"), (width, height), interpolation=cv2.INTER_AREA)
      top, left = (height - LARGEST) // 2, (width - LARGEST) // 2
      times.append(frame.time)
      frames.append(image[top : top + LARGEST, left : left + LARGEST])
      if times[-1] - times[0] > SECONDS:
        break
  if len(frames) < FRAMES:
    raise ValueError(f"only {len(frames)} frames")
  return np.array(times) - times[0], np.stack(frames)


def clips(folder: pathlib.Path) -> dict[int, np.ndarray]:
  """Returns {frames a second: uint8 (N, 17, 128, 128, 3)}; files that PyAV cannot read are named and left out."""
  found: dict[int, list[np.ndarray]] = {rate: [] for rate in RATES}
  for path in progress.track(sorted(p for p in folder.iterdir() if p.is_file()), "decode"):
    try:
      times, frames = read(path)
    except (av.FFmpegError, IndexError, ValueError) as error:
      print(f"left out {path.name}: {error}", file=sys.stderr)
      continue
    for rate in RATES:
      span = (FRAMES - 1) / rate
      for start in (0.1, 0.6):
        wanted = start * max(times[-1] - span, 0) + np.arange(FRAMES) / rate
        found[rate].append(frames[np.abs(times[None] - wanted[:, None]).argmin(1)])
  if not found[RATES[0]]:
    raise SystemExit(f"codec_psnr: no readable video in {folder}")
  return {rate: np.stack(group) for rate, group in found.items()}


def resized(group: np.ndarray, size: int) -> np.ndarray:
  if size == LARGEST:
    return group
  shrink = lambda image: cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
  return np.stack([[shrink(image) for image in clip] for clip in group])


def psnr(codec: latents.HaarCodec, group: np.ndarray) -> np.ndarray:
  """Per clip, in dB; clips that come back exactly count as 99 dB."""
  there_and_back = jax.jit(lambda frames: codec.decode(codec.encode(frames)))
  values = []
  for clip in group:
    back = np.asarray(there_and_back(clip[None].astype(np.float32) / 127.5 - 1))[0]
    back = np.clip(np.round((back + 1) * 127.5), 0, 255)
    mse = np.square(back - clip).mean()
    values.append(99.0 if mse == 0 else 10 * np.log10(255**2 / mse))
  return np.array(values)


def fit(groups: dict[int, np.ndarray]) -> np.ndarray:
  """Root mean squares of the coefficients of 4 x 8 x 8 blocks by level, pooled over rates and two sizes: (18, 8).

  The first frame is left out: its block is a repetition without temporal detail.
  """
  space = latents.haar(8)
  basis = np.kron(np.kron(latents.colour(), latents.haar(4)), np.kron(space, space)).astype(np.float32)
  squares = []
  for size in (64, 128):
    for group in groups.values():
      for clip in resized(group, size):
        x = (clip[1:].astype(np.float32) / 127.5 - 1).reshape(-1, 4, size // 8, 8, size // 8, 8, 3)
        blocks = x.transpose(0, 2, 4, 6, 1, 3, 5).reshape(-1, 768)
        squares.append(np.square(blocks @ basis.T, dtype=np.float64).mean(0))
  energy = np.mean(squares, 0).reshape(3, 4, 8, 8)
  for axis, size in ((1, 4), (2, 8), (3, 8)):  # rows of a Haar tree -> their levels
    level = latents.levels(size)
    energy = np.stack([energy.compress(level == k, axis).mean(axis) for k in range(level[-1] + 1)], axis)
  return np.sqrt(energy).reshape(18, 8)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--videos", type=pathlib.Path, required=True, help="folder of video files")
  parser.add_argument("--json", type=pathlib.Path, help="also write the table here")
  parser.add_argument("--fit", action="store_true", help="print the energy table instead")
  arguments = parser.parse_args()
  groups = clips(arguments.videos)
  if arguments.fit:
    for row in fit(groups):
      print("  " + ", ".join(f"{value:.4g}" for value in row) + ",")
    return
  table = []
  print("pixels fps temporal spatial channels fewer x   PSNR  worst")
  for size in SIZES:
    for rate, group in groups.items():
      frames = resized(group, size)
      for temporal, spatial, channels in SETTINGS:
        values = psnr(latents.HaarCodec(temporal, spatial, channels), frames)
        row = {"pixels": size, "fps": rate, "temporal": temporal, "spatial": spatial, "channels": channels}
        row |= {"reduction": 3 * temporal * spatial**2 / channels, "clips": len(values)}
        row |= {"psnr_db": round(float(values.mean()), 2), "worst_db": round(float(values.min()), 2)}
        table.append(row)
        print(f"{size:6} {rate:3} {temporal:8} {spatial:7} {channels:8} {row['reduction']:7.1f}", end=" ")
        print(f"{row['psnr_db']:6.2f} {row['worst_db']:6.2f}", flush=True)
  if arguments.json:
    files.write_json(arguments.json, {"benchmark": "codec_psnr", "frames": FRAMES, "table": table})


if __name__ == "__main__":
  main()
