"""Name maps that go both ways: where a parameter of ours lies in a foreign file, and how it lies there."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kling_jax.interop.safetensors import Built, Stacked

Turn = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Form:
  """How a tensor is turned on its way in (`read`) and out (`write`); one undoes the other, bit for bit."""

  read: Turn
  write: Turn


def _turned(inwards: tuple[int, ...]) -> Form:
  outwards = tuple(int(axis) for axis in np.argsort(inwards))
  return Form(lambda array: array.transpose(inwards), lambda array: array.transpose(outwards))


SAME = Form(lambda array: array, lambda array: array)
LINEAR = _turned((1, 0))  # PyTorch's (out, in)
CONV2D = _turned((2, 3, 1, 0))  # (out, in, row, column) to (row, column, in, out)
CONV3D = _turned((2, 3, 4, 1, 0))
POINTWISE = Form(lambda array: array[:, :, 0, 0].T, lambda array: array.T[:, :, None, None])  # a 1 x 1 convolution


def leading_one(array: np.ndarray) -> np.ndarray:
  return array[None]


TABLE = Form(lambda array: array[0], leading_one)  # (1, rows, width) to (rows, width)


def per_channel(ones: int) -> Form:
  """A vector of channels that the file holds with `ones` sizes of 1 behind it."""
  return Form(lambda array: array.reshape(len(array)), lambda array: array.reshape(-1, *[1] * ones))


def patches(size: tuple[int, ...], channels: int) -> Form:
  """A convolution (out, in, *size) that cuts patches, as a product with inputs in the order (*size, in)."""
  axes = len(size)
  inwards = (*range(2, axes + 2), 1, 0)
  back = (axes + 1, axes, *range(axes))
  return Form(
    lambda array: array.transpose(inwards).reshape(-1, array.shape[0]),
    lambda array: array.reshape(*size, channels, -1).transpose(back),
  )


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where a parameter lies.

  Attributes:
    name: of the foreign tensor; of stacked layers a pattern that holds {} for the layer's number.
    form: how it lies there.
    layers: their number, None for a parameter that is not stacked.
  """

  name: str
  form: Form = SAME
  layers: int | None = None

  @property
  def names(self) -> tuple[str, ...]:
    return (self.name,) if self.layers is None else tuple(self.name.format(layer) for layer in range(self.layers))

  @property
  def recipe(self) -> Built | Stacked:
    return Built(self.names, self.form.read) if self.layers is None else Stacked(self.names, self.form.read)


Entries = Mapping[str, Entry]


def prefixed(entries: Entries, ours: str = "", theirs: str = "") -> dict[str, Entry]:
  """The entries with prefixes before our paths and before the foreign names."""
  return {ours + path: dataclasses.replace(entry, name=theirs + entry.name) for path, entry in entries.items()}


def recipes(entries: Entries) -> dict[str, str | Built | Stacked]:
  """The name map of `safetensors.load_into`."""
  return {path: entry.recipe for path, entry in entries.items()}


def outward(params: Mapping[str, Any], entries: Entries) -> dict[str, "Outward"]:
  """The foreign tensors of `params`, by name; each is made when it is asked for."""
  found: dict[str, Outward] = {}
  for path, entry in entries.items():
    for layer, name in enumerate(entry.names):
      found[name] = Outward(params[path], entry.form.write, None if entry.layers is None else layer)
  return found


class Outward:
  """A foreign tensor that stands for a part of a parameter of ours, not in memory until `np.asarray` asks for it."""

  def __init__(self, source: Any, write: Turn, layer: int | None):
    self._source, self._write, self._layer = source, write, layer
    self.dtype = np.dtype(source.dtype)
    shape = tuple(source.shape) if layer is None else tuple(source.shape)[1:]
    self.shape = write(np.broadcast_to(np.zeros((), self.dtype), shape)).shape  # of no memory
    self.size = int(np.prod(self.shape))

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    whole = self._source if self._layer is None else self._source[self._layer]
    return self._write(np.asarray(whole)).astype(dtype or self.dtype, copy=False)
