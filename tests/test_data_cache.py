"""Caches: what was put in comes out, by any order and process; what does not fit is refused."""

import dataclasses
import pickle

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kling_jax import errors
from kling_jax.data import cache

LATENTS = cache.Card("latents", "haar", "0123", details={"temporal": 4, "spatial": 8, "channels": 2})
TEXT = cache.Card("text", "bytes", "0123", dtype="float32", details={"width": 3})
BUCKET = cache.latent_variant(5, 16, 16, 8)


def latents(seed, shape=(2, 2, 2, 2)):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fill(folder, ids, **options):
  with cache.Writer(folder, LATENTS, **options) as writer:
    for clip_id in ids:
      if (BUCKET, clip_id) not in writer:
        writer.add(clip_id, BUCKET, latents(int(clip_id)))


def test_entries_come_back_in_any_order_and_after_pickling(tmp_path):
  folder = LATENTS.folder(tmp_path)
  assert folder == tmp_path / "cache" / "latents" / "haar-0123"
  fill(folder, map(str, range(20)), shard_bytes=100)
  reader = cache.LatentCache(folder, LATENTS)
  assert len(reader) == 20 and len(list(folder.glob("*.safetensors"))) > 3
  for user in (reader, pickle.loads(pickle.dumps(reader))):
    for number in (13, 0, 19):
      expected = latents(number).astype(ml_dtypes.bfloat16)
      np.testing.assert_array_equal(user.get(str(number), BUCKET), expected, strict=True)


@hypothesis.given(st.dictionaries(st.text(max_size=12), st.lists(st.integers(0, 5), max_size=3), max_size=5))
@hypothesis.settings(max_examples=25)
def test_any_clip_id_and_shape(tmp_path_factory, shapes):
  folder = tmp_path_factory.mktemp("set")
  values = {clip_id: latents(1, tuple(shape)) for clip_id, shape in shapes.items()}
  with cache.Writer(folder, dataclasses.replace(LATENTS, dtype="float32")) as writer:
    for clip_id, value in values.items():
      writer.add(clip_id, BUCKET, value)
  reader = cache.LatentCache(folder)
  for clip_id, value in values.items():
    np.testing.assert_array_equal(reader.get(clip_id, BUCKET), value, strict=True)


def test_shards_are_plain_safetensors(tmp_path):
  fill(tmp_path, ["7"])
  (shard,) = tmp_path.glob("*.safetensors")
  tensors = safetensors.numpy.load_file(shard)
  np.testing.assert_array_equal(tensors[f"{BUCKET}/7"], latents(7).astype(ml_dtypes.bfloat16))


def test_a_broken_run_loses_only_its_last_shard_and_goes_on(tmp_path):
  with pytest.raises(RuntimeError, match="power cut"), cache.Writer(tmp_path, LATENTS, shard_bytes=64) as writer:
    for number in range(7):  # 32 bytes an entry: three shards of two, one entry pending
      writer.add(str(number), BUCKET, latents(number))
    raise RuntimeError("power cut")
  assert len(cache.LatentCache(tmp_path)) == 6
  before = {path.name: path.read_bytes() for path in tmp_path.glob("p*")}
  fill(tmp_path, map(str, range(9)))
  reader = cache.LatentCache(tmp_path)
  assert len(reader) == 9
  assert all((tmp_path / name).read_bytes() == payload for name, payload in before.items())
  np.testing.assert_array_equal(reader.get("6", BUCKET), latents(6).astype(ml_dtypes.bfloat16))


def test_two_processes_fill_one_folder(tmp_path):
  fill(tmp_path, ["0", "1"], process=0)
  fill(tmp_path, ["2", "3"], process=1)
  assert len(cache.LatentCache(tmp_path)) == 4


def test_absent_entries_are_named_at_start(tmp_path):
  fill(tmp_path, ["1"])
  reader = cache.LatentCache(tmp_path)
  assert reader.missing([("1", BUCKET), ("2", BUCKET), ("1", "other")]) == ["2", "1"]
  with pytest.raises(errors.DataError, match=r"'2'.*does not know that clip.*kling encode"):
    reader.get("2", BUCKET)
  with pytest.raises(errors.DataError, match=r"for 5x16x16@8 only"):
    reader.get("1", cache.latent_variant(9, 16, 16, 8))


def test_another_encoder_is_refused_with_the_difference(tmp_path):
  fill(tmp_path, ["1"])
  other = dataclasses.replace(LATENTS, weights="4567")
  for attempt in (lambda: cache.LatentCache(tmp_path, other), lambda: cache.Writer(tmp_path, other)):
    with pytest.raises(errors.DataError, match=r"weights is '0123', expected '4567'"):
      attempt()
  with pytest.raises(errors.DataError, match="holds latents, not text"):
    cache.TextCache(tmp_path)
  with pytest.raises(errors.DataError, match=r"no card\.json"):
    cache.LatentCache(tmp_path / "nowhere")


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=40)
def test_a_damaged_shard_is_refused_or_harmless(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp("set")
  fill(folder, ["1", "2"])
  (shard,) = folder.glob("*.safetensors")
  payload = bytearray(shard.read_bytes())
  header = 8 + int.from_bytes(payload[:8], "little")
  place = data.draw(st.integers(0, header - 1))
  payload[place] ^= data.draw(st.integers(1, 255))
  shard.write_bytes(payload[: data.draw(st.sampled_from([None, header + 5, 4, 0]))])
  reader = cache.LatentCache(folder)
  try:
    for clip_id in ("1", "2"):
      reader.get(clip_id, BUCKET)
  except errors.DataError as error:
    assert "kling encode" in str(error)


def test_values_that_are_not_finite_and_doubles_are_refused(tmp_path):
  with cache.Writer(tmp_path, dataclasses.replace(LATENTS, dtype="float16")) as writer:
    with pytest.raises(errors.DataError, match="not finite"):
      writer.add("1", BUCKET, np.full((1, 1, 1, 1), 1e6))  # beyond float16
    writer.add("1", BUCKET, np.ones((1, 1, 1, 1)))
    with pytest.raises(errors.DataError, match="already"):
      writer.add("1", BUCKET, np.ones((1, 1, 1, 1)))


def test_text_is_trimmed_tied_to_its_caption_and_padded_for_a_batch(tmp_path):
  with cache.Writer(tmp_path, TEXT) as writer:
    writer.add("", cache.text_variant(""), latents(0, (2, 3)))
    writer.add("clip", cache.text_variant("a cat"), latents(1, (4, 3)))
  reader = cache.TextCache(tmp_path)
  with pytest.raises(errors.DataError, match="lacks clip 'clip'"):
    reader.get("clip", "a dog")  # captioned anew since it was encoded
  text_BLD, mask_BL = cache.pad_text([reader.get("clip", "a cat"), reader.null()], 5)
  assert mask_BL.sum(1).tolist() == [4, 2]
  np.testing.assert_array_equal(text_BLD[0, :4], latents(1, (4, 3)))
  assert not text_BLD[~mask_BL].any()
  with pytest.raises(errors.DataError, match="raise the config's text length to 4"):
    cache.pad_text([reader.get("clip", "a cat")], 3)


def test_the_weights_hash_sees_every_byte_path_type_and_shape():
  params = {"a": np.arange(6, dtype=np.float32), "b": np.ones(2, ml_dtypes.bfloat16)}
  variants = [
    params,
    {**params, "a": params["a"].reshape(2, 3)},
    {**params, "a": np.nextafter(params["a"], 9)},
    {"a": params["a"], "c": params["b"]},
    {**params, "b": np.ones(2, np.float16)},
  ]
  hashes = [cache.weights_hash(variant) for variant in variants] + [cache.weights_hash(params, {"levels": 2})]
  assert len(set(hashes)) == len(hashes)
  assert cache.weights_hash(dict(reversed(params.items()))) == hashes[0]


def test_cards_name_folders_only():
  with pytest.raises(errors.ConfigError, match="letters, digits"):
    cache.Card("latents", "../up", "0")
  with pytest.raises(errors.ConfigError, match="legal: latents, text"):
    cache.Card("sound", "x", "0")
