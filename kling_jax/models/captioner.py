"""A captioner: a vision tower over a few frames, and a language model that writes what they show in six parts.

The tower cuts pairs of frames into patches (a picture is a pair of equal frames), attends over all of them at once with
rotary positions in frame, row and column, and makes one token of 2 x 2 neighbours. The language model reads these
tokens, then writes bytes: the parts of the caption in Koala-36M's order, one a line (section 2 of that paper).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.errors import ConfigError
from kling_jax.models import language_model
from kling_jax.models.text_encoder import Layer
from kling_jax.nn.embed import PatchEmbedding
from kling_jax.nn.linear import Linear
from kling_jax.nn.mask import Mask
from kling_jax.nn.norm import RMSNorm
from kling_jax.nn.rotary import angles_3d

PAD, BOS, EOS = 0, 1, 2  # what data/tokens.py writes
PAIR = 2  # frames in a patch
POOL = 2  # rows and columns of patches that become one token


@dataclasses.dataclass(frozen=True)
class Shape:
  """Sizes of a captioner.

  Attributes:
    language: of the language model, a preset of `language_model` with a vocabulary of bytes.
    tower_width, tower_depth, patch: of the tower; a patch has `patch` x `patch` pixels of two frames.
    frames, size, fps: what it looks at: an even number of frames, squares of `size` pixels, `fps` frames a second.
    max_text: bytes that it may write, begin and end included.
  """

  language: str = "tiny"
  tower_width: int = 128
  tower_depth: int = 3
  patch: int = 8
  frames: int = 6
  size: int = 64
  fps: float = 2.5
  max_text: int = 256

  def __post_init__(self):
    if self.size % (self.patch * POOL) or self.frames % PAIR:
      raise ConfigError(
        f"captioner: size={self.size} must be a multiple of {POOL} patches of {self.patch} pixels, and "
        f"frames={self.frames} even"
      )
    if self.tower_width % 64:
      raise ConfigError(f"captioner: tower_width={self.tower_width} must be a multiple of 64, the size of a head")

  @property
  def grid(self) -> tuple[int, int, int]:
    """Patches in (frame, row, column)."""
    side = self.size // self.patch
    return self.frames // PAIR, side, side

  @property
  def seen(self) -> int:
    """Tokens that the language model is shown."""
    frames, rows, columns = self.grid
    return frames * rows * columns // POOL**2

  @classmethod
  def from_json(cls, facts: Mapping[str, Any]) -> "Shape":
    """The inverse of `dataclasses.asdict`; ConfigError names what is unknown."""
    known = {field.name for field in dataclasses.fields(cls)}
    if set(facts) != known:
      raise ConfigError(
        f"captioner: wants exactly the sizes {', '.join(sorted(known))}, not {', '.join(sorted(facts))}"
      )
    return cls(**facts)


def pixels(frames: jax.Array) -> jax.Array:
  """uint8 RGB as what the tower takes: float32 in [-1, 1]."""
  return frames.astype(jnp.float32) / 127.5 - 1


class Captioner(nnx.Module):
  """See the module's first lines."""

  def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
    self.shape = shape
    language = language_model.preset(shape.language)
    self.patches = PatchEmbedding((PAIR, shape.patch, shape.patch), 3, shape.tower_width, rngs=rngs)

    @nnx.split_rngs(splits=shape.tower_depth)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
    def stack(rngs: nnx.Rngs) -> Layer:
      return Layer(shape.tower_width, shape.tower_width // 64, rngs=rngs)

    self.tower = stack(rngs)
    self.tower_norm = RMSNorm(shape.tower_width)
    self.pool = Linear(POOL**2 * shape.tower_width, language.width, axes=("conv_in", "embed"), rngs=rngs)
    self.language = language_model.LanguageModel(language, rngs=rngs)

  def look(self, frames_BTHWC: jax.Array) -> jax.Array:
    """Tokens (B, `shape.seen`, D) of frames in [-1, 1], in the dtype of the frames."""
    shape = self.shape
    if frames_BTHWC.shape[1:] != (shape.frames, shape.size, shape.size, 3):
      raise ConfigError(f"frames {frames_BTHWC.shape[1:]} for a captioner of {shape.frames} squares of {shape.size}")
    angles = angles_3d(*shape.grid, 64)
    graph, stacked = nnx.split(self.tower)
    step = lambda x_BND, layer: (nnx.merge(graph, layer)(x_BND, Mask(), angles), None)
    x_BND, _ = jax.lax.scan(step, self.patches(frames_BTHWC), stacked)
    batch, (frames, rows, columns) = x_BND.shape[0], shape.grid
    cells = self.tower_norm(x_BND).reshape(batch, frames, rows // POOL, POOL, columns // POOL, POOL, shape.tower_width)
    return self.pool(cells.transpose(0, 1, 2, 4, 3, 5, 6).reshape(batch, shape.seen, -1))

  def logits(self, frames_BTHWC: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Logits (B, L, vocabulary) of the tokens that follow each of `tokens_BL`, the first of which is BOS."""
    seen_BLD = self.look(frames_BTHWC)
    text_BLD = self.language.embed_text(tokens_BL, dtype=seen_BLD.dtype)
    hidden_BLD, _ = self.language(jnp.concatenate([seen_BLD, text_BLD], axis=1))
    return self.language.logits(hidden_BLD[:, self.shape.seen :])

  def write(self, frames_BTHWC: jax.Array) -> jax.Array:
    """The likeliest next byte again and again until all rows ended: tokens int32 (B, max_text), PAD after EOS."""
    seen_BLD = self.look(frames_BTHWC)
    batch, room = seen_BLD.shape[0], self.shape.max_text
    _, cache = self.language(seen_BLD, cache=self.language.init_cache(batch, self.shape.seen + room, seen_BLD.dtype))
    assert cache is not None
    begin_BL = jnp.full((batch, room), PAD, jnp.int32).at[:, 0].set(BOS)

    def unfinished(state):
      place, tokens_BL, _ = state
      return (place < room - 1) & ~jnp.all(jnp.any(tokens_BL == EOS, axis=1))

    def write_one(state):
      place, tokens_BL, cache = state
      last_B1 = jax.lax.dynamic_slice_in_dim(tokens_BL, place, 1, axis=1)
      hidden_B1D, cache = self.language(self.language.embed_text(last_B1, dtype=seen_BLD.dtype), cache=cache)
      next_B = jnp.argmax(self.language.logits(hidden_B1D[:, 0]), axis=-1).astype(jnp.int32)
      next_B = jnp.where(jnp.any(tokens_BL == EOS, axis=1), PAD, next_B)
      return place + 1, jax.lax.dynamic_update_slice_in_dim(tokens_BL, next_B[:, None], place + 1, axis=1), cache

    return jax.lax.while_loop(unfinished, write_one, (jnp.zeros((), jnp.int32), begin_BL, cache))[1]
