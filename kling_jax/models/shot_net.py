"""A network of 0.2 M parameters that sees thumbnails of a video and says where transitions are, and of which kind.

Two views meet at every step from a frame to the next. Cells: an 8 x 4 grid of patches, each pair of neighbouring
frames embedded together, followed through time by dilated convolutions, then pooled over the grid; this sees blends,
wipes and motion where they happen. Similarities: how alike frames up to 65 frames apart are, across the step and on
either side of it, for three descriptors (a learned one, the layout of luma, the histogram); this sees that what was
before a flash comes back after it, and what was before a cut does not. Dilated convolutions over time read both.

The forward pass is written once and runs on NumPy and on JAX: training on JAX (`shot_module`), `kling split` on NumPy,
which spares every worker process the start of JAX and a compilation. So this file imports no JAX.
"""

import itertools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

KINDS = ("cut", "dissolve", "fade", "wipe")
ROWS, COLUMNS, PATCH = 4, 8, 96  # cells; 8 x 8 luma and 2 x 4 x 4 chroma values each
LEVELS = (16, 13, 13)  # bins of the histograms of luma, blue and red chroma
LAGS = (0, 1, 2, 4, 8, 16, 32)  # frames from a step
CELL_WIDTHS = 64, 48
DESCRIPTOR = 32, 24
SIMILAR, WIDTH = 64, 96
CELL_DILATIONS, DILATIONS = (1, 2, 4, 8), (1, 2, 4, 8, 16)
REACH = max(LAGS) + sum(DILATIONS) + 1  # frames on either side that an output depends on
_PAIRS = (  # of frames t + first and t + second, for the step from t to t + 1
  [(-i, 1 + j) for i, j in itertools.product(LAGS, LAGS)]
  + [(-j, -i) for i, j in itertools.combinations(LAGS, 2)]
  + [(1 + i, 1 + j) for i, j in itertools.combinations(LAGS, 2)]
)

Dense = Callable[[str, Any], Any]  # (name of the layer, x) -> x @ kernel + bias


def layers() -> dict[str, tuple[int, int]]:
  """{name: (inputs, outputs)} of the dense layers."""
  shapes = {
    "cells.now": (PATCH, CELL_WIDTHS[0]),
    "cells.next": (PATCH, CELL_WIDTHS[0]),
    "cells.hidden": CELL_WIDTHS,
    "describe.in": (PATCH, DESCRIPTOR[0]),
    "describe.out": (2 * DESCRIPTOR[0], DESCRIPTOR[1]),
    "similar": (3 * len(_PAIRS), SIMILAR),
    "mix": (2 * CELL_WIDTHS[1] + SIMILAR, WIDTH),
    "head": (WIDTH, 2 + len(KINDS)),
  }
  shapes |= {f"cells.time{d}": (CELL_WIDTHS[1], 3 * CELL_WIDTHS[1]) for d in CELL_DILATIONS}
  return shapes | {f"time{d}": (WIDTH, 3 * WIDTH) for d in DILATIONS}


def forward(xp: ModuleType, dense: Dense, thumbnails_BTC: Any, histograms_BTC: Any) -> Any:
  """Logits of every step between frames: (B, T - 1, 6): in a transition, at its middle, and the four kinds.

  Args:
    xp: numpy or jax.numpy.
    dense: applies a layer.
    thumbnails_BTC: uint8 (B, T, 3072), see `data.thumbnail`.
    histograms_BTC: float32 (B, T, 42), see `histograms`.
  """
  relu = lambda x: xp.maximum(x, 0)
  pooled = lambda x: xp.concatenate([xp.mean(x, axis=2), xp.max(x, axis=2)], axis=-1)
  x_BTNC = cells(xp, thumbnails_BTC)

  h = relu(dense("cells.now", x_BTNC[:, :-1]) + dense("cells.next", x_BTNC[:, 1:]))
  h = relu(dense("cells.hidden", h))
  for d in CELL_DILATIONS:
    h = h + relu(_over_time(xp, dense(f"cells.time{d}", h), d))

  described = dense("describe.out", pooled(relu(dense("describe.in", x_BTNC))))
  layout = _layout(xp, x_BTNC)
  views = [_unit(xp, described), _unit(xp, layout - xp.mean(layout, axis=-1, keepdims=True)), histograms_BTC]
  similar = relu(dense("similar", xp.concatenate([similarities(xp, view) for view in views], axis=-1)))

  z = relu(dense("mix", xp.concatenate([pooled(h), similar], axis=-1)))
  for d in DILATIONS:
    z = z + relu(_over_time(xp, dense(f"time{d}", z), d))
  return dense("head", z)


def cells(xp: ModuleType, thumbnails_BTC: Any) -> Any:
  """(B, T, 3072) uint8 -> (B, T, 32, 96) float32 in [-2, 2]: 64 luma, then 16 + 16 chroma values a cell."""
  B, T, _ = thumbnails_BTC.shape
  luma = thumbnails_BTC[..., :2048].reshape(B, T, ROWS, 8, COLUMNS, 8)
  chroma = thumbnails_BTC[..., 2048:].reshape(B, T, 2, ROWS, 4, COLUMNS, 4)
  luma = xp.transpose(luma, (0, 1, 2, 4, 3, 5)).reshape(B, T, ROWS * COLUMNS, 64)
  chroma = xp.transpose(chroma, (0, 1, 3, 5, 2, 4, 6)).reshape(B, T, ROWS * COLUMNS, 32)
  values = xp.concatenate([luma, chroma], axis=-1)
  return values.astype(xp.float32) * np.float32(4 / 255) - np.float32(2)


def _layout(xp: ModuleType, x_BTNC: Any) -> Any:
  """Means of 2 x 4 luma values (rows x columns): (B, T, 256)."""
  B, T, N, _ = x_BTNC.shape
  blocks = x_BTNC[..., :64].reshape(B, T, N, 4, 2, 2, 4)
  return xp.mean(blocks, axis=(4, 6)).reshape(B, T, -1)


def _unit(xp: ModuleType, x: Any) -> Any:
  return x / xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True) + np.float32(1e-4))


def similarities(xp: ModuleType, descriptor_BTC: Any) -> Any:
  """Inner products of the descriptors of frames around each step: (B, T - 1, 91).

  Step t lies between frames t and t + 1; compared are frames t - lag with t + 1 + lag, and each side within itself.
  Beyond the ends of the video its first and last frame go on.
  """
  steps, reach = descriptor_BTC.shape[1] - 1, max(LAGS)
  ends = [descriptor_BTC[:, :1]] * reach, [descriptor_BTC[:, -1:]] * (reach + 1)
  padded = xp.concatenate([*ends[0], descriptor_BTC, *ends[1]], axis=1)
  firsts = np.array([first for first, _ in _PAIRS])
  distances = np.array([second - first for first, second in _PAIRS])
  known, column = np.unique(distances, return_inverse=True)
  length = steps + reach + max(LAGS) + 1  # places of first frames
  products = []
  for distance in known.tolist():
    product = xp.sum(padded[:, : padded.shape[1] - distance] * padded[:, distance:], axis=-1)
    products.append(xp.pad(product, ((0, 0), (0, length)))[:, :length])
  return xp.stack(products, axis=-1)[:, np.arange(steps)[:, None] + reach + firsts, column]


def _over_time(xp: ModuleType, taps: Any, dilation: int) -> Any:
  """A convolution of three taps from its products side by side on the last axis; ends are repeated."""
  T = taps.shape[1]
  past, now, future = (taps[..., k * (taps.shape[-1] // 3) : (k + 1) * (taps.shape[-1] // 3)] for k in range(3))
  earlier = np.maximum(np.arange(T) - dilation, 0)
  later = np.minimum(np.arange(T) + dilation, T - 1)
  return past[:, earlier] + now + future[:, later]


def histograms(thumbnails_TC: np.ndarray) -> np.ndarray:
  """Square roots of soft histograms: uint8 (T, 3072) -> float32 (T, 42) of unit length.

  A value counts for the two bins next to it, the nearer one more; so a slow change of light moves mass smoothly.
  """
  T = len(thumbnails_TC)
  parts = []
  for values, bins, (low, high) in zip(
    np.split(thumbnails_TC, [2048, 2560], axis=1), LEVELS, ((0, 255), (51, 204), (51, 204)), strict=True
  ):
    place = np.clip((np.arange(256) - low) / (high - low), 0, 1) * (bins - 1)
    lower = np.minimum(place.astype(np.intp), bins - 2)
    counts = np.bincount((values + 256 * np.arange(T)[:, None]).reshape(-1), minlength=256 * T).reshape(T, 256)
    spread = np.zeros((256, bins), np.float32)
    spread[np.arange(256), lower] = 1 - (place - lower)
    spread[np.arange(256), lower + 1] += place - lower
    parts.append(counts.astype(np.float32) @ spread / np.float32(values.shape[1]))
  return np.sqrt(np.concatenate(parts, axis=1) / 3)


def key(name: str) -> str:
  """A layer's name within a parameter path, where dots part."""
  return name.replace(".", "_")


def forward_numpy(params: Mapping[str, np.ndarray], thumbnails_TC: np.ndarray) -> np.ndarray:
  """The network on NumPy: one video's uint8 (T, 3072), T at least 2 -> float32 logits (T - 1, 6).

  Args:
    params: {"dense.cells_now.kernel": ...}, as `nn.params.split` names them.
  """

  def dense(name: str, x: np.ndarray) -> np.ndarray:
    stem = f"dense.{key(name)}"
    y = (x.reshape(-1, x.shape[-1]) @ params[f"{stem}.kernel"]).reshape(*x.shape[:-1], -1)
    return y + params[f"{stem}.bias"] if f"{stem}.bias" in params else y

  return forward(np, dense, thumbnails_TC[None], histograms(thumbnails_TC)[None])[0]
