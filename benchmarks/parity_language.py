"""Parity of language models: Llama, Qwen3, Chameleon with its picture tokenizer, Qwen3-VL with its vision tower."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from agreement import Fixture, cosine, relative_error, times
from reference import loaded, noise, randomised, weights_of


def _tokens(vocabulary: int, rows: int, length: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, vocabulary, (rows, length)).astype(np.int32)


def _tensor(array: np.ndarray) -> Any:
  import torch

  array = array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) else array
  return torch.from_numpy(np.ascontiguousarray(array))


# ---- text decoders ---------------------------------------------------------------------------------------------------


def _decoder(kind: str, width: int, layers: int, seed: int, vocabulary: int = 199, **more: Any) -> Any:
  import transformers

  sizes = {
    "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 2, "max_position_embeddings": 512,
  }  # fmt: skip
  config, model = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
  }[kind]
  return randomised(model(config(**sizes, **more)), seed)


def _text_reference(model: Any, tokens_BL: np.ndarray, real_BL: np.ndarray) -> np.ndarray:
  """Logits at the real tokens, zero elsewhere; positions as generation counts them, from the first real token."""
  import torch

  with torch.no_grad():
    places = np.clip(np.cumsum(real_BL, 1) - 1, 0, None)
    given = {"attention_mask": _tensor(real_BL.astype(np.int64)), "position_ids": _tensor(places)}
    logits = model(input_ids=_tensor(tokens_BL), **given).logits.numpy()
  return np.where(real_BL[..., None], logits, 0)


def _ours(graph: Any, part: str = "") -> Any:
  """tokens, mask -> logits at once, and the same through a cache in three pieces."""
  import jax
  import jax.numpy as jnp

  from kling_jax.nn import params as params_lib

  def model_of(params):
    model = params_lib.merge(graph, params)
    return getattr(model, part) if part else model

  @functools.partial(jax.jit, static_argnames=("low",))
  def whole(params, tokens_BL, real_BL, low=False):
    model = model_of(params)
    x_BLD = model.embed_text(tokens_BL, dtype=jnp.bfloat16 if low else jnp.float32)
    logits = model.logits(model(x_BLD, real_BL=real_BL)[0])
    return jnp.where(real_BL[..., None], logits, 0)

  @jax.jit
  def pieces(params, tokens_BL, real_BL):
    model = model_of(params)
    batch, length = tokens_BL.shape
    cache, found = model.init_cache(batch, length + 3), []
    for start, end in ((0, length // 2), (length // 2, length // 2 + 1), (length // 2 + 1, length)):
      x_BLD = model.embed_text(tokens_BL[:, start:end])
      hidden_BLD, cache = model(x_BLD, real_BL=real_BL[:, start:end], cache=cache)
      found.append(model.logits(hidden_BLD))
    return jnp.where(real_BL[..., None], jnp.concatenate(found, 1), 0)

  return whole, pieces


def _padded(rows: int, length: int) -> np.ndarray:
  """Masks: no padding, padding at the left, and in the third row at both ends."""
  place = np.arange(length)
  return np.stack([place >= 0, place >= length // 3, (place >= 4) & (place < length - 7)][:rows])


def _text_case(part: str, reference: str, model: Any, note: str, bound: float | None = None) -> dict:
  config = model.config.to_dict()
  graph, params = loaded(model, config)
  tokens_BL, real_BL = _tokens(config["vocab_size"], 3, 41), _padded(3, 41)
  whole, pieces = _ours(graph)
  theirs = _text_reference(model, tokens_BL, real_BL)
  ours, cached = whole(params, tokens_BL, real_BL), pieces(params, tokens_BL, real_BL)
  row = {
    "part": part, "reference": reference, "note": note,
    "max_rel_error": max(relative_error(ours, theirs), relative_error(cached, theirs)),
    "cosine_bf16": cosine(whole(params, tokens_BL, real_BL, low=True), theirs),
  }  # fmt: skip
  row |= times(
    lambda: whole(params, tokens_BL, real_BL).block_until_ready(), lambda: _text_reference(model, tokens_BL, real_BL)
  )
  return row if bound is None else row | {"bound": bound}


LLAMA3 = {
  "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}  # fmt: skip


def llama() -> dict:
  model = _decoder("llama", 64, 3, 0, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3)
  return _text_case("Llama decoder", "transformers LlamaForCausalLM", model,
                    "3 layers, grouped heads, biases, Llama 3.1's rope; padded; cache on and off")  # fmt: skip


def qwen3() -> dict:
  model = _decoder(
    "qwen3", 64, 3, 1, tie_word_embeddings=True, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}
  )
  return _text_case("Qwen3 decoder", "transformers Qwen3ForCausalLM", model,
                    "3 layers, grouped heads, tied head; padded; cache on and off")  # fmt: skip


def qwen3_deep() -> dict:
  model = _decoder("qwen3", 32, 30, 2)
  return _text_case("Qwen3 decoder, 30 layers", "transformers Qwen3ForCausalLM", model, "30 layers, own head", 2e-3)


def _text_fixture(model: Any) -> Fixture:
  config = model.config.to_dict()
  tokens_BL, real_BL = _tokens(config["vocab_size"], 2, 13), _padded(2, 13)
  inputs = {"tokens": tokens_BL, "real": real_BL}
  return Fixture(config, weights_of(model), inputs, {"logits": _text_reference(model, tokens_BL, real_BL)})


def llama_fixture() -> Fixture:
  return _text_fixture(_decoder("llama", 16, 2, 3, 40, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3))


def qwen3_fixture() -> Fixture:
  return _text_fixture(_decoder("qwen3", 16, 2, 4, 40, tie_word_embeddings=True))


# ---- Chameleon -------------------------------------------------------------------------------------------------------


def _chameleon(width: int, layers: int, base: int, multipliers: list[int], codes: int, seed: int, **more: Any) -> Any:
  import transformers

  # Codes in an order that is not that of their tokens, which begin at 4.
  order = np.random.default_rng(seed).permutation(codes)
  spelt = lambda code: "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"
  vocabulary = {"<image>": 3} | {spelt(code): 4 + place for place, code in enumerate(order.tolist())}
  vq = {"base_channels": base, "channel_multiplier": multipliers, "num_res_blocks": 1, "num_embeddings": codes,
        "embed_dim": 8, "latent_channels": 8, "resolution": 32}  # fmt: skip
  return randomised(transformers.ChameleonForConditionalGeneration(transformers.ChameleonConfig(
    vocab_size=codes + 60, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
    num_attention_heads=4, num_key_value_heads=4, vq_config=vq, vocabulary_map=vocabulary, **more,
  )), seed)  # fmt: skip


def _picture_tokens(model: Any, pictures_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(tokens, the vectors before they are looked up) of pictures."""
  import torch

  with torch.no_grad():
    pixels = _tensor(np.moveaxis(pictures_BHWC, -1, 1))
    vectors = model.model.vqmodel.quant_conv(model.model.vqmodel.encoder(pixels)).numpy()
    return model.get_image_tokens(pixels).numpy().astype(np.int32), np.moveaxis(vectors, 1, -1).copy()


def _check_tokens(model: Any, ours: np.ndarray, theirs: np.ndarray, vectors: np.ndarray) -> None:
  """Equal picture tokens, but where two codes are equally near within float32.

  Raises:
    ValueError: another token whose code is farther.
  """
  book = model.model.vqmodel.quantize.embedding.weight.detach().numpy().astype(np.float64)
  distance = np.sum((vectors.reshape(*theirs.shape, 1, -1) - book) ** 2, -1)
  code_of = np.zeros(model.config.vocab_size, int)
  for token, code in model.model.vocabulary_mapping.bpe2img.items():
    code_of[token] = code
  chosen, best = (np.take_along_axis(distance, code_of[t][..., None], -1) for t in (ours, theirs))
  worst = np.abs(chosen / best - 1).max()
  if worst > 1e-5:
    raise ValueError(f"{np.sum(ours != theirs)} other picture tokens, farther by up to {worst:.1e}")


def _unhidden(logits: np.ndarray, codes: int) -> np.ndarray:
  """Logits without those of picture tokens, which the reference sets to the smallest number."""
  return np.concatenate([logits[..., :4], logits[..., 4 + codes :]], -1)


def chameleon() -> dict:
  import jax

  from kling_jax.nn import params as params_lib

  codes, pairs, low = 64, [], []
  for seed, swin in ((5, False), (6, True)):
    model = _chameleon(64, 3, 32, [1, 1, 2], codes, seed, swin_norm=swin)
    graph, params = loaded(model, model.config.to_dict())
    pictures = np.tanh(noise(2, 24, 36, 3, seed=seed))
    tokens, vectors = _picture_tokens(model, pictures)
    see = jax.jit(lambda params, x, graph=graph: params_lib.merge(graph, params).pictures.vectors(x))
    read = jax.jit(lambda params, x, graph=graph: params_lib.merge(graph, params).picture_tokens(x))
    _check_tokens(model, np.asarray(read(params, pictures)), tokens, vectors)
    text = _tokens(codes + 60, 2, 20, seed)
    prompt = np.concatenate([text[:, :7], tokens, text[:, 7:]], axis=1)
    real_BL = _padded(2, prompt.shape[1])
    theirs = _unhidden(_text_reference(model, prompt, real_BL), codes)
    whole, pieces = _ours(graph, "language")
    ours = [run(params, prompt, real_BL) for run in (whole, pieces)]
    pairs += [(see(params, pictures), vectors), *((_unhidden(np.asarray(y), codes), theirs) for y in ours)]
    rounded = _unhidden(np.asarray(whole(params, prompt, real_BL, low=True)), codes)
    low += [(see(params, pictures.astype("bfloat16")), vectors), (rounded, theirs)]
  return {
    "part": "Chameleon", "reference": "transformers ChameleonForConditionalGeneration",
    "max_rel_error": max(relative_error(*pair) for pair in pairs), "cosine_bf16": min(cosine(*pair) for pair in low),
    "note": "3 layers with both places of norms; pictures of 24 x 36 to equal tokens; padding; cache on and off",
    **times(lambda: whole(params, prompt, real_BL).block_until_ready(),
            lambda: _text_reference(model, prompt, real_BL)),
  }  # fmt: skip


def chameleon_fixture() -> Fixture:
  codes = 12
  model = _chameleon(16, 2, 32, [1, 1], codes, 7)
  weights = {name: array.astype(np.float16).astype(np.float32) for name, array in weights_of(model).items()}
  model.load_state_dict({name: _tensor(array) for name, array in weights.items()})
  pictures = np.tanh(noise(1, 6, 4, 3))
  tokens, vectors = _picture_tokens(model, pictures)
  prompt, real_BL = np.concatenate([_tokens(codes + 60, 1, 5), tokens], axis=1), _padded(1, 5 + tokens.shape[1])
  logits = _unhidden(_text_reference(model, prompt, real_BL), codes)
  halved = {name: array.astype(np.float16) for name, array in weights.items()}
  return Fixture(model.config.to_dict(), halved, {"pictures": pictures, "prompt": prompt},
                 {"tokens": tokens, "vectors": vectors, "logits": logits})  # fmt: skip


# ---- Qwen3-VL --------------------------------------------------------------------------------------------------------

VIDEO, PICTURE, OPEN, CLOSE = 90, 91, 92, 93


def _qwen(width: int, layers: int, tower: int, depth: int, deep: list[int], side: int, patch: int, seed: int) -> Any:
  import transformers

  sections = [width // 4 - 2 * (width // 12), width // 12, width // 12]  # of heads of width / 2
  return randomised(transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(
    text_config={
      "vocab_size": 100, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
      "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": width // 2,
      "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections,
                          "mrope_interleaved": True},
    },
    vision_config={
      "depth": depth, "hidden_size": tower, "intermediate_size": 2 * tower, "num_heads": 2, "patch_size": patch,
      "out_hidden_size": width, "num_position_embeddings": side**2, "deepstack_visual_indexes": deep,
    },
    image_token_id=PICTURE, video_token_id=VIDEO, vision_start_token_id=OPEN, vision_end_token_id=CLOSE,
  )), seed)  # fmt: skip


def _qwen_pixels(frames_THWC: np.ndarray, patch: int) -> np.ndarray:
  """Frames as the reference's processor hands them over: patches in the order of 2 x 2 cells, values (C, T, h, w)."""
  frames, height, width, _ = frames_THWC.shape
  rows, columns = height // patch, width // patch
  x = frames_THWC.reshape(frames // 2, 2, rows // 2, 2, patch, columns // 2, 2, patch, 3)
  return x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * 2 * patch * patch)


def _qwen_prompt(picture: tuple[int, int], video: tuple[int, int, int]) -> tuple[np.ndarray, list]:
  """A text with one picture and one video, times written between its frames, and the grids of tokens."""
  tokens, grids = [1, 2, 3, OPEN, *[PICTURE] * (picture[0] * picture[1]), CLOSE, 4, 5], [(1, *picture)]
  for time in range(video[0]):
    tokens += [10 + time, OPEN, *[VIDEO] * (video[1] * video[2]), CLOSE]
    grids.append((1, *video[1:]))
  return np.array([*tokens, 6, 7, 8], np.int32), grids


def _qwen_reference(model: Any, tokens_L: np.ndarray, shown: Mapping[str, np.ndarray], patch: int) -> dict:
  """Logits, positions, and what the tower made of the picture and its deep stack."""
  import torch

  grid = lambda frames: torch.tensor([[frames.shape[0] // 2, frames.shape[1] // patch, frames.shape[2] // patch]])
  pixels = {name: _tensor(_qwen_pixels(frames, patch)) for name, frames in shown.items()}
  kinds = np.where(tokens_L == PICTURE, 1, np.where(tokens_L == VIDEO, 2, 0))
  with torch.no_grad():
    given = {"input_ids": _tensor(tokens_L[None]), "mm_token_type_ids": _tensor(kinds[None])}
    grids = {"image_grid_thw": grid(shown["picture"]), "video_grid_thw": grid(shown["video"])}
    positions, _ = model.model.get_rope_index(**given, **grids)
    y = model(**given, **grids, pixel_values=pixels["picture"], pixel_values_videos=pixels["video"])
    tower = model.model.visual(pixels["picture"], grid_thw=grids["image_grid_thw"], return_dict=True)
  return {
    "logits": y.logits.numpy(), "positions": positions.numpy().astype(np.int32)[:, 0],
    "seen": tower.pooler_output.numpy(), "deep": torch.stack(list(tower.deepstack_features)).numpy(),
  }  # fmt: skip


def _qwen_ours(graph: Any, dtype: str = "float32") -> Any:
  import jax
  import jax.numpy as jnp

  from kling_jax.nn import params as params_lib

  @functools.partial(jax.jit, static_argnames=("cut",))
  def run(params, tokens_L, positions_3L, picture, video, cut=0):
    model = params_lib.merge(graph, params)
    looks = [model.vision(frames[None].astype(dtype)) for frames in (picture, video)]
    seen = jnp.concatenate([tokens for tokens, _ in looks], axis=1)
    deep = jnp.concatenate([stack for _, stack in looks], axis=2)
    tokens, places = tokens_L[None], positions_3L[:, None]
    if not cut:
      hidden, _ = model(tokens, seen, deep, places)
    else:  # the prompt up to `cut`, then what follows it, through a cache
      cache = model.language.init_cache(1, tokens.shape[1] + 2)
      first, cache = model(tokens[:, :cut], seen, deep, places[..., :cut], cache=cache)
      rest = model.language.embed_text(tokens[:, cut:])
      hidden = jnp.concatenate([first, model.language(rest, positions=places[..., cut:], cache=cache)[0]], axis=1)
    return looks[0], model.language.logits(hidden)

  return run


def qwen3_vl() -> dict:
  from kling_jax.models import qwen_vl

  patch = 8
  model = _qwen(48, 4, 32, 5, [1, 3], 6, patch, 8)
  graph, params = loaded(model, model.config.to_dict())
  shape = graph_config(graph, params)
  run, low_run = _qwen_ours(graph), _qwen_ours(graph, "bfloat16")
  pairs, low = [], []
  for picture, video in (((48, 80), (4, 32, 64)), ((112, 16), (2, 48, 48))):
    shown = {
      "picture": np.repeat(np.tanh(noise(1, *picture, 3)), 2, axis=0), "video": np.tanh(noise(*video, 3, seed=1)),
    }  # fmt: skip
    cell = 2 * patch
    tokens_L, grids = _qwen_prompt(
      (picture[0] // cell, picture[1] // cell), (video[0] // 2, video[1] // cell, video[2] // cell)
    )
    theirs = _qwen_reference(model, tokens_L, shown, patch)
    positions = qwen_vl.positions(shape, tokens_L, grids)
    assert np.array_equal(positions, theirs["positions"]), "other positions"
    given = (params, tokens_L, positions, shown["picture"], shown["video"])
    (seen, deep), logits = run(*given)
    pairs += [(seen[0], theirs["seen"]), (deep[:, 0], theirs["deep"]), (logits, theirs["logits"])]
    pairs.append((run(*given, cut=len(tokens_L) - 3)[1], theirs["logits"]))
    (low_seen, _), low_logits = low_run(*given)
    low += [(low_seen[0], theirs["seen"]), (low_logits, theirs["logits"])]
  return {
    "part": "Qwen3-VL", "reference": "transformers Qwen3VLForConditionalGeneration",
    "max_rel_error": max(relative_error(*pair) for pair in pairs), "cosine_bf16": min(cosine(*pair) for pair in low),
    "note": "tower of 5 layers with 2 in the deep stack, decoder of 4; a picture and a video of odd grids in one text; "
    "cache on and off",
    **times(lambda: run(*given)[1].block_until_ready(), lambda: _qwen_reference(model, tokens_L, shown, patch)),
  }  # fmt: skip


def graph_config(graph: Any, params: Mapping[str, np.ndarray]) -> Any:
  """The config of a model given as graph and parameters."""
  from kling_jax.nn import params as params_lib

  return params_lib.merge(graph, params).config


def qwen3_vl_fixture() -> Fixture:
  patch = 4
  model = _qwen(24, 2, 16, 3, [0], 4, patch, 9)
  shown = {"picture": np.repeat(np.tanh(noise(1, 24, 8, 3)), 2, axis=0), "video": np.tanh(noise(4, 8, 16, 3, seed=1))}
  tokens_L, _ = _qwen_prompt((3, 1), (2, 1, 2))
  outputs = _qwen_reference(model, tokens_L, shown, patch)
  return Fixture(model.config.to_dict(), weights_of(model), shown | {"tokens": tokens_L}, outputs)


CASES = {"llama": llama, "qwen3": qwen3, "qwen3_deep": qwen3_deep, "chameleon": chameleon, "qwen3_vl": qwen3_vl}
FIXTURES = {
  "llama": llama_fixture, "qwen3": qwen3_fixture, "chameleon": chameleon_fixture, "qwen3_vl": qwen3_vl_fixture,
}  # fmt: skip
