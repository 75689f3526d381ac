"""A captioner of our own weights: models/captioner.py, as `python -m kling_jax.train.tasks.captioner` writes it."""

import functools
import json
import os
import pathlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kling_jax.data import caption as caption_lib
from kling_jax.data import caption_lines
from kling_jax.data.caption import Caption
from kling_jax.data.source import ClipSource
from kling_jax.data.tokens import ByteTokenizer
from kling_jax.errors import WeightsError
from kling_jax.interop import safetensors
from kling_jax.models.captioner import Captioner, Shape, pixels
from kling_jax.nn import params as params_lib

NAME = "local"
CARD = "captioner.json"  # beside the weights: the sizes


class Local:
  """Implements `caption.Captioner`; what it writes is a function of the frames.

  Attributes:
    shape: its sizes.
    model: "captioner-" and the fingerprint of the weights.
  """

  name = NAME

  def __init__(self, folder: str | os.PathLike[str]):
    """Reads the weights of `folder`.

    Raises:
      WeightsError: no captioner lies there.
    """
    folder = pathlib.Path(folder)
    try:
      self.shape = Shape.from_json(json.loads((folder / CARD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
      raise WeightsError(
        f"{folder} holds no captioner ({error}); write one by `python -m kling_jax.train.tasks.captioner RUN {folder}`"
      ) from error
    init = lambda: Captioner(self.shape, rngs=nnx.Rngs(params=jax.random.key(0)))
    self._graph, shapes, _ = params_lib.abstract(init)
    self._params, _ = safetensors.load_into(shapes, folder)
    self.model = f"captioner-{safetensors.fingerprint(folder)[:12]}"
    self._turn = threading.Lock()

  def caption(self, source: ClipSource, index: int) -> Caption:
    """The caption of clip `index`; a clip that is too short for the frame rate is looked at in equal steps."""
    shape = self.shape
    duration_s = source.info(index).duration_s
    span_s = min(shape.frames / shape.fps, duration_s)
    times_s = (duration_s - span_s) / 2 + (np.arange(shape.frames) + 0.5) / shape.frames * span_s
    frames_THWC = source.frames(index, times_s, shape.size, shape.size)
    return caption_lib.of_parts(self.write(frames_THWC[None])[0], captioner=NAME, model=self.model)

  def write(self, frames_BTHWC: np.ndarray) -> list[dict[str, str]]:
    """{part: text} of each row of frames, uint8."""
    with self._turn:  # one at a time: more threads would only share the same cores
      tokens_BL = np.asarray(self._write(self._params, jnp.asarray(frames_BTHWC)))
    tokenizer = ByteTokenizer(self.shape.max_text)
    return [caption_lines.parts_of(tokenizer.decode(tokens_L)) for tokens_L in tokens_BL]

  @functools.cached_property
  def _write(self):
    @jax.jit
    def run(params, frames_BTHWC):
      return params_lib.merge(self._graph, params).write(pixels(frames_BTHWC))

    return run
