"""Damage, light, borders, stillness, text and marks of clips against closed forms and edits that are known."""

import io
import itertools

import av
import cv2
import numpy as np
import pytest

from kling_jax import measure
from kling_jax.data import decode, encode
from kling_jax.measure import degradation, light, sample, stillness, text, watermark

TIMES = np.arange(16) / 10


def scenery(seed: int = 0, height: int = 240, width: int = 320) -> np.ndarray:
  """A smooth picture with edges: float32 luma in 20..235."""
  rng = np.random.default_rng(seed)
  luma = cv2.resize(rng.uniform(40, 215, (5, 7)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
  for _ in range(12):
    middle, radius = (int(rng.integers(0, width)), int(rng.integers(0, height))), int(rng.integers(10, 45))
    cv2.circle(luma, middle, radius, float(rng.uniform(30, 225)), -1, cv2.LINE_AA)
  return np.clip(luma, 20, 235)


def clip(lumas) -> sample.Sample:
  frames = np.stack([np.clip(np.rint(luma), 0, 255).astype(np.uint8) for luma in lumas])
  return sample.of_frames(np.repeat(frames[..., None], 3, -1), TIMES[: len(frames)])


def panned(count: int = 16, seed: int = 0, step: int = 12) -> list[np.ndarray]:
  wide = scenery(seed, 240, 320 + step * count)
  return [wide[:, k * step : k * step + 320].copy() for k in range(count)]


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1.0, 2.0, 4.0])
def test_blur_is_the_deviation_of_the_gaussian_over_edges(sigma):
  sharp = np.full((256, 256), 60, np.float32)
  sharp[:, 128:] = 180
  blurred = cv2.GaussianBlur(sharp, (0, 0), sigma)
  assert degradation.blur(np.rint(blurred).astype(np.uint8)) == pytest.approx(sigma, rel=0.1)
  assert degradation.blur(sharp.astype(np.uint8)) < 0.6


def test_sharpness_falls_and_blur_rises_with_every_blur():
  sharp = scenery()
  ladder = [np.rint(cv2.GaussianBlur(sharp, (0, 0), s) if s else sharp).astype(np.uint8) for s in (0, 0.8, 1.6, 3.2)]
  assert all(a > b for a, b in itertools.pairwise(map(degradation.sharpness, ladder)))
  assert all(a < b for a, b in itertools.pairwise(map(degradation.blur, ladder)))


def test_sharpness_of_white_noise_is_twenty_times_its_variance():
  noise = np.clip(np.random.default_rng(0).normal(128, 10, (512, 512)), 0, 255).astype(np.uint8)
  assert degradation.sharpness(noise) == pytest.approx(20 * 100, rel=0.05)  # 1 + 1 + 1 + 1 + 16


@pytest.mark.parametrize("deviation", [2.0, 5.0, 15.0])
def test_noise_is_its_deviation(deviation):
  noise = np.random.default_rng(1).normal(0, deviation, (240, 320))
  noisy = np.clip(np.rint(scenery() + noise), 0, 255).astype(np.uint8)
  assert degradation.noise(noisy) == pytest.approx(deviation, rel=0.12)
  assert degradation.noise(np.rint(scenery()).astype(np.uint8)) < 0.5


def test_blockiness_rises_with_compression_at_any_place_of_the_grid():
  picture = np.clip(np.rint(scenery() + np.random.default_rng(0).normal(0, 6, (240, 320))), 0, 255).astype(np.uint8)
  ladder = []
  for quality in (95, 60, 30, 12):
    ladder.append(cv2.imdecode(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 0))
  values = [degradation.blockiness(decoded) for decoded in ladder]
  assert all(a < b for a, b in itertools.pairwise(values)) and values[-1] > 1, values
  assert degradation.blockiness(picture) < 0.15
  assert degradation.blockiness(ladder[-1][3:, 5:]) == pytest.approx(values[-1], rel=0.1)


def test_damage_of_encoded_clips_is_monotone_in_crf():
  rng = np.random.default_rng(2)
  frames = [np.clip(luma + rng.normal(0, 5, luma.shape), 0, 255).astype(np.uint8) for luma in panned(8, step=4)]
  frames = [np.repeat(frame[..., None], 3, -1) for frame in frames]
  seen = [sample.of_media(encode.encode(frames, fps=10, crf=crf)) for crf in (10, 30, 45)]
  found = [degradation.degradation(one) for one in seen]
  for name, sign in (("noise", -1), ("sharpness", -1), ("blockiness", 1)):
    values = [sign * one[name] for one in found]
    assert values == sorted(values) and values[0] < values[-1], (name, values)


# ---- light -----------------------------------------------------------------------------------------------------------


def test_light_closed_forms():
  frames = np.zeros((2, 64, 64, 3), np.uint8)
  frames[:, :, 32:] = 255  # half black, half white
  found = light.light(sample.of_frames(frames, np.arange(2) / 10))
  expected = {"brightness": 0.5, "contrast": 0.5, "dark": 0.5, "bright": 0.5, "saturation": 0.0, "grey": 1.0}
  assert found == pytest.approx(expected, abs=1e-6)
  frames[:] = (200, 100, 50)
  found = light.light(sample.of_frames(frames, np.arange(2) / 10))
  luma = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
  expected = {"brightness": luma / 255, "contrast": 0.0, "dark": 0.0, "bright": 0.0, "saturation": 0.75, "grey": 0.0}
  assert found == pytest.approx(expected, abs=2e-3)


def test_light_does_not_depend_on_size_or_mirror():
  rng = np.random.default_rng(3)
  small = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (160, 120), interpolation=cv2.INTER_CUBIC)
  large = cv2.resize(small, (320, 240), interpolation=cv2.INTER_LINEAR)
  values = [light.light(sample.of_frames(np.stack([f] * 2), TIMES[:2])) for f in (small, large, small[:, ::-1])]
  for name, value in values[0].items():
    assert [v[name] for v in values[1:]] == pytest.approx([value] * 2, abs=0.01), name


@pytest.mark.parametrize(
  "top,left,level,expected",
  [(30, 0, 16, 60 / 240), (0, 40, 0, 80 / 320), (24, 32, 0, 1 - 0.8 * 0.8), (0, 0, 0, 0.0), (15, 0, 235, 30 / 240)],
)
def test_borders_are_their_share(top, left, level, expected):
  lumas = panned(8)
  for luma in lumas:
    luma[: top or 0], luma[240 - top :] = level, level
    luma[:, : left or 0], luma[:, 320 - left :] = level, level
  assert light.borders(clip(lumas))["borders"] == pytest.approx(expected, abs=0.02)


def test_black_clips_and_dark_scenes_have_no_borders():
  assert light.borders(clip([np.zeros((240, 320))] * 4))["borders"] == 0.0
  slope = np.repeat(np.linspace(0, 120, 240)[:, None], 320, 1)  # night above, no edge
  assert light.borders(clip([slope] * 4))["borders"] == 0.0


# ---- stillness -------------------------------------------------------------------------------------------------------


def test_static_is_the_share_that_stays():
  lumas = panned()
  for luma in lumas:
    luma[:, 160:] = scenery(5)[:, 160:]
  assert stillness.stillness(clip(lumas))["static"] == pytest.approx(0.5, abs=0.06)
  assert stillness.stillness(clip(panned()))["static"] < 0.15
  assert stillness.stillness(clip([scenery()] * 4))["static"] == 1.0


def test_duplicates_are_their_share_also_after_encoding():
  lumas = [luma for luma in panned(8) for _ in range(2)]  # every frame twice
  assert stillness.stillness(clip(lumas))["duplicates"] == pytest.approx(8 / 15)
  frames = [np.repeat(np.rint(luma).astype(np.uint8)[..., None], 3, -1) for luma in lumas]
  seen = sample.of_media(encode.encode(frames, fps=24))
  # An encoder may refine the picture after a keyframe: one of the repetitions may be lost, none is made up.
  assert stillness.stillness(seen)["duplicates"] in (pytest.approx(7 / 15), pytest.approx(8 / 15))
  assert stillness.stillness(clip(panned()))["duplicates"] == 0.0


def test_brightness_change_is_the_jump_not_the_drift():
  lumas = [np.clip(scenery() * 0.5 + 40, 0, 255)] * 16
  jump = [luma + 40 * (k >= 9) for k, luma in enumerate(lumas)]
  drift = [luma + 4 * k for k, luma in enumerate(lumas)]
  assert stillness.stillness(clip(jump))["brightness_change"] == pytest.approx(40 / 255, abs=0.004)
  assert stillness.stillness(clip(drift))["brightness_change"] == pytest.approx(8 / 255, abs=0.004)  # within 0.2 s


# ---- text and marks --------------------------------------------------------------------------------------------------


def written(luma: np.ndarray, words: str, x: int, y: int, scale: float = 0.7, level: int = 255) -> tuple[int, ...]:
  """Writes into the picture; returns the box of the letters (left, top, right, bottom)."""
  picture, letters = np.rint(luma).astype(np.uint8), np.zeros(luma.shape, np.uint8)
  for where, value, thickness in ((picture, 0, 4), (picture, level, 1), (letters, 255, 1)):
    cv2.putText(where, words, (x, y), cv2.FONT_HERSHEY_DUPLEX, scale, value, thickness, cv2.LINE_AA)
  luma[:] = picture
  rows, columns = np.nonzero(letters)
  return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def test_text_is_the_area_of_its_lines():
  for seed in range(3):
    lumas, boxes = [0.5 * luma + 10 for luma in panned(seed=seed)], []
    for luma in lumas:
      boxes = [written(luma, "Subscribe to my channel", 12, 200, 0.9), written(luma, "PART 3 OF 10", 30, 40, 0.9)]
    true = text.area(np.array(boxes), (240, 320))
    assert text.text(clip(lumas))["text"] == pytest.approx(true, rel=0.35), seed


def test_scenery_is_no_text_and_scrolling_letters_are_no_overlay():
  for seed in range(4):
    assert text.text(clip(panned(seed=seed)))["text"] == 0.0
  lumas = panned(step=0)
  for k, luma in enumerate(lumas):
    written(luma, "A sign at the road side", 10 + 9 * k, 120)
  assert text.text(clip(lumas))["text"] < 0.002


def test_a_logo_before_a_moving_picture_is_found_and_one_before_a_still_one_is_not_told():
  lumas = panned(step=25)
  assert watermark.watermark(clip(lumas)) == {"watermark": 0.0}
  for luma in lumas:
    box = written(luma, "TV 7", 235, 34, 0.9)
    cv2.circle(luma, (222, 25), 9, 250, 2, cv2.LINE_AA)
  true = text.area(np.array([(212, box[1], box[2], box[3])]), (240, 320))
  assert watermark.watermark(clip(lumas))["watermark"] == pytest.approx(true, rel=0.4)
  marks = watermark.marks(np.stack(clip(lumas).luma))
  assert marks[:, 0].min() > 190 and marks[:, 3].max() < 60
  still = [scenery() for _ in range(16)]
  for luma in still:
    written(luma, "TV 7", 235, 34, 0.9)
  assert watermark.watermark(clip(still)) == {}


# ---- one decode ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def media() -> bytes:
  rng = np.random.default_rng(0)
  colour = rng.integers(60, 200, 3)
  frames = [np.clip(luma[..., None] * colour / 200, 0, 255).astype(np.uint8) for luma in panned(40, step=3)]
  return encode.encode(frames, fps=12, keyframe_every=8)


def test_a_sample_of_a_file_is_what_asking_for_its_times_gives(media):
  seen = sample.of_media(media)
  assert len(seen.pairs) == len(seen.luma) == 8 and len(seen.triples) == len(seen.later) == len(seen.crops) == 4
  np.testing.assert_array_equal(seen.frames_THWC, decode.frames_at(media, seen.times_s, 240, 320))
  times = measure.sample_times(40 / 12, 12)
  np.testing.assert_allclose(seen.looks[1], times)
  # Three scores as they were measured before there was a sample.
  scores = measure.score_media(media)
  frames = decode.frames_at(media, times, 240, 320)
  before = measure.score(frames, times)
  for name in ("motion", "aesthetic", "clarity"):
    assert scores[name] == before[name]
  assert len(seen.thumbs_FHW) == 40 and set(seen.runs) == {0}


@pytest.mark.parametrize("steady", [True, False])
def test_long_clips_are_looked_at_in_places_only_with_the_same_result(steady, media, monkeypatch):
  if not steady:  # variable frame rate: some frames stand for half a second
    steps = np.random.default_rng(4).choice([0.04, 0.04, 0.1, 0.5], 40)
    frames = [np.repeat(np.rint(luma).astype(np.uint8)[..., None], 3, -1) for luma in panned(40, step=3)]
    media = encode.encode(frames, times_s=np.cumsum(steps), keyframe_every=8)
  whole = sample.of_media(media)
  np.testing.assert_array_equal(whole.frames_THWC, decode.frames_at(media, whole.times_s, 240, 320))
  monkeypatch.setattr(sample, "WHOLE_S", 1.0)
  places = sample.of_media(media)
  np.testing.assert_array_equal(places.frames_THWC, whole.frames_THWC)
  for a, b in zip(places.crops + places.later, whole.crops + whole.later, strict=True):
    np.testing.assert_array_equal(a, b)
  assert len(places.vectors) == len(whole.vectors)


def test_one_frame_and_small_ones_are_measured_as_far_as_they_go():
  for shape in ((1, 32, 48, 3), (3, 16, 16, 3), (1, 8, 8, 3)):
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    for scores in (measure.score(frames, np.arange(len(frames)) / 10),):
      assert {"aesthetic", "clarity", "brightness", "borders", "text"} <= scores.keys()
      assert ("motion" in scores) == (len(frames) > 1)
  frame = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3), np.uint8)
  single = measure.score_media(encode.encode(frame, fps=5))
  assert "brightness" in single and "motion" not in single and "static" not in single


def test_a_stream_that_changes_its_size_midway_is_measured():
  streams = []
  for width in (320, 160):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="h264") as container:
      stream = container.add_stream("libx264", rate=12)
      stream.width, stream.height, stream.pix_fmt = width, 120, "yuv420p"
      for luma in panned(12):
        grey = np.rint(cv2.resize(luma, (width, 120))).astype(np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.repeat(grey[..., None], 3, -1), "rgb24")))
      container.mux(stream.encode(None))
    streams.append(buffer.getvalue())
  scores = measure.score_media(b"".join(streams))
  assert {"motion", "text", "camera_pan", "noise", "static"} <= scores.keys()
