"""What a clip remembers of the clips before it, as one rule with two faces: a mask, and the places of a cache.

Always seen: image, prompt, and the state of the first clip. In full: the last W clips. Of clips before those, the M
newest are seen by their states alone; what is older is forgotten. A token's keys and values are worked out once, when
it is read, from what it sees then, and only stay or leave afterwards. So one pass over the whole sequence in which each
place sees what the rule shows its clip (`pairs`) says the same as a cache of fixed size that drops what left
(`make_room`), and time and memory of a clip do not grow with the number of clips.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kling_jax.errors import ConfigError
from kling_jax.models.language_model import Cache
from kling_jax.nn.multihead import KVCache
from kling_jax.world.layout import Layout

FOR_EVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class HistoryPolicy:
  """How far back a clip sees.

  Attributes:
    window: W, clips before the present one that are seen in full.
    states: M, clips before those whose states are seen, beside the first clip's.
  """

  window: int
  states: int = 0

  def __post_init__(self):
    if self.window < 0 or self.states < 0:
      raise ConfigError(f"history: window={self.window} and states={self.states} must be 0 or more")

  def last_reader(self, layout: Layout, clips: int) -> np.ndarray:
    """The last clip whose places see each place of the sequence; int (N,)."""
    clip_N = layout.clip_of(clips)
    inside_N = np.concatenate([np.zeros(layout.prefix, int), np.tile(np.arange(layout.clip), clips)])
    query_N = (inside_N >= layout.dynamics) & (inside_N < layout.dynamics + layout.queries)
    full_N = clip_N + self.window
    state_N = np.where(clip_N == 0, FOR_EVER, full_N + self.states)
    return np.where(clip_N < 0, FOR_EVER, np.where(query_N, state_N, full_N))

  def pairs(self, layout: Layout, clips: int) -> jax.Array | None:
    """bool (1, N, N): which place sees which; None where that is the plain causal rule, which every kernel knows."""
    if clips <= self.window + 1 and not layout.mutual:
      return None
    place_N, clip_N = np.arange(layout.length(clips)), layout.clip_of(clips)
    before_NL = place_N[:, None] >= place_N[None]
    if layout.mutual:
      inside_N = (place_N - layout.prefix) % layout.clip
      query_N = (clip_N >= 0) & (inside_N >= layout.dynamics) & (inside_N < layout.dynamics + layout.queries)
      before_NL |= query_N[:, None] & query_N[None] & (clip_N[:, None] == clip_N[None])
    return jnp.asarray(before_NL & (self.last_reader(layout, clips)[None] >= clip_N[:, None]))[None]

  # ---- the cache of a rollout: prefix | first state | M older states | W + 1 clips -----------------------------------

  def base(self, layout: Layout) -> int:
    """The place in the cache where the window of whole clips begins."""
    return layout.prefix + (1 + self.states) * layout.queries

  def room(self, layout: Layout) -> int:
    """Places of the cache, however long the rollout."""
    return self.base(layout) + (self.window + 1) * layout.clip

  def after_prefix(self, layout: Layout, cache: Cache) -> Cache:
    """The cache once image and prompt are read: places kept for states are passed over, seen by nobody."""
    kept = jnp.arange(self.room(layout))
    empty = (kept >= layout.prefix) & (kept < self.base(layout))
    kv = dataclasses.replace(cache.kv, length=jnp.asarray(self.base(layout), jnp.int32))
    return Cache(kv, cache.real_BL & ~empty)

  def make_room(self, layout: Layout, cache: Cache, clip: jax.Array) -> Cache:
    """The cache with room for clip number `clip`: from W + 1 on, the oldest whole clip goes, and leaves its state."""
    shifted = lambda: self._forget(layout, cache, clip == self.window + 1)
    return jax.lax.cond(clip > self.window, shifted, lambda: cache)

  def _forget(self, layout: Layout, cache: Cache, is_first: jax.Array) -> Cache:
    queries, base = layout.queries, self.base(layout)

    def shift(x: jax.Array, axis: int) -> jax.Array:
      cut = lambda start, end: jax.lax.slice_in_dim(x, start, end, axis=axis)
      window = cut(base, base + (self.window + 1) * layout.clip)
      state = cut(base + layout.dynamics, base + layout.dynamics + queries)
      first = cut(layout.prefix, layout.prefix + queries)
      older = cut(layout.prefix + queries, base)
      newer = jax.lax.slice_in_dim(
        jnp.concatenate([older, state], axis), queries, (self.states + 1) * queries, axis=axis
      )
      return jnp.concatenate(
        [
          cut(0, layout.prefix),
          jnp.where(is_first, state, first),
          jnp.where(is_first, older, newer),
          jnp.roll(window, -layout.clip, axis),
        ],
        axis,
      )

    length = jnp.asarray(base + self.window * layout.clip, jnp.int32)
    kv = KVCache(shift(cache.kv.k_SBLKE, 2), shift(cache.kv.v_SBLKE, 2), length)
    return Cache(kv, shift(cache.real_BL, 1))
