"""The Haar codec: exact, orthonormal, causal, and true to the energies that it is built on."""

import av
import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kling_jax.errors import ConfigError
from kling_jax.models import latents
from kling_jax.models.latents import HaarCodec

frames = np.random.default_rng(11).uniform(-1, 1, (2, 9, 16, 24, 3)).astype(np.float32)


def footage(shape, seed):
  """Smooth noise in time and space, so that coarse coefficients carry more than fine ones."""
  x = np.random.default_rng(seed).standard_normal(shape)
  for axis in (0, 1, 2, 3, 3):
    x = x + np.roll(x, 1, axis) + np.roll(x, 3, axis)
  return (x / np.abs(x).max()).astype(np.float32)


@pytest.mark.parametrize(("temporal", "spatial"), [(1, 4), (2, 8), (4, 2), (4, 4), (4, 8)])
def test_nothing_is_lost_with_all_channels(temporal, spatial):
  codec = HaarCodec(temporal, spatial, 3 * temporal * spatial**2)
  np.testing.assert_allclose(codec.decode(codec.encode(frames)), frames, atol=3e-6)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_haar_tree_is_repeated_means_and_differences(size):
  """Oracle: the lifting form of the transform, one level at a time."""
  signal = np.random.default_rng(0).standard_normal(size)
  means, details = signal, []
  while len(means) > 1:
    details = [*((means[::2] - means[1::2]) / np.sqrt(2)), *details]
    means = (means[::2] + means[1::2]) / np.sqrt(2)
  np.testing.assert_allclose(latents.haar(size) @ signal, [*means, *details], atol=1e-12)


@pytest.mark.parametrize("channels", [1, 16, 100, 192])
def test_decode_undoes_encode_on_what_is_kept(channels):
  codec = HaarCodec(4, 4, channels)
  np.testing.assert_allclose(codec.analysis @ codec.synthesis, np.eye(channels), atol=1e-5)
  rms = np.linalg.norm(codec.synthesis, axis=0)
  np.testing.assert_allclose(codec.analysis * rms[:, None], (codec.synthesis / rms).T, atol=1e-6)  # adjoint up to scale
  z = np.random.default_rng(1).standard_normal((1, 3, 2, 2, channels)).astype(np.float32)
  again = codec.encode(codec.decode(z))
  np.testing.assert_allclose(again[:, 1:], z[:, 1:], atol=1e-4)


def test_energy_is_conserved():
  """Parseval; the first frame stands for a block of `temporal` equal ones."""
  codec = HaarCodec(4, 8, 768)
  rms = np.linalg.norm(codec.synthesis, axis=0)
  inside = np.square(codec.encode(frames) * rms).sum((1, 2, 3, 4))
  pixels = np.square(frames).sum((2, 3, 4)) @ np.array([4] + [1] * 8)
  np.testing.assert_allclose(inside, pixels, rtol=1e-5)


def test_more_channels_are_never_worse():
  clip = footage((1, 9, 16, 16, 3), 2)
  errors = []
  for channels in (4, 16, 64, 128):
    codec = HaarCodec(4, 4, channels)
    errors.append(float(np.square(codec.decode(codec.encode(clip)) - clip)[:, 1:].sum()))
  assert errors == sorted(errors, reverse=True)


def test_channels_are_ordered_by_expected_energy():
  rms = np.linalg.norm(HaarCodec(4, 4, 192).synthesis, axis=0)
  assert (np.diff(rms) <= 1e-6).all()
  assert rms[0] ** 2 > 3 * rms[1] ** 2  # scales keep half of the slope; the mean luma of a block, then its mean colour


def test_flat_colour_needs_three_channels():
  """The means of the three colour axes are among the first five channels."""
  clip = np.broadcast_to(np.array([0.3, -0.8, 0.6], np.float32), (1, 5, 8, 8, 3))
  codec = HaarCodec(4, 4, 5)
  np.testing.assert_allclose(codec.decode(codec.encode(clip)), clip, atol=1e-6)
  assert (np.abs(codec.encode(clip)).max((0, 1, 2, 3)) > 1e-4).sum() == 3


def test_time_is_causal():
  codec = HaarCodec(4, 4, 16)
  z = codec.encode(frames)
  changed = frames.copy()
  changed[:, 5:] = 0
  z_changed = codec.encode(changed)
  np.testing.assert_array_equal(z_changed[:, :2], z[:, :2])
  assert np.abs(z_changed[:, 2] - z[:, 2]).min(-1).max() > 0
  np.testing.assert_allclose(codec.decode(z[:, :2]), codec.decode(z)[:, :5], atol=1e-6)


def test_an_image_is_the_first_frame_of_a_video():
  codec = HaarCodec(4, 4, 32)
  np.testing.assert_allclose(codec.encode(frames[:, :1]), codec.encode(frames)[:, :1], atol=2e-5)
  assert codec.latent_shape(1, 16, 24) == (1, 4, 6, 32)


@pytest.mark.parametrize(("temporal", "spatial"), [(1, 8), (4, 2), (2, 4)])
def test_energies_of_small_blocks_follow_from_the_largest(monkeypatch, temporal, spatial):
  """With the table measured on some footage at 4 x 8 x 8, every smaller codec has unit variance on it, as a whole,
  and half of the spectrum's slope in its channels."""
  clip = footage((4, 9, 16, 16, 3), 5)  # frame 0 stands outside the table and is left out below
  monkeypatch.setattr(latents, "_RMS", (1.0,) * 144)
  latents._basis.cache_clear()
  unit = HaarCodec(4, 8, 768)  # with equal energies channels stand in the order of the product
  energy = np.square(unit.encode(clip)[:, 1:], dtype=np.float64).mean((0, 1, 2, 3)).reshape(3, 4, 8, 8)
  for axis, size in ((1, 4), (2, 8), (3, 8)):
    level = latents.levels(size)
    energy = np.stack([energy.compress(level == k, axis).mean(axis) for k in range(level[-1] + 1)], axis)
  monkeypatch.setattr(latents, "_RMS", tuple(np.sqrt(energy).ravel()))
  latents._basis.cache_clear()
  try:
    codec = HaarCodec(temporal, spatial, 3 * temporal * spatial**2)
    squares = np.square(codec.encode(clip)[:, 1:], dtype=np.float64).mean((0, 1, 2, 3))
    rms = np.linalg.norm(codec.synthesis, axis=0).round(6)
    for value in np.unique(rms):  # channels of one level have one expected energy
      assert squares[rms == value].mean() == pytest.approx(value**2 / np.square(rms).mean(), rel=1e-3)
    assert squares.mean() == pytest.approx(1, abs=1e-3)
  finally:
    latents._basis.cache_clear()


def test_real_footage_comes_back_with_unit_variance(shared):
  """17 frames at 64 x 64 of four videos: over 25 dB each with the default, latents near unit variance."""
  clips = []
  for name in ("bikes_city.mp4", "wolf_turns_head.mp4", "marathon_runners.mp4", "man_juggles_ball.mp4"):
    with av.open(str(shared / "videos" / name)) as container:
      decoded = [
        frame.to_ndarray(format="rgb24") for _, frame in zip(range(33), container.decode(video=0), strict=False)
      ]
    side = min(decoded[0].shape[:2])
    clips.append([cv2.resize(image[:side, :side], (64, 64), interpolation=cv2.INTER_AREA) for image in decoded[::2]])
  video = np.array(clips, np.float32) / 127.5 - 1
  codec = HaarCodec()
  z = codec.encode(video)
  mse = np.square(np.clip(codec.decode(z), -1, 1) - video).mean((1, 2, 3, 4))
  assert (10 * np.log10(4 / mse) > 25).all()
  rms = np.sqrt(np.square(z[:, 1:]).mean((0, 1, 2, 3)))
  assert rms.min() > 0.3
  assert rms.max() < 3


def test_output_is_float32_and_integers_are_refused():
  codec = HaarCodec()
  z = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct((1, 5, 8, 8, 3), jnp.bfloat16))
  assert (z.dtype, z.shape) == (jnp.float32, (1, 2, 2, 2, 16))
  with pytest.raises(TypeError, match="float frames"):
    codec.encode(np.zeros((1, 5, 8, 8, 3), np.uint8))
  with pytest.raises(ValueError, match="decodes 16 channels, not 8"):
    codec.decode(jnp.zeros((1, 2, 2, 2, 8)))


@pytest.mark.parametrize(
  ("size", "message"),
  [((16, 8, 8), "nearest: 13 or 17"), ((0, 8, 8), "nearest: 1 or 5"), ((5, 10, 8), "height"), ((5, 8, 0), "width")],
)
def test_sizes_that_do_not_divide_are_named(size, message):
  with pytest.raises(ConfigError, match=message):
    HaarCodec().latent_shape(*size)


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("haar", {"channels": 193}, r"1\.\.192"),
    ("haar", {"spatial": 16}, r"\(2, 4, 8\)"),
    ("haar", {"chanels": 8}, "did you mean 'channels'"),
    ("harr", {}, "did you mean 'haar'"),
    ("vae", {}, "video_vae"),
  ],
)
def test_make_says_what_is_legal(name, options, message):
  with pytest.raises(ConfigError, match=message):
    latents.make(name, **options)


def test_make_gives_a_codec():
  codec = latents.make("haar", spatial=8, channels=64)
  assert isinstance(codec, latents.Codec)
  assert codec == HaarCodec(4, 8, 64)
