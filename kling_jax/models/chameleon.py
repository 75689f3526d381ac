"""Chameleon (arXiv 2405.09818): one decoder over text and over the codes of pictures."""

import dataclasses

import jax
from flax import nnx

from kling_jax.models.language_model import LanguageModel
from kling_jax.models.language_model import Shape as LanguageShape
from kling_jax.models.vq_image import VQImage, VQImageConfig


@dataclasses.dataclass(frozen=True)
class ChameleonConfig:
  """Sizes of both parts; `language.frame_codes` codes begin at token `language.first_code`."""

  language: LanguageShape
  pictures: VQImageConfig


class Chameleon(nnx.Module):
  """`pictures` (to codes) and `language`; a picture of a prompt stands between a begin and an end token of its own."""

  def __init__(self, config: ChameleonConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.pictures = VQImage(config.pictures, rngs=rngs)
    self.language = LanguageModel(config.language, rngs=rngs)

  def picture_tokens(self, pictures_BHWC: jax.Array) -> jax.Array:
    """The tokens (B, N) that a picture in [-1, 1] is in a prompt."""
    return self.config.language.first_code + self.pictures(pictures_BHWC)
