"""Weights as safetensors: flat {name: array}, one file or shards with an index, written whole, read tensor by tensor.

The library checks headers (sizes, overlaps, overflow); the data is mapped, so that loading 14 B parameters onto a mesh
touches only the slices that this process holds.
"""

import collections
import dataclasses
import difflib
import fnmatch
import hashlib
import json
import math
import os
import pathlib
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from kling_jax import files
from kling_jax.errors import WeightsError

SHARD_BYTES = 5 * 10**9  # the size that the Hugging Face hub's own writers use
STEM = "model"
LISTED = 8  # names that an error shows of each kind
DTYPES: dict[str, Any] = {
  "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
  "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
  "C64": np.complex64, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
HEADER_BYTES = 32 * 2**20  # about 300,000 tensors; the largest published models have some thousands
SAMPLED_BYTES = 4096  # of each tensor, for a fingerprint
CHECKED = 2**22  # values that are looked at together


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(
  folder: str | os.PathLike[str],
  tensors: Mapping[str, Any],
  *,
  metadata: Mapping[str, str] | None = None,
  shard_bytes: int = SHARD_BYTES,
  stem: str = STEM,
) -> list[pathlib.Path]:
  """Writes `model.safetensors`, or shards `model-00001-of-0000N.safetensors` with `model.safetensors.index.json`.

  Each file appears whole and the index last; a folder with some of its shards is refused by `Tensors`. Weights that
  the folder held before are replaced: one file by one file in a single step, shards after they were taken away.

  Args:
    folder: made where it is missing.
    tensors: {name: array}, NumPy or addressable JAX arrays; fetched one shard at a time.
    metadata: texts for the header of each file.
    stem: what the files are called instead of "model".
    shard_bytes: a new shard begins before this size is passed.

  Returns:
    The files, the index last.

  Raises:
    WeightsError: nothing to write, or an array of a type that the format lacks.
  """
  folder = pathlib.Path(folder)
  shards = _shards(tensors, shard_bytes)
  one = len(shards) == 1
  names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
  names = [f"{stem}.safetensors"] if one else names
  index = folder / f"{stem}.safetensors.index.json"
  index.unlink(missing_ok=True)  # before the shards: what is left of them is then seen to be incomplete
  for old in folder.glob(f"{stem}*.safetensors"):
    if old.name != names[0] or not one:
      old.unlink()
  for name, members in zip(names, shards, strict=True):
    arrays = {member: np.asarray(tensors[member], order="C") for member in members}
    with files.whole(folder / name) as temporary:
      safetensors.numpy.save_file(arrays, temporary, metadata={"format": "np"} | dict(metadata or {}))
  written = [folder / name for name in names]
  if not one:
    place = {member: name for name, members in zip(names, shards, strict=True) for member in members}
    total = sum(_bytes(tensors[member]) for member in place)
    files.write_json(index, {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))})
    written.append(index)
  return written


def _shards(tensors: Mapping[str, Any], shard_bytes: int) -> list[list[str]]:
  if not tensors:
    raise WeightsError("there are no tensors to write")
  legal = {np.dtype(dtype) for dtype in DTYPES.values()}
  shards: list[list[str]] = [[]]
  room = shard_bytes
  for name in sorted(tensors):
    if np.dtype(tensors[name].dtype) not in legal:
      raise WeightsError(f"{name} has type {tensors[name].dtype}, which safetensors cannot hold; cast it first")
    size = _bytes(tensors[name])
    if shards[-1] and size > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(name)
    room -= size
  return shards


def _bytes(array: Any) -> int:
  return array.size * np.dtype(array.dtype).itemsize


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a tensor lies."""

  file: pathlib.Path
  offset: int
  dtype: np.dtype
  shape: tuple[int, ...]


class Tensors(Mapping[str, np.ndarray]):
  """The tensors of a file or folder by name; only headers are read until one is asked for.

  `tensors[name]` is a read-only array mapped from the file: slicing it reads that part alone.
  """

  def __init__(self, source: str | os.PathLike[str]):
    """Reads the headers of `source`: a .safetensors file, or a folder with one, several, or an index of shards.

    Raises:
      WeightsError: nothing there, a damaged or hostile header, missing shards, or a name in two files.
    """
    self.source = pathlib.Path(source)
    self.metadata: dict[str, str] = {}
    self.places: dict[str, Place] = {}
    listed = _listed(self.source)
    for file, names in listed.items():
      places, metadata = read_header(file)
      self.metadata |= metadata
      for name in names if names is not None else places:
        if name not in places:
          raise WeightsError(f"{self.source}: the index says that {file.name} holds {name!r}, but it does not")
        if name in self.places:
          raise WeightsError(f"{name!r} stands in {self.places[name].file} and in {file}; keep one of the files")
        self.places[name] = places[name]

  def __getitem__(self, name: str) -> np.ndarray:
    place = self.places[name]
    if 0 in place.shape:
      return np.zeros(place.shape, place.dtype)
    flat = np.memmap(place.file, np.uint8, "r", place.offset, int(np.prod(place.shape)) * place.dtype.itemsize)
    return flat.view(np.ndarray).view(place.dtype).reshape(place.shape)

  def __iter__(self) -> Iterator[str]:
    return iter(self.places)

  def __len__(self) -> int:
    return len(self.places)


def _listed(source: pathlib.Path) -> dict[pathlib.Path, list[str] | None]:
  """The files to read, each with the names that an index gives it (None: all that it holds)."""
  if source.is_file():
    return {source: None}
  indices = sorted(source.glob("*.safetensors.index.json"))
  if len(indices) > 1:
    raise WeightsError(f"{source} holds {len(indices)} indices ({indices[0].name}, ...); name one file, or keep one")
  if indices:
    return _by_index(indices[0])
  found = [path for path in sorted(source.glob("*.safetensors")) if not path.name.startswith(".")]
  if not found:
    pickles = [path.name for path in sorted(source.glob("*")) if path.suffix in PICKLES]
    mend = (
      f"it holds {pickles[0]}, a pickle, which may run code when it is read: take the safetensors form of these weights"
      if pickles
      else "give the folder or the file of the weights"
    )
    raise WeightsError(f"{source} holds no .safetensors file; {mend}")
  for match in filter(None, (PART.fullmatch(path.name) for path in found)):
    parts = [source / f"{match[1]}-{i:05d}-of-{match[3]}.safetensors" for i in range(1, int(match[3]) + 1)]
    lost = [part.name for part in parts if part not in found]
    if lost:
      raise WeightsError(f"{source} lacks {len(lost)} of {len(parts)} shards, first {lost[0]}; copy or export it again")
  return dict.fromkeys(found)


def _by_index(path: pathlib.Path) -> dict[pathlib.Path, list[str] | None]:
  try:
    place = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    if not place or not all(isinstance(file, str) for file in place.values()):
      raise ValueError("weight_map must map names to files")
    wrong = next((file for file in place.values() if pathlib.PurePath(file).name != file or "\\" in file), None)
    if wrong is not None:
      raise ValueError(f"{wrong!r} is not a plain file name")
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise WeightsError(f"{path} is no index of safetensors ({error}); copy or export it again") from error
  members: dict[str, list[str]] = collections.defaultdict(list)
  for name, file in place.items():
    members[file].append(name)
  lost = [file for file in members if not (path.parent / file).is_file()]
  if lost:
    raise WeightsError(f"{path.parent} lacks {len(lost)} of {len(members)} shards, first {lost[0]}; copy it again")
  return {path.parent / file: names for file, names in members.items()}


def read_header(path: pathlib.Path) -> tuple[dict[str, Place], dict[str, str]]:
  """{name: place} and the metadata of one file.

  Raises:
    WeightsError: the header is damaged or hostile, or holds a type that is not known here.
  """
  try:
    with path.open("rb") as file:
      (length,) = struct.unpack("<Q", file.read(8))
      if length > HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes, more than {HEADER_BYTES}")
      with safetensors.safe_open(path, framework="np"):  # checks the header against the file
        header = json.loads(file.read(length))
  except (safetensors.SafetensorError, OSError, ValueError, struct.error, RecursionError) as error:
    raise WeightsError(f"{path} is not a safetensors file, or is damaged ({error}); copy or export it again") from error
  metadata = header.pop("__metadata__", None) or {}
  places = {}
  for name, facts in header.items():
    if facts["dtype"] not in DTYPES:
      raise WeightsError(f"{path}: {name} has type {facts['dtype']}; readable: {', '.join(DTYPES)}")
    dtype, start = np.dtype(DTYPES[facts["dtype"]]), facts["data_offsets"][0]
    places[name] = Place(path, 8 + length + start, dtype, tuple(facts["shape"]))
  return places, metadata


def fingerprint(source: str | os.PathLike[str] | Tensors) -> str:
  """16 hexadecimal digits over each tensor's name, type, shape and first bytes; the same in one file or in shards.

  It reads a few MB of 28 GB, and tells models, fine-tuned ones and types apart. It is no defence against a forger.
  """
  tensors = source if isinstance(source, Tensors) else Tensors(source)
  digest = hashlib.sha256()
  for name in sorted(tensors):
    place = tensors.places[name]
    digest.update(f"{name}:{place.dtype.name}:{place.shape}".encode())
    with place.file.open("rb") as file:
      file.seek(place.offset)
      digest.update(file.read(min(SAMPLED_BYTES, int(np.prod(place.shape)) * place.dtype.itemsize)))
  return digest.hexdigest()[:16]


# ---- loading into a model --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Built:
  """A parameter made of several foreign tensors: `build(*arrays)` of the tensors `names`."""

  names: tuple[str, ...]
  build: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Stacked:
  """Stacked layers, a foreign tensor each: [build(a) for a in arrays]; only the slices that are asked for are read.

  `build` turns or reshapes, so that a slice of its result needs little more than that slice of the file.
  """

  names: tuple[str, ...]
  build: Callable[[np.ndarray], np.ndarray]


class Layers:
  """The array of a `Stacked`, not in memory: indexing and `np.asarray` read it."""

  def __init__(self, recipe: Stacked, tensors: Mapping[str, np.ndarray]):
    """Raises WeightsError where the layers differ in shape or type."""
    self._recipe, self._tensors = recipe, tensors
    first = self._layer(0)
    self.dtype, self.shape = first.dtype, (len(recipe.names), *first.shape)
    self.size = math.prod(self.shape)
    for name in recipe.names[1:]:
      array = tensors[name]
      if array.shape != tensors[recipe.names[0]].shape or array.dtype != self.dtype:
        raise WeightsError(f"{name} is {array.dtype}{list(array.shape)}, unlike the same tensor of the first layer")

  def _layer(self, number: int) -> np.ndarray:
    return self._recipe.build(self._tensors[self._recipe.names[number]])

  def __getitem__(self, index: Any) -> np.ndarray:
    where: tuple[Any, ...] = index if isinstance(index, tuple) else (slice(None) if index is ... else index,)
    layers: slice = where[0]
    numbers, inner = range(self.shape[0])[layers], where[1:]
    stacked = np.empty((len(numbers), *self._layer(numbers[0])[inner].shape), self.dtype)
    for place, number in zip(stacked, numbers, strict=True):
      place[...] = self._layer(number)[inner]
    return stacked

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return self[:].astype(dtype or self.dtype, copy=False)


@dataclasses.dataclass
class Report:
  """What a load did: parameters by path, foreign tensors by name.

  Attributes:
    source: where the weights came from.
    loaded: paths that got weights; missing: paths that did not (allowed).
    unexpected: tensors that no parameter took (allowed).
    mismatched: {path: "file shape -> model shape"} of missing paths that the file holds in another shape.
    cast: {"bfloat16 -> float32": parameters}.
  """

  source: str
  loaded: list[str] = dataclasses.field(default_factory=list)
  missing: list[str] = dataclasses.field(default_factory=list)
  unexpected: list[str] = dataclasses.field(default_factory=list)
  mismatched: dict[str, str] = dataclasses.field(default_factory=dict)
  cast: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

  def to_json(self) -> dict[str, Any]:
    return {**dataclasses.asdict(self), "cast": dict(self.cast)}

  def __str__(self) -> str:
    lines = [f"{self.source}: loaded {len(self.loaded)} parameters"]
    lines += [f"  {count} cast {kind}" for kind, count in self.cast.items()]
    lines += [f"  not loaded: {path} {self.mismatched.get(path, '')}".rstrip() for path in self.missing]
    return "\n".join(lines + [f"  not used: {name}" for name in self.unexpected])


def load_into(
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  source: str | os.PathLike[str],
  name_map: Mapping[str, str | Built | Stacked] | None = None,
  *,
  allow_missing: Sequence[str] = (),
  allow_unexpected: Sequence[str] = (),
) -> tuple[dict[str, Any], Report]:
  """Reads the parameters `shapes` from a file or folder; strict unless the caller names exceptions.

  Args:
    shapes: {path: ShapeDtypeStruct}; one with a sharding becomes a JAX array born with it (each process reads its
      slices alone, one parameter after the other), one without a NumPy array. Floats are cast to the wanted type,
      nothing else is.
    source: see `Tensors`.
    name_map: {path: foreign name, `Built` from several or `Stacked` layers}; None means the names are the paths.
    allow_missing: patterns like "text.*" (fnmatch, as for checkpoints) of parameters that may stay unloaded, because
      the file lacks them or has them in another shape.
    allow_unexpected: the same for tensors of the file that nothing takes.

  Returns:
    The loaded parameters, and the report.

  Raises:
    WeightsError: a missing, unexpected or misshapen tensor that is not allowed (lists them with the nearest names),
      or values that are not finite. Nothing is returned then.
  """
  tensors = Tensors(source)
  recipes = {path: _recipe(path, name_map) for path in shapes}
  report = Report(str(source))
  used = {name for recipe in recipes.values() for name in recipe.names}
  report.unexpected = sorted(set(tensors) - used)
  for path, recipe in recipes.items():
    if not all(name in tensors for name in recipe.names):
      report.missing.append(path)
    elif isinstance(recipe, Stacked) or recipe.build is _alone:  # its shape is known without building it
      _compare(path, gathered(recipe, tensors), shapes[path], report)
  _refuse(report, recipes, allow_missing, allow_unexpected)
  params: dict[str, Any] = {}
  for path in [path for path in recipes if path not in report.missing]:
    array = gathered(recipes[path], tensors)
    if _compare(path, array, shapes[path], report):
      params[path] = _place(path, array, shapes[path], report)
  _refuse(report, recipes, allow_missing, allow_unexpected)
  report.loaded = list(params)
  return params, report


def _alone(array: np.ndarray) -> np.ndarray:
  return array


def gathered(recipe: Built | Stacked, tensors: Mapping[str, np.ndarray]) -> Any:
  """What `recipe` makes of `tensors`: an array, or `Layers` that are read slice by slice."""
  if isinstance(recipe, Stacked):
    return Layers(recipe, tensors)
  return recipe.build(*(tensors[name] for name in recipe.names))


def _recipe(path: str, name_map: Mapping[str, str | Built | Stacked] | None) -> Built | Stacked:
  entry = path if name_map is None else name_map.get(path, path)
  return Built((entry,), _alone) if isinstance(entry, str) else entry


def _compare(path: str, array: Any, wanted: jax.ShapeDtypeStruct, report: Report) -> bool:
  """Whether `array` can stand for `wanted`; notes in the report what keeps it from that."""
  floats = [jax.dtypes.issubdtype(dtype, np.floating) for dtype in (array.dtype, wanted.dtype)]
  if tuple(array.shape) != tuple(wanted.shape):
    report.mismatched[path] = f"{tuple(array.shape)} in the file, {tuple(wanted.shape)} in the model"
  elif array.dtype != wanted.dtype and not all(floats):
    report.mismatched[path] = f"{array.dtype} in the file, {wanted.dtype} in the model"
  else:
    return True
  report.missing.append(path)
  return False


def _place(path: str, array: Any, wanted: jax.ShapeDtypeStruct, report: Report) -> Any:
  if array.dtype != wanted.dtype:
    report.cast[f"{array.dtype} -> {wanted.dtype}"] += 1

  def part(index: Any) -> np.ndarray:
    with np.errstate(over="ignore"):  # what overflows is found, and named, below
      # Layers give an array of their own; anything else is the file, and must not stay mapped.
      values = array[index].astype(wanted.dtype, order="C", copy=not isinstance(array, Layers))
    if not finite(values):
      raise WeightsError(f"{report.source}: {path} is not finite everywhere (as {wanted.dtype}); take other weights")
    return values

  return part(...) if wanted.sharding is None else _sharded(tuple(wanted.shape), wanted.sharding, part)


def _sharded(shape: tuple[int, ...], sharding: jax.sharding.Sharding, part: Callable[[Any], np.ndarray]) -> jax.Array:
  """The array whose slices are `part(index)`: one slice at a time stands in the host's memory."""
  same: dict[str, list[tuple[jax.Device, Any]]] = collections.defaultdict(list)
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    same[str(index)].append((device, index))
  held: dict[jax.Device, jax.Array] = {}
  for devices in same.values():
    values = part(devices[0][1])
    held |= {device: jax.device_put(values, device) for device, _ in devices}
    jax.block_until_ready([held[device] for device, _ in devices])
    del values
  return jax.make_array_from_single_device_arrays(shape, sharding, list(held.values()))


def finite(values: np.ndarray) -> bool:
  """Whether no float among `values` is NaN or infinite; of bfloat16 and smaller types too."""
  if not jax.dtypes.issubdtype(values.dtype, np.floating):
    return True
  flat = values.reshape(-1)
  return all(_finite(flat[start : start + CHECKED]) for start in range(0, flat.size, CHECKED))


def _finite(values: np.ndarray) -> bool:
  if values.dtype == ml_dtypes.bfloat16:  # its exponent is all ones; many times faster than isfinite
    return not np.any((values.view(np.uint16) & 0x7F80) == 0x7F80)
  return bool(np.isfinite(values).all())


def _refuse(
  report: Report, recipes: Mapping[str, Built | Stacked], allow_missing: Sequence[str], allow_unexpected: Sequence[str]
) -> None:
  """Raises WeightsError where the report holds what no pattern allows."""
  allowed = lambda name, patterns: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
  missing = [path for path in report.missing if not allowed(path, allow_missing)]
  unexpected = [name for name in report.unexpected if not allowed(name, allow_unexpected)]
  shape = [f"{path} ({report.mismatched[path]})" for path in missing if path in report.mismatched]
  absent = [path for path in missing if path not in report.mismatched]
  near = [f"{path}{_near(recipes[path].names[0], report.unexpected)}" for path in absent[:LISTED]]
  parts = [
    f"{len(names)} {kind}: {', '.join(shown[:LISTED])}{', ...' if len(names) > LISTED else ''}"
    for kind, names, shown in (
      ("missing", absent, near), ("of another shape or type", shape, shape), ("unexpected", unexpected, unexpected)
    )
    if names
  ]  # fmt: skip
  if parts:
    raise WeightsError(
      f"{report.source} does not fit the model ({len(recipes)} parameters); {'; '.join(parts)}. Take the config "
      "of that model, give a name map, or allow by patterns what may differ"
    )


def _near(name: str, candidates: Sequence[str]) -> str:
  """ " (nearest: x)": a candidate that ends in the name (another prefix), else the most alike."""
  ends = [other for other in candidates if other.endswith("." + name) or name.endswith("." + other)]
  close = ends[:1] or difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
  return f" (nearest: {close[0]})" if close else ""
