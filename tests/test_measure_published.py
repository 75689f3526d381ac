"""Scores of published filters against their definitions, written out again over OpenCV's decoder and plain loops."""

import av
import cv2
import numpy as np
import pytest
from av.codec.context import Flags2
from test_measure_camera import film

from kling_jax import measure
from kling_jax.data import encode
from kling_jax.errors import DataError
from kling_jax.measure import published, sample

FPS, FRAMES, SHAPE = 24, 40, (288, 512)
SPEED = 0.025  # diagonals per second


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
  """40 frames that pan, with an object moving before them."""
  frames = film(np.arange(FRAMES) / FPS, pan=SPEED, shape=SHAPE)
  for k in range(FRAMES):
    cv2.circle(frames[k], (60 + 4 * k, 140), 30, (200, 60, 40), -1)
  name = tmp_path_factory.mktemp("published") / "pan.mp4"
  encode.write(name, frames, fps=FPS, crf=23)
  return str(name)


def scores(source, condition: str) -> dict[str, float]:
  return {name: score.value for name, score in measure.score_media(source, measure.chosen([condition])).items()}


def test_cosmos(path):
  height, width = SHAPE
  fields = []
  with av.open(path) as container:
    stream = container.streams.video[0]
    stream.codec_context.flags2 |= int(Flags2.export_mvs)
    for number, frame in enumerate(container.decode(stream)):
      side = frame.side_data.get("MOTION_VECTORS") if number % 12 == 0 else None
      if side is None:
        continue
      field = np.zeros((height, width, 2))
      blocks = sorted(side, key=lambda v: [(8, 8), (16, 16), (16, 8), (8, 16)].index((v.w, v.h)))
      for v in blocks:
        rows, columns = (
          slice(max(0, v.dst_y - v.h // 2), v.dst_y + v.h // 2),
          slice(max(0, v.dst_x - v.w // 2), v.dst_x + v.w // 2),
        )
        field[rows, columns] = (v.motion_x / v.motion_scale, v.motion_y / v.motion_scale)
      fields.append(np.hypot(*np.moveaxis(field, -1, 0)) / (height + width))
  assert len(fields) >= 2
  found = scores(path, "cosmos_motion")
  assert found["cosmos_motion"] == pytest.approx(np.mean(fields), rel=1e-5)
  patches = cv2.resize(np.mean(fields, axis=0).astype(np.float32), None, fx=1 / 256, fy=1 / 256)
  assert found["cosmos_motion_patch"] == pytest.approx(patches.min(), rel=1e-4, abs=1e-8)


def test_cosmos_refuses_small_videos_as_there(tmp_path):
  small = encode.encode(film(np.arange(12) / 12, pan=0.1, shape=(128, 160)), fps=12)
  assert scores(small, "cosmos_motion") == {}


def test_data_juicer(path):
  capture = cv2.VideoCapture(path)
  values, previous, count = [], None, 0
  while True:  # its reader, line for line in words: the second frame comes before the first seek
    there, frame = capture.read()
    if not there:
      break
    grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
    if previous is None:
      previous = grey
      continue
    flow = cv2.calcOpticalFlowFarneback(previous, grey, None, 0.5, 3, 15, 3, 5, 1.2, 0)
    values.append(cv2.cartToPolar(flow[..., 0], flow[..., 1])[0].mean())
    previous, count = grey, count + 12
    capture.set(cv2.CAP_PROP_POS_FRAMES, count)
  assert len(values) == 4  # 0-1, 1-12, 12-24, 24-36
  assert scores(path, "datajuicer_motion")["datajuicer_motion"] == pytest.approx(np.mean(values), rel=0.03)


def test_open_sora_is_pixels_of_its_size_over_fifteen_frames(path, tmp_path):
  plain = tmp_path / "plain.mp4"
  encode.write(plain, film(np.arange(FRAMES) / FPS, pan=SPEED, shape=SHAPE), fps=FPS)
  expected = SPEED * np.hypot(*SHAPE) * 15 / FPS * 576 / 512
  assert scores(str(plain), "opensora_motion")["opensora_motion"] == pytest.approx(expected, rel=0.1)
  still = encode.encode(film(np.zeros(20), shape=SHAPE), fps=FPS)
  assert scores(still, "opensora_motion")["opensora_motion"] < 0.05
  assert "unimatch" not in measure.chosen(["opensora_motion"])[0].name  # the name says whose flow it is


def test_ultra_video_counts_bad_frames():
  frames = film(np.arange(48) / FPS, pan=0.02, shape=(120, 160))
  found = lambda frames: scores(encode.encode(frames, fps=FPS), "ultravideo_bad_frames")["ultravideo_bad_frames"]
  assert found(frames) == 0.0
  black, border, grey = frames.copy(), frames.copy(), frames.copy()
  black[:24] = 0
  border[24:, :8] = 0
  grey[:] = 128
  assert found(black) == found(border) == 0.5  # frames 0, 12 | 24, 36
  assert found(grey) == 1.0


def test_published_scores_need_a_file_and_are_not_measured_unasked():
  frames = film(np.arange(4) / 10)
  with pytest.raises(DataError, match="video file"):
    published.cosmos(sample.of_frames(frames, np.arange(4) / 10))
  default = {condition for scorer in measure.SCORERS for condition in scorer.conditions}
  assert not default & {condition for scorer in measure.PRESETS for condition in scorer.conditions}
