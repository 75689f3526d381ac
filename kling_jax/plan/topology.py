"""TPU topologies by name, what their chips can do, and the compiler for them on a machine that has none.

v4, v5p, tpu7x: AxBxC chips, a torus in three dimensions; v5e, v6e: AxB chips
"""

import dataclasses
import math
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from kling_jax.errors import UsageError, nearest

GIB = 2**30
SPARE = 0.05  # of a device's memory stays free in what is said to fit


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip can do at best.

  Sources: FLOP/s, memory bandwidth and DCN of v5p, v6e and tpu7x: docs.cloud.google.com/tpu/docs/tpu7x, table "System
  architecture" (DCN of 50, 100 and 100 Gbit/s a chip); v4 and v5e: "How to Scale Your Model"
  (jax-ml.github.io/scaling-book), which also gives the bandwidth of a link (one way) for all. `hbm` is what the
  compiler (libtpu 0.0.42.1) itself says is available when it refuses a program that is too large.

  Attributes:
    dimensions: of the torus.
    devices: JAX devices of a chip; v4 and tpu7x show their two cores as one device each.
    flops: dense bfloat16 FLOP/s of the chip.
    hbm: bytes that the compiler gives the programs of one device.
    hbm_bandwidth: bytes a second, of the chip.
    link: bytes a second over one link of the torus, one way; a chip has two links a dimension.
    dcn: bytes a second to other slices, a chip; for v4 that of v5p, which no source at hand confirms.
    cores: tensor cores of a chip.
    matrix: sides of a matrix unit; a product whose inner or outer size is smaller leaves a part of it idle.
  """

  dimensions: int
  devices: int
  flops: float
  hbm: int
  hbm_bandwidth: float
  link: float
  dcn: float
  cores: int
  matrix: int


CHIPS = {
  "v4": Chip(3, 2, 2.75e14, int(15.25 * GIB), 1.2e12, 4.5e10, 6.25e9, 2, 128),
  "v5e": Chip(2, 1, 1.97e14, int(15.75 * GIB), 8.1e11, 4.5e10, 3.125e9, 1, 128),
  "v5p": Chip(3, 1, 4.59e14, int(95.74 * GIB), 2.765e12, 9.0e10, 6.25e9, 2, 128),
  "v6e": Chip(2, 1, 9.18e14, int(31.25 * GIB), 1.638e12, 9.0e10, 1.25e10, 1, 256),
  "tpu7x": Chip(3, 2, 2.307e15, int(94.75 * GIB), 7.38e12, 9.0e10, 1.25e10, 2, 256),
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """So many chips of one generation in a torus, and slices of that form joined by the data-centre network.

  Attributes:
    generation: a key of `CHIPS`.
    shape: chips along each dimension of a slice.
    slices: such slices.
  """

  generation: str
  shape: tuple[int, ...]
  slices: int = 1

  @classmethod
  def parse(cls, text: str, slices: int = 1) -> "Topology":
    """Reads `v5p:4x4x8`.

    Raises:
      UsageError: an unknown generation, or a form that its network does not have.
    """
    generation, colon, form = text.partition(":")
    if generation not in CHIPS:
      raise UsageError(f"TPU generation {generation!r} of --topology {text!r} is unknown{nearest(generation, CHIPS)}")
    dimensions = CHIPS[generation].dimensions
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", form, re.ASCII) or form.count("x") != dimensions - 1:
      example = {2: "4x4", 3: "4x4x4"}[dimensions]
      raise UsageError(
        f"--topology {text!r}: {generation} has a network of {dimensions} dimensions, e.g. {generation}:{example}"
      )
    if slices < 1:
      raise UsageError(f"--slices {slices}: there is at least one slice")
    return cls(generation, tuple(int(size) for size in form.split("x")), slices)

  def __str__(self) -> str:
    return f"{self.generation}:{'x'.join(map(str, self.shape))}"

  @property
  def chip(self) -> Chip:
    return CHIPS[self.generation]

  @property
  def chips(self) -> int:
    """Of all slices."""
    return math.prod(self.shape) * self.slices

  @property
  def size(self) -> int:
    """JAX devices of all slices."""
    return self.chips * self.chip.devices

  @property
  def device_flops(self) -> float:
    """bfloat16 FLOP/s of a device."""
    return self.chip.flops / self.chip.devices

  def devices(self) -> Sequence[Any]:
    """The devices to compile for; `compiler` must have been found before JAX was first asked for TPUs.

    Raises:
      UsageError: no TPU compiler is installed, or it knows no such topology.
    """
    from jax.experimental import topologies

    several = {"num_slices": self.slices} if self.slices > 1 else {}
    try:
      devices = topologies.get_topology_desc(platform="tpu", topology_name=str(self), **several).devices
    except Exception as error:
      line = str(error).strip().splitlines()[0][:200]
      raise UsageError(
        f"--topology {self}: the TPU compiler gives no such topology ({line}); if it is missing, `pip install "
        "kling_jax[tpu]` or, in a checkout, `make tpu` installs it"
      ) from error
    if len(devices) != self.size:
      raise UsageError(f"--topology {self} has {len(devices)} devices, not the {self.size} that CHIPS counts")
    return devices


def compiler() -> None:
  """Makes this process one that may compile for TPUs that it does not have; call it before JAX is imported.

  The compiler is a part of libtpu, either installed or, in a checkout, beside the environment (`make tpu`).
  """
  beside = pathlib.Path(sys.prefix) / "libtpu"
  if beside.is_dir() and str(beside) not in sys.path:
    sys.path.append(str(beside))
  settings = {
    "JAX_PLATFORMS": "cpu",  # a TPU that is here is left alone
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs on a TPU, so processes need not take turns
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server is asked
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
  }
  for name, value in settings.items():
    os.environ.setdefault(name, value)
