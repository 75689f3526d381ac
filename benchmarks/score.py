"""What measuring costs beside decoding: CPU milliseconds a clip for each scorer, and the share of its bare decode.

    python benchmarks/score.py ../shared/videos --json score.json
    python benchmarks/score.py ../shared/videos --overlays       how much of written lines and marks is found instead
    python benchmarks/score.py ../shared/videos --vtss --limit 4      clips a second with a VTSS, fast and whole

Every video of the folder of at most 20 s is a clip. "bare decode" reads all its frames and looks at none; "decode" is
the one pass that all scorers share (frames, luma, thumbnails and motion vectors taken along). One process, one thread.

With --overlays, white lines with a dark outline, of three heights, and a mark in a corner are written over the luma of
each video; `text` and `watermark` before and after tell what they find.

With --vtss, wall time of a clip on all cores: decoding, sub-metrics, the model of sub-metrics alone, and TSA at the
paper's size with random weights, once in JAX and once of torchvision's Video Swin-T and ConvNeXt-T in the same process
(whole frames: no gates, which torchvision has not). Needs torch and torchvision.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from kling_jax import measure
from kling_jax.data import container, decode, folder, reasons
from kling_jax.measure import sample, text, watermark


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--scorers", default="default", help="as of kling score")
  parser.add_argument("--overlays", action="store_true", help="accuracy of text and watermark instead of time")
  parser.add_argument("--vtss", action="store_true", help="time of suitability scores instead")
  parser.add_argument("--mosaics", type=int, default=1, help="of a clip, with --vtss (the paper's: 4)")
  parser.add_argument("--limit", type=int, default=12, help="clips")
  parser.add_argument("--json", type=pathlib.Path)
  args = parser.parse_args()
  cv2.setNumThreads(1)
  if args.overlays:
    overlays(args.folder, args.limit)
    return
  if args.vtss:
    suitability(args.folder, args.limit, args.mosaics)
    return
  scorers = measure.chosen(args.scorers.split(","))
  rows = []
  for path in folder.find_videos(args.folder):
    try:
      info = decode.probe(path, decode=False)
    except reasons.MediaError:
      continue
    if info.duration_s > sample.WHOLE_S or info.num_frames < 24 or len(rows) == args.limit:
      continue
    measure.score_media(path, scorers)  # the first call of everything, and the file into memory
    with container.open_video(path) as video:
      bare, frames = timed(lambda video=video: sum(1 for _ in video.frames()))
    timings = {}
    timings["decode"], seen = timed(lambda path=path: sample.of_media(path))
    for scorer in scorers:
      timings[scorer.name], _ = timed(lambda scorer=scorer, seen=seen: scorer.measure(seen))
    name = pathlib.Path(path).name
    rows.append({"clip": name, "height": info.height, "frames": frames, "bare_decode": bare, **timings})
  names = ["bare_decode", "decode", *(scorer.name for scorer in scorers)]
  print(f"{len(rows)} clips, median CPU ms a clip:")
  for name in names:
    print(f"  {name:<28}{1e3 * statistics.median(row[name] for row in rows):8.1f}")
  measuring = [sum(row[scorer.name] for scorer in scorers) for row in rows]
  shares = [
    (row["decode"] - row["bare_decode"] + m) / row["bare_decode"] for row, m in zip(rows, measuring, strict=True)
  ]
  print(f"  {'all scorers':<28}{1e3 * statistics.median(measuring):8.1f}")
  print(f"measuring beside bare decoding: {statistics.median(shares):.2f} of it (median), {max(shares):.2f} at most")
  if args.json:
    args.json.write_text(json.dumps({"clips": rows, "share": shares}, indent=1) + "\n", encoding="utf-8")


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
  """(CPU seconds of this process, the result): other work on the machine does not count."""
  clock = time.process_time()
  answer = call()
  return time.process_time() - clock, answer


def suitability(top: pathlib.Path, limit: int, mosaics: int) -> None:
  """Prints seconds and clips a second of the parts of a VTSS."""
  import jax
  import jax.numpy as jnp
  import torch
  import torchvision
  from flax import nnx

  from kling_jax.measure import fragments, vtss
  from kling_jax.models import tsa, video_swin
  from kling_jax.nn import params as params_lib

  plan = fragments.Plan(mosaics=mosaics)
  shape = dataclasses.replace(tsa.PRESETS["tiny"], swin=video_swin.PRESETS["tiny"])
  graph, _, _ = params_lib.abstract(lambda: tsa.TSA(shape, rngs=nnx.Rngs(params=jax.random.key(0))))
  params = params_lib.create(lambda: tsa.TSA(shape, rngs=nnx.Rngs(params=jax.random.key(0))))
  network = jax.jit(lambda params, *inputs: params_lib.merge(graph, params)(*inputs))
  swin, convnext = torchvision.models.video.swin3d_t().eval(), torchvision.models.convnext_tiny().eval()
  model = vtss.load(vtss.SHIPPED)
  names = ("decode", "sub-metrics", "fast model", "network, JAX", "network, PyTorch")
  taken: dict[str, list[float]] = {name: [] for name in names}

  def clock(name: str, call: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    answer = call()
    taken[name].append(time.perf_counter() - start)
    return answer

  def theirs(pixels: np.ndarray, image: np.ndarray) -> None:
    with torch.no_grad():
      swin(torch.from_numpy(pixels[0].transpose(0, 4, 1, 2, 3).copy()))
      convnext(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))

  warm = False
  for path in folder.find_videos(top):
    try:
      info = decode.probe(path, decode=False)
    except reasons.MediaError:
      continue
    if not 2 < info.duration_s <= sample.WHOLE_S or info.num_frames < 24 or len(taken["decode"]) == limit:
      continue
    seen = clock("decode", lambda path=path: sample.of_media(path, (plan, 0)))
    scores = clock("sub-metrics", lambda seen=seen: measure.measured(seen, measure.SCORERS[:-1]))
    clock("fast model", lambda seen=seen, scores=scores: model.vtss(seen, scores))
    pixels = fragments.normalised(seen.mosaics_QTHWC)[None]
    image = fragments.normalised(vtss.picture_of(seen, plan))[None]
    features = jnp.asarray(model.inputs(seen, scores)["features"])[None]
    if not warm:
      network(params, pixels, image, features).block_until_ready()
      theirs(pixels, image)
    warm = True
    clock("network, JAX", lambda a=pixels, b=image, c=features: network(params, a, b, c).block_until_ready())
    clock("network, PyTorch", lambda a=pixels, b=image: theirs(a, b))
  median = {name: statistics.median(values) for name, values in taken.items()}
  print(f"{len(taken['decode'])} clips, {mosaics} mosaics of 32 x 224 x 224 each, median seconds a clip:")
  for name, value in median.items():
    print(f"  {name:<20}{value:9.4f}")
  shared = median["decode"] + median["sub-metrics"]
  for name, cost in (("fast", median["fast model"]), ("whole", median["network, JAX"])):
    print(
      f"{name}: {1 / (shared + cost):.2f} clips/s, decode {100 * median['decode'] / (shared + cost):.0f} % of the time"
    )
  print(f"network beside PyTorch's: {median['network, JAX'] / median['network, PyTorch']:.2f} times its time")


def overlays(top: pathlib.Path, limit: int) -> None:
  """Prints the share of written areas that is found, by height of the letters, and how many marks are."""
  found: dict[int, list[float]] = {16: [], 24: [], 40: []}
  without, marks = [], []
  for path in folder.find_videos(top)[:limit]:
    try:
      seen = sample.of_media(path)
    except reasons.MediaError:
      continue
    if len(seen.luma) < sample.PLACES:
      continue
    without.append(text.text(seen)["text"])
    for height, shares in found.items():
      box, written = _written(seen, "SUBSCRIBE to my channel", height, 0.1, 0.8)
      true = text.area(np.array([box]), seen.luma[0].shape)
      shares.append(max(0.0, text.text(written)["text"] - without[-1]) / true)
    if "watermark" in watermark.watermark(seen):
      box, written = _written(seen, "TV 7", 30, 0.85, 0.12)
      true = text.area(np.array([box]), seen.luma[0].shape)
      marks.append((watermark.watermark(seen)["watermark"], watermark.watermark(written).get("watermark", 0.0) / true))
  print(f"{len(without)} videos; text before any was written above 0.02 on {sum(value > 0.02 for value in without)}")
  for height, shares in found.items():
    middle, most = statistics.median(shares), sum(share > 0.5 for share in shares)
    print(f"  letters of {height} pixels: found area / true {middle:.2f} (median), above a half on {most}")
  hits, early = sum(share > 0.5 for _, share in marks), sum(before > 0 for before, _ in marks)
  print(f"marks: {hits} of {len(marks)} found where it can be told; on {early} before any was written")


def _written(seen: sample.Sample, words: str, height: int, x: float, y: float) -> tuple[tuple, sample.Sample]:
  """The box of the words, and the sample with them over its luma; letters of `height` pixels at 480, at (x, y)."""
  shape = seen.luma[0].shape
  scale = height * min(shape) / 480 / 22.0  # of the font's capitals
  corner = (round(x * shape[1]), round(y * shape[0]))
  letters = np.zeros(shape, np.uint8)
  cv2.putText(letters, words, corner, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, 1, cv2.LINE_AA)
  outline = cv2.dilate(letters, np.ones((5, 5), np.uint8)).astype(np.float32)[..., None] / 255
  ink = letters.astype(np.float32)[..., None] / 255
  over = lambda luma: ((luma[..., None] * (1 - outline) * (1 - ink) + 250 * ink)[..., 0]).astype(np.uint8)
  rows, columns = np.nonzero(letters)
  box = int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
  changed = {"luma": [over(luma) for luma in seen.luma], "later": [over(luma) for luma in seen.later]}
  return box, dataclasses.replace(seen, **changed)


if __name__ == "__main__":
  main()
