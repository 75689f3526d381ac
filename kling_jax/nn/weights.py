"""A parameter as a layer uses it: cast to the dtype of the computation, brought together where a trainer cut it up.

Under FSDP each device holds a part of every kernel. `used` gathers a parameter at its place of use, after the cast, so
that bfloat16 travels and not the float32 master; the gradient goes the other way, summed over devices straight into
the parameter's own layout. Without a trainer, `used` is the cast alone.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kling_jax.nn import lowering

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
  """How a trainer lays parameters out.

  Attributes:
    gather: (parameter, its logical axes) -> the same, laid out for use.
    scatter: (gradient, its logical axes) -> the same, laid out as the parameter is stored.
    gradient: dtype in which gradients of kernels are summed over devices.
  """

  gather: Callable[[jax.Array, Axes], jax.Array]
  scatter: Callable[[jax.Array, Axes], jax.Array]
  gradient: DTypeLike = jnp.float32


_placement: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


def placement() -> Placement | None:
  """The trainer's layout of parameters; None where there is no trainer."""
  return _placement.get()


@contextlib.contextmanager
def placing(how: Placement) -> Iterator[None]:
  """While tracing inside, parameters are used, and their gradients kept, as `how` says."""
  token = _placement.set(how)
  try:
    yield
  finally:
    _placement.reset(token)


def used(value: jax.Array, axes: Axes, dtype: DTypeLike) -> jax.Array:
  """The parameter `value`, whose dimensions are called `axes`, in `dtype` and ready for use."""
  how = _placement.get()
  if how is None or lowering.in_forward_mode():
    return gathered(how, value, axes, dtype)
  return _used(how, axes, jnp.dtype(dtype), value)


def gathered(how: Placement | None, value: jax.Array, axes: Axes, dtype: DTypeLike) -> jax.Array:
  """`used` without its gradient rule, for layers that have their own."""
  value = value.astype(dtype)
  return value if how is None else how.gather(value, axes)


def scattered(how: Placement | None, gradient: jax.Array, axes: Axes) -> jax.Array:
  """The gradient of a parameter, summed over devices into the parameter's layout; float32."""
  return (gradient if how is None else how.scatter(gradient, axes)).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _used(how: Placement, axes: Axes, dtype: jnp.dtype, value: jax.Array) -> jax.Array:
  return gathered(how, value, axes, dtype)


_used.defvjp(
  lambda how, axes, dtype, value: (gathered(how, value, axes, dtype), None),
  lambda how, axes, dtype, _, g: (scattered(how, g.astype(jnp.float32), axes),),
)
