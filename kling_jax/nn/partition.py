"""The seam where a trainer places activations: modules name the axes of an array, the trainer says where they lie.

Activation axes used by the modules: batch, tokens, text, embed, heads, head, mlp. They are looked up apart from the
axes of parameters: "embed" is commonly split over `fsdp` in a kernel and whole in an activation. Heads and MLP columns
of layers over other tokens than the video's have names of their own (`of`), so that a trainer can lay them out apart.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping

import jax

from kling_jax.nn.mask import Mask

Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
Tokens = tuple[str | None, str | None]  # names of the tokens that ask and of those that are asked
Attend = Callable[[jax.Array, jax.Array, jax.Array, Mask, str, Tokens], jax.Array]  # q, k, v, mask, road, tokens
_constrain: contextvars.ContextVar[Constrain | None] = contextvars.ContextVar("constrain", default=None)
_parts: contextvars.ContextVar[Mapping[str, int]] = contextvars.ContextVar("parts", default={})  # noqa: B039
_attend: contextvars.ContextVar[Attend | None] = contextvars.ContextVar("attend", default=None)


def of(tokens: str, axis: str) -> str:
  """The name of `axis` ("heads", "mlp") in a layer over `tokens`: itself for the video's, "text_heads" for a text's."""
  return axis if tokens == "tokens" else f"{tokens}_{axis}"


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
  """Places `x`, whose dimensions are called `axes`, as the trainer says; without a trainer, the identity."""
  place = _constrain.get()
  return x if place is None else place(x, axes)


def attend() -> Attend | None:
  """How the trainer has attention shared among devices; None where each call runs whole, where it stands."""
  return _attend.get()


def parts(axis: str) -> int:
  """Into how many equal parts the trainer cuts activations along `axis`; 1 without a trainer."""
  return _parts.get().get(axis, 1)


@contextlib.contextmanager
def placing(
  place: Constrain,
  attend: Attend | None = None,
  parts: Mapping[str, int] = {},
) -> Iterator[None]:
  """While tracing inside, `constrain(x, axes)` is `place(x, axes)`, and `attention` goes through `attend`.

  `place` is usually `jax.lax.with_sharding_constraint`; `attend` a `jax.shard_map` around the kernels, which XLA's
  partitioner cannot see into (it would gather their operands on every device); `parts` tells how many parts each
  named axis is cut into.
  """
  tokens = _constrain.set(place), _attend.set(attend), _parts.set(parts)
  try:
    yield
  finally:
    _constrain.reset(tokens[0])
    _attend.reset(tokens[1])
    _parts.reset(tokens[2])
