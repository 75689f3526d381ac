"""The whole text-to-video network: text encoder, null text, Video DiT and frozen codec as one tree of parameters."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kling_jax.models.text_encoder import ByteTextEncoder
from kling_jax.models.video_dit import Around, VideoDiT, VideoDiTConfig
from kling_jax.nn import lora as lora_lib
from kling_jax.nn.weights import used

DROPS = ("text", "scores", "image")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditions:
  """What a clip is generated under; B rows, L text tokens of width D, M scores.

  Attributes:
    text_BLD, text_mask_BL: encoded text; the mask is True at real tokens.
    scores_BM: normalised to [0, 1000] in the order of the model's conditions.
    scores_known_BM: False where a score is not given.
    clean_BTHWC: latents whose first frames are known (an image, the start of a video); None when nothing is.
    known_BT: which latent frames of `clean_BTHWC` are given.
  """

  text_BLD: jax.Array
  text_mask_BL: jax.Array
  scores_BM: jax.Array
  scores_known_BM: jax.Array
  clean_BTHWC: jax.Array | None = None
  known_BT: jax.Array | None = None


class TextToVideo(nnx.Module):
  """A Video DiT with its text side.

  Text comes either from the byte encoder inside (trained along) or already encoded from a cache. A dropped text is one
  learned token, whatever the encoder.
  """

  def __init__(
    self,
    config: VideoDiTConfig,
    *,
    text_depth: int,
    text_tokens: int,
    text_padding: bool = False,
    codec: nnx.Module | None = None,
    lora: tuple[int, str] | None = None,
    rngs: nnx.Rngs,
  ):
    """Builds the parts.

    Args:
      config: of the Video DiT; its `text_width` is the width of the text embeddings.
      text_depth: layers of the byte encoder; 0 = none, embeddings are given.
      text_tokens: longest text.
      text_padding: the transformer sees zeros behind a text, as Wan 2.1 was trained, instead of the text alone.
      codec: a codec with weights, kept in the same tree so that a checkpoint is complete; None for the wavelet.
      lora: (rank, pattern of kernels) of adapters for the transformer; None for none.
      rngs: stream `params`.
    """
    self.dit = VideoDiT(config, rngs=rngs)
    self.null_text = nnx.Param(jnp.zeros((1, config.text_width)), axes=(None, "text"))
    self.text = ByteTextEncoder(config.text_width, text_depth, text_tokens, rngs=rngs) if text_depth else None
    self.text_padding = text_padding
    self.codec = codec
    self.lora = None if lora is None else lora_lib.adapters(self.dit, *lora, rngs=rngs)

  def encode_text(self, batch: dict[str, Any], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(text_BLD, mask_BL) from `tokens` and `tokens_mask`, or from cached `text` and `text_mask`."""
    if self.text is None:
      return batch["text"].astype(dtype), batch["text_mask"]
    return self.text(batch["tokens"], batch["tokens_mask"], dtype=dtype), batch["tokens_mask"]

  def drop_text(self, text_BLD: jax.Array, mask_BL: jax.Array, dropped_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(text_BLD, mask_BL) with the one token of the null text in the rows where `dropped_B`."""
    row_B11 = dropped_B[:, None, None]
    first_L = jnp.arange(mask_BL.shape[1]) == 0
    # Chosen in float32, so that the gradient of the one token is summed over rows in float32.
    null_LD = used(self.null_text[...], (None, "text"), jnp.float32)
    text_BLD = jnp.where(row_B11, null_LD, text_BLD.astype(jnp.float32)).astype(text_BLD.dtype)
    return text_BLD, jnp.where(row_B11[..., 0], first_L, mask_BL)

  def drop(self, conditions: Conditions, dropped: dict[str, jax.Array]) -> Conditions:
    """Replaces conditions by their null, row by row.

    Args:
      conditions: what is given.
      dropped: "text" and "image" (B,), "scores" (B,) or (B, M); True where dropped.
    """
    c = conditions
    if "text" in dropped:
      text_BLD, mask_BL = self.drop_text(c.text_BLD, c.text_mask_BL, dropped["text"])
      c = dataclasses.replace(c, text_BLD=text_BLD, text_mask_BL=mask_BL)
    if "scores" in dropped:
      gone = dropped["scores"]
      gone_BM = gone[:, None] if gone.ndim == 1 else gone
      c = dataclasses.replace(c, scores_known_BM=c.scores_known_BM & ~gone_BM)
    if "image" in dropped and c.known_BT is not None:
      c = dataclasses.replace(c, known_BT=c.known_BT & ~dropped["image"][:, None])
    return c

  def __call__(
    self, x_BTHWC: jax.Array, time_B: jax.Array, conditions: Conditions, around: Around | None = None
  ) -> Any:
    """The DiT's prediction; known frames are shown clean, at time 0. Returns float32 in the shape of x.

    With `around` (see VideoDiT), (prediction, what it hands on).
    """
    c = conditions
    time = time_B
    text_BLD, text_mask_BL = c.text_BLD, None if self.text_padding else c.text_mask_BL
    if self.text_padding:
      text_BLD = jnp.where(c.text_mask_BL[..., None], text_BLD, 0)
    if c.known_BT is not None and c.clean_BTHWC is not None:
      known = c.known_BT[:, :, None, None, None]
      x_BTHWC = jnp.where(known, c.clean_BTHWC.astype(x_BTHWC.dtype), x_BTHWC)
      time = jnp.where(c.known_BT, 0.0, time_B[:, None])
    return self.dit(
      x_BTHWC, time, text_BLD, text_mask_BL=text_mask_BL, scores_BM=c.scores_BM, scores_known_BM=c.scores_known_BM,
      around=around,
    )  # fmt: skip
