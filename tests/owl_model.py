"""The smallest world model that has every part, its weights away from their initial values, and how it rolls out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kling_jax.data import tokens as tokens_lib
from kling_jax.diffusion import process
from kling_jax.models import latents
from kling_jax.models.language_model import Shape
from kling_jax.models.owl import Owl, OwlConfig
from kling_jax.models.video_dit import VideoDiTConfig
from kling_jax.nn import params as params_lib
from kling_jax.nn import rng
from kling_jax.world.film import Camera
from kling_jax.world.history import HistoryPolicy
from kling_jax.world.layout import Layout
from kling_jax.world.rollout import Action, Clip, RolloutState, World, Writer
from kling_jax.world.sequence import Walk

ROWS, FRAMES, SIDE, PROMPT, DYNAMICS, QUERIES = 2, 5, 16, 9, 7, 3
CODEC = latents.HaarCodec(spatial=4, channels=4)
CONFIG = OwlConfig(
  lm=Shape(32, 2, 2, 1, 16, 48, tokens_lib.VOCABULARY, tied=True, qk_norm="head"),
  dit=VideoDiTConfig(32, 2, 2, 48, latent_channels=4, text_width=16, conditions=(), fps=True),
  queries=QUERIES,
  text_tokens=PROMPT,
)
LAYOUT = Layout(frame=4, prompt=PROMPT, dynamics=DYNAMICS, queries=QUERIES)
POLICY = HistoryPolicy(window=2, states=2)
CAMERA = Camera(FRAMES, SIDE, SIDE, steps=2, context_noise=0.1)
WRITER = Writer(tokens_lib.BOS, tokens_lib.EOS, tokens_lib.PAD)

# Programs here run for milliseconds and take seconds to compile at full optimisation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def described(config: OwlConfig = CONFIG):
  return params_lib.abstract(lambda: Owl(config, rngs=nnx.Rngs(0)))


@functools.cache
def weights(config: OwlConfig = CONFIG) -> dict[str, np.ndarray]:
  """Every parameter away from its initial value, so that nothing is a no-op."""
  draw = np.random.default_rng(0)
  found = {}
  for name, leaf in described(config)[1].items():
    noise = draw.standard_normal(leaf.shape).astype(np.float32)
    value = noise / np.sqrt(leaf.shape[-2]) if name.endswith("kernel") else 0.3 * noise + name.endswith("scale")
    found[name] = value.astype(np.float32)
  return found


def world(config: OwlConfig = CONFIG, **changes) -> World:
  made = World(
    described(config)[0], LAYOUT, POLICY, process.make("flow"), lambda _: CODEC, CAMERA, WRITER, context_frames=1
  )
  return dataclasses.replace(made, **changes)


def text(words: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
  return tokens_lib.ByteTokenizer(length)(words)


IMAGE = np.random.default_rng(3).integers(0, 256, (ROWS, SIDE, SIDE, 3), np.uint8)
KEYS = rng.sample_keys(jax.random.key(5), 0, np.arange(ROWS))
FPS = np.array([8.0, 12.0], np.float32)
PROMPTS = text(["a ball", "fog"], PROMPT)


def action(words: list[str | None], cut: tuple[bool, bool] = (False, False)) -> Action:
  """What is asked of a clip: a text a row, None where the model writes."""
  tokens, mask = text([word or "" for word in words], DYNAMICS)
  return Action(tokens, mask, np.array([word is not None for word in words]), np.array(cut))


FREE = action([None, None])


class Roller:
  """The jitted pieces of one world, and rollouts that go through them."""

  def __init__(self, made: World | None = None, weights_: dict | None = None, jit=quick_jit):
    self.world = world() if made is None else made
    self.weights = weights() if weights_ is None else weights_
    self.step, self._begin = jit(self.world.step), jit(self.world.begin)

  def begin(self) -> RolloutState:
    return self._begin(self.weights, IMAGE, *PROMPTS, FPS, KEYS)

  def run(self, actions: list[Action], state: RolloutState | None = None) -> tuple[list[Clip], list[RolloutState]]:
    """The clips, and the states before and after each."""
    clips, states = [], [self.begin() if state is None else state]
    for asked in actions:
      clip, after = self.step(self.weights, states[-1], asked)
      clips.append(jax.tree.map(np.asarray, clip))
      states.append(after)
    return clips, states


def walk_of(clips: list[Clip]) -> Walk:
  """What the language model of a rollout has read, as one sequence."""
  shown = LAYOUT.key_frame_indices(FRAMES)
  return Walk(
    IMAGE,
    *PROMPTS,
    np.stack([clip.dynamics_BL for clip in clips], 1),
    np.stack([clip.dynamics_mask_BL for clip in clips], 1),
    np.stack([clip.frames_BTHWC[:, shown] for clip in clips], 1),
  )


def same(a, b) -> None:
  """Two trees are equal to the bit."""
  data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(data(x)), np.asarray(data(y))), a, b)
