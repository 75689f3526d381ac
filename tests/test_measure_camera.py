"""Flow, camera and motion vectors against known motions: closed forms, the procedural world, an encoder."""

import cv2
import numpy as np
import pytest

from kling_jax import measure
from kling_jax.data import encode, worlds
from kling_jax.measure import camera, flow, motion, sample, vectors

HEIGHT, WIDTH = 90, 160
DIAGONAL = float(np.hypot(HEIGHT, WIDTH))


def texture(seed: int = 0, size: int = 500) -> np.ndarray:
  noise = np.random.default_rng(seed).normal(size=(size, size)).astype(np.float32)
  smooth = cv2.GaussianBlur(noise, (0, 0), 2) + 2 * cv2.GaussianBlur(noise, (0, 0), 6)
  return np.clip(128 + 50 * smooth / smooth.std(), 0, 255)


TEXTURE = texture()


def film(times, pan=0.0, tilt=0.0, zoom=0.0, roll=0.0, shape=(HEIGHT, WIDTH), jitter=None) -> np.ndarray:
  """A texture filmed by a camera: diagonals, d log scale and degrees per second; `jitter` (T, 2) in pixels."""
  height, width = shape
  unit, frames = np.hypot(height, width), []
  for k, t in enumerate(times):
    scale, angle = height / HEIGHT * np.exp(zoom * t), -np.radians(roll * t)  # the picture turns against the camera
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = np.array([width - 1, height - 1]) / 2
    move = np.array([-pan, tilt]) * unit * t + (0 if jitter is None else jitter[k])
    offset = middle + move - turn @ np.array([250.0, 250.0])
    matrix = np.hstack([turn, offset[:, None]]).astype(np.float32)
    frames.append(cv2.warpAffine(TEXTURE, matrix, (width, height), flags=cv2.INTER_CUBIC))
  grey = np.clip(np.rint(np.stack(frames)), 0, 255).astype(np.uint8)
  return np.repeat(grey[..., None], 3, -1)


TIMES = np.arange(6) / 20


def of(frames, times=TIMES) -> dict[str, float]:
  return camera.camera(sample.of_frames(frames, times))


@pytest.mark.parametrize(
  "motions",
  [
    {},
    {"pan": 0.1},
    {"pan": -0.05, "tilt": 0.08},
    {"zoom": 0.4},
    {"roll": 12.0},
    {"pan": 0.05, "tilt": -0.03, "zoom": -0.25, "roll": -8.0},
  ],
)
def test_the_camera_is_what_the_film_was_made_with(motions):
  found = of(film(TIMES, **motions))
  for name, tolerance in (("pan", 0.003), ("tilt", 0.003), ("zoom", 0.015), ("roll", 0.5)):
    assert found[f"camera_{name}"] == pytest.approx(motions.get(name, 0.0), abs=tolerance), name
  assert found["camera_shake"] < 0.006 and found["object_motion"] < 0.012
  if set(motions) <= {"pan", "tilt"}:  # the speed of every pixel
    assert found["camera_motion"] == pytest.approx(np.hypot(*(motions.get(n, 0.0) for n in ("pan", "tilt"))), abs=0.004)


def test_mirrored_films_have_mirrored_cameras_and_rate_and_size_do_not_matter():
  motions = {"pan": 0.06, "tilt": 0.03, "zoom": 0.2, "roll": 6.0}
  plain, mirrored = of(film(TIMES, **motions)), of(film(TIMES, **motions)[:, :, ::-1])
  signs = {"camera_pan": -1, "camera_roll": -1}
  for name, value in plain.items():
    tolerance = 0.3 if name == "camera_roll" else 0.008
    assert mirrored[name] == pytest.approx(signs.get(name, 1) * value, abs=tolerance), name
  other_rate = of(film(np.arange(20) / 60, **motions), np.arange(20) / 60)
  other_size = of(film(TIMES, **motions, shape=(2 * HEIGHT, 2 * WIDTH)))
  for other in (other_rate, other_size):
    for name in ("camera_pan", "camera_tilt", "camera_zoom", "camera_motion"):
      assert other[name] == pytest.approx(plain[name], abs=0.012), name


def test_an_object_does_not_move_the_camera():
  frames = film(TIMES, pan=0.06)
  patch = texture(1)[:45, :50].astype(np.uint8)
  for k in range(len(TIMES)):  # a sixth of the frame, against the pan
    frames[k, 20:65, 20 + 5 * k : 70 + 5 * k] = patch[..., None]
  found = of(frames)
  assert found["camera_pan"] == pytest.approx(0.06, abs=0.006)
  assert found["object_motion"] > 0.03 > of(film(TIMES, pan=0.06))["object_motion"]
  assert camera.label(found) == "pan"


def test_shake_is_the_deviation_of_the_speed():
  times = np.arange(40) / 10
  places = np.cumsum(np.random.default_rng(0).normal(0, 2.0, (40, 2)), axis=0)  # white jitter of the speed
  places -= places.mean(0)
  found = of(film(times, jitter=places), times)
  expected = np.sqrt(2) * 2.0 / (DIAGONAL * 0.1)  # both components
  assert found["camera_shake"] == pytest.approx(expected, rel=0.3)
  assert camera.label(found) in ("handheld", "shake")


def test_the_camera_of_the_procedural_world():
  """Pans and zooms of clips with a clear background, by both flows; medians of the errors over 10 clips."""
  source = worlds.WorldSource(count=24, seed=11)
  errors, truth = [], []
  picks = [k for k in range(24) if source.script(k).texture != "gradient" and source.script(k).pillar is None][:10]
  for index in picks:
    script, info = source.script(index), source.info(index)
    times = measure.sample_times(info.duration_s, info.fps)
    found = of(source.frames(index, times, HEIGHT, WIDTH), times)
    side = WIDTH / DIAGONAL  # longer sides to diagonals
    true = np.array([script.pan[0] * side, -script.pan[1] * side, script.zoom])
    errors.append(np.abs(np.array([found[f"camera_{name}"] for name in ("pan", "tilt", "zoom")]) - true))
    truth.append((camera.label(found), script.camera.split()[0]))
  assert np.median(errors, axis=0).max() < 0.004, errors
  expected = {"is": ("static",), "pans": ("pan", "tilt"), "zooms": ("zoom",)}
  assert sum(label in expected[word] for label, word in truth) >= 8, truth


def test_labels():
  still = dict.fromkeys(("camera_pan", "camera_tilt", "camera_zoom", "camera_roll", "camera_shake"), 0.0)
  cases = [
    ({}, "static"), ({"camera_pan": -0.05}, "pan"), ({"camera_tilt": 0.05}, "tilt"), ({"camera_zoom": 0.1}, "zoom"),
    ({"camera_roll": 5.0}, "roll"), ({"camera_shake": 0.03}, "handheld"), ({"camera_shake": 0.2}, "shake"),
    ({"camera_pan": 0.1, "camera_shake": 0.03}, "pan"), ({"camera_pan": 0.005}, "static"),
  ]  # fmt: skip
  for changes, expected in cases:
    assert camera.label(still | changes) == expected
  assert camera.label({"motion": 1.0}) == ""
  one_frame = measure.score(film(TIMES[:1]), TIMES[:1])
  assert camera.label({name: score.value for name, score in one_frame.items()}) == ""


# ---- the flow in JAX -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shifted() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """24 pairs of pictures with known flow (B, H, W, 2), five kinds in turn: shifts, a zoom; and the flow found."""
  shape = (107, 160)  # of a clip of 2 : 3, as `flow.flows` asks: one compiled program
  moves = [(0.0, 0.0), (0.35, -0.2), (-3.0, 2.0), (7.0, -5.0)]
  base = film([0.0], shape=shape)[0, ..., 0].astype(np.float32)
  first = np.stack([base] * (len(moves) + 1))
  second, truth = [], []
  for dx, dy in moves:
    second.append(film([0.0], shape=shape, jitter=np.array([[dx, dy]]))[0, ..., 0])
    truth.append(np.broadcast_to([dx, dy], (*shape, 2)))
  second.append(film([1.0], shape=shape, zoom=0.05)[0, ..., 0])
  truth.append(camera.Camera(0, 0, np.exp(0.05) - 1, 0).field(shape))
  turn = np.arange(24) % 5
  first, second, truth = first[turn], np.stack(second).astype(np.float32)[turn], np.stack(truth)[turn]
  return first, second, truth, np.asarray(flow.flow(first, second))


def test_the_flow_in_jax_finds_known_motions(shifted):
  first, second, truth, found = shifted
  inside = (slice(None), slice(8, -8), slice(10, -10))
  errors = np.hypot(*np.moveaxis((found - truth)[inside], -1, 0)).mean((1, 2))
  assert errors.max() < 0.12, errors
  pairs = [[motion.Prepared(p.astype(np.uint8), p) for p in pair] for pair in zip(first[:5], second[:5], strict=True)]
  farneback = np.stack([motion.flow(*pair, 0.1).flow_HWC for pair in pairs])
  other = np.hypot(*np.moveaxis((farneback - truth[:5])[inside], -1, 0)).mean((1, 2))
  assert errors[:5].mean() < other.mean() + 0.05, (errors, other)


def test_the_flow_in_jax_of_a_pair_does_not_depend_on_its_batch(shifted):
  found = shifted[3]
  np.testing.assert_allclose(found[5:20], np.concatenate([found[:5]] * 3), atol=2e-3)


def test_the_camera_by_the_flow_in_jax():
  frames = film(TIMES, pan=0.06, zoom=0.2, shape=(64, 96))
  scores = measure.score(frames, TIMES, measure.chosen(["motion", "jax"]))
  assert scores["camera_pan"].value == pytest.approx(0.06, abs=0.004)
  assert scores["camera_zoom"].value == pytest.approx(0.2, abs=0.02)
  assert scores["camera_pan"].scorer == "lucas-kanade+similarity"
  assert scores["flow_motion"].value == pytest.approx(scores["motion"].value, rel=0.15)


# ---- motion vectors --------------------------------------------------------------------------------------------------


def test_painted_vectors():
  blocks = np.array([[8, 8, 16, 16, 8, -4], [24, 4, 16, 8, 40, 0], [20, 28, 8, 8, 0, 12]], np.int32)
  field = vectors.painted(sample.Vectors(blocks, 32, 32))
  expected = np.zeros((8, 8, 2))
  expected[:4, :4] = (2, -1)
  expected[:2, 4:] = (10, 0)
  expected[6:, 4:6] = (0, 3)
  np.testing.assert_array_equal(field, expected)
  lengths = vectors.mean_length([sample.Vectors(blocks, 32, 32), sample.Vectors(blocks[:0], 32, 32)])
  np.testing.assert_allclose(lengths, np.hypot(*np.moveaxis(expected, -1, 0)) / 64 / 2)


def test_motion_vectors_of_a_pan_are_its_speed():
  times = np.arange(24) / 24
  speed = 0.1
  seen = sample.of_media(encode.encode(film(times, pan=speed, shape=(288, 512)), fps=24, crf=23))
  found = vectors.motion_vectors(seen)
  expected = speed * np.hypot(288, 512) / 24 / (288 + 512)  # a frame's motion, where the reference is the frame before
  # B-frames and references further back count more than one frame's motion.
  assert 0.7 * expected < found["motion_vectors"] < 3 * expected
  assert 0 < found["motion_vectors_patch"] <= found["motion_vectors"] * 1.01
  still = sample.of_media(encode.encode(film(np.zeros(24), shape=(288, 512)), fps=24))
  assert vectors.motion_vectors(still)["motion_vectors"] < 0.02 * expected


def test_what_has_no_vectors_has_no_score():
  assert vectors.motion_vectors(sample.of_frames(film(TIMES), TIMES)) == {}
