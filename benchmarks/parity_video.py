"""Parity of Wan 2.1's transformer and VAE, and Stable Diffusion's image VAE."""

import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from agreement import Fixture, relative_error
from reference import facts_of, loaded, noise, randomised, row, weights_of

# ---- Wan 2.1's transformer -------------------------------------------------------------------------------------------


def wan_model(heads: int, head: int, layers: int, ffn: int, text: int, channels: int, seed: int) -> Any:
  from diffusers import WanTransformer3DModel

  return randomised(WanTransformer3DModel(
    num_attention_heads=heads, attention_head_dim=head, in_channels=channels, out_channels=channels, text_dim=text,
    ffn_dim=ffn, num_layers=layers, rope_max_seq_len=64,
  ), seed)  # fmt: skip


def original_names(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The tensors of a diffusers Wan transformer under the names of Wan's own release."""
  pairs = [
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"), ("ffn.net.0.proj", "ffn.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"), ("ffn.net.2", "ffn.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"), ("to_out.0", "o"), ("to_q", "q"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"), ("to_k", "k"), ("to_v", "v"),
    ("condition_embedder.time_proj", "time_projection.1"), ("proj_out", "head.head"), ("attn1", "self_attn"),
    ("attn2", "cross_attn"), (".norm2.", ".norm3."),
  ]  # fmt: skip
  found = {}
  for name, array in weights.items():
    name = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
    for theirs, released in pairs:
      name = name.replace(theirs, released)
    found[name] = array
  return found


def wan_inputs(channels: int, text: int, size: tuple[int, int, int], tokens: int) -> dict[str, np.ndarray]:
  text_BLD = noise(2, tokens, text, seed=1)
  text_BLD[1, tokens // 3 :] = 0  # padding is zeros that are seen, as Wan was trained
  return {"x": noise(2, *size, channels), "time": np.array([0.25, 0.875], np.float32), "text": text_BLD}


def wan_reference(model: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
  import torch

  with torch.no_grad():
    x = torch.from_numpy(np.moveaxis(inputs["x"], -1, 1).copy())
    y = model(x, torch.from_numpy(1000 * inputs["time"]), torch.from_numpy(inputs["text"])).sample
  return np.moveaxis(y.numpy(), 1, -1).copy()


def wan_dit() -> dict:
  import jax
  import jax.numpy as jnp

  from kling_jax.nn import params as params_lib

  model = wan_model(4, 32, 3, 320, 96, 16, 0)
  graph, params = loaded(model, model.config)
  released, released_params = loaded(model, {"num_heads": 4}, original_names(weights_of(model)))
  run = jax.jit(lambda params, x, time, text: params_lib.merge(graph, params)(x, time, text))
  pairs, low = [], []
  for size in ((3, 8, 12), (1, 6, 10), (5, 14, 6)):
    inputs = wan_inputs(16, 96, size, 40)
    theirs = wan_reference(model, inputs)
    pairs.append((run(params, inputs["x"], inputs["time"], inputs["text"]), theirs))
    low.append(
      (
        run(
          params,
          *(
            jnp.asarray(inputs[k], t)
            for k, t in zip(("x", "time", "text"), ("bfloat16", "float32", "bfloat16"), strict=True)
          ),
        ),
        theirs,
      )
    )
  assert released == graph and all(np.array_equal(params[name], released_params[name]) for name in params)
  inputs = wan_inputs(16, 96, (5, 16, 16), 64)
  return row(
    "Wan 2.1 video DiT", "diffusers WanTransformer3DModel", pairs, low,
    "4 heads of 32, 3 blocks; three sizes, padded text; names of diffusers and of Wan's release",
    lambda: run(params, inputs["x"], inputs["time"], inputs["text"]).block_until_ready(),
    lambda: wan_reference(model, inputs),
  )  # fmt: skip


def wan_dit_deep() -> dict:
  """Thirty blocks, where errors grow."""
  import jax

  from kling_jax.nn import params as params_lib

  model = wan_model(2, 32, 30, 128, 32, 16, 1)
  graph, params = loaded(model, model.config)
  run = jax.jit(lambda params, x, time, text: params_lib.merge(graph, params)(x, time, text))
  inputs = wan_inputs(16, 32, (3, 8, 8), 24)
  theirs = wan_reference(model, inputs)
  call = lambda: run(params, inputs["x"], inputs["time"], inputs["text"]).block_until_ready()
  low = run(params, inputs["x"].astype("bfloat16"), inputs["time"], inputs["text"])
  return row(
    "Wan 2.1 video DiT, 30 blocks", "diffusers WanTransformer3DModel", [(call(), theirs)], [(low, theirs)],
    "2 heads of 32, 30 blocks", call, lambda: wan_reference(model, inputs), bound=2e-3,
  )  # fmt: skip


def wan_dit_fixture() -> Fixture:
  model = wan_model(2, 16, 2, 48, 24, 4, 2)
  inputs = wan_inputs(4, 24, (3, 4, 6), 7)
  return Fixture(facts_of(model), weights_of(model), inputs, {"y": wan_reference(model, inputs)})


def _adapted(model: Any, rank: int, alpha: float, seed: int) -> dict[str, np.ndarray]:
  """Puts a random PEFT adapter into a diffusers model; returns its tensors as diffusers saves them."""
  import peft
  import torch

  targets = ["to_q", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "time_proj", "proj_out"]
  model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, tensor in model.named_parameters():
      if "lora_" in name:
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator) / tensor.shape[1] ** 0.5)
  return {name: tensor.numpy().copy() for name, tensor in peft.get_peft_model_state_dict(model).items()}


def lora() -> dict:
  import json

  import jax
  import jax.numpy as jnp
  import safetensors.numpy

  from kling_jax.interop import lora as lora_lib
  from kling_jax.nn import params as params_lib

  model = wan_model(4, 32, 3, 320, 96, 16, 0)
  graph, params = loaded(model, model.config)
  tensors = _adapted(model, 8, 12.0, 1)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    safetensors.numpy.save_file(
      {f"transformer.{key}": array for key, array in tensors.items()}, folder / "a.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 12.0}))
    adapters, _ = lora_lib.read(folder, graph_config(model))
    lora_lib.export(folder / "back.safetensors", adapters, graph_config(model))
    (folder / "adapter_config.json").unlink()
    again, _ = lora_lib.read(folder / "back.safetensors", graph_config(model))
  assert all(np.allclose(adapters[key], again[key], rtol=1e-6) for key in adapters)
  merged = lora_lib.merge({key: jnp.asarray(array) for key, array in params.items()}, [(adapters, 1.0)], prefix="")
  run = jax.jit(lambda params, x, time, text: params_lib.merge(graph, params)(x, time, text))
  inputs = wan_inputs(16, 96, (3, 8, 12), 40)
  theirs = wan_reference(model, inputs)
  call = lambda: run(merged, inputs["x"], inputs["time"], inputs["text"]).block_until_ready()
  low = run(merged, inputs["x"].astype("bfloat16"), inputs["time"], inputs["text"])
  return row(
    "LoRA on Wan 2.1", "peft in diffusers' WanTransformer3DModel", [(call(), theirs)], [(low, theirs)],
    "rank 8, alpha 12, attention, MLP, modulation and head; merged here, beside there; out and in again",
    call, lambda: wan_reference(model, inputs),
  )  # fmt: skip


def graph_config(model: Any) -> Any:
  """Our config of a diffusers Wan transformer."""
  from kling_jax.interop import wan_dit

  return wan_dit.read_config(weights_of(model) if "lora" not in str(model) else _base(model), model.config)


def _base(model: Any) -> dict[str, np.ndarray]:
  """The tensors of a model that PEFT has wrapped, under their own names."""
  return {name.replace(".base_layer", ""): array for name, array in weights_of(model).items() if "lora_" not in name}


def export() -> dict:
  """What we write, opened by diffusers itself: transformer, VAE and adapters."""
  import diffusers
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from kling_jax.interop import lora as lora_lib
  from kling_jax.interop import outward
  from kling_jax.models import video_dit, video_vae
  from kling_jax.nn import lora as adapters_lib
  from kling_jax.nn import params as params_lib

  draw = np.random.default_rng(0)
  shape = video_dit.preset("d32", text_width=24, conditions=())
  graph, shapes, _ = params_lib.abstract(lambda: video_dit.VideoDiT(shape, rngs=nnx.Rngs(0)))
  params = {name: draw.normal(0, 0.2, leaf.shape).astype(np.float32) for name, leaf in shapes.items()}
  adapters = adapters_lib.init_lora(shapes, 4, r"attn\.[qv]\.kernel$|mlp\.up", key=jax.random.key(0))
  adapters = {name: draw.normal(0, 0.2, array.shape).astype(np.float32) for name, array in adapters.items()}
  vae_graph, vae_shapes, _ = params_lib.abstract(lambda: video_vae.VideoVAE.preset("xs", rngs=nnx.Rngs(0)))
  vae_params = {name: draw.normal(0, 0.2, leaf.shape).astype(np.float32) for name, leaf in vae_shapes.items()}
  inputs = wan_inputs(16, 24, (3, 8, 12), 16)
  frames = np.tanh(noise(1, 5, 16, 24, 3))
  run = jax.jit(lambda params, x, time, text: params_lib.merge(graph, params)(x, time, text))
  call = lambda weights: run(weights, inputs["x"], inputs["time"], inputs["text"])
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    outward.write_diffusers(folder / "transformer", "video_dit", shape, params)
    outward.write_diffusers(folder / "vae", "video_vae", video_vae.preset("xs"), vae_params)
    lora_lib.export(folder / "lora.safetensors", adapters, shape)
    model = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer").eval()
    plain = wan_reference(model, inputs)
    model.load_lora_adapter(str(folder / "lora.safetensors"), prefix="transformer")
    adapted = wan_reference(model, inputs)
    vae = diffusers.AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    latents, _ = _vae_reference(vae, frames)
  weights = {name: jnp.asarray(array) for name, array in params.items()}
  encode = jax.jit(lambda params, x: params_lib.merge(vae_graph, params).encode(x))
  merged = lora_lib.merge(weights, [(adapters, 1.0)], "")
  pairs = [(call(weights), plain), (call(merged), adapted), (encode(vae_params, frames), latents)]
  return {
    "part": "our export", "reference": "diffusers' from_pretrained and load_lora_adapter", "cosine_bf16": None,
    "max_rel_error": max(relative_error(*pair) for pair in pairs),
    "note": "transformer, VAE and LoRA written by us and opened by diffusers",
  }  # fmt: skip


def lora_fixture() -> Fixture:
  """To be merged into the weights of the fixture wan_dit."""
  model = wan_model(2, 16, 2, 48, 24, 4, 2)
  tensors = _adapted(model, 3, 4.5, 3)
  inputs = wan_inputs(4, 24, (3, 4, 6), 7)
  return Fixture({"r": 3, "lora_alpha": 4.5}, tensors, inputs, {"y": wan_reference(model, inputs)})


# ---- Wan 2.1's VAE ---------------------------------------------------------------------------------------------------


def wan_vae_model(base: int, mult: list[int], blocks: int, time: list[bool], z: int, seed: int) -> Any:
  from diffusers import AutoencoderKLWan

  moments = np.random.default_rng(seed).uniform(0.5, 1.5, (2, z)).round(4).tolist()
  return randomised(AutoencoderKLWan(
    base_dim=base, z_dim=z, dim_mult=mult, num_res_blocks=blocks, temperal_downsample=time, latents_mean=moments[0],
    latents_std=moments[1],
  ), seed)  # fmt: skip


def _vae_reference(model: Any, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(normalised latents, frames decoded from them), channels last."""
  import torch

  first = lambda x: torch.from_numpy(np.moveaxis(x, -1, 1).copy())
  last = lambda x: np.moveaxis(x.numpy(), 1, -1).copy()
  mean, std = (np.asarray(value, np.float32) for value in (model.config.latents_mean, model.config.latents_std))
  with torch.no_grad():
    latents = (last(model.encode(first(frames)).latent_dist.mode()) - mean) / std
    # diffusers clips what it decodes to [-1, 1]; ours does not.
    return latents, last(model.decode(first(latents * std + mean)).sample)


def wan_vae_original_names(weights: Mapping[str, np.ndarray], blocks: int) -> dict[str, np.ndarray]:
  """The tensors of a diffusers Wan VAE under the names of Wan's own release."""
  import re

  residual = [("norm1.", "residual.0."), ("conv1.", "residual.2."), ("norm2.", "residual.3."),
              ("conv2.", "residual.6."), ("conv_shortcut.", "shortcut.")]  # fmt: skip
  found = {}
  for name, array in weights.items():
    if "resnets" in name or re.match(r"encoder\.down_blocks\.\d+\.(norm|conv)", name):
      for theirs, released in residual:
        name = name.replace(theirs, released)
    up = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.*)", name)
    if up:
      place = int(up[1]) * (blocks + 2) + (int(up[3]) if up[2] == "resnets" else blocks + 1)
      name = f"decoder.upsamples.{place}.{up[4]}"
    for theirs, released in (
      ("mid_block.resnets.0", "middle.0"), ("mid_block.attentions.0", "middle.1"), ("mid_block.resnets.1", "middle.2"),
      ("down_blocks", "downsamples"), ("norm_out", "head.0"), ("conv_out", "head.2"), ("conv_in", "conv1"),
    ):  # fmt: skip
      name = name.replace(theirs, released)
    name = re.sub(r"^quant_conv", "conv1", re.sub(r"^post_quant_conv", "conv2", name))
    found[name] = array
  return found


def wan_vae() -> dict:
  import jax

  from kling_jax.nn import params as params_lib

  model = wan_vae_model(8, [1, 2, 4, 4], 2, [False, True, True], 16, 3)
  graph, params = loaded(model, model.config)
  released, released_params = loaded(
    model, {k: model.config[k] for k in ("latents_mean", "latents_std")}, wan_vae_original_names(weights_of(model), 2)
  )
  assert released == graph and all(np.array_equal(params[name], released_params[name]) for name in params)
  vae = lambda params: params_lib.merge(graph, params)
  encode = jax.jit(lambda params, x: vae(params).encode(x))
  decode = jax.jit(lambda params, z: vae(params).decode(z))
  whole = jax.jit(lambda params, x: vae(params).encode_chunk(x)[0])
  whole_back = jax.jit(lambda params, z: vae(params).decode_chunk(z)[0])
  pairs, low = [], []
  for size in ((9, 32, 48), (1, 40, 24), (13, 16, 16)):
    frames = np.tanh(noise(1, *size, 3))
    latents, decoded = _vae_reference(model, frames)
    ours, back = np.asarray(encode(params, frames)), np.clip(np.asarray(decode(params, latents)), -1, 1)
    pairs += [(ours, latents), (back, decoded)]
    for chunked, once in ((ours, whole(params, frames)), (decode(params, latents), whole_back(params, latents))):
      error = relative_error(chunked, once)
      assert error <= 1e-5, f"chunked differs from whole by {error}"
    low.append((encode(params, frames.astype("bfloat16")), latents))
  frames = np.tanh(noise(1, 9, 64, 64, 3))
  return row(
    "Wan 2.1 video VAE", "diffusers AutoencoderKLWan", pairs, low,
    "base 8; 1, 9 and 13 frames, both ways, clipped as there; chunked equals whole within 1e-5; both namings",
    lambda: decode(params, encode(params, frames)).block_until_ready(), lambda: _vae_reference(model, frames),
  )  # fmt: skip


def wan_vae_fixture() -> Fixture:
  model = wan_vae_model(4, [1, 2, 2], 1, [False, True], 3, 4)
  frames = np.tanh(noise(1, 5, 8, 12, 3))
  latents, decoded = _vae_reference(model, frames)
  return Fixture(facts_of(model), weights_of(model), {"frames": frames}, {"latents": latents, "decoded": decoded})


# ---- Stable Diffusion's VAE ------------------------------------------------------------------------------------------


def _sd_vae(widths: tuple[int, ...], blocks: int, channels: int, groups: int, seed: int) -> Any:
  from diffusers import AutoencoderKL

  stages = len(widths)
  return randomised(AutoencoderKL(
    block_out_channels=widths, layers_per_block=blocks, latent_channels=channels, norm_num_groups=groups,
    down_block_types=("DownEncoderBlock2D",) * stages, up_block_types=("UpDecoderBlock2D",) * stages, sample_size=32,
  ), seed)  # fmt: skip


def _sd_reference(model: Any, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(scaled latents, decoded frames) of frames (1, T, H, W, 3), each a picture of its own."""
  import torch

  first = lambda x: torch.from_numpy(np.moveaxis(x[0], -1, 1).copy())
  last = lambda x: np.moveaxis(x.numpy(), 1, -1)[None].copy()
  with torch.no_grad():
    latents = last(model.encode(first(frames)).latent_dist.mode()) * model.config.scaling_factor
    return latents, last(model.decode(first(latents / model.config.scaling_factor)).sample)


def sd_vae() -> dict:
  import jax

  from kling_jax.nn import params as params_lib

  model = _sd_vae((16, 32, 32), 2, 4, 8, 12)
  graph, params = loaded(model, model.config)
  encode = jax.jit(lambda params, x: params_lib.merge(graph, params).encode(x))
  decode = jax.jit(lambda params, z: params_lib.merge(graph, params).decode(z))
  pairs, low = [], []
  for size in ((3, 32, 48), (1, 36, 20)):
    frames = np.tanh(noise(1, *size, 3))
    latents, decoded = _sd_reference(model, frames)
    pairs += [(encode(params, frames), latents), (decode(params, latents), decoded)]
    low += [(encode(params, frames.astype("bfloat16")), latents), (decode(params, latents.astype("bfloat16")), decoded)]
  frames = np.tanh(noise(1, 2, 64, 64, 3))
  return row(
    "Stable Diffusion image VAE", "diffusers AutoencoderKL", pairs, low,
    "three stages of 16, 32, 32; frames of 32 x 48 and 36 x 20, both ways",
    lambda: decode(params, encode(params, frames)).block_until_ready(), lambda: _sd_reference(model, frames),
  )  # fmt: skip


def sd_vae_fixture() -> Fixture:
  model = _sd_vae((8, 16), 1, 4, 4, 13)
  frames = np.tanh(noise(1, 2, 8, 12, 3))
  latents, decoded = _sd_reference(model, frames)
  return Fixture(facts_of(model), weights_of(model), {"frames": frames}, {"latents": latents, "decoded": decoded})


CASES = {
  "wan_dit": wan_dit, "wan_dit_deep": wan_dit_deep, "lora": lora, "export": export, "wan_vae": wan_vae,
  "sd_vae": sd_vae,
}  # fmt: skip
FIXTURES = {"wan_dit": wan_dit_fixture, "lora": lora_fixture, "wan_vae": wan_vae_fixture, "sd_vae": sd_vae_fixture}
