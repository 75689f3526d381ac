"""The seam where a trainer places activations: modules name the axes of an array, the trainer says where they lie.

Activation axes used by the modules: batch, tokens, embed, heads, head, mlp. They are looked up apart from the axes of
parameters: "embed" is commonly split over `fsdp` in a kernel and whole in an activation.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
_constrain: contextvars.ContextVar[Constrain | None] = contextvars.ContextVar("constrain", default=None)


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Places `x`, whose dimensions are called `axes`, as the trainer says; without a trainer, the identity."""
  place = _constrain.get()
  return x if place is None else place(x, axes)


@contextlib.contextmanager
def placing(place: Constrain) -> Iterator[None]:
  """While tracing inside, `constrain(x, axes)` is `place(x, axes)`: usually `jax.lax.with_sharding_constraint`."""
  token = _constrain.set(place)
  try:
    yield
  finally:
    _constrain.reset(token)
