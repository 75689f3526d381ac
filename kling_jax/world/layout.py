"""The places of a world's sequence: how many each part has, and where they stand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kling_jax.errors import ConfigError

IMAGE, PROMPT, DYNAMICS, QUERY, OBSERVATION = range(5)  # kinds of places


@dataclasses.dataclass(frozen=True)
class Layout:
  """How many places each part has.

  Attributes:
    frame: tokens of one frame; the image is one frame.
    prompt, dynamics: places of the prompt and of each dynamics, marks included.
    queries: state queries of a clip.
    key_frames: frames of a clip that the language model sees, spread evenly, first and last included.
    mutual: whether the queries of a clip see one another, or, as all else, what stands before them.
  """

  frame: int
  prompt: int
  dynamics: int
  queries: int
  key_frames: int = 2
  mutual: bool = False

  def __post_init__(self):
    for name in ("frame", "queries", "key_frames"):
      if getattr(self, name) < 1:
        raise ConfigError(f"sequence: {name} is {getattr(self, name)}; it must be 1 or more")
    for name in ("prompt", "dynamics"):
      if getattr(self, name) < 3:
        raise ConfigError(f"sequence: {name} is {getattr(self, name)}; it holds two marks and a token: give 3 or more")

  @property
  def prefix(self) -> int:
    """Places before the first clip."""
    return self.frame + self.prompt

  @property
  def observation(self) -> int:
    """Places of a clip's key frames."""
    return self.key_frames * self.frame

  @property
  def clip(self) -> int:
    """Places of one clip."""
    return self.dynamics + self.queries + self.observation

  def length(self, clips: int) -> int:
    """Places of a sequence of so many clips."""
    return self.prefix + clips * self.clip

  def kinds(self, clips: int) -> np.ndarray:
    """What stands at each place: IMAGE, PROMPT, DYNAMICS, QUERY or OBSERVATION; int (N,)."""
    one = np.repeat([DYNAMICS, QUERY, OBSERVATION], [self.dynamics, self.queries, self.observation])
    return np.concatenate([np.repeat([IMAGE, PROMPT], [self.frame, self.prompt]), np.tile(one, clips)])

  def clip_of(self, clips: int) -> np.ndarray:
    """The clip that each place belongs to, -1 for image and prompt; int (N,)."""
    return np.concatenate([np.full(self.prefix, -1), np.repeat(np.arange(clips), self.clip)])

  def positions(self, clip: jax.Array | int, first: jax.Array | int, count: int) -> jax.Array:
    """Positions (count,) of a clip's places from its place `first` on."""
    return self.prefix + clip * self.clip + first + jnp.arange(count)

  def key_frame_indices(self, frames: int) -> np.ndarray:
    """Which of a clip's frames are its key frames: evenly spread with both ends; the last one where it is one.

    Raises:
      ConfigError: the clip has fewer frames.
    """
    if frames < self.key_frames:
      raise ConfigError(f"{self.key_frames} key frames of a clip of {frames} frames; at most {frames}")
    if self.key_frames == 1:
      return np.array([frames - 1])
    return np.linspace(0, frames - 1, self.key_frames).round().astype(int)
