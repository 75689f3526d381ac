"""`kling sample`: videos from a checkpoint, from text, from an image, or continuing a video."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from kling_jax import progress
from kling_jax.data import conditions as conditions_lib
from kling_jax.data import decode, encode, grid
from kling_jax.data.tokens import ByteTokenizer
from kling_jax.diffusion import guidance
from kling_jax.diffusion.step_cache import schedule
from kling_jax.errors import ConfigError, DataError, UsageError, WeightsError, nearest
from kling_jax.generate import rewrite, step_cache
from kling_jax.interop import lora
from kling_jax.nn import rng
from kling_jax.train import encoders, sharding, task, workdir
from kling_jax.train.checkpoint import Checkpoints

CACHE_ERROR = 0.05  # what it spares and costs: docs/results.md
LEVELS = {"low": 0.0, "mid": 500.0, "high": 1000.0}  # of the normalised score: 1st percentile, middle, 99th


@dataclasses.dataclass(frozen=True)
class Request:
  """One video to make.

  Attributes:
    prompt, negative: text; the negative one stands in for a dropped text in guidance.
    seed: equal seeds with equal conditions give equal videos, in any batch.
    scores: {name: raw value, or "low", "mid", "high"}; absent = not told.
    image, video: path whose picture becomes the first frame, or whose end becomes the start.
  """

  prompt: str
  negative: str = ""
  seed: int = 0
  scores: dict[str, float | str] = dataclasses.field(default_factory=dict)
  image: str | None = None
  video: str | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all videos of one call share; None = the training config's value.

  Attributes:
    frames, height, width: in pixels; fps of the file.
    steps, method, shift, text, scores_scale, image_scale, rescale: of the sampler and the guidance.
    batch: videos a network call; None = as many as there are, at most 8 a device.
    quantize: none, int8 or fp8: how the blocks' products are taken (nn/quantized.py).
    cache: a file that `calibrate` wrote: network calls are skipped as it allows.
    cache_error: how much error a skipped stretch may add up to (diffusion/step_cache.py); 0 skips nothing.
  """

  frames: int | None = None
  height: int | None = None
  width: int | None = None
  fps: float | None = None
  steps: int | None = None
  method: str | None = None
  shift: float | None = None
  text: float | None = None
  scores_scale: float | None = None
  image_scale: float | None = None
  rescale: float | None = None
  batch: int | None = None
  quantize: str | None = None
  cache: str | None = None
  cache_error: float = CACHE_ERROR


class Model:
  """A trained text-to-video model, loaded once."""

  def __init__(self, folder: str | pathlib.Path, step: int | None = None, loras: Sequence[str] = ()):
    """Loads the EMA weights of a work directory's newest (or given) checkpoint, sharded over all devices.

    Args:
      folder: the work directory.
      step: of the checkpoint.
      loras: files of adapters, each FILE or FILE=SCALE, that are merged into the transformer.
    """
    folder = pathlib.Path(folder)
    self.config = workdir.read_config(folder)
    if self.config.task != "video_dit":
      raise UsageError(f"{folder} trained the task {self.config.task!r}; sampling needs a video_dit work directory")
    self.task: Any = task.make(self.config)
    checkpoints = Checkpoints(folder)
    self.step = checkpoints.latest() if step is None else step
    if self.step is None:
      raise WeightsError(f"{folder} holds no complete checkpoint yet")
    self.mesh = sharding.make_mesh({"replica": 1, "fsdp": -1, "context": 1, "tensor": 1})
    placed = sharding.parameter_shardings(self.mesh, self.task.shapes, self.task.axes)
    shapes = {
      name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[name])
      for name, leaf in self.task.shapes.items()
    }
    self.params = checkpoints.restore_params(self.step, shapes)
    self._adapt(loras)
    meta = checkpoints.meta(self.step)
    self.percentiles = conditions_lib.Percentiles.from_json(meta["constants"]["conditions"])
    self._samplers: dict[Any, Any] = {}

  def _adapt(self, loras: Sequence[str]) -> None:
    for source, scale in map(lora.parse, loras):
      adapters, _ = lora.read(source, self.task.dit)
      self.params = lora.merge(self.params, [(adapters, scale)])

  def size(self, settings: Settings) -> tuple[int, int, int]:
    """(frames, height, width) of the videos, checked against codec and patch.

    Raises:
      ConfigError: a size that the codec cannot make; names the nearest legal ones.
    """
    bucket = self.config.data.buckets[0]
    given = (settings.frames, settings.height, settings.width)
    frames, height, width = (a or b for a, b in zip(given, bucket, strict=True))
    codec, patch = self.task.geometry, self.task.dit.patch
    step = codec.temporal * patch[0]
    if (frames - 1) % step:
      low = (frames - 1) // step * step + 1
      raise ConfigError(f"--frames {frames} must be 1 + a multiple of {step}, e.g. {low} or {low + step}")
    for name, value, factor in (("height", height, patch[1]), ("width", width, patch[2])):
      unit = codec.spatial * factor
      if value % unit or value < unit:
        low = max(value // unit, 1) * unit
        raise ConfigError(f"--size: {name} {value} must be a multiple of {unit}, e.g. {low} or {low + unit}")
    return frames, height, width

  def __call__(self, requests: Sequence[Request], settings: Settings = Settings()) -> list[np.ndarray]:
    """Samples one video a request: uint8 (T, H, W, 3) each, in order.

    Raises:
      WeightsError: the step cache of the settings belongs to another checkpoint or sampler.
    """
    recipe, compute_C = self.recipe(settings), None
    if settings.cache is not None:
      ratio_C = step_cache.read(settings.cache, step_cache.owner(self.params, recipe), self.task.calls(recipe))
      compute_C = schedule(ratio_C, settings.cache_error)
    return self._run(requests, settings, recipe, compute_C)[0]

  def calibrate(self, requests: Sequence[Request], settings: Settings, out: str | pathlib.Path) -> list[np.ndarray]:
    """Samples with every network call computed, and writes `out`, the file of a step cache for these settings."""
    recipe = self.recipe(settings)
    compute_C = np.ones(self.task.calls(recipe), bool)
    videos, ratios_CB = self._run(requests, settings, recipe, compute_C)
    step_cache.write(out, step_cache.owner(self.params, recipe), ratios_CB)
    return videos

  def recipe(self, settings: Settings) -> Any:
    """The task's recipe of these settings."""
    return self.task.recipe(
      *self.size(settings), steps=settings.steps, method=settings.method, shift=settings.shift, text=settings.text,
      scores=settings.scores_scale, image=settings.image_scale, rescale=settings.rescale, quantize=settings.quantize,
    )  # fmt: skip

  def _run(
    self, requests: Sequence[Request], settings: Settings, recipe: Any, compute_C: np.ndarray | None
  ) -> tuple[list[np.ndarray], np.ndarray]:
    """Videos in order, and with `compute_C` the ratios (C, B) that the step cache measured."""
    size = recipe.frames, recipe.height, recipe.width
    # All guidance branches of a video are rows of one network call, and it is these that must fill the devices.
    ways = sharding.batch_ways(self.mesh)
    unit = ways // math.gcd(ways, len(guidance.branches(recipe.guidance)))
    rows = settings.batch or min(len(requests), 8 * ways)
    rows = math.ceil(rows / unit) * unit
    negative = any(request.negative for request in requests)
    known = any(request.image or request.video for request in requests)
    cached = compute_C is not None
    key = (recipe, negative, known, cached)
    if key not in self._samplers:
      self._samplers[key] = self.task.sampler(recipe, negative=negative, mesh=self.mesh, cached=cached)
    videos: list[np.ndarray] = []
    ratios = []
    chunks = [requests[start : start + rows] for start in range(0, len(requests), rows)]
    for chunk in progress.track(chunks, "sample"):
      padded = list(chunk) + [chunk[-1]] * (rows - len(chunk))
      batch = self._batch(padded, size, settings.fps or self.config.data.fps, negative, known)
      put = sharding.put_whole if rows % ways else sharding.put_batch
      answer = self._samplers[key](
        self.params, put(self.mesh, batch), self._keys(padded), *((compute_C,) if cached else ())
      )
      frames, ratio_CB = answer if cached else (answer, np.zeros((0, rows)))
      videos += list(np.asarray(frames)[: len(chunk)])
      ratios.append(np.asarray(ratio_CB)[:, : len(chunk)])
    return videos, np.concatenate(ratios, axis=1)

  def _keys(self, requests: Sequence[Request]) -> jax.Array:
    return jax.vmap(lambda seed: rng.sample_keys(jax.random.key(seed), 0, np.zeros(1, np.uint32))[0])(
      np.asarray([request.seed for request in requests], np.uint32)
    )

  def _batch(
    self, requests: Sequence[Request], size: tuple[int, int, int], fps: float, negative: bool, known: bool
  ) -> dict[str, np.ndarray]:
    kind, encode = self._text
    batch: dict[str, np.ndarray] = {}
    batch[kind], batch[f"{kind}_mask"] = encode([self._prompt(request) for request in requests])
    if negative:
      texts = [request.negative for request in requests]
      batch[f"negative_{kind}"], batch[f"negative_{kind}_mask"] = encode(texts)
    rows = [self._scores(request.scores) for request in requests]
    batch["scores"] = np.stack([row[0] for row in rows])
    batch["scores_known"] = np.stack([row[1] for row in rows])
    if known:
      given = [self._given(request, size, fps) for request in requests]
      batch["known_frames"] = np.stack([frames for frames, _ in given])
      batch["known"] = np.stack([mask for _, mask in given])
    return batch

  @functools.cached_property
  def _text(self) -> tuple[str, Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]]:
    """What of a text the model reads ("tokens" or "text"), and what makes it: texts -> (values, mask)."""
    if self.config.text.encoder == "bytes":
      return "tokens", ByteTokenizer(self.config.text.tokens)
    encoder = encoders.text_encoder(self.config)
    return "text", functools.partial(encoders.embed, encoder)

  def _prompt(self, request: Request) -> str:
    """The text that is encoded: the prompt, with the scores behind it where the model reads them there."""
    if self.config.model.told != "caption":
      return request.prompt
    u_M, known_M = self._scores(request.scores)
    told = zip(self.percentiles.names, u_M, known_M, strict=True)
    raw = {name: self.percentiles.raw(name, float(u)) for name, u, known in told if known}
    return self.percentiles.in_caption(request.prompt, raw, room=self.config.text.tokens - 2)

  def _scores(self, scores: dict[str, float | str]) -> tuple[np.ndarray, np.ndarray]:
    """Normalised scores (M,) and which are told (M,): raw values by the stored percentiles, levels as they are."""
    names = self.percentiles.names
    u_M, known_M = np.zeros(len(names), np.float32), np.zeros(len(names), bool)
    for name, value in scores.items():
      if name not in names:
        raise UsageError(f"this model is not told {name!r}{nearest(name, names)}")
      if isinstance(value, str) and value not in LEVELS:
        raise UsageError(f"--{name} {value!r} is neither a number nor one of {', '.join(LEVELS)}")
      u_M[names.index(name)] = LEVELS[value] if isinstance(value, str) else self.percentiles.normalise(name, value)
      known_M[names.index(name)] = True
    return u_M, known_M

  def _given(self, request: Request, size: tuple[int, int, int], fps: float) -> tuple[np.ndarray, np.ndarray]:
    """Known pixels (T, H, W, 3), padded by repetition, and which latent frames they fill (t,)."""
    frames, height, width = size
    codec = self.task.geometry
    latent_frames = codec.latent_shape(*size)[0]
    if request.image:
      start, count = decode.image(request.image, (height, width))[None], 1
    elif request.video:
      count = min(max(self.config.history.frames, 1), latent_frames - 1)
      start = tail(request.video, 1 + codec.temporal * (count - 1), fps, height, width)
    else:
      start, count = np.zeros((1, height, width, 3), np.uint8), 0
    rest = np.repeat(start[-1:], frames - len(start), axis=0)
    return np.concatenate([start, rest]), np.arange(latent_frames) < count


def tail(path: str, count: int, fps: float, height: int, width: int) -> np.ndarray:
  """The last `count` frames of a video at `fps`, uint8 (count, height, width, 3)."""
  info = decode.probe(path)
  last = info.duration_s - 1 / max(info.fps, 1e-6)
  times = last - np.arange(count)[::-1] / fps
  if times[0] < 0:
    raise DataError(f"{path} lasts {info.duration_s:.2f} s; continuing it takes {count} frames at {fps:g} fps")
  return decode.frames_at(path, times, height, width)


def read_prompts(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """Reads a JSONL of requests: a text, or an object with `prompt` and any of negative, seed, scores, image, video.

  Raises:
    DataError: names the line that is not JSON, has no prompt or an unknown key.
  """
  known = {field.name for field in dataclasses.fields(Request)}
  rows = []
  for number, line in enumerate(pathlib.Path(path).read_text(encoding="utf-8").splitlines(), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise DataError(f"{path} line {number} is not JSON: {error}") from error
    row = {"prompt": row} if isinstance(row, str) else row
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
      raise DataError(f'{path} line {number} has no "prompt" text')
    for key in row:
      if key not in known:
        raise DataError(f"{path} line {number}: unknown key {key!r}{nearest(key, known)}")
    rows.append(row)
  if not rows:
    raise DataError(f"{path} holds no prompts")
  return rows


def write(videos: Sequence[np.ndarray], out: str | pathlib.Path, fps: float) -> list[pathlib.Path]:
  """Writes `out` (one video) or `out` with -000, -001, ... before the suffix, and a contact sheet of all as PNG."""
  out = pathlib.Path(out)
  if len(videos) == 1:
    paths = [out]
  else:
    paths = [out.with_name(f"{out.stem}-{number:03d}{out.suffix}") for number in range(len(videos))]
  for path, frames in zip(paths, videos, strict=True):
    encode.write(path, frames, fps=fps)
  sheet = out.with_suffix(".png")
  same = len({frames.shape for frames in videos}) == 1
  rows = np.stack(videos) if same else np.stack([frames[-videos[-1].shape[0] :] for frames in videos])
  grid.write_png(sheet, grid.contact_sheet(rows))
  return [*paths, sheet]


def run(
  folder: str,
  rows: Sequence[dict[str, Any]],
  out: str,
  settings: Settings = Settings(),
  *,
  step: int | None = None,
  rewriter: tuple[str, str] | None = None,
  loras: Sequence[str] = (),
  calibrate: str | None = None,
) -> list[pathlib.Path]:
  """Loads the model, samples the requests `rows` and writes the files.

  Args:
    calibrate: file of a step cache to write, measured on these requests.
    rewriter: (server, model) of a prompt rewriter, or None.
    loras: see `Model`.
  """
  if pathlib.Path(out).suffix.lower() != ".mp4":
    raise UsageError(f"--out {out} must end in .mp4")
  if calibrate and settings.cache:
    raise UsageError("--calibrate_cache measures a run without a cache; leave --cache out")
  if rewriter is not None:
    rows = [{**row, "prompt": rewrite.rewrite(row["prompt"], *rewriter)} for row in rows]
  requests = [Request(**row) for row in rows]
  for request in requests:
    for source in filter(None, (request.image, request.video)):
      if not pathlib.Path(source).is_file():
        raise UsageError(f"there is no file {source}")
  model = Model(folder, step, loras)
  fps = settings.fps or model.config.data.fps
  videos = model.calibrate(requests, settings, calibrate) if calibrate else model(requests, settings)
  return write([_whole(request, video, model, fps) for request, video in zip(requests, videos, strict=True)], out, fps)


def _whole(request: Request, video: np.ndarray, model: Model, fps: float) -> np.ndarray:
  """A continued video starts with its original, at the sampled size and rate."""
  if not request.video:
    return video
  info = decode.probe(request.video)
  known = 1 + model.task.geometry.temporal * (max(model.config.history.frames, 1) - 1)
  last = info.duration_s - 1 / max(info.fps, 1e-6)
  count = int(last * fps) + 1
  times = last - np.arange(count)[::-1] / fps
  before = decode.frames_at(request.video, times, *video.shape[1:3])
  return np.concatenate([before[: max(len(before) - known, 0)], video])
