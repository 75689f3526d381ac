"""Thumbnails off the decoder's planes: the same picture whatever the pixel format and range."""

import av
import cv2
import numpy as np
import pytest

from kling_jax.data import picture, thumbnail


def scene(height, width, seed=0):
  rng = np.random.default_rng(seed)
  small = rng.integers(20, 236, (7, 11, 3)).astype(np.uint8)
  return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize(
  "format", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv420p10le", "nv12", "rgb24", "bgra"]
)
@pytest.mark.parametrize("size", [(360, 640), (144, 176), (719, 1279)])
def test_equals_the_area_mean_of_the_rgb_picture(format, size):
  frame = av.VideoFrame.from_ndarray(scene(*size), "rgb24").reformat(format=format)
  got = thumbnail.thumbnail(frame).astype(int)
  want = thumbnail.of_rgb(picture.to_rgb(frame)).astype(int)
  assert np.abs(got - want).mean() < 2.5  # sampled on a grid: at most half a sample off
  assert abs((got - want)[:2048].mean()) < 1


def test_grey_has_neutral_chroma_and_full_range():
  frame = av.VideoFrame.from_ndarray(np.full((90, 160), 77, np.uint8), "gray")
  got = thumbnail.thumbnail(frame)
  assert (got[2048:] == 128).all() and len(np.unique(got[:2048])) == 1
  black = av.VideoFrame.from_ndarray(np.zeros((90, 160, 3), np.uint8), "rgb24").reformat(format="yuv420p")
  assert (thumbnail.thumbnail(black)[:2048] == 0).all()  # 16 in the stream


def test_places_are_kept():
  pixels = np.zeros((320, 640, 3), np.uint8)
  pixels[:160, 320:] = (255, 0, 0)
  frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuv444p")
  luma = thumbnail.thumbnail(frame)[:2048].reshape(32, 64)
  red = thumbnail.thumbnail(frame)[2560:].reshape(16, 32)
  assert (luma[:16, 32:] > 60).all() and (luma[16:] < 5).all() and (luma[:, :32] < 5).all()
  assert (red[:8, 16:] > 200).all() and (np.abs(red[8:].astype(int) - 128) < 3).all()
