"""Training FLOPs a token by the named rules of scaling laws; plain arithmetic on numbers and arrays, no JAX.

A law is tied to the rule its compute was counted by: the same runs gave N_opt exponents from 0.37 to 0.70 under three
conventions. So a rule has a name that is stored with every run.
"""

import dataclasses
from typing import Any

from kling_jax.errors import UsageError, nearest

EXACT = "exact"  # what the trainer counts: every matrix product of the network, models/flops.py
NAMES = ("6nt", "cross_dit")


@dataclasses.dataclass(frozen=True)
class FlopRule:
  """FLOPs of a training token as a function of N, the number of parameters.

  6nt: 6 N (Kaplan et al. 2020, arXiv 2001.08361, section 2.1); no attention.
  cross_dit: 3/4 N (7 + n_ctx / d) (arXiv 2411.17470) for blocks of 16 d^2 parameters: self-attention, cross-attention
    (queries and output alone act on video tokens) and an MLP of 4 d, each product three times in training.

  Attributes:
    name: "6nt" or "cross_dit".
    context: n_ctx of cross_dit, the tokens that a token attends to. 640 fits the paper's run of 0.72e9 parameters and
      5.85e20 FLOPs; whether that is a window of 640, or half of 1280, the paper does not say.
  """

  name: str = "6nt"
  context: float | None = None

  def __post_init__(self):
    if self.name not in NAMES:
      known = f"{nearest(self.name, NAMES)} ({EXACT!r} is counted for a network, not for a number of parameters)"
      raise UsageError(f"FLOP rule {self.name!r} is unknown{known}")
    if (self.name == "cross_dit") != (self.context is not None):
      raise UsageError("FLOP rule cross_dit needs the attention context (cross_dit:640), 6nt has none")

  @classmethod
  def parse(cls, text: str) -> "FlopRule":
    """Reads `str(rule)`: "6nt", "cross_dit:640"."""
    name, _, context = text.partition(":")
    try:
      return cls(name, float(context) if context else None)
    except ValueError as error:
      raise UsageError(f"FLOP rule {text!r}: {context!r} is no number of tokens") from error

  def __str__(self) -> str:
    return self.name if self.context is None else f"{self.name}:{self.context:g}"

  def per_token(self, params: Any, width: Any = None) -> Any:
    """FLOPs of one training token.

    Args:
      params: N, a number or an array.
      width: d; by default the cube root of N, as in the family of arXiv 2411.17470 (depth = d / 16).
    """
    if self.name == "6nt":
      return 6.0 * params
    width = params ** (1 / 3) if width is None else width
    return 0.75 * params * (7 + self.context / width)

  def flops(self, params: Any, tokens: Any, width: Any = None) -> Any:
    """FLOPs of training N = params on T = tokens."""
    return tokens * self.per_token(params, width)

  def tokens(self, params: Any, flops: Any, width: Any = None) -> Any:
    """The tokens T that C = flops pay for."""
    return flops / self.per_token(params, width)

  def slope(self, params: Any) -> Any:
    """d log per_token / d log N in the family with width = N^(1/3); 1 for 6nt."""
    if self.name == "6nt":
      return 1.0
    share = self.context / params ** (1 / 3)
    return 1 - share / 3 / (7 + share)
