"""VideoMAE's encoder (Tong et al. 2022): tubes of two frames to tokens; the features of Frechet video distances."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from kling_jax.errors import DataError
from kling_jax.models import vit
from kling_jax.nn.embed import PatchEmbedding
from kling_jax.nn.norm import LayerNorm

MEAN = (0.485, 0.456, 0.406)  # of R, G, B in 0..1, as it was trained
DEVIATION = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Shape:
  """The sizes of an encoder; Base is Shape(Blocks(768, 12, 12, 3072, epsilon=1e-12), 16, 2, 16, 224, "mean").

  Attributes:
    blocks: its transformer.
    patch, tube: pixels of a patch's side, frames of a tube.
    frames, image: of the videos, always these: positions are fixed.
    norm: "mean" (fine-tuned weights: after the mean over tokens), "tokens" (pretrained ones: before it) or "none".
  """

  blocks: vit.Blocks
  patch: int
  tube: int
  frames: int
  image: int
  norm: str

  @property
  def tokens(self) -> int:
    return (self.frames // self.tube) * (self.image // self.patch) ** 2


class VideoMae(nnx.Module):
  """Videos to features, in the dtype of the videos."""

  def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
    self.shape = shape
    width = shape.blocks.width
    self.patches = PatchEmbedding((shape.tube, shape.patch, shape.patch), 3, width, rngs=rngs)
    self.blocks = vit.stack(shape.blocks, rngs)
    epsilon = 1e-5 if shape.norm == "mean" else shape.blocks.epsilon  # as the reference has it
    self.norm = None if shape.norm == "none" else LayerNorm(width, epsilon=epsilon)

  def tokens(self, video_BTHWC: jax.Array) -> jax.Array:
    """(B, N, D), tubes in the order (time, row, column); normalised where `shape.norm` is "tokens".

    Args:
      video_BTHWC: RGB of the shape's frames and size, less MEAN, over DEVIATION.

    Raises:
      DataError: a video of another size.
    """
    shape = self.shape
    wanted = (shape.frames, shape.image, shape.image, 3)
    if video_BTHWC.shape[1:] != wanted:
      raise DataError(f"VideoMAE wants videos of {wanted}, got {video_BTHWC.shape[1:]}; resize and sample them")
    x_BND = self.patches(video_BTHWC)
    x_BND = vit.run(self.blocks, x_BND + sinusoids(shape.tokens, shape.blocks.width).astype(x_BND.dtype))
    return self.norm(x_BND) if self.norm is not None and shape.norm == "tokens" else x_BND

  def __call__(self, video_BTHWC: jax.Array) -> jax.Array:
    """One vector a video (B, D): the mean over tokens, normalised as the shape says."""
    x_BD = self.tokens(video_BTHWC).mean(axis=1)
    return self.norm(x_BD) if self.norm is not None and self.shape.norm == "mean" else x_BD


def sinusoids(count: int, width: int) -> np.ndarray:
  """The fixed positions (count, width): sin and cos of place / 10000^(2 floor(d/2) / width), by turns over d."""
  angle = np.arange(count)[:, None] / 10_000.0 ** (2 * (np.arange(width) // 2) / width)
  return np.where(np.arange(width) % 2, np.cos(angle), np.sin(angle)).astype(np.float32)
