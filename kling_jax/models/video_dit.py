"""The Video DiT: Wan 2.1's transformer over latent video, told clip scores, and causal in time where asked to be."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from kling_jax.errors import ConfigError, nearest
from kling_jax.nn.attention import Mask
from kling_jax.nn.embed import PatchEmbedding, ScoreEmbedding, TimeEmbedding, TokenProjection, unpatchify
from kling_jax.nn.linear import Linear, zeros
from kling_jax.nn.mlp import GeluMLP
from kling_jax.nn.modulation import ModulationMLP, ModulationTable, add_gated, modulate, spread
from kling_jax.nn.multihead import KVCache, MultiHeadAttention
from kling_jax.nn.norm import LayerNorm
from kling_jax.nn.partition import constrain
from kling_jax.nn.rotary import angles_3d

# Runs the blocks on the tokens, or something in their place: (blocks, x) -> (x after them, anything to hand on).
Around = Callable[[Callable[[jax.Array], jax.Array], jax.Array], tuple[jax.Array, Any]]
SAVEABLE = ("qkv", "attention", "mlp_hidden")  # the tensors of a block that a remat policy may name
OFFLOADABLE = ("block", *SAVEABLE)  # and those that it may move to the host; "block" is the block's input


@dataclasses.dataclass(frozen=True)
class VideoDiTConfig:
  """Shape of a Video DiT.

  Attributes:
    width, depth, heads, mlp_width: of the transformer; a head is width / heads wide.
    patch: latent frames, rows and columns in one token; the first is 1, since each latent frame has its own time.
    latent_channels: channels of the latents that come in and of the prediction that goes out.
    text_width: width of the text tokens that come in.
    conditions: names of the scores that the network is told, in the order of their columns in `scores_BM`.
    fps: whether it is also told the frames per second.
    state_width: width of the tokens of a second cross-attention stream (a world model's state); None for none.
    remat: what the backward pass finds saved of each block. "none": everything (no recomputation). "full": nothing
      but the block's input. "names:a,b": the tensors named, of "qkv" (queries, keys and values of both attentions),
      "attention" (their outputs; on the blockwise road no attention is then repeated) and "mlp_hidden".
      "offload:a,b": those tensors in the hosts' memory until the backward pass asks for them; "block" among them is
      the block's input itself, without which it stays on the device.
  """

  width: int
  depth: int
  heads: int
  mlp_width: int
  patch: tuple[int, int, int] = (1, 2, 2)
  latent_channels: int = 16
  text_width: int = 4096
  conditions: tuple[str, ...] = ("motion", "aesthetic", "clarity")
  fps: bool = False
  state_width: int | None = None
  remat: str = "none"

  def __post_init__(self):
    if self.width % self.heads or (self.width // self.heads) % 2:
      raise ConfigError(f"width={self.width} over heads={self.heads}: a head must have a whole, even size")
    if self.patch[0] != 1:
      raise ConfigError(f"patch={self.patch}: the first size must be 1, since each latent frame has its own time")
    if len(set(self.conditions)) != len(self.conditions):
      raise ConfigError(f"conditions={self.conditions}: each score once")
    remat_policy(self.remat)

  @property
  def head_size(self) -> int:
    return self.width // self.heads

  def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """The token grid (frames, rows, columns) of latents of this size; ConfigError where patches do not fit."""
    if height % self.patch[1] or width % self.patch[2]:
      raise ConfigError(
        f"latents of {height} x {width} do not divide into patches of {self.patch[1]} x {self.patch[2]}"
      )
    return frames, height // self.patch[1], width // self.patch[2]


def remat_policy(remat: str):
  """Returns (whether to recompute at all, policy for jax.checkpoint) of a `VideoDiTConfig.remat` string."""
  kind, _, listed = remat.partition(":")
  names, known = listed.split(","), {"names": SAVEABLE, "offload": OFFLOADABLE}.get(kind)
  if known is None or not listed:
    if remat not in ("none", "full"):
      raise ConfigError(
        f"remat={remat!r}; known: none, full, names:<some of {','.join(SAVEABLE)}>, "
        f"offload:<some of {','.join(OFFLOADABLE)}>"
      )
    return remat == "full", None
  for name in names:
    if name not in known:
      raise ConfigError(f"remat={remat!r}: no tensor is called {name!r}{nearest(name, known)}")
  if kind == "names":
    return True, jax.checkpoint_policies.save_only_these_names(*names)
  return True, jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=names, offload_src="device", offload_dst="pinned_host"
  )


def _scaling(width: int, depth: int | None = None) -> VideoDiTConfig:
  """The family of arXiv 2411.17470: 16 width^2 kernel parameters a block and depth = width/16, so N = width^3.

  It has the most heads of at least 64 that divide the width. With a `depth`, the same at that many blocks.
  """
  step = 16 if depth is None else 8
  if width < 16 or width % step:
    raise ConfigError(f"Video DiT size 'd{width}': the width of the scaling family is a multiple of {step}")
  heads = next(count for count in range(max(1, width // 64), 0, -1) if width % count == 0 and width // count % 2 == 0)
  return VideoDiTConfig(width, depth=depth or width // 16, heads=heads, mlp_width=4 * width)


PRESETS = {
  "XS": VideoDiTConfig(width=128, depth=4, heads=2, mlp_width=512),
  "S": VideoDiTConfig(width=384, depth=12, heads=6, mlp_width=1536),
  "B": VideoDiTConfig(width=768, depth=12, heads=6, mlp_width=3072),
  "L": VideoDiTConfig(width=1024, depth=24, heads=8, mlp_width=4096),
  # 18 heads of 64 and not 9 of 128, so that a tensor axis of 2 divides them.
  "XL": VideoDiTConfig(width=1152, depth=28, heads=18, mlp_width=4608),
  "1.3b": VideoDiTConfig(width=1536, depth=30, heads=12, mlp_width=8960),
  "14b": VideoDiTConfig(width=5120, depth=40, heads=40, mlp_width=13824),
  # Movie Gen's 48 x 6144, with 48 heads (2, 3, 4, 6, 8, 12 and 16 divide them) and an MLP that brings it to 30.0e9.
  "30b": VideoDiTConfig(width=6144, depth=48, heads=48, mlp_width=25600),
  "n0.017b": _scaling(256),
  "n0.057b": _scaling(384),
  "n0.13b": _scaling(512),
  "n0.26b": _scaling(640),
  "n0.72b": _scaling(896),
  "n1.07b": _scaling(1024),
}


def preset(size: str, **changes) -> VideoDiTConfig:
  """The named size, with the given fields changed; ConfigError with the nearest name where there is none.

  Args:
    size: a name in PRESETS, or "d96": the member of the scaling family with that width, 96^3 kernel parameters; "d48x2"
      is that width with 2 blocks, for sweeps of models so small that a block more is another kind of model.
  """
  if member := re.fullmatch(r"d(\d+)(?:x([1-9]\d*))?", size, re.ASCII):
    return dataclasses.replace(_scaling(*(int(part) for part in member.groups() if part)), **changes)
  if size not in PRESETS:
    raise ConfigError(f"Video DiT size {size!r} does not exist{nearest(size, PRESETS)}")
  return dataclasses.replace(PRESETS[size], **changes)


class BlockInputs(NamedTuple):
  """What every block is given beside its tokens."""

  rows_BTRD: jax.Array  # shared modulation, R = 6: shift, scale, gate of self-attention, then of the MLP
  angles: jax.Array
  mask: Mask
  text_BLD: jax.Array
  text_mask: Mask
  state_BQD: jax.Array | None
  state_mask: Mask


class Packing(NamedTuple):
  """Clips that share rows of a batch, one behind the other in time; each sees itself and its own text alone.

  Attributes:
    clip_BT: int32, not negative, the number of the clip that a latent frame belongs to; padding is a clip of its own.
    place_BT: int32, the frame's place in its clip, from 0.
    text_clip_BL: int32, the clip that a text token belongs to.
  """

  clip_BT: jax.Array
  place_BT: jax.Array
  text_clip_BL: jax.Array


class Block(nnx.Module):
  """Wan 2.1's block: modulated self-attention, ungated cross-attention behind an affine norm, modulated MLP.

  The state stream is one more cross-attention beside the text's. Its output projection starts at zero.
  """

  def __init__(self, config: VideoDiTConfig, *, rngs: nnx.Rngs):
    width, heads = config.width, config.heads
    self.modulation = ModulationTable(width, 6)
    self.self_attn = MultiHeadAttention(width, heads, rngs=rngs)
    self.cross_norm = LayerNorm(width)
    self.cross_attn = MultiHeadAttention(width, heads, rngs=rngs)
    state_attn = lambda: MultiHeadAttention(width, heads, out_init=zeros, rngs=rngs)
    self.state_attn = None if config.state_width is None else state_attn()
    self.mlp = GeluMLP(width, config.mlp_width, rngs=rngs)

  def __call__(self, x_BND: jax.Array, given: BlockInputs, past: tuple[jax.Array, jax.Array] | None):
    """Returns the tokens after this block, and where `past` keys and values (B, L, K, E) are given, the new ones."""
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(given.rows_BTRD)
    q, k, v = self.self_attn.qkv(modulate(x_BND, shift, scale), angles=given.angles)
    new = None
    if past is not None:
      new, start = (k, v), given.mask.offset
      k, v = (jax.lax.dynamic_update_slice_in_dim(a, b, start, axis=1) for a, b in zip(past, new, strict=True))
    x_BND = add_gated(x_BND, self.self_attn.attend(q, k, v, given.mask), gate)
    h_BND = self.cross_norm(x_BND)
    x_BND = x_BND + self.cross_attn(h_BND, given.text_BLD, mask=given.text_mask)
    if self.state_attn is not None and given.state_BQD is not None:
      x_BND = x_BND + self.state_attn(h_BND, given.state_BQD, mask=given.state_mask)
    x_BND = add_gated(x_BND, self.mlp(modulate(x_BND, mlp_shift, mlp_scale)), mlp_gate)
    return constrain(x_BND, ("batch", "tokens", "embed")), new


class Head(nnx.Module):
  """Modulated norm, then a Linear to the patches of the prediction, zero at the start; float32 throughout."""

  def __init__(self, config: VideoDiTConfig, *, rngs: nnx.Rngs):
    outputs = config.patch[0] * config.patch[1] * config.patch[2] * config.latent_channels
    self.modulation = ModulationTable(config.width, 2)
    self.project = Linear(config.width, outputs, axes=("embed", "conv_out"), init=zeros, rngs=rngs)

  def __call__(self, x_BND: jax.Array, e_BTD: jax.Array) -> jax.Array:
    shift, scale = self.modulation(e_BTD[:, :, None])
    return self.project(modulate(x_BND.astype(jnp.float32), shift, scale))


class VideoDiT(nnx.Module):
  """Predicts noise, velocity or data (the process decides which) from noisy latents; float32 parameters.

  Blocks are stacked (their parameters carry a leading `layers` axis) and scanned, so that compile time does not grow
  with depth.
  """

  def __init__(self, config: VideoDiTConfig, *, rngs: nnx.Rngs):
    self.config = config
    width = config.width
    self.patch = PatchEmbedding(config.patch, config.latent_channels, width, rngs=rngs)
    self.text = TokenProjection(config.text_width, width, rngs=rngs)
    self.time = TimeEmbedding(width, rngs=rngs)
    self.conditions = nnx.Dict({name: ScoreEmbedding(width, rngs=rngs) for name in config.conditions})
    self.fps = ScoreEmbedding(width, rngs=rngs) if config.fps else None
    self.state = TokenProjection(config.state_width, width, rngs=rngs) if config.state_width is not None else None
    self.modulation = ModulationMLP(width, 6, rngs=rngs)
    stack = nnx.vmap(
      lambda rngs: Block(config, rngs=rngs),
      in_axes=(0,),
      out_axes=0,
      transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"},
    )
    self.blocks = nnx.split_rngs(splits=config.depth)(stack)(rngs)
    self.head = Head(config, rngs=rngs)

  def __call__(
    self,
    x_BTHWC: jax.Array,
    time: jax.Array,
    text_BLD: jax.Array,
    *,
    text_mask_BL: jax.Array | None = None,
    scores_BM: jax.Array | None = None,
    scores_known_BM: jax.Array | None = None,
    fps_B: jax.Array | None = None,
    context_BTHWC: jax.Array | None = None,
    context_time: jax.Array | None = None,
    context_mask_BT: jax.Array | None = None,
    state_BQD: jax.Array | None = None,
    state_mask_BQ: jax.Array | None = None,
    causal_frames: int | None = None,
    cache: KVCache | None = None,
    packing: Packing | None = None,
    around: Around | None = None,
    scan: bool = True,
  ):
    """Runs the network.

    Args:
      x_BTHWC: latents, float32 or bfloat16: the dtype that it computes in.
      time: (B,), or (B, T) for a time of its own for each latent frame; in [0, 1], 0 clean data and 1 pure noise.
        A given image or the start of a video is latent frames with time 0.
      text_BLD, text_mask_BL: text tokens, and True at the real ones. What Wan 2.1 was trained with is no mask and
        zeros at the rest of its 512 tokens.
      scores_BM, scores_known_BM: scores in [0, 1000] in the order of config.conditions, and whether each is known;
        where one is not, or none are given, the network hears its learned null.
      fps_B: frames per second; for a config with `fps`.
      context_BTHWC, context_time: latent frames before those of `x`, and their time ((B,) or (B, T); clean if
        omitted). They are seen, nothing is predicted for them.
      context_mask_BT: bool (B, F) over the first F frames that there are (those of the context, or those that the
        cache holds): False hides a frame from all others. A row of False is a scene cut: neither the prediction nor
        its gradient knows anything of the frames before.
      state_BQD, state_mask_BQ: tokens of the state stream; for a config with `state_width`.
      causal_frames: latent frames in a causal block: a frame sees its own block and what is before it. Blocks are
        counted from the first frame of `x`. None: every frame sees every frame.
      cache: keys and values of earlier frames (`init_cache`). The frames of `x` see them and come after them.
      packing: which clip each frame and each text token belongs to, where rows hold several; `time` is then (B, T), and
        scores may be (B, T, M), those of a frame's clip. What comes out is what each clip gives alone. Not together
        with context, cache or state; under `causal_frames` clips begin where blocks do.
      around: what runs the blocks, or stands in for them (a step cache); not together with a cache.
      scan: False unrolls the layers, for reading costs off the compiled program.

    Returns:
      The prediction (B, T, H, W, C) in float32; with `around`, (prediction, what it hands on); with a cache,
      (prediction, cache with the frames of `x` appended). A sampler drops the new cache until a block is clean. A
      prediction beyond the room of the cache is NaN.

    Raises:
      ConfigError: inputs that do not fit the config or one another.
    """
    self._check(x_BTHWC, time, scores_BM, fps_B, context_BTHWC, context_mask_BT, state_BQD, cache)
    if packing is not None:
      _check_packing(packing, x_BTHWC, text_BLD, context_BTHWC, cache, state_BQD)
    if cache is not None and around is not None:
      raise ConfigError("a cache of keys and `around` are given together: without its blocks a call has no keys")
    dtype, batch, frames = x_BTHWC.dtype, x_BTHWC.shape[0], x_BTHWC.shape[1]
    time_BT = jnp.asarray(time, jnp.float32).reshape(batch, -1)
    context_frames = 0
    if context_BTHWC is not None:
      context_frames = context_BTHWC.shape[1]
      past = jnp.zeros((batch, 1)) if context_time is None else context_time.reshape(batch, -1)
      widen = lambda t_BT, length: jnp.broadcast_to(t_BT, (batch, length))
      time_BT = jnp.concatenate([widen(past, context_frames), widen(time_BT, frames)], axis=1)
      x_BTHWC = jnp.concatenate([context_BTHWC.astype(dtype), x_BTHWC], axis=1)
    e_BTD = self._embed_time(time_BT, scores_BM, scores_known_BM, fps_B)
    grid = self.config.grid(*x_BTHWC.shape[1:4])
    frame_tokens = grid[1] * grid[2]
    held = 0 if cache is None else cache.length
    segments, text_segments, places_BT = None, None, None
    if packing is not None:
      clip_BN, places_BT = jnp.repeat(packing.clip_BT, frame_tokens, axis=1), packing.place_BT
      segments, text_segments = (clip_BN, clip_BN), (clip_BN, packing.text_clip_BL)
    given = BlockInputs(
      rows_BTRD=spread(self.modulation(e_BTD), math.prod(grid)),
      angles=angles_3d(*grid, self.config.head_size, first_frame=held // frame_tokens, places_BT=places_BT),
      mask=Mask(
        keys_BL=_tokens_shown(
          context_mask_BT, frame_tokens, math.prod(grid) if cache is None else cache.k_SBLKE.shape[2]
        ),
        block=None if causal_frames is None else causal_frames * frame_tokens,
        offset=held,
        start=context_frames * frame_tokens if cache is None else held,
        length=None if cache is None else held + grid[0] * frame_tokens,
        segments=segments,
      ),
      text_BLD=self.text(text_BLD.astype(dtype)),
      text_mask=Mask(keys_BL=text_mask_BL, segments=text_segments),
      state_BQD=None if self.state is None or state_BQD is None else self.state(state_BQD.astype(dtype)),
      state_mask=Mask(keys_BL=state_mask_BQ),
    )
    x_BND = constrain(self.patch(x_BTHWC), ("batch", "tokens", "embed"))
    if around is None:
      x_BND, new = self._run_blocks(x_BND, given, cache, scan)
    else:
      x_BND, new = around(lambda x_BND: self._run_blocks(x_BND, given, None, scan)[0], x_BND)
    if context_frames:
      x_BND, e_BTD = x_BND[:, context_frames * frame_tokens :], e_BTD[:, context_frames:]
    y_BTHWC = unpatchify(self.head(x_BND, spread(e_BTD, x_BND.shape[1])), self.config.patch, (frames, *grid[1:]))
    if cache is None:
      return y_BTHWC if around is None else (y_BTHWC, new)
    fits = held + x_BND.shape[1] <= cache.k_SBLKE.shape[2]
    return jnp.where(fits, y_BTHWC, jnp.nan), cache.append(*new)

  def init_cache(self, batch: int, frames: int, height: int, width: int, dtype=jnp.float32) -> KVCache:
    """An empty cache with room for `frames` latent frames of height x width; `dtype` is that of the latents."""
    frames, rows, columns = self.config.grid(frames, height, width)
    return KVCache.empty(
      self.config.depth, batch, frames * rows * columns, self.config.heads, self.config.head_size, dtype
    )

  def _embed_time(self, time_BT, scores_BM, known_BM, fps_B) -> jax.Array:
    """Embedding (B, T, D) of the time and of everything that is told in the same way; float32."""
    batch = time_BT.shape[0]
    e_BTD = self.time(time_BT)
    if known_BM is None:
      shape = (batch, len(self.config.conditions)) if scores_BM is None else scores_BM.shape
      known_BM = jnp.full(shape, scores_BM is not None)
    if scores_BM is None:
      scores_BM = jnp.zeros(known_BM.shape)
    if scores_BM.ndim == 2:
      scores_BM, known_BM = scores_BM[:, None], known_BM[:, None]
    for m, name in enumerate(self.config.conditions):
      e_BTD += self.conditions[name](scores_BM[..., m], known_BM[..., m])
    if self.fps is not None:
      known_B = jnp.full((batch,), fps_B is not None)
      e_BTD += self.fps(jnp.zeros(batch) if fps_B is None else fps_B, known_B)[:, None]
    return e_BTD

  def _run_blocks(self, x_BND, given: BlockInputs, cache: KVCache | None, scan: bool):
    graph, stacked = nnx.split(self.blocks)

    def layer(x_BND, layer_inputs):
      weights, past = layer_inputs
      return nnx.merge(graph, weights)(checkpoint_name(x_BND, "block"), given, past)

    recompute, policy = remat_policy(self.config.remat)
    if recompute:
      layer = jax.checkpoint(layer, policy=policy, prevent_cse=not scan)
    inputs = (stacked, None if cache is None else (cache.k_SBLKE, cache.v_SBLKE))
    if scan:
      return jax.lax.scan(layer, x_BND, inputs)
    outputs = []
    for index in range(self.config.depth):
      x_BND, new = layer(x_BND, jax.tree.map(lambda leaf: leaf[index], inputs))  # noqa: B023 (used at once)
      outputs.append(new)
    return x_BND, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

  def _check(self, x_BTHWC, time, scores_BM, fps_B, context_BTHWC, context_mask_BT, state_BQD, cache):
    config = self.config
    if x_BTHWC.ndim != 5 or x_BTHWC.shape[-1] != config.latent_channels:
      raise ConfigError(f"latents {x_BTHWC.shape} are not (B, T, H, W, latent_channels={config.latent_channels})")
    batch, frames = x_BTHWC.shape[:2]
    if jnp.shape(time) not in ((batch,), (batch, 1), (batch, frames)):
      raise ConfigError(f"time {jnp.shape(time)} is neither (B,)=({batch},) nor (B, T)=({batch}, {frames})")
    if scores_BM is not None and scores_BM.shape[-1] != len(config.conditions):
      raise ConfigError(f"scores have {scores_BM.shape[-1]} columns, the model's conditions are {config.conditions}")
    if fps_B is not None and self.fps is None:
      raise ConfigError("frames per second are given to a model without them; set fps=True in its config")
    if state_BQD is not None and self.state is None:
      raise ConfigError("a state is given to a model without a state stream; set state_width in its config")
    if cache is not None and context_BTHWC is not None:
      raise ConfigError("context and cache are given together; run the context through the cache first, on its own")
    if context_mask_BT is not None:
      if context_BTHWC is None and cache is None:
        raise ConfigError("context_mask_BT is given without context frames or a cache that holds them")
      if context_BTHWC is not None and context_mask_BT.shape != (batch, context_BTHWC.shape[1]):
        raise ConfigError(
          f"context_mask_BT {context_mask_BT.shape} is not (B, context frames)=({batch}, {context_BTHWC.shape[1]})"
        )


def _check_packing(packing, x_BTHWC, text_BLD, *others):
  batch, frames = x_BTHWC.shape[:2]
  wanted = {"clip_BT": (batch, frames), "place_BT": (batch, frames), "text_clip_BL": (batch, text_BLD.shape[1])}
  for name, shape in wanted.items():
    if getattr(packing, name).shape != shape:
      raise ConfigError(f"packing.{name} is {getattr(packing, name).shape}, not {shape}")
  if any(other is not None for other in others):
    raise ConfigError("packed clips take neither context nor cache nor state; give each clip a row of its own")


def _tokens_shown(mask_BT: jax.Array | None, frame_tokens: int, tokens: int) -> jax.Array | None:
  """A mask over the first frames as one over all tokens (B, L); tokens of later frames are shown."""
  if mask_BT is None:
    return None
  shown_BL = jnp.repeat(mask_BT, frame_tokens, axis=1)
  return jnp.pad(shown_BL, ((0, 0), (0, tokens - shown_BL.shape[1])), constant_values=True)
