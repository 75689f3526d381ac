"""Whether a clip stays with one scene: how far thumbnails a third of a second apart differ in what they show."""

import numpy as np

from kling_jax.measure.sample import Sample

NAME, VERSION = "thumbnails", "1"
CONDITIONS = ("scene_change", "scene_unrest")
LAG_S = 1 / 3  # time between the thumbnails that are compared: most dissolves take about as long
CALM = 0.2  # quantile of the distances that counts as the scene's own motion


def continuity(sample: Sample) -> dict[str, float]:
  """Distances 1 - r of thumbnails, r the correlation of their luma: blind to brightness and contrast.

  Returns:
    scene_change: the largest distance less the clip's own (its 20 % quantile): about 0 within a shot, towards 1 for a
      cut or dissolve inside the clip.
    scene_unrest: the mean less the same: grows with the number of changes. Nothing for clips shorter than the lag.
  """
  found = []
  for run in np.unique(sample.runs):
    times_s = sample.thumb_times_s[sample.runs == run]
    thumbs = sample.thumbs_FHW[sample.runs == run].reshape(len(times_s), -1).astype(np.float32)
    later = np.searchsorted(times_s, times_s + LAG_S - 1e-3)
    first = np.flatnonzero(later < len(times_s))
    centred = thumbs - thumbs.mean(1, keepdims=True)
    # A quarter of a level of spread: flat frames are alike, not unlike for want of content.
    unit = centred / np.sqrt((centred**2).sum(1, keepdims=True) + thumbs.shape[1] / 16)
    found.append(1 - (unit[first] * unit[later[first]]).sum(1))
  distances = np.concatenate(found) if found else np.zeros(0)
  if not len(distances):
    return {}
  own = float(np.quantile(distances, CALM))
  return {"scene_change": float(distances.max()) - own, "scene_unrest": float(distances.mean()) - own}
