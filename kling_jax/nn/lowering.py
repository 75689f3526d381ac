"""What a function is being traced for: the platform it will run on, and whether it must have a forward derivative.

All of it is read while tracing, so enter the context around the first call (or `lower`) of a jitted function: a
function that is already traced keeps the form that it was traced with.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_platform: contextvars.ContextVar[tuple[str, str | None] | None] = contextvars.ContextVar("platform", default=None)
_forward_mode: contextvars.ContextVar[bool] = contextvars.ContextVar("forward_mode", default=False)
_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)

# What jax.Device.device_kind says of each TPU generation.
_GENERATIONS = {
  "TPU v4": "v4",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "TPU7x": "tpu7x",
}


def platform() -> str:
  """The platform to write code for: "cpu", "gpu" or "tpu"."""
  target = _platform.get()
  return target[0] if target else jax.default_backend()


def generation() -> str | None:
  """The TPU generation to write code for (v4, v5e, v5p, v6e, tpu7x); None where it is unknown or not a TPU."""
  target = _platform.get()
  if target:
    return target[1]
  return _GENERATIONS.get(jax.devices()[0].device_kind) if jax.default_backend() == "tpu" else None


@contextlib.contextmanager
def target(name: str, generation: str | None = None) -> Iterator[None]:
  """Traces for platform `name`, whatever this process runs on: a TPU step compiled on a CPU machine needs it."""
  token = _platform.set((name, generation))
  try:
    yield
  finally:
    _platform.reset(token)


def interpret() -> bool:
  """Whether Pallas kernels are traced for the interpreter, which runs them on any platform."""
  return _interpreted.get()


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
  """Traces Pallas kernels for the interpreter: a TPU kernel checked on a CPU machine, thousands of times slower."""
  token = _interpreted.set(True)
  try:
    yield
  finally:
    _interpreted.reset(token)


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
