"""What a function is being traced for: the platform it will run on, and whether it must have a forward derivative.

Both are read while tracing, so enter the context around the first call (or `lower`) of a jitted function: a function
that is already traced keeps the form that it was traced with.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)
_forward_mode: contextvars.ContextVar[bool] = contextvars.ContextVar("forward_mode", default=False)


def platform() -> str:
  """The platform to write code for: "cpu", "gpu" or "tpu"."""
  return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def target(name: str) -> Iterator[None]:
  """Traces for platform `name`, whatever this process runs on: a TPU step compiled on a CPU machine needs it."""
  token = _platform.set(name)
  try:
    yield
  finally:
    _platform.reset(token)


def in_forward_mode() -> bool:
  """Whether rules written only for reverse mode (`jax.custom_vjp`) must be left out."""
  return _forward_mode.get()


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
  """Traces in forms that `jax.jvp` and `jax.jacfwd` accept, for consistency and mean-flow losses; slower on CPU."""
  token = _forward_mode.set(True)
  try:
    yield
  finally:
    _forward_mode.reset(token)
