"""The frozen encoders that a config names, with their weights, and the caches that they fill or that a run reads."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from kling_jax import stores
from kling_jax.data.cache import Card, LatentCache, TextCache, weights_hash
from kling_jax.data.tokens import ByteTokenizer, FileTokenizer
from kling_jax.errors import ConfigError, WeightsError
from kling_jax.interop import detect, safetensors
from kling_jax.models import latents, video_vae
from kling_jax.models.text_encoder import ByteTextEncoder
from kling_jax.nn import params as params_lib
from kling_jax.nn.params import Params
from kling_jax.train import warm_start, workdir
from kling_jax.train.task import PRECISIONS

TEXT_KINDS = ("t5", "clip_text")
COLUMNS = 64  # texts are encoded at lengths that are multiples of it; a caption has a fifth of Wan's 512 tokens


@dataclasses.dataclass(frozen=True)
class FrozenCodec:
  """A codec with its weights.

  Attributes:
    card: names its caches.
    geometry: temporal, spatial, channels, `latent_shape`.
    params: its weights; empty where it has none.
    encode: (params, frames uint8 (B, T, H, W, 3)) -> latents (B, t, h, w, c) float32; pure, to be jitted.
  """

  card: Card
  geometry: Any
  params: Params
  encode: Callable[[Params, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class FrozenTextEncoder:
  """A text encoder with its weights and tokenizer.

  Attributes:
    card: names its caches.
    tokenizer: captions -> tokens (B, L), mask (B, L).
    params: its weights.
    encode: (params, tokens, mask) -> text (B, L, D); pure, to be jitted.
    rows: texts a call.
  """

  card: Card
  tokenizer: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
  params: Params
  encode: Callable[[Params, jax.Array, jax.Array], jax.Array]
  rows: int = 64


def latent_encoder(config: ml_collections.ConfigDict) -> FrozenCodec:
  """The codec of a video_dit config (`config.codec`).

  Raises:
    ConfigError: an unknown codec, or a VAE without `codec.weights`.
    WeightsError: the weights do not fit.
  """
  c = config.codec
  dtype = PRECISIONS[config.precision]
  unit = lambda frames: (frames.astype(np.float32) / 127.5 - 1).astype(dtype)
  if c.name != "vae":
    codec: Any = latents.make(c.name, spatial=c.spatial, channels=c.channels)
    card = Card("latents", codec.name, weights_hash({"analysis": codec.analysis}), details=_sizes(codec))
    return FrozenCodec(card, codec, {}, lambda _, frames: codec.encode(unit(frames)))
  shape = video_vae.preset(c.preset)
  graph, params = _load(lambda: video_vae.VideoVAE(shape, rngs=nnx.Rngs(0)), c.weights, "", "codec.weights")
  facts = dataclasses.asdict(dataclasses.replace(shape, remat=False))  # recomputing changes no latent
  card = Card("latents", f"vae-{c.preset}", weights_hash(params, facts), details=_sizes(shape))
  return FrozenCodec(card, shape, params, lambda params, x: params_lib.merge(graph, params).encode(unit(x)))


def text_encoder(config: ml_collections.ConfigDict) -> FrozenTextEncoder:
  """The frozen text encoder of a video_dit config whose `text.encoder` is "cached".

  `text.weights` is a folder of a T5, umT5 or CLIP text tower with its tokenizer, or a work directory (or safetensors)
  of a byte encoder that was trained before. The former computes in the config's precision.

  Raises:
    ConfigError: the config trains its text encoder along, or names no weights, or another width.
    WeightsError: the weights do not fit.
    DataError: there is no tokenizer.
  """
  found = _foreign_text(config)
  if found is not None:
    return _read_foreign_text(config, found)
  c = config.text
  init = lambda: ByteTextEncoder(c.width, c.depth, c.tokens, rngs=nnx.Rngs(0))
  graph, params = _load(init, c.weights, "text.", "text.weights")
  card = Card("text", "bytes", weights_hash(params), details={"width": c.width, "tokens": c.tokens})
  encode = lambda params, tokens_BL, mask_BL: params_lib.merge(graph, params)(tokens_BL, mask_BL)
  return FrozenTextEncoder(card, ByteTokenizer(c.tokens), params, encode)


def embed(encoder: FrozenTextEncoder, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Vectors (B, L, D) float32 of texts, zero behind each one's end, and their mask (B, L); `encoder.rows` at a time."""
  parts = []
  for start in range(0, len(texts), encoder.rows):
    chunk = list(texts[start : start + encoder.rows])
    tokens_BL, mask_BL = encoder.tokenizer(chunk + [""] * (encoder.rows - len(chunk)))
    text_BLD = np.asarray(jax.jit(encoder.encode)(encoder.params, *shortened(tokens_BL, mask_BL)), np.float32)
    padded_BLD = np.zeros((*mask_BL.shape, text_BLD.shape[-1]), np.float32)
    padded_BLD[:, : text_BLD.shape[1]] = text_BLD
    parts.append((padded_BLD[: len(chunk)], mask_BL[: len(chunk)]))
  return np.concatenate([text for text, _ in parts]), np.concatenate([mask for _, mask in parts])


def shortened(tokens_BL: np.ndarray, mask_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Both without the columns that are padding in every row, up to a multiple of `COLUMNS`: few shapes to compile."""
  longest = int(mask_BL.sum(axis=1).max())
  length = -(-longest // COLUMNS) * COLUMNS
  return tokens_BL[:, :length], mask_BL[:, :length]


def text_card(config: ml_collections.ConfigDict) -> Card:
  """The card of `text_encoder(config)`, without reading a foreign encoder's weights."""
  found = _foreign_text(config)
  return text_encoder(config).card if found is None else _foreign_card(config, found)


def _foreign_text(config: ml_collections.ConfigDict) -> detect.Foreign | None:
  """The pretrained encoder that `text.weights` names; None where that is not of a foreign layout."""
  c = config.text
  if c.encoder != "cached":
    raise ConfigError(f"config key 'text.encoder' = {c.encoder!r} reads no cache; 'cached' does")
  source = pathlib.Path(stores.here(c.weights or "."))
  if not c.weights or not source.exists() or workdir.is_one(source):
    return None
  found = detect.recognise(source)
  if found is None:
    return None
  if found.kind not in TEXT_KINDS:
    raise WeightsError(f"config key 'text.weights' = {c.weights} holds a {found.kind}; wanted: {', '.join(TEXT_KINDS)}")
  if found.config.width != c.width:
    raise ConfigError(f"config key 'text.width' = {c.width}, but the encoder in {c.weights} has {found.config.width}")
  return found


def _foreign_card(config: ml_collections.ConfigDict, found: detect.Foreign) -> Card:
  details = {"width": found.config.width, "tokens": config.text.tokens, "precision": config.precision}
  return Card("text", found.kind, safetensors.fingerprint(found.tensors), details=details)


def _read_foreign_text(config: ml_collections.ConfigDict, found: detect.Foreign) -> FrozenTextEncoder:
  dtype = PRECISIONS[config.precision]
  tokenizer = FileTokenizer.find(detect.folder_of(found), config.text.tokens)
  graph, shapes, _ = params_lib.abstract(found.init)
  # Weights in the precision that they are used in: umT5-xxl has 5.7e9 of them.
  wanted = {name: jax.ShapeDtypeStruct(leaf.shape, dtype) for name, leaf in shapes.items()}
  params, _ = safetensors.load_into(wanted, found.tensors.source, found.name_map, allow_unexpected=found.ignored)
  encode = lambda params, tokens_BL, mask_BL: params_lib.merge(graph, params)(tokens_BL, mask_BL, dtype=dtype)
  return FrozenTextEncoder(_foreign_card(config, found), tokenizer, params, encode, rows=8)


def latent_caches(config: ml_collections.ConfigDict, folders: Sequence[pathlib.Path | None]) -> tuple[LatentCache, ...]:
  """The caches of the config's codec beside the sources in `folders`.

  Raises:
    DataError: a cache is missing or was written by another encoder.
    ConfigError: a source has no folder.
  """
  card = latent_encoder(config).card
  return tuple(LatentCache(card.folder(folder), card) for folder in _on_disk(folders))


def text_caches(config: ml_collections.ConfigDict, folders: Sequence[pathlib.Path | None]) -> tuple[TextCache, ...]:
  """The caches of the config's text encoder beside the sources in `folders`; see `latent_caches`."""
  card = text_card(config)
  return tuple(TextCache(card.folder(folder), card) for folder in _on_disk(folders))


def _on_disk(folders: Sequence[pathlib.Path | None]) -> list[pathlib.Path]:
  found = [folder for folder in folders if folder is not None]
  if len(found) != len(folders):
    raise ConfigError("a procedural world has no folder to keep caches beside; name sources on disk in data.sources")
  return found


def _sizes(codec: Any) -> dict[str, int]:
  return {"temporal": codec.temporal, "spatial": codec.spatial, "channels": codec.channels}


def _load(init: Callable[[], nnx.Module], source: str | None, prefix: str, key: str) -> tuple[nnx.GraphDef, Params]:
  """The graph of `init()` and its weights from `source`, where their names start with `prefix`."""
  if not source:
    raise ConfigError(f"config key {key!r} is not set; name a work directory that trained it, or a safetensors folder")
  graph, shapes, _ = params_lib.abstract(init)
  wanted = {prefix + name: leaf for name, leaf in shapes.items()}
  loaded, _ = warm_start.load(pathlib.Path(stores.here(source)), wanted, ())
  return graph, {name.removeprefix(prefix): value for name, value in loaded.items()}
