"""Parity of the T5 and CLIP text encoders."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from agreement import Fixture
from reference import facts_of, loaded, randomised, row, weights_of

# ---- text ------------------------------------------------------------------------------------------------------------


def _t5(kind: str, width: int, heads: int, head: int, ffn: int, layers: int, vocabulary: int, seed: int) -> Any:
  import transformers

  shapes = {
    "d_model": width, "num_heads": heads, "d_kv": head, "d_ff": ffn, "num_layers": layers, "vocab_size": vocabulary,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "is_encoder_decoder": False, "use_cache": False,
  }  # fmt: skip
  if kind == "umt5":
    return randomised(transformers.UMT5EncoderModel(transformers.UMT5Config(**shapes)), seed)
  return randomised(transformers.T5EncoderModel(transformers.T5Config(**shapes)), seed)


def _tokens(vocabulary: int, lengths: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
  most = max(lengths)
  tokens = np.random.default_rng(seed).integers(3, vocabulary, (len(lengths), most)).astype(np.int32)
  mask = np.arange(most) < np.array(lengths)[:, None]
  return {"tokens": np.where(mask, tokens, 0).astype(np.int32), "mask": mask}


def _text_reference(model: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
  import torch

  with torch.no_grad():
    tokens, mask = torch.from_numpy(inputs["tokens"]).long(), torch.from_numpy(inputs["mask"]).long()
    y = model(input_ids=tokens, attention_mask=mask).last_hidden_state.numpy()
  return np.where(inputs["mask"][..., None], y, 0)


def _text_case(part: str, reference: str, model: Any, inputs: Mapping[str, np.ndarray], note: str) -> dict:
  import jax
  import jax.numpy as jnp

  from kling_jax.nn import params as params_lib

  graph, params = loaded(model, model.config.to_dict())
  run = jax.jit(lambda params, t, m: params_lib.merge(graph, params)(t, m))
  low = jax.jit(lambda params, t, m: params_lib.merge(graph, params)(t, m, dtype=jnp.bfloat16))
  theirs, given = _text_reference(model, inputs), (inputs["tokens"], inputs["mask"])
  return row(
    part, reference, [(run(params, *given), theirs)], [(low(params, *given), theirs)], note,
    lambda: run(params, *given).block_until_ready(), lambda: _text_reference(model, inputs),
  )  # fmt: skip


def t5() -> dict:
  model = _t5("t5", 96, 4, 32, 192, 3, 300, 5)
  inputs = _tokens(300, (150, 1, 37))
  return _text_case("T5 v1.1 encoder", "transformers T5EncoderModel", model, inputs,
                    "3 layers, one table of distances; 1, 37 and 150 tokens, padded")  # fmt: skip


def umt5() -> dict:
  model = _t5("umt5", 96, 4, 16, 192, 3, 300, 6)
  inputs = _tokens(300, (150, 1, 37))
  return _text_case("umT5 encoder", "transformers UMT5EncoderModel", model, inputs,
                    "3 layers, a table of distances each; 1, 37 and 150 tokens, padded")  # fmt: skip


def t5_fixture() -> Fixture:
  model = _t5("t5", 32, 2, 24, 48, 2, 40, 7)
  inputs = _tokens(40, (11, 1, 150))
  return Fixture(facts_of(model), weights_of(model), inputs, {"text": _text_reference(model, inputs)})


def umt5_fixture() -> Fixture:
  model = _t5("umt5", 32, 2, 24, 48, 2, 40, 8)
  inputs = _tokens(40, (11, 1, 150))
  return Fixture(facts_of(model), weights_of(model), inputs, {"text": _text_reference(model, inputs)})


def _clip(width: int, heads: int, layers: int, vocabulary: int, activation: str, seed: int) -> Any:
  import transformers

  return randomised(transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
    vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_attention_heads=heads, eos_token_id=1,
    num_hidden_layers=layers, max_position_embeddings=77, projection_dim=width // 2, hidden_act=activation,
    bos_token_id=0, pad_token_id=1,
  )), seed)  # fmt: skip


def _clip_inputs(vocabulary: int, lengths: tuple[int, ...]) -> dict[str, np.ndarray]:
  given = _tokens(vocabulary, lengths)
  end = np.arange(given["mask"].shape[1]) >= np.array(lengths)[:, None] - 1  # the end token, also as padding
  return {"tokens": np.where(end, 1, given["tokens"]).astype(np.int32), "mask": given["mask"]}


def _clip_reference(model: Any, inputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  import torch

  with torch.no_grad():
    tokens, mask = torch.from_numpy(inputs["tokens"]).long(), torch.from_numpy(inputs["mask"]).long()
    y = model(input_ids=tokens, attention_mask=mask)
  return np.where(inputs["mask"][..., None], y.last_hidden_state.numpy(), 0), y.text_embeds.numpy()


def clip_text() -> dict:
  import jax
  import jax.numpy as jnp

  from kling_jax.nn import params as params_lib

  pairs, low = [], []
  inputs = _clip_inputs(120, (77, 2, 20))
  for number, activation in enumerate(("quick_gelu", "gelu")):
    model = _clip(128, 4, 3, 120, activation, 9 + number)
    graph, params = loaded(model, model.config.to_dict())

    def both(params: Any, tokens: Any, mask: Any, dtype: Any, graph: Any = graph) -> Any:
      tower = params_lib.merge(graph, params)
      text = tower(tokens, mask, dtype=dtype)
      return text, tower.pooled(text, mask)

    run = jax.jit(both, static_argnums=3)
    theirs = _clip_reference(model, inputs)
    given = (params, inputs["tokens"], inputs["mask"])
    pairs += zip(run(*given, jnp.float32), theirs, strict=True)
    low += zip(run(*given, jnp.bfloat16), theirs, strict=True)
  return row(
    "CLIP text tower", "transformers CLIPTextModelWithProjection", pairs, low,
    "3 layers, QuickGELU and GELU; 2, 20 and 77 tokens, padded; every token and the whole text",
    lambda: jax.block_until_ready(run(*given, jnp.float32)), lambda: _clip_reference(model, inputs),
  )  # fmt: skip


def clip_text_fixture() -> Fixture:
  model = _clip(32, 2, 2, 40, "quick_gelu", 11)
  inputs = _clip_inputs(40, (9, 2, 20))
  text, pooled = _clip_reference(model, inputs)
  return Fixture(facts_of(model), weights_of(model), inputs, {"text": text, "pooled": pooled})


CASES = {"t5": t5, "umt5": umt5, "clip_text": clip_text}
FIXTURES = {"t5": t5_fixture, "umt5": umt5_fixture, "clip_text": clip_text_fixture}
