"""The collectives of a compiled program, read from its optimised HLO text: what moves, how much, along which mesh axes.

  read(jax.jit(step).lower(...).compile().as_text(), mesh.shape)

Written against the text of XLA for CPU and TPU: three notations of device groups, asynchronous forms, and the TPU
compiler's reduce-scatter, which may be no operation of that name but a fusion that calls an `all-reduce-scatter`.
Between TPU slices it writes a send to the host and a receive from it, which name the collective that they stand for.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
  "collective-broadcast",
)  # fmt: skip
_BITS = {"pred": 8, "token": 0} | {
  f"{kind}{bits}": bits for kind in ("s", "u", "f", "bf") for bits in (2, 4, 8, 16, 32, 64)
} | {"c64": 64, "c128": 128}  # fmt: skip
_WORK = ("fusion", "convolution", "dot", "custom-call", "while")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:calls|body|condition|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_MESH_GROUPS = re.compile(
  r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^()]*\))*)\))?(?: \{([^}]*)\})?(?=,|\s|$)"
)
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation, as each device sees it.

  Attributes:
    kind: one of `KINDS`.
    arrays: (dtype, shape) of each result on one device.
    groups: positions in the mesh that talk to each other; (source, target) pairs of a collective-permute; () between
      slices, where the text does not say.
    axes: the mesh axes along which they differ, in the order of the mesh; between slices the first, which alone
      crosses them.
    loops: how many loops stand around it.
    trips: how often they run it in all, as far as the text says.
    source: the operation of the traced program that it serves.
    hidden: whether it is under way while something is computed: it has a start and a done of its own, and a fusion,
      product or kernel stands between the two in the schedule.
  """

  kind: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  groups: tuple[tuple[int, ...], ...]
  axes: tuple[str, ...]
  loops: int
  trips: int
  source: str
  hidden: bool = False

  @property
  def bytes(self) -> int:
    """Size of the results on one device, of one run of the operation."""
    return sum(math.prod(shape) * _BITS[dtype] // 8 for dtype, shape in self.arrays)

  @property
  def dtypes(self) -> frozenset[str]:
    return frozenset(dtype for dtype, _ in self.arrays)


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  result: str
  opcode: str
  rest: str  # operands and attributes

  @property
  def called(self) -> list[str]:
    return [name.strip(" %{}") for match in _CALLED.findall(self.rest) for name in match.split(",")]


def read(text: str, mesh: Mapping[str, int]) -> list[Collective]:
  """All collectives that the program runs, in the order of its text.

  Args:
    text: `compiled.as_text()`.
    mesh: axis sizes of the mesh that it was compiled for (`mesh.shape`); the program's devices are those of the mesh
      in row-major order.

  Raises:
    ValueError: the text is no HLO module, or a notation that this reader does not know.
  """
  computations, entry = _parse(text)
  found = []
  overlapped = {name for body in computations.values() for name in _overlapped(body)}
  for instruction, loops, trips in _reached(computations, entry, 0, 1):
    kind = _kind(instruction)
    if kind is not None:
      attributes = instruction.rest
      if instruction.opcode in ("fusion", "async-start"):
        attributes = _inner(computations, instruction).rest
      between = instruction.opcode == "recv"
      groups = () if between else _groups(attributes, math.prod(mesh.values()))
      axes = tuple(mesh)[:1] if between else _axes(groups, mesh)
      source = re.search(r'op_name="([^"]*)"', instruction.rest)
      hidden, served = instruction.name in overlapped, source.group(1) if source else ""
      found.append(Collective(kind, _results(instruction), groups, axes, loops, trips, served, hidden))
  return found


def size(result: str) -> int:
  """Bytes of the arrays of an instruction's result type."""
  plain = re.sub(r"\{[^{}]*\}", "", result)
  return sum(
    math.prod(int(n) for n in sizes.split(",") if n) * _BITS[dtype] // 8
    for dtype, sizes in _SHAPE.findall(plain)
    if dtype in _BITS
  )


def _overlapped(body: Sequence[_Instruction]) -> Iterator[str]:
  """Names of the starts between which and their done something is computed."""
  open_: dict[str, bool] = {}
  for instruction in body:
    if instruction.opcode.endswith("-done") or instruction.opcode == "recv-done":
      operand = re.search(r"%([\w.\-]+)", instruction.rest)
      if operand and open_.pop(operand.group(1), False):
        yield operand.group(1)
    elif instruction.opcode.endswith("-start") or instruction.opcode == "recv":
      open_[instruction.name] = False
    elif instruction.opcode in _WORK and _kind(instruction) is None:
      open_ = dict.fromkeys(open_, True)


def _trips(computations: Mapping[str, Sequence[_Instruction]], loop: _Instruction) -> int:
  """How often a loop runs: what the compiler noted, else the constant that its counter (from 0) is compared with."""
  known = re.search(r'known_trip_count[\\"]*:\s*\{[\\"]*n[\\"]*:[\\"]*(\d+)', loop.rest)
  if known:
    return int(known.group(1))
  condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
  body = computations[condition.group(1)] if condition else []
  if not body or body[-1].opcode != "compare" or "direction=LT" not in body[-1].rest:
    return 1
  constants = {one.name: one.rest for one in body if one.opcode == "constant"}
  limits = [constants[name] for name in re.findall(r"%([\w.\-]+)", body[-1].rest) if name in constants]
  return int(limits[0].partition(")")[0]) if limits else 1


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  computations: dict[str, list[_Instruction]] = {}
  entry, current = None, None
  for line in text.splitlines():
    if current is None:
      head = _COMPUTATION.match(line)
      if head:
        current = computations.setdefault(head.group(2), [])
        entry = head.group(2) if head.group(1) else entry
    elif line.startswith("}") and not line.startswith("}}"):  # "}}" closes the metadata of a kernel, on its own line
      current = None
    else:
      match = _INSTRUCTION.match(line)
      if match:
        current.append(_Instruction(*match.groups()))
  if entry is None:
    raise ValueError("no entry computation: this is not the text of a compiled HLO module")
  return computations, entry


def _reached(
  computations: Mapping[str, Sequence[_Instruction]], name: str, loops: int, trips: int
) -> Iterator[tuple[_Instruction, int, int]]:
  """Every instruction that runs, with the loops around it; a collective's own computations are not entered."""
  for instruction in computations[name]:
    yield instruction, loops, trips
    if _kind(instruction) is not None or instruction.opcode in ("reduce", "scatter", "sort", "reduce-window"):
      continue
    inside = instruction.opcode == "while"
    turns = _trips(computations, instruction) if inside else 1
    for called in instruction.called:
      yield from _reached(computations, called, loops + inside, trips * turns)


def _kind(instruction: _Instruction) -> str | None:
  opcode = instruction.opcode.removesuffix("-start")
  if opcode in KINDS:
    return opcode
  if instruction.opcode == "fusion" and instruction.called[0].startswith("all-reduce-scatter"):
    return "reduce-scatter"
  between = _BETWEEN_SLICES.search(instruction.rest) if instruction.opcode == "recv" else None
  return between.group(1).lower().replace("_", "-") if between else None


def _inner(computations: Mapping[str, Sequence[_Instruction]], fusion: _Instruction) -> _Instruction:
  return next(inner for inner in computations[fusion.called[0]] if inner.opcode in KINDS)


def _results(instruction: _Instruction) -> tuple[tuple[str, tuple[int, ...]], ...]:
  arrays = [
    (dtype, tuple(int(size) for size in sizes.split(",") if size))
    for dtype, sizes in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", instruction.result))
    if dtype in _BITS
  ]
  if instruction.opcode == "collective-permute-start":
    return tuple(arrays[1:2])  # (operand, result, two semaphores)
  if instruction.opcode == "recv":
    return tuple(arrays[:1])  # (result, context, token)
  if instruction.opcode == "all-gather-start":
    return tuple(arrays[len(arrays) // 2 :])  # (operands, results)
  return tuple(arrays)


def _groups(attributes: str, devices: int) -> tuple[tuple[int, ...], ...]:
  match = _MESH_GROUPS.search(attributes)
  if match:
    return _mesh_groups(*match.groups())
  match = _IOTA_GROUPS.search(attributes)
  if match:
    shape, reshape, turn = ([int(n) for n in part.split(",")] if part else None for part in match.groups())
    assert shape is not None and reshape is not None
    ids = np.arange(math.prod(reshape)).reshape(reshape)
    return _rows((ids if turn is None else ids.transpose(turn)).reshape(shape))
  match = _LISTED_GROUPS.search(attributes)
  if match is None:
    raise ValueError(f"no device groups in {attributes[:200]!r}")
  listed = re.findall(r"\{([\d,]+)\}", match.group(1))
  return tuple(tuple(map(int, group.split(","))) for group in listed) or _rows(np.arange(devices)[None])


def _mesh_groups(axes: str, ids: str | None, talking: str | None) -> tuple[tuple[int, ...], ...]:
  """mesh['a'=2,'b'=4] {'b'}: those that differ along b. {'b':(1)2}: along the first 2 of b's 4, 1 before them."""
  named = [(name, int(size)) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)]
  devices = np.arange(math.prod(size for _, size in named))
  if ids is not None:
    reshape, _, turn = ids.partition("T(")
    sizes = [int(n) for n in re.findall(r"\d+", reshape)]
    devices = devices.reshape(sizes)
    if turn:
      devices = devices.transpose([int(n) for n in re.findall(r"\d+", turn)])
  parts = (
    re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", talking) if talking is not None else [(n, "", "") for n, _ in named]
  )
  shape: list[int] = []
  group: list[int] = []
  for name, size in named:
    cuts = sorted((int(before), int(length)) for other, before, length in parts if other == name and length)
    if not cuts and any(other == name for other, _, _ in parts):
      cuts = [(1, size)]
    done = 1
    for before, length in cuts:
      shape += [before // done, length]
      group.append(len(shape) - 1)
      done = before * length
    shape.append(size // done)
  devices = devices.reshape(shape)
  rest = [axis for axis in range(len(shape)) if axis not in group]
  return _rows(devices.transpose(rest + group).reshape(-1, math.prod(shape[axis] for axis in group)))


def _rows(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(map(int, row)) for row in ids)


def _axes(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
  shape = tuple(mesh.values())
  differs = np.zeros(len(shape), bool)
  for group in groups:
    places = np.stack(np.unravel_index(np.asarray(group), shape))
    differs |= (places != places[:, :1]).any(axis=1)
  return tuple(itertools.compress(mesh, differs))
