"""Forms of scaling laws: power laws and loss surfaces, in raw counts; scaling/published.py holds those in print.

Symbols: N parameters, T training tokens, B tokens a batch, C training FLOPs, L validation loss. All are raw counts
here; papers state their constants in units of 1e9 and the like, which live only inside the objects below.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from kling_jax.errors import UsageError
from kling_jax.models.flop_rules import FlopRule

SIX_NT = FlopRule("6nt")
LOG_PARAMS = (0.0, math.log(1e24))  # range of an optimum


class Optimum(NamedTuple):
  """Where a loss surface is lowest for a budget: N, T and the loss there (numbers, or one entry for each draw)."""

  params: Any
  tokens: Any
  loss: Any


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """value = unit * coefficient * product of (x / unit of x)^exponent over the arguments x.

  Attributes:
    coefficient: as printed; a number, or one for each draw.
    exponents: of the arguments by name: params, tokens, flops, loss, batch_tokens.
    units: raw counts in one unit of an argument, e.g. {"tokens": 1e9}; 1 where it is not named.
    unit: raw counts in one unit of the value.
  """

  coefficient: Any
  exponents: Mapping[str, Any]
  units: Mapping[str, float] = dataclasses.field(default_factory=dict)
  unit: float = 1.0

  def __call__(self, **given: Any) -> Any:
    """The value at raw counts, e.g. law(params=1e9, tokens=4e9); more arguments than the law has are ignored."""
    value = self.unit * self.coefficient
    for name, exponent in self.exponents.items():
      if given.get(name) is None:
        raise UsageError(f"this law is a function of {', '.join(self.exponents)}; {name} is not given")
      value = value * (np.asarray(given[name], float) / self.units.get(name, 1.0)) ** exponent
    return value


@dataclasses.dataclass(frozen=True)
class Surface:
  """L(N, T) = E + A / N^alpha + B / T^beta, N and T in raw counts.

  Each field is a number, or an array with one entry for each bootstrap draw; methods then broadcast over draws (give N
  and T a last axis of 1 to meet them).
  """

  E: Any
  A: Any
  B: Any
  alpha: Any
  beta: Any

  @classmethod
  def in_units(
    cls, E: Any, A: Any, B: Any, alpha: Any, beta: Any, *, params_unit: float, tokens_unit: float
  ) -> "Surface":
    """From prefactors of (N / params_unit)^-alpha and (T / tokens_unit)^-beta."""
    return cls(E, A * params_unit**alpha, B * tokens_unit**beta, alpha, beta)

  def __call__(self, params: Any, tokens: Any) -> Any:
    """The loss."""
    params, tokens = np.asarray(params, float), np.asarray(tokens, float)
    return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

  @property
  def params_exponent(self) -> Any:
    """a of N_opt ~ C^a under 6NT; T_opt ~ C^(1 - a)."""
    return self.beta / (self.alpha + self.beta)

  def optimum(self, flops: Any, rule: FlopRule = SIX_NT) -> Optimum:
    """The lowest loss that `flops` can buy.

    With 6NT it stands where alpha A N^-alpha = beta B T^-beta. Where a token's cost is no power of N, the right side
    is multiplied by d log cost / d log N, and the equation is solved by bisection in log N. Where a term vanishes, or
    nearly so, N ends at 1 or 1e24.
    """
    flops = np.asarray(flops, float)
    terms = np.log(np.maximum(self.alpha * self.A, 1e-300)) - np.log(np.maximum(self.beta * self.B, 1e-300))
    if rule.name == "6nt":
      log_params = np.clip((terms + self.beta * np.log(flops / 6)) / (self.alpha + self.beta), *LOG_PARAMS)
    else:
      log_params = self._stationary(terms, flops, rule)
    params = np.exp(log_params)
    tokens = rule.tokens(params, flops)
    return Optimum(params, tokens, self(params, tokens))

  def _stationary(self, terms: Any, flops: np.ndarray, rule: FlopRule) -> np.ndarray:
    shape = np.broadcast_shapes(flops.shape, np.shape(terms))
    low, high = np.full(shape, LOG_PARAMS[0]), np.full(shape, LOG_PARAMS[1])
    for _ in range(80):
      middle = (low + high) / 2
      params = np.exp(middle)
      excess = terms - self.alpha * middle + self.beta * np.log(rule.tokens(params, flops))  # falls with N
      right = excess > np.log(rule.slope(params))
      low, high = np.where(right, middle, low), np.where(right, high, middle)
    return (low + high) / 2

  def gradient(self, params: Any, tokens: Any) -> np.ndarray:
    """d L / d (E, A, B, alpha, beta) at N and T, stacked along a new last axis; for error propagation and design."""
    params, tokens = np.broadcast_arrays(np.asarray(params, float), np.asarray(tokens, float))
    u, v = params**-self.alpha, tokens**-self.beta
    return np.stack([np.ones_like(u), u, v, -self.A * u * np.log(params), -self.B * v * np.log(tokens)], axis=-1)


@dataclasses.dataclass(frozen=True)
class KaplanSurface:
  """L(N, T) = ((Nc / N)^(aN / aT) + Tc / T)^aT (Kaplan et al. 2020, eq. 1.5); raw counts, no floor."""

  Nc: float
  Tc: float
  aN: float
  aT: float

  def __call__(self, params: Any, tokens: Any) -> Any:
    """The loss."""
    params, tokens = np.asarray(params, float), np.asarray(tokens, float)
    return ((self.Nc / params) ** (self.aN / self.aT) + self.Tc / tokens) ** self.aT


@dataclasses.dataclass(frozen=True)
class Law:
  """A published or fitted set of laws behind one interface: `law("lr", params=1e9, tokens=4e9)`.

  Attributes:
    name: short name. source: paper, section, and how sure its constants are. units: of the constants as printed.
    quantities: what it states, by name: loss, lr, batch_tokens, params (N_opt), tokens (T_opt),
      critical_batch_tokens, fid, flops_per_token (N_opt counted in FLOPs a token). Each is a function of raw counts
      given by keyword: params, tokens, flops, loss.
    box: {"params" | "tokens" | "flops": (lowest, highest)} that the law was fitted on.
    notes: what to know before using it, contradictions included.
    rule: how its FLOPs are counted.
    residual: root mean square of the relative error of its loss fit; None where it is not stated.
    curvature: Hessian of the relative loss in (log lr, log B) at the optimum, for the regret of rounding.
  """

  name: str
  source: str
  units: str
  quantities: Mapping[str, Any]
  box: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()
  rule: FlopRule = SIX_NT
  residual: float | None = None
  curvature: tuple[tuple[float, float], tuple[float, float]] | None = None

  def __call__(self, quantity: str, **given: Any) -> Any:
    """The value of `quantity`.

    Raises:
      UsageError: the law does not state it, or an argument is missing.
    """
    if quantity not in self.quantities:
      raise UsageError(f"law {self.name} states {', '.join(self.quantities)}, not {quantity!r}")
    function = self.quantities[quantity]
    if isinstance(function, PowerLaw):
      return function(**given)
    missing = [name for name in ("params", "tokens") if given.get(name) is None]
    if missing:
      raise UsageError(f"{quantity} of law {self.name} is a function of params, tokens; {missing[0]} is not given")
    return function(given["params"], given["tokens"])

  @property
  def surface(self) -> Surface:
    """Its loss surface; UsageError where it has none of the additive form."""
    surface = self.quantities.get("loss")
    if not isinstance(surface, Surface):
      raise UsageError(f"law {self.name} has no loss surface E + A/N^alpha + B/T^beta")
    return surface
