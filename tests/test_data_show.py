"""Videos in a notebook: what is drawn holds the very media, and captions of strangers stay texts."""

import base64
import re

import numpy as np

from kling_jax.data import decode, encode, show


def test_frames_and_media_come_back_out_of_the_page() -> None:
  frames = np.repeat(np.arange(0, 240, 40, dtype=np.uint8)[:, None, None, None], 16, 1).repeat(16, 2).repeat(3, 3)
  media = encode.encode(frames, fps=6)
  drawn = show.videos({"frames": frames, "<b>media": media}, fps=6)._repr_html_()
  coded = re.findall(r'src="data:video/mp4;base64,([^"]+)"', drawn)
  assert len(coded) == 2 and base64.b64decode(coded[1]) == media
  info = decode.probe(base64.b64decode(coded[0]))
  assert (info.num_frames, info.fps, info.width) == (6, 6, 16)
  assert "<b>" not in drawn and "&lt;b&gt;media" in drawn
  assert show.videos([frames])._repr_html_().count("<video") == 1
