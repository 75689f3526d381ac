"""What does not change: still parts of the picture, repeated frames; and what changes at once: jumps of brightness."""

import cv2
import numpy as np

from kling_jax.measure.sample import Sample

NAME, VERSION = "changes", "1"
CONDITIONS = ("static", "duplicates", "brightness_change")
STILL = 6  # levels: most range of a still pixel over the clip, after a blur that takes off most of the noise
BLUR = 2.0  # pixels
REPEAT = 2  # levels: most difference of a value of a thumbnail between a frame and its repetition; encoders leave some
WINDOW_S = 0.2  # time in which a change of brightness counts


def stillness(sample: Sample) -> dict[str, float]:
  """Shares of the clip that stand still; needs two frames.

  Returns:
    static: share of the picture that is the same (within 6 levels, blurred by 2 pixels) in all places of the clip.
    duplicates: share of frames that repeat the one before them: no value of a 64 x 32 thumbnail differs by more than
      2 levels. In clips of up to 20 s of all frames, else of those around the eight places. A tripod shot of a still
      life repeats its frames too.
    brightness_change: largest change of mean luma within 0.2 s, of the full range: flashes, exposure jumps, cuts.
  """
  if len(sample.times_s) < 2:
    return {}
  places = sorted({*sample.places, len(sample.times_s) - 1})
  smooth = np.stack([cv2.GaussianBlur(grey, (0, 0), BLUR) for grey in sample.grey_THW[places]])
  scores = {"static": float((np.ptp(smooth, axis=0) <= STILL).mean())}
  thumbs = sample.thumbs_FHW.astype(np.int16)
  follows = np.diff(sample.runs) == 0
  if follows.any():
    change = np.abs(np.diff(thumbs, axis=0)).max((1, 2))
    scores["duplicates"] = float((change[follows] <= REPEAT).mean())
    level = thumbs.mean((1, 2))
    jumps = [0.0]
    # Between every frame and all that follow within the window.
    for ahead in range(1, len(level)):
      near = (sample.thumb_times_s[ahead:] - sample.thumb_times_s[:-ahead] <= WINDOW_S + 1e-3) | (ahead == 1)
      near &= sample.runs[ahead:] == sample.runs[:-ahead]
      if not near.any():
        break
      jumps.append(float(np.abs(level[ahead:] - level[:-ahead])[near].max()))
    scores["brightness_change"] = max(jumps) / 255
  return scores
