"""Host memory of streaming a checkpoint of published shape onto a mesh: its peak, a parameter at a time.

  python benchmarks/stream_weights.py [--size 14b] [--depth N] [--dtype bfloat16] [--json OUT]

A checkpoint of Wan 2.1's shape in diffusers' names is made of sparse files (14B in bfloat16: 28 GB in seven files, no
room on the disk), and every parameter of our VideoDiT is loaded from it onto eight fake CPU devices under the trainer's
own sharding table, and dropped again. On such a mesh the devices' memory is the host's: `peak` is what the process took
on top of what it had before the parameter, arrays included; `staging` is what of it the arrays do not account for. The
exit code is 1 where the largest peak is above 1.2 times the largest parameter.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import pathlib
import struct
import sys
import tempfile
import threading
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import numpy as np
from flax import nnx

from kling_jax.interop import detect, names, safetensors, wan_dit
from kling_jax.models import video_dit
from kling_jax.nn import params as params_lib
from kling_jax.train import sharding

FILES = 7  # shards of the published 14B
BOUND = 1.2


def sparse_checkpoint(folder: pathlib.Path, config: video_dit.VideoDiTConfig, shapes: dict) -> int:
  """Writes headers and holes; returns the bytes that they stand for."""
  low = {path: jax.ShapeDtypeStruct(leaf.shape, jax.numpy.bfloat16) for path, leaf in shapes.items()}
  tensors = names.outward(low, wan_dit.entries(config))
  parts = np.array_split(np.array(sorted(tensors)), FILES)
  place, total = {}, 0
  for number, part in enumerate(parts, 1):
    file = f"diffusion_pytorch_model-{number:05d}-of-{len(parts):05d}.safetensors"
    header, offset = {}, 0
    for name in map(str, part):
      end = offset + 2 * tensors[name].size
      header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [offset, end]}
      offset, place[name] = end, file
    text = json.dumps(header).encode()
    with (folder / file).open("wb") as out:
      out.write(struct.pack("<Q", len(text)) + text)
      out.truncate(8 + len(text) + offset)
    total += offset
  index = {"metadata": {"total_size": total}, "weight_map": place}
  (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
  (folder / "config.json").write_text(json.dumps(wan_dit.config_json(config)))
  return total


def anonymous() -> int:
  """Bytes of this process that no file backs."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith("RssAnon:"):
      return 1024 * int(line.split()[1])
  raise OSError("this system does not tell RssAnon")


class Peak:
  """The largest `anonymous()` while the block runs, looked at every 2 ms."""

  def __enter__(self) -> "Peak":
    ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what is taken
    self.before = self.most = anonymous()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def _watch(self) -> None:
    while not self._stop.wait(0.002):
      self.most = max(self.most, anonymous())

  def __exit__(self, *_: object) -> None:
    self.most = max(self.most, anonymous())
    self._stop.set()
    self._thread.join()


def forget(folder: pathlib.Path) -> None:
  """Gives the files' pages back to the system, so that a run does not push out what others keep there."""
  for path in folder.glob("*.safetensors"):
    with path.open("rb") as file:
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(size: str, depth: int | None, dtype: str, folder: pathlib.Path) -> dict:
  """Loads each parameter by itself; returns the figures."""
  config = video_dit.preset(size, conditions=(), remat="none")
  config = config if depth is None else dataclasses.replace(config, depth=depth)
  _, shapes, axes = params_lib.abstract(lambda: video_dit.VideoDiT(config, rngs=nnx.Rngs(0)))
  total = sparse_checkpoint(folder, config, shapes)
  mesh = sharding.make_mesh({"replica": 1, "fsdp": -1, "context": 1, "tensor": 1})
  placed = sharding.parameter_shardings(mesh, shapes, axes)
  found = detect.recognise(folder)
  assert found is not None and found.config == config
  rows = []
  start = time.perf_counter()
  for path, leaf in sorted(shapes.items(), key=lambda item: item[1].size):
    wanted = {path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=placed[path])}
    with Peak() as peak:
      loaded, _ = safetensors.load_into(wanted, folder, found.name_map, allow_unexpected=["*"])
    own = loaded[path].nbytes
    rows.append({"path": path, "bytes": own, "peak": peak.most - peak.before, "staging": peak.most - peak.before - own})
    del loaded
    forget(folder)
  largest = max(row["bytes"] for row in rows)
  return {
    "size": size, "depth": config.depth, "dtype": dtype, "checkpoint_bytes": total, "largest_parameter_bytes": largest,
    "peak_bytes": max(row["peak"] for row in rows), "staging_bytes": max(row["staging"] for row in rows),
    "ratio": max(row["peak"] for row in rows) / largest, "seconds": time.perf_counter() - start, "rows": rows,
  }  # fmt: skip


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="14b")
  parser.add_argument("--depth", type=int, help="fewer blocks, for a small machine")
  parser.add_argument("--dtype", default="bfloat16", help="of the parameters")
  parser.add_argument("--json")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    told = measure(args.size, args.depth, args.dtype, pathlib.Path(folder))
  for row in told["rows"][-6:]:
    print(f"{row['path']:34} {row['bytes'] / 2**20:9.0f} MiB, peak {row['peak'] / 2**20:9.0f}, "
          f"staging {row['staging'] / 2**20:8.0f}")  # fmt: skip
  print(
    f"{told['size']} with {told['depth']} blocks, {told['checkpoint_bytes'] / 1e9:.1f} GB as {told['dtype']}: peak of "
    f"anonymous memory {told['ratio']:.3f} of the largest parameter ({told['largest_parameter_bytes'] / 2**30:.2f} "
    f"GiB), {told['staging_bytes'] / 2**30:.2f} GiB of it beyond the arrays; {told['seconds']:.0f} s"
  )
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(told, indent=1) + "\n")
  return 0 if told["ratio"] <= BOUND else 1


if __name__ == "__main__":
  sys.exit(main())
