"""Just enough of H.264's syntax to join streams: parameter sets, their numbers, IDR pictures (ITU-T H.264, 7.3).

Data are in the form of MP4 and Matroska: units behind a length, parameter sets in a header (ISO/IEC 14496-15, 5.3.3).
"""

import dataclasses
from collections.abc import Iterator, Sequence

_IDR, _SEQUENCE, _PICTURE = 5, 7, 8  # types of units
_HIGH = (100, 110, 122, 144)  # profiles whose header tells the chroma format


def is_header(data: bytes) -> bool:
  """Whether `data` is an avcC header with units behind lengths of four bytes."""
  return len(data) > 8 and data[0] == 1 and data[4] & 3 == 3


@dataclasses.dataclass(frozen=True)
class Header:
  """An avcC header.

  Attributes:
    profile, compatibility, level: of the whole stream.
    sequences, pictures: the parameter sets, one unit each.
    rest: what follows them.
  """

  profile: int
  compatibility: int
  level: int
  sequences: tuple[bytes, ...]
  pictures: tuple[bytes, ...]
  rest: bytes

  @classmethod
  def parse(cls, data: bytes) -> "Header":
    """Reads a header for which `is_header` holds."""
    at, found = 5, []
    for mask in (31, 255):
      count, units = data[at] & mask, []
      at += 1
      for _ in range(count):
        size = int.from_bytes(data[at : at + 2], "big")
        units.append(data[at + 2 : at + 2 + size])
        at += 2 + size
      found.append(tuple(units))
    return cls(data[1], data[2], data[3], found[0], found[1], data[at:])

  def __bytes__(self) -> bytes:
    sized = [
      b"".join(len(unit).to_bytes(2, "big") + unit for unit in units) for units in (self.sequences, self.pictures)
    ]
    front = bytes([1, self.profile, self.compatibility, self.level, 0xFF, 0xE0 | len(self.sequences)])
    return front + sized[0] + bytes([len(self.pictures)]) + sized[1] + self.rest

  def free_id(self) -> int:
    """A number below 32 that no parameter set of either kind has."""
    taken = {_number(unit[4:]) for unit in self.sequences} | {_number(unit[1:]) for unit in self.pictures}
    return next(number for number in range(31, -1, -1) if number not in taken)

  def joined(self, units: Sequence[bytes]) -> "Header":
    """This header with more parameter sets, for 8-bit 4:2:0."""
    sequences = self.sequences + tuple(unit for unit in units if _type(unit) == _SEQUENCE)
    pictures = self.pictures + tuple(unit for unit in units if _type(unit) == _PICTURE)
    profile = max(unit[1] for unit in sequences)
    return Header(
      profile,
      self.compatibility if profile == self.profile else 0,
      max(unit[3] for unit in sequences),
      sequences,
      pictures,
      self.rest or (b"\xfd\xf8\xf8\x00" if profile in _HIGH else b""),
    )

  def is_idr(self, packet: bytes) -> bool:
    """Whether a picture starts the stream anew: no later one leans on an earlier one."""
    return any(_type(unit) == _IDR for unit in units_of(packet))

  def knows(self, packet: bytes) -> bool:
    """Whether a packet brings no parameter sets but the header's."""
    held = (*self.sequences, *self.pictures)
    return all(_type(unit) not in (_SEQUENCE, _PICTURE) or unit in held for unit in units_of(packet))


def units_of(packet: bytes) -> Iterator[bytes]:
  """The units of a packet; a length that leads out of it ends them."""
  at = 0
  while at + 4 < len(packet):
    size = int.from_bytes(packet[at : at + 4], "big")
    if not 0 < size <= len(packet) - at - 4:
      return
    yield packet[at + 4 : at + 4 + size]
    at += 4 + size


def parameter_sets(packet: bytes) -> list[bytes]:
  """The parameter sets that a packet brings."""
  return [unit for unit in units_of(packet) if _type(unit) in (_SEQUENCE, _PICTURE)]


def without_parameter_sets(packet: bytes) -> bytes:
  """The packet without them."""
  units = [unit for unit in units_of(packet) if _type(unit) not in (_SEQUENCE, _PICTURE)]
  return b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)


def _type(unit: bytes) -> int:
  return unit[0] & 31


def _number(data: bytes) -> int:
  """The unsigned Exp-Golomb number (9.1) at the start of `data`."""
  bits = "".join(f"{byte:08b}" for byte in data[:8])
  zeros = bits.index("1")
  return int(bits[zeros : 2 * zeros + 1], 2) - 1
