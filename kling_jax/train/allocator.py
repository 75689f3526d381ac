"""glibc told to keep the memory that a CPU train step frees, because the next step asks for the same blocks again."""

import ctypes
import os
import sys

import jax

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # the names of mallopt(3)
_TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
  """Stops glibc from handing large blocks back to the kernel between steps; returns whether it was told so.

  By default every block of more than 32 MB (at first 128 kB) is mapped anew and its pages are zeroed by the kernel on
  first touch, in each step again. Kept, a step of the XS model on two cores takes 0.7 of the time. The price: the
  process stays as large as it was at its peak. Where the backend is no CPU, the C library is not glibc, or the user
  set a `MALLOC_*` variable, nothing is changed.
  """
  if (
    jax.default_backend() != "cpu" or sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ)
  ):
    return False
  library = ctypes.CDLL(None)
  if not hasattr(library, "gnu_get_libc_version"):
    return False
  settings = ((_TRIM_THRESHOLD, -1), (_TOP_PAD, _TOP_PAD_BYTES), (_MMAP_MAX, 0))
  return all(library.mallopt(name, value) == 1 for name, value in settings)
