"""Compiles a traced program for its topology and reads what the compiler made of it: memory, collectives, the bound."""

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from kling_jax.errors import MeshError
from kling_jax.plan import collectives, roofline
from kling_jax.plan.programs import Traced
from kling_jax.plan.topology import SPARE, Topology

_DIFFERENTIATED = re.compile(r'op_name="(?!.*transpose\()[^"]*jvp\([^)]*\)/while"')


@dataclasses.dataclass(frozen=True)
class Report:
  """What is known of one compiled program; all sizes are bytes on one device.

  Attributes:
    name: of the program.
    hbm_bytes: all that it needs at once: arguments, results that are not put in their place, temporaries, code.
    hbm_available: what the compiler gives a program on this chip.
    host_bytes: arguments and temporaries in the hosts' memory.
    by_kind: hbm_bytes in parts. `activations` are the arrays that the loop over blocks leaves for the backward pass,
      found in the program's text; `temporaries` the rest of what is neither given nor returned.
    peak_bytes: the compiler's own figure for the fullest moment, which leaves out what its allocator cannot reuse.
    flops: exact ones of the network, over all devices; None where the task does not count them.
    xla_flops: the compiler's, of one device: it counts loop bodies once and kernels not at all.
    moved: every kind of transfer by mesh axes, see `roofline.Transfer`.
    bound: the roofline, see `roofline.Bound`.
    lower_s, compile_s: seconds.
  """

  name: str
  hbm_bytes: int
  hbm_available: int
  host_bytes: int
  by_kind: dict[str, int]
  peak_bytes: int
  flops: float | None
  xla_flops: float
  moved: tuple[roofline.Transfer, ...]
  bound: roofline.Bound
  lower_s: float
  compile_s: float

  @property
  def fits(self) -> bool:
    """Whether it leaves `SPARE` of the memory free."""
    return self.hbm_bytes <= (1 - SPARE) * self.hbm_available

  def to_json(self) -> dict[str, Any]:
    """JSON-ready, with the keys that `kling plan --json` promises."""
    return {
      "program": self.name,
      "fits": self.fits,
      "hbm_bytes_per_device": self.hbm_bytes,
      "hbm_available": self.hbm_available,
      "host_bytes_per_device": self.host_bytes,
      "peak_bytes": self.peak_bytes,
      "by_kind": self.by_kind,
      "flops_per_step": self.flops,
      "xla_flops_per_device": self.xla_flops,
      "collectives": [dataclasses.asdict(one) for one in self.moved],
      "bound_step_s": self.bound.seconds,
      "bound_mfu": self.bound.mfu,
      "bound_by": self.bound.parts,
      "lower_s": self.lower_s,
      "compile_s": self.compile_s,
    }


def compile_(
  traced: Traced, topology: Topology, mesh: Any, work: roofline.Work, options: Mapping[str, str] | None = None
) -> tuple[Any, Report]:
  """Compiles and reads; `options` are flags of the compiler.

  Raises:
    MeshError: the compiler itself refuses the program for its memory.
  """
  began = time.perf_counter()
  try:
    program = traced.lowered.compile(compiler_options=dict(options or {}) or None)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    line = next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)
    raise MeshError(
      f"{traced.name} on {topology} with mesh {dict(mesh.shape)} does not fit: {line.partition(':')[2].strip()[:300]}"
    ) from error
  seconds = time.perf_counter() - began
  text, memory = program.as_text(), program.memory_analysis()
  moved = roofline.transfers(collectives.read(text, mesh.shape), topology, mesh)
  saved = stacked(text)
  arguments = dict(traced.arguments)
  arguments["other arguments"] = memory.argument_size_in_bytes - sum(arguments.values())
  by_kind = arguments | {
    "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "activations": min(saved, memory.temp_size_in_bytes),
    "temporaries": memory.temp_size_in_bytes - min(saved, memory.temp_size_in_bytes),
    "code": memory.generated_code_size_in_bytes,
  }
  cost = program.cost_analysis() or {}
  return program, Report(
    name=traced.name,
    hbm_bytes=sum(by_kind.values()),
    hbm_available=topology.chip.hbm,
    host_bytes=memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes,
    by_kind=by_kind,
    peak_bytes=memory.peak_memory_in_bytes,
    flops=traced.flops,
    xla_flops=float(cost.get("flops", math.nan)),
    moved=moved,
    bound=roofline.bound(topology, work, moved),
    lower_s=traced.lower_s,
    compile_s=seconds,
  )


def stacked(text: str) -> int:
  """Bytes of the stacks that loops leave for the backward pass: buffers made before a loop, a slice for each turn.

  The loops are those that were differentiated themselves, not loops inside them. The padding of tiles is not counted.
  """
  computations, _ = collectives._parse(text)
  total = 0
  for body in computations.values():
    made = {one.name: one for one in body if one.opcode == "custom-call" and "AllocateBuffer" in one.rest}
    loops: Sequence[Any] = [one for one in body if one.opcode == "while" and _DIFFERENTIATED.search(one.rest)]
    tuples = {one.name: one for one in body if one.opcode == "tuple"}
    for loop in loops:
      operand = re.search(r"%([\w.\-]+)", loop.rest)
      given = tuples.get(operand.group(1)) if operand else None
      names = re.findall(r"%([\w.\-]+)", given.rest) if given else []
      turns = collectives._trips(computations, loop)
      stacks = [made[name].result for name in names if name in made and f"[{turns}," in made[name].result]
      total += sum(collectives.size(result) for result in stacks)
  return total
