"""`kling encode`: caches hold what the codec gives, a second run adds nothing, training reads them, damage is said."""

import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from kling_jax import config as config_lib
from kling_jax import errors
from kling_jax.data import buckets, cache, encode, tokens, worlds
from kling_jax.generate import encode as generate_encode
from kling_jax.interop import safetensors
from kling_jax.models import text_encoder, video_vae
from kling_jax.nn import params
from kling_jax.train import encoders, task

ROOT = pathlib.Path(__file__).parents[1]
BUCKET = buckets.Bucket(5, 16, 16, 8.0)
CLIPS = 3


def settings(folder, **changes):
  config = config_lib.load(str(ROOT / "configs" / "video_dit.py") + ":runlocal")
  config.data.sources, config.data.buckets, config.data.fps = (str(folder),), ((5, 16, 16),), 8.0
  config.data.batch, config.data.validation_fraction, config.model.conditions = 2, 0.0, ()
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return config


@pytest.fixture(scope="module")
def films(tmp_path_factory):
  """A folder of videos that brighten, each at its own level, with captions beside them."""
  folder = tmp_path_factory.mktemp("films")
  for number in range(CLIPS):
    levels = 20 + 60 * number + 4 * np.arange(9)
    encode.write(folder / f"{number}.mp4", [np.full((32, 32, 3), level, np.uint8) for level in levels], fps=8)
    (folder / f"{number}.txt").write_text(f"film {number}" + "!" * number, encoding="utf-8")
  return folder


def vae_weights(folder, seed):
  _, shapes, _ = params.abstract(lambda: video_vae.VideoVAE.preset("xs", rngs=nnx.Rngs(0)))
  return random_weights(folder, {name: leaf.shape for name, leaf in shapes.items()}, seed)


def random_weights(folder, shapes, seed):
  draw = np.random.default_rng(seed)
  values = {name: draw.normal(scale=0.1, size=shape).astype(np.float32) for name, shape in shapes.items()}
  safetensors.write(folder, values)
  return values


def test_wavelet_latents_are_written_once_and_read_by_training(films):
  config = settings(films, data__cached_latents=True)
  assert f"{CLIPS} encoded, 0 were there" in generate_encode.run(config)
  assert f"0 encoded, {CLIPS} were there" in generate_encode.run(config)

  codec = encoders.latent_encoder(config)
  reader = cache.LatentCache(codec.card.folder(films), codec.card)
  batch = task.make(config).batches("train", 0, 1, 1)[0]
  assert "frames" not in batch and batch["latents"].shape == (2, *codec.geometry.latent_shape(5, 16, 16))
  held = [reader.get(clip_id, BUCKET.name) for _, clip_id in reader.entries]
  for latents in batch["latents"]:
    assert any(np.array_equal(latents, one) for one in held)


def test_entries_are_the_codec_of_the_middle_frames(tmp_path):
  source = worlds.WorldSource("shapes-v1", count=2, seed=0)
  codec = encoders.latent_encoder(settings("unused"))
  report = generate_encode.encode_latents(source, [BUCKET], codec, tmp_path)
  assert (report.encoded, report.failed) == (2, {})
  reader = cache.LatentCache(report.folder, codec.card)
  values = []
  for index in range(2):
    info = source.info(index)
    times_s = buckets.slack_s(info, BUCKET) / 2 + np.arange(5) / 8
    frames = source.frames(index, times_s, 16, 16)
    expected = np.asarray(codec.geometry.encode(frames[None].astype(np.float32) / 127.5 - 1))[0]
    held = reader.get(info.clip_id, BUCKET.name)
    assert held.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(held.astype(np.float32), expected, rtol=2**-8, atol=1e-5)
    values.append(expected)
  assert report.mean == pytest.approx(np.mean(values), abs=1e-4)
  assert report.std == pytest.approx(np.std(values), abs=1e-4)


def test_a_vae_has_a_cache_of_its_own_by_its_weights(films, tmp_path):
  one, two = tmp_path / "one", tmp_path / "two"
  values = vae_weights(one, 1)
  vae_weights(two, 2)
  by = lambda weights: settings(
    films, codec__name="vae", codec__preset="xs", codec__channels=4, codec__weights=str(weights),
    data__cached_latents=True,
  )  # fmt: skip
  assert f"{CLIPS} encoded" in generate_encode.run(by(one))
  card = encoders.latent_encoder(by(one)).card
  assert card.encoder == "vae-xs"
  assert card.weights != encoders.latent_encoder(by(two)).card.weights
  assert len(encoders.latent_caches(by(one), [films])[0]) == CLIPS
  with pytest.raises(errors.DataError, match="kling encode"):
    encoders.latent_caches(by(two), [films])
  codec = encoders.latent_encoder(by(one))
  assert all(np.array_equal(codec.params[name], value) for name, value in values.items())
  source = task.make(by(one)).sources
  frames = source.frames(0, buckets.slack_s(source.info(0), BUCKET) / 2 + np.arange(5) / 8, 16, 16)
  held = cache.LatentCache(card.folder(films)).get(source.info(0).clip_id, BUCKET.name)
  expected = np.asarray(jax.jit(codec.encode)(codec.params, frames[None]))[0]
  np.testing.assert_allclose(held.astype(np.float32), expected, rtol=2**-7, atol=1e-4)


def test_texts_are_encoded_trimmed_with_the_empty_one(films, tmp_path):
  init = lambda: text_encoder.ByteTextEncoder(64, 1, 96, rngs=nnx.Rngs(0))
  graph, shapes, _ = params.abstract(init)
  values = random_weights(tmp_path / "text", {f"text.{name}": leaf.shape for name, leaf in shapes.items()}, 0)
  config = settings(films, text__encoder="cached", text__weights=str(tmp_path / "text"))
  lines = generate_encode.run(config).splitlines()
  assert f"{CLIPS + 1} encoded" in lines[1]
  (reader,) = encoders.text_caches(config, [films])
  source = task.make(config).sources
  encoder = params.merge(graph, {name.removeprefix("text."): value for name, value in values.items()})
  for info in source.infos():
    text_LD = reader.get(info.clip_id, info.caption)
    assert len(text_LD) == len(info.caption) + 2
    tokens_BL, mask_BL = tokens.ByteTokenizer(96)([info.caption])
    expected = np.asarray(encoder(tokens_BL, mask_BL))[0][mask_BL[0]]
    np.testing.assert_allclose(text_LD.astype(np.float32), expected, rtol=2**-7, atol=1e-2)
  assert reader.null().shape == (2, 64)
  batch = task.make(config).batches("train", 0, 1, 1)[0]
  assert batch["text"].shape == (2, 96, 64) and "tokens" not in batch


def test_clips_that_cannot_be_decoded_are_named_after_the_others_are_written(films, monkeypatch):
  config = settings(films, codec__channels=8)
  whole = generate_encode.Mixture.open((str(films),)).sources[0]
  bad = whole.info(1).clip_id
  decode = type(whole).frames

  def frames(self, index, *args):
    if self.info(index).clip_id == bad:
      raise errors.DataError("bit rot")
    return decode(self, index, *args)

  monkeypatch.setattr(type(whole), "frames", frames)
  with pytest.raises(errors.DataError, match=r"(?s)1 clips.*bit rot.*2 encoded"):
    generate_encode.run(config)
  monkeypatch.undo()
  assert "1 encoded, 2 were there" in generate_encode.run(config)


def test_what_cannot_be_encoded_is_said(films):
  with pytest.raises(errors.ConfigError, match="procedural world"):
    generate_encode.run(settings("unused", data__sources=("worlds:shapes-v1?count=2",)))
  with pytest.raises(errors.ConfigError, match=r"codec\.weights"):
    generate_encode.run(settings(films, codec__name="vae"))
  with pytest.raises(errors.ConfigError, match=r"text\.weights"):
    generate_encode.run(settings(films, text__encoder="cached"))
  with pytest.raises(errors.ConfigError, match=r"1 \+ 4 k frames"):
    generate_encode.run(settings(films, data__buckets=((6, 16, 16),)))
