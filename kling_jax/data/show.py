"""Videos side by side in a notebook: `show.videos({"low": frames, "high": frames}, fps=4)` ends a cell."""

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence

import numpy as np

from kling_jax.data import encode


@dataclasses.dataclass(frozen=True)
class Shown:
  """What a notebook draws; it holds the videos themselves, so that a saved notebook still plays them."""

  html: str

  def _repr_html_(self) -> str:
    return self.html


def videos(shown: Mapping[str, np.ndarray | bytes] | Sequence[np.ndarray | bytes], fps: float = 8.0,
           width: int = 160) -> Shown:  # fmt: skip
  """Looping videos in a row, pixels kept sharp.

  Args:
    shown: uint8 (T, H, W, 3) each, or the bytes of an MP4; with captions where it is a mapping.
    fps: of those that are frames. width: of each on the page, in pixels.
  """
  named = list(shown.items()) if isinstance(shown, Mapping) else [("", clip) for clip in shown]
  return Shown('<div style="display:flex;flex-wrap:wrap;gap:8px">' + "".join(
    f'<figure style="margin:0;width:{width}px"><video autoplay loop muted playsinline style="width:{width}px;'
    f'image-rendering:pixelated" src="data:video/mp4;base64,{_coded(clip, fps)}"></video>'
    f'<figcaption style="font-size:12px">{html.escape(name)}</figcaption></figure>'
    for name, clip in named
  ) + "</div>")  # fmt: skip


def _coded(clip: np.ndarray | bytes, fps: float) -> str:
  media = clip if isinstance(clip, bytes) else encode.encode(clip, fps=fps)
  return base64.b64encode(media).decode()
