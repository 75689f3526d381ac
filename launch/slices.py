"""TPU slices by their names: chips, hosts, runtime, cost."""

import dataclasses
import re

from kling_jax.errors import UsageError, nearest

# Generation: chips for a number behind the name's dash (v4 and v5p count cores, two a chip), chips that one host may
# hold, and the runtime image (cloud.google.com/tpu/docs/runtimes).
GENERATIONS = {
  "v2": (0.5, 4, "tpu-ubuntu2204-base"),
  "v3": (0.5, 4, "tpu-ubuntu2204-base"),
  "v4": (0.5, 4, "tpu-ubuntu2204-base"),
  "v5litepod": (1.0, 8, "v2-alpha-tpuv5-lite"),
  "v5p": (0.5, 4, "v2-alpha-tpuv5"),
  "v6e": (1.0, 8, "v2-alpha-tpuv6e"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A TPU slice: `accelerator` as gcloud names it, e.g. v5litepod-16.

  Raises:
    UsageError: no slice has that name.
  """

  accelerator: str

  def __post_init__(self) -> None:
    generation, _, number = self.accelerator.partition("-")
    if generation not in GENERATIONS:
      raise UsageError(f"accelerator type {self.accelerator!r} is unknown{nearest(generation, GENERATIONS)}")
    if not re.fullmatch(r"[1-9]\d*", number) or self.chips < 1:
      raise UsageError(f"accelerator type {self.accelerator!r} is not of the form {generation}-NUMBER")

  @property
  def chips(self) -> int:
    generation, _, number = self.accelerator.partition("-")
    return int(int(number) * GENERATIONS[generation][0])

  @property
  def hosts(self) -> int:
    """One for up to `single` chips; beyond, a host for every four."""
    single = GENERATIONS[self.accelerator.partition("-")[0]][1]
    return 1 if self.chips <= single else -(-self.chips // 4)

  @property
  def runtime(self) -> str:
    return GENERATIONS[self.accelerator.partition("-")[0]][2]


def cost(units: int, unit: str, usd_per_hour: float | None, hours: float) -> str:
  """What `units` cost an hour and at most, in one line.

  Raises:
    UsageError: the price is not given; nobody else knows it.
  """
  if usd_per_hour is None:
    raise UsageError(
      f"give --usd_per_{unit}_hour, the price of one {unit} for an hour in your zone and kind (spot or not): prices "
      "change, so none is built in (cloud.google.com/tpu/pricing; your bill); 0 for what costs nothing"
    )
  if not (usd_per_hour >= 0 and hours > 0):
    raise UsageError(f"--usd_per_{unit}_hour must be 0 or more and --hours more than 0, not {usd_per_hour}, {hours}")
  hourly = units * usd_per_hour
  return (
    f"cost: {units} {unit}{'' if units == 1 else 's'} x ${usd_per_hour:g} = ${hourly:,.2f} an hour, "
    f"at most ${hourly * hours:,.2f} in {hours:g} h"
  )
