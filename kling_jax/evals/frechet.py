"""Distances between two sets of videos by features of each video: Frechet's, and a kernel's without its bias.

Frechet video distance (Unterthiner et al. 2018) is the Wasserstein distance of two Gaussians with the sets' moments,

  |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^1/2 S2 S1^1/2)^1/2,

on features of a network. `video_mae` gives such features where its weights are at hand; they see motion better than
those of I3D (Ge et al. 2024, "On the content bias in Frechet video distance"). `low_frequency` needs no weights and is
no Frechet video distance: it compares colours, coarse layout and slow change, and knows nothing else.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
import scipy.fft

from kling_jax.errors import DataError
from kling_jax.interop import vision
from kling_jax.models.video_mae import DEVIATION, MEAN
from kling_jax.nn import params as params_lib
from kling_jax.nn import resample

Features = Callable[[np.ndarray], np.ndarray]  # uint8 RGB videos (B, T, H, W, 3) -> float (B, D)
COARSE = (8, 16, 16)  # frames, rows, columns that `low_frequency` looks at
KEPT = 4  # of its frequencies in each direction
ROWS = 1024  # of a kernel matrix at once


# ---- Frechet ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moments:
  """Count, mean and scatter of features, float64; grows by parts, whose order changes nothing but the rounding.

  Attributes:
    count: videos seen.
    mean_D: of their features.
    scatter_DD: sum of (x - mean)(x - mean)'.
  """

  count: int
  mean_D: np.ndarray
  scatter_DD: np.ndarray

  @classmethod
  def of(cls, features_ND: np.ndarray) -> "Moments":
    """Those of some videos.

    Raises:
      DataError: no rows, or values that are not finite.
    """
    features_ND = _checked(features_ND, 1)
    mean_D = features_ND.mean(0)
    centred_ND = features_ND - mean_D
    return cls(len(features_ND), mean_D, centred_ND.T @ centred_ND)

  def __add__(self, other: "Moments") -> "Moments":
    """Those of both (Chan, Golub and LeVeque 1983): no cancellation, however far the means lie from zero."""
    if self.mean_D.shape != other.mean_D.shape:
      raise DataError(f"features of {len(self.mean_D)} and of {len(other.mean_D)} numbers; they are of two extractors")
    count = self.count + other.count
    step_D = other.mean_D - self.mean_D
    between_DD = np.outer(step_D, step_D) * (self.count * other.count / count)
    mean_D = self.mean_D + step_D * (other.count / count)
    return Moments(count, mean_D, self.scatter_DD + other.scatter_DD + between_DD)

  @property
  def covariance_DD(self) -> np.ndarray:
    """Unbiased: over count - 1."""
    return self.scatter_DD / (self.count - 1)


def moments(features: Iterable[np.ndarray]) -> Moments:
  """The moments of batches of features (B, D), one after the other: memory of one batch.

  Raises:
    DataError: nothing there, other sizes, or values that are not finite.
  """
  found: Moments | None = None
  for batch_BD in features:
    part = Moments.of(batch_BD)
    found = part if found is None else found + part
  if found is None:
    raise DataError("no features; moments need videos")
  return found


def frechet(first: Moments, second: Moments) -> float:
  """The squared distance of two Gaussians with these moments, 0 or more; of features of VideoMAE: FVD.

  With S = F F' from an eigendecomposition, the trace of the root is the sum of singular values of F1' F2. No root of a
  rounded eigenvalue is taken after the product, so that equal sets are at distance 0 to rounding (1e-12 of the
  traces) also where there are fewer videos than features. It is biased upwards for few videos: two sets of one
  isotropic Gaussian read about (D + 4) / (4 count) of tr S1 + tr S2. Compare only sets of equal count.

  Raises:
    DataError: fewer than two videos in a set, or features of two sizes.
  """
  if min(first.count, second.count) < 2:
    raise DataError(f"a Frechet distance needs two videos in each set, got {first.count} and {second.count}")
  if first.mean_D.shape != second.mean_D.shape:
    raise DataError(f"features of {len(first.mean_D)} and of {len(second.mean_D)} numbers; they are of two extractors")
  roots = [_root(one.covariance_DD) for one in (first, second)]
  shared = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
  apart = np.square(first.mean_D - second.mean_D).sum()
  traces = sum(np.square(root).sum() for root in roots)
  return max(0.0, float(apart + traces - 2 * shared))


def _root(covariance_DD: np.ndarray) -> np.ndarray:
  """F (D, R) with F F' = covariance; directions without variance beyond rounding are left out."""
  values_D, vectors_DD = np.linalg.eigh(covariance_DD)
  least = max(values_D[-1], 0.0) * len(values_D) * np.finfo(np.float64).eps
  kept = values_D > least
  return vectors_DD[:, kept] * np.sqrt(values_D[kept])


# ---- kernel ----------------------------------------------------------------------------------------------------------


def kernel(first_ND: np.ndarray, second_MD: np.ndarray, *, degree: int = 3) -> float:
  """Squared maximum mean discrepancy under (x . y / D + 1)^degree, unbiased for any count: it may be below 0.

  Of features of a video network this is KVD (Binkowski et al. 2018 for images, degree 3). Equal distributions give 0
  in the mean.

  Raises:
    DataError: fewer than two videos in a set, features of two sizes, or values that are not finite.
  """
  first_ND, second_MD = _checked(first_ND, 2), _checked(second_MD, 2)
  if first_ND.shape[1] != second_MD.shape[1]:
    raise DataError(f"features of {first_ND.shape[1]} and of {second_MD.shape[1]} numbers; they are of two extractors")
  within = []
  for x in (first_ND, second_MD):
    own = (np.square(x).sum(1) / x.shape[1] + 1) ** degree
    within.append((_total(x, x, degree) - own.sum()) / (len(x) * (len(x) - 1)))
  across = _total(first_ND, second_MD, degree) / (len(first_ND) * len(second_MD))
  return float(within[0] + within[1] - 2 * across)


def kernel_blocks(
  first_ND: np.ndarray, second_MD: np.ndarray, *, size: int = 100, degree: int = 3, seed: int = 0
) -> tuple[float, float]:
  """(mean, standard error) of `kernel` over disjoint blocks of `size` videos of each set, drawn by `seed`.

  Raises:
    DataError: not two blocks of that size; see `kernel`.
  """
  blocks = min(len(first_ND), len(second_MD)) // size
  if blocks < 2:
    raise DataError(f"{len(first_ND)} and {len(second_MD)} videos make no two blocks of {size}; take smaller ones")
  draw = np.random.default_rng(seed)
  orders = [draw.permutation(len(x))[: blocks * size].reshape(blocks, size) for x in (first_ND, second_MD)]
  values = [kernel(first_ND[a], second_MD[b], degree=degree) for a, b in zip(*orders, strict=True)]
  return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(blocks))


def _total(first_ND: np.ndarray, second_MD: np.ndarray, degree: int) -> float:
  """Sum of the kernel over all pairs, some rows at a time."""
  parts = (first_ND[k : k + ROWS] for k in range(0, len(first_ND), ROWS))
  return float(sum(((part @ second_MD.T / part.shape[1] + 1) ** degree).sum() for part in parts))


def _checked(features_ND: np.ndarray, least: int) -> np.ndarray:
  features_ND = np.asarray(features_ND, np.float64)
  if features_ND.ndim != 2 or len(features_ND) < least or not features_ND.shape[1]:
    raise DataError(f"features of shape {features_ND.shape}; wants (videos, numbers) with at least {least} videos")
  if not np.isfinite(features_ND).all():
    raise DataError("features that are not finite; look at the videos or weights that they come from")
  return features_ND


# ---- features --------------------------------------------------------------------------------------------------------


def low_frequency(videos_BTHWC: np.ndarray) -> np.ndarray:
  """Features without weights: the 4 x 4 x 4 lowest frequencies of each colour of a video, (B, 192).

  Each video is brought to 8 frames of 16 x 16 (linear, antialiased) and goes through an orthonormal cosine transform,
  over the square root of its pixels: the distance of two features is the root mean square difference of the smoothed
  videos, in [0, 1]. A Frechet distance of these is called the low-frequency distance, never FVD.

  Args:
    videos_BTHWC: uint8 RGB of any size.
  """
  found = []
  for video in _pixels(videos_BTHWC):
    for axis, wanted in enumerate(COARSE):
      weights = resample.matrix(video.shape[axis], wanted, "linear-antialias")
      video = np.moveaxis(np.tensordot(weights, video, (1, axis)), 0, axis)
    waves = scipy.fft.dctn(video.astype(np.float64), axes=(0, 1, 2), norm="ortho")[:KEPT, :KEPT, :KEPT]
    found.append(waves.ravel() / math.sqrt(math.prod(COARSE) * 3))
  return np.stack(found)


def video_mae(source: str | os.PathLike[str]) -> tuple[Features, str]:
  """(features, version) of VideoMAE with the weights in `source`: uint8 videos (B, T, H, W, 3) to (B, D).

  As many frames as the network takes, spread evenly from the first to the last (some twice in shorter videos); the
  shorter side resized, the middle cut out, as its own processor does. Version = hash of the weights.

  Raises:
    WeightsError: no VideoMAE there.
  """
  loaded = vision.load(source, "video_mae")
  params = jax.device_put(loaded.params)
  seen = jax.jit(lambda params, video: params_lib.merge(loaded.graph, params)(video))

  def features(videos_BTHWC: np.ndarray) -> np.ndarray:
    shape = loaded.shape
    rows = [seen(params, prepared(video, shape.frames, shape.image)[None]) for video in _pixels(videos_BTHWC)]
    return np.concatenate([np.asarray(row) for row in rows])

  return features, loaded.fingerprint


def prepared(video_THWC: np.ndarray, frames: int, side: int) -> np.ndarray:
  """A video in [0, 1] as VideoMAE wants it: (frames, side, side, 3), less MEAN, over DEVIATION, float32."""
  count, height, width, _ = video_THWC.shape
  picks = np.linspace(0, count - 1, frames).round().astype(int)
  scale = side / min(height, width)
  size = max(side, round(height * scale)), max(side, round(width * scale))
  top, left = ((length - side) // 2 for length in size)
  down = resample.matrix(height, size[0], "linear-antialias")[top : top + side]
  across = resample.matrix(width, size[1], "linear-antialias")[left : left + side]
  square = np.einsum("ih,jw,thwc->tijc", down, across, video_THWC[picks], optimize=True)
  return ((square - np.asarray(MEAN)) / np.asarray(DEVIATION)).astype(np.float32)


def _pixels(videos_BTHWC: np.ndarray) -> Iterator[np.ndarray]:
  """Each video as float32 in [0, 1]."""
  if videos_BTHWC.ndim != 5 or videos_BTHWC.shape[-1] != 3 or videos_BTHWC.dtype != np.uint8 or not videos_BTHWC.size:
    found = f"{videos_BTHWC.dtype} {videos_BTHWC.shape}"
    raise DataError(f"features are of uint8 RGB videos (B, T, H, W, 3), got {found}")
  for video in videos_BTHWC:
    yield video.astype(np.float32) / 255
