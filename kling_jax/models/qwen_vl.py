"""Qwen3-VL: the vision tower's tokens stand in the text where their placeholders do, with three positions each."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kling_jax.errors import ConfigError
from kling_jax.models.language_model import Cache, LanguageModel
from kling_jax.models.language_model import Shape as LanguageShape
from kling_jax.models.qwen_vision import QwenVision, QwenVisionConfig


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
  """Sizes of both parts, and the placeholders of picture and video tokens."""

  language: LanguageShape
  vision: QwenVisionConfig
  picture_token: int = 151655
  video_token: int = 151656

  def __post_init__(self):
    if self.vision.out_width != self.language.width or len(self.vision.deep) > self.language.depth:
      raise ConfigError("Qwen3-VL: the tower's tokens do not fit the language model")


class QwenVL(nnx.Module):
  """`vision` and `language`."""

  def __init__(self, config: QwenVLConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.vision = QwenVision(config.vision, rngs=rngs)
    self.language = LanguageModel(config.language, rngs=rngs)

  def __call__(
    self,
    tokens_BL: jax.Array,
    seen_BND: jax.Array,
    deep_SBND: jax.Array,
    positions_3BL: jax.Array,
    *,
    real_BL: jax.Array | None = None,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Hidden vectors (B, L, D) and the cache, see `LanguageModel`.

    Args:
      tokens_BL: text, with a placeholder for each token of a picture or a video.
      seen_BND, deep_SBND: what `vision` made of a row's pictures, in order; rows with fewer tokens are padded behind.
      positions_3BL: see `positions`.
    """
    config = self.config
    held_BL = (tokens_BL == config.picture_token) | (tokens_BL == config.video_token)
    place_BL = jnp.clip(jnp.cumsum(held_BL, axis=1) - 1, 0)
    at = lambda x_BND: jnp.take_along_axis(x_BND, place_BL[..., None], axis=1)
    text_BLD = self.language.embed_text(tokens_BL, dtype=seen_BND.dtype)
    x_BLD = jnp.where(held_BL[..., None], at(seen_BND), text_BLD)
    added_SBLD = jax.vmap(lambda deep_BND: jnp.where(held_BL[..., None], at(deep_BND), 0))(deep_SBND)
    added = added_SBLD if config.vision.deep else None
    return self.language(x_BLD, positions=positions_3BL, real_BL=real_BL, cache=cache, added_SBLD=added)


def positions(config: QwenVLConfig, tokens_L: np.ndarray, grids: Sequence[tuple[int, int, int]]) -> np.ndarray:
  """Positions int32 (3, L) of time, row and column of one text without padding.

  Text counts on in all three. A frame of a picture or video stands at one time, its tokens at their rows and columns,
  all counted from where the text stood; text behind it goes on after the longer side. Frames of a video are runs of
  placeholders of their own, with their time written between them as text.

  Args:
    tokens_L: with placeholders.
    grids: tokens in (frame, row, column) of each run of placeholders, one frame each for a video.

  Raises:
    ConfigError: runs of placeholders that do not match the grids.
  """
  held_L = np.isin(tokens_L, (config.picture_token, config.video_token))
  found, start, place, run = [], 0, 0, 0
  while place < len(tokens_L):
    if not held_L[place]:
      found.append(np.full((3, 1), start))
      place, start = place + 1, start + 1
      continue
    if run == len(grids) or not held_L[place : place + int(np.prod(grids[run]))].all():
      raise ConfigError(f"placeholders at token {place} do not match the grids {list(grids)}")
    found.append(start + np.indices(grids[run]).reshape(3, -1))
    place, start, run = place + int(np.prod(grids[run])), start + max(grids[run][1:]), run + 1
  if run != len(grids):
    raise ConfigError(f"{len(grids)} grids, but placeholders for {run}")
  return np.concatenate(found, axis=1).astype(np.int32)
