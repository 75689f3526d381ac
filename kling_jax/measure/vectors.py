"""Motion vectors of the bitstream, painted over the picture, as Cosmos and NeMo Curator filter by them.

They tell what the encoder found cheap, not what moved: noise and flat parts carry vectors too, and vectors to frames
further back than one count in full, because decoders do not tell the distance.
"""

from collections.abc import Sequence

import numpy as np

from kling_jax.measure.sample import Sample, Vectors

NAME, VERSION = "bitstream", "1"
CONDITIONS = ("motion_vectors", "motion_vectors_patch")
SIZES = ((8, 8), (16, 16), (16, 8), (8, 16))  # of blocks, in the order in which the published filter paints them
CELL = 4  # pixels; all blocks are multiples
PATCH = 256  # pixels


def motion_vectors(sample: Sample) -> dict[str, float]:
  """Lengths of motion vectors over (height + width), as a mean over the looked-at frames that have any.

  Returns:
    motion_vectors: mean over the picture. motion_vectors_patch: its least mean over patches of 256 x 256 pixels, so
    that a small mover before a still background reads as zero. {} where the codec keeps no vectors.
  """
  if not sample.vectors:
    return {}
  length_HW = mean_length(sample.vectors)
  height, width = length_HW.shape
  side = PATCH // CELL
  rows, columns = max(1, height // side), max(1, width // side)
  patches = [part.mean() for band in np.array_split(length_HW, rows) for part in np.array_split(band, columns, axis=1)]
  return {"motion_vectors": float(length_HW.mean()), "motion_vectors_patch": float(min(patches))}


def mean_length(frames: Sequence[Vectors]) -> np.ndarray:
  """Mean over frames of |vector| / (height + width), float64, one value a cell of 4 x 4 pixels; zero where none is.

  Frames of another size than the first (streams may change it midway) do not count.
  """
  size = frames[0].height, frames[0].width
  alike = [vectors for vectors in frames if (vectors.height, vectors.width) == size]
  return np.mean(
    [np.hypot(*np.moveaxis(painted(vectors), -1, 0)) / sum(size) for vectors in alike], axis=0, dtype=float
  )


def painted(vectors: Vectors) -> np.ndarray:
  """The displacement of each cell of 4 x 4 pixels, in pixels: float32 (rows, columns, 2), columns first."""
  rows, columns = -(-vectors.height // CELL), -(-vectors.width // CELL)
  field = np.zeros((rows, columns, 2), np.float32)
  for width, height in SIZES:
    blocks = vectors.blocks[(vectors.blocks[:, 2] == width) & (vectors.blocks[:, 3] == height)]
    x, y = (blocks[:, 0] - width // 2) // CELL, (blocks[:, 1] - height // 2) // CELL
    across, down = np.meshgrid(np.arange(width // CELL), np.arange(height // CELL))
    at_x, at_y = x[:, None] + across.ravel(), y[:, None] + down.ravel()
    inside = (at_x >= 0) & (at_x < columns) & (at_y >= 0) & (at_y < rows)
    moved = np.broadcast_to(blocks[:, None, 4:] / np.float32(4), (*at_x.shape, 2))
    field[at_y[inside], at_x[inside]] = moved[inside]
  return field
