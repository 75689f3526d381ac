"""Products in int8 or float8, through qwix: an option of the large kernels of transformer blocks, and of nothing else.

Values are scaled by the largest of each token, kernels by the largest of each output column, and rounded; the product
is taken in the small type and scaled back. Master weights stay float32. Gradients pass the rounding straight through:

  int8  x, w in int8; the backward pass in the type of the computation
  fp8   x, w in float8_e4m3fn, gradients in float8_e5m2 (Micikevicius et al. 2022, arXiv 2209.05433)
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kling_jax.errors import ConfigError, nearest

MODES = ("none", "int8", "fp8")
KERNELS = frozenset({"heads", "mlp"})  # a kernel with one of these axes: projections of attention, and the MLP
_FORWARD = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
_mode: contextvars.ContextVar[str] = contextvars.ContextVar("quantized", default="none")


@contextlib.contextmanager
def products(mode: str) -> Iterator[None]:
  """While tracing inside, products with `KERNELS` are taken as `mode` says.

  Raises:
    ConfigError: an unknown mode, or one that needs qwix where it is not installed.
  """
  check(mode)
  token = _mode.set(mode)
  try:
    yield
  finally:
    _mode.reset(token)


def check(mode: str) -> None:
  """ConfigError where `mode` is unknown or cannot be had here."""
  if mode not in MODES:
    raise ConfigError(f"config key 'quantize' = {mode!r} is unknown{nearest(mode, MODES)}")
  if mode != "none":
    _qwix(mode)


def mode_of(axes: tuple[str | None, ...]) -> str:
  """The mode for a kernel with these logical axes."""
  return _mode.get() if KERNELS & set(axes) else "none"


def _qwix(mode: str) -> Any:
  try:
    import qwix
  except ImportError as error:
    raise ConfigError(
      f"config key 'quantize' = {mode!r} needs qwix, which is not installed: pip install 'kling_jax[quantize]'"
    ) from error
  return qwix


def forward(mode: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x (..., in) @ kernel (in, out) in the mode's type, in the dtype of `x`."""
  dtype = _FORWARD[mode]
  return _dot(mode, (x, dtype), (kernel, dtype), (x.ndim - 1,), (0,)).astype(x.dtype)


def backward(mode: str, x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Gradients of x (in its dtype) and of the kernel (float32) for a mode that rounds gradients too, fp8."""
  gradient, rows = jnp.float8_e5m2, tuple(range(x.ndim - 1))
  dx = _dot(mode, (g, gradient), (kernel, _FORWARD[mode]), (g.ndim - 1,), (1,))
  dkernel = _dot(mode, (x, _FORWARD[mode]), (g, gradient), rows, rows)
  return dx.astype(x.dtype), dkernel.astype(jnp.float32)


def _dot(mode: str, a: tuple[Any, Any], b: tuple[Any, Any], over_a: tuple[int, ...], over_b: tuple[int, ...]):
  """Product of two arrays, each with the type that it is rounded to; every axis that stays has scales of its own."""
  qwix = _qwix(mode)
  rounded = []
  for (value, dtype), over in ((a, over_a), (b, over_b)):
    kept = tuple(axis for axis in range(value.ndim) if axis not in over)
    rounded.append(qwix.quantize(value.astype(jnp.float32), dtype, channelwise_axes=kept))
  return qwix.dot_general(*rounded, ((over_a, over_b), ((), ())))
