"""Classifier-free guidance with its own scale for image (or history), scores and text.

The composition is the nested one of InstructPix2Pix (Brooks et al. 2022, equation 3), with conditions added in the
order image, scores, text. With p(...) the network's output under the conditions named, the others dropped:

  p = p() + image  (p(image)               - p())
          + scores (p(image, scores)       - p(image))
          + text   (p(image, scores, text) - p(image, scores))

Sorted by network call, the factors are (1 - image, image - scores, scores - text, text) and sum to 1. A call whose
factor is 0 is not made: all scales 1 is one call and the identity; text 6 alone is the two calls of ordinary guidance,
both with image and scores given; text 6 and scores 6 is two calls too, the second without either. Text stands last for
this reason: its scale is the one that is nearly always used. A negative prompt is what the caller puts in place of a
dropped text.

History (the frames before a clip, `image` here) has two more forms (History Guidance, Song et al. 2025, arXiv
2502.06764), for networks that were trained on histories of many noise levels. `stabilised` shows it at a noise level
in every call that has it. `fractional` shows it as it is, and exaggerates only what a noisy history says, so that the
details of what was filmed do not freeze the motion:

  p = p() + (p(image) - p()) + (image - 1) (p(noised image) - p()) + scores (...) + text (...)

Since the factors sum to 1 and all conversions in process.py are linear, guiding the velocity, v, x0 or eps is the same.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kling_jax.diffusion.process import expand
from kling_jax.errors import ConfigError, nearest

# The conditions that a network call drops, of {"image", "scores", "text", "detail"}; without "detail" the image (or
# history) is shown at the noise level `Guidance.level`.
Branch = frozenset[str]
PredictDrop = Callable[[jax.Array, jax.Array, Branch], jax.Array]
Predict = Callable[[jax.Array, jax.Array], jax.Array]
PredictMany = Callable[[jax.Array, jax.Array, tuple[Branch, ...]], Sequence[jax.Array]]

# From nothing dropped to everything dropped, against the order in which conditions are added.
_LADDER: tuple[Branch, ...] = (
  frozenset(),
  frozenset({"text"}),
  frozenset({"text", "scores"}),
  frozenset({"text", "scores", "image"}),
)
FULL: Branch = _LADDER[0]
HISTORY = ("vanilla", "stabilised", "fractional")


@dataclasses.dataclass(frozen=True)
class Guidance:
  """How strongly each condition steers; hashable Python numbers, because they decide which network calls are made.

  Attributes:
    text, scores, image: scales; 1 = as trained, 0 = as if dropped, above 1 = exaggerated.
    interval: (low, high) times in which guidance acts; outside, the prediction is the fully conditioned one
      (Kynkäänniemi et al. 2024). (0, 1) = always.
    rescale: 0 to 1, how far the standard deviation of each guided sample is pulled back to that of the fully
      conditioned prediction, against over-exposure (Lin et al. 2023, section 3.4; they use 0.7).
    history: "vanilla", "stabilised" or "fractional": how `image` is composed, see the head of this file.
    level: noise level in [0, 1] at which "stabilised" and "fractional" show the history.
  """

  text: float = 1.0
  scores: float = 1.0
  image: float = 1.0
  interval: tuple[float, float] = (0.0, 1.0)
  rescale: float = 0.0
  history: str = "vanilla"
  level: float = 0.0

  def __post_init__(self) -> None:
    if self.history not in HISTORY:
      raise ConfigError(f"history guidance {self.history!r} does not exist{nearest(self.history, HISTORY)}")
    if not 0 <= self.level <= 1:
      raise ConfigError(f"the noise level of history guidance must lie in [0, 1], not {self.level}")
    for name in ("text", "scores", "image"):
      if not math.isfinite(getattr(self, name)):
        raise ConfigError(
          f"guidance scale {name} must be a finite number, not {getattr(self, name)}; 1 switches it off"
        )
    low, high = self.interval
    if not 0 <= low <= high <= 1:
      raise ConfigError(f"guidance interval must be 0 <= low <= high <= 1 (times, 1 = noise), not {self.interval}")
    if not 0 <= self.rescale <= 1:
      raise ConfigError(f"guidance rescale must lie in [0, 1], not {self.rescale}; 0 switches it off")


def branches(guidance: Guidance) -> tuple[Branch, ...]:
  """The network calls that `guidance` needs, each as the set of conditions to drop, the fullest first.

  The fully conditioned one is among them whenever it is used: by its own factor, by rescale or outside the interval.
  """
  return tuple(branch for branch, _ in _factors(guidance))


def combine(predictions: Sequence[jax.Array], guidance: Guidance, time: jax.Array | float) -> jax.Array:
  """Composes the predictions of `branches(guidance)`, in that order, to the guided one; float32.

  Args:
    predictions: arrays (B, T, H, W, C), raw network outputs (of any one kind).
    guidance: the scales.
    time: of the predictions, () or (B,); decides about the interval.
  """
  factors = _factors(guidance)
  arrays = [prediction.astype(jnp.float32) for prediction in predictions]
  guided = sum((factor * array for (_, factor), array in zip(factors, arrays, strict=True) if factor), jnp.float32(0))
  if len(factors) == 1:
    return arrays[0]
  if guidance.rescale:
    axes = tuple(range(1, guided.ndim))
    scale = arrays[0].std(axes, keepdims=True) / jnp.maximum(guided.std(axes, keepdims=True), 1e-12)
    guided = guided * (guidance.rescale * scale + 1 - guidance.rescale)
  if guidance.interval == (0.0, 1.0):
    return guided
  return jnp.where(expand(_inside(guidance, time), guided), guided, arrays[0])


def guided(predict: PredictDrop, guidance: Guidance, *, predict_many: PredictMany | None = None) -> Predict:
  """Wraps a network into the `predict(x, time)` that samplers call.

  Args:
    predict: (x, time scalar, conditions to drop) -> raw network output.
    guidance: the scales; with all of them 1 the result is one call of `predict` with nothing dropped.
    predict_many: (x, time, branches) -> one output a branch, for callers that run all branches in one network call
      (batched along the data axis). Without it, `predict` is called once a branch.

  Returns:
    (x, time scalar) -> guided output. Outside the interval only the fully conditioned branch is computed.
  """
  many = predict_many or (lambda x, time, drops: [predict(x, time, drop) for drop in drops])
  drops, full = branches(guidance), _full(guidance)
  if drops == (full,):
    return lambda x, time: predict(x, time, full)

  def everywhere(x: jax.Array, time: jax.Array) -> jax.Array:
    return combine(many(x, time, drops), guidance, time)

  def in_interval(x: jax.Array, time: jax.Array) -> jax.Array:
    plain = lambda: predict(x, time, full).astype(jnp.float32)
    return jax.lax.cond(_inside(guidance, time), lambda: everywhere(x, time), plain)

  return everywhere if guidance.interval == (0.0, 1.0) else in_interval


def _full(guidance: Guidance) -> Branch:
  return frozenset({"detail"}) if guidance.history == "stabilised" else FULL


def _factors(guidance: Guidance) -> list[tuple[Branch, float]]:
  image, scores, text = guidance.image, guidance.scores, guidance.text
  factors = [text, scores - text, image - scores, 1 - image]
  pairs = list(zip(_LADDER, factors, strict=True))
  if guidance.history == "stabilised":
    pairs = [(branch if "image" in branch else branch | {"detail"}, factor) for branch, factor in pairs]
  elif guidance.history == "fractional":
    alone, noised = _LADDER[2], _LADDER[2] | {"detail"}
    pairs = [*pairs[:2], (alone, 1 - scores), (noised, image - 1), pairs[3]]
  used = [(branch, factor) for branch, factor in pairs if factor]
  needs_full = bool(guidance.rescale) or guidance.interval != (0.0, 1.0)
  return [(_full(guidance), 0.0), *used] if needs_full and not text else used


def _inside(guidance: Guidance, time: jax.Array | float) -> jax.Array:
  low, high = guidance.interval
  time = jnp.asarray(time)
  return (time >= low) & (time <= high)
