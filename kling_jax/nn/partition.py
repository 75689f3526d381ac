"""The seam between models and meshes: models name the axes of a few activations, the trainer may lay them out."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]

_constrain: contextvars.ContextVar[Constrain | None] = contextvars.ContextVar("constrain", default=None)


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
  """Marks the logical axes of an activation, e.g. ("batch", "tokens", None); identity unless a layout is in force."""
  layout = _constrain.get()
  return x if layout is None else layout(x, names)


@contextlib.contextmanager
def constraints(layout: Constrain) -> Iterator[None]:
  """While the block traces, `constrain` calls `layout`."""
  token = _constrain.set(layout)
  try:
    yield
  finally:
    _constrain.reset(token)
