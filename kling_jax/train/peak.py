"""Peak matrix throughput of a device: a table for TPU and GPU, a measured product on CPU."""

import functools
import time

import jax
import jax.numpy as jnp

from kling_jax.errors import ConfigError

# Dense bf16 FLOP/s of one JAX device (a TPU7x device is one of the two cores of a chip). Vendors' data sheets.
DEVICE_PEAKS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2250e12,
  "NVIDIA L4": 121e12,
  "Tesla T4": 65e12,
}


def device_peak(device: jax.Device | None = None) -> float | None:
  """FLOP/s that `device` could do at best; None for an accelerator that the table lacks (MFU is then not reported).

  All CPU devices of a process share its cores, so the measured figure is divided by their number.
  """
  device = device or jax.devices()[0]
  if device.platform == "cpu":
    return _gemm_once() / len([other for other in jax.local_devices() if other.platform == "cpu"])
  # The longest prefix wins: "TPU v5 lite" is not a "TPU v5".
  matches = [name for name in DEVICE_PEAKS if device.device_kind.startswith(name)]
  return DEVICE_PEAKS[max(matches, key=len)] if matches else None


@functools.cache
def _gemm_once() -> float:
  """Measured by the first run of a process; those after it (a sweep's) do not wait for it again."""
  return measured_gemm()


def measured_gemm(size: int = 1024, repeats: int = 8, dtype: str = "float32") -> float:
  """FLOP/s of the best of `repeats` square products of `size` on the default device."""
  if repeats < 1:
    raise ConfigError(f"repeats = {repeats} must be at least 1")
  x = jnp.ones((size, size), dtype)
  product = jax.jit(lambda x: x @ x)
  product(x).block_until_ready()
  best = float("inf")
  for _ in range(repeats):
    start = time.perf_counter()
    product(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best
