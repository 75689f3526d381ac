"""Exact matrix-product FLOPs of the networks, by formula: XLA counts a scanned layer once and a kernel not at all.

A product of (m, k) and (k, n) is 2 m k n. Norms, softmax, rotation and other elementwise work are not counted, and
attention is charged in full whatever its mask hides.
"""

from kling_jax.models.video_dit import VideoDiTConfig
from kling_jax.nn.embed import FREQUENCIES

TRAINING = 3  # a training step costs this many forwards: one forward, and two products for each in the backward


def video_dit_parts(
  config: VideoDiTConfig,
  frames: int,
  height: int,
  width: int,
  text_len: int,
  *,
  context_frames: int = 0,
  state_len: int = 0,
  times: int = 1,
) -> dict[str, float]:
  """FLOPs of one sample's forward, by part.

  Args:
    frames, height, width: latents that the model predicts.
    text_len: text tokens, padding included.
    context_frames: latent frames that it sees before them.
    state_len: tokens of the state stream; 0 where none are given.
    times: times a sample has: 1, or the number of latent frames (context included).

  Returns:
    patch; text (projection); time (time, scores, fps and the shared modulation); self_projections; self_attention;
    cross_projections (queries and output, on video tokens); cross_text (keys and values, on text tokens);
    cross_attention; state (all that the state stream adds); mlp; head.
  """
  d, layers = config.width, config.depth
  grid_frames, rows, columns = config.grid(frames + context_frames, height, width)
  n = grid_frames * rows * columns
  patch_size = config.patch[0] * config.patch[1] * config.patch[2] * config.latent_channels
  scores = len(config.conditions) + config.fps
  embedding = 2 * (FREQUENCIES * d + d * d)  # of a time, or of a score
  state = 0.0
  if config.state_width is not None and state_len:
    projection = 2 * state_len * (config.state_width * d + d * d)
    state = projection + layers * (4 * n * d * d + 4 * state_len * d * d + 4 * n * state_len * d)
  return {
    "patch": 2.0 * n * patch_size * d,
    "text": 2.0 * text_len * (config.text_width * d + d * d),
    "time": float(times * (embedding + 2 * d * 6 * d) + scores * embedding),
    "self_projections": layers * 8.0 * n * d * d,
    "self_attention": layers * 4.0 * n * n * d,
    "cross_projections": layers * 4.0 * n * d * d,
    "cross_text": layers * 4.0 * text_len * d * d,
    "cross_attention": layers * 4.0 * n * text_len * d,
    "state": float(state),
    "mlp": layers * 4.0 * n * d * config.mlp_width,
    "head": 2.0 * frames * rows * columns * d * patch_size,
  }


def video_dit_forward(
  config: VideoDiTConfig, frames: int, height: int, width: int, text_len: int, **given: int
) -> float:
  """FLOPs of one sample's forward: the sum of `video_dit_parts`, whose keywords it takes; training is 3 times that."""
  return sum(video_dit_parts(config, frames, height, width, text_len, **given).values())
